"""Whether a window of answered rows has drifted. This is the only module that decides.

A window is compared with the reference rows of the champion's bundle, column by column: numbers
by the two-sample Kolmogorov-Smirnov test, categories by the two-sample chi-square test, missing
values by Fisher's test of two proportions, and the model's own answers like any other column. Of
images these columns are statistics, and beside them the embeddings are compared as a whole, by a
classifier that tries to tell the two sides apart. Both sides count as samples, so a small reference
makes the tests careful instead of nervous.

A column has drifted when two things hold: its test survives the Benjamini-Hochberg procedure over
all tests of the window (`monitor.false_alarm_rate`), and its effect, a distance from 0 to 1,
reaches `monitor.effect`. The first keeps noise out, the second keeps changes out that are real but
too small to matter. A window has drifted when any of its columns has; the alarm needs
`monitor.persistence` such windows in a row.

Nothing here reads or writes anything, and the same rows always give the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from scipy import stats

from driftmill import features
from driftmill.bundle import PREDICTION, SCORE
from driftmill.contract import EMBEDDING, Column, Monitor
from driftmill.features import MISSING, TIME, Signature
from driftmill.monitor import embedding

#: Name of a category that stands for all rare ones, and of one for all that the reference lacks.
#: Control characters keep them apart from real categories.
RARE, UNSEEN = "\x00rare", "\x00unseen"
#: A cell of the chi-square test needs this many expected rows; smaller ones are pooled.
EXPECTED = 5.0

Test = Literal["ks", "chi2", "classifier", "missing", "schema", "none"]
Kind = Literal["input", "prediction", "embedding"]


class Result(BaseModel):
    """Base of what the monitor finds: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnResult(Result):
    """What one column of a window shows, by the more telling of its tests."""

    name: str
    kind: Kind
    test: Test
    """Which test the next two come from; `schema`: the column is absent or of the wrong type;
    `none`: it was not tested, and `reason` says why."""
    p_value: float | None
    """Of the test alone, before the correction for many tests."""
    effect: float
    """Distance between reference and window, 0 to 1: of the distributions, or of the parts
    missing."""
    drifted: bool
    missing: float
    """Part of the window's rows without a valid value."""
    unseen: float
    """Part of the values that are categories which neither reference nor contract know."""
    out_of_range: float
    """Part of the values outside the contract's `min` and `max`."""
    reason: str = ""
    """What is wrong with the column, or why it was not tested; for people."""

    @property
    def plain_name(self) -> str:
        """What people call it."""
        return {PREDICTION: "answers", SCORE: "confidence"}.get(self.name, self.name)


class Quality(Result):
    """The metric on rows whose labels have come."""

    metric: str
    value: float
    reference: float
    """The champion's value on its test rows."""
    rows: int
    drifted: bool
    """Worse than the reference by more than `monitor.max_quality_loss`, and not by chance."""
    error: float = 0.0
    """Standard error of the difference between value and reference."""
    until: datetime
    """`_at` of the newest row."""
    streak: int = 0
    """Evaluations in a row that drifted."""
    alarm: bool = False
    started_at: datetime | None = None
    """`_at` of the oldest row of the first evaluation of the streak."""
    note: str = ""
    """Where another metric than the contract's was taken: which, and why."""


class WindowResult(Result):
    """What a window shows."""

    index: int
    version: str
    rows: int
    from_at: datetime
    to_at: datetime
    from_time: datetime | None = None
    to_time: datetime | None = None
    columns: tuple[ColumnResult, ...]
    drifted: bool
    score: float
    """Weighted mean of the effects, where a column that has not drifted counts 0."""
    features_drifted: int
    streak: int
    """Drifted windows in a row, this one included."""
    alarm: bool
    started_at: datetime | None = None
    """Start of the first drifted window of the streak; None in a calm window."""
    quality: Quality | None = None


@dataclass(frozen=True)
class Profile:
    """One column of the reference, compiled for comparison."""

    column: Column
    kind: Kind
    present: bool
    rows: int
    missing: int
    values: np.ndarray
    """Numbers: the values, sorted; embeddings: (rows, width); categories: empty."""
    counts: Mapping[str, int]
    """Categories: how often each occurs; numbers: empty."""


@dataclass(frozen=True)
class Finding:
    """One test of one column."""

    test: Test
    p_value: float
    effect: float


