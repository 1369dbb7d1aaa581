"""Run folders: what is recorded, and what outcome it adds up to."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill import rollout, runs
from driftmill.data.schema import QuarantineError
from driftmill.store import Store

MODEL = "tiny"


def verdict(promote: bool) -> dict[str, Any]:
    """The parts of a verdict that an outcome is made from."""
    return {
        "promote": promote,
        "reason": "auc is better by 0.1" if promote else "auc is not better",
        "metric": "auc",
        "against": "dummy",
        "challenger_metrics": {"auc": 0.9, "f1": None},
        "champion_metrics": {"auc": 0.5},
        "comparison": {"difference": 0.4, "low": 0.3, "high": 0.5},
        "checks": [{"name": "better", "passed": promote, "detail": "by so much"}],
    }


def judged(store: Store, run_id: str, promote: bool) -> None:
    """A run whose new model was judged."""
    with runs.step(store, MODEL, run_id, "prepare"):
        pass
    with runs.step(store, MODEL, run_id, "judge") as step:
        step.facts.update(version="abc", champion=None, revision=0)
    text = json.dumps(verdict(promote))
    store.write(runs.key(MODEL, run_id, "verdict.json"), text.encode())


def conclude(store: Store, run_id: str, failure: str = "") -> runs.Outcome:
    return runs.conclude(store, MODEL, run_id, trigger="test", code_version="1", failure=failure)


def test_ids_are_valid_and_differ() -> None:
    ids = {runs.new_id() for _ in range(50)}
    assert len(ids) > 40
    assert all(runs.is_id(i) for i in ids)


@pytest.mark.parametrize("text", ["", "a/b", "../x", ".hidden", "a b", "x" * 101, "-rf"])
def test_what_is_no_id(text: str) -> None:
    assert not runs.is_id(text)


def test_an_id_is_claimed_once(store: Store) -> None:
    runs.begin(store, MODEL, "r1", "first")
    with pytest.raises(FileExistsError):
        runs.begin(store, MODEL, "r1", "second")


def test_a_step_is_recorded_and_announced(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with runs.step(store, MODEL, "r1", "fit", "linear") as step:
        (running,) = runs.steps(store, MODEL, "r1")
        assert (running.name, running.state, running.ended) == ("fit-linear", "running", None)
        step.facts["score"] = 0.5
    (done,) = runs.steps(store, MODEL, "r1")
    assert (done.state, done.facts) == ("done", {"score": 0.5})
    assert done.ended is not None
    assert done.ended >= done.started
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(e["step"], e["family"], e["state"]) for e in events] == [
        ("fit", "linear", "start"),
        ("fit", "linear", "done"),
    ]


def test_a_step_that_raises_is_recorded_and_raises_on(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), runs.step(store, MODEL, "r1", "fit"):
        _ = 1 / 0
    (failed,) = runs.steps(store, MODEL, "r1")
    assert (failed.state, failed.error) == ("failed", "ZeroDivisionError")
    assert failed.reason == "division by zero"


def test_a_step_that_lacks_a_package_says_what_to_install(store: Store) -> None:
    with pytest.raises(ModuleNotFoundError), runs.step(store, MODEL, "r1", "fit", "resnet18"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    (failed,) = runs.steps(store, MODEL, "r1")
    assert failed.reason == "this needs the package torch; pip install 'driftmill[laptop,vision]'"


def test_progress_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    runs.progress("fit", "resnet18", 3, 10, "validation accuracy 0.914")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "event": "progress",
        "step": "fit",
        "family": "resnet18",
        "done": 3,
        "total": 10,
        "detail": "validation accuracy 0.914",
    }


def test_data_at_fault_is_told_from_failure(store: Store) -> None:
    def stop() -> None:
        try:
            raise QuarantineError("12 of 20 rows are bad", reasons={})
        except QuarantineError as error:
            raise runs.StoppedByData(str(error)) from error

    with pytest.raises(runs.StoppedByData), runs.step(store, MODEL, "r1", "prepare"):
        stop()
    (stopped,) = runs.steps(store, MODEL, "r1")
    assert (stopped.state, stopped.error) == ("stopped", "QuarantineError")
    outcome = conclude(store, "r1")
    assert (outcome.state, outcome.reason) == ("stopped", "12 of 20 rows are bad")


def test_a_promotion_is_what_the_rollout_says(store: Store) -> None:
    judged(store, "r1", promote=True)
    rollout.change(store, MODEL, champion="abc", by="r1", reason="better")
    # Killed before the promote step could say that it was done.
    outcome = conclude(store, "r1", failure="interrupted")
    assert (outcome.state, outcome.reason, outcome.version) == ("promoted", "better", "abc")
    assert outcome.metrics == {"auc": 0.9}
    assert outcome.verdict is not None
    assert (outcome.verdict.challenger, outcome.verdict.champion) == (0.9, 0.5)


def test_somebody_elses_promotion_is_not_mine(store: Store) -> None:
    rollout.change(store, MODEL, champion="abc", by="r0")
    judged(store, "r1", promote=False)
    outcome = conclude(store, "r1")
    assert (outcome.state, outcome.reason) == ("rejected", "auc is not better")
    assert outcome.verdict is not None
    assert outcome.verdict.failed == ("better",)


def test_a_refused_promotion_is_a_rejection(store: Store) -> None:
    judged(store, "r1", promote=True)
    with runs.step(store, MODEL, "r1", "promote") as step:
        step.facts["refused"] = "the rollout changed"
    outcome = conclude(store, "r1")
    assert (outcome.state, outcome.reason) == ("rejected", "the rollout changed")


def test_a_killed_step_is_a_failure(store: Store) -> None:
    opened = runs.step(store, MODEL, "r1", "fit", "linear")
    opened.__enter__()  # and no exit, as after a kill
    assert conclude(store, "r1").reason == "fit-linear was killed before it could say why"
    assert conclude(store, "r1", failure="interrupted").reason == "interrupted"
    assert conclude(store, "r1").state == "failed"


def test_a_run_without_a_step_is_a_failure(store: Store) -> None:
    runs.begin(store, MODEL, "r1", "test")
    outcome = conclude(store, "r1", failure="no space left")
    assert (outcome.state, outcome.reason, outcome.steps) == ("failed", "no space left", ())


def test_outcomes_come_in_order_and_read_back(store: Store) -> None:
    assert runs.outcomes(store, MODEL) == []
    assert runs.read(store, MODEL, "r1") is None
    written = []
    for run_id in ("b", "a"):
        judged(store, run_id, promote=False)
        written.append(conclude(store, run_id))
    judged(store, "unfinished", promote=False)
    assert runs.outcomes(store, MODEL) == written
    assert runs.read(store, MODEL, "b") == written[0]


names = st.sampled_from(["prepare", "fit-linear", "assemble", "judge", "promote"])
states = st.sampled_from(["running", "done", "stopped", "failed"])


@given(steps=st.dictionaries(names, states), promote=st.none() | st.booleans(), died=st.booleans())
def test_every_run_has_an_outcome(
    tmp_path_factory: pytest.TempPathFactory,
    steps: dict[str, str],
    promote: bool | None,
    died: bool,
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    started = runs.begin(store, MODEL, "r1", "test").started
    for i, (name, state) in enumerate(steps.items()):
        record = runs.StepRecord(
            name=name,
            started=started + timedelta(seconds=i),
            ended=None if state == "running" else started + timedelta(seconds=i + 1),
            state=state,
            reason="why" if state in ("stopped", "failed") else "",
            facts={"refused": "the rollout changed"} if name == "promote" else {},
        )
        store.write(runs.key(MODEL, "r1", f"steps/{name}.json"), record.model_dump_json().encode())
    if promote is not None:
        store.write(runs.key(MODEL, "r1", "verdict.json"), json.dumps(verdict(promote)).encode())
    outcome = conclude(store, "r1", failure="it died" if died else "")
    assert outcome.state != "promoted"  # nothing changed the rollout
    assert outcome.reason
    if "stopped" in steps.values():
        assert outcome.state == "stopped"
    elif "failed" in steps.values():
        assert outcome.state == "failed"
    assert runs.read(store, MODEL, "r1") == outcome
