"""The metrics agree with scikit-learn, and weighing rows agrees with repeating them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from driftmill.contract import METRICS
from driftmill.evaluate import metrics

CLASSIFICATION = sorted(n for n, (_, task) in METRICS.items() if task == "classification")
REGRESSION = sorted(n for n, (_, task) in METRICS.items() if task == "regression")


def outputs(rows: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and probabilities with many ties, a little better than chance."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, labels, rows)
    raw = rng.integers(1, 6, (rows, labels)) + 2.0 * np.eye(labels)[y]
    return y, (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)


def numbers(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative truth and predictions of it."""
    rng = np.random.default_rng(seed)
    y = rng.gamma(2.0, 50.0, rows)
    return y, (y + rng.normal(0, 20, rows)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_two_labels_agree_with_scikit_learn(seed: int) -> None:
    y, output = outputs(300, 2, seed)
    chosen = output.argmax(axis=1)
    expected = {
        "auc": reference.roc_auc_score(y, output[:, 1]),
        "accuracy": reference.accuracy_score(y, chosen),
        "f1": reference.f1_score(y, chosen),
        "log_loss": reference.log_loss(y, output),
        "brier": reference.brier_score_loss(y, output[:, 1]),
    }
    assert metrics.all_metrics("classification", y, output) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_four_labels_agree_with_scikit_learn(seed: int) -> None:
    y, output = outputs(300, 4, seed)
    chosen = output.argmax(axis=1)
    output = output.astype(np.float64) / output.astype(np.float64).sum(axis=1, keepdims=True)
    expected = {
        "auc": reference.roc_auc_score(y, output, multi_class="ovr", average="macro"),
        "accuracy": reference.accuracy_score(y, chosen),
        "f1": reference.f1_score(y, chosen, average="macro"),
        "log_loss": reference.log_loss(y, output),
        "brier": ((output - np.eye(4)[y]) ** 2).sum(axis=1).mean(),
    }
    assert metrics.all_metrics("classification", y, output) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_regression_agrees_with_scikit_learn(seed: int) -> None:
    y, output = numbers(300, seed)
    expected = {
        "rmse": reference.root_mean_squared_error(y, output),
        "rmsle": reference.root_mean_squared_log_error(y, output.clip(0)),
        "mae": reference.mean_absolute_error(y, output),
        "r2": reference.r2_score(y, output),
    }
    assert metrics.all_metrics("regression", y, output) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CLASSIFICATION), st.integers(2, 4), st.integers(1, 40), st.integers(0, 999))
def test_bootstrap_of_a_classification_is_the_score_of_the_rows(
    name: str, labels: int, rows: int, seed: int
) -> None:
    y, output = outputs(rows, labels, seed)
    assert_same_as_rows(name, y, output, seed)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(REGRESSION), st.integers(1, 40), st.integers(0, 999))
def test_bootstrap_of_a_regression_is_the_score_of_the_rows(
    name: str, rows: int, seed: int
) -> None:
    y, output = numbers(rows, seed)
    assert_same_as_rows(name, y, output, seed)


def assert_same_as_rows(name: str, y: np.ndarray, output: np.ndarray, seed: int) -> None:
    rows = len(y)
    chosen = np.random.default_rng(seed).integers(0, rows, (5, rows))
    counts = np.stack([np.bincount(c, minlength=rows) for c in chosen])
    expected = [metrics.score(name, y[c], output[c]) for c in chosen]
    found = metrics.bootstrap(name, y, output, counts)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12, equal_nan=True)


def test_many_resamples_are_cut_into_pieces_without_a_seam() -> None:
    y, output = outputs(3000, 2, 0)
    counts = np.random.default_rng(0).multinomial(3000, np.full(3000, 1 / 3000), size=700)
    found = metrics.bootstrap("auc", y, output, counts)
    assert found.shape == (700,)
    for i in (0, 332, 333, 334, 699):
        weighted = reference.roc_auc_score(y, output[:, 1], sample_weight=counts[i])
        assert found[i] == pytest.approx(weighted)


