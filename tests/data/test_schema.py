"""Validation: every rule, every reason, and no row lost."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import contract
from driftmill.data import schema
from driftmill.data.schema import DataError, QuarantineError
from driftmill.features import ID, TIME

TEXT = """
apiVersion: driftmill/v1
model: shop
task: classification
data:
  source: file:rows.csv
  target: {name: bought, labels: ["no", "yes"], aliases: {"yes.": "yes"}}
  id: order
  time: {columns: [day, hour], format: "%Y-%m-%d %H"}
  columns:
    - {name: price, type: float, min: 0, max: 100}
    - {name: items, type: int, nullable: true}
    - {name: member, type: bool, nullable: true}
    - {name: country, type: category, categories: [de, fr], unknown: reject, aliases: {GER: de}}
    - {name: colour, type: category, nullable: true}
"""
SHOP = contract.parse(TEXT)
GOOD: dict[str, object] = {
    "order": "a",
    "day": "2026-01-02",
    "hour": "7",
    "price": "9.5",
    "items": "3",
    "member": "true",
    "country": "de",
    "colour": "red",
    "bought": "yes",
    "note": "kept for the quarantine only",
}


def rows(*changes: dict[str, object]) -> pd.DataFrame:
    """One row for each change of the good row, with an id of its own."""
    return pd.DataFrame([{**GOOD, "order": f"o{i}", **c} for i, c in enumerate(changes)])


def reasons(change: dict[str, object], of: contract.Contract = SHOP) -> list[str]:
    found = schema.validate(rows(change), of).quarantine
    return found[schema.REASON].iloc[0].split(schema.SEPARATOR) if len(found) else []


def test_a_good_row_is_typed() -> None:
    found = schema.validate(rows({}), SHOP)
    assert found.quarantine.empty
    assert found.valid.to_dict("records") == [
        {
            "price": 9.5,
            "items": 3.0,
            "member": 1.0,
            "country": "de",
            "colour": "red",
            "bought": "yes",
            ID: "o0",
            TIME: pd.Timestamp("2026-01-02T07:00:00Z"),
        }
    ]
    assert (found.valid.dtypes[["price", "items", "member"]] == np.float64).all()
    assert str(found.valid[TIME].dtype) == "datetime64[ns, UTC]"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"price": "cheap"}, ["price: not a number"]),
        ({"price": None}, ["price: missing value"]),
        ({"price": "-1"}, ["price: below min 0"]),
        ({"price": 100.5}, ["price: above max 100"]),
        ({"items": "inf"}, ["items: infinite number"]),
        ({"items": "1e39"}, ["items: infinite number"]),
        ({"items": "2.5"}, ["items: not a whole number"]),
        ({"items": [1, 2]}, ["items: not a whole number"]),
        ({"member": "maybe"}, ["member: not true or false"]),
        ({"member": 2}, ["member: not true or false"]),
        ({"country": "uk"}, ["country: unknown category"]),
        ({"country": " "}, ["country: missing value"]),
        ({"bought": None}, ["bought: missing label"]),
        ({"bought": "perhaps"}, ["bought: not one of the labels"]),
        ({"order": None}, ["order: missing id"]),
        ({"day": "2026-02-30"}, ["time: missing or cannot be parsed"]),
        ({"hour": None}, ["time: missing or cannot be parsed"]),
        (
            {"price": "x", "country": "uk", "bought": None},
            ["price: not a number", "country: unknown category", "bought: missing label"],
        ),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, object], expected: list[str]) -> None:
    assert reasons(change) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"items": None},
        {"member": None},
        {"member": " No "},
        {"member": True},
        {"member": 0},
        {"colour": "never seen before"},
        {"colour": None},
        {"country": " GER "},
        {"bought": "yes."},
        {"price": " 9.5 "},
        {"price": 0},
        {"price": 100},
        {"hour": 7},
    ],
)
def test_what_the_contract_allows_passes(change: dict[str, object]) -> None:
    assert reasons(change) == []


def test_aliases_are_applied() -> None:
    valid = schema.validate(rows({"country": "GER", "bought": "yes."}), SHOP).valid
    assert valid[["country", "bought"]].iloc[0].tolist() == ["de", "yes"]


def test_the_first_of_two_equal_ids_stays() -> None:
    found = schema.validate(rows({"order": "x", "price": "1"}, {"order": "x", "price": "2"}), SHOP)
    assert found.valid["price"].tolist() == [1.0]
    assert found.quarantine[schema.REASON].tolist() == ["order: duplicate id"]


def test_rows_are_sorted_by_time() -> None:
    found = schema.validate(rows({"day": "2026-01-03"}, {"day": "2026-01-01"}), SHOP)
    assert found.valid[ID].tolist() == ["o1", "o0"]


def test_the_quarantine_keeps_the_row_as_it_came() -> None:
    found = schema.validate(rows({"price": " cheap "}), SHOP)
    row = found.quarantine.iloc[0].to_dict()
    assert row.pop(schema.REASON) == "price: not a number"
    assert row == {**GOOD, "order": "o0", "price": " cheap "}


def test_numbers_are_what_a_float32_holds() -> None:
    valid = schema.validate(rows({"price": "0.1"}), SHOP).valid
    assert valid["price"].iloc[0] == float(np.float32(0.1)) != 0.1


def test_typed_sources_give_the_same_rows_as_text() -> None:
    typed = rows({}).assign(
        price=9.5, items=pd.array([3], "Int64"), member=True, hour=7, colour=pd.Categorical(["red"])
    )
    pd.testing.assert_frame_equal(
        schema.validate(typed, SHOP).valid, schema.validate(rows({}), SHOP).valid
    )


def test_categories_of_numbers_and_truth_values_read_as_in_a_request() -> None:
    frame = rows({}, {}, {}).assign(colour=[1.0, np.nan, 2.5])
    assert schema.validate(frame, SHOP).valid["colour"].tolist() == ["1", None, "2.5"]
    frame = rows({}, {}).assign(colour=[True, False])
    assert schema.validate(frame, SHOP).valid["colour"].tolist() == ["true", "false"]


def test_without_an_id_the_position_makes_one() -> None:
    plain = contract.parse(TEXT.replace("  id: order\n", ""))
    frame = rows({}, {"price": "x"}, {})
    found = schema.validate(frame, plain, origin="file:a.csv").valid[ID]
    assert found.is_unique
    assert schema.validate(frame[2:], plain, origin="file:a.csv").valid[ID][0] == found[1]
    assert schema.validate(frame, plain, origin="file:b.csv").valid[ID][0] != found[0]


def test_a_column_that_is_all_missing() -> None:
    frame = rows({}, {}).assign(member=None, items=None, colour=None)
    valid = schema.validate(frame, SHOP).valid
    assert len(valid) == 2
    assert valid[["member", "items", "colour"]].isna().all(axis=None)


def test_no_rows_at_all() -> None:
    found = schema.validate(rows({}).head(0), SHOP)
    assert len(found.valid) == len(found.quarantine) == 0


def test_regression_targets() -> None:
    text = TEXT.replace("classification", "regression").replace(
        '{name: bought, labels: ["no", "yes"], aliases: {"yes.": "yes"}}',
        "{name: bought, max: 50, transform: log1p}",
    )
    count = contract.parse(text)
    assert reasons({"bought": "7"}, count) == []
    assert reasons({"bought": "many"}, count) == ["bought: not a number"]
    assert reasons({"bought": "51"}, count) == ["bought: above max 50"]
    assert reasons({"bought": "-1"}, count) == ["bought: too small for log1p"]
    assert reasons({"bought": None}, count) == ["bought: missing label"]


def test_iso_times_with_and_without_offset() -> None:
    iso = contract.parse(TEXT.replace('{columns: [day, hour], format: "%Y-%m-%d %H"}', "day"))
    frame = rows({"day": "2026-01-02T01:00:00+01:00"}, {"day": "2026-01-02"}, {"day": "soon"})
    assert schema.times(frame, iso).tolist() == [pd.Timestamp("2026-01-02", tz="UTC")] * 2 + [
        pd.NaT
    ]
    naive = frame.assign(day=pd.to_datetime("2026-01-02"))
    assert (schema.times(naive, iso) == pd.Timestamp("2026-01-02", tz="UTC")).all()


VALUES = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-(10**30), 10**30),
    st.booleans(),
    st.text(max_size=5),
    st.sampled_from(["7", "9.5", "de", "yes", "true", "2026-01-02", "inf", "nan"]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(GOOD, VALUES)), max_size=6))
def test_no_row_is_lost_whatever_comes(given_rows: list[dict[str, object]]) -> None:
    raw = pd.DataFrame(given_rows, columns=list(GOOD), dtype=object)
    found = schema.validate(raw, SHOP)
    assert len(found.valid) + len(found.quarantine) == len(raw)
    assert (found.quarantine[schema.REASON] != "").all()
    assert found.valid[ID].is_unique
    numbers = found.valid[["price", "items", "member"]].to_numpy(np.float64)
    assert not np.isinf(numbers).any()
    assert np.array_equal(numbers, numbers.astype(np.float32).astype(np.float64), equal_nan=True)
    assert found.valid["bought"].isin(["no", "yes"]).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_exactly_the_bad_rows_are_quarantined(bad: list[bool]) -> None:
    changes: list[dict[str, object]] = [{"price": "x"} if b else {} for b in bad]
    found = schema.validate(rows(*changes), SHOP)
    assert found.quarantine["order"].tolist() == [f"o{i}" for i, b in enumerate(bad) if b]
    assert sorted(found.valid[ID]) == sorted(f"o{i}" for i, b in enumerate(bad) if not b)


def test_too_many_bad_rows_are_an_error_with_counts() -> None:
    table = schema.validate(rows({"price": "x", "bought": None}, {"price": "y"}), SHOP).quarantine
    counted = schema.count_reasons([table])
    assert counted == {"price: not a number": 2, "bought: missing label": 1}
    schema.check_fraction(counted, 2, 40, 0.05, "q.parquet")
    with pytest.raises(
        QuarantineError, match=r"2 of 39 rows .* not a number \(2\).*q\.parquet"
    ) as e:
        schema.check_fraction(counted, 2, 39, 0.05, "q.parquet")
    assert e.value.reasons == counted
    assert isinstance(e.value, DataError)
