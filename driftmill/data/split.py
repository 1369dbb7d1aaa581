"""Which rows are kept for the gate, and the fingerprint that freezes them.

By time where there is one: the last rows. Else by a hash of each row's id, so that a row keeps its
side when rows are added later: a champion must not be judged on rows that it learnt from.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd

from driftmill.contract import Contract
from driftmill.data.schema import DataError
from driftmill.features import ID, IMAGE, TIME


def split(frame: pd.DataFrame, contract: Contract) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut a prepared table into training and test rows, each in the order it came.

    With a time the test rows are the last `split.test` of them. Without, they are those whose id
    has the smallest hash: within each label for a classification, among all rows for a regression.
    A label with two rows or more has at least one on each side.

    Raises:
        DataError: there are too few rows for two parts.
    """
    if len(frame) < 2:
        raise DataError(f"{len(frame)} valid rows are too few for training and test rows")
    chosen = held_out(frame, contract, contract.data.split.test)
    train, test = frame[~chosen], frame[chosen]
    return train.reset_index(drop=True), test.reset_index(drop=True)


def held_out(frame: pd.DataFrame, contract: Contract, part: float) -> np.ndarray:
    """(rows,) bool: that part of the rows, two or more, that `split` sets apart."""
    if TIME in frame:
        chosen = np.zeros(len(frame), dtype=bool)
        chosen[len(frame) - _count(len(frame), part) :] = True
        return chosen
    rank = _hashes(frame[ID], contract.data.split.seed)
    labels = frame[contract.data.target.name] if contract.task != "regression" else None
    order = rank.groupby(labels.to_numpy()) if labels is not None else rank.groupby(lambda _: 0)
    wanted = order.transform("size").map(lambda n: _count(n, part))
    return np.asarray(order.rank(method="first") <= wanted)


def fingerprint(frame: pd.DataFrame) -> str:
    """sha256 of a prepared table's content: the same rows give the same digest whatever their
    order. `_id` does not count, as it may be made from the row's position."""
    if IMAGE in frame:
        frame = frame.assign(**{IMAGE: image_digests(frame[IMAGE])})
    names = sorted(name for name in frame.columns if name != ID)
    digest = hashlib.sha256()
    if not frame.empty:
        frame = frame.sort_values(names, kind="stable", ignore_index=True)
    for name in names:
        values = frame[name]
        digest.update(f"{name}\0{len(values)}\0".encode())
        if pd.api.types.is_datetime64_any_dtype(values.dtype):
            digest.update(values.astype("int64").to_numpy().tobytes())
        elif pd.api.types.is_numeric_dtype(values.dtype):
            # One NaN and one zero, whatever their bits were.
            numbers = np.where(values.isna(), np.nan, values.to_numpy(np.float64)) + 0.0
            digest.update(numbers.tobytes())
        else:
            digest.update(
                json.dumps(values.astype(object).where(values.notna(), None).tolist()).encode()
            )
    return digest.hexdigest()


def image_digests(images: pd.Series) -> list[str]:
    """sha256 of each image's pixels and shape."""
    return [hashlib.sha256(f"{i.shape}".encode() + i.tobytes()).hexdigest() for i in images]


def _count(rows: int, part: float) -> int:
    """How many of some rows are test rows: rounded, and none or all of them only where there is
    just one."""
    return min(max(round(rows * part), 1), rows - 1)


def _hashes(ids: pd.Series, seed: int) -> pd.Series:
    key = seed.to_bytes(8, "little", signed=True)
    return pd.Series(
        [
            int.from_bytes(hashlib.blake2b(i.encode(), digest_size=7, key=key).digest(), "little")
            for i in ids
        ],
        index=ids.index,
        dtype=np.int64,
    )
