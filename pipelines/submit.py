"""Run a contract's pipeline on Kubeflow Pipelines and follow it: `driftmill submit CONTRACT`.

What is shown comes from the run's folder in the store where that can be read from here, and else
from what Kubeflow says of its tasks. The run is Kubeflow's: it goes on when this program ends.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from driftmill import extras, runs, tracking
from driftmill.contract import Contract, load, parse_duration
from driftmill.store import Store
from driftmill.version import code_version
from pipelines import compile as packages
from pipelines import kubeflow, progress
from pipelines.kubeflow import ApiError, Kubeflow, Object
from pipelines.run import EXIT_CODES, INTERRUPTED

#: Seconds between two looks at a run.
POLL = 2.0
#: Seconds without an answer after which a run is no longer followed.
PATIENCE = 300.0
#: Seconds without any step at work after which it is said why.
WAITING = 60.0

#: States of a run after which nothing more comes.
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
_FAILED = {"FAILED", "ERROR"}
#: The pipeline's tasks. Kubeflow lists drivers, loops and executors beside them.
_TASKS = ("prepare", "fit", "assemble", "judge", "promote", "record")
_KUBEFLOW_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_EPILOG = """\
Example: driftmill submit contract.yaml --endpoint http://localhost:8888 --store s3://models/driftmill
         driftmill submit contract.yaml --follow 20261124-120000-1a2b

KF_PIPELINES_ENDPOINT names the endpoint, KF_PIPELINES_TOKEN holds a bearer token.
exit codes: 0 promoted (--no-wait: started), 1 failed, 2 wrong usage or a bad contract,
3 judged and not promoted, 4 stopped by the data, 130 no longer followed
"""


def main(arguments: list[str] | None = None) -> int:
    """Submit and follow, and return the exit code."""
    options = _options(arguments)
    return kubeflow.answer(lambda: _submit(load(options.contract), options))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="driftmill submit",
        description="Run the pipeline on a Kubeflow cluster and follow it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contract", metavar="CONTRACT", help="the contract file")
    packages.add_package_options(parser)
    kubeflow.add_options(parser)
    parser.add_argument("--run-id", metavar="ID", help="id of the run; default: from the time")
    parser.add_argument(
        "--trigger", default="driftmill submit", metavar="TEXT", help="why it is started"
    )
    parser.add_argument(
        "--follow", metavar="RUN", help="follow a run that was submitted before; start none"
    )
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="start it and do not follow it"
    )
    parser.add_argument(
        "--timeout", metavar="TIME", type=_duration, help="follow for so long, e.g. 2h"
    )
    parser.add_argument(
        "--context",
        metavar="NAME",
        default=os.environ.get("DRIFTMILL_CONTEXT"),
        help="context of kubectl, to say why a step waits; default: $DRIFTMILL_CONTEXT, else none",
    )
    return parser.parse_args(arguments)


def _duration(text: str) -> float:
    try:
        return float(str(parse_duration(f"{text}s" if text.isdigit() else text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _submit(contract: Contract, options: argparse.Namespace) -> int:
    store_uri = kubeflow.store_uri(options)
    run_id = options.run_id or runs.new_id()
    if not runs.is_id(run_id):
        raise ApiError(
            f"not a run id: {run_id!r}; use letters, digits, dot, underscore and hyphen", usage=True
        )
    run: Object | None = None
    with _interruptible():
        try:
            api = Kubeflow(options.endpoint, options.namespace)
            experiment = api.experiment(options.experiment or contract.model)
            if options.follow:
                run = _find(api, experiment, options.follow)
            else:
                run = _start(api, contract, experiment, run_id, store_uri, options)
            print(f"{contract.model}: run {run['display_name']}, Kubeflow's {run['run_id']}")
            if ui := os.environ.get(kubeflow.UI):
                print(f"  {ui.rstrip('/')}/#/runs/details/{run['run_id']}")
            sys.stdout.flush()
            if not options.wait:
                print(f"follow it: {_again(run, options)}")
                return EXIT_CODES["promoted"]
            return _follow(api, contract, run, _readable(store_uri), options)
        except KeyboardInterrupt:
            if run is None:
                print("interrupted before the run was known to be started", file=sys.stderr)
            else:
                again = _again(run, options)
                print(f"the run goes on; follow it again: {again}", file=sys.stderr)
            return INTERRUPTED
        except ApiError:
            if run is not None:
                print(f"follow it again: {_again(run, options)}", file=sys.stderr)
            raise


def _find(api: Kubeflow, experiment: str, name: str) -> Object:
    """A run by Kubeflow's id or by ours."""
    if _KUBEFLOW_ID.fullmatch(name):
        return api.run(name)
    found = api.runs(experiment, name)
    if not found:
        raise ApiError(f"{api.endpoint} has no run {name} in this experiment", usage=True)
    return api.run(str(found[0]["run_id"]))


