"""Run a contract's pipeline on this machine: `python -m pipelines.run --contract FILE`.

| exit code | what |
|---|---|
| 0 | the new model was promoted |
| 1 | something failed |
| 2 | the contract or the command line is wrong |
| 3 | the new model was judged and not promoted |
| 4 | the data stopped the run: unreadable, or too many bad rows |
| 130 | interrupted (Ctrl-C or SIGTERM) |

The steps are processes of this machine or, with `--runner docker`, containers of the images that a
cluster would use, as the compiled package has them.

With `--resume` a run id may be given again, as by a Kubernetes Job whose pod was taken away: a run
that has ended says how, one that has not goes on, and takes the fits that are kept in the store.
What interrupts it leaves it open for the next attempt: no outcome is written then.

This process stays small: it starts `pipelines.local`, which imports KFP, shows its progress, and
ends it with all its steps when it is told to stop. The outcome is in the store in every other case.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from driftmill import rollout, runs, tracking
from driftmill.contract import Contract, ContractError, load
from driftmill.home import Home, cores, find
from driftmill.runs import Outcome
from driftmill.store import Store
from driftmill.version import code_version
from pipelines import containers, progress

EXIT_CODES: dict[runs.State, int] = {"promoted": 0, "failed": 1, "rejected": 3, "stopped": 4}
USAGE, INTERRUPTED = 2, 130
#: Seconds that the pipeline's process may take to remove its containers.
_FAREWELL = 30

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code."""
    options = _options(arguments)
    try:
        contract = load(options.contract)
    except ContractError as error:
        print(error, file=sys.stderr)
        return USAGE
    home = find()
    run_id = options.run_id or runs.new_id()
    if not runs.is_id(run_id):
        print(
            f"not a run id: {run_id!r}; use letters, digits, dot, underscore and hyphen",
            file=sys.stderr,
        )
        return USAGE
    if options.resume and not options.run_id:
        print("--resume goes on with a run: name it by --run-id", file=sys.stderr)
        return USAGE
    image = None
    if options.runner == "docker":
        image = containers.image(contract)
        try:
            containers.check(image)
        except containers.DockerError as error:
            print(error, file=sys.stderr)
            return EXIT_CODES["failed"]
    try:
        if ended := _claim(contract, home.store, run_id, options):
            _conclude(ended, home.store, options)
            return EXIT_CODES[ended.state]
        return _watch(contract, home, run_id, image, options)
    except FileExistsError:
        print(
            f"{contract.model} has a run {run_id} already; choose another id, or none",
            file=sys.stderr,
        )
        return USAGE
    except OSError as error:
        print(
            f"cannot write below {home.folder} or {home.store_uri}: {error}; "
            "make room, or name other places by DRIFTMILL_HOME and DRIFTMILL_STORE",
            file=sys.stderr,
        )
        return EXIT_CODES["failed"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.run",
        description="Train, judge and, if it is better, promote a model on this machine.",
    )
    parser.add_argument("--contract", required=True, metavar="FILE", help="the contract")
    parser.add_argument("--run-id", metavar="ID", help="id of the run; default: from the time")
    parser.add_argument("--trigger", default="manual", metavar="TEXT", help="why it is started")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of this id where it has begun, and leave it open when interrupted",
    )
    parser.add_argument(
        "--runner",
        choices=("subprocess", "docker"),
        default="subprocess",
        help="what a step is: a process of this machine, or a container as on a cluster, of the "
        "images that `driftmill images build` makes; default: subprocess",
    )
    parser.add_argument("--events", action="store_true", help="print one JSON line per event")
    parser.add_argument("--verbose", action="store_true", help="show what the steps print")
    parser.add_argument("--keep", action="store_true", help="keep what the steps pass on")
    return parser.parse_args(arguments)


def _claim(
    contract: Contract, store: Store, run_id: str, options: argparse.Namespace
) -> Outcome | None:
    """Claim a run id; the outcome where it is to be resumed and has nothing more to do. Raises
    FileExistsError where it is taken and not to be resumed."""
    try:
        runs.begin(store, contract.model, run_id, options.trigger)
        return None
    except FileExistsError:
        if not options.resume:
            raise
    if outcome := runs.read(store, contract.model, run_id):
        return outcome
    # Killed just after it promoted: a second verdict would compare the model with itself.
    if any(revision.by == run_id for revision in rollout.history(store, contract.model)):
        return _outcome(contract, store, run_id, options, failure="")
    return None


def _outcome(
    contract: Contract, store: Store, run_id: str, options: argparse.Namespace, failure: str
) -> Outcome:
    return runs.conclude(
        store,
        contract.model,
        run_id,
        trigger=options.trigger,
        code_version=code_version(),
        failure=failure,
        tracking=tracking.pending(contract),
    )


