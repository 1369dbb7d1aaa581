"""Starts services, and sends them requests with wrk and oha."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import wrk
from benchmarks.serving import catalogue
from benchmarks.serving.catalogue import Records, Service
from benchmarks.serving.model import Made

ROOT = Path(__file__).parents[2]
#: Seconds that a service may take to its first answer.
PATIENCE = 120.0
#: Probabilities of the same row by two services differ by no more.
TOLERANCE = 1e-4

#: How to get the programs that send.
INSTALL = {
    "wrk": "Debian: apt-get install wrk; macOS: brew install wrk",
    "oha": "cargo install oha --locked; macOS: brew install oha",
}

# One body after the other.
_WRK = """
local requests, turn = {}, 0
init = function()
  for line in io.lines(%s) do
    local headers = {["Content-Type"] = "application/json", ["Connection"] = "keep-alive"}
    requests[#requests + 1] = wrk.format("POST", nil, headers, line)
  end
end
request = function()
  turn = turn %% #requests + 1
  return requests[turn]
end
"""


class ServiceError(RuntimeError):
    """A service that cannot be built or started, or that answers wrong; the message says why."""


@dataclass
class Load:
    """What a round measured. Times are in milliseconds."""

    answers: int
    seconds: float
    p50: float
    p99: float
    p999: float
    failed: int
    """Answers other than 2xx, and what had no answer."""
    cpu: float = 0.0
    """Of all processors that the service used, for one answer; 0 where there was none."""
    unanswered: int = 0
    """Of those that failed, the ones without an answer."""

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return (self.answers - self.failed) / self.seconds if self.seconds else 0.0


@dataclass
class Running:
    """A service that has answered."""

    service: Service
    port: int
    process: psutil.Process
    ready: float
    """Seconds from its start to its first answer."""

    @property
    def url(self) -> str:
        """Of its predictions."""
        return f"http://127.0.0.1:{self.port}{self.service.path}"

    def ask(self, body: bytes, timeout: float = 60) -> tuple[int, bytes]:
        """Send one request; status and body of the answer."""
        return _http(self.port, "POST", self.service.path, body, timeout)

    def resident_mb(self) -> float:
        """Resident memory of its first process, in MB."""
        return float(self.process.memory_info().rss / 1e6)

    def memory_mb(self) -> float:
        """Memory of all its processes, what they share counted once, in MB."""
        return float(sum(p.memory_full_info().pss for p in _tree(self.process)) / 1e6)

    def processor_seconds(self) -> float:
        """Of all its processes until now."""
        times = [p.cpu_times() for p in _tree(self.process)]
        return float(sum(t.user + t.system for t in times))


def _http(port: int, method: str, path: str, body: bytes, timeout: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def get(port: int, path: str) -> tuple[int, bytes]:
    """Read a page of a service; status and body."""
    return _http(port, "GET", path, b"", 10)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def body(service: Service, records: Records) -> bytes:
    """A request for these rows."""
    return json.dumps(service.body(records), separators=(",", ":")).encode()


def bodies(service: Service, records: Records, rows: int) -> list[bytes]:
    """Requests of so many rows each, all of them different."""
    return [body(service, records[i : i + rows]) for i in range(0, len(records) - rows + 1, rows)]


def _fill(parts: Sequence[str], service: Service, made: Made, envs: Path, ports: list[int]) -> Any:
    programs = catalogue.programs(service, envs)
    return [
        p.format(bin=programs, port=ports[0], port2=ports[1], folder=made.folder) for p in parts
    ]


def _variables(service: Service, made: Made, envs: Path, ports: list[int]) -> dict[str, str]:
    own = dict(
        zip(service.variables, _fill([*service.variables.values()], service, made, envs, ports),
            strict=True)
    )  # fmt: skip
    path = f"{catalogue.programs(service, envs)}:{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | own
    if not service.environment:
        return variables
    variables |= catalogue.VARIABLES
    return variables | {"BENCH_FOLDER": str(made.folder), "BENCH_ENGINE": service.engine}


def prepare(service: Service, made: Made, envs: Path) -> None:
    """Build a service's environment and what it reads.

    Raises:
        ServiceError: it could not be built.
    """
    try:
        if service.environment:
            catalogue.build(service.environment, envs)
        if service.prepare:
            subprocess.run(
                _fill(service.prepare, service, made, envs, [0, 0]),
                cwd=ROOT, env=_variables(service, made, envs, [0, 0]),
                check=True, capture_output=True, text=True,
            )  # fmt: skip
    except FileNotFoundError as error:
        raise ServiceError(f"not installed: {error}") from error
    except subprocess.CalledProcessError as error:
        raise ServiceError(f"not installed: {_last(error.stderr)}") from error


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


@contextmanager
def serving(
    service: Service, made: Made, envs: Path, ready: str | None = None, home: Path | None = None
) -> Iterator[Running]:
    """A service that has answered.

    Args:
        service: which.
        made: the model.
        envs: folder of the environments.
        ready: page whose first 200 makes it ready; None waits for a first prediction.
        home: folder of ours that outlives the service, None for one of its own.

    Raises:
        ServiceError: it ended, or did not answer within `PATIENCE`.
    """
    ports = free_ports(2)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "output.log")
        variables = _variables(service, made, envs, ports) | {
            "DRIFTMILL_HOME": str(home or temporary),
            "DRIFTMILL_STORE": (made.folder / "store").as_uri(),
        }
        with output.open("wb") as out:
            began = time.perf_counter()
            try:
                child = subprocess.Popen(
                    _fill(service.command, service, made, envs, ports),
                    cwd=ROOT, env=variables, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise ServiceError(f"not installed: {error}") from error
        process = psutil.Process(child.pid)
        asked = body(service, made.records[:1])
        try:
            said = "it does not listen"
            while True:
                try:
                    if ready:
                        status, answer = get(ports[0], ready)
                    else:
                        status, answer = _http(ports[0], "POST", service.path, asked, PATIENCE)
                    if status == 200:
                        break
                    said = f"it answers {status}: {_last(answer.decode(errors='replace'))}"
                except OSError:
                    pass  # does not listen yet
                if child.poll() is not None:
                    raise ServiceError(f"it ended: {_last(output.read_text(errors='replace'))}")
                if time.perf_counter() - began > PATIENCE:
                    raise ServiceError(f"not ready after {PATIENCE:.0f} s: {said}")
                time.sleep(0.005)
            yield Running(service, ports[0], process, time.perf_counter() - began)
        finally:
            _stop(child, process)


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _stop(child: subprocess.Popen[bytes], process: psutil.Process) -> None:
    """End a process and all that it started."""
    if child.poll() is None:
        started = _tree(process)
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        _, left = psutil.wait_procs(started[1:], timeout=5)
        for one in left:
            one.kill()
        psutil.wait_procs(left, timeout=5)


def check(running: Running, made: Made) -> float:
    """The largest difference between what a service answers and what the pipeline said.

    Raises:
        ServiceError: it is above `TOLERANCE`, or an answer could not be read.
    """
    read = running.service.read
    if read is None:
        return 0.0
    largest = 0.0
    for rows in (1, 32):
        asked = made.records[:64]
        found: list[float] = []
        for one in bodies(running.service, asked, rows):
            status, answer = running.ask(one)
            if status != 200:
                raise ServiceError(f"it answers {status}: {_last(answer.decode()[:300])}")
            try:
                found += read(json.loads(answer))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ServiceError(f"no answer as expected: {answer[:200]!r}") from error
        if len(found) != len(asked):
            raise ServiceError(f"{len(asked)} rows, and {len(found)} answers")
        largest = max(largest, float(np.abs(np.array(found) - made.expected[: len(asked)]).max()))
    if not largest <= TOLERANCE:
        raise ServiceError(f"it answers other numbers: {largest:.2g} > {TOLERANCE:g}")
    return largest


def find(program: str) -> str | None:
    """Where a program is, or None."""
    return shutil.which(program)


def closed_loop(
    running: Running, sent: list[bytes], connections: int, seconds: float, script: str = _WRK
) -> Load:
    """A round with wrk: each connection sends when it was answered.

    Args:
        running: the service.
        sent: bodies that are sent in turn.
        connections: kept open.
        seconds: how long.
        script: of wrk, without its end; `%s` is the file with the bodies, one a line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        lines, lua = Path(temporary, "bodies"), Path(temporary, "load.lua")
        lines.write_bytes(b"\n".join(sent) + b"\n")
        lua.write_text(script % json.dumps(str(lines)) + wrk.DONE)
        before = running.processor_seconds()
        try:
            found = wrk.run(find("wrk") or "wrk", lua, running.url, connections, seconds)
        except wrk.WrkError as error:
            raise ServiceError(f"wrk failed: {_last(str(error))}") from error
    # What it has not answered yet would disturb the next round: it is done once it answers this.
    running.ask(sent[0])
    load = Load(
        found["answers"],
        found["seconds"],
        found["p50"],
        found["p99"],
        found["p999"],
        found["failed"],
        unanswered=found["unanswered"],
    )
    if load.answers:
        load.cpu = 1e3 * (running.processor_seconds() - before) / load.answers
    return load


def open_loop(running: Running, sent: list[bytes], rate: float, seconds: float) -> Load:
    """A round with oha at a constant rate, whatever the service does: times count from the moment
    a request was due, not from when a connection was free to send it.

    Args:
        running: the service.
        sent: bodies; one of them at random each time.
        rate: requests a second.
        seconds: how long.
    """
    with tempfile.TemporaryDirectory() as temporary:
        lines = Path(temporary, "bodies")
        lines.write_bytes(b"\n".join(sent) + b"\n")
        done = subprocess.run(
            [find("oha") or "oha", "-z", f"{seconds:g}s", "-q", f"{rate:.0f}", "-c", "64", "-w",
             "--latency-correction", "-m", "POST", "-T", "application/json", "-Z", str(lines),
             "--no-tui", "--output-format", "json", running.url],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ServiceError(f"oha failed: {_last(done.stderr)}")
    found = json.loads(done.stdout)
    codes: dict[str, int] = found["statusCodeDistribution"]
    good = sum(n for code, n in codes.items() if code.startswith("2"))
    bad = sum(codes.values()) - good + sum(found["errorDistribution"].values())
    times = {
        name: 1e3 * (found["latencyPercentiles"][name] or 0) for name in ("p50", "p99", "p99.9")
    }
    return Load(
        good + bad, found["summary"]["total"], times["p50"], times["p99"], times["p99.9"], bad
    )
