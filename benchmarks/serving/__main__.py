"""Our service of a table beside others, one model, one run: `python -m benchmarks.serving`.

Gradient boosting on 24 numbers and 6 categories is served by

- `driftmill`: `python -m services.tabular` as shipped: inference log, metrics, validation, rollout
- BentoML, FastAPI, KServe, LitServe, MLServer, MLflow and Ray Serve, each with the same ONNX file
  and with the scikit-learn pipeline, in environments that `uv` makes (`benchmarks/serving/peers/`)
- `bare ASGI echo`: uvicorn and nothing else, the most that could be

One worker each; only one of them runs at a time. First all must answer the same numbers. Then wrk
(Debian: `apt-get install wrk`) sends 1 and 32 rows a request over 1, 16 and 64 connections to one
service after the other, in several such rounds. Where oha is installed (`cargo install oha
--locked`), ours and the fastest peer also get requests at a constant rate, 70 % of what each did at
64 connections, timed from when each was due.

Prints tables and goals; a complete run writes `benchmarks/results/serving.json` and
`docs/images/serving.png`.

    python -m benchmarks.serving --only-ours --rounds 1 --seconds 1       # a quick look
    python -m benchmarks.serving --peers kserve "fastapi inline"
    python -m benchmarks.serving --soak 10000000                          # memory, nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.serving import catalogue, drive, model, report, soak
from benchmarks.serving.catalogue import ECHO, OURS, SERVICES
from benchmarks.serving.drive import Load, ServiceError
from benchmarks.serving.model import Made
from driftmill.home import cores

RESULTS = Path(__file__).parents[1] / "results"
RESULT, SOAKED = RESULTS / "serving.json", RESULTS / "serving_soak.json"
PICTURE = drive.ROOT / "docs" / "images" / "serving.png"
#: Part of its capacity that a service gets at a constant rate, and how much longer such a round is.
PART, LONGER = 0.7, 5
#: Starts of ours that are timed.
STARTS = 5

Say = Callable[[str], None]


@dataclass
class Measured:
    """Of a service, in all rounds."""

    failed: str = ""
    difference: float = 0.0
    ready: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)
    """MB before and after a round."""
    loads: dict[tuple[int, int], list[Load]] = field(default_factory=lambda: defaultdict(list))


class Run:
    """A run of the benchmark.

    Args:
        made: the model.
        envs: folder of the environments.
        seconds: of each measurement.
        say: is told what happens.
    """

    def __init__(self, made: Made, envs: Path, seconds: float, say: Say) -> None:
        self.made = made
        self.envs = envs
        self.seconds = seconds
        self.say = say
        self.services: dict[str, Measured] = {}

    def prepare(self, names: list[str]) -> None:
        """Build what is not there yet."""
        for name in names:
            self.say(f"{name}: install")
            self.services[name] = Measured()
            self._guard(name, self._prepare)

    def round(self, title: str) -> None:
        """Measure each service that has not failed once."""
        for name, measured in self.services.items():
            if not measured.failed:
                self.say(f"{title}, {name}")
                self._guard(name, self._measure)

    def _guard(self, name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
        except ServiceError as error:
            self.services[name].failed = str(error)
            print(f"{name}: {error}", file=sys.stderr)

    def _prepare(self, name: str) -> None:
        drive.prepare(SERVICES[name], self.made, self.envs)

    def _measure(self, name: str) -> None:
        service, measured = SERVICES[name], self.services[name]
        with drive.serving(service, self.made, self.envs) as running:
            measured.difference = max(measured.difference, drive.check(running, self.made))
            before = running.resident_mb()
            loads = {}
            for rows in report.ROWS:
                sent = drive.bodies(service, self.made.records, rows)
                drive.closed_loop(running, sent, 16, min(1.0, self.seconds))  # warm
                for connections in report.CONNECTIONS:
                    load = drive.closed_loop(running, sent, connections, self.seconds)
                    loads[rows, connections] = load
            measured.ready.append(running.ready)
            measured.memory.append(running.memory_mb())
            measured.resident.append((before, running.resident_mb()))
        for key, load in loads.items():
            measured.loads[key].append(load)

    def constant_rate(self, name: str, capacity: float, rounds: int) -> dict[str, Any]:
        """Measure a service at a part of its capacity."""
        service = SERVICES[name]
        sent = drive.bodies(service, self.made.records, 1)
        loads = []
        for number in range(rounds):
            self.say(f"constant rate {number + 1}, {name}")
            with drive.serving(service, self.made, self.envs) as running:
                drive.closed_loop(running, sent, 64, 1)  # warm
                length = self.seconds * LONGER
                loads.append(drive.open_loop(running, sent, PART * capacity, length))
        median = report.cell(1, 64, loads)
        middle = sorted(load.p999 for load in loads)[len(loads) // 2]
        return {
            "rate": PART * capacity,
            "answered_per_s": median["requests_per_s"],
            "p50_ms": median["p50_ms"],
            "p99_ms": median["p99_ms"],
            "p999_ms": middle,
            "failed": median["failed"],
            "rounds": median["rounds"],
        }

    def starts(self, count: int) -> list[float]:
        """Seconds from a start of ours, with an empty folder, until it is ready."""
        seconds = []
        for number in range(count):
            self.say(f"start {number + 1}, {OURS}")
            with drive.serving(SERVICES[OURS], self.made, self.envs, ready="/readyz") as running:
                seconds.append(running.ready)
        return seconds


def machine() -> dict[str, Any]:
    """Where this runs, and with which versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    tools = {}
    for tool, flag in (("wrk", "-v"), ("oha", "--version")):
        if drive.find(tool):
            done = subprocess.run([tool, flag], capture_output=True, text=True, check=False)
            tools[tool] = (done.stdout or done.stderr).splitlines()[0]
    own = ("driftmill", "bentoml", "httptools", "msgspec", "onnxruntime", "uvicorn", "uvloop")
    return {
        "cores": cores(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "packages": {package: version(package) for package in own},
        "peers": {name: list(wanted) for name, wanted in catalogue.ENVIRONMENTS.items()},
        "tools": tools,
    }


def _version(name: str) -> str:
    service = SERVICES[name]
    for pin in catalogue.ENVIRONMENTS.get(service.environment, ()):
        project, _, number = pin.partition("==")
        if project.partition("[")[0] == service.project:
            return number
    return version(service.project)


def _chosen(given: argparse.Namespace) -> list[str]:
    """Names of the services to measure."""
    if given.only_ours:
        return [ECHO, OURS]
    if given.peers is None:
        return list(SERVICES)
    return [name for name in SERVICES if name.startswith((ECHO, OURS, *given.peers))]


def measure(given: argparse.Namespace, made: Made, say: Say) -> dict[str, Any]:
    """A whole run."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "rounds": given.rounds,
        "seconds": given.seconds,
        "notes": ["one service at a time; client and service share the machine"],
    }
    run = Run(made, given.envs, given.seconds, say)
    if given.skip_build:
        run.services = {name: Measured() for name in _chosen(given)}
    else:
        run.prepare(_chosen(given))
    for number in range(given.rounds):
        run.round(f"round {number + 1} of {given.rounds}")
    found["services"] = [
        {
            "service": name,
            "project": SERVICES[name].project,
            "version": _version(name),
            "engine": SERVICES[name].engine,
            "failed": measured.failed,
            "difference": measured.difference,
            "ready_s": measured.ready,
            "memory_mb": measured.memory,
            "cells": [report.cell(*key, loads) for key, loads in measured.loads.items()],
        }
        for name, measured in run.services.items()
    ]
    found["ours"] = found["open_loop"] = {}
    ours = run.services[OURS]
    if not ours.failed:
        found["ours"] = {
            "resident_mb": [value for pair in ours.resident for value in pair],
            "start_s": run.starts(STARTS),
        }
        found["open_loop"] = _constant_rates(run, found, given.rounds)
    return found


def _constant_rates(run: Run, found: dict[str, Any], rounds: int) -> dict[str, Any]:
    if not drive.find("oha"):
        found["notes"].append(f"no constant rate: oha is not installed ({drive.INSTALL['oha']})")
        return {}
    rates = {}
    for name in (OURS, report.best_peer(found, 1, 64)):
        one = report.find(found, name, 1, 64) if name else None
        if name and one:
            try:
                rates[name] = run.constant_rate(name, one["requests_per_s"], rounds)
            except ServiceError as error:
                found["notes"].append(f"constant rate, {name}: {error}")
    return rates


def main() -> int:
    """Measure, print, write. 1 if ours failed, 2 if wrk is not there."""
    peers = [name for name in SERVICES if name not in (ECHO, OURS)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", nargs="+", metavar="NAME",
                        help="only those whose names begin so: " + "; ".join(peers))  # fmt: skip
    parser.add_argument("--only-ours", action="store_true", help="no peers, only the bare echo")
    parser.add_argument("--rounds", type=int, default=3, help="of all services (3)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (3)")
    parser.add_argument("--soak", type=int, metavar="N", help="send N requests to ours instead")
    parser.add_argument("--envs", type=Path, default=catalogue.default_environments(),
                        help="folder of the peers' environments (%(default)s)")  # fmt: skip
    parser.add_argument("--skip-build", action="store_true", help="the environments are there")
    parser.add_argument("--output", type=Path, help="JSON to write, also of an incomplete run")
    parser.add_argument("--picture", type=Path, help="PNG or SVG to write, likewise")
    given = parser.parse_args()
    for name in given.peers or ():
        if not any(peer.startswith(name) for peer in peers):
            parser.error(f"no peer begins with {name!r}; there are: {'; '.join(peers)}")
    if not drive.find("wrk"):
        print(f"wrk is not installed; {drive.INSTALL['wrk']}", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory() as folder,
        Console(stderr=True).status("the model") as status,
    ):
        made = model.make(Path(folder))
        if given.soak:
            return _soak(given, made, status.update)
        found = measure(given, made, status.update)
    soaked = json.loads(SOAKED.read_text()) if SOAKED.exists() else None
    print(report.markdown(found, report.goals(found, soaked)))
    complete = given.peers is None and not given.only_ours
    if output := given.output or (RESULT if complete else None):
        output.write_text(json.dumps(found, indent=1) + "\n")
    if picture := given.picture or (PICTURE if complete else None):
        report.draw(found, picture)
    return 1 if any(r["failed"] for r in found["services"] if r["service"] == OURS) else 0


def _soak(given: argparse.Namespace, made: Made, say: Say) -> int:
    """Send many requests to ours, print and write what was seen; 1 if one failed."""
    found = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    found |= soak.soak(made, given.envs, given.soak, say)
    print(json.dumps({k: v for k, v in found.items() if k not in ("machine", "points")}, indent=1))
    (given.output or SOAKED).write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["unanswered"] or found["server_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
