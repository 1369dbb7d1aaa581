"""Which version serves.

The rollout of a model is a small document in the store. Each change writes the next revision as a
file of its own, by a create that only one writer can win: the highest revision is what serves,
the files together are the history, and nothing is ever overwritten.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, model_validator

from driftmill.store import Store


class Rollout(BaseModel):
    """One revision of what serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: int = Field(ge=1)
    champion: str
    challenger: str | None = None
    weight: float = Field(0.0, ge=0, le=1)
    """Share of requests that the challenger answers."""
    shadow: bool = False
    """The challenger also sees the requests that the champion answers, without answering."""
    at: datetime
    by: str
    """Who changed it: a person, or a run."""
    reason: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Rollout:
        if self.challenger is None and (self.weight > 0 or self.shadow):
            raise ValueError("a weight or a shadow needs a challenger")
        if self.challenger == self.champion:
            raise ValueError("the challenger is already the champion")
        return self


class RolloutConflict(RuntimeError):
    """Another writer changed the rollout first; read it again and decide anew."""


def _key(model: str, revision: int) -> str:
    return f"{model}/rollout/{revision:08d}.json"


def read(store: Store, model: str, after: int = 0) -> Rollout | None:
    """The newest revision above `after`, or None where there is none.

    With the revision last seen as `after`, an unchanged rollout costs one look-up, which is why
    services can poll it.
    """
    if after and not store.exists(_key(model, after + 1)):
        return None
    revisions = [k for k in store.list(f"{model}/rollout") if k > _key(model, after)]
    return Rollout.model_validate_json(store.read(revisions[-1])) if revisions else None


def history(store: Store, model: str) -> list[Rollout]:
    """All revisions, oldest first."""
    return [Rollout.model_validate_json(store.read(key)) for key in store.list(f"{model}/rollout")]


def change(
    store: Store,
    model: str,
    *,
    champion: str | None = None,
    challenger: str | None = None,
    weight: float = 0.0,
    shadow: bool = False,
    by: str,
    reason: str = "",
    expected: int | None = None,
) -> Rollout:
    """Write the next revision.

    Args:
        store: where it lies.
        model: whose rollout.
        champion: the version that serves; None keeps the present one.
        challenger: a version beside it; None for none.
        weight: share of requests that the challenger answers.
        shadow: whether the challenger sees the rest, too.
        by: who changes it.
        reason: why.
        expected: the revision that the change was decided on (0: no rollout yet); None takes the
            newest.

    Raises:
        RolloutConflict: the rollout is not at `expected`, or another writer was faster.
        ValueError: the new rollout makes no sense, or there is no champion yet.
    """
    now = read(store, model)
    revision = now.revision if now else 0
    if expected is not None and expected != revision:
        raise RolloutConflict(f"{model}: expected revision {expected}, found {revision}")
    if champion is None:
        if now is None:
            raise ValueError(f"{model} has no champion yet")
        champion = now.champion
    new = Rollout(
        revision=revision + 1,
        champion=champion,
        challenger=challenger,
        weight=weight,
        shadow=shadow,
        at=datetime.now(UTC),
        by=by,
        reason=reason,
    )
    try:
        store.create(_key(model, new.revision), new.model_dump_json(indent=1).encode())
    except FileExistsError:
        raise RolloutConflict(f"{model}: revision {new.revision} was written by another") from None
    return new


def rollback(store: Store, model: str, *, by: str, reason: str = "") -> Rollout:
    """Take back the last change of what serves: drop the challenger if there is one, else return
    to the champion before this one.

    Raises:
        ValueError: there is nothing to go back to.
        RolloutConflict: another writer was faster.
    """
    revisions = history(store, model)
    if not revisions:
        raise ValueError(f"{model} has no rollout yet")
    now = revisions[-1]
    if now.challenger is not None:
        target = now.champion
    else:
        before = _champion_before(revisions)
        if before is None:
            raise ValueError(f"{model} never had another champion than {now.champion}")
        target = before
    return change(
        store,
        model,
        champion=target,
        by=by,
        reason=reason or "rollback",
        expected=now.revision,
    )


def _champion_before(revisions: list[Rollout]) -> str | None:
    """The champion to return to. A rollback is not a promotion: going back twice goes back two
    champions, not there and back again."""
    stack: list[str] = []
    for rollout in revisions:
        if rollout.champion in stack:
            del stack[stack.index(rollout.champion) + 1 :]
        else:
            stack.append(rollout.champion)
    return stack[-2] if len(stack) > 1 else None


def to_dict(rollout: Rollout) -> dict[str, object]:
    """Plain values, for JSON output."""
    values: dict[str, object] = json.loads(rollout.model_dump_json())
    return values
