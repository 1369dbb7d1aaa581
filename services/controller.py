"""The controller as a service: `python -m services.controller --contract FILE --token-file FILE`.

| | |
|---|---|
| `POST /alerts` | Alertmanager's webhook (payload version 4); 202 with a decision for each alert |
| `POST /trigger` | `{"reason": "..."}`: a person asks for a run |
| `POST /reset` | `{"reason": "..."}`: a person closes the breaker |
| `GET /decisions`, `GET /runs` | the ledger, newest first; `?limit=100` |
| `GET /livez`, `GET /readyz`, `GET /metrics` | for the one who looks after it |

The three POSTs need `Authorization: Bearer TOKEN`. The token file is read for each request, so that
a token can be replaced without a restart.

| status | why |
|---|---|
| 400 | the body is not JSON |
| 401 | the token is missing or wrong |
| 413 | the body is larger than 1 MiB |
| 422 | it is JSON, but not what this address takes; `problems` says where |
| 503 | ledger, store or token file cannot be read at present; send it again |

Ending the service does not end a run: the next one adopts it.

| `--runner` | what a run is |
|---|---|
| `local` | a process of this machine; `driftmill down` ends it |
| `job` | a Kubernetes Job of the namespace that this service runs in, made from `--job-template` |
| `kubeflow` | a run of Kubeflow Pipelines at `--endpoint` |
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from driftmill import home as homes
from driftmill.contract import ContractError, parse_duration
from driftmill.home import Home
from driftmill.retrain import alerts, runner
from driftmill.retrain.controller import Controller
from driftmill.retrain.ledger import Ledger, LedgerError, to_dict
from driftmill.retrain.runner import LocalRunner, Runner, RunnerError
from pipelines import job, kubeflow
from pipelines.kubeflow import ApiError
from pipelines.kubeflow_runner import KubeflowRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY_BYTES = 1024 * 1024
#: Seconds between two looks at the runs, by runner: a process is asked more cheaply than a cluster.
_POLL = {"local": 1.0, "job": 2.0, "kubeflow": 5.0}
#: What store, ledger and runner raise where trying again later may help.
_LATER = (OSError, ValueError, SQLAlchemyError)


class _Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, error: str, problems: list[str] | None = None) -> None:
        self.status = status
        self.content = {"error": error} | ({"problems": problems} if problems else {})
        super().__init__(error)


class _Ask(BaseModel):
    """Body of `/trigger` and `/reset`."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field("", max_length=300)


class Ticker:
    """Runs the controller's ticks, one after the other, until it is stopped.

    Args:
        controller: whose.
        period: seconds between two ticks; `wake` brings the next forward.
    """

    def __init__(self, controller: Controller, period: float) -> None:
        self._controller = controller
        self._period = period
        self._wake = asyncio.Event()
        self._stopped = False
        #: Why the last tick was not finished; the service is ready while this is None.
        self.problem: str | None = "no tick yet"

    def wake(self) -> None:
        """Do the next tick at once."""
        self._wake.set()

    def stop(self) -> None:
        """Let the present tick be the last."""
        self._stopped = True
        self._wake.set()

    async def run(self) -> None:
        """Tick until stopped. Store and ledger may be away for a while; other errors go out."""
        while not self._stopped:
            self._wake.clear()
            try:
                await asyncio.to_thread(self._controller.tick)
                if self.problem is not None:
                    logger.info("ready")
                self.problem = None
            except _LATER as error:
                self._controller.metrics.tick_failures.labels(self._controller.model).inc()
                if self.problem != str(error):
                    logger.error("a tick was not finished: %s", error, exc_info=_unexpected(error))
                self.problem = str(error)
            if not self._stopped:
                try:
                    await asyncio.wait_for(self._wake.wait(), self._period)
                except TimeoutError:
                    continue


def application(controller: Controller, ticker: Ticker, token_file: Path) -> Starlette:
    """The ASGI application around a controller."""

    async def post_alerts(request: Request) -> Response:
        body = await _authorised_body(request, token_file)
        try:
            payload = alerts.parse(body)
        except alerts.PayloadError as error:
            if error.syntax:
                raise _Refusal(400, f"the body is not JSON: {error}") from None
            raise _Refusal(
                422, "the body is not an Alertmanager payload of version 4", error.problems
            ) from None
        replies = await _later(lambda: controller.handle(payload))
        ticker.wake()
        return JSONResponse({"decisions": [asdict(r) for r in replies]}, status_code=202)

    async def post_trigger(request: Request) -> Response:
        ask = _parse(await _authorised_body(request, token_file))
        reply = await _later(lambda: controller.trigger(ask.reason))
        ticker.wake()
        return JSONResponse({"decisions": [asdict(reply)]}, status_code=202)

    async def post_reset(request: Request) -> Response:
        ask = _parse(await _authorised_body(request, token_file))
        decision = await _later(lambda: controller.reset(ask.reason))
        ticker.wake()
        return JSONResponse(to_dict(decision))

    async def get_decisions(request: Request) -> Response:
        limit = _limit(request)
        found = await _later(lambda: controller.decisions(limit))
        return JSONResponse({"decisions": [to_dict(row) for row in found]})

    async def get_runs(request: Request) -> Response:
        limit = _limit(request)
        found = await _later(lambda: controller.runs(limit))
        return JSONResponse({"runs": [to_dict(row) for row in found]})

    async def livez(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if ticker.problem is not None:
            return PlainTextResponse(f"not ready: {ticker.problem}\n", status_code=503)
        return PlainTextResponse("ok\n")

    async def get_metrics(request: Request) -> Response:
        content = generate_latest(controller.metrics.registry)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refusal)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.content, status_code=error.status, headers=headers)

    return Starlette(
        routes=[
            Route("/alerts", post_alerts, methods=["POST"]),
            Route("/trigger", post_trigger, methods=["POST"]),
            Route("/reset", post_reset, methods=["POST"]),
            Route("/decisions", get_decisions),
            Route("/runs", get_runs),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", get_metrics),
        ],
        exception_handlers={_Refusal: refuse},
    )


