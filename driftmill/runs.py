"""Run folders: what each pipeline run did, kept in the store.

`<model>/runs/<run_id>/` holds

| file | what |
|---|---|
| `run.json` | who started it, when and why (a run that the local runner started) |
| `steps/<step>.json` | start, end, state, reason and facts of each step |
| `verdict.json`, `report.html` | how the new model was judged |
| `quarantine.parquet` | the bad rows, each with its reason |
| `output.log` | what the steps printed (local runner) |
| `outcome.json` | how it ended; written last, whatever happened |

The outcome is worked out from the other files and from the rollout, never from what a runner says
of itself: a step that was killed leaves a start without an end, and that is enough.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from driftmill import extras, rollout
from driftmill.store import Store

State = Literal["promoted", "rejected", "stopped", "failed"]
StepState = Literal["running", "done", "stopped", "failed"]

#: What an outcome says of its tracking until the tracking server has answered.
UNRECORDED = "unavailable: the run ended before it was recorded"

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepRecord(_Record):
    """One step of a run, as its file says."""

    name: str
    """`prepare`, `fit-linear`, ..."""
    started: datetime
    ended: datetime | None = None
    """None while it runs, and for ever where it was killed."""
    state: StepState
    """`stopped`: the data was at fault; `failed`: anything else went wrong."""
    error: str | None = None
    """Class of the exception."""
    reason: str = ""
    """Last line of the traceback, without the class."""
    facts: dict[str, Any] = {}
    """What the step found out, e.g. the version it judged."""


class StepTime(_Record):
    """One step in an outcome."""

    name: str
    started: datetime
    ended: datetime | None
    state: StepState


class VerdictSummary(_Record):
    """The verdict in short; all of it is in `verdict.json`."""

    promote: bool
    reason: str
    metric: str
    against: str
    """Version of the champion, or `dummy`."""
    challenger: float | None
    """The metric of the new model on the test rows."""
    champion: float | None
    """The metric of what it was judged against, on the same rows."""
    low: float | None
    """Lower end of the interval of the difference."""
    high: float | None
    """Upper end."""
    failed: tuple[str, ...] = ()
    """Names of the checks that failed."""


class Outcome(_Record):
    """How a run ended."""

    run_id: str
    model: str
    state: State
    reason: str
    trigger: str
    version: str | None = None
    """Version of the model that it made, if it came so far."""
    champion_before: str | None = None
    """The champion that it was judged against."""
    started: datetime
    ended: datetime
    steps: tuple[StepTime, ...] = ()
    """In order of their start."""
    metrics: dict[str, float] = {}
    """The new model's metrics on the test rows."""
    verdict: VerdictSummary | None = None
    code_version: str = ""
    tracking: str = "none"
    """Where the run is recorded for people, or `unavailable: ...` with the reason."""


class Start(_Record):
    """`run.json`: the claim on a run id."""

    run_id: str
    model: str
    trigger: str
    started: datetime


class Handle(BaseModel):
    """What a step may add to its record while it runs."""

    facts: dict[str, Any] = Field(default_factory=dict)


class StoppedByData(Exception):
    """Raised by a step when the data, not the code, is why it cannot go on."""


def new_id() -> str:
    """A run id such as `20261123-084512-ab12`; ids sort by time (UTC)."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def is_id(text: str) -> bool:
    """Whether a text can be a run id: letters, digits, dot, underscore, hyphen; at most 100."""
    return _RUN_ID.fullmatch(text) is not None


def key(model: str, run_id: str, name: str = "") -> str:
    """Where a file of a run lies in the store; without a name, the run's folder."""
    folder = f"{model}/runs/{run_id}"
    return f"{folder}/{name}" if name else folder


def begin(store: Store, model: str, run_id: str, trigger: str) -> Start:
    """Claim a run id. Raises FileExistsError where a run has it already."""
    start = Start(run_id=run_id, model=model, trigger=trigger, started=datetime.now(UTC))
    store.create(key(model, run_id, "run.json"), start.model_dump_json(indent=1).encode())
    return start


@contextmanager
def step(
    store: Store, model: str, run_id: str, name: str, family: str | None = None
) -> Iterator[Handle]:
    """Record a step: its start at once, its end with state and reason, whatever happens inside.

    Each change is also printed as one JSON line, which is what the local runner shows progress
    from and what a cluster keeps in the pod's log.

    Args:
        store: where the run's folder is.
        model: whose run.
        run_id: which run.
        name: the step, e.g. `fit`.
        family: the candidate family, for steps that run once for each.

    Yields:
        A handle whose `facts` go into the record.
    """
    handle = Handle()
    record = StepRecord(
        name=f"{name}-{family}" if family else name, started=datetime.now(UTC), state="running"
    )

    def write(record: StepRecord, state: str) -> None:
        path = key(model, run_id, f"steps/{record.name}.json")
        store.write(path, record.model_dump_json(indent=1).encode())
        event = {"event": "step", "step": name, "family": family, "state": state}
        event |= {"at": (record.ended or record.started).isoformat()}
        if record.reason:
            event["reason"] = record.reason
        print(json.dumps({k: v for k, v in event.items() if v is not None}), flush=True)

    def end(state: StepState, error: BaseException | None = None) -> None:
        cause = error.__cause__ if isinstance(error, StoppedByData) else error
        done = record.model_copy(
            update={
                "ended": datetime.now(UTC),
                "state": state,
                "error": type(cause).__name__ if cause else None,
                "reason": _last_line(error) if error else "",
                "facts": handle.facts,
            }
        )
        write(done, "done" if state == "done" else "failed")

    write(record, "start")
    try:
        yield handle
    except StoppedByData as error:
        end("stopped", error)
        raise
    except BaseException as error:
        end("failed", error)
        raise
    end("done")


