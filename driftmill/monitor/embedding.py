"""Whether a window of images has drifted as a whole: the two-sample test of its embeddings.

A linear classifier learns to tell the reference's embeddings from the window's. Where it can do so
on rows that it has not learnt from, the two differ (Lopez-Paz and Oquab 2017; Rabanser et al.
2019). The rows that it finds easiest are those that look least like the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg, stats
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

if TYPE_CHECKING:
    import pandas as pd

#: Most rows of either side that are compared: more cost time, and find hardly more.
MOST_ROWS = 2000
#: Parts that the rows are cut into; each is scored by a classifier that learnt from the others.
FOLDS = 5
#: A direction in which the embeddings differ by less, in parts of their size, is rounding.
_FLAT = 1e-4


@dataclass(frozen=True)
class Separation:
    """How well a classifier tells a window's embeddings from the reference's."""

    p_value: float
    """Of the hypothesis that it cannot."""
    effect: float
    """Twice the area under its ROC curve less one: 0 not at all, 1 every row."""
    scores: np.ndarray
    """(n,) of the window's rows, out of fold: the higher, the less like the reference."""


def read(column: pd.Series, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode embeddings.

    Args:
        column: little-endian float16 bytes, or null.
        width: numbers in an embedding; None: that of the first.

    Returns:
        Positions (k,) of the valid rows and their embeddings (k, width) float32. A row is left out
        that is null, of another width, or not finite.
    """
    given = list(column)
    if width is None:
        width = next((len(e) // 2 for e in given if isinstance(e, bytes)), 0)
    valid = [i for i, e in enumerate(given) if isinstance(e, bytes) and len(e) == 2 * width > 0]
    numbers = np.frombuffer(b"".join(given[i] for i in valid), dtype="<f2")
    matrix = numbers.astype(np.float32).reshape(len(valid), width)
    finite = np.isfinite(matrix).all(axis=1)
    return np.array(valid, dtype=int)[finite], matrix[finite]


def sample(rows: int) -> np.ndarray:
    """Positions of at most `MOST_ROWS` of so many rows, in order, always the same."""
    if rows <= MOST_ROWS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).permutation(rows)[:MOST_ROWS])


def separate(reference: np.ndarray, window: np.ndarray) -> Separation:
    """Two-sample test of embeddings.

    The classifier is Fisher's linear discriminant with the covariance of all rows, shrunk (Ledoit
    and Wolf 2004). That covariance knows nothing of the two sides, so that only the means are
    learnt. Then the mean area under the folds' ROC curves is normal around 1/2 where nothing has
    changed, with twice the variance of a Mann-Whitney statistic of all rows: every pair of rows
    counts twice, the one learnt from and the other scored and the other way round.

    Args:
        reference: (m, width), `FOLDS` rows at least.
        window: (n, width), the same.
    """
    m, n = len(reference), len(window)
    rows = np.concatenate([reference, window]).astype(np.float64)
    spread = rows.std(axis=0)
    varied = spread > _FLAT * np.abs(rows).max(axis=0)
    if not varied.any():
        return Separation(1.0, 0.0, np.zeros(n))
    rows = (rows[:, varied] - rows[:, varied].mean(axis=0)) / spread[varied]
    ours = np.arange(m + n) >= m
    rng = np.random.default_rng(0)
    fold = np.concatenate([rng.permutation(m) % FOLDS, rng.permutation(n) % FOLDS])
    between = [
        rows[ours & (fold != k)].mean(axis=0) - rows[~ours & (fold != k)].mean(axis=0)
        for k in range(FOLDS)
    ]
    covariance, _ = ledoit_wolf(rows, assume_centered=True)
    directions = linalg.solve(covariance, np.transpose(between), assume_a="pos")
    scores, areas = np.empty(m + n), []
    for k, direction in enumerate(directions.T):
        scored = rows[fold == k] @ direction
        areas.append(roc_auc_score(ours[fold == k], scored))
        # Each fold has a classifier of its own: in units of its spread they can be compared.
        scores[fold == k] = scored / (scored.std() or 1.0)
    excess = float(np.mean(areas)) - 0.5
    error = np.sqrt(2 * (m + n) / (12 * m * n))
    return Separation(float(stats.norm.sf(excess / error)), max(0.0, 2 * excess), scores[ours])
