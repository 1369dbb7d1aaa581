from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest

from driftmill import contract, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.monitor import windows
from driftmill.store import Store
from tests.conftest import CONTRACT, tiny_frame
from tests.monitor import traffic
from tests.monitor.receiver import Receiver

MONITOR = "monitor: {window: 100, min_rows: 50, effect: 0.2, poll: 100ms}\n"
START = datetime.now(UTC) - timedelta(hours=1)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny() -> Contract:
    """The small contract with windows of 100 rows."""
    return contract.parse(CONTRACT + MONITOR)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A webhook that takes everything."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def send(store: Store, tmp_path: Path) -> Callable[..., None]:
    """Send rows through a version; each call is a second later than the one before."""
    calls = iter(range(1000))

    def send(version: str, rows: int, shift: float = 0.0) -> None:
        i = next(calls)
        frame = tiny_frame(rows, seed=i, shift=shift)
        at = START + timedelta(seconds=i)
        traffic.answer(store, "tiny", version, frame, tmp_path / "spool", at=at)

    return send


class Running:
    """A monitor process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def metric(self, name: str) -> float:
        """The value of a sample, named as Prometheus prints it."""
        text = httpx.get(f"{self.url}/metrics").text
        for line in text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def wait(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, "the monitor has ended"
            assert time.monotonic() < end, f"still not after {seconds} s"
            time.sleep(0.05)


@contextmanager
def monitor(store: Store, folder: Path, webhook: str | None = None) -> Iterator[Running]:
    """A real monitor process; killed at the end if it still runs."""
    file = folder / "contract.yaml"
    file.write_text(CONTRACT + MONITOR)
    token = folder / "token"
    token.write_text("secret\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "services.monitor", "--contract", str(file)]
    command += ["--port", str(port)]
    if webhook:
        command += ["--webhook", webhook, "--token-file", str(token)]
    environment = {**os.environ, "DRIFTMILL_STORE": store.uri, "DRIFTMILL_HOME": str(folder)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    running = Running(process, f"http://127.0.0.1:{port}")

    def ready() -> bool:
        try:
            return httpx.get(f"{running.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        running.wait(ready)
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_bad_contract_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "contract.yaml"
    file.write_text("model: x\n")
    command = [sys.executable, "-m", "services.monitor", "--contract", str(file), "--port", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "contract.yaml:1: apiVersion: this field is needed" in done.stderr


@pytest.mark.slow
def test_from_no_champion_to_an_alarm_and_back(
    store: Store,
    tmp_path: Path,
    make_bundle: Callable[..., Manifest],
    send: Callable[..., None],
    receiver: Receiver,
) -> None:
    with monitor(store, tmp_path, receiver.url) as running:
        assert httpx.get(f"{running.url}/livez").status_code == 200
        assert httpx.get(f"{running.url}/windows").json() == []
        version = make_bundle().version
        rollout.change(store, "tiny", champion=version, by="test")
        for _ in range(5):
            send(version, 100)
        running.wait(lambda: len(httpx.get(f"{running.url}/windows").json()) == 5)
        assert receiver.bodies == []
        labels = f'{{model="tiny",version="{version}"}}'
        assert running.metric(f"model_drift_detected{labels}") == 0

        send(version, 200, shift=2)
        running.wait(lambda: receiver.bodies)
        first = receiver.bodies[0]
        assert first["alerts"][0]["labels"]["alertname"] == "ModelDrift"
        assert receiver.authorizations[0] == "Bearer secret"
        found = httpx.get(f"{running.url}/windows?last=2").json()
        assert [w["alarm"] for w in found] == [False, True]
        started = datetime.fromisoformat(first["alerts"][0]["startsAt"])
        assert started == datetime.fromisoformat(found[0]["from_at"])
        assert running.metric(f"model_drift_detected{labels}") == 1
        assert running.metric(f"model_drift_alarm{labels}") == 1
        assert running.metric('model_feature_drift_score{feature="amount",model="tiny"}') > 0.5
        assert running.metric('model_drift_windows_total{drifted="true",model="tiny"}') == 2
        assert running.metric('model_drift_last_success_timestamp_seconds{model="tiny"}') > 1e9

        # A new champion ends the incident.
        new = make_bundle(0.03).version
        rollout.change(store, "tiny", champion=new, by="test")
        running.wait(lambda: receiver.bodies[-1]["status"] == "resolved")
        told = {
            (b["alerts"][0]["fingerprint"], b["alerts"][0]["startsAt"]) for b in receiver.bodies
        }
        assert len(told) == 1

        # The baseline and both drifted windows get a page.
        made = 'model_monitor_reports_total{model="tiny",outcome="made"}'
        running.wait(lambda: running.metric(made) == 3, seconds=120)
        page = httpx.get(f"{running.url}/windows/6/report")
        assert page.headers["content-type"].startswith("text/html")
        assert httpx.get(f"{running.url}/windows/1/report").status_code == 404
        assert httpx.get(f"{running.url}/windows?last=x").status_code == 422
        assert running.metric('evidently_column_drift_score{feature="amount",model="tiny"}') > 1

        workers = psutil.Process(running.process.pid).children(recursive=True)
        assert workers
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0
        assert psutil.wait_procs(workers, timeout=20)[1] == []


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(
    store: Store,
    tmp_path: Path,
    tiny: Contract,
    make_bundle: Callable[..., Manifest],
    send: Callable[..., None],
    receiver: Receiver,
) -> None:
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test")
    with monitor(store, tmp_path, receiver.url) as running:
        send(version, 130)
        send(version, 90, shift=3)
        running.wait(lambda: len(windows.results(store, "tiny")) == 2)
        send(version, 50, shift=3)
        workers = psutil.Process(running.process.pid).children(recursive=True)
        running.process.kill()
        running.process.wait()
    # Without its parent the worker ends by itself.
    assert psutil.wait_procs(workers, timeout=200)[1] == []
    send(version, 150, shift=3)
    with monitor(store, tmp_path, receiver.url) as running:
        running.wait(lambda: len(windows.results(store, "tiny")) == 4)
        running.wait(lambda: receiver.bodies)
    found = windows.results(store, "tiny")
    assert [w.index for w in found] == [0, 1, 2, 3]
    assert [w.streak for w in found] == [0, 1, 2, 3]
    # The same windows as of a monitor that was never killed.
    for key in store.list("tiny/monitor"):
        store.delete(key)
    assert windows.Monitor(tiny, store).tick() == found


@pytest.mark.slow
def test_a_champion_that_cannot_be_read_makes_it_unready(
    store: Store, tmp_path: Path, make_bundle: Callable[..., Manifest]
) -> None:
    with monitor(store, tmp_path) as running:
        rollout.change(store, "tiny", champion="0" * 12, by="test")
        running.wait(lambda: httpx.get(f"{running.url}/readyz").status_code == 503)
        assert "no version 000000000000" in httpx.get(f"{running.url}/readyz").text
        assert running.metric('model_monitor_errors_total{model="tiny"}') > 0
        rollout.change(store, "tiny", champion=make_bundle().version, by="test")
        running.wait(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)