def progress(name: str, family: str, done: int, total: int, detail: str = "") -> None:
    """Print how far a long step is, as one JSON line like those of `step`; it is not kept.

    Args:
        name: the step, e.g. `fit`.
        family: the candidate family.
        done: parts that are done, e.g. epochs.
        total: parts in all.
        detail: what to show beside it, e.g. `validation accuracy 0.914`.
    """
    event = {"event": "progress", "step": name, "family": family}
    print(json.dumps({**event, "done": done, "total": total, "detail": detail}), flush=True)


def _last_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and (advice := extras.advice(error)):
        return advice
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def steps(store: Store, model: str, run_id: str) -> list[StepRecord]:
    """The steps of a run, in order of their start."""
    keys = store.list(key(model, run_id, "steps"))
    records = [StepRecord.model_validate_json(store.read(k)) for k in keys]
    return sorted(records, key=lambda r: r.started)


def read(store: Store, model: str, run_id: str) -> Outcome | None:
    """How a run ended; None where it has not, or where there is no such run."""
    try:
        return Outcome.model_validate_json(store.read(key(model, run_id, "outcome.json")))
    except FileNotFoundError:
        return None


def outcomes(store: Store, model: str) -> list[Outcome]:
    """The outcomes of all runs that ended, in order of their start."""
    found = [
        Outcome.model_validate_json(store.read(k))
        for k in store.list(f"{model}/runs")
        if k.endswith("/outcome.json")
    ]
    return sorted(found, key=lambda o: (o.started, o.run_id))


def write(store: Store, outcome: Outcome) -> None:
    """Write `outcome.json`."""
    path = key(outcome.model, outcome.run_id, "outcome.json")
    store.write(path, outcome.model_dump_json(indent=1).encode())


def conclude(
    store: Store,
    model: str,
    run_id: str,
    *,
    trigger: str,
    code_version: str,
    failure: str = "",
    tracking: str = "none",
) -> Outcome:
    """Work out how a run ended, and write it.

    Args:
        store: where the run's folder is.
        model: whose run.
        run_id: which run.
        trigger: why it was started.
        code_version: which Driftmill ran it.
        failure: what the runner says went wrong; decides only where no step says it better.
        tracking: what is known of the run's record for people.

    Returns:
        The outcome, as written.
    """
    records = steps(store, model, run_id)
    by_name = {r.name: r for r in records}
    judged = by_name["judge"].facts if "judge" in by_name else {}
    verdict = _read_json(store, key(model, run_id, "verdict.json"))
    state, reason = _state(store, model, run_id, records, verdict, failure)
    start = _read_json(store, key(model, run_id, "run.json"))
    now = datetime.now(UTC)
    started = Start.model_validate(start).started if start else None
    outcome = Outcome(
        run_id=run_id,
        model=model,
        state=state,
        reason=reason,
        trigger=trigger,
        version=judged.get("version"),
        champion_before=judged.get("champion"),
        started=started or (records[0].started if records else now),
        ended=now,
        steps=tuple(
            StepTime(name=r.name, started=r.started, ended=r.ended, state=r.state)
            for r in records
            if r.name != "record"  # the step that is writing this
        ),
        # A metric that is not defined on the test rows is null there.
        metrics={
            k: v for k, v in (verdict or {}).get("challenger_metrics", {}).items() if v is not None
        },
        verdict=_summary(verdict) if verdict else None,
        code_version=code_version,
        tracking=tracking,
    )
    write(store, outcome)
    return outcome


def _state(
    store: Store,
    model: str,
    run_id: str,
    records: list[StepRecord],
    verdict: dict[str, Any] | None,
    failure: str,
) -> tuple[State, str]:
    """State and reason, from the strongest evidence to the weakest."""
    # The rollout comes first: a run killed just after it promoted has promoted.
    mine = [r for r in rollout.history(store, model) if r.by == run_id]
    if mine:
        return "promoted", mine[-1].reason
    for record in records:
        if record.state == "stopped":
            return "stopped", record.reason
    for record in records:
        if record.state == "failed":
            error = f"{record.error}: " if record.error else ""
            return "failed", f"{record.name}: {error}{record.reason}"
    if verdict is not None and not verdict["promote"]:
        return "rejected", verdict["reason"]
    for record in records:
        if record.name == "promote" and record.state == "done":
            return "rejected", str(record.facts["refused"])
    for record in records:
        if record.state == "running" and record.name != "record":
            return "failed", failure or f"{record.name} was killed before it could say why"
    return "failed", failure or "it ended before the new model was judged"


def _summary(verdict: dict[str, Any]) -> VerdictSummary:
    comparison = verdict.get("comparison") or {}
    metric = verdict["metric"]
    return VerdictSummary(
        promote=verdict["promote"],
        reason=verdict["reason"],
        metric=metric,
        against=verdict["against"],
        challenger=verdict["challenger_metrics"].get(metric),
        champion=verdict["champion_metrics"].get(metric),
        low=comparison.get("low"),
        high=comparison.get("high"),
        failed=tuple(c["name"] for c in verdict["checks"] if not c["passed"]),
    )


def _read_json(store: Store, path: str) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(store.read(path))
    except FileNotFoundError:
        return None
    return values
