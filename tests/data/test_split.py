"""Splits: by time, or by hash so that rows keep their side; and the fingerprint."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill.contract import Contract, parse
from driftmill.data import split
from driftmill.data.schema import DataError
from driftmill.features import ID, TIME
from tests.conftest import CONTRACT, tiny_frame

REGRESSION = parse(
    CONTRACT.replace("classification", "regression").replace(
        '{name: fraud, labels: ["no", "yes"]}', "amount_due"
    )
)


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    return tiny_frame(rows, seed).assign(**{ID: [f"row-{i}" for i in range(rows)]})


def test_with_a_time_the_last_rows_are_the_test(tiny: Contract) -> None:
    frame = table(101)
    frame[TIME] = pd.date_range("2026-01-01", periods=101, freq="h", tz="UTC")
    train, test = split.split(frame, tiny)
    assert (len(train), len(test)) == (81, 20)
    assert train[TIME].max() < test[TIME].min()


def test_without_a_time_labels_keep_their_shares(tiny: Contract) -> None:
    frame = table(1000)
    frame["fraud"] = np.where(np.arange(1000) % 10 == 0, "yes", "no")
    train, test = split.split(frame, tiny)
    assert (len(train), len(test)) == (800, 200)
    assert (test["fraud"] == "yes").sum() == 20


def test_another_seed_gives_another_split(tiny: Contract) -> None:
    other = tiny.data.split.model_copy(update={"seed": 1})
    changed = tiny.model_copy(update={"data": tiny.data.model_copy(update={"split": other})})
    frame = table(200)
    assert set(split.split(frame, tiny)[1][ID]) != set(split.split(frame, changed)[1][ID])


def test_rows_keep_their_side_when_others_come(tiny: Contract) -> None:
    frame = table(4000)
    before = set(split.split(frame.head(2000), tiny)[0][ID])
    after = set(split.split(frame, tiny)[1][ID])
    assert len(before & after) < 0.02 * len(before)


def test_one_row_is_too_few(tiny: Contract) -> None:
    with pytest.raises(DataError, match="too few"):
        split.split(table(1), tiny)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 3), st.sampled_from(["classes", "numbers", "time"]))
def test_both_parts_together_are_all_rows(rows: int, seed: int, how: str) -> None:
    frame = table(rows, seed).assign(amount_due=1.0)
    if how == "time":
        frame[TIME] = pd.date_range("2026-01-01", periods=rows, tz="UTC")
    train, test = split.split(frame, parse(CONTRACT) if how == "classes" else REGRESSION)
    assert sorted([*train[ID], *test[ID]]) == sorted(frame[ID])
    if how != "classes":
        assert len(train) > 0
        assert len(test) == max(1, round(rows * 0.2))


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_fingerprint_does_not_depend_on_the_order(random: object) -> None:
    frame = table(50)
    frame.loc[3, "channel"] = None
    order = list(range(50))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = frame.iloc[order][sorted(frame.columns, reverse=True)]
    assert split.fingerprint(shuffled) == split.fingerprint(frame)


@pytest.mark.parametrize("column", ["amount", "age", "channel", "fraud"])
def test_the_fingerprint_sees_any_changed_value(column: str) -> None:
    frame = table(50)
    other = frame.copy()
    other.loc[7, column] = "other" if column in ("channel", "fraud") else 1.5
    assert split.fingerprint(other) != split.fingerprint(frame)
    assert split.fingerprint(frame.drop(index=7)) != split.fingerprint(frame)


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from tests.data.test_split import table; from driftmill.data import split;"
        "print(split.fingerprint(table(20)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == split.fingerprint(table(20))