def compile_reference(signature: Signature, frame: pd.DataFrame) -> tuple[Profile, ...]:
    """Compile the reference rows of a bundle.

    Args:
        signature: the bundle's.
        frame: its `reference` rows, with `_prediction` and, for a classification, `_score`.

    Returns:
        One profile for each input, and one for the answers: the probability of two classes, the
        label of more, the number of a regression. Of images also the confidence in a label of
        more than two, and the embeddings.
    """
    if signature.task == "regression":
        answer = Column.model_construct(name=PREDICTION, type="float")
    elif len(signature.labels) == 2:
        answer = Column.model_construct(name=SCORE, type="float")
    else:
        answer = Column.model_construct(
            name=PREDICTION, type="category", categories=signature.labels
        )
    profiles = [_profile(column, "input", frame) for column in signature.columns]
    profiles.append(_profile(answer, "prediction", frame))
    if signature.image is not None:
        if answer.name != SCORE:
            confidence = Column.model_construct(name=SCORE, type="float")
            profiles.append(_profile(confidence, "prediction", frame))
        profiles.append(_profile_embeddings(frame))
    return tuple(profiles)


def decide(
    reference: tuple[Profile, ...],
    monitor: Monitor,
    frame: pd.DataFrame,
    *,
    index: int,
    version: str,
    previous: WindowResult | None = None,
    quality: Quality | None = None,
) -> WindowResult:
    """Judge a window.

    Args:
        reference: from `compile_reference`.
        monitor: the contract's settings.
        frame: the window's rows as in the inference log; at least one.
        index: number of the window.
        version: the champion that answered.
        previous: the result before this one; a result of another version starts no streak.
        quality: the metric on labelled rows, if there are any.
    """
    tested = [
        (_examine if profile.kind != "embedding" else _examine_embeddings)(profile, monitor, frame)
        for profile in reference
    ]
    limit = _benjamini_hochberg(
        [f.p_value for _, findings in tested for f in findings], monitor.false_alarm_rate
    )
    columns = tuple(
        _conclude(result, findings, limit, monitor.effect) for result, findings in tested
    )
    drifted = any(c.drifted for c in columns)
    weights = [
        0.0 if c.name in monitor.ignore else monitor.weights.get(c.name, 1.0) for c in columns
    ]
    total = sum(weights)
    hits = sum(w * c.effect for w, c in zip(weights, columns, strict=True) if c.drifted)
    at = pd.to_datetime(frame["_at"], utc=True)
    times = pd.to_datetime(frame[TIME], utc=True).dropna() if TIME in frame else at.iloc[:0]
    streak, started_at = 0, None
    if drifted:
        streak, started_at = 1, at.min().to_pydatetime()
        if previous is not None and previous.version == version and previous.streak:
            streak, started_at = previous.streak + 1, previous.started_at
    return WindowResult(
        index=index,
        version=version,
        rows=len(frame),
        from_at=at.min().to_pydatetime(),
        to_at=at.max().to_pydatetime(),
        from_time=times.min().to_pydatetime() if len(times) else None,
        to_time=times.max().to_pydatetime() if len(times) else None,
        columns=columns,
        drifted=drifted,
        score=hits / total if total else 0.0,
        features_drifted=sum(c.drifted for c in columns if c.kind == "input"),
        streak=streak,
        alarm=streak >= monitor.persistence,
        started_at=started_at,
        quality=quality,
    )


def ks(reference: np.ndarray, window: np.ndarray) -> Finding:
    """Two-sample Kolmogorov-Smirnov test.

    Args:
        reference: (m,) sorted, no NaN.
        window: (n,) no NaN.
    """
    m, n = len(reference), len(window)
    values = np.sort(window)
    # Between two values of the window its distribution is flat and the reference's rises, so the
    # largest distance lies at one of the window's values or just before it.
    distance = 0.0
    for side in ("left", "right"):
        ours = np.searchsorted(values, values, side=side) / n
        theirs = np.searchsorted(reference, values, side=side) / m
        distance = max(distance, float(np.abs(ours - theirs).max()))
    effective = max(1, round(m * n / (m + n)))
    return Finding("ks", min(1.0, float(stats.kstwo.sf(distance, effective))), distance)


