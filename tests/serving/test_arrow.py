"""Record batches of Arrow in place of JSON: taken by the same rules, and safe to read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill.contract import Contract
from driftmill.features import Signature
from driftmill.serving.codec import ARROW, RequestError, Rows
from driftmill.serving.log import read, segments
from driftmill.store import Store
from tests.serving.test_codec import GOOD, body, codec, rows
from tests.serving.test_server import RECORD, MakeBundle, go, predict, promote, quick, running

__all__ = ["quick"]

TYPES = {
    "an amount": pa.float64(),
    "age": pa.int64(),
    "paid": pa.bool_(),
    "a.free": pa.string(),
    "strict": pa.dictionary(pa.int8(), pa.string()),
}
WHOLE = GOOD | {"age": 41, "a.free": "new"}


def stream(table: pa.Table | pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def table(*records: dict[str, Any], **types: pa.DataType) -> pa.Table:
    """Records as a table; its columns are those of the first."""
    kinds = TYPES | types
    return pa.table(
        {name: pa.array([r[name] for r in records], kinds.get(name)) for name in records[0]}
    )


def refusal(content: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        codec().records(content, ARROW)
    return caught.value


@given(rows)
def test_columns_are_read_as_json_is(given_rows: list[dict[str, Any]]) -> None:
    one = codec()
    plain = one.records(body(*given_rows))
    columns = one.records(stream(table(*given_rows)), ARROW)
    assert isinstance(columns, Rows)
    for found, expected in zip(one.arrays(columns), one.arrays(plain), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    # The log keeps the same, and the two can be joined to one batch.
    assert msgspec.json.encode(list(columns)) == msgspec.json.encode(plain)
    numeric, text = one.arrays([*columns, *plain])
    np.testing.assert_array_equal(numeric[: len(plain)], numeric[len(plain) :])
    assert text[: len(plain)].tolist() == text[len(plain) :].tolist()


def test_ids_times_aliases_batches_and_absent_columns() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    record = GOOD | {"strict": "Red.", "_id": "x", "_time": at}
    for unit in ("s", "ms", "us", "ns"):
        one = table(record, record | {"_id": None}, _time=pa.timestamp(unit, "Europe/Berlin"))
        batches = pa.concat_tables([one, one.slice(0, 1)])
        found = list(codec().records(stream(batches), ARROW))
        assert [r.id for r in found] == ["x", None, "x"]
        assert {r.time for r in found} == {at}
        kept = msgspec.json.decode(msgspec.json.encode(found))
        assert [(r["age"], r["paid"], r["a.free"], r["strict"]) for r in kept] == [
            (None, True, None, "red")
        ] * 3


@pytest.mark.parametrize(
    ("change", "types", "path", "says"),
    [
        ({"an amount": 1001.0}, {}, "$.records[1]", "out of range"),
        ({"an amount": None}, {}, "$.records[1]", "an amount is missing"),
        ({"an amount": float("nan")}, {}, "$.records[1]", "an amount is missing"),
        ({"age": 5.5}, {"age": pa.float64()}, "$.records[1]", "not a whole number"),
        ({"strict": "gren"}, {}, "$.records[1]", "no such category"),
        ({"strict": ""}, {}, "$.records[1]", "strict is missing"),
        ({"a.free": "x"}, {"a.free": pa.string_view()}, "$.records", "text is needed"),
        ({"_id": "x" * 513}, {}, "$.records[1]", "longer than 512"),
        ({"_id": 7}, {}, "$.records", "text is needed"),
        ({"_time": datetime(2026, 1, 1)}, {}, "$.records", "time zone"),
        (
            {"_time": datetime(1, 1, 1, tzinfo=UTC)},
            {"_time": pa.timestamp("s", "UTC")},
            "$.records[1]",
            "not between 1700 and 2199",
        ),
        ({"an amout": 5}, {}, "$.records", "did you mean 'an amount'?"),
    ],
)
def test_what_is_wrong_is_named(
    change: dict[str, Any], types: dict[str, pa.DataType], path: str, says: str
) -> None:
    first = dict.fromkeys(change) | WHOLE
    error = refusal(stream(table(first, first | change, **types)))
    assert (error.status, error.path) == (422, path)
    assert says in error.message


def test_wrong_streams_are_refused() -> None:
    good = table(WHOLE)
    for broken in (b"", b"{}", stream(good)[:-40], stream(good)[:100], body(GOOD)):
        assert refusal(broken).status == 400
    assert "1 to 1000 rows" in refusal(stream(good.slice(0, 0))).message
    assert "1 to 1000 rows" in refusal(stream(table(*[WHOLE] * 1001))).message
    assert "'paid' is needed" in refusal(stream(good.drop_columns(["paid"]))).message
    text = table(WHOLE | {"an amount": "5"}, **{"an amount": pa.string()})
    assert "float is needed" in refusal(stream(text)).message
    error = refusal(stream(table(WHOLE | {"paid": 1}, WHOLE | {"paid": 2}, paid=pa.int8())))
    assert (error.path, error.message) == ("$.records[1]", "paid is out of range")
    twice = good.append_column("paid", good["paid"])
    assert "there twice" in refusal(stream(twice)).message


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_what_would_grow_is_refused(compression: str) -> None:
    long = WHOLE | {"a.free": "x" * 1_000_000}
    error = refusal(stream(table(long), compression=compression))
    assert (error.status, error.code) == (400, "invalid_arrow")
    assert "uncompressed" in error.message
    # A million times a thousand.
    repeated = table(*[long] * 1000, **{"a.free": pa.dictionary(pa.int32(), pa.string())})
    assert refusal(stream(repeated)).status == 413
    # A dictionary alone is compressed.
    words = pa.table({"strict": pa.array(["red" * 1000], TYPES["strict"])})
    assert "uncompressed" in refusal(stream(words, compression=compression)).message


@settings(max_examples=200)
@given(st.data())
def test_no_change_of_a_stream_breaks_the_reader(data: st.DataObject) -> None:
    record = WHOLE | {"_id": "x", "_time": datetime(2026, 1, 2, tzinfo=UTC)}
    content = bytearray(stream(table(record, record, record)))
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)
    ):
        content[place] = value
    one = codec()
    try:
        found = one.records(bytes(content), ARROW)
    except RequestError as error:
        refused = error
    else:
        msgspec.json.encode(list(found))
        assert np.isfinite(one.arrays(found)[0][:, 0]).all()
        return
    assert refused.status in (400, 413, 422)


def test_it_is_answered_and_logged(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=quick)
    promote(store, manifest)
    records = [RECORD | {"amount": float(100 * i)} for i in range(10)]
    content = stream(pa.Table.from_pylist(records))

    async def ask(client: httpx.AsyncClient, accept: str) -> httpx.Response:
        headers = {"content-type": ARROW, "accept": accept}
        return await client.post("/predict", content=content, headers=headers)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            plain = (await predict(client, *records)).json()["predictions"]
            answer = (await ask(client, "*/*")).json()
            for name in ("prediction", "score", "probabilities"):
                assert [p[name] for p in answer["predictions"]] == [p[name] for p in plain]
            response = await ask(client, ARROW)
            assert response.headers["content-type"] == ARROW
            assert response.headers["x-model-version"] == manifest.version
            found = pa.ipc.open_stream(response.content).read_all()
            metadata = {"model": "tiny", "version": manifest.version}
            assert {k.decode(): v.decode() for k, v in found.schema.metadata.items()} == metadata
            got = found.drop_columns(["id"]).to_pylist()
            assert got == [{k: v for k, v in p.items() if k != "id"} for p in plain]
            refused = await client.post(
                "/predict", content=b"x", headers={"content-type": ARROW, "accept": ARROW}
            )
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "invalid_arrow"

    go(check())
    logged = read(store, segments(store, "tiny", "predictions"))
    assert logged["amount"].tolist() == [r["amount"] for r in records] * 3


def test_regressions_are_answered_with_numbers() -> None:
    from driftmill.serving.arrow import answer

    sign = Signature(task="regression", columns=(), target="y")
    content = b'{"model":"m","version":"v","predictions":[{"id":"a","prediction":1.5}]}'
    found = pa.ipc.open_stream(answer(content, sign)).read_all()
    assert found.to_pylist() == [{"id": "a", "prediction": 1.5}]