def _start(
    api: Kubeflow,
    contract: Contract,
    experiment: str,
    run_id: str,
    store: str,
    options: argparse.Namespace,
) -> Object:
    """Compile and start a run."""
    if options.run_id and api.runs(experiment, run_id):
        raise ApiError(
            f"{contract.model} has a run {run_id} already; choose another id, or none", usage=True
        )
    parameters = {"run_id": run_id, "trigger": options.trigger}
    body = kubeflow.body(contract, store, parameters, options)
    try:
        return api.create_run({**body, "display_name": run_id, "experiment_id": experiment})
    except ApiError as error:
        # Where the answer got lost, the run may have been started all the same.
        if error.passing and (found := _found(api, experiment, run_id)):
            return found[0]
        raise


def _found(api: Kubeflow, experiment: str, run_id: str) -> list[Object]:
    try:
        return api.runs(experiment, run_id)
    except ApiError:
        return []


def _again(run: Object, options: argparse.Namespace) -> str:
    """The command that follows a run."""
    words = ["driftmill", "submit", options.contract, "--follow", str(run["display_name"])]
    for name in ("endpoint", "namespace", "experiment", "store"):
        if value := getattr(options, name):
            words += [f"--{name}", value]
    return shlex.join(words)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _readable(uri: str) -> Store | None:
    """The store, if it can be read from here."""
    try:
        store = Store(uri)
        store.probe()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        advice = extras.advice(error) if isinstance(error, ModuleNotFoundError) else None
        print(
            f"note: {uri} cannot be read from here ({advice or error}); what is shown is what "
            "Kubeflow says",
            file=sys.stderr,
        )
        return None
    return store


def _follow(
    api: Kubeflow,
    contract: Contract,
    run: Object,
    store: Store | None,
    options: argparse.Namespace,
) -> int:
    """Show a run until it has ended; its exit code."""
    run_id = _parameter(run, "run_id") or str(run["run_id"])
    began = time.monotonic()
    with ExitStack() as stack:
        earlier = runs.outcomes(store, contract.model) if store else []
        watch = progress.clock(earlier)
        display: progress.Display = progress.Lines(watch)
        if sys.stdout.isatty():
            display = stack.enter_context(progress.bar(watch))
        follower = _Follower(contract, run_id, store, display, options)
        answered = began
        while True:
            try:
                run = api.run(str(run["run_id"]))
                answered = time.monotonic()
                follower.lost = False
            except ApiError as error:
                if not error.passing or time.monotonic() - answered > PATIENCE:
                    raise
                follower.lose(error)
            else:
                follower.see(run)
                if run.get("state") in ENDED:
                    break
            if options.timeout is not None and time.monotonic() - began > options.timeout:
                print(
                    f"still {str(run.get('state', 'pending')).lower()} after "
                    f"{options.timeout:.0f} s; the run goes on, follow it again: "
                    f"{_again(run, options)}",
                    file=sys.stderr,
                )
                return EXIT_CODES["failed"]
            time.sleep(POLL)
    return _conclude(contract, run_id, run, store, options)


