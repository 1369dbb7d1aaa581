"""Validation at the boundary: raw rows in, typed rows and quarantined rows out, none lost.

Text is stripped, aliases are applied and values are turned into the contract's types here; what
cannot be turned is a wrong type. Pandera then checks the typed table against a schema made from
the contract. Every row that breaks a rule goes to the quarantine as it came, with all its reasons.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from driftmill.contract import Column, Contract
from driftmill.features import EMBEDDING, ID, IMAGE, ORIGINAL, TIME

if TYPE_CHECKING:
    import pandera.pandas as pa

#: Column of a quarantined row that says why; several reasons are joined by `SEPARATOR`.
REASON = "_reason"
SEPARATOR = "; "

#: Statistics that are of an image as it came, and so cannot be told from the pixels in the log.
SIZES = ("width", "height", "aspect")

_BOOLEANS = {"true": 1.0, "t": 1.0, "yes": 1.0, "y": 1.0, "1": 1.0, "1.0": 1.0} | {
    "false": 0.0,
    "f": 0.0,
    "no": 0.0,
    "n": 0.0,
    "0": 0.0,
    "0.0": 0.0,
}


class DataError(ValueError):
    """Data that cannot be used; the message says why and what to do."""


class QuarantineError(DataError):
    """More bad rows than the contract allows. `reasons` counts the rows of each reason."""

    def __init__(self, message: str, reasons: dict[str, int]) -> None:
        self.reasons = reasons
        super().__init__(message)


@dataclass(frozen=True)
class Validated:
    """The two parts of a raw table; together they have all of its rows."""

    valid: pd.DataFrame
    """Prepared table: inputs, target, `_id` and, where the contract has a time, `_time`."""
    quarantine: pd.DataFrame
    """The other rows as they came, and `_reason`."""


def validate(
    raw: pd.DataFrame,
    contract: Contract,
    *,
    origin: str = "",
    logged: bool = False,
    originals: bool = False,
) -> Validated:
    """Check and type every row.

    Args:
        raw: has the contract's inputs, target, id and time columns; more are kept for the
            quarantine only. Its index is the row's position, from which `_id` is made where the
            contract names no id. Of images it has `_image` (see `driftmill.vision.sources`; in
            the log the pixels as PNG) and no inputs: they are measured here.
        contract: what the rows must look like.
        origin: what the position counts in (`source` or `test`), so that rows of two sources get
            different ids.
        logged: the rows come from the inference log: `_id` and `_time` are there already, and an
            id may come twice.
        originals: put the bytes that each image came as into `_original`.

    Returns:
        Valid rows sorted by `_time` (else in the order they came), and quarantined rows. Of images
        the valid ones have `_image` as the model sees it, and the others none.
    """
    raw = raw.reset_index(names="_position")
    as_it_came = raw.drop(columns=["_position", IMAGE, EMBEDDING], errors="ignore")
    broken: list[tuple[np.ndarray, str]] = []
    absent: dict[str, np.ndarray] = {}
    pixels = None
    if contract.is_vision:
        raw, pixels, broken = _images(raw, contract, logged, originals)
        unfit = np.any([mask for mask, _ in broken], axis=0) if broken else np.zeros(1, dtype=bool)
        absent = {c.name: unfit for c in contract.data.columns}
    typed, wrong = _inputs(raw, contract)
    broken += [(mask, f"{name}: {_WRONG[kind]}") for name, (kind, mask) in wrong.items()]
    absent = {name: mask for name, (_, mask) in wrong.items()} | absent
    broken += _failures(typed, contract, absent)
    if pixels is not None:
        typed[IMAGE] = pixels
        if originals:
            typed[ORIGINAL] = raw[ORIGINAL]

    typed[ID], id_problems = _ids(raw, contract, origin, logged)
    broken += id_problems
    if contract.data.time is not None:
        typed[TIME] = raw[TIME] if logged else times(raw, contract)
        broken.append((typed[TIME].isna().to_numpy(), "time: missing or cannot be parsed"))

    reasons = np.full(len(raw), "", dtype=object)
    for mask, text in broken:
        reasons[mask] = [f"{r}{SEPARATOR}{text}" if r else text for r in reasons[mask]]
    bad = reasons != ""

    valid = typed[~bad].copy()
    for column in contract.data.numeric:
        # The model computes in float32: training and serving must see the same numbers.
        valid[column.name] = valid[column.name].astype(np.float32).astype(np.float64)
    if TIME in valid:
        valid = valid.sort_values(TIME, kind="stable")
    quarantine = as_it_came[bad].assign(**{REASON: reasons[bad]})
    return Validated(valid.reset_index(drop=True), quarantine.reset_index(drop=True))


def times(raw: pd.DataFrame, contract: Contract) -> pd.Series:
    """When each raw row happened (datetime64[ns, UTC]); NaT where that cannot be told."""
    time = contract.data.time
    assert time is not None
    columns = [raw[name] for name in time.columns]
    if len(columns) == 1 and pd.api.types.is_datetime64_any_dtype(columns[0]):
        parsed = pd.to_datetime(columns[0], utc=True)
    else:
        texts = [_texts(values) for values in columns]
        joined = pd.Series(
            [None if None in parts else " ".join(parts) for parts in zip(*texts, strict=True)],
            index=raw.index,
            dtype=object,
        )
        parsed = pd.to_datetime(joined, format=time.format or "ISO8601", utc=True, errors="coerce")
    return parsed.astype("datetime64[ns, UTC]")


def labels(raw: pd.DataFrame, contract: Contract) -> pd.Series:
    """Labels of a classification's raw rows as text, aliases applied; None where missing."""
    target = contract.data.target
    return _aliased(raw[target.name], target.aliases)