def chi2(reference: Mapping[str, int], window: Mapping[str, int]) -> Finding | None:
    """Two-sample chi-square test of category counts; the effect is the total variation distance
    between the same (pooled) cells. None where fewer than two cells remain."""
    m, n = sum(reference.values()), sum(window.values())
    smaller = min(m, n) / (m + n)
    cells: dict[str, tuple[int, int]] = {}
    for name in sorted({*reference, *window}):
        theirs, ours = reference.get(name, 0), window.get(name, 0)
        few = (theirs + ours) * smaller < EXPECTED
        cell = UNSEEN if not theirs else RARE if few else name
        before = cells.get(cell, (0, 0))
        cells[cell] = (before[0] + theirs, before[1] + ours)
    # A pool that is itself too small joins the other pool, else the smallest category.
    for pool in (UNSEEN, RARE):
        if pool in cells and sum(cells[pool]) * smaller < EXPECTED and len(cells) > 1:
            theirs, ours = cells.pop(pool)
            into = RARE if RARE in cells else min(cells, key=lambda c: (sum(cells[c]), c))
            cells[into] = (cells[into][0] + theirs, cells[into][1] + ours)
    if len(cells) < 2:
        return None
    table = np.array(list(cells.values()), dtype=np.float64)
    expected = table.sum(axis=1, keepdims=True) * np.array([m, n]) / (m + n)
    statistic = float(((table - expected) ** 2 / expected).sum())
    effect = float(np.abs(table[:, 0] / m - table[:, 1] / n).sum() / 2)
    return Finding("chi2", float(stats.chi2.sf(statistic, len(table) - 1)), effect)


def missing(reference: tuple[int, int], window: tuple[int, int]) -> Finding:
    """Fisher's exact test that the same part is missing on both sides; the effect is the
    difference of the two parts.

    Args:
        reference: rows missing, rows.
        window: the same.
    """
    (a, m), (b, n) = reference, window
    p_value = float(stats.fisher_exact([[a, m - a], [b, n - b]]).pvalue)
    return Finding("missing", min(1.0, p_value), abs(a / m - b / n))


def _profile(column: Column, kind: Kind, frame: pd.DataFrame) -> Profile:
    present = column.name in frame
    values = _values(column, frame[column.name])[0] if present else np.empty(0)
    as_counts = column.type in ("category", "bool")
    return Profile(
        column=column,
        kind=kind,
        present=present,
        rows=len(frame),
        missing=len(frame) - len(values),
        values=np.empty(0) if as_counts else np.sort(values),
        counts=_counts(values) if as_counts else {},
    )


def _profile_embeddings(frame: pd.DataFrame) -> Profile:
    values = np.empty((0, 0))
    if features.EMBEDDING in frame:
        _, values = embedding.read(frame[features.EMBEDDING])
    return Profile(
        column=Column.model_construct(name=EMBEDDING, type="float"),
        kind="embedding",
        present=features.EMBEDDING in frame,
        rows=len(frame),
        missing=len(frame) - len(values),
        values=values[embedding.sample(len(values))],
        counts={},
    )


def _values(column: Column, series: pd.Series) -> tuple[np.ndarray, int]:
    """The valid values of a column, and how many are neither valid nor missing."""
    if column.type == "category":
        texts = series[series.notna()].map(str)
        return texts[texts != MISSING].to_numpy(dtype=object), 0
    if series.dtype == np.float64:
        numbers = series.to_numpy()
        absent = np.isnan(numbers)
    else:
        absent = series.isna().to_numpy()
        numbers = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    # The model sees float32, and so does the reference. Without this cast a value such as 0.1
    # would lie beside itself.
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32).astype(np.float64)
    valid = np.isfinite(numbers)
    return numbers[valid], int((~valid & ~absent).sum())


def _counts(values: np.ndarray) -> Mapping[str, int]:
    return Counter(map(str, values.tolist()))


