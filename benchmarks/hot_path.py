"""Where the time of a prediction goes, in the process: `python -m benchmarks.hot_path`.

Each step of `POST /predict` is run by itself on batches of 1, 16 and 64 requests of one row (30
columns, gradient boosting), and the whole handler is called by as many tasks as ASGI would, without
a socket. Microseconds a request, the median of `ROUNDS`; CPU time, so that other work on the
machine counts little. Prints a table and writes `benchmarks/results/hot_path.json`.
"""

from __future__ import annotations

import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving import model as benchmark
from driftmill.home import cores
from driftmill.serving.codec import encode_answers
from driftmill.serving.log import Prediction, now_us
from driftmill.serving.server import App, Receive, Scope, Send, Server
from driftmill.store import Store

RESULT = Path(__file__).parent / "results" / "hot_path.json"
ROUNDS, REQUESTS, BATCHES = 7, 6400, (1, 16, 64)


def main() -> None:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = benchmark.make(folder)
        bodies = [json.dumps({"records": [r]}).encode() for r in made.records]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            table = runner.run(_measure(folder, bodies))
    result = {
        "machine": f"{platform.machine()}, {cores()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("msgspec", "numpy", "onnxruntime", "uvloop")},
        "batches": BATCHES,
        "us_per_request": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'microseconds a request, batches of':<36}" + "".join(f"{b:>8}" for b in BATCHES))
    for step, values in table.items():
        print(f"{step:<36}" + "".join(f"{v:>8.2f}" for v in values))


async def _measure(folder: Path, bodies: list[bytes]) -> dict[str, list[float]]:
    server = Server(Store(folder / "store"), benchmark.NAME, folder / "spool")
    await server.start()
    while server.versions.serving is None:
        await asyncio.sleep(0.01)
    table: dict[str, list[float]] = {}
    for size in BATCHES:
        steps = {step: _time(call, size) for step, call in _steps(server, bodies[:size]).items()}
        whole = await _whole(server, bodies, size) - await _whole(_nothing, bodies, size)
        steps["reading, waiting, counting, sending"] = whole - sum(steps.values())
        steps["the whole handler"] = whole
        for step, value in steps.items():
            table.setdefault(step, []).append(round(value, 2))
    await server.stop()
    return table


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What the benchmark itself costs."""
    await receive()
    await send({"type": "http.response.start"})
    await send({"type": "http.response.body"})


def _steps(server: Server, bodies: list[bytes]) -> dict[str, Callable[[], Any]]:
    """The steps of a batch of requests, each with what the ones before made."""
    serving = server.versions.serving
    assert serving is not None
    champion = serving.champion
    codec, session = champion.codec, champion.bundle.session
    records = [r for body in bodies for r in codec.records(body)]
    arrays = codec.arrays(records)  # type: ignore[attr-defined]
    output = session.run(*arrays)
    ids = [server.new_id() for _ in records]
    answers = codec.answers(ids, output)

    def log() -> None:
        at = now_us()
        rows = [
            Prediction(a.id, a.id, at, champion.version, "champion", a.prediction, a.score, r)
            for a, r in zip(answers, records, strict=True)
        ]
        server.log.append(champion.schema, rows)

    return {
        "decode and check": lambda: [codec.records(body) for body in bodies],
        "records to arrays": lambda: codec.arrays(records),  # type: ignore[attr-defined]
        "model": lambda: session.run(*arrays),
        "arrays to answers": lambda: codec.answers(ids, output),
        "inference log": log,
        "encode": lambda: [encode_answers(server.model, champion.version, [a]) for a in answers],
    }


def _time(call: Callable[[], Any], size: int) -> float:
    """CPU microseconds a request."""
    found = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(REQUESTS // size):
            call()
        found.append((time.thread_time() - began) / REQUESTS * 1e6)
    return statistics.median(found)


async def _whole(app: App, bodies: list[bytes], clients: int) -> float:
    """CPU microseconds a request of the event loop's thread, as many requests at a time."""

    async def send(message: Any) -> None:
        pass

    async def client(number: int) -> None:
        for turn in range(REQUESTS // clients):
            body = bodies[(number + turn) % len(bodies)]

            async def receive(body: bytes = body) -> Any:
                return {"type": "http.request", "body": body, "more_body": False}

            headers = [
                (b"host", b"127.0.0.1:3000"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
            await app(scope, receive, send)

    found = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        await asyncio.gather(*(client(number) for number in range(clients)))
        found.append((time.thread_time() - began) / REQUESTS * 1e6)
    return statistics.median(found)


if __name__ == "__main__":
    main()
