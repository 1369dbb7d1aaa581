"""The rollout: one winner a revision, nothing overwritten, going back goes back."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill import rollout
from driftmill.store import Store


def test_no_rollout_yet(store: Store) -> None:
    assert rollout.read(store, "m") is None
    assert rollout.history(store, "m") == []
    with pytest.raises(ValueError, match="no champion yet"):
        rollout.change(store, "m", challenger="b", weight=0.1, by="me")
    with pytest.raises(ValueError, match="no rollout yet"):
        rollout.rollback(store, "m", by="me")


def test_changes_make_a_history(store: Store) -> None:
    rollout.change(store, "m", champion="a", by="run 1", reason="first")
    rollout.change(store, "m", challenger="b", weight=0.1, shadow=True, by="run 2")
    now = rollout.change(store, "m", champion="b", by="run 2")
    assert (now.revision, now.champion, now.challenger) == (3, "b", None)
    assert [r.champion for r in rollout.history(store, "m")] == ["a", "a", "b"]
    assert rollout.read(store, "m", after=3) is None
    newer = rollout.read(store, "m", after=1)
    assert newer is not None
    assert newer.revision == 3


def test_a_change_decided_on_an_old_revision_is_refused(store: Store) -> None:
    rollout.change(store, "m", champion="a", by="x", expected=0)
    with pytest.raises(rollout.RolloutConflict):
        rollout.change(store, "m", champion="b", by="y", expected=0)


@pytest.mark.parametrize(
    "values",
    [
        {"weight": 0.5},
        {"shadow": True},
        {"challenger": "a"},
        {"challenger": "b", "weight": 1.5},
    ],
)
def test_nonsense_is_refused(store: Store, values: dict[str, object]) -> None:
    rollout.change(store, "m", champion="a", by="x")
    with pytest.raises(ValueError, match=r"needs a challenger|already the champion|less than"):
        rollout.change(store, "m", by="x", **values)  # type: ignore[arg-type]
    assert len(rollout.history(store, "m")) == 1


def test_one_of_many_writers_wins_each_revision(store: Store) -> None:
    rollout.change(store, "m", champion="a", by="x")
    outcomes: list[str] = []
    start = threading.Barrier(6)

    def write(n: int) -> None:
        start.wait()
        try:
            rollout.change(store, "m", champion=f"v{n}", by=str(n), expected=1)
            outcomes.append("won")
        except rollout.RolloutConflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]
    assert len(rollout.history(store, "m")) == 2


def test_rollback_drops_the_challenger_first(store: Store) -> None:
    rollout.change(store, "m", champion="a", by="x")
    rollout.change(store, "m", champion="b", by="x")
    rollout.change(store, "m", challenger="c", weight=0.5, by="x")
    back = rollout.rollback(store, "m", by="x", reason="errors")
    assert (back.champion, back.challenger, back.reason) == ("b", None, "errors")
    assert rollout.rollback(store, "m", by="x").champion == "a"
    with pytest.raises(ValueError, match="never had another champion"):
        rollout.rollback(store, "m", by="x")


@given(st.lists(st.sampled_from(["a", "b", "c", "back"]), max_size=12))
def test_rollback_never_returns_to_what_was_rolled_back(steps: list[str]) -> None:
    """Against a plain model: a stack of champions, cut where one of them returns."""
    store = Store("memory://rollouts")
    for key in store.list("m"):
        store.delete(key)
    stack: list[str] = []
    for step in steps:
        if step != "back":
            rollout.change(store, "m", champion=step, by="x")
            if step in stack:
                del stack[stack.index(step) + 1 :]
            else:
                stack.append(step)
        elif len(stack) > 1:
            stack.pop()
            assert rollout.rollback(store, "m", by="x").champion == stack[-1]