@dataclass(frozen=True)
class _Seen:
    """A step, as last shown."""

    step: str
    family: str | None
    state: str
    """`start`, `done` or `failed`."""
    started: datetime | None
    ended: datetime | None


@dataclass
class _Follower:
    """What of a run has been shown."""

    contract: Contract
    run_id: str
    store: Store | None
    display: progress.Display
    options: argparse.Namespace
    shown: dict[str, _Seen] = field(default_factory=dict)
    lost: bool = False
    """Whether the last look failed."""
    states: dict[str, str] = field(default_factory=dict)
    """State of each of Kubeflow's tasks, as last seen."""
    moved: float = field(default_factory=time.monotonic)
    """When a step was last seen to be at work, or a task to change."""
    explained: bool = False

    def lose(self, error: ApiError) -> None:
        """Say that a look failed, once."""
        if not self.lost:
            self.display.line(f"  {error}; trying again")
        self.lost = True

    def see(self, run: Object) -> None:
        """Show what is new."""
        tasks = run.get("run_details", {}).get("task_details", [])
        if not self._see_store():
            self._see_tasks(tasks)
        now = {str(task.get("task_id")): str(task.get("state")) for task in tasks}
        busy = any(seen.state == "start" for seen in self.shown.values()) and not _pending(tasks)
        if busy or now != self.states:
            self.moved, self.states, self.explained = time.monotonic(), now, False
        elif time.monotonic() - self.moved > WAITING and not self.explained:
            self.explained = True
            for text in _why(run, self.options):
                self.display.line(f"  waiting: {text}")

    def _see_store(self) -> bool:
        """Show what the steps have written; False where that cannot be read."""
        if self.store is None:
            return False
        try:
            records = runs.steps(self.store, self.contract.model, self.run_id)
        except OSError as error:
            self.display.line(f"  {self.store.uri} can no longer be read: {error}")
            self.store = None
            return False
        states = {"running": "start", "done": "done", "stopped": "failed", "failed": "failed"}
        for record in records:
            step, _, family = record.name.partition("-")
            self._show(
                _Seen(step, family or None, states[record.state], record.started, record.ended),
                record.reason,
            )
        return True

    def _see_tasks(self, tasks: list[Object]) -> None:
        """Show what Kubeflow says of the tasks. It does not say which family a fit is of, so they
        are numbered. Of a task that was tried again there are several; the newest counts. The
        creation time of each is the run's."""
        found: dict[str, list[Object]] = {}
        for task in sorted(tasks, key=lambda t: str(t.get("start_time", ""))):
            if task.get("state") not in ("SKIPPED", "PENDING"):
                found.setdefault(str(task.get("display_name")), []).append(task)
        for step in _TASKS:
            count = len(self.contract.train.candidates) if step == "fit" else 1
            for number, task in enumerate(found.get(step, [])[-count:], start=1):
                state = str(task.get("state"))
                shown = "failed" if state in _FAILED else "start"
                shown = "done" if state == "SUCCEEDED" else shown
                family = str(number) if step == "fit" else None
                reason = str(task.get("error", {}).get("message", "")) or "its pod's log says why"
                times = (_time(task, "start_time"), _time(task, "end_time"))
                self._show(_Seen(step, family, shown, *times), reason)

    def _show(self, seen: _Seen, reason: str) -> None:
        name = f"{seen.step}-{seen.family}" if seen.family else seen.step
        before = self.shown.get(name)
        if before is not None and (before.state, before.started) == (seen.state, seen.started):
            return
        self.shown[name] = seen
        event: dict[str, Any] = {"event": "step", "step": seen.step, "state": seen.state}
        event |= {"family": seen.family} if seen.family else {}
        if seen.state == "start":
            self.display.event(event)
            return
        if before is None or before.started != seen.started:  # it came and went between two looks
            self.display.event({**event, "state": "start"})
        if seen.started and seen.ended:
            event["seconds"] = (seen.ended - seen.started).total_seconds()
        self.display.event({**event, "reason": reason} if seen.state == "failed" else event)


