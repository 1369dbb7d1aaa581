"""The monitor: watches one model and says when it has drifted.

    python -m services.monitor --contract FILE --port 9300 --webhook URL --token-file FILE

It reads the inference log from the store that `DRIFTMILL_STORE` or `DRIFTMILL_HOME` names, judges
each full window and keeps the result there; without a champion it waits for one. It serves:

| path | what |
|---|---|
| `/metrics` | Prometheus metrics |
| `/windows` | the newest results as JSON; `?last=N` |
| `/windows/{index}/report` | the Evidently page of a window that has one |
| `/livez`, `/readyz` | the process runs; the last poll of the store succeeded |

Alarms go to the webhook as Alertmanager would send them; without one they are metrics only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from driftmill import contract, home
from driftmill.bundle import BundleError
from driftmill.contract import Contract, ContractError
from driftmill.monitor import alerts, windows
from driftmill.monitor.drift import WindowResult
from driftmill.monitor.windows import Monitor
from driftmill.store import Store

logger = logging.getLogger("services.monitor")

#: Most windows that one answer lists.
MOST_WINDOWS = 1000


class Metrics:
    """What Prometheus sees; higher is always worse."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ["model", *labels], registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model", *labels], registry=self.registry)

        self.detected = gauge(
            "model_drift_detected", "1 where the newest window has drifted.", "version"
        )
        self.alarm = gauge("model_drift_alarm", "1 while the drift alarm is on.", "version")
        self.score = gauge("model_drift_score", "Weighted mean effect of drifted columns, 0 to 1.")
        self.features = gauge("model_drift_features_drifted", "Inputs that have drifted.")
        self.feature_score = gauge(
            "model_feature_drift_score", "Distance from the reference, 0 to 1.", "feature"
        )
        self.missing = gauge(
            "model_feature_missing_ratio", "Part of the rows without a valid value.", "feature"
        )
        self.unseen = gauge(
            "model_feature_unseen_ratio", "Part of the values that are new categories.", "feature"
        )
        self.out_of_range = gauge(
            "model_feature_out_of_range_ratio",
            "Part of the values outside the contract's range.",
            "feature",
        )
        self.quality = gauge(
            "model_quality", "The metric on the newest labelled rows.", "metric", "version"
        )
        self.quality_reference = gauge(
            "model_quality_reference",
            "The champion's metric on its test rows.",
            "metric",
            "version",
        )
        self.quality_alarm = gauge(
            "model_quality_alarm", "1 while the quality alarm is on.", "version"
        )
        self.evidently_score = gauge(
            "evidently_column_drift_score", "Evidently's distance, newest report.", "feature"
        )
        self.evidently_share = gauge(
            "evidently_drifted_columns_share", "Evidently's share of drifted columns."
        )
        self.success = gauge(
            "model_drift_last_success_timestamp_seconds", "When the log was last read and judged."
        )
        self.lag = gauge("model_monitor_lag_rows", "Rows read and not yet judged.")
        self.windows = counter("model_drift_windows_total", "Windows judged.", "drifted")
        self.labelled = counter("model_labelled_rows_total", "Labels read.")
        self.skipped = counter("model_monitor_skipped_segments_total", "Log segments unreadable.")
        self.errors = counter("model_monitor_errors_total", "Polls that failed.")
        self.reports = counter("model_monitor_reports_total", "Evidently reports.", "outcome")
        self.posts = counter("model_alert_posts_total", "Posts to the webhook.", "outcome")
        for outcome in ("accepted", "failed"):
            self.posts.labels(model, outcome)
        for outcome in ("made", "failed"):
            self.reports.labels(model, outcome)
        for drifted in ("true", "false"):
            self.windows.labels(model, drifted)
        self._per_version = (
            self.detected,
            self.alarm,
            self.quality,
            self.quality_reference,
            self.quality_alarm,
        )
        self._version = ""

    def show(self, version: str, result: WindowResult | None) -> None:
        """Show the newest window of the champion; None where it has none yet."""
        model = self.model
        if version != self._version:
            for gauge in self._per_version:
                gauge.clear()
            self._version = version
        self.detected.labels(model, version).set(bool(result and result.drifted))
        self.alarm.labels(model, version).set(bool(result and result.alarm))
        self.score.labels(model).set(result.score if result else 0)
        self.features.labels(model).set(result.features_drifted if result else 0)
        for column in result.columns if result else ():
            self.feature_score.labels(model, column.name).set(column.effect)
            self.missing.labels(model, column.name).set(column.missing)
            self.unseen.labels(model, column.name).set(column.unseen)
            self.out_of_range.labels(model, column.name).set(column.out_of_range)
        quality = result.quality if result else None
        if quality is not None:
            self.quality.labels(model, quality.metric, version).set(quality.value)
            self.quality_reference.labels(model, quality.metric, version).set(quality.reference)
        self.quality_alarm.labels(model, version).set(bool(quality and quality.alarm))


