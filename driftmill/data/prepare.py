"""The pipeline's first step: history and logged rows in, training and test rows out.

Every row that is read ends in exactly one place, and `DatasetInfo` counts them all:

    read = train + test + quarantined + replaced + held out + older + imageless

`replaced` rows have the same id as a newer one, `held out` rows of the log stand in the fixed test
set already, `older` rows fell out because the contract learns from the newest `train.rows` only,
`imageless` rows of the log are of an image task whose log kept no image of them.

Of an image task the pixels lie beside the tables, `train-images.npy` and `test-images.npy`: uint8
(rows, channels, height, width), in the tables' order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from driftmill.contract import Contract
from driftmill.data import profile, schema, sources, split
from driftmill.data.schema import DataError
from driftmill.features import EMBEDDING, ID, IMAGE, TIME
from driftmill.store import Store, write_atomic

__all__ = ["DatasetInfo", "Prepared", "prepare", "read"]

#: Column of the quarantine that says where a row came from: `history`, `log` or `test`.
ORIGIN = "_origin"
_AT = "_at"


class DatasetInfo(BaseModel):
    """What a data set is made of; `dataset.json`, and the `data` of a bundle's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    """Digest of training and test rows; the same rows give the same one."""
    test_fingerprint: str
    """Digest of the test rows alone."""
    source_sha256: str
    """Digest of the source's file, or of its table where it is not a file."""
    rows: int
    """Training and test rows together."""
    train_rows: int
    test_rows: int
    quarantined: int
    """Rows that break the contract."""
    reasons: dict[str, int]
    """Quarantined rows of each reason; a row may have several."""
    history_rows: int
    """Rows of the source among training and test rows."""
    logged_rows: int
    """Rows of the inference log among them."""
    read_rows: int
    """All rows that were read."""
    replaced_rows: int
    """Rows left out because a newer one has the same id."""
    held_out_rows: int
    """Logged rows left out because they stand in the fixed test set."""
    older_rows: int
    """Rows left out because there are `train.rows` newer ones."""
    imageless_rows: int = 0
    """Logged rows left out because the log has no image of them."""
    from_time: datetime | None
    """Time of the first row, where rows have a time."""
    to_time: datetime | None
    """Time of the last row."""
    test_from_time: datetime | None
    """Time of the first test row."""
    log_until: datetime | None
    """When the newest logged row that is used was predicted."""


@dataclass(frozen=True)
class Prepared:
    """A prepared data set."""

    train: pd.DataFrame
    test: pd.DataFrame
    info: DatasetInfo


