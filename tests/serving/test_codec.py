"""Decoding requests: strict, with the path of what is wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import bundle, contract, features
from driftmill.features import Signature
from driftmill.serving.codec import RequestError, TableCodec

WIDE = contract.parse(
    """
apiVersion: driftmill/v1
model: wide
task: classification
data:
  source: sim:payments
  target: {name: label, labels: ["no", "yes"], aliases: {"y": "yes"}}
  columns:
    - {name: an amount, type: float, min: 0, max: 1000}
    - {name: age, type: int, nullable: true}
    - {name: paid, type: bool}
    - {name: a.free, type: category, nullable: true}
    - {name: strict, type: category, categories: [red, green], unknown: reject,
       aliases: {"Red.": red}}
  time: at
tracking: none
"""
)
GOOD: dict[str, Any] = {"an amount": 1.5, "paid": True, "strict": "red"}


def codec(of: contract.Contract = WIDE) -> TableCodec:
    sign = Signature(
        task=of.task, columns=of.data.columns, target="label", labels=of.data.target.labels
    )
    return TableCodec(sign, of)


def body(*records: object) -> bytes:
    return json.dumps({"records": records}).encode()


def refusal(content: bytes, of: str = "records") -> tuple[int, str | None, str]:
    with pytest.raises(RequestError) as caught:
        getattr(codec(), of)(content)
    return caught.value.status, caught.value.path, caught.value.message


@pytest.mark.parametrize(
    ("change", "path", "says"),
    [
        ({"an amount": "5"}, "$.records[1].an amount", "got `str`"),
        ({"an amount": None}, "$.records[1].an amount", "got `null`"),
        ({"an amount": -1}, "$.records[1].an amount", ">= 0"),
        ({"an amount": 1001}, "$.records[1].an amount", "<= 1000"),
        ({"an amount": True}, "$.records[1].an amount", "got `bool`"),
        ({"age": 5.5}, "$.records[1].age", "multiple of 1"),
        ({"age": 1e39}, "$.records[1].age", "<="),  # infinite as float32
        ({"paid": 2}, "$.records[1].paid", "<= 1"),
        ({"paid": 0.5}, "$.records[1].paid", "multiple of 1"),
        ({"paid": "true"}, "$.records[1].paid", "got `str`"),
        ({"a.free": 5}, "$.records[1].a.free", "got `int`"),
        ({"strict": "gren"}, "$.records[1].strict", "did you mean 'green'?"),
        ({"strict": None}, "$.records[1].strict", "got `null`"),
        ({"an amout": 5}, "$.records[1].an amout", "did you mean 'an amount'?"),
        ({"_time": "yesterday"}, "$.records[1]._time", "RFC3339"),
        ({"_time": "2026-01-01T00:00:00"}, "$.records[1]._time", "timezone"),
        ({"_time": "0001-01-01T00:00:00Z"}, "$.records[1]._time", "between 1700 and 2199"),
        ({"_id": 7}, "$.records[1]._id", "got `int`"),
        ({"_id": "x" * 513}, "$.records[1]._id", "<= 512"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], path: str, says: str) -> None:
    status, where, message = refusal(body(GOOD, GOOD | change))
    assert (status, where) == (422, path)
    assert says in message


def test_wrong_shapes_are_named() -> None:
    without = {k: v for k, v in GOOD.items() if k != "paid"}
    assert refusal(body(without))[:2] == (422, "$.records[0].paid")
    assert refusal(body())[:2] == (422, "$.records")
    assert refusal(body(*[GOOD] * 1001))[:2] == (422, "$.records")
    assert refusal(body(5))[:2] == (422, "$.records[0]")
    assert refusal(b"{}")[:2] == (422, "$.records")
    assert refusal(b"[]")[:2] == (422, "$")
    assert refusal(b'{"records":[], "more": 1}')[0] == 422


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"records": [{"an amount": NaN}]}',
        b'{"records": [{"strict": "\\ud800"}]}',
        b'{"records": [{"strict": "\xff"}]}',
        body(GOOD) + b" x",
    ],
)
def test_bad_json_is_400(content: bytes) -> None:
    assert refusal(content)[0] == 400


def test_what_is_accepted() -> None:
    records = codec().records(
        body(
            GOOD | {"an amount": 5, "age": 41.0, "paid": 1, "strict": "Red.", "a.free": "new"},
            GOOD | {"age": None, "_id": "x", "_time": "2026-01-02T03:04:05+01:00"},
        )
    )
    numeric, text = codec().arrays(records)
    np.testing.assert_array_equal(numeric, np.array([[5, 41, 1], [1.5, np.nan, 1]], np.float32))
    assert numeric.dtype == np.float32
    assert text.tolist() == [["new", "red"], ["", "red"]]
    assert records[0].c2 is True  # as the log keeps it


def test_labels_are_checked_and_spelt_as_the_model_does() -> None:
    one = "0123456789abcdef0123456789"

    def labels(**given: object) -> bytes:
        return json.dumps({"labels": [given]}).encode()

    assert codec().labels(labels(id=one, label="y"))[0].label == "yes"
    assert refusal(labels(id=one, label="maybe"), "labels")[:2] == (422, "$.labels[0].label")
    assert refusal(labels(id="not an id", label="no"), "labels")[:2] == (422, "$.labels[0].id")
    assert refusal(labels(id=one + "\n", label="no"), "labels")[:2] == (422, "$.labels[0].id")
    assert refusal(labels(id=one), "labels")[:2] == (422, "$.labels[0].label")
    assert refusal(b'{"labels": []}', "labels")[:2] == (422, "$.labels")


def test_labels_of_a_regression_stay_in_their_range() -> None:
    values = json.loads(WIDE.to_json())
    values["task"] = "regression"
    values["data"]["target"] = {"name": "label", "min": 0}
    values["data"]["source"] = "sim:payments"
    decoder = codec(contract.parse(json.dumps(values)))
    one = "0123456789abcdef0123456789"
    assert decoder.labels(b'{"labels":[{"id":"%s","label":3}]}' % one.encode())[0].label == 3.0
    with pytest.raises(RequestError):
        decoder.labels(b'{"labels":[{"id":"%s","label":-3}]}' % one.encode())
    with pytest.raises(RequestError):
        decoder.labels(b'{"labels":[{"id":"%s","label":"3"}]}' % one.encode())


rows = st.lists(
    st.fixed_dictionaries(
        {
            "an amount": st.floats(0, 1000, width=32),
            "age": st.none() | st.integers(-(2**24), 2**24),
            "paid": st.booleans(),
            "a.free": st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
            "strict": st.sampled_from(["red", "green"]),
        }
    ),
    min_size=1,
    max_size=5,
)


@given(rows)
def test_serving_makes_the_same_arrays_as_training(given_rows: list[dict[str, Any]]) -> None:
    one = codec()
    numeric, text = one.arrays(one.records(body(*given_rows)))
    frame = pd.DataFrame(given_rows).astype({"age": float, "paid": float})
    expected_numeric, expected_text = features.arrays(frame, one.signature)
    np.testing.assert_array_equal(numeric, expected_numeric)
    assert text.tolist() == expected_text.tolist()


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([2, 3]),
)
def test_answers_agree_with_the_bundle(values: list[list[float]], labels: int) -> None:
    output = np.array(values, np.float32)[:, :labels]
    names = ("a", "b", "c")[:labels]
    sign = Signature(task="classification", columns=WIDE.data.columns, target="t", labels=names)
    answers = TableCodec(sign, WIDE).answers(["id"] * len(output), output)
    expected = bundle.answers(output, sign)
    assert [a.prediction for a in answers] == expected[bundle.PREDICTION].tolist()
    assert [a.score for a in answers] == expected[bundle.SCORE].tolist()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*GOOD, "age", "a.free", "_id", "_time"]) | st.text()


@settings(max_examples=300)
@given(
    st.binary()
    | json_values.map(lambda v: json.dumps(v).encode())
    | st.lists(st.dictionaries(keys, json_values)).map(
        lambda v: json.dumps({"records": [GOOD | r for r in v]}).encode()
    )
)
def test_no_body_breaks_the_decoder(content: bytes) -> None:
    one = codec()
    for decode in (one.records, one.labels):
        try:
            found = decode(content)
        except RequestError as error:
            refused = error
        else:
            assert found
            if decode == one.records:
                assert np.isfinite(one.arrays(found)[0][:, 0]).all()
            continue
        assert refused.status in (400, 422)
        assert set(json.loads(refused.body())["error"]) <= {"code", "message", "path"}
