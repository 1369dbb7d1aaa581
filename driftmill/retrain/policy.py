"""Whether an event may start a training run: one pure function.

`decide` looks at the contract's `retrain` section, the event and the facts of the moment, and
answers yes or no with a code (for metrics) and a sentence (for people). The checks run in this
order, and the first that objects gives the answer:

| code | what objects |
|---|---|
| `disabled` | the kill switch: `retrain.enabled` is false |
| `trigger_disabled` | this kind of event is not in `retrain.triggers` |
| `duplicate` | the same incident has already started a run |
| `stale` | the event is about a version that no longer serves |
| `running` | a run is waiting or running: there is only ever one |
| `breaker` | too many runs in a row ended without a promotion |
| `cooldown` | the last run ended too recently |
| `budget` | the period's runs are used up |
| `fresh_rows` | too few labelled rows that no serving model has learnt from |
| `dry_run` | nothing objects, but `retrain.dry_run` is true |
| `started` | nothing objects |

A manual request goes through the same checks: `driftmill train` is the way around them. So does
the wish for a first model (`first`), which no contract lists: whoever starts the controller asks
for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from driftmill.contract import Retrain

Kind = Literal["drift", "quality", "schedule", "manual", "first"]
Code = Literal[
    "disabled",
    "trigger_disabled",
    "duplicate",
    "stale",
    "running",
    "breaker",
    "cooldown",
    "budget",
    "fresh_rows",
    "dry_run",
    "started",
]
CODES: tuple[str, ...] = get_args(Code)


@dataclass(frozen=True)
class Trigger:
    """An event that asks for a run.

    `fingerprint` and `starts_at` (with a time zone) name the incident: an alert keeps both for as
    long as it fires, a scheduled time is an incident of its own, and so is a manual request.
    """

    kind: Kind
    fingerprint: str
    starts_at: datetime
    version: str | None = None
    """The version that the event is about, where it says so."""
    note: str = ""
    """What a person or the alert says about it."""

    def key(self, model: str) -> str:
        """The idempotency key: the same incident of the same model gives the same key."""
        parts = (model, self.fingerprint, self.starts_at.astimezone(UTC).isoformat())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Facts:
    """What a decision rests on. Times carry a time zone."""

    fresh_rows: int | None
    """Labelled rows that no serving model has learnt from; None where nothing serves yet, and so
    every row is fresh."""
    serving: tuple[str, ...] = ()
    """Champion and challenger."""
    same: tuple[str, str] | None = None
    """Id and state of the run that this incident has already started."""
    active: tuple[str, str] | None = None
    """Id and state of the run that is waiting or running."""
    last_end: datetime | None = None
    """When the last run ended."""
    used: int = 0
    """Runs created in the budget period that ends now."""
    failures: int = 0
    """Runs in a row without a promotion, since the last reset of the breaker."""


@dataclass(frozen=True)
class Answer:
    """Yes or no, with the reason."""

    start: bool
    code: Code
    reason: str


def decide(policy: Retrain, trigger: Trigger, facts: Facts, now: datetime) -> Answer:
    """Whether the trigger may start a run now.

    Args:
        policy: the contract's `retrain` section.
        trigger: what asks.
        facts: what is known at `now`.
        now: the present time, with a time zone.
    """

    def no(code: Code, reason: str) -> Answer:
        return Answer(False, code, reason)

    if not policy.enabled:
        return no("disabled", "Retraining is switched off: retrain.enabled is false.")
    if trigger.kind != "first" and trigger.kind not in policy.triggers:
        listed = ", ".join(policy.triggers) or "none"
        return no(
            "trigger_disabled",
            f"The trigger {trigger.kind} is not among the {len(policy.triggers)} in "
            f"retrain.triggers ({listed}).",
        )
    if facts.same is not None:
        run, state = facts.same
        return no("duplicate", f"This incident has already started run {run}, which is {state}.")
    if trigger.version is not None and facts.serving and trigger.version not in facts.serving:
        return no(
            "stale",
            f"The alert is about version {trigger.version}, but {' and '.join(facts.serving)} "
            "serves now.",
        )
    if facts.active is not None:
        run, state = facts.active
        return no("running", f"Run {run} is {state}, and only 1 run may be active.")
    if facts.failures >= policy.breaker:
        return no(
            "breaker",
            f"{_count(facts.failures, 'run')} in a row ended without a promotion, and "
            f"{policy.breaker} open the breaker; a person must reset it.",
        )
    if facts.last_end is not None:
        passed = max(0.0, (now - facts.last_end).total_seconds())
        if passed < policy.cooldown:
            return no(
                "cooldown",
                f"The last run ended {span(passed)} ago, and the cooldown is "
                f"{span(policy.cooldown)}.",
            )
    if facts.used >= policy.budget.runs:
        return no(
            "budget",
            f"{_count(facts.used, 'run')} began in the last {span(policy.budget.period)}, and the "
            f"budget is {policy.budget.runs}.",
        )
    fresh = facts.fresh_rows
    if fresh is not None and fresh < policy.min_fresh_rows:
        return no("fresh_rows", f"{_fresh(fresh)}, {policy.min_fresh_rows} needed.")
    why = (
        "No model serves yet"
        if fresh is None
        else f"{_fresh(fresh)} ({policy.min_fresh_rows} needed)"
    )
    why += (
        f", {facts.used} of {_count(policy.budget.runs, 'run')} used in the last "
        f"{span(policy.budget.period)}"
    )
    if policy.dry_run:
        return no("dry_run", f"{why}: a run would start, but retrain.dry_run is true.")
    return Answer(True, "started", f"{why}: a run starts.")


def period_start(policy: Retrain, now: datetime) -> datetime:
    """The instant after which a run counts against the budget at `now`."""
    return now - timedelta(seconds=policy.budget.period)


def span(seconds: float) -> str:
    """A duration for people, in its two largest units: `42s`, `3m 5s`, `1h`, `2d 4h`."""
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    rest = int(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        amount, rest = divmod(rest, size)
        if amount or parts:
            parts.append(f"{amount}{unit}")
        if len(parts) == 2:
            break
    return " ".join(p for p in parts if not p.startswith("0"))


def _fresh(rows: int) -> str:
    return _count(rows, "fresh labelled row")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
