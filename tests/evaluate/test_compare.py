"""The paired bootstrap: its exact properties, and its promise on simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill.contract import METRICS, Metric
from driftmill.evaluate import compare
from driftmill.evaluate.compare import Scores

SEEDS = st.integers(0, 10_000)


def _classification(seed: int, rows: int = 80, labels: int = 3) -> tuple[np.ndarray, ...]:
    """Truth (with every label) and two models' probabilities."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(labels), rng.integers(0, labels, rows - labels)]
    return y, rng.dirichlet(np.ones(labels), rows), rng.dirichlet(np.ones(labels), rows)


def _regression(seed: int, rows: int = 80) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    y = rng.gamma(2, 2, rows)
    return y, y + rng.normal(0, 1, rows), y + rng.normal(0, 2, rows)


def _pair(name: str, seed: int) -> tuple[Scores, Scores]:
    task = METRICS[name][1]
    y, one, two = _classification(seed) if task == "classification" else _regression(seed)
    strata = y if task == "classification" else None
    found = compare.score([name], y, [one, two], compare.draw(len(y), 100, seed, strata))
    return found[0][name], found[1][name]


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_model_is_exactly_as_good_as_itself(name: str, seed: int) -> None:
    one, _ = _pair(name, seed)
    found = compare.compare(one, one, Metric.model_validate(name).sign, 0.95)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS, confidence=st.floats(0.6, 0.99))
@settings(max_examples=10, deadline=None)
def test_swapping_the_models_flips_the_sign(name: str, seed: int, confidence: float) -> None:
    one, two = _pair(name, seed)
    sign = Metric.model_validate(name).sign
    there = compare.compare(one, two, sign, confidence)
    back = compare.compare(two, one, sign, confidence)
    assert there.difference == -back.difference
    np.testing.assert_allclose([there.low, there.high], [-back.high, -back.low], atol=1e-12)


def test_positive_means_better_in_either_direction() -> None:
    good, bad = Scores(0.9, np.full(100, 0.9)), Scores(0.8, np.full(100, 0.8))
    assert compare.compare(good, bad, 1, 0.95).low > 0  # e.g. auc
    assert compare.compare(bad, good, -1, 0.95).low > 0  # e.g. rmse


@given(seed=SEEDS, rows=st.integers(1, 60), labels=st.integers(1, 4), in_time=st.booleans())
@settings(deadline=None)
def test_every_resample_keeps_the_rows_of_each_label(
    seed: int, rows: int, labels: int, in_time: bool
) -> None:
    y = np.random.default_rng(seed).integers(0, labels, rows)
    counts = np.concatenate(list(compare.draw(rows, 20, seed, y, in_time)))
    assert counts.shape == (20, rows)
    for label in range(labels):
        assert (counts[:, y == label].sum(axis=1) == (y == label).sum()).all()


def test_the_same_seed_draws_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.arange(50) % 3
    whole = np.concatenate(list(compare.draw(50, 30, 7, y)))
    monkeypatch.setattr(compare, "_CHUNK", 150)
    parts = list(compare.draw(50, 30, 7, y))
    assert len(parts) == 10
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(np.concatenate(list(compare.draw(50, 30, 8, y))), whole)


def test_blocks_give_wider_intervals_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.normal(0, 1, 60), 10)  # ten neighbours share their error
    y, output = np.zeros(600), noise

    def width(in_time: bool) -> float:
        draws = compare.draw(600, 500, 0, in_time=in_time)
        found = compare.interval(compare.score(["mae"], y, [output], draws)[0]["mae"], 0.95)
        return found.high - found.low

    assert width(in_time=True) > 1.5 * width(in_time=False)


def test_sharing_the_error_between_groups_widens_each_interval() -> None:
    one, two = _pair("auc", 1)
    alone = compare.compare_among(1, one, two, 1, 0.95)
    among = compare.compare_among(10, one, two, 1, 0.95)
    assert among.confidence == pytest.approx(0.995)
    assert among.low < alone.low < alone.difference < alone.high < among.high
    plain = compare.compare(one, two, 1, 0.95)
    assert plain.high - plain.low == pytest.approx(alone.high - alone.low, rel=0.3)


@pytest.mark.slow
def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Two models of known error on fresh rows, 300 times: the truth lies inside about 95 times in
    a hundred, and above the upper or below the lower end about equally seldom."""
    rng = np.random.default_rng(0)
    below = above = 0
    for trial in range(300):
        y = rng.normal(0, 1, 250)
        shared = rng.normal(0, 1, 250)
        one = y + shared
        two = y + shared * 0.5 + rng.normal(0, 1, 250)
        draws = compare.draw(250, 400, trial)
        first, second = compare.score(["mae"], y, [one, two], draws)
        found = compare.compare(first["mae"], second["mae"], -1, 0.95)
        true = np.sqrt(2 / np.pi) * (np.sqrt(1.25) - 1)
        below += true < found.low
        above += true > found.high
    assert below + above <= 30  # 15 expected; 30 is four standard deviations more
    assert below + above >= 3
    assert max(below, above) <= 20


@pytest.mark.slow
def test_an_equal_challenger_seldom_passes() -> None:
    """Of models that are no better, about one in forty has its lower end above 0."""
    rng = np.random.default_rng(1)
    passed = 0
    for trial in range(300):
        y = (rng.random(300) < 0.3).astype(int)
        signal = y + rng.normal(0, 1, 300)
        one, two = (1 / (1 + np.exp(-(signal + rng.normal(0, 0.7, 300)))) for _ in range(2))
        outputs = [np.c_[1 - p, p] for p in (one, two)]
        first, second = compare.score(["auc"], y, outputs, compare.draw(300, 300, trial, y))
        passed += compare.compare(first["auc"], second["auc"], 1, 0.95).low > 0
    assert passed <= 19  # 7.5 expected; 19 is more than four standard deviations above
