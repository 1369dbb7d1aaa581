"""The search keeps to its budget, is repeatable, and judges by the contract's metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import features
from driftmill.contract import Contract
from driftmill.tabular import candidates
from driftmill.tabular.search import SearchError, folds, propose, search
from tests.tabular.conftest import make_contract, rows


def searching(
    method: str = "random", budget: int = 4, labels: int = 2, **settings: Any
) -> Contract:
    more = settings.pop("train", {})
    train = {"search": {"method": method, "budget": budget, "folds": 3}, **more}
    return make_contract(labels, train=train, **settings)


def run(contract: Contract, family: str, frame: pd.DataFrame) -> list[Any]:
    sign = features.signature(contract, frame)
    inputs, y = candidates.table(frame, sign), candidates.truth(frame, sign)
    return search(contract, sign, family, inputs, y)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(candidates.FAMILIES),
    st.sampled_from(["none", "grid", "random", "halving"]),
    st.integers(1, 1000),
    st.integers(0, 100),
)
def test_proposals_fit_the_budget_and_start_with_the_defaults(
    family: str, method: str, budget: int, seed: int
) -> None:
    contract = searching(method, budget, train={"seed": seed})
    proposed = propose(contract, family)
    assert proposed[0] == candidates.defaults(family)
    assert len(proposed) <= (1 if method == "none" else budget)
    assert len({tuple(p.items()) for p in proposed}) == len(proposed)
    space = candidates.SPACES[family]
    assert all(set(p) == set(space) for p in proposed)
    assert all(value in space[name] for p in proposed for name, value in p.items())
    assert proposed == propose(contract, family)


def test_a_grid_varies_the_most_important_parameters() -> None:
    proposed = propose(searching("grid", 6), "hist-gradient-boosting")
    assert {(p["learning_rate"], p["max_leaf_nodes"]) for p in proposed} == {
        (rate, leaves) for rate in (0.1, 0.05, 0.2) for leaves in (15, 31)
    }
    assert {p["max_iter"] for p in proposed} == {200}


def test_another_seed_proposes_other_settings() -> None:
    first, second = (
        propose(searching(train={"seed": seed}), "hist-gradient-boosting") for seed in (0, 1)
    )
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_folds_of_a_classification_are_stratified() -> None:
    y = np.r_[np.zeros(90), np.ones(9)].astype(int)
    parts = folds(searching(), y)
    assert [y[judging].sum() for _, judging in parts] == [3, 3, 3]
    assert sorted(np.concatenate([judging for _, judging in parts])) == list(range(99))


def test_folds_of_a_time_learn_from_the_past_only() -> None:
    for learning, judging in folds(searching(time="at"), np.zeros(100)):
        assert learning.max() < judging.min()


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(SearchError, match="7 training rows are too few for 3 folds"):
        folds(searching(), np.zeros(7, dtype=int))


def test_rare_labels_are_refused_with_the_reason() -> None:
    with pytest.raises(SearchError, match="cannot be cut into 3 folds"):
        folds(searching(), np.arange(10))


def test_a_constant_target_is_refused() -> None:
    with pytest.raises(SearchError, match="one value of the target"):
        run(searching(labels=0), "linear", rows(0).assign(y=1.0))


@pytest.mark.parametrize("method", ["random", "halving"])
def test_a_search_is_repeatable(method: str) -> None:
    contract = searching(method)
    assert run(contract, "linear", rows(2)) == run(contract, "linear", rows(2))


def test_the_number_of_cores_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = searching(budget=2)
    results = []
    for cores in (1, 3):
        monkeypatch.setattr("driftmill.tabular.search.cores", lambda cores=cores: cores)
        results.append(run(contract, "hist-gradient-boosting", rows(2)))
    assert results[0] == results[1]


@pytest.mark.parametrize(("metric", "best"), [("auc", max), ("log_loss", min)])
def test_the_best_trial_comes_first(metric: str, best: Any) -> None:
    trials = run(searching(budget=5, train={"metric": metric}), "linear", rows(2))
    assert len(trials) == 5
    assert trials[0].score == best(t.score for t in trials)


def test_halving_ends_with_few_settings_on_all_rows() -> None:
    frame = rows(2, count=2000)
    trials = run(searching("halving", budget=6), "linear", frame)
    assert [t.rows for t in trials] == [2000] * 2 + [666] * 4
    assert len({t.params["strength"] for t in trials}) == 6


def test_halving_in_time_keeps_the_newest_rows() -> None:
    frame = rows(2, count=2000)
    # Only the newest rows can be learnt from: in the others the label is noise.
    frame.loc[:1299, "y"] = np.random.default_rng(0).choice(["no", "yes"], 1300)
    trials = run(searching("halving", budget=6, time="at"), "linear", frame)
    assert max(t.score for t in trials if t.rows == 666) > 0.9


def test_real_models_beat_the_dummy() -> None:
    frame = rows(3)
    scores = {f: run(searching("none", labels=3), f, frame)[0].score for f in candidates.FAMILIES}
    assert scores["dummy"] == 0.5
    assert all(scores[family] > 0.7 for family in candidates.FAMILIES[1:])


def test_an_unknown_family_is_refused() -> None:
    contract = searching()
    with pytest.raises(ValueError, match="choose one of dummy, linear"):
        candidates.build("forest", contract, features.signature(contract, rows(2)), {})
