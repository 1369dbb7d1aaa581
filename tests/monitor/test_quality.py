from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from driftmill import contract, features
from driftmill.contract import Contract
from driftmill.features import Signature
from driftmill.monitor import quality
from tests.conftest import CONTRACT, tiny_frame

START = datetime(2026, 1, 1, tzinfo=UTC)


def watched(loss: str = "0.05", metric: str = "auc") -> Contract:
    extra = f"train: {{metric: {metric}}}\n"
    extra += f"monitor: {{window: 500, min_rows: 100, persistence: 2, max_quality_loss: {loss}}}\n"
    return contract.parse(CONTRACT + extra)


def answered(rows: int, seed: int, right: float = 1.0, first: int = 0) -> pd.DataFrame:
    """Labelled rows whose score is worth something in a part `right` of them."""
    rng = np.random.default_rng(seed)
    truth = rng.random(rows) < 0.5
    good = np.where(truth, 0.7, 0.3) + rng.normal(0, 0.2, rows)
    score = np.where(rng.random(rows) < right, good, rng.random(rows)).clip(0, 1)
    return pd.DataFrame(
        {
            "_at": [START + timedelta(seconds=first + i) for i in range(rows)],
            "_prediction": np.where(score > 0.5, "yes", "no"),
            "_score": score,
            "_label": np.where(truth, "yes", "no"),
        }
    )


@pytest.fixture
def sign() -> Signature:
    return features.signature(watched(), tiny_frame(50))


def expectation(sign: Signature, of: Contract, value: float) -> quality.Expectation:
    found = quality.expect(of, sign, {of.metric.name: value}, 2000, pd.DataFrame())
    assert found is not None
    return found


def test_a_good_model_is_calm_and_a_bad_one_alarms_after_two_evaluations(sign: Signature) -> None:
    of = watched()
    expected = expectation(sign, of, 0.92)
    good = quality.measure(expected, of, sign, answered(500, 1), None)
    assert good is not None
    assert not good.drifted
    assert good.rows == 500
    assert 0.85 < good.value < 0.98

    first = quality.measure(expected, of, sign, answered(500, 2, right=0.2, first=1000), good)
    assert first is not None
    assert (first.drifted, first.streak, first.alarm) == (True, 1, False)
    second = quality.measure(expected, of, sign, answered(500, 3, right=0.2, first=2000), first)
    assert second is not None
    assert (second.streak, second.alarm) == (2, True)
    assert second.started_at == first.started_at == START + timedelta(seconds=1000)
    third = quality.measure(expected, of, sign, answered(500, 4, first=3000), second)
    assert third is not None
    assert (third.streak, third.alarm, third.started_at) == (0, False, None)


def test_the_same_rows_do_not_count_twice(sign: Signature) -> None:
    of = watched()
    rows = answered(500, 2, right=0.2)
    first = quality.measure(expectation(sign, of, 0.92), of, sign, rows, None)
    more = pd.concat([rows, answered(99, 3, right=0.2, first=500)])
    assert quality.measure(expectation(sign, of, 0.92), of, sign, more, first) is first


def test_a_loss_within_noise_is_no_alarm(sign: Signature) -> None:
    of = watched(loss="0.0")
    rows = answered(100, 5)
    result = quality.measure(expectation(sign, of, 0.92), of, sign, rows, None)
    assert result is not None
    slightly = result.value + 0.5 * result.error
    result = quality.measure(expectation(sign, of, slightly), of, sign, rows, None)
    assert result is not None
    assert not result.drifted


def test_without_a_limit_nothing_alarms_and_few_rows_say_nothing(sign: Signature) -> None:
    of = watched(loss="null")
    bad = quality.measure(expectation(sign, of, 0.92), of, sign, answered(500, 2, 0.0), None)
    assert bad is not None
    assert bad.value < 0.6
    assert not bad.drifted
    assert quality.measure(expectation(sign, of, 0.9), of, sign, answered(99, 2), None) is None


def test_a_metric_that_falls_when_better(sign: Signature) -> None:
    of = watched(metric="log_loss")
    rows = answered(500, 2, right=0.2)
    worse = quality.measure(expectation(sign, of, 0.1), of, sign, rows, None)
    better = quality.measure(expectation(sign, of, 5.0), of, sign, rows, None)
    assert worse is not None
    assert better is not None
    assert worse.drifted
    assert not better.drifted


def test_what_the_log_cannot_give_is_replaced_and_named(sign: Signature) -> None:
    of = watched()
    several = sign.model_copy(update={"labels": ("a", "b", "c")})
    found = quality.expect(of, several, {"auc": 0.9, "accuracy": 0.8}, 100, pd.DataFrame())
    assert found is not None
    assert (found.metric, found.value) == ("accuracy", 0.8)
    assert "accuracy instead of auc" in found.note
    rows = answered(300, 1)
    rows["_label"] = np.resize(["a", "b", "c"], 300)
    rows["_prediction"] = rows["_label"].where(rows.index % 10 != 0, "a")
    result = quality.measure(found, of, several, rows, None)
    assert result is not None
    assert result.value == pytest.approx((rows["_label"] == rows["_prediction"]).mean())


def test_without_test_metrics_the_reference_rows_serve(sign: Signature) -> None:
    of = watched()
    reference = answered(400, 7).rename(columns={"_label": "fraud"})
    found = quality.expect(of, sign, {}, 0, reference)
    assert found is not None
    assert found.rows == 400
    assert "reference rows" in found.note
    assert quality.expect(of, sign, {}, 0, reference.drop(columns="fraud")) is None


def test_a_regression(sign: Signature) -> None:
    of = contract.parse(
        "{apiVersion: driftmill/v1, model: m, task: regression, data: {source: 'sim:x', "
        "target: y, columns: [{name: a, type: float}]}, monitor: {max_quality_loss: 0.5}}"
    )
    plain = Signature(task="regression", columns=of.data.columns, target="y")
    rng = np.random.default_rng(0)
    rows = answered(500, 1).drop(columns="_score")
    rows["_label"] = rng.normal(size=500)
    rows["_prediction"] = rows["_label"] + rng.normal(size=500)
    result = quality.measure(expectation(plain, of, 0.2), of, plain, rows, None)
    assert result is not None
    assert result.value == pytest.approx(1.0, abs=0.1)
    assert result.drifted
    rows.loc[:5, "_label"] = np.nan
    again = quality.measure(expectation(plain, of, 2.0), of, plain, rows, None)
    assert again is not None
    assert not again.drifted


def test_labels_and_scores_that_say_nothing_are_left_out(sign: Signature) -> None:
    of = watched()
    rows = answered(300, 1)
    rows.loc[:99, "_label"] = "perhaps"
    rows.loc[100:149, "_score"] = np.nan
    result = quality.measure(expectation(sign, of, 0.9), of, sign, rows, None)
    assert result is not None
    assert result.rows == 150
    one = answered(300, 1).assign(_label="no")
    assert quality.measure(expectation(sign, of, 0.9), of, sign, one, None) is None
