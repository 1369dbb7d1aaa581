"""What starts training runs and finds them again: the interface, and runs as processes of this
machine.

A `LocalRunner`'s run is a process in a session of its own, so that neither a terminal's Ctrl-C nor
the end of the controller reaches it: runs outlive the controller, and the next one adopts them.
Only `driftmill down` (or a person) ends them.

| file below the home | what |
|---|---|
| `runs/<run_id>/contract.json` | the contract as it was when the run was decided |
| `runs/<run_id>/process` | the process id, written by the process itself before it begins |
| `logs/run-<run_id>.log` | what the run prints |

The file `process` carries a lock (`flock`) that the starting process takes and the run inherits.
A controller that is killed between starting a process and noting it therefore finds out, by the
lock, that the process lives, and by the file, that it once did: no run id is ever started twice.

Runs on a cluster are in `pipelines.job` and `pipelines.kubeflow_runner`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class RunnerAway(OSError):
    """What runs trainings does not answer, or not now; the message says why. Try again later."""


@dataclass(frozen=True)
class Mark:
    """What the ledger keeps of a run beside its id, so that it is found again; a cluster needs
    nothing more."""

    pid: int | None = None
    process_started: float | None = None
    """Start time of the process, in seconds since 1970: process ids are used again."""


class Runner(Protocol):
    """Where trainings run.

    Every method may raise `RunnerAway`. What a run came to is in its `outcome.json` in the store; a
    runner only knows whether it runs, and why it could not say.
    """

    @property
    def host(self) -> str:
        """Where the runs live: a machine, or a namespace of a cluster. Every controller with a
        runner of the same host may look after them; a run of another host is lost if nobody does.
        """

    def begun(self, run: Run) -> bool:
        """Whether a run was ever started."""

    def start(self, run: Run, contract: contracts.Contract) -> Mark | None:
        """Start a run, or find the one that was started before: there is one for an id.

        Returns:
            What finds it again; None where it was started before and has ended.

        Raises:
            RunnerError: it cannot be started, now or later.
            BeingStarted: another process is at it; nothing was done.
        """

    def running(self, run: Run) -> bool:
        """Whether a run that was started goes on, or may still begin."""

    def failure(self, run: Run) -> str:
        """Why a run that does not go on left no outcome, and where to look; one sentence without a
        full stop."""

    def sweep(self, run: Run) -> None:
        """End what is left of a run that does not go on, so that no orphaned step promotes what
        nobody waits for."""


def why(run: Run) -> str:
    """Why a run is started, as `--trigger` takes it."""
    return f"{run.trigger}: {run.note}" if run.note else run.trigger


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
        self.host = socket.gethostname()
        #: Runs that this object has started: it must reap them, and learns their exit codes.
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def log(self, run_id: str) -> Path:
        """Where the output of a run goes."""
        return self._home.logs / f"run-{run_id}.log"

    def begun(self, run: Run) -> bool:
        """Whether a process was ever started for a run."""
        try:
            return bool(self._file(run.run_id).read_text()) or self._locked(run.run_id)
        except FileNotFoundError:
            return False

    def start(self, run: Run, contract: contracts.Contract) -> Mark | None:
        """Start a process, or find the one that was started before."""
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

    def _spawn(self, run: Run, folder: Path, lock: int) -> Mark:
        arguments = ["--contract", str(folder / "contract.json"), "--run-id", run.run_id]
        log = self.log(run.run_id)
        log.parent.mkdir(parents=True, exist_ok=True)
        launch = ["sh", "-c", _LAUNCH, str(self._file(run.run_id)), str(NICE)]
        with log.open("ab") as output:
            try:
                child = subprocess.Popen(
                    [*launch, *self._command, *arguments, "--trigger", why(run)],
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
        return Mark(child.pid, psutil.Process(child.pid).create_time())

    def _noted(self, run_id: str) -> Mark | None:
        """The process behind a lock that is held; None where only children of it are left."""
        text = self._file(run_id).read_text().strip()
        if not text:
            raise BeingStarted(f"another process is starting run {run_id}")
        try:
            return Mark(int(text), psutil.Process(int(text)).create_time())
        except psutil.NoSuchProcess:
            return None

    def running(self, run: Run) -> bool:
        """Whether the process of a run lives."""
        child = self._children.get(run.run_id)
        if child is not None:
            return child.poll() is None
        if run.pid is None or run.process_started is None:
            return False
        try:
            found = psutil.Process(run.pid)
            if found.status() == psutil.STATUS_ZOMBIE:
                return False
            moved = abs(found.create_time() - run.process_started) >= _TICK
            # Start times move when the clock is set; the lock then still tells.
            return not moved or self._locked(run.run_id)
        except psutil.NoSuchProcess:
            return False

    def failure(self, run: Run) -> str:
        """How the process ended, and where its log is."""
        child = self._children.get(run.run_id)
        if run.pid is None:
            how = "its process ended before the controller could note it"
        elif child is not None and child.returncode is not None:
            how = f"process {run.pid} ended with exit code {child.returncode}"
        else:
            how = f"process {run.pid} is gone"
        return f"{how} and left no outcome; see {self.log(run.run_id)}"

    def _locked(self, run_id: str) -> bool:
        try:
            with self._file(run_id).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def sweep(self, run: Run) -> None:
        """End the processes that a dead run has left."""
        for process in psutil.process_iter():
            # Most are other people's, or end while they are looked at.
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_MARK) == run.run_id:
                    process.kill()

    def _file(self, run_id: str) -> Path:
        return self._folder(run_id) / "process"

    def _folder(self, run_id: str) -> Path:
        return self._home.folder / "runs" / run_id
