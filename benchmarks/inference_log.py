"""What the inference log costs: `python -m benchmarks.inference_log`.

The service of a small linear model of the payments example as shipped, once for each way to log:

- `no log`: a stand-in that only this benchmark has: rows are made, and neither encoded nor written
- `never moved`: `fsync: none`, and nothing moves into the store while it is measured
- `none`, `interval`, `batch`: that `fsync`; files move every 2 s or 20,000 rows, as by default
- `moved all the time`: `fsync: none`, a file every 500 rows

wrk (Debian: `apt-get install wrk`) drives one after the other, at 1 and 64 connections, in
interleaved rounds whose medians are taken. Its clients wait for an answer before they ask again, so
what a stall delays is a request of each client, not those that would have come meanwhile: the
longest time shows it best. `no core` is the share of a round in which the service's event loop
could have run and had no core (Linux tells): what that delays is this machine's doing. At the end
each log must hold a row for every answer. What `batch` costs is what the disk takes to say that it
has something, which is measured beside.

Prints a table and writes `benchmarks/results/inference_log.json`.

    python -m benchmarks.inference_log --rounds 1 --seconds 1      # a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import models, wrk
from benchmarks.rollouts import free_port
from driftmill import bundle, contract, rollout
from driftmill.home import cores
from driftmill.store import Store

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "inference_log.json"
OFF = "no log"
#: `serve.log` of each way.
WAYS: dict[str, dict[str, Any]] = {
    OFF: {},
    "never moved": {"rotate": "1h", "rotate_rows": 10**9},
    "none": {"fsync": "none"},
    "interval": {"fsync": "interval"},
    "batch": {"fsync": "batch"},
    "moved all the time": {"rotate_rows": 500},
}
CONNECTIONS = (1, 64)
#: Seconds that a service gets to start, and to end.
PATIENCE = 120

_NO_LOG = """
from driftmill.serving.log import Log
Log.append = lambda *arguments, **named: None
from services.tabular import Service, main
main(Service, "services.tabular", "")
"""

_WRK = """
local file = io.open("%s", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/json"
file:close()
"""


@dataclass
class Load:
    """What one round measured; times in milliseconds."""

    answers: int
    seconds: float
    p50: float
    p99: float
    p999: float
    longest: float
    failed: int
    cpu: float = 0.0
    """Microseconds of processor time that the service took for an answer."""
    no_core: float = 0.0
    """Share of the time in which the event loop waited for a core; 0 also where none tells."""


def publish(folder: Path) -> None:
    """Put the model into a store for each way, `<folder>/<way>/store`, and a request beside."""
    of, frame, sign = models.payments()
    models.write("linear", folder / "model")
    for way, settings in WAYS.items():
        values = json.loads(of.to_json())
        values["serve"]["log"] |= settings
        manifest = bundle.write(
            folder / way / "bundle",
            contract=contract.parse(json.dumps(values)),
            signature=sign,
            model=folder / "model.onnx",
            reference=frame,
            examples=frame.head(5),
            family="linear",
            params={},
            data={},
        )
        store = Store(folder / way / "store")
        key = bundle.key(of.model, manifest.version)
        store.put_folder(folder / way / "bundle", key, bundle.MANIFEST)
        rollout.change(store, of.model, champion=manifest.version, by="benchmark")
    record = json.loads(frame[[c.name for c in sign.columns]].head(1).to_json(orient="records"))
    (folder / "body.json").write_text(json.dumps({"records": record}))
    (folder / "load.lua").write_text(_WRK % (folder / "body.json") + wrk.DONE)


@contextmanager
def serving(way: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A service that is ready; its URL and its process."""
    port = free_port()
    home = {
        "DRIFTMILL_HOME": str(folder / way),
        "DRIFTMILL_STORE": Store(folder / way / "store").uri,
        "DRIFTMILL_MODEL": models.payments()[0].model,
    }
    module = ["-c", _NO_LOG] if way == OFF else ["-m", "services.tabular"]
    output = folder / way / "output.log"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *module, "--port", str(port)],
            cwd=ROOT,
            env=os.environ | home,
            stdout=out,
            stderr=out,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the service does not start:\n{output.read_text()}")
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def _ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/readyz").close()  # noqa: S310
    except (urllib.error.URLError, OSError):
        return False
    return True


def drive(
    program: str,
    folder: Path,
    running: tuple[str, psutil.Process],
    connections: int,
    seconds: float,
) -> Load:
    """One round."""
    url, process = running
    before, waited = process.cpu_times(), _waited(process)
    found = wrk.run(program, folder / "load.lua", f"{url}/predict", connections, seconds)
    after = process.cpu_times()
    load = Load(
        found["answers"],
        found["seconds"],
        found["p50"],
        found["p99"],
        found["p999"],
        found["longest"],
        found["failed"],
    )
    used = after.user + after.system - before.user - before.system
    load.cpu = used * 1e6 / max(load.answers, 1)
    load.no_core = (_waited(process) - waited) / load.seconds
    return load