def _watch(
    contract: Contract, home: Home, run_id: str, image: str | None, options: argparse.Namespace
) -> int:
    store = home.store
    root = home.folder / "pipeline-root" / run_id
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    failure = ""
    with ExitStack() as stack:
        display = _display(stack, store, contract.model, options)
        if options.events:
            display.event({"event": "run", "state": "start", "run_id": run_id})
        display.line(f"{contract.model}: run {run_id}, {', '.join(contract.train.candidates)}")
        log = stack.enter_context((root / "output.log").open("w", encoding="utf-8"))
        _heed_interrupts()
        try:
            with _engine(contract, home, run_id, options.trigger, root, image) as lines:
                for line in lines:
                    _show(line, display, log, verbose=options.verbose)
        except KeyboardInterrupt:
            failure = "interrupted"
        except BrokenPipeError:
            failure = "interrupted"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        except _EngineFailed as error:
            failure = str(error)
        _ignore_interrupts()  # what is left takes a moment, and is what an interrupted run needs
    outcome = runs.read(store, contract.model, run_id)
    if outcome is None and not (options.resume and failure == "interrupted"):
        outcome = _outcome(contract, store, run_id, options, failure)
    log_key = runs.key(contract.model, run_id, "output.log")
    store.write(log_key, (root / "output.log").read_bytes())
    if not options.keep:
        shutil.rmtree(root)
    if outcome is None:
        print(f"interrupted; run {run_id} can be resumed", file=sys.stderr)
        return INTERRUPTED
    _conclude(outcome, store, options)
    return INTERRUPTED if failure == "interrupted" else EXIT_CODES[outcome.state]


def _display(
    stack: ExitStack, store: Store, model: str, options: argparse.Namespace
) -> progress.Display:
    if options.events:
        return progress.Events()
    watch = progress.clock(runs.outcomes(store, model))
    if sys.stdout.isatty():
        return stack.enter_context(progress.bar(watch))
    return progress.Lines(watch)


class _EngineFailed(RuntimeError):
    """The process that runs the pipeline did not end well."""


def _heed_interrupts() -> None:
    """Let SIGTERM do what Ctrl-C does, once: what cleans up is not interrupted again."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_interrupts()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _engine(
    contract: Contract, home: Home, run_id: str, trigger: str, root: Path, image: str | None
) -> Iterator[Iterator[str]]:
    """The lines that the pipeline's process prints. At the end no process of it is left."""
    job = {
        "contract": contract.to_json(),
        "store": home.store.uri,
        "run_id": run_id,
        "trigger": trigger,
        "root": str(root),
        "image": image,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.local"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A group of its own, to be ended as a whole; TMPDIR because KFP leaves files there.
        start_new_session=True,
        env={
            "OMP_NUM_THREADS": str(_threads(contract)),
            **os.environ,
            **home.environment(),
            "TMPDIR": str(root / "tmp"),
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None
    last = ""

    def lines(output: Iterable[str]) -> Iterator[str]:
        nonlocal last
        for line in output:
            last = _COLOUR.sub("", line).strip() or last
            yield line

    try:
        with suppress(BrokenPipeError):  # it ended before it read its job; its output says why
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        yield lines(process.stdout)
        # Not reaped before its group is gone: until then no other process can get the number.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    finally:
        if image is not None:
            # Containers are nobody's children: the process removes them when its input ends.
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_FAREWELL)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        if image is not None and code != 0:
            _remove_containers(root)  # it may have been killed before it could
    if code < 0:
        raise _EngineFailed(f"the pipeline's process was killed by signal {-code}")
    if code > 0:  # the last line of a traceback says most
        raise _EngineFailed(f"the pipeline's process ended with exit code {code}: {last}")


def _remove_containers(root: Path) -> None:
    try:
        containers.remove(root)
    except containers.DockerError as error:
        raise _EngineFailed(str(error)) from None


def _threads(contract: Contract) -> int:
    """Threads that a step may compute with. KFP's local runner fits two families at a time; with
    more threads than cores, both wait for each other more than they compute."""
    return max(1, cores() // min(len(contract.train.candidates), 2))


def _show(line: str, display: progress.Display, log: Any, *, verbose: bool) -> None:
    """Put a line of the pipeline's process into the log, and on show if it is an event."""
    text = _COLOUR.sub("", line.rstrip())
    log.write(text + "\n")
    if text.lstrip().startswith(('{"event": "step"', '{"event": "progress"')):
        display.event(json.loads(text))
    elif verbose:
        display.line(text)


def _conclude(outcome: Outcome, store: Store, options: argparse.Namespace) -> None:
    if options.events:
        print(json.dumps({"event": "outcome", **outcome.model_dump(mode="json")}), flush=True)
        return
    print(*progress.conclusion(outcome, store, log="output.log"), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