def _examine(
    profile: Profile, monitor: Monitor, frame: pd.DataFrame
) -> tuple[ColumnResult, list[Finding]]:
    """Describe a column of a window, and test it where that is possible."""
    column, rows = profile.column, len(frame)
    result = ColumnResult(
        name=column.name,
        kind=profile.kind,
        test="none",
        p_value=None,
        effect=0.0,
        drifted=False,
        missing=1.0,
        unseen=0.0,
        out_of_range=0.0,
    )
    values, wrong = np.empty(0), 0
    if column.name in frame:
        values, wrong = _values(column, frame[column.name])
    as_counts = column.type in ("category", "bool")
    counts = _counts(values) if as_counts else {}
    reasons: list[str] = []
    if column.name not in frame:
        reasons.append("the column is absent from the window")
    elif wrong:
        reasons.append(f"{wrong} of {rows} values are not finite numbers")
    elif not len(values):
        reasons.append("every value is missing")
    result = result.model_copy(
        update={
            "missing": 1 - len(values) / rows,
            "unseen": _unseen(profile, counts),
            "out_of_range": _out_of_range(column, values),
        }
    )

    findings: list[Finding] = []
    if column.name in monitor.ignore:
        reasons.append("ignored by the contract")
    elif not profile.present or not profile.rows:
        reasons.append("the reference has no such column")
    elif rows < monitor.min_rows:
        reasons.append(f"not tested: {rows} rows, monitor.min_rows is {monitor.min_rows}")
    else:
        lost = rows - len(values)
        if profile.missing or lost:
            finding = missing((profile.missing, profile.rows), (lost, rows))
            broken = column.name not in frame or wrong > lost / 2
            findings.append(
                Finding("schema", finding.p_value, finding.effect) if broken else finding
            )
        if profile.missing == profile.rows:
            reasons.append("not tested: every value of the reference is missing")
        elif 0 < len(values) < monitor.min_rows:
            reasons.append(
                f"distribution not tested: {len(values)} values, "
                f"monitor.min_rows is {monitor.min_rows}"
            )
        elif len(values):
            if not as_counts:
                findings.append(ks(profile.values, values))
            elif counted := chi2(profile.counts, counts):
                findings.append(counted)
    return result.model_copy(update={"reason": "; ".join(reasons)}), findings


def _examine_embeddings(
    profile: Profile, monitor: Monitor, frame: pd.DataFrame
) -> tuple[ColumnResult, list[Finding]]:
    """Describe the embeddings of a window, and test them where that is possible. Missing ones are
    a matter of the service, not of the world, and no drift."""
    old, new = profile.values, np.empty((0, 0))
    if features.EMBEDDING in frame:
        _, new = embedding.read(frame[features.EMBEDDING], old.shape[1])
    findings: list[Finding] = []
    reason = ""
    if EMBEDDING in monitor.ignore:
        reason = "ignored by the contract"
    elif min(len(old), len(new)) < monitor.min_rows:
        side, rows = (
            ("reference", len(old)) if len(old) < monitor.min_rows else ("window", len(new))
        )
        reason = (
            f"not tested: {rows} valid embeddings in the {side}, "
            f"monitor.min_rows is {monitor.min_rows}"
        )
    else:
        found = embedding.separate(old, new[embedding.sample(len(new))])
        findings.append(Finding("classifier", found.p_value, found.effect))
    result = ColumnResult(
        name=EMBEDDING,
        kind="embedding",
        test="none",
        p_value=None,
        effect=0.0,
        drifted=False,
        missing=1 - len(new) / len(frame),
        unseen=0.0,
        out_of_range=0.0,
        reason=reason,
    )
    return result, findings


def _unseen(profile: Profile, counts: Mapping[str, int]) -> float:
    if profile.column.type != "category" or not counts:
        return 0.0
    known = {*profile.counts, *profile.column.categories}
    return sum(n for name, n in counts.items() if name not in known) / sum(counts.values())


def _out_of_range(column: Column, values: np.ndarray) -> float:
    if not column.is_numeric or not len(values):
        return 0.0
    low = -np.inf if column.min is None else np.float32(column.min)
    high = np.inf if column.max is None else np.float32(column.max)
    return float(((values < low) | (values > high)).mean())


def _benjamini_hochberg(p_values: list[float], rate: float) -> float:
    """The largest p-value that counts as a discovery; -1 where none does."""
    ordered = np.sort(p_values)
    passed = np.flatnonzero(ordered <= rate * np.arange(1, len(ordered) + 1) / len(ordered))
    return float(ordered[passed[-1]]) if len(passed) else -1.0


def _conclude(
    result: ColumnResult, findings: list[Finding], limit: float, floor: float
) -> ColumnResult:
    """Take over the most telling test of a column: a drifted one first, then the larger effect."""
    if not findings:
        return result

    def drifted(finding: Finding) -> bool:
        return finding.p_value <= limit and finding.effect >= floor

    best = max(findings, key=lambda f: (drifted(f), f.effect))
    return result.model_copy(
        update={
            "test": best.test,
            "p_value": best.p_value,
            "effect": best.effect,
            "drifted": drifted(best),
        }
    )