class Reporter:
    """Has reports made by a process of its own, so that judging never waits for one.

    A worker that dies costs the report that it was at.
    """

    def __init__(self, settings: Contract, store: Store, metrics: Metrics) -> None:
        self.command = [sys.executable, "-m", "driftmill.monitor.report", "--store", store.uri]
        self.command += ["--model", settings.model, "--rows", str(settings.monitor.report_rows)]
        self.metrics = metrics
        self.queue: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> None:
        """Make reports until cancelled."""
        # Started before it is needed: importing Evidently takes seconds.
        worker = await self._start()
        try:
            while True:
                index = await self.queue.get()
                if worker.returncode is not None:
                    worker = await self._start()
                await self._one(worker, index)
        finally:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *self.command, stdin=pipe, stdout=pipe, limit=2**24
        )

    async def _one(self, worker: asyncio.subprocess.Process, index: int) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        line = b""
        with contextlib.suppress(ConnectionError):
            worker.stdin.write(b"%d\n" % index)
            await worker.stdin.drain()
            line = await worker.stdout.readline()
        if not line:
            logger.error("window %d has no report: the worker died, see its output above", index)
            self.metrics.reports.labels(self.metrics.model, "failed").inc()
            return
        report = json.loads(line)
        if report["error"]:
            logger.error("window %d has no report: %s", index, report["error"])
            self.metrics.reports.labels(self.metrics.model, "failed").inc()
            return
        self.metrics.reports.labels(self.metrics.model, "made").inc()
        self.metrics.evidently_share.labels(self.metrics.model).set(report["share"] or 0.0)
        for name, distance in report["scores"].items():
            self.metrics.evidently_score.labels(self.metrics.model, name).set(distance)
        logger.info("window %d has a report (%.1f s)", index, report["seconds"])


