"""The simulated streams: reproducible, independent of their length, and changed at the onset."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from driftmill.data import simulate
from driftmill.data.schema import DataError

NUMERIC = [
    "amount",
    "account_age_days",
    "payments_last_day",
    "distance_km",
    "minutes_since_last",
]
TEXT = ["channel", "device", "merchant"]


def auc(train: pd.DataFrame, *tests: pd.DataFrame) -> list[float]:
    def inputs(frame: pd.DataFrame) -> pd.DataFrame:
        texts = {n: pd.Categorical(frame[n], sorted(train[n].dropna().unique())) for n in TEXT}
        return frame[NUMERIC].astype(float).assign(**texts)

    model = HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=0)
    model.fit(inputs(train), train["fraud"])
    return [roc_auc_score(t["fraud"] == "yes", model.predict_proba(inputs(t))[:, 1]) for t in tests]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3500), st.integers(1, 3500), st.integers(0, 5))
def test_a_row_does_not_depend_on_how_many_are_asked_for(few: int, many: int, seed: int) -> None:
    few, many = sorted((few, many))
    short = simulate.generate(f"sim:payments?rows={few}&seed={seed}&onset=1234")
    long = simulate.generate(f"sim:payments?rows={many}&seed={seed}&onset=1234")
    assert len(short) == few
    pd.testing.assert_frame_equal(short, long.head(few))


def test_nothing_differs_before_the_onset() -> None:
    changed = simulate.generate("sim:payments?rows=3000&seed=3&onset=1500")
    same = simulate.generate("sim:stationary?rows=3000&seed=3")
    pd.testing.assert_frame_equal(changed.head(1500), same.head(1500))
    assert (same["channel"] != "wallet").all()
    assert (changed["channel"][1500:] == "wallet").mean() > 0.3


def test_seeds_give_different_rows() -> None:
    one = simulate.generate("sim:payments?rows=100&seed=1")
    two = simulate.generate("sim:payments?rows=100&seed=2")
    assert not one["amount"].equals(two["amount"])


def test_rows_look_as_the_contract_needs_them() -> None:
    rows = simulate.generate("sim:payments?rows=5000&start=2026-03-01T12:00:00Z&step=30")
    assert rows["payment_id"].is_unique
    assert rows["at"].iloc[2] == pd.Timestamp("2026-03-01T12:01:00Z")
    assert 0.05 < (rows["fraud"] == "yes").mean() < 0.25
    missing = rows[["distance_km", "minutes_since_last", "device"]].isna().mean()
    assert missing.between(0.02, 0.12).all()
    assert rows.drop(columns=missing.index).notna().all(axis=None)
    assert (rows[NUMERIC].min() >= 0).all()


def test_the_change_hurts_an_old_model_and_a_new_one_recovers() -> None:
    rows = simulate.generate("sim:payments?rows=11000&seed=7&onset=6000")
    later = rows[7500:]
    before, after = auc(rows[:3200], rows[4000:6000], later)
    (again,) = auc(rows[4000:7100], later)
    assert before > 0.90
    assert after < 0.75
    assert again > 0.83


def test_onset_time_is_the_truth() -> None:
    uri = "sim:payments?rows=100&onset=50&start=2026-01-01T00:00:00Z&step=60"
    assert simulate.onset_time(uri) == datetime(2026, 1, 1, 0, 50, tzinfo=UTC)
    assert simulate.onset_time("sim:payments?rows=100&onset=none") is None
    assert simulate.onset_time("sim:payments?rows=100&onset=100") is None
    assert simulate.onset_time("sim:stationary?rows=100") is None


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sim:payment", "did you mean 'payments'"),
        ("sim:payments?row=3", "did you mean 'rows'"),
        ("sim:payments?rows=many", "many"),
        ("sim:payments?rows=0", "above 0"),
        ("sim:payments?step=-1", "above 0"),
        ("sim:payments?start=yesterday", "yesterday"),
        ("sim:stationary?onset=5", "no onset"),
    ],
)
def test_a_mistake_in_the_uri_is_explained(uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate.generate(uri)


def test_blocks_are_drawn_apart() -> None:
    rows = simulate.generate("sim:stationary?rows=3000")
    first, second = (rows["amount"][i * 1000 : (i + 1) * 1000].to_numpy() for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
