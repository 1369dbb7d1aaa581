"""The rollout: one winner a revision, nothing overwritten, going back goes back."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

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


#: Makes changes until as many as asked for are its own.
RACER = """
import sys
from driftmill import rollout
from driftmill.store import Store

store, name, changes = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store.exists("ready")
print("ready", flush=True)
sys.stdin.readline()
done = conflicts = 0
while done < changes:
    now = rollout.read(store, "m")
    expected = now.revision if now else 0
    try:
        rollout.change(store, "m", champion=f"{name}-{done}", by=name, expected=expected)
    except rollout.RolloutConflict:
        conflicts += 1
    else:
        done += 1
print(conflicts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "server"])
@pytest.mark.parametrize(("writers", "changes"), [(2, 20), (8, 4)])
def test_processes_that_change_it_at_once(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, writers: int, changes: int
) -> None:
    """No update is lost and none is counted twice. Not in moto, which looks first and then writes,
    and so lets two writers through."""
    uri = str(tmp_path / "s") if kind == "folder" else request.getfixturevalue("s3_server")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri, f"w{n}", str(changes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(writers)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    conflicts = sum(int(racer.communicate(timeout=200)[0]) for racer in racers)
    assert all(racer.returncode == 0 for racer in racers)
    assert conflicts > 0 or writers == 2  # with many writers there must have been a race

    revisions = rollout.history(Store(uri), "m")
    assert [r.revision for r in revisions] == list(range(1, writers * changes + 1))
    for n in range(writers):
        mine = [r.champion for r in revisions if r.by == f"w{n}"]
        assert mine == [f"w{n}-{i}" for i in range(changes)]