def prepare(contract: Contract, out: Path, store: Store | None = None) -> DatasetInfo:
    """Read, validate, split and profile the data of a contract.

    Args:
        contract: says where the data is and what it must look like.
        out: folder for `train.parquet`, `test.parquet`, `quarantine.parquet`, `profile.json`,
            `profile.html` and `dataset.json`, and of images `train-images.npy` and
            `test-images.npy`; created.
        store: where the inference log is; its labelled rows are learnt from too. None: history
            alone.

    Raises:
        DataError: the source cannot be used, or too few rows are left.
        QuarantineError: too many rows are bad; `quarantine.parquet` has been written.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = contract.data
    raw, digest = sources.read(data.source, contract)
    if data.time is not None and data.time.until is not None:
        # Rows whose time cannot be told count as history, so that they end in the quarantine.
        raw = raw[~(schema.times(raw, contract) >= data.time.until)]
        if raw.empty:
            raise DataError(
                f"{data.source.uri} has no rows before data.time.until {data.time.until}"
            )
    parts = {"history": schema.validate(raw, contract, origin="source")}
    del raw  # images are large: those that the model sees are enough
    logged, imageless = _logged(contract, store)
    if logged is not None:
        parts["log"] = schema.validate(logged, contract, logged=True)
    if data.test is not None:
        fixed = sources.load(data.test, contract)
        parts["test"] = schema.validate(fixed, contract, origin="test")

    quarantines = [p.quarantine.assign(**{ORIGIN: origin}) for origin, p in parts.items()]
    bad = sum(map(len, quarantines))
    checked_rows = bad + sum(len(p.valid) for p in parts.values())
    reasons = schema.count_reasons(quarantines)
    where = out / "quarantine.parquet"
    _storable(pd.concat(quarantines, ignore_index=True)).to_parquet(where, index=False)
    schema.check_fraction(reasons, bad, checked_rows, data.quarantine.max_fraction, str(where))

    seen = {} if logged is None else dict(zip(logged[ID], logged[_AT], strict=True))
    rows = pd.concat(
        [p.valid.assign(**{ORIGIN: origin}) for origin, p in parts.items() if origin != "test"],
        ignore_index=True,
    )
    unique = rows.drop_duplicates(ID, keep="last")
    known = unique[ID].isin(parts["test"].valid[ID]) if "test" in parts else unique[ID].isna()
    usable = unique[~known]
    if TIME in usable:
        usable = usable.sort_values(TIME, kind="stable")
    newest = usable.tail(contract.train.rows or len(usable))

    if "test" in parts:
        train, test = newest.reset_index(drop=True), parts["test"].valid
    else:
        train, test = split.split(newest, contract)
    _check(train, test, contract)
    used = [seen[i] for i in newest.loc[newest[ORIGIN] == "log", ID]]
    logged_rows = len(used)
    train, test = train.drop(columns=ORIGIN), test.drop(columns=ORIGIN, errors="ignore")

    prints = split.fingerprint(train), split.fingerprint(test)
    both = pd.concat([train[TIME], test[TIME]]) if TIME in train else None
    info = DatasetInfo(
        fingerprint=hashlib.sha256("".join(prints).encode()).hexdigest(),
        test_fingerprint=prints[1],
        source_sha256=digest,
        rows=len(train) + len(test),
        train_rows=len(train),
        test_rows=len(test),
        quarantined=bad,
        reasons=reasons,
        history_rows=len(newest) - logged_rows,
        logged_rows=logged_rows,
        read_rows=checked_rows + imageless,
        replaced_rows=len(rows) - len(unique),
        held_out_rows=int(known.sum()),
        older_rows=len(usable) - len(newest),
        imageless_rows=imageless,
        from_time=None if both is None else both.min().to_pydatetime(),
        to_time=None if both is None else both.max().to_pydatetime(),
        test_from_time=None if both is None else test[TIME].min().to_pydatetime(),
        log_until=max(used).to_pydatetime() if used else None,
    )
    for name, part in (("train", train), ("test", test)):
        if contract.is_vision:
            _write_images(out / f"{name}-images.npy", part[IMAGE])
        table = part.drop(columns=IMAGE, errors="ignore")
        table.to_parquet(out / f"{name}.parquet", index=False)
    profile.write(out, contract, train, test)
    # Last: a folder with this file is whole.
    write_atomic(out / "dataset.json", info.model_dump_json(indent=1).encode())
    return info


def read(folder: Path) -> Prepared:
    """What `prepare` wrote; images are read from their file when they are looked at. Raises
    DataError where the folder does not hold all of it."""
    try:
        info = DatasetInfo.model_validate_json((folder / "dataset.json").read_bytes())
        train, test = (_read_part(folder, name) for name in ("train", "test"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no prepared data: {error.filename} is missing") from None
    return Prepared(train, test, info)


def _read_part(folder: Path, name: str) -> pd.DataFrame:
    frame = pd.read_parquet(folder / f"{name}.parquet")
    path = folder / f"{name}-images.npy"
    if path.exists():
        from driftmill.vision import images  # needs Pillow, which tables do not

        pixels = np.asarray(np.load(path, mmap_mode="r"))
        frame[IMAGE] = images.column(pixels, len(pixels))
    return frame


def _write_images(path: Path, column: pd.Series) -> None:
    """Images of one shape as one array, row by row: they are never in memory twice."""
    shape = (len(column), *column.iloc[0].shape)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    places = np.asarray(file)
    for place, pixels in zip(places, column, strict=True):
        place[...] = pixels
    file.flush()


def _logged(contract: Contract, store: Store | None) -> tuple[pd.DataFrame | None, int]:
    """Labelled rows of the inference log in the shape of the source, oldest first, or None; and how
    many were left out because their image is not there."""
    if store is None or not store.list(f"{contract.model}/log/predictions"):
        return None, 0
    from driftmill.serving import log

    rows = log.labelled(store, contract.model, without=[EMBEDDING])
    imageless = 0
    if contract.is_vision and not rows.empty:
        there = rows.reindex(columns=[IMAGE])[IMAGE].notna()
        rows, imageless = rows[there], int((~there).sum())
    if rows.empty:
        return None, imageless
    rows = rows.sort_values(_AT, kind="stable", ignore_index=True)
    target = contract.data.target.name
    names = [c.name for c in contract.data.columns]
    names += [IMAGE] if contract.is_vision else []
    # A column that the contract gained later is missing in older rows.
    raw = rows.reindex(columns=[*names, _AT]).assign(**{target: rows["_label"]})
    # A request need not name the row or its time: then it is the prediction's.
    raw[ID] = rows[ID].where(rows[ID].notna(), rows["_prediction_id"])
    if contract.data.time is not None:
        given = pd.to_datetime(rows[TIME], utc=True)
        raw[TIME] = given.fillna(pd.to_datetime(rows[_AT], utc=True)).astype("datetime64[ns, UTC]")
    return raw, imageless


def _check(train: pd.DataFrame, test: pd.DataFrame, contract: Contract) -> None:
    target = contract.data.target.name
    if train.empty or test.empty:
        raise DataError(f"{len(train)} training and {len(test)} test rows are too few")
    if contract.task != "regression" and train[target].nunique() < 2:
        raise DataError(
            f"all training rows have the same label {train[target].iloc[0]!r}; "
            "a classification needs two, so take more rows (train.rows, data.time.until)"
        )


def _storable(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of mixed types as text: Parquet has one type a column, bad rows may not. Of bytes
    there is only their number."""
    texts = {
        name: frame[name].map(_text, na_action="ignore")
        for name in frame.columns
        if frame[name].dtype == object
    }
    return frame.assign(**texts)


def _text(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