async def _authorised_body(request: Request, token_file: Path) -> bytes:
    """The body of a request that has the token; the token comes first, so that a stranger cannot
    make the service read anything."""
    try:
        token = token_file.read_bytes().strip()
    except OSError as error:
        logger.error("the token file cannot be read: %s", error)
        raise _Refusal(503, "the token file cannot be read") from None
    if not token:
        logger.error("the token file %s is empty", token_file)
        raise _Refusal(503, "the token file is empty")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
        raise _Refusal(401, "this address needs the header Authorization: Bearer TOKEN")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise _Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect:
        raise _Refusal(400, "the body ended early") from None
    return bytes(body)


def _parse(body: bytes) -> _Ask:
    try:
        return _Ask.model_validate_json(body or b"{}")
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise _Refusal(400, f"the body is not JSON: {found[0]['msg']}") from None
        problems = [f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in found]
        raise _Refusal(422, 'the body is not {"reason": "..."}', problems) from None


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "100")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 1000:
        raise _Refusal(422, "limit must be a number from 1 to 1000")
    return int(text)


def _unexpected(error: Exception) -> bool:
    """Whether a traceback helps; a store that is away says what is wrong by itself."""
    return not isinstance(error, OSError)


async def _later(call: Callable[[], T]) -> T:
    try:
        return await run_in_threadpool(call)
    except _LATER as error:
        logger.error("a request was not answered: %s", error, exc_info=_unexpected(error))
        raise _Refusal(503, f"ledger or store cannot be used at present: {error}") from None


async def serve(arguments: argparse.Namespace) -> None:
    """Run controller and web server until SIGTERM or SIGINT."""
    home = homes.find()
    chosen = _runner(arguments, home)
    ledger = Ledger(home.ledger_url)
    controller = Controller(
        arguments.contract, home.store, ledger, chosen, train_first=arguments.train_first
    )
    ticker = Ticker(controller, arguments.poll or _POLL[arguments.runner])
    server = uvicorn.Server(
        uvicorn.Config(
            application(controller, ticker, arguments.token_file),
            host=arguments.host,
            port=arguments.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )

    def noted(number: int, frame: FrameType | None) -> None:
        """The server raises the signal again after its own shutdown; the ticks end after that."""

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, noted)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(ticker.run())
            await server.serve()
            ticker.stop()
    finally:
        ledger.close()


def _runner(arguments: argparse.Namespace, home: Home) -> Runner:
    """The runner that is asked for. Raises RunnerError or ApiError where it cannot be had."""
    if arguments.runner == "local":
        return LocalRunner(home, shlex.split(arguments.runner_command) or runner.COMMAND)
    if arguments.runner == "kubeflow":
        return KubeflowRunner(arguments)
    job.read(arguments.job_template)  # a mistake in it is said now, and not when a run is wanted
    api = job.Api.of_this_pod()
    return job.JobRunner(api, arguments.job_template, arguments.start_within)


def _duration(text: str) -> timedelta:
    try:
        return timedelta(seconds=float(str(parse_duration(text))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    """Entry point. 0: ended by a signal; 1: it cannot go on; 2: wrong arguments or contract."""
    parser = argparse.ArgumentParser(
        prog="python -m services.controller",
        description="Decide about retraining and carry it out.",
    )
    parser.add_argument("--contract", type=Path, required=True, help="the contract file")
    parser.add_argument("--port", type=int, default=3002, help="port to listen on (3002)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument(
        "--token-file", type=Path, required=True, help="file with the bearer token of the POSTs"
    )
    parser.add_argument(
        "--poll",
        type=float,
        metavar="SECONDS",
        help="seconds between two looks at the runs (local: 1, job: 2, kubeflow: 5)",
    )
    parser.add_argument(
        "--train-first",
        action="store_true",
        help="train the first model where none serves yet; a first run that failed is tried again "
        "after the contract's cooldown, until its breaker opens",
    )
    parser.add_argument(
        "--runner",
        choices=tuple(_POLL),
        default="local",
        help="what trains: a process of this machine, a Kubernetes Job, Kubeflow Pipelines (local)",
    )
    parser.add_argument(
        "--runner-command",
        default="",
        metavar="COMMAND",
        help="local: what trains, in place of `python -m pipelines.run`; it gets --contract FILE, "
        "--run-id ID and --trigger TEXT, and writes the run's outcome.json",
    )
    parser.add_argument(
        "--job-template", type=Path, metavar="FILE", help="job: a Job in YAML, to be filled in"
    )
    parser.add_argument(
        "--start-within",
        type=_duration,
        default=job.START_WITHIN,
        metavar="TIME",
        help="job: time that a pod may wait for its node and its image (30m)",
    )
    kubeflow.add_options(parser.add_argument_group("kubeflow"))
    parser.set_defaults(store=None, image=None)  # by the environment, as for what runs here
    arguments = parser.parse_args()
    if arguments.runner == "job" and arguments.job_template is None:
        parser.error("the runner job needs --job-template FILE")
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        if not arguments.token_file.read_bytes().strip():
            raise OSError(f"{arguments.token_file} is empty; put a token into it")
        asyncio.run(serve(arguments))
    except (ContractError, OSError, RunnerError, ApiError) as error:
        print(f"controller: {error}", file=sys.stderr)
        return 2
    except LedgerError as error:
        print(f"controller: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
