"""Tests of the laptop stack, with the real services."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from driftmill import bundle, contract, rollout, stack
from driftmill.home import Home
from driftmill.retrain.ledger import Ledger
from driftmill.retrain.policy import Trigger
from driftmill.stack import Service, StackError
from driftmill.store import Store
from tests.conftest import CONTRACT
from tests.pipelines.contracts import IMAGES

ANY = dict.fromkeys(stack.PORTS, 0)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    folder = tmp_path.resolve()
    place = Home(
        folder=folder,
        store_uri=str(folder / "store"),
        ledger_url=f"sqlite:///{folder / 'ledger.db'}",
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
    )
    yield place
    stack.down(place)


@pytest.fixture
def contract_file(tmp_path: Path) -> Path:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    return path


@pytest.fixture
def champion(store: Store, make_bundle: Callable[..., bundle.Manifest]) -> str:
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test")
    return version


def processes_of(home: Home) -> list[psutil.Process]:
    """Everything alive that was started for this home, but for this process."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("DRIFTMILL_HOME") == str(home.folder)
            if mine and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def note(home: Home, contract_file: Path, **changes: object) -> Service:
    """Write down this very process as the service."""
    service = Service(
        name="service",
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        port=1,
        log=str(home.logs / "service.log"),
        model="tiny",
        contract=str(contract_file),
        contract_sha256="0" * 64,
    )
    service = replace(service, **changes)  # type: ignore[arg-type]
    home.processes.mkdir(parents=True, exist_ok=True)
    (home.processes / "service.json").write_text(json.dumps(vars(service)))
    return service


@pytest.mark.slow
def test_up_twice_a_service_killed_up_again_and_down_twice(
    home: Home, contract_file: Path, champion: str
) -> None:
    first = stack.up(contract_file, home, ports=ANY)
    assert first.ready
    assert set(first.services) == {"service", "monitor", "controller"}
    assert stat.S_IMODE(home.token_file.stat().st_mode) == 0o600
    assert [s.state for s in stack.status(home)] == ["ready"] * 3
    assert stack.memory(home) > 50 * 2**20
    assert stack.pages(home.store, "tiny")["rollout"]["champion"] == champion

    second = stack.up(contract_file, home)
    assert second.services == first.services
    assert second.children == ()
    with pytest.raises(StackError, match="already runs on port"):
        stack.up(contract_file, home, ports={"service": first.services["service"].port + 1})

    os.kill(first.services["monitor"].pid, signal.SIGKILL)
    first.children[1].wait()
    assert {s.name: s.state for s in stack.status(home)} == {
        "service": "ready",
        "monitor": "dead",
        "controller": "ready",
    }
    third = stack.up(contract_file, home)
    assert third.services["service"] == first.services["service"]
    assert third.services["monitor"].port == first.services["monitor"].port
    assert third.services["monitor"].pid != first.services["monitor"].pid

    assert sorted(stack.down(home)) == ["controller", "monitor", "service"]
    assert stack.down(home) == []
    assert processes_of(home) == []
    assert {s.state for s in stack.status(home)} == {"not started"}


@pytest.mark.slow
def test_without_a_model_the_service_is_up_but_not_ready(home: Home, contract_file: Path) -> None:
    running = stack.up(contract_file, home, ports=ANY, monitor=False, controller=False)
    assert not running.ready
    assert list(running.services) == ["service"]
    assert [s.state for s in stack.status(home)] == ["not ready", "not started", "not started"]
    contract_file.write_text(CONTRACT + "owner: somebody\n")
    with pytest.raises(StackError, match="has changed"):
        stack.up(contract_file, home)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "module"), [(CONTRACT, "tabular"), (IMAGES, "vision")])
def test_the_service_is_the_one_for_the_task(
    home: Home, contract_file: Path, text: str, module: str
) -> None:
    contract_file.write_text(text)
    running = stack.up(contract_file, home, ports=ANY, monitor=False, controller=False)
    service = running.services["service"]
    assert f"services.{module}" in psutil.Process(service.pid).cmdline()
    assert Path(service.log).name == "service.log"


@pytest.mark.slow
def test_a_usual_port_that_is_taken_is_replaced_and_said(
    home: Home, contract_file: Path, champion: str
) -> None:
    said: list[str] = []
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind((stack.HOST, stack.PORTS["service"]))
            other.listen()
        except OSError:
            pass  # somebody else has it already: as good
        running = stack.up(contract_file, home, monitor=False, controller=False, say=said.append)
    assert running.services["service"].port != stack.PORTS["service"]
    assert any("3000 is taken" in text for text in said)