def _waited(process: psutil.Process) -> float:
    """Seconds in which a process's first thread could have run and had no core."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:  # not Linux
        return 0.0


def disk(folder: Path) -> dict[str, float]:
    """Milliseconds that the disk takes to have 700 bytes more of a file."""
    took = []
    fd = os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        for _ in range(300):
            os.write(fd, b"x" * 700)
            began = time.perf_counter()
            os.fdatasync(fd)
            took.append(1e3 * (time.perf_counter() - began))
    finally:
        os.close(fd)
    return {"p50_ms": statistics.median(took), "p99_ms": statistics.quantiles(took, n=100)[-1]}


def measure(
    program: str, folder: Path, rounds: int, seconds: float, say: Any
) -> list[dict[str, Any]]:
    """All rounds; a cell for each way and number of connections."""
    found: dict[tuple[str, int], list[Load]] = {}
    answers = dict.fromkeys(WAYS, 0)
    with ExitStack() as stack:
        say("the services start")
        running = {way: stack.enter_context(serving(way, folder)) for way in WAYS}
        for way in WAYS:
            answers[way] += drive(program, folder, running[way], 4, 1).answers
        for number in range(rounds):
            for connections in CONNECTIONS:
                for way in WAYS:
                    say(f"round {number + 1} of {rounds}, {connections} connections, {way}")
                    load = drive(program, folder, running[way], connections, seconds)
                    found.setdefault((way, connections), []).append(load)
                    answers[way] += load.answers - load.failed
    rows = {
        way: models.logged(Store(folder / way / "store"), models.payments()[0].model)
        for way in WAYS
        if way != OFF
    }
    if missing := {
        way: answers[way] - count for way, count in rows.items() if count < answers[way]
    }:
        raise SystemExit(f"answered and not in the log: {missing}")
    return [
        {
            "way": way,
            "connections": connections,
            "requests_per_second": statistics.median(x.answers / x.seconds for x in loads),
            "cpu_us": statistics.median(x.cpu for x in loads),
            "p50_ms": statistics.median(x.p50 for x in loads),
            "p99_ms": statistics.median(x.p99 for x in loads),
            "p999_ms": statistics.median(x.p999 for x in loads),
            "longest_ms": max(x.longest for x in loads),
            "no_core": statistics.median(x.no_core for x in loads),
            "failed": sum(x.failed for x in loads),
            "rounds": [asdict(x) for x in loads],
        }
        for (way, connections), loads in found.items()
    ]


def show(cells: list[dict[str, Any]], took: dict[str, float]) -> None:
    """Print the table."""
    table = Table(
        title="The inference log, one row a request",
        caption=f"The disk takes {took['p50_ms']:.2f} ms to have 700 bytes (median; "
        f"p99 {took['p99_ms']:.2f}).",
    )
    for name in ("connections", "log"):
        table.add_column(name)
    measured = ["requests/s", "of no log", "CPU µs", "p50 ms", "p99", "p99.9", "longest"]
    for name in (*measured, "no core", "failed"):
        table.add_column(name, justify="right")
    for connections in CONNECTIONS:
        chosen = [cell for cell in cells if cell["connections"] == connections]
        without = next(c["requests_per_second"] for c in chosen if c["way"] == OFF)
        for cell in chosen:
            speed = cell["requests_per_second"]
            times = ("p50_ms", "p99_ms", "p999_ms", "longest_ms")
            table.add_row(
                str(connections),
                cell["way"],
                f"{speed:,.0f}",
                f"{speed / without:.0%}" if without else "-",
                f"{cell['cpu_us']:.0f}",
                *(f"{cell[name]:.2f}" for name in times),
                f"{cell['no_core']:.0%}",
                str(cell["failed"]),
            )
    Console(width=120).print(table)


def main() -> int:
    """Measure, print, write; 1 where a request failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference_log",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each round (5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: $TMPDIR")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    given = parser.parse_args()
    program = shutil.which("wrk")
    if program is None:
        sys.exit("wrk is not installed; Debian: apt-get install wrk")
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as temporary,
        Console(stderr=True).status("the model") as status,
    ):
        folder = Path(temporary)
        publish(folder)
        took = disk(folder)
        cells = measure(program, folder, given.rounds, given.seconds, status.update)
    show(cells, took)
    packages = ("msgspec", "onnxruntime", "pyarrow", "uvicorn", "uvloop")
    report = {
        "machine": {
            "cores": cores(),
            "load_after": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "packages": {p: version(p) for p in packages},
            "disk": took,
        },
        "rounds": given.rounds,
        "seconds": given.seconds,
        "cells": cells,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(cell["failed"] for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
