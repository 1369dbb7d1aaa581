"""Metrics: how good a model's output is, on a set of rows and on many resamples of it at once.

Every metric is written once, for weighted rows: `score` weighs each row 1, `bootstrap` weighs a row
by how often a resample drew it. So both always agree, and a thousand resamples of ten thousand rows
take about a second: nothing is sorted or predicted twice.

`y` holds int codes into the labels and `output` probabilities (rows, labels) for a classification;
both are floats of shape (rows,) for a regression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from driftmill.contract import METRICS, Task

#: Probabilities are kept this far from 0 in `log_loss`, so that one sure mistake costs 16, not
#: infinity. It is about the resolution of the float32 that models answer with.
SMALLEST = 1e-7
#: Weights (resamples x rows) that are worked on at a time: 8 MB as float64, fits in cache.
_CHUNK = 1_000_000


def score(name: str, y: np.ndarray, output: np.ndarray) -> float:
    """One metric of a model's output.

    Args:
        name: one of `contract.METRICS`.
        y: (rows,) the truth: int codes into the labels, or numbers.
        output: (rows, labels) probabilities, or (rows,) predictions.

    Returns:
        The value; NaN where the metric is not defined on these rows (`auc` of one label only).

    Raises:
        ValueError: no such metric, no rows, shapes that do not fit, NaN in the output, or `rmsle`
            of negative truths.
    """
    return float(bootstrap(name, y, output, np.ones((1, len(y)), dtype=np.int64))[0])


def bootstrap(name: str, y: np.ndarray, output: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One metric on many resamples of the same rows.

    Args:
        name: one of `contract.METRICS`.
        y: (rows,) as for `score`.
        output: as for `score`.
        counts: (resamples, rows), how often each resample holds each row; any weights will do.

    Returns:
        (resamples,) float64, equal to `score` on the resampled rows.

    Raises:
        ValueError: as for `score`.
    """
    y, output = _checked(name, y, output)
    if counts.ndim != 2 or counts.shape[1] != len(y):
        raise ValueError(f"counts must be (resamples, {len(y)}), not {counts.shape}")
    step = max(1, _CHUNK // len(y))
    parts = [counts[i : i + step] for i in range(0, len(counts), step)]
    if name == "auc":
        ranked = [_Ranked(y == k, output[:, k]) for k in _one_vs_rest(output)]
        found = [_nan_mean(np.stack([r.auc(w) for r in ranked])) for w in parts]
    elif name == "f1":
        found = [_f1(y, output, w.astype(np.float64)) for w in parts]
    elif name == "r2":
        found = [_r2(y, output, w.astype(np.float64)) for w in parts]
    else:
        losses = _losses(name, y, output)
        means = [(w @ losses) / w.sum(axis=1) for w in parts]
        found = [np.sqrt(m) for m in means] if name in ("rmse", "rmsle") else means
    return np.concatenate(found) if found else np.empty(0)


def all_metrics(task: Task, y: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """Every metric of a task that is defined on these rows, by name."""
    numbers = task == "regression"
    names = [name for name, (_, of) in METRICS.items() if (of == "regression") == numbers]
    if "rmsle" in names and (y < 0).any():
        names.remove("rmsle")
    found = {name: score(name, y, output) for name in names}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def calibration_error(y: np.ndarray, output: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of a classification: how far, on average over rows, stated
    probability and observed frequency lie apart.

    With two labels the probability is that of the last one; with more it is that of the chosen
    label, and the frequency is how often the choice is right.

    Args:
        y: (rows,) int codes into the labels.
        output: (rows, labels) probabilities.
        bins: number of equally wide bins of the probability.
    """
    y, output = _checked("log_loss", y, output)
    if output.shape[1] == 2:
        stated, happened = output[:, 1], y == 1
    else:
        stated, happened = output.max(axis=1), output.argmax(axis=1) == y
    place = np.minimum((stated * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=stated - happened, minlength=bins)
    return float(np.abs(gap).sum() / len(y))


def encode(labels: Sequence[str], values: Iterable[object]) -> np.ndarray:
    """The truth as the metrics take it.

    Args:
        labels: a signature's labels, in the order of the model's output; empty for a regression.
        values: the target column.

    Returns:
        int64 codes into `labels`, or float64 where there are no labels.

    Raises:
        ValueError: a value that is not one of the labels.
    """
    if not labels:
        return np.asarray(list(values), dtype=np.float64)
    codes = {label: code for code, label in enumerate(labels)}
    try:
        return np.fromiter((codes[str(value)] for value in values), dtype=np.int64)
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]!r} is not one of the labels {', '.join(labels)}"
        ) from None


def _checked(name: str, y: np.ndarray, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; choose one of {', '.join(METRICS)}")
    y, output = np.asarray(y), np.asarray(output, dtype=np.float64)
    dimensions = 2 if METRICS[name][1] == "classification" else 1
    if output.ndim != dimensions or y.ndim != 1 or len(y) != len(output):
        raise ValueError(f"{name}: truth {y.shape} and output {output.shape} do not fit")
    if not len(y):
        raise ValueError(f"{name}: there are no rows to score")
    if np.isnan(output).any():
        raise ValueError(f"{name}: the model's output holds NaN")
    if name == "rmsle" and (y < 0).any():
        raise ValueError("rmsle is not defined for negative truths; use rmse or mae")
    return y, output


def _one_vs_rest(output: np.ndarray) -> Sequence[int]:
    """The labels whose AUC counts: the last of two, else each of them."""
    return (1,) if output.shape[1] == 2 else range(output.shape[1])


class _Ranked:
    """Rows sorted once by a score, for the AUC under any weights."""

    def __init__(self, positive: np.ndarray, by: np.ndarray) -> None:
        self.order = np.argsort(by, kind="stable")
        self.positive = positive[self.order]
        ordered = by[self.order]
        #: Where each group of equal scores begins.
        self.groups = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """(resamples,): P(a positive row scores above a negative one), ties counting half."""
        ordered = weights[:, self.order].astype(np.float64)
        positive = np.add.reduceat(ordered * self.positive, self.groups, axis=1)
        negative = np.add.reduceat(ordered * ~self.positive, self.groups, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.einsum("ij,ij->i", positive, below) / pairs)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=0) / known.sum(axis=0))


def _f1(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of the last of two labels, else the mean over the labels that occur or are predicted."""
    chosen = output.argmax(axis=1)
    values = []
    for k in _one_vs_rest(output):
        hit = weights @ ((chosen == k) & (y == k))
        either = weights @ ((chosen == k).astype(np.float64) + (y == k))
        with np.errstate(invalid="ignore"):
            values.append(2 * hit / either)
    return np.asarray(np.nan_to_num(_nan_mean(np.stack(values))))


def _r2(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Part of the variance explained; where the truth does not vary, 0, or 1 if it is met."""
    centred = y - y.mean()  # keeps the difference of squares below from cancelling
    total = weights.sum(axis=1)
    residual = weights @ (y - output) ** 2
    squares = weights @ centred**2
    spread = squares - (weights @ centred) ** 2 / total
    flat = spread <= 1e-12 * squares
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = 1 - residual / spread
    return np.asarray(np.where(flat, np.where(residual == 0, 1.0, 0.0), explained))


def _losses(name: str, y: np.ndarray, output: np.ndarray) -> np.ndarray:
    """(rows,) the loss (or gain) of each row, whose mean is the metric or its square."""
    rows = np.arange(len(y))
    if name == "accuracy":
        found = output.argmax(axis=1) == y
    elif name == "log_loss":
        found = -np.log(np.maximum(output[rows, y], SMALLEST))
    elif name == "brier":
        truth = np.eye(output.shape[1])[y]
        # For two labels the usual Brier score looks at one of them; for more, at all.
        found = ((output - truth) ** 2).sum(axis=1) / (2 if output.shape[1] == 2 else 1)
    elif name == "rmse":
        found = (y - output) ** 2
    elif name == "rmsle":
        found = (np.log1p(y) - np.log1p(np.maximum(output, 0))) ** 2
    else:
        found = np.abs(y - output)
    return np.asarray(found, dtype=np.float64)
