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
from driftmill.retrain.runner import LocalRunner, Mark

SLEEPER = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return homes.find(tmp_path / "home")


@pytest.fixture
def launch(home: Home, tiny: Contract) -> Iterator[Callable[..., Mark]]:
    """Start a command as a run; what still lives afterwards is ended."""
    started: list[Mark] = []

    def start(command: tuple[str, ...] = SLEEPER, run_id: str = "r1", note: str = "") -> Mark:
        process = LocalRunner(home, command).start(run(run_id, note=note), tiny)
        assert process is not None
        started.append(process)
        return process

    yield start
    for process in started:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(run_id: str = "r1", process: Mark | None = None, note: str = "") -> Run:
    """A run as the ledger has it; with a process, one that was noted as started."""
    return Run(
        pid=process.pid if process else None,
        process_started=process.process_started if process else None,
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
    home: Home, tiny: Contract, launch: Callable[..., Mark]
) -> None:
    script = (
        "import os, sys; print(os.nice(0), os.environ['DRIFTMILL_HOME'], *sys.argv[1:], sep='|')"
    )
    runner = LocalRunner(home, (sys.executable, "-c", script))
    note = 'it\'s "odd"; $(rm -rf x) -- `y`'
    process = runner.start(run(note=note), tiny)
    assert process is not None
    noted = run(process=process)
    until(lambda: not runner.running(noted))
    assert runner.failure(noted) == (
        f"process {process.pid} ended with exit code 0 and left no outcome; see {runner.log('r1')}"
    )
    contract = home.folder / "runs" / "r1" / "contract.json"
    assert runner.log("r1").read_text() == (
        f"{min(19, os.nice(0) + 10)}|{home.folder}|--contract|{contract}"
        f"|--run-id|r1|--trigger|drift: {note}\n"
    )
    assert contracts.load(contract) == tiny
    assert int((home.folder / "runs" / "r1" / "process").read_text()) == process.pid


def test_a_run_leads_a_session_of_its_own(launch: Callable[..., Mark]) -> None:
    process = launch()
    assert process.pid is not None
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid != os.getsid(0)


def test_another_runner_finds_a_run_that_lives(
    home: Home, tiny: Contract, launch: Callable[..., Mark]
) -> None:
    process = launch()
    until((home.folder / "runs" / "r1" / "process").read_text)  # type: ignore[arg-type]
    again = LocalRunner(home, SLEEPER)
    assert again.begun(run())
    assert again.running(run(process=process))
    assert again.start(run(), tiny) == process


def test_a_run_that_ended_is_not_started_again(
    home: Home, tiny: Contract, launch: Callable[..., Mark]
) -> None:
    process = launch((sys.executable, "-c", "pass"))
    assert process.pid is not None
    os.waitpid(process.pid, 0)
    again = LocalRunner(home, SLEEPER)
    assert again.begun(run())
    assert not again.running(run(process=process))
    assert f"process {process.pid} is gone" in again.failure(run(process=process))
    assert again.start(run(), tiny) is None
    assert "ended before the controller could note it" in again.failure(run())


def test_a_process_id_that_was_given_to_another_is_not_the_run(
    home: Home, launch: Callable[..., Mark]
) -> None:
    process = launch()
    stranger = LocalRunner(home)
    assert process.process_started is not None
    other = Mark(process.pid, process.process_started - 100)
    assert not stranger.running(run("r2", other))
    assert stranger.running(run("r2", process))


def test_a_clock_that_was_set_does_not_hide_a_run(home: Home, launch: Callable[..., Mark]) -> None:
    """Start times seem to move when the clock is set; the lock still tells."""
    process = launch()
    assert process.process_started is not None
    moved = Mark(process.pid, process.process_started + 3600)
    assert LocalRunner(home).running(run(process=moved))


def test_nothing_began_where_nothing_was_started(home: Home) -> None:
    assert not LocalRunner(home).begun(run())
    assert not LocalRunner(home).running(run())


def test_a_command_that_does_not_exist_ends_with_an_explanation(home: Home, tiny: Contract) -> None:
    runner = LocalRunner(home, ("no-such-command",))
    process = runner.start(run(), tiny)
    assert process is not None
    until(lambda: not runner.running(run(process=process)))
    assert "ended with exit code 127" in runner.failure(run(process=process))
    assert "no-such-command" in runner.log("r1").read_text()


def test_sweep_ends_what_a_dead_run_left(home: Home, launch: Callable[..., Mark]) -> None:
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
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)
    dead = run(process=process)
    assert not runner.running(dead)
    runner.sweep(dead)
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    runner.sweep(dead)  # nothing is left: nothing happens
    assert runner.running(run("r2", bystander))