def _time(task: Object, name: str) -> datetime | None:
    """A time of a task; Kubeflow writes the year 1 for one that has not come."""
    text = str(task.get(name, ""))
    return datetime.fromisoformat(text) if text and not text.startswith("0001") else None


def _pending(tasks: list[Object]) -> bool:
    """Whether a pod waits and none is at work. A task that has others below it is no pod."""
    pods = [task.get("state") for task in tasks if not task.get("child_tasks")]
    return "PENDING" in pods and "RUNNING" not in pods


def _why(run: Object, options: argparse.Namespace) -> list[str]:
    """Why no step gets on, as far as that can be told from here."""
    namespace = options.namespace or "kubeflow"
    # Drivers, too, and only pods that have not ended.
    labels = f"pipeline/runid={run['run_id']},workflows.argoproj.io/completed=false"
    if options.context is None:
        return [
            f"no step is at work; `kubectl get pods -n {namespace} -l {labels}` shows the pods, "
            "and --context NAME lets this command say why they wait"
        ]
    from k8s import explain
    from k8s.client import Cluster, ClusterError

    try:
        said = explain.sentences(Cluster(options.context), namespace, selector=labels)
    except ClusterError as error:
        return [str(error)]
    return [sentence for sentence in said if not sentence.endswith(" has finished.")]


def _parameter(run: Object, name: str) -> str:
    """What a run was given for a parameter of the pipeline; empty where it took the default."""
    return str(run.get("runtime_config", {}).get("parameters", {}).get(name, ""))


def _conclude(
    contract: Contract,
    run_id: str,
    run: Object,
    store: Store | None,
    options: argparse.Namespace,
) -> int:
    """Say how a run has ended; the exit code."""
    namespace = options.namespace or "kubeflow"
    state, reason = outcome_of(run, contract.model, namespace, options.service_account)
    outcome = None
    if store is not None:
        try:
            # Where the exit handler could not write it, whoever follows the run does.
            outcome = runs.read(store, contract.model, run_id) or runs.conclude(
                store,
                contract.model,
                run_id,
                trigger=_parameter(run, "trigger") or "manual",
                code_version=code_version(),
                failure=reason if state == "failed" else "",
                tracking=tracking.pending(contract),
            )
        except OSError as error:
            print(f"note: {error}; the outcome is what Kubeflow says", file=sys.stderr)
    if outcome is None:
        print(f"{state}: {reason}")
        return EXIT_CODES[state]
    assert store is not None  # where the outcome was read
    print(*progress.conclusion(outcome, store), sep="\n", flush=True)
    return EXIT_CODES[outcome.state]


def outcome_of(
    run: Object, model: str, namespace: str, account: str | None
) -> tuple[runs.State, str]:
    """State and reason of a run that has ended, from what Kubeflow says of it alone.

    Args:
        run: the run, as the API gives it.
        model: whose.
        namespace: of its pods.
        account: their service account, if one was named.
    """
    tasks = run.get("run_details", {}).get("task_details", [])
    states = {str(t.get("display_name")): str(t.get("state")) for t in tasks}
    if run["state"] == "SUCCEEDED":
        if states.get("promote") == "SUCCEEDED":
            return "promoted", "the step `promote` has run"
        return "rejected", "the new model was judged and not promoted"
    if run["state"] == "CANCELED":
        return "failed", "the run was cancelled"
    if said := str(run.get("error", {}).get("message", "")):
        return "failed", said
    failed = [name for name in _TASKS if states.get(name) in _FAILED]
    if failed:
        labels = f"driftmill/model={model},app.kubernetes.io/component={failed[0]}"
        return "failed", f"{failed[0]}: see `kubectl logs -n {namespace} -c main -l {labels}`"
    lacks = f"is there a service account {account}? " if account else ""
    return "failed", (
        f"it ended before its first step began: {lacks}"
        f"`kubectl describe workflows -n {namespace} -l pipeline/runid={run['run_id']}` says why"
    )


if __name__ == "__main__":
    sys.exit(main())
