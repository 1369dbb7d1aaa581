"""Is one model better than another? Paired bootstrap on the same rows.

All models answer every row; a resample draws rows, not models, so that what is hard about a row
cancels. Differences are turned so that positive always means: the challenger is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel, ConfigDict

from driftmill.evaluate import metrics

#: Cells (resamples x rows) that are drawn at a time; bounds the memory to some 64 MB.
_CHUNK = 8_000_000


class Interval(BaseModel):
    """A value and a two-sided interval around it."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class Comparison(BaseModel):
    """How much better the challenger is, in units of the metric; positive is better."""

    model_config = ConfigDict(frozen=True)

    difference: float
    low: float
    high: float
    confidence: float
    """Of the two-sided interval: half of what is left lies below `low`."""
    resamples: int


@dataclass(frozen=True)
class Scores:
    """One metric of one model: on the rows themselves, and on each resample (resamples,)."""

    value: float
    resampled: np.ndarray

    @property
    def defined(self) -> bool:
        """Whether the metric has a value on the rows and on every resample."""
        return bool(np.isfinite(self.value) and np.isfinite(self.resampled).all())


def draw(
    rows: int,
    resamples: int,
    seed: int,
    strata: np.ndarray | None = None,
    in_time: bool = False,
) -> Iterator[np.ndarray]:
    """Draw bootstrap resamples, some at a time.

    Args:
        rows: how many rows there are.
        resamples: how many resamples to draw in all.
        seed: the same seed draws the same.
        strata: (rows,) int codes; each resample draws as many rows of every code as there are, so
            that none is ever without a label. None draws from all rows alike.
        in_time: the rows stand in order of time. Neighbours then tend to be alike, and drawing
            them one by one would make intervals too narrow; so blocks of neighbours are drawn,
            each as long as the cube root of the rows.

    Yields:
        (some, rows) int32: how often each resample holds each row.
    """
    rng = np.random.default_rng(seed)
    strata = np.zeros(rows, dtype=np.int64) if strata is None else strata
    groups = [np.flatnonzero(strata == code) for code in np.unique(strata)]
    step = max(1, _CHUNK // max(rows, 1))
    for begin in range(0, resamples, step):
        counts = np.zeros((min(step, resamples - begin), rows), dtype=np.int32)
        for count in counts:
            for members in groups:
                size = len(members)
                block = max(1, round(size ** (1 / 3))) if in_time else 1
                starts = rng.integers(size, size=math.ceil(size / block))
                drawn = (starts[:, None] + np.arange(block)).ravel()[:size] % size
                count[members] = np.bincount(drawn, minlength=size)
        yield counts


def score(
    names: Sequence[str],
    y: np.ndarray,
    outputs: Sequence[np.ndarray],
    draws: Iterator[np.ndarray],
) -> list[dict[str, Scores]]:
    """Several metrics of several models, all on the same resamples.

    Args:
        names: the metrics.
        y: (rows,) the truth, as `metrics.encode` gives it.
        outputs: each model's output on these rows.
        draws: from `draw`.

    Returns:
        For each model its scores by metric.
    """
    found: list[dict[str, list[np.ndarray]]] = [{name: [] for name in names} for _ in outputs]
    for counts in draws:
        for output, parts in zip(outputs, found, strict=True):
            for name in names:
                parts[name].append(metrics.bootstrap(name, y, output, counts))
    return [
        {
            name: Scores(metrics.score(name, y, output), np.concatenate(parts[name]))
            for name in names
        }
        for output, parts in zip(outputs, found, strict=True)
    ]


def interval(scores: Scores, confidence: float) -> Interval:
    """One model's metric with its two-sided percentile interval."""
    low, high = _percentiles(scores.resampled, confidence)
    return Interval(value=scores.value, low=low, high=high)


def compare(challenger: Scores, champion: Scores, sign: int, confidence: float) -> Comparison:
    """The challenger's gain over the champion, with its two-sided percentile interval.

    At confidence 0.95 the lower end is the 2.5th percentile: of challengers that are no better
    than the margin, about one in forty has its lower end above it.

    Args:
        challenger: its scores.
        champion: the other's scores of the same metric on the same resamples.
        sign: +1 where more is better, -1 where less is (`Metric.sign`).
        confidence: of the interval.
    """
    resampled = sign * (challenger.resampled - champion.resampled)
    low, high = _percentiles(resampled, confidence)
    return Comparison(
        difference=sign * (challenger.value - champion.value),
        low=low,
        high=high,
        confidence=confidence,
        resamples=len(resampled),
    )


def compare_among(
    groups: int, challenger: Scores, champion: Scores, sign: int, confidence: float
) -> Comparison:
    """As `compare`, for one of several groups of rows whose intervals should all hold at once.

    The error is shared between the groups (Bonferroni). That asks for percentiles far out in the
    tails, where a thousand resamples hold next to nothing; so the ends are normal quantiles times
    the bootstrap's standard error.
    """
    resampled = sign * (challenger.resampled - champion.resampled)
    difference = sign * (challenger.value - champion.value)
    each = 1 - (1 - confidence) / groups
    reach = NormalDist().inv_cdf((1 + each) / 2) * float(resampled.std())
    return Comparison(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        confidence=each,
        resamples=len(resampled),
    )


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