def count_reasons(quarantines: Iterable[pd.DataFrame]) -> dict[str, int]:
    """How many rows each reason applies to, most frequent first."""
    texts = [reason for table in quarantines for reason in table[REASON]]
    counts = pd.Series([r for text in texts for r in text.split(SEPARATOR)], dtype=object)
    return {str(reason): int(n) for reason, n in counts.value_counts().items()}


def check_fraction(reasons: dict[str, int], bad: int, rows: int, limit: float, where: str) -> None:
    """Raise QuarantineError where more than `limit` of `rows` rows are bad.

    Args:
        reasons: rows by reason.
        bad: quarantined rows.
        rows: all rows.
        limit: `data.quarantine.max_fraction`.
        where: the quarantine file, for the message.
    """
    if bad <= limit * rows:
        return
    listed = ", ".join(f"{reason} ({n})" for reason, n in list(reasons.items())[:8])
    more = f" and {len(reasons) - 8} more" if len(reasons) > 8 else ""
    raise QuarantineError(
        f"{bad} of {rows} rows ({bad / rows:.1%}) break the contract, more than "
        f"data.quarantine.max_fraction {limit:.1%} allows: {listed}{more}. "
        f"See {where} for each row, then mend the source or the contract.",
        reasons,
    )


def _images(
    raw: pd.DataFrame, contract: Contract, logged: bool, originals: bool
) -> tuple[pd.DataFrame, np.ndarray, list[tuple[np.ndarray, str]]]:
    """The raw table with the images' statistics, an object array of the images, and which rows'
    images are not taken, and why."""
    # Built on this module, and only image tasks need Pillow.
    from driftmill.vision import images, sources

    image = contract.data.image
    assert image is not None
    contents = raw[IMAGE].to_list()
    if originals:
        contents = [sources.encoded(content, image) for content in contents]
        raw = raw.assign(**{ORIGINAL: contents})
    if logged:
        # The pixels that the model saw: the limits are for what comes from outside.
        image = image.model_copy(
            update={"formats": ("png",), "max_pixels": 2**31, "max_bytes": 2**31}
        )
    pixels, found, reasons = sources.open_all(contents, image)
    if logged:
        found = {name: found[name] for name in found if name not in SIZES}
    broken = [(reasons == r, f"image: {r}") for r in sorted(set(reasons) - {""})]
    return raw.assign(**found), images.column(pixels, len(pixels)), broken


#: What a value of the wrong type is not.
_WRONG = {
    "float": "not a number",
    "int": "not a whole number",
    "bool": "not true or false",
}


def _inputs(
    raw: pd.DataFrame, contract: Contract
) -> tuple[pd.DataFrame, dict[str, tuple[str, np.ndarray]]]:
    """Inputs and target in their types, and for each number column the rows that are not one."""
    typed: dict[str, Any] = {}
    wrong: dict[str, tuple[str, np.ndarray]] = {}
    for column in contract.data.columns:
        if column.is_numeric:
            typed[column.name], mask = _numbers(raw[column.name], column.type)
            wrong[column.name] = (column.type, mask)
        else:
            typed[column.name] = _aliased(raw[column.name], column.aliases)
    target = contract.data.target
    if contract.task != "regression":
        typed[target.name] = labels(raw, contract)
    else:
        typed[target.name], mask = _numbers(raw[target.name], "float")
        wrong[target.name] = ("float", mask)
    return pd.DataFrame(typed), wrong


def _texts(values: pd.Series) -> pd.Series:
    """Values as stripped text, None where missing. Whole numbers lose their `.0`, truth values
    are written as in JSON: a category must read the same from Parquet as from a request."""
    if pd.api.types.is_bool_dtype(values.dtype):
        texts = values.map({True: "true", False: "false"})
    elif pd.api.types.is_float_dtype(values.dtype):
        texts = values.map(lambda v: str(int(v)) if v.is_integer() else str(v), na_action="ignore")
    else:
        texts = values.astype(object).map(_text, na_action="ignore")
    texts = texts.astype(object)
    return texts.where(texts.notna() & (texts != ""), None)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _aliased(values: pd.Series, aliases: dict[str, str]) -> pd.Series:
    texts = _texts(values)
    return texts.map(lambda t: aliases.get(t, t), na_action="ignore") if aliases else texts


