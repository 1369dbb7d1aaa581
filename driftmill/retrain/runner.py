"""Starts training runs as processes of this machine, and finds them again.

A run is a process in a session of its own, so that neither a terminal's Ctrl-C nor the end of the
controller reaches it: runs outlive the controller, and the next one adopts them. Only
`driftmill down` (or a person) ends them.

| file below the home | what |
|---|---|
| `runs/<run_id>/contract.json` | the contract as it was when the run was decided |
| `runs/<run_id>/process` | the process id, written by the process itself before it begins |
| `logs/run-<run_id>.log` | what the run prints |

The file `process` carries a lock (`flock`) that the starting process takes and the run inherits.
A controller that is killed between starting a process and noting it therefore finds out, by the
lock, that the process lives, and by the file, that it once did: no run id is ever started twice.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from driftmill import contract as contracts
from driftmill.home import Home
from driftmill.retrain.ledger import Run
from driftmill.store import write_atomic

#: What trains; `--contract FILE --run-id ID --trigger TEXT` is added.
COMMAND = (sys.executable, "-m", "pipelines.run")
#: Training gives way to the services of the same machine.
NICE = 10
#: Variable by which the processes of a run are known.
_MARK = "DRIFTMILL_RUN_ID"
#: Start times are kept in clock ticks, so two readings of one may differ a little.
_TICK = 1.0
# The shell notes its process id and becomes the run: the id stays the same.
_LAUNCH = 'echo $$ > "$0" && nice=$1 && shift && exec nice -n "$nice" "$@"'


class RunnerError(RuntimeError):
    """A run that could not be started; the message says why."""


class BeingStarted(RuntimeError):
    """Another process is starting this run at this moment; look again."""


@dataclass(frozen=True)
class Process:
    """A process of this machine. The id alone would not do: ids are used again."""

    pid: int
    started: float
    """Start time, in seconds since 1970."""


class LocalRunner:
    """Runs as processes of this machine.

    Args:
        home: where contracts, logs and locks lie; the run gets the same places.
        command: what trains, with the three arguments of a run added. Another command than the
            default can wrap it (`srun`, a container) or replace it.
    """

    def __init__(self, home: Home, command: Sequence[str] = COMMAND) -> None:
        self._home = home
        self._command = tuple(command)
        #: Runs that this object has started: it must reap them, and learns their exit codes.
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def log(self, run_id: str) -> Path:
        """Where the output of a run goes."""
        return self._home.logs / f"run-{run_id}.log"

    def begun(self, run_id: str) -> bool:
        """Whether a process was ever started for a run."""
        try:
            return bool(self._file(run_id).read_text()) or self._locked(run_id)
        except FileNotFoundError:
            return False

    def start(self, run: Run, contract: contracts.Contract) -> Process | None:
        """Start a run, or find the process that was started for it before.

        Returns:
            The process; None where it was started before and has ended.

        Raises:
            RunnerError: the command cannot be started.
            BeingStarted: another process is at it; nothing was done.
        """
        folder = self._folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        with self._file(run.run_id).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._noted(run.run_id)
            lock.seek(0)
            if lock.read():
                return None
            write_atomic(folder / "contract.json", contract.to_json().encode())
            return self._spawn(run, folder, lock.fileno())

    def _spawn(self, run: Run, folder: Path, lock: int) -> Process:
        trigger = f"{run.trigger}: {run.note}" if run.note else run.trigger
        arguments = ["--contract", str(folder / "contract.json"), "--run-id", run.run_id]
        log = self.log(run.run_id)
        log.parent.mkdir(parents=True, exist_ok=True)
        launch = ["sh", "-c", _LAUNCH, str(self._file(run.run_id)), str(NICE)]
        with log.open("ab") as output:
            try:
                child = subprocess.Popen(
                    [*launch, *self._command, *arguments, "--trigger", trigger],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={
                        **os.environ,
                        **self._home.environment(),
                        "PYTHONUNBUFFERED": "1",
                        _MARK: run.run_id,
                    },
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            except OSError as error:
                raise RunnerError(f"the run's process cannot be started: {error}") from error
        self._children[run.run_id] = child
        return Process(child.pid, psutil.Process(child.pid).create_time())

    def _noted(self, run_id: str) -> Process | None:
        """The process behind a lock that is held; None where only children of it are left."""
        text = self._file(run_id).read_text().strip()
        if not text:
            raise BeingStarted(f"another process is starting run {run_id}")
        try:
            return Process(int(text), psutil.Process(int(text)).create_time())
        except psutil.NoSuchProcess:
            return None

    def alive(self, run_id: str, process: Process) -> bool:
        """Whether the process of a run still runs."""
        child = self._children.get(run_id)
        if child is not None:
            return child.poll() is None
        try:
            found = psutil.Process(process.pid)
            if found.status() == psutil.STATUS_ZOMBIE:
                return False
            # Start times move when the clock is set; the lock then still tells.
            return abs(found.create_time() - process.started) < _TICK or self._locked(run_id)
        except psutil.NoSuchProcess:
            return False

    def _locked(self, run_id: str) -> bool:
        try:
            with self._file(run_id).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def sweep(self, run_id: str) -> None:
        """End what is left of a run whose process is dead, so that no orphaned step goes on and
        promotes what nobody waits for."""
        for process in psutil.process_iter():
            # Most are other people's, or end while they are looked at.
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_MARK) == run_id:
                    process.kill()

    def exit_code(self, run_id: str) -> int | None:
        """Exit code of a run that this object started and that has ended, else None."""
        child = self._children.get(run_id)
        return child.poll() if child is not None else None

    def _file(self, run_id: str) -> Path:
        return self._folder(run_id) / "process"

    def _folder(self, run_id: str) -> Path:
        return self._home.folder / "runs" / run_id
