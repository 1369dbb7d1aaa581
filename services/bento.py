"""What the BentoML services have in common: how BentoML is set up, and how a process serves.

BentoML brings builds, its own client and its documentation page; requests are answered by the
ASGI handler of `driftmill.serving.server`, mounted before BentoML's routes.

`DRIFTMILL_MODEL` (one, or several with commas between them), `DRIFTMILL_STORE` and
`DRIFTMILL_HOME` say what is served from where, and `DRIFTMILL_TOKENS` and `DRIFTMILL_RATE` who may
ask it.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from functools import cache, partial
from typing import Any

from driftmill.serving import tracing

# Both send usage statistics unless told not to, and read this when they are imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
if not any(map(os.environ.get, tracing.ENDPOINTS)):
    os.environ.setdefault(tracing.DISABLED, "true")
# BentoML shares metrics between processes through files; these services are one process each.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import msgspec
import uvicorn

from driftmill import home
from driftmill.serving.codec import JSON
from driftmill.serving.mount import STOP, Mount
from driftmill.serving.server import Request, Response, Server
from services import connections, telemetry, workers
from services.access import LOOPBACK, access, add_arguments, check_arguments, options
from services.corked import Protocol
from services.drain import Drainer

#: Seconds that requests get to end after the drain.
GRACE = 30
#: Makes an API of a method. Services take both from here, so that BentoML is set up before.
api: Any = bentoml.api
#: Makes a service of a class. BentoML's timeout keeps the state of every request for all that time,
#: so it is short; bodies that come slowly are refused before.
service: Any = partial(
    bentoml.service,
    workers=1,
    traffic={"timeout": 15},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)


@cache
def servers() -> list[Server]:
    """The servers of this process, one a model."""
    models = _models()
    if not models:
        raise RuntimeError("no model to serve: set DRIFTMILL_MODEL to the contract's `model`")
    places = home.find()
    made = [Server(places.store, model, places.spool) for model in models]
    telemetry.watch(made)
    return made


def server() -> Server:
    """The first one: that of paths without a model's name, and of BentoML's client."""
    return servers()[0]


def mount(of: Any) -> None:
    """Put the server's handler before the routes of a service."""
    of.add_asgi_middleware(Mount, make=servers, access=access)


async def predict(body: bytes, kind: str = JSON) -> dict[str, Any]:
    """The answer to a body of `POST /predict`."""
    response, _ = await server().predict(Request(body, server().new_id(), kind=kind))
    return content(response)


def content(response: Response) -> dict[str, Any]:
    """An answer as BentoML gives it on."""
    return msgspec.json.decode(response.body, type=dict[str, Any])


def main(of: Any, module: str, description: str, arguments: list[str] | None = None) -> None:
    """Serve models until SIGTERM or SIGINT.

    Args:
        of: the service.
        module: how it is called: `python -m MODULE`.
        description: what `--help` says.
        arguments: of the command line; None takes the process's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        help="name of the model, as in its contract; may be given several times; "
        "default: $DRIFTMILL_MODEL, with commas between several",
    )
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        default=os.environ.get("DRIFTMILL_WORKERS") or "1",
        help="processes that share the port; default: $DRIFTMILL_WORKERS, or 1",
    )
    parser.add_argument(
        "--max-connections",
        type=_count,
        metavar="N",
        default=1024,
        help="most that each process holds; requests on others get 503; default: %(default)s",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        help="most that clients get to leave after SIGTERM; default: 20, and 0 on a loopback",
    )
    telemetry.add_arguments(parser)
    add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.model:
        os.environ["DRIFTMILL_MODEL"] = ",".join(given.model)
    models = _models()
    if not models:
        parser.error("say with --model, or in DRIFTMILL_MODEL, what to serve")
    if len(set(models)) < len(models):
        parser.error("a model is given twice")
    if given.drain_seconds is None:
        given.drain_seconds = 0.0 if given.host in LOOPBACK else 20.0
    telemetry.check_arguments(parser, given)
    check_arguments(parser, given)
    if given.workers == 1:
        _serve(of, given, None)
        return
    try:
        held = workers.reserve(given.host, given.port)
    except OSError as error:
        sys.exit(
            f"{given.host}:{given.port} cannot be listened at ({error.strerror}): free it, or "
            "choose another with --host and --port"
        )
    limit = given.drain_seconds + GRACE + STOP + 5
    serve = partial(_serve, of, given)
    code = workers.Supervisor(given.workers, serve, limit).run()
    for reserved in held:
        reserved.close()
    sys.exit(code)


def _serve(of: Any, given: argparse.Namespace, worker: workers.Worker | None) -> None:
    """Serve in this process until told to end. Raises SystemExit where it could not start."""
    inner = of.to_asgi()
    # First of all, before BentoML's layers: nothing of them is of use to these requests.
    inner.user_middleware = [layer for layer in inner.user_middleware if layer.cls is not Mount]
    app = Mount(inner, servers, access, worker)
    most = connections.make_room(given.max_connections)
    settings = {"http": Protocol, **options()}
    settings["http"] = connections.limited(most, server().metrics.rejected.inc, settings["http"])
    config = uvicorn.Config(
        app,
        host=given.host,
        port=given.port,
        loop="uvloop",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        # Longer than clients and load balancers keep an idle connection: they close it, and never
        # send on one that is just being closed here.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE,
        **settings,
    )
    running = Drainer(
        config,
        given.drain_seconds,
        begin=_drain,
        is_ready=lambda: app.ready,
        worker=worker,
    )
    with suppress(KeyboardInterrupt):
        running.run(workers.bound(given.host, given.port) if worker is not None else None)
    if not running.started:
        sys.exit(1)


def _drain() -> None:
    for each in servers():
        each.drain()


def _models() -> list[str]:
    return [name for name in os.environ.get("DRIFTMILL_MODEL", "").split(",") if name]


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
