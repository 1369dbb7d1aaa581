"""Columns of Arrow as a model takes them, many rows at once, with what is wrong of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from driftmill.contract import Column
from driftmill.features import MISSING


class Problems:
    """The first problem of each row, if any.

    Args:
        rows: how many there are.
    """

    def __init__(self, rows: int) -> None:
        self._texts: list[str | None] = [None]
        #: For each row 0 or the place of its problem's text.
        self.codes = np.zeros(rows, dtype=np.int32)

    def note(self, where: np.ndarray, text: str) -> None:
        """Write down a problem of the rows that have none yet."""
        if where.any():
            self.codes[where & (self.codes == 0)] = len(self._texts)
            self._texts.append(text)

    def column(self) -> pa.Array:
        """The texts, null where there is no problem."""
        return pa.array(self._texts, pa.string()).take(pa.array(self.codes))

    def first(self) -> tuple[int, str] | None:
        """The first row that has one, and its text."""
        rows = np.flatnonzero(self.codes)
        if not len(rows):
            return None
        text = self._texts[self.codes[rows[0]]]
        assert text is not None
        return int(rows[0]), text


def fits(kind: pa.DataType, column: Column) -> bool:
    """Whether Arrow's type can be read as the contract's. A whole number may name a category."""
    types = pa.types
    if types.is_null(kind) or types.is_integer(kind):
        return True
    if column.is_numeric:
        return bool(types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))
    text = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(text) or types.is_large_string(text) or types.is_string_view(text))


def wide(values: pa.Array) -> np.ndarray:
    """Numbers or truth values as float64, NaN for nothing."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    if not pa.types.is_float64(values.type):
        values = values.cast(pa.float64(), safe=False)
    found: np.ndarray = values.to_numpy(zero_copy_only=False)
    return found


class Numbers:
    """Makes columns of numbers what the model takes.

    Args:
        columns: all of the model's that are numeric.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        whole = [c.type in ("int", "bool") for c in columns]
        self._whole: list[int] = np.flatnonzero(whole).tolist()
        self._needed = np.array([not c.nullable for c in columns], dtype=bool)
        limits = [(0.0, 1.0) if c.type == "bool" else (c.min, c.max) for c in columns]
        self._low = np.array([-np.inf if low is None else low for low, _ in limits])
        self._high = np.array([np.inf if high is None else high for _, high in limits])

    def take(self, given: Sequence[np.ndarray], rows: int, problems: Problems) -> np.ndarray:
        """The columns as the model takes them, (rows, columns) float32, NaN for nothing; notes what
        is not valid.

        Args:
            given: each column, from `wide`.
            rows: how many each has.
            problems: of the rows.
        """
        table = np.empty((rows, len(self._columns)))
        for index, column in enumerate(given):
            table[:, index] = column
        missing = np.isnan(table)
        with np.errstate(over="ignore"):
            result: np.ndarray = table.astype(np.float32)
        wrong = np.isinf(result) | (table < self._low) | (table > self._high)
        parts = table[:, self._whole]
        broken = (np.floor(parts) != parts) & ~missing[:, self._whole]
        absent = missing & self._needed
        if absent.any() or wrong.any() or broken.any():
            for index, one in enumerate(self._columns):
                problems.note(absent[:, index], f"{one.name} is missing")
                problems.note(wrong[:, index], f"{one.name} is out of range")
            for index, place in enumerate(self._whole):
                text = f"{self._columns[place].name} is not a whole number"
                problems.note(broken[:, index], text)
        return result


def texts(values: pa.Array, column: Column, problems: Problems) -> np.ndarray:
    """A column as the model takes it, text with "" for nothing; notes what is not valid."""
    if not pa.types.is_dictionary(values.type):
        values = pc.dictionary_encode(values.cast(pa.string()))
    words = [column.aliases.get(word, word) for word in _words(values.dictionary)]
    # Each word once, and a last one for nothing: rows then only refer to them.
    known = np.array([*words, MISSING], dtype=object)
    codes = pc.fill_null(values.indices.cast(pa.int64()), len(words)).to_numpy()
    result: np.ndarray = known[codes]
    if not column.nullable:
        problems.note((known == MISSING)[codes], f"{column.name} is missing")
    if column.unknown == "reject":
        valid = {*column.categories, MISSING}
        foreign = np.array([word not in valid for word in known])
        problems.note(foreign[codes], f"{column.name} has no such category")
    return result


def _words(dictionary: pa.Array) -> list[str]:
    words: list[Any] = dictionary.to_pylist()
    return [MISSING if word is None else str(word) for word in words]
