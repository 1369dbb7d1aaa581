"""Many rows at once: a stream of Arrow record batches in place of JSON, to `POST /predict`.

The columns are the contract's, and may be joined by `_id` (text) and `_time` (timestamp with a time
zone). What is valid is what `driftmill batch` takes (`driftmill.columns`). Nothing here looks at
single values in Python but the log, which keeps these rows as any others.

What comes from outside is checked before Arrow works with it: a compressed stream, which may be a
thousand times longer than it looks, is refused, and so is one whose columns point outside of it or
that repeats a long text in many rows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from driftmill import columns
from driftmill.contract import Column, did_you_mean
from driftmill.features import ID, MISSING, TIME, Signature
from driftmill.serving.codec import Answers, RequestError, Rows

#: Of a message's flatbuffer (format/Message.fbs): kinds of headers, and places of fields.
_DICTIONARY, _RECORDS = 2, 3
_KIND, _HEADER, _DATA, _COMPRESSION = 1, 2, 1, 3
#: Characters of an `_id`, as in JSON.
_LONGEST_ID = 512

_answers = msgspec.json.Decoder(Answers)


class Reader:
    """Reads the rows of one model.

    Args:
        signature: what it takes.
        rename: names in JSON of a record's attributes: of the columns in their order, then of
            `_id` and of `_time`.
        years: that a time may have.
        most_rows: in a request.
        most_text: characters of text in a request, each row's counted.
    """

    def __init__(
        self,
        signature: Signature,
        rename: dict[str, str],
        years: range,
        most_rows: int,
        most_text: int,
    ) -> None:
        self._columns = signature.columns
        self._numbers = columns.Numbers([c for c in signature.columns if c.is_numeric])
        self._years = years
        self._most_rows = most_rows
        self._most_text = most_text
        # Not checked again; and made by position, which is many times faster than by name.
        fields = [(name, Any) for name in rename]
        self._record = msgspec.defstruct("Row", fields, rename=rename, gc=False)

    def rows(self, body: bytes) -> Rows:
        """The rows of a stream. Raises RequestError (400, 413, 422)."""
        table = _table(body)
        if not 1 <= table.num_rows <= self._most_rows:
            raise _wrong(f"Send 1 to {self._most_rows} rows, not {table.num_rows}")
        try:
            self._check(table.schema)
            given = {name: table.column(name).combine_chunks() for name in table.column_names}
            for values in given.values():
                values.validate(full=True)
        except (pa.ArrowException, UnicodeDecodeError) as error:  # names need not be text
            raise _unreadable(error) from None
        self._check_lengths(given)
        problems = columns.Problems(table.num_rows)
        numeric, text = [], []
        kept: list[Callable[[], list[Any]]] = []
        for column in self._columns:
            values = given.get(column.name, pa.nulls(table.num_rows))
            if column.is_numeric:
                wide = columns.wide(values)
                numeric.append(wide)
                kept.append(_truths(wide) if column.type == "bool" else wide.tolist)
            else:
                text.append(columns.texts(values, column, problems))
                kept.append(_words(text[-1]))
        inputs = self._numbers.take(numeric, table.num_rows, problems)
        times = self._times(given.get(TIME, pa.nulls(table.num_rows)), problems)
        ids = given.get(ID, pa.nulls(table.num_rows))
        if not pa.types.is_null(ids.type):
            long = pc.greater(pc.utf8_length(ids), _LONGEST_ID)
            problems.note(_true(long), f"{ID} is longer than {_LONGEST_ID} characters")
        first = problems.first()
        if first is not None:
            raise _wrong(first[1], f"$.records[{first[0]}]")
        kept += [ids.to_pylist, times.to_pylist]
        return Rows(
            inputs,
            np.stack(text, axis=1) if text else np.empty((table.num_rows, 0), object),
            lambda: [self._record(*row) for row in zip(*(of() for of in kept), strict=True)],
        )

    def _check(self, schema: pa.Schema) -> None:
        """Refuse columns that are unknown, missing, there twice or of a wrong type."""
        needed = {column.name: column for column in self._columns}
        names = schema.names
        for name, kind in zip(names, schema.types, strict=True):
            if name not in needed and name not in (ID, TIME):
                near = did_you_mean(name, [*needed, ID, TIME])
                raise _wrong(f"Unknown column {name!r}{near}")
            if name == TIME:
                good = pa.types.is_timestamp(kind) and kind.tz is not None
                shown = "a timestamp with a time zone"
            elif name == ID:
                good, shown = pa.types.is_string(kind) or pa.types.is_large_string(kind), "text"
            else:
                # A view may repeat a long text in all rows.
                view = pa.types.is_string_view(getattr(kind, "value_type", kind))
                good = columns.fits(kind, needed[name]) and not view
                shown = _shown(needed[name])
            if not (good or pa.types.is_null(kind)):
                raise _wrong(f"The column {name!r} holds {kind}; {shown} is needed")
        if len(set(names)) < len(names):
            raise _wrong("A column is there twice")
        for column in self._columns:
            if not column.nullable and column.name not in names:
                raise _wrong(f"The column {column.name!r} is needed")

    def _check_lengths(self, given: dict[str, pa.Array]) -> None:
        """Refuse long texts that a dictionary repeats."""
        length = 0
        for values in given.values():
            if pa.types.is_dictionary(values.type):
                sizes = pc.binary_length(values.dictionary).take(values.indices)
                length += pc.sum(sizes).as_py() or 0
        if length > self._most_text:
            raise RequestError(
                413, "body_too_large", f"The texts may have at most {self._most_text} bytes"
            )

    def _times(self, given: pa.Array, problems: columns.Problems) -> pa.Array:
        """Times in UTC and microseconds; nanoseconds are cut off."""
        if pa.types.is_null(given.type):
            return given
        years = f"{self._years[0]} and {self._years[-1]}"
        low, high = (
            (np.datetime64(str(year), given.type.unit).astype(np.int64))
            for year in (self._years.start, self._years.stop)
        )
        ticks = given.cast(pa.int64())
        wrong = pc.or_(pc.less(ticks, low), pc.greater_equal(ticks, high))
        problems.note(_true(wrong), f"{TIME} is not between {years}")
        # What is wrong may be too large for the other unit, and is refused anyway.
        inside = pc.if_else(wrong, None, ticks).cast(pa.timestamp(given.type.unit, "UTC"))
        return inside.cast(pa.timestamp("us", "UTC"), safe=False)


def answer(body: bytes, signature: Signature) -> bytes:
    """An answer of `POST /predict` as a stream of one record batch: `id`, `prediction`, of a
    classification `score` and the struct `probabilities`. Model and version are the schema's
    metadata.

    Args:
        body: the answer in JSON.
        signature: what the model gives.
    """
    given = _answers.decode(body)
    labels = signature.labels
    found = {
        "id": pa.array([p.id for p in given.predictions], pa.string()),
        "prediction": pa.array(
            [p.prediction for p in given.predictions], pa.string() if labels else pa.float64()
        ),
    }
    if labels:
        found["score"] = pa.array([p.score for p in given.predictions], pa.float64())
        spread = [p.probabilities or {} for p in given.predictions]
        found["probabilities"] = pa.StructArray.from_arrays(
            [pa.array([each[label] for each in spread], pa.float64()) for label in labels], labels
        )
    batch = pa.RecordBatch.from_pydict(found).replace_schema_metadata(
        {"model": given.model, "version": given.version}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(body: bytes) -> pa.Table:
    """The rows of a stream. Raises RequestError (400)."""
    try:
        # Arrow has checked the metadata of a message when it is here; nothing is expanded yet.
        for message in pa.ipc.MessageReader.open_stream(body):
            if _is_compressed(message.metadata.to_pybytes()):
                raise RequestError(400, "invalid_arrow", "Send the record batches uncompressed")
        return pa.ipc.open_stream(body).read_all()
    except (pa.ArrowException, OSError, struct.error, IndexError) as error:
        raise _unreadable(error) from None


def _is_compressed(metadata: bytes) -> bool:
    """Whether the buffers of a message are. Raises struct.error and IndexError where it is none."""

    def number(kind: str, at: int) -> int:
        value: int = struct.unpack_from(f"<{kind}", metadata, at)[0]
        return value

    def place(table: int, field: int) -> int:
        """Where a field of a table lies; 0: it has none."""
        fields = table - number("i", table)
        slot = 4 + 2 * field
        offset = number("H", fields + slot) if slot < number("H", fields) else 0
        return table + offset if offset else 0

    def table_at(at: int) -> int:
        return at + number("I", at)

    message = table_at(0)
    at = place(message, _KIND)
    kind = metadata[at] if at else 0
    if kind not in (_DICTIONARY, _RECORDS):
        return False
    header = table_at(place(message, _HEADER))
    if kind == _DICTIONARY:
        header = table_at(place(header, _DATA))
    return place(header, _COMPRESSION) != 0


def _truths(wide: np.ndarray) -> Callable[[], list[Any]]:
    return lambda: [None if value != value else value == 1.0 for value in wide.tolist()]


def _words(text: np.ndarray) -> Callable[[], list[Any]]:
    return lambda: [None if word == MISSING else word for word in text.tolist()]


def _true(values: pa.Array) -> np.ndarray:
    known: np.ndarray = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return known


def _shown(column: Column) -> str:
    return column.type if column.is_numeric else "text"


def _wrong(message: str, path: str = "$.records") -> RequestError:
    return RequestError(422, "invalid_field", message, path)


def _unreadable(error: Exception) -> RequestError:
    return RequestError(400, "invalid_arrow", f"The body is no Arrow stream: {error}")