@pytest.mark.slow
def test_a_process_that_dies_takes_down_what_was_started(
    home: Home, contract_file: Path, champion: str
) -> None:
    broken = replace(home, ledger_url="mysql://nowhere/ledger")
    with pytest.raises(StackError, match=r"controller stopped with exit code(.|\n)*ledger"):
        stack.up(contract_file, broken, ports=ANY)
    assert processes_of(home) == []
    assert {s.state for s in stack.status(home)} == {"not started"}
    assert stack.up(contract_file, home, ports=ANY, monitor=False, controller=False).ready


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_during_up_leaves_no_process(
    home: Home, contract_file: Path, champion: str, number: int, code: int
) -> None:
    ports = ["--port", "0", "--monitor-port", "0", "--controller-port", "0"]
    main = "from driftmill.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", main, "up", str(contract_file), *ports],
        env={**os.environ, **home.environment()},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (home.processes / "controller.json").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in errors
    assert processes_of(home) == []
    assert stack.down(home) == []


def test_a_port_asked_for_that_is_taken_is_an_error(home: Home, contract_file: Path) -> None:
    with socket.socket() as other:
        other.bind((stack.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} for monitor is taken"):
            stack.up(contract_file, home, ports={**ANY, "monitor": port})
    assert processes_of(home) == []


def test_another_process_with_the_same_id_is_not_the_service(
    home: Home, contract_file: Path
) -> None:
    note(home, contract_file, started=psutil.Process().create_time() - 3600)
    assert stack.status(home)[0].state == "dead"
    assert stack.address(home, "service") is None
    assert stack.memory(home) == 0
    assert stack.down(home) == []  # and this test lives on
    assert stack.services(home) == {}


def test_what_a_killed_service_left_behind_is_ended(home: Home, contract_file: Path) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '600']); input()"
    leader = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        env={**os.environ, **home.environment()},
        start_new_session=True,
    )
    leading = psutil.Process(leader.pid)
    note(home, contract_file, pid=leader.pid, started=leading.create_time())
    while not (left := leading.children()):
        time.sleep(0.01)
    leader.kill()
    leader.communicate()
    assert left[0].is_running()
    assert stack.status(home)[0].state == "dead"
    stack.down(home)
    psutil.wait_procs(left, timeout=10)
    assert processes_of(home) == []


@pytest.mark.parametrize("noted", [True, False])
def test_down_ends_the_training_that_the_controller_started(
    home: Home, contract_file: Path, noted: bool
) -> None:
    now = datetime.now(UTC)
    ledger = Ledger(home.ledger_url)
    policy = contract.load(contract_file).retrain
    asked = Trigger("manual", "manual", now)
    run_id = ledger.decide("tiny", policy, asked, fresh_rows=10_000, now=now).run_id
    assert run_id is not None
    training = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", run_id], start_new_session=True
    )
    if noted:
        ledger.claim(run_id, socket.gethostname(), now)
        ledger.started(run_id, training.pid, psutil.Process(training.pid).create_time(), now)
    else:  # the controller was killed before it could write it down
        folder = home.folder / "runs" / run_id
        folder.mkdir(parents=True)
        (folder / "process").write_text(f"{training.pid}\n")
    ledger.close()
    note(home, contract_file, started=0.0)
    assert stack.down(home) == [f"run {run_id}"]
    assert not psutil.pid_exists(training.pid)
    training.wait()


def test_the_stack_of_another_contract_is_left_alone(home: Home, contract_file: Path) -> None:
    note(home, contract_file, contract="/elsewhere/contract.yaml")
    with pytest.raises(StackError, match="driftmill down"):
        stack.up(contract_file, home, ports=ANY)
    (home.processes / "service.json").unlink()


def test_two_commands_at_once(home: Home, contract_file: Path) -> None:
    with (home.folder / "stack.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StackError, match="wait until it is done"):
            stack.up(contract_file, home, ports=ANY)
        with pytest.raises(StackError, match="wait until it is done"):
            stack.down(home)


def test_a_damaged_record_is_named(home: Home) -> None:
    home.processes.mkdir(parents=True)
    path = home.processes / "monitor.json"
    path.write_text("{")
    with pytest.raises(StackError, match=r"monitor\.json is damaged"):
        stack.status(home)
    path.unlink()


def test_down_of_a_home_that_is_not_there_makes_none(home: Home, tmp_path: Path) -> None:
    nowhere = replace(home, folder=tmp_path / "nowhere")
    assert stack.down(nowhere) == []
    assert not nowhere.folder.exists()