def _numbers(values: pd.Series, kind: str) -> tuple[pd.Series, np.ndarray]:
    """Values as float64 (NaN missing), and which of them are not of the type."""
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_complex_dtype(values):
        numbers = pd.Series(values.to_numpy(np.float64, na_value=np.nan), index=values.index)
        given = numbers.notna()
    else:
        texts = _texts(values)
        given = texts.notna()
        if kind == "bool":
            numbers = texts.map(lambda t: _BOOLEANS.get(t.lower()), na_action="ignore").astype(
                np.float64
            )
        else:
            numbers = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    wrong = given & numbers.isna()
    if kind == "bool":
        wrong |= given & ~numbers.isin([0.0, 1.0])
    elif kind == "int":
        wrong |= np.isfinite(numbers) & (numbers != np.floor(numbers))
    return numbers.mask(wrong), wrong.to_numpy()


def _ids(
    raw: pd.DataFrame, contract: Contract, origin: str, logged: bool
) -> tuple[pd.Series, list[tuple[np.ndarray, str]]]:
    if logged:
        return raw[ID], []
    name = contract.data.id
    if name is None:
        prefix = hashlib.sha256(origin.encode()).hexdigest()[:8]
        return pd.Series([f"{prefix}-{i}" for i in raw["_position"]], dtype=object), []
    ids = _texts(raw[name])
    return ids, [
        (ids.isna().to_numpy(), f"{name}: missing id"),
        ((ids.notna() & ids.duplicated(keep="first")).to_numpy(), f"{name}: duplicate id"),
    ]


def _failures(
    typed: pd.DataFrame, contract: Contract, wrong: dict[str, np.ndarray]
) -> list[tuple[np.ndarray, str]]:
    """What Pandera finds: rows and reason, in the order of the contract's columns."""
    from pandera.errors import SchemaErrors

    try:
        _schema(contract).validate(typed, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
    else:
        return []
    found = []
    for (name, check), group in cases.groupby(["column", "check"], sort=False):
        mask = np.zeros(len(typed), dtype=bool)
        mask[group["index"].to_numpy(dtype=np.int64)] = True
        reason = check
        if check == "not_nullable":
            # A value of the wrong type was taken out: it is not missing as well.
            mask &= ~wrong.get(name, np.zeros(1, dtype=bool))
            reason = "missing label" if name == contract.data.target.name else "missing value"
        if mask.any():
            found.append((mask, f"{name}: {reason}"))
    return found


def _schema(contract: Contract) -> pa.DataFrameSchema:
    """The contract's inputs and target as a Pandera schema; the error of a check is its reason."""
    import pandera.pandas as pa

    target = contract.data.target
    columns = {c.name: _column(c) for c in contract.data.columns}
    if contract.task != "regression":
        checks = [_member(target.labels, "not one of the labels")] if target.labels else []
        columns[target.name] = pa.Column(object, checks, nullable=False)
    else:
        bounds = _bounds(target.min, target.max)
        if target.transform == "log1p":
            bounds.append(pa.Check(lambda s: s > -1, error="too small for log1p"))
        columns[target.name] = pa.Column(float, [*bounds, _finite()], nullable=False)
    return pa.DataFrameSchema(columns)


def _column(column: Column) -> pa.Column:
    import pandera.pandas as pa

    if column.is_numeric:
        checks = [*_bounds(column.min, column.max), _finite()]
        return pa.Column(float, checks, nullable=column.nullable)
    reject = column.unknown == "reject"
    checks = [_member(column.categories, "unknown category")] if reject else []
    return pa.Column(object, checks, nullable=column.nullable)


def _bounds(low: float | None, high: float | None) -> list[pa.Check]:
    import pandera.pandas as pa

    checks = []
    if low is not None:
        checks.append(pa.Check.ge(low, error=f"below min {low:g}"))
    if high is not None:
        checks.append(pa.Check.le(high, error=f"above max {high:g}"))
    return checks


def _finite() -> pa.Check:
    import pandera.pandas as pa

    def finite(values: pd.Series) -> pd.Series:
        # In float32: 1e39 is a number in the file and infinite in the model.
        with np.errstate(over="ignore"):
            return values.isna() | np.isfinite(values.astype(np.float32))

    return pa.Check(finite, error="infinite number")


def _member(valid: tuple[str, ...], reason: str) -> pa.Check:
    import pandera.pandas as pa

    return pa.Check.isin(valid, error=reason)