class Service:
    """The monitor's loop and its pages."""

    def __init__(
        self, settings: Contract, store: Store, webhook: str | None, token: Path | None, url: str
    ) -> None:
        self.contract = settings
        self.store = store
        self.metrics = Metrics(settings.model)
        self.monitor = Monitor(settings, store)
        self.reporter = Reporter(settings, store, self.metrics)
        self.notifier: alerts.Notifier | None = None
        if webhook is not None:
            self.notifier = alerts.Notifier(
                store,
                settings.model,
                webhook,
                token,
                url,
                lambda outcome: self.metrics.posts.labels(settings.model, outcome).inc(),
            )
        self.ready = False
        self.problem = "the store has not been read yet"
        self.app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/livez", self._livez),
                Route("/readyz", self._readyz),
                Route("/windows", self._windows),
                Route("/windows/{index:int}/report", self._report),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        stop = asyncio.Event()
        reporter = asyncio.create_task(self.reporter.run())
        loop = asyncio.create_task(self._watch(stop))
        # A loop that ends by itself is a defect: the process must not live on as if it watched.
        for task in (loop, reporter):
            task.add_done_callback(_end_with)
        yield
        stop.set()
        await loop
        reporter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporter
        if self.notifier is not None:
            await self.notifier.close()

    async def _watch(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self._poll()
            except (BundleError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
                if problem != self.problem:
                    logger.error("the log cannot be watched: %s", problem)
                self.metrics.errors.labels(self.contract.model).inc()
                self.ready, self.problem = False, problem
            if self.monitor.behind and self.ready:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(self.contract.monitor.poll, 0.05))

    async def _poll(self) -> None:
        """One look at the log, and what follows from it."""
        model, monitor = self.contract.model, self.monitor
        labels, skipped = monitor.labelled_rows, monitor.skipped_segments
        results = await asyncio.to_thread(monitor.tick)
        self.metrics.labelled.labels(model).inc(monitor.labelled_rows - labels)
        self.metrics.skipped.labels(model).inc(monitor.skipped_segments - skipped)
        for result in results:
            logger.info("%s", _line(result))
            self.metrics.windows.labels(model, str(result.drifted).lower()).inc()
        while monitor.unreported:
            self.reporter.queue.put_nowait(monitor.unreported.pop(0))
        if monitor.champion is not None:
            self.metrics.show(monitor.champion.version, monitor.current)
        self.metrics.lag.labels(model).set(monitor.lag_rows)
        if self.notifier is not None:
            on = alerts.active(model, monitor.current)
            await self.notifier.step(on, news=bool(results))
        self.metrics.success.labels(model).set(time.time())
        self.ready, self.problem = True, ""

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _livez(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, request: Request) -> Response:
        if not self.ready:
            return PlainTextResponse(f"{self.problem}\n", status_code=503)
        return PlainTextResponse("ok\n")

    async def _windows(self, request: Request) -> Response:
        try:
            last = int(request.query_params.get("last", "50"))
        except ValueError:
            return JSONResponse({"error": "`last` must be a whole number"}, status_code=422)
        if not 1 <= last <= MOST_WINDOWS:
            text = f"`last` must be between 1 and {MOST_WINDOWS}"
            return JSONResponse({"error": text}, status_code=422)
        found = await asyncio.to_thread(windows.results, self.store, self.contract.model, last)
        return JSONResponse([result.model_dump(mode="json") for result in found])

    async def _report(self, request: Request) -> Response:
        index: int = request.path_params["index"]
        key = f"{windows.window_key(self.contract.model, index)}/report.html"
        try:
            page = await asyncio.to_thread(self.store.read, key)
        except FileNotFoundError:
            return JSONResponse({"error": f"window {index} has no report"}, status_code=404)
        return Response(page, media_type="text/html; charset=utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the service until SIGTERM or Ctrl-C. Exit code 2: the contract or the arguments are
    wrong."""
    parser = argparse.ArgumentParser(prog="services.monitor", description="Watch a model.")
    parser.add_argument("--contract", required=True, type=Path, help="the model's contract")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", required=True, type=int, help="port to listen on")
    parser.add_argument("--webhook", help="where alarms are posted")
    parser.add_argument("--token-file", type=Path, help="file with the webhook's bearer token")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = contract.load(options.contract)
    except ContractError as error:
        print(error, file=sys.stderr)
        return 2
    url = f"http://{options.host}:{options.port}"
    service = Service(settings, home.find().store, options.webhook, options.token_file, url)
    # Uvicorn raises the signal that stopped it once more when it is done; that must not kill us.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(
        service.app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    return 0


def _line(result: WindowResult) -> str:
    state = "alarm" if result.alarm else "drifted" if result.drifted else "calm"
    names = ", ".join(c.name for c in result.columns if c.drifted)
    text = f"window {result.index} of {result.version}: {state}, score {result.score:.3f}"
    return f"{text} ({names})" if names else text


def _end_with(task: asyncio.Task[None]) -> None:
    """End the process where a task failed; whoever supervises it starts it again."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("the monitor stops", exc_info=error)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