def test_no_resamples_give_no_values() -> None:
    y, output = outputs(10, 2, 0)
    assert metrics.bootstrap("auc", y, output, np.empty((0, 10), dtype=int)).shape == (0,)


def test_auc_of_one_label_is_not_defined_and_left_out() -> None:
    y, output = np.zeros(10, dtype=int), outputs(10, 2, 0)[1]
    assert np.isnan(metrics.score("auc", y, output))
    assert "auc" not in metrics.all_metrics("classification", y, output)


def test_auc_leaves_out_a_label_without_rows() -> None:
    y, output = outputs(200, 2, 0)
    wide = np.hstack([output, np.zeros((200, 1))])
    assert metrics.score("auc", y, wide) == pytest.approx(
        (reference.roc_auc_score(y, output[:, 1]) + reference.roc_auc_score(1 - y, output[:, 0]))
        / 2
    )


def test_one_sure_mistake_costs_a_finite_log_loss() -> None:
    loss = metrics.score("log_loss", np.array([0]), np.array([[0.0, 1.0]]))
    assert loss == pytest.approx(-np.log(metrics.SMALLEST))


def test_r2_of_a_constant_truth() -> None:
    y = np.full(5, 0.1)
    assert metrics.score("r2", y, y) == 1
    assert metrics.score("r2", y, y + 1) == 0


def test_rmsle_reads_a_negative_prediction_as_zero_and_is_left_out_for_negative_truths() -> None:
    assert metrics.score("rmsle", np.zeros(3), np.full(3, -5.0)) == 0
    assert "rmsle" not in metrics.all_metrics("regression", np.array([-1.0, 2]), np.zeros(2))


@pytest.mark.parametrize(
    ("name", "y", "output", "message"),
    [
        ("acc", np.zeros(2), np.zeros(2), "choose one of auc"),
        ("rmse", np.zeros(0), np.zeros(0), "no rows"),
        ("rmse", np.zeros(2), np.zeros(3), "do not fit"),
        ("auc", np.zeros(2, dtype=int), np.zeros(2), "do not fit"),
        ("rmse", np.zeros(2), np.array([0, np.nan]), "NaN"),
        ("rmsle", np.array([-1.0]), np.zeros(1), "negative"),
    ],
)
def test_nonsense_is_refused(name: str, y: np.ndarray, output: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.score(name, y, output)


def test_counts_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="counts must be"):
        metrics.bootstrap("rmse", np.zeros(2), np.zeros(2), np.ones((1, 3)))


def test_calibration_error_of_a_known_case() -> None:
    # Ten rows at 0.8 of which six happen, ten at 0.3 of which three do: (0.2 * 10 + 0 * 10) / 20.
    stated = np.repeat([0.8, 0.3], 10)
    y = np.r_[np.ones(6), np.zeros(4), np.ones(3), np.zeros(7)].astype(int)
    assert metrics.calibration_error(y, np.c_[1 - stated, stated]) == pytest.approx(0.1)


def test_calibration_error_of_three_labels_looks_at_the_choice() -> None:
    output = np.tile([0.9, 0.05, 0.05], (10, 1))
    assert metrics.calibration_error(np.zeros(10, dtype=int), output) == pytest.approx(0.1)
    assert metrics.calibration_error(np.ones(10, dtype=int), output) == pytest.approx(0.9)


def test_calibration_error_takes_certainty() -> None:
    assert metrics.calibration_error(np.array([1, 0]), np.array([[0.0, 1.0], [1.0, 0.0]])) == 0


def test_encode() -> None:
    assert metrics.encode(("no", "yes"), pd.Series(["yes", "no"])).tolist() == [1, 0]
    assert metrics.encode((), pd.Series([1.5, 2])).dtype == np.float64
    with pytest.raises(ValueError, match="'maybe' is not one of the labels no, yes"):
        metrics.encode(("no", "yes"), ["maybe"])
