"""How good the champion's answers turned out to be, on the rows whose labels have come.

The inference log keeps less than the model gave: of two labels the probability of the last, of more
labels only the one chosen. A metric that cannot be computed from that is replaced by the nearest
that can, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pandas as pd
from scipy import stats

from driftmill.bundle import PREDICTION, SCORE
from driftmill.contract import METRICS, Contract
from driftmill.evaluate import metrics
from driftmill.features import Signature
from driftmill.monitor.drift import Quality

#: Column of a label in the joined log.
LABEL = "_label"
#: Resamples of the bootstrap that gives the standard error.
RESAMPLES = 200


@dataclass(frozen=True)
class Expectation:
    """What the champion's metric should be."""

    metric: str
    value: float
    rows: int
    """Rows that it was measured on; 0 where that is not known."""
    note: str


def expect(
    contract: Contract,
    signature: Signature,
    measured: dict[str, float],
    test_rows: int,
    reference: pd.DataFrame,
) -> Expectation | None:
    """The metric to watch, and what the champion had of it.

    Args:
        contract: names the metric.
        signature: the champion's.
        measured: the champion's metrics on its test rows, by name.
        test_rows: how many these were; 0 where that is not known.
        reference: the bundle's reference rows; where `measured` lacks the metric and they carry
            the target, it is computed from them.

    Returns:
        None where there is nothing to compare with.
    """
    name, note = contract.metric.name, ""
    if len(signature.labels) > 2 and name not in ("accuracy", "f1"):
        note = f"accuracy instead of {name}: the log holds no probabilities of more than two labels"
        name = "accuracy"
    if name in measured:
        return Expectation(name, measured[name], test_rows, note)
    if signature.target not in reference:
        return None
    rows = reference.rename(columns={signature.target: LABEL}).dropna(subset=[LABEL])
    truth, output = _arrays(signature, rows)
    value = metrics.score(name, truth, output) if len(truth) else np.nan
    if not np.isfinite(value):
        return None
    source = "compared with the reference rows: the bundle has no test metric"
    return Expectation(name, value, len(truth), f"{note}; {source}" if note else source)


def measure(
    expectation: Expectation,
    contract: Contract,
    signature: Signature,
    rows: pd.DataFrame,
    previous: Quality | None,
) -> Quality | None:
    """Evaluate labelled rows.

    Args:
        expectation: from `expect`.
        contract: its `monitor` section decides.
        signature: the champion's.
        rows: `_at`, `_prediction`, `_score` (classification) and `_label`, of this champion only;
            the newest `monitor.window` of them are used.
        previous: the evaluation before. It is returned unchanged until `monitor.min_rows` newer
            rows are labelled, so that the same rows never count as two bad evaluations.

    Returns:
        None where there are fewer than `monitor.min_rows` labelled rows, or the metric is not
        defined on them (`auc` of one label).
    """
    monitor = contract.monitor
    # The log takes any label of the right type: one that is not in the signature says nothing of
    # the model.
    valid = rows[LABEL].isin(signature.labels) if signature.labels else rows[LABEL].notna()
    valid &= rows[SCORE if len(signature.labels) == 2 else PREDICTION].notna()
    rows = rows[valid].sort_values("_at", kind="stable")
    new = rows if previous is None else rows[rows["_at"] > previous.until]
    if len(new) < monitor.min_rows:
        return previous
    rows = rows.tail(monitor.window)
    truth, output = _arrays(signature, rows)
    if expectation.metric == "rmsle" and (truth < 0).any():
        return previous
    value = metrics.score(expectation.metric, truth, output)
    if not np.isfinite(value):
        return previous
    error = _standard_error(expectation, truth, output)
    sign = 1 if METRICS[expectation.metric][0] == "maximize" else -1
    loss = sign * (expectation.value - value)
    surely = loss - float(stats.norm.ppf(1 - monitor.false_alarm_rate)) * error
    drifted = monitor.max_quality_loss is not None and surely > monitor.max_quality_loss
    streak, started_at = 0, None
    if drifted:
        streak, started_at = 1, _moment(rows["_at"].iloc[0])
        if previous is not None and previous.streak:
            streak, started_at = previous.streak + 1, previous.started_at
    return Quality(
        metric=expectation.metric,
        value=value,
        reference=expectation.value,
        rows=len(rows),
        drifted=drifted,
        error=error,
        until=_moment(rows["_at"].iloc[-1]),
        streak=streak,
        alarm=streak >= monitor.persistence,
        started_at=started_at,
        note=expectation.note,
    )


def _standard_error(expectation: Expectation, truth: np.ndarray, output: np.ndarray) -> float:
    """Of the difference: both the window and the rows behind the expectation are samples."""
    n = len(truth)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    error = float(np.nanstd(metrics.bootstrap(expectation.metric, truth, output, counts)))
    return error * float(np.sqrt(1 + n / expectation.rows)) if expectation.rows else error


def _arrays(signature: Signature, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Truth and output as the metrics take them."""
    truth = metrics.encode(signature.labels, rows[LABEL])
    if signature.task == "regression":
        return truth, rows[PREDICTION].to_numpy(dtype=np.float64)
    if len(signature.labels) == 2:
        score = rows[SCORE].to_numpy(dtype=np.float64)
        return truth, np.column_stack([1 - score, score])
    return truth, np.eye(len(signature.labels))[metrics.encode(signature.labels, rows[PREDICTION])]


def _moment(value: pd.Timestamp) -> datetime:
    moment: datetime = value.to_pydatetime()
    return moment
