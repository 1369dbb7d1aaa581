"""Starting runs as real processes, and finding them again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from driftmill import contract as contracts
from driftmill import home as homes
from driftmill.contract import Contract
from driftmill.home import Home
from driftmill.retrain.ledger import Run
from driftmill.retrain.runner import LocalRunner, Process

SLEEPER = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return homes.find(tmp_path / "home")


@pytest.fixture
def launch(home: Home, tiny: Contract) -> Iterator[Callable[..., Process]]:
    """Start a command as a run; what still lives afterwards is ended."""
    started: list[Process] = []

    def start(command: tuple[str, ...] = SLEEPER, run_id: str = "r1", note: str = "") -> Process:
        process = LocalRunner(home, command).start(run(run_id, note), tiny)
        assert process is not None
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(run_id: str = "r1", note: str = "") -> Run:
    return Run(
        run_id=run_id,
        model="tiny",
        key=run_id,
        trigger="drift",
        note=note,
        created=datetime.now(UTC),
    )


def until(true: Callable[[], bool]) -> None:
    """Wait for something that will happen; the test's time limit ends the wait."""
    while not true():
        time.sleep(0.02)


def test_a_run_gets_its_arguments_places_and_a_low_priority(
    home: Home, tiny: Contract, launch: Callable[..., Process]
) -> None:
    script = (
        "import os, sys; print(os.nice(0), os.environ['DRIFTMILL_HOME'], *sys.argv[1:], sep='|')"
    )
    runner = LocalRunner(home, (sys.executable, "-c", script))
    note = 'it\'s "odd"; $(rm -rf x) -- `y`'
    process = runner.start(run(note=note), tiny)
    assert process is not None
    until(lambda: not runner.alive("r1", process))
    assert runner.exit_code("r1") == 0
    contract = home.folder / "runs" / "r1" / "contract.json"
    assert runner.log("r1").read_text() == (
        f"10|{home.folder}|--contract|{contract}|--run-id|r1|--trigger|drift: {note}\n"
    )
    assert contracts.load(contract) == tiny
    assert int((home.folder / "runs" / "r1" / "process").read_text()) == process.pid


def test_a_run_leads_a_session_of_its_own(launch: Callable[..., Process]) -> None:
    process = launch()
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid != os.getsid(0)


def test_another_runner_finds_a_run_that_lives(
    home: Home, tiny: Contract, launch: Callable[..., Process]
) -> None:
    process = launch()
    until((home.folder / "runs" / "r1" / "process").read_text)  # type: ignore[arg-type]
    again = LocalRunner(home, SLEEPER)
    assert again.begun("r1")
    assert again.alive("r1", process)
    assert again.start(run(), tiny) == process


def test_a_run_that_ended_is_not_started_again(
    home: Home, tiny: Contract, launch: Callable[..., Process]
) -> None:
    process = launch((sys.executable, "-c", "pass"))
    os.waitpid(process.pid, 0)
    again = LocalRunner(home, SLEEPER)
    assert again.begun("r1")
    assert not again.alive("r1", process)
    assert again.start(run(), tiny) is None


def test_a_process_id_that_was_given_to_another_is_not_the_run(
    home: Home, launch: Callable[..., Process]
) -> None:
    process = launch()
    stranger = LocalRunner(home)
    assert not stranger.alive("r2", Process(process.pid, process.started - 100))
    assert stranger.alive("r2", process)


def test_a_clock_that_was_set_does_not_hide_a_run(
    home: Home, launch: Callable[..., Process]
) -> None:
    """Start times seem to move when the clock is set; the lock still tells."""
    process = launch()
    moved = Process(process.pid, process.started + 3600)
    assert LocalRunner(home).alive("r1", moved)


def test_nothing_began_where_nothing_was_started(home: Home) -> None:
    assert not LocalRunner(home).begun("r1")


def test_a_command_that_does_not_exist_ends_with_an_explanation(home: Home, tiny: Contract) -> None:
    runner = LocalRunner(home, ("no-such-command",))
    process = runner.start(run(), tiny)
    assert process is not None
    until(lambda: not runner.alive("r1", process))
    assert runner.exit_code("r1") == 127
    assert "no-such-command" in runner.log("r1").read_text()


def test_sweep_ends_what_a_dead_run_left(home: Home, launch: Callable[..., Process]) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = launch((sys.executable, "-c", script))
    runner = LocalRunner(home)
    until(lambda: runner.log("r1").read_text().endswith("\n"))
    orphan = psutil.Process(int(runner.log("r1").read_text()))
    bystander = launch(run_id="r2")
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)
    assert not runner.alive("r1", process)
    runner.sweep("r1")
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    runner.sweep("r1")  # nothing is left: nothing happens
    assert runner.alive("r2", bystander)
