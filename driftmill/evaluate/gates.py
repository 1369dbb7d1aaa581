"""The gate: may this model serve? A verdict with a reason, from the frozen test rows.

A challenger is promoted only if every check holds. It is compared with the champion on the same
rows, or, where there is none, with a dummy: the predictor that knows the training labels but not
the inputs. A champion that cannot score the rows, because the contract's columns or target changed
under it, is replaced by the dummy as well; the verdict says so. It could not serve the new contract
either, so waiting for a comparison that cannot be made would keep every such change out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from driftmill import features
from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.evaluate import metrics
from driftmill.evaluate.compare import (
    Comparison,
    Interval,
    Scores,
    compare,
    compare_among,
    draw,
    interval,
    score,
)

if TYPE_CHECKING:
    from driftmill.data.prepare import DatasetInfo, Prepared

#: `Verdict.against` where there is no champion to compare with.
DUMMY = "dummy"
#: What a group of rows without a value is called.
NO_VALUE = "(missing)"
#: How far the probabilities of a row may be from summing to 1.
_SUM_TOLERANCE = 1e-3
#: Rows timed one by one for the latency, and the seconds after which fewer will do.
_LATENCY_RUNS, _LATENCY_WARM_UP, _LATENCY_SECONDS = 300, 30, 3.0


class Check(BaseModel):
    """One thing that a model must show."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    detail: str
    """What was found and what was asked, in plain words with the numbers."""


class Slice(BaseModel):
    """How both models do on one group of test rows."""

    model_config = ConfigDict(frozen=True)

    column: str
    value: str
    """The category, or the range of a number."""
    rows: int
    challenger: float | None
    """Its metric on the group; null where the metric is undefined there."""
    champion: float | None
    """The champion's, or the dummy's."""
    comparison: Comparison | None
    """Null for a group that does not decide."""
    passed: bool
    """Whether the group lets the challenger through; true where it does not decide."""


class Verdict(BaseModel):
    """What the gate decided and why; `verdict.json` of a run."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reason: str
    """One sentence for people."""
    version: str
    """The challenger."""
    against: str
    """The champion's version, or `dummy`."""
    metric: str
    checks: tuple[Check, ...]
    test_rows: int
    challenger_metrics: dict[str, float]
    champion_metrics: dict[str, float]
    """The dummy's where the comparison is with the dummy."""
    challenger_intervals: dict[str, Interval]
    champion_intervals: dict[str, Interval]
    comparison: Comparison | None
    """Null where the metric is undefined on the test rows."""
    slices: tuple[Slice, ...]
    latency_ms: float
    """99th percentile of the time for one row in the ONNX session."""
    size_mb: float
    """The model file, in units of 1,000,000 bytes."""
    calibration_error: float | None
    """Classification: expected calibration error."""
    notes: tuple[str, ...]
    """What a reader should know but no check decides."""


@dataclass(frozen=True)
class _Rival:
    """Who the challenger is compared with."""

    against: str
    words: str
    output: np.ndarray
    notes: tuple[str, ...]


def judge(
    contract: Contract, prepared: Prepared, challenger: Bundle, champion: Bundle | None
) -> Verdict:
    """Decide whether the challenger may serve.

    Args:
        contract: its gates and metric decide.
        prepared: training rows (the dummy learns from their labels) and the frozen test rows.
        challenger: the new model.
        champion: the model that serves, if any.

    Returns:
        The verdict; the same inputs give the same one, but for the measured latency.
    """
    test, gates = prepared.test, contract.gates
    checks = [] if champion is None else [_is_new(challenger, champion)]
    checks.append(
        Check(
            name="test rows",
            passed=len(test) >= gates.min_test_rows,
            detail=f"{len(test)} test rows, at least {gates.min_test_rows} are needed",
        )
    )
    latency_ms, usual_ms = (
        latency(challenger, test) if len(test) else (0.0, 0.0)  # nothing to measure on
    )
    size_mb = (challenger.folder / "model.onnx").stat().st_size / 1e6
    common: dict[str, Any] = {
        "version": challenger.version,
        "metric": contract.metric.name,
        "test_rows": len(test),
        "latency_ms": latency_ms,
        "size_mb": size_mb,
    }
    last = [
        *_limit("latency", "one row takes", latency_ms, gates.max_latency_ms, "ms", usual_ms),
        *_limit("size", "the model file has", size_mb, gates.max_size_mb, "MB"),
    ]

    trouble, y, output = _answers(challenger, test)
    if trouble:
        checks += [Check(name="answers", passed=False, detail=trouble), *last]
        return Verdict(
            promote=False,
            reason=_rejection(checks),
            against=DUMMY if champion is None else champion.version,
            checks=tuple(checks),
            challenger_metrics={},
            champion_metrics={},
            challenger_intervals={},
            champion_intervals={},
            comparison=None,
            slices=(),
            calibration_error=None,
            notes=(),
            **common,
        )
    checks.append(
        Check(name="answers", passed=True, detail=f"all {len(test)} answers are valid numbers")
    )

    rival = _rival(contract, prepared, challenger, champion)
    names = list(metrics.all_metrics(contract.task, y, output))
    scored, other = score(names, y, [output, rival.output], _draws(contract, y))
    comparison = _compared(contract, scored, other)
    slices = _slices(contract, test, y, output, rival.output)
    calibration = metrics.calibration_error(y, output) if contract.task != "regression" else None
    checks.append(_is_better(contract, scored, other, comparison, rival))
    checks += _floor(contract, scored)
    checks += _no_slice_is_worse(contract, slices)
    if calibration is not None:
        checks += _limit(
            "calibration",
            "stated and observed probabilities differ on average by",
            calibration,
            gates.max_calibration_error,
        )
    checks += last
    promote = all(check.passed for check in checks)
    return Verdict(
        promote=promote,
        reason=_promotion(contract, comparison, rival, checks) if promote else _rejection(checks),
        against=rival.against,
        checks=tuple(checks),
        challenger_metrics={n: s.value for n, s in scored.items() if np.isfinite(s.value)},
        champion_metrics={n: s.value for n, s in other.items() if np.isfinite(s.value)},
        challenger_intervals=_intervals(scored, gates.confidence),
        champion_intervals=_intervals(other, gates.confidence),
        comparison=comparison,
        slices=slices,
        calibration_error=calibration,
        notes=(*rival.notes, *_precision(challenger)),
        **common,
    )


def rival_output(
    contract: Contract, prepared: Prepared, challenger: Bundle, champion: Bundle | None
) -> np.ndarray:
    """What the challenger is compared with, the champion or the dummy, says of the test rows.

    Returns:
        As the challenger's output: (rows, its labels) probabilities or (rows,) predictions.
    """
    return _rival(contract, prepared, challenger, champion).output


def latency(bundle: Bundle, rows: pd.DataFrame) -> tuple[float, float]:
    """Time for one row in the ONNX session: 99th percentile and median, in milliseconds."""
    arrays = features.arrays(rows.head(_LATENCY_RUNS), bundle.signature)
    took: list[float] = []
    deadline = time.perf_counter() + _LATENCY_SECONDS
    for run in range(_LATENCY_WARM_UP + _LATENCY_RUNS):
        row = slice(run % len(arrays[0]), run % len(arrays[0]) + 1)
        begin = time.perf_counter()
        bundle.session.run(*(array[row] for array in arrays))
        end = time.perf_counter()
        if run >= _LATENCY_WARM_UP:
            took.append(end - begin)
        if took and end > deadline:
            break
    high, middle = np.quantile(took, [0.99, 0.5]) * 1000
    return float(high), float(middle)


def groups(contract: Contract, column: str, rows: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """The slices of one input column: its categories, or the quartiles of its numbers.

    Yields:
        Name of the group and (rows,) bool, who is in it. Rows without a value are a group, too.
    """
    values = rows[column]
    absent = values.isna().to_numpy()
    kind = next(c.type for c in contract.data.columns if c.name == column)
    if kind == "category":
        for category in sorted(values.dropna().unique()):
            yield str(category), (values == category).to_numpy()
    elif kind == "bool":
        yield "false", (values == 0).to_numpy()
        yield "true", (values == 1).to_numpy()
    elif not absent.all():
        numbers = values.to_numpy(dtype=np.float64)
        # Quartiles that are values of the column read better than ones between two.
        edges = np.unique(np.quantile(numbers[~absent], [0.25, 0.5, 0.75], method="lower"))
        texts = [f"{edge:.6g}" for edge in edges]
        names = [
            f"{texts[0]} or less",
            *(f"{low} to {high}" for low, high in itertools.pairwise(texts)),
            f"above {texts[-1]}",
        ]
        place = np.searchsorted(edges, numbers, side="left")
        for code, name in enumerate(names):
            yield name, (place == code) & ~absent
    yield NO_VALUE, absent


def _answers(challenger: Bundle, test: pd.DataFrame) -> tuple[str, np.ndarray, np.ndarray]:
    """What is wrong with the challenger's answers (or nothing), the truth, and the answers."""
    nothing = np.empty(0)
    if not len(test):
        return "there are no test rows to answer", nothing, nothing
    labels = challenger.signature.labels
    target = test[challenger.signature.target]
    if labels and (strange := sorted(set(target.astype(str)) - set(labels))):
        count = int(target.astype(str).isin(strange).sum())
        return (
            f"{count} test rows carry labels that the challenger never learnt: "
            f"{', '.join(strange[:5])}",
            nothing,
            nothing,
        )
    y = metrics.encode(labels, target)
    output = challenger.predict(test)
    return _invalid(output, labels) or "", y, output


def _invalid(output: np.ndarray, labels: tuple[str, ...]) -> str | None:
    """What is wrong with a model's output, or nothing."""
    rows = output.reshape(len(output), -1)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        return f"{int(bad.sum())} of {len(output)} answers are not numbers (NaN or infinite)"
    if labels:
        off = (rows < 0).any(axis=1) | (np.abs(rows.sum(axis=1) - 1) > _SUM_TOLERANCE)
        if off.any():
            return f"{int(off.sum())} of {len(output)} answers are not probabilities"
    return None


def _rival(
    contract: Contract, prepared: Prepared, challenger: Bundle, champion: Bundle | None
) -> _Rival:
    """The champion if it can score the rows, else the dummy."""
    dummy = "a dummy that ignores the inputs"
    if champion is None:
        return _Rival(DUMMY, dummy, _dummy(contract, prepared, challenger), ())
    trouble = _cannot_score(contract, champion, prepared.test)
    output = np.empty(0)
    if trouble is None:
        output = champion.predict(prepared.test)
        trouble = _invalid(output, champion.signature.labels)
    if trouble is not None:
        note = (
            f"The champion {champion.version} cannot score these rows ({trouble}); "
            "the challenger was compared with a dummy instead."
        )
        words = f"{dummy} (the champion cannot score these rows)"
        return _Rival(DUMMY, words, _dummy(contract, prepared, challenger), (note,))
    return _Rival(
        champion.version,
        f"champion {champion.version}",
        _aligned(output, champion.signature.labels, challenger.signature.labels),
        _leaks(contract, champion, prepared.info),
    )


def _cannot_score(contract: Contract, champion: Bundle, test: pd.DataFrame) -> str | None:
    """Why the champion cannot score rows of this contract, or None."""
    sign = champion.signature
    if (sign.task, sign.target) != (contract.task, contract.data.target.name):
        return f"it predicts {sign.target!r} ({sign.task})"
    seen, asked = (
        None if image is None else (image.channels, *image.size)
        for image in (sign.image, contract.data.image)
    )
    if seen != asked:
        return f"it sees images of {seen} channels, height and width, not of {asked}"
    kinds = {c.name: c.is_numeric for c in contract.data.columns}
    for column in sign.columns:
        if column.name not in kinds:
            return f"it needs the column {column.name!r}"
        if column.is_numeric != kinds[column.name]:
            return f"to it the column {column.name!r} is of another type"
    return None


def _aligned(output: np.ndarray, have: tuple[str, ...], want: tuple[str, ...]) -> np.ndarray:
    """Probabilities in the order of other labels. A label that the champion does not know has
    probability 0; what it gives to a label that is no more is lost to it."""
    if not want or have == want:
        return output
    aligned = np.zeros((len(output), len(want)), dtype=output.dtype)
    for place, label in enumerate(want):
        if label in have:
            aligned[:, place] = output[:, have.index(label)]
    return aligned


def _dummy(contract: Contract, prepared: Prepared, challenger: Bundle) -> np.ndarray:
    """The best constant answer by the training labels, for every test row: the labels'
    frequencies, or the number that minimises the metric."""
    labels = challenger.signature.labels
    known = prepared.train[challenger.signature.target]
    if labels:
        codes = metrics.encode(labels, known)
        shares = np.bincount(codes, minlength=len(labels)) / len(codes)
        return np.tile(shares, (len(prepared.test), 1))
    y = metrics.encode((), known)
    if contract.metric.name == "mae":
        answer = float(np.median(y))
    elif contract.metric.name == "rmsle" and (y >= 0).all():
        answer = float(np.expm1(np.log1p(y).mean()))
    else:
        answer = float(y.mean())
    return np.full(len(prepared.test), answer)


def _leaks(contract: Contract, champion: Bundle, info: DatasetInfo) -> tuple[str, ...]:
    """A note where the champion may have learnt from some of today's test rows: its score is then
    too good, which can only keep a challenger out."""
    learnt = champion.manifest.data
    until = learnt.get("test_from_time") or learnt.get("to_time")
    if until is not None and info.test_from_time is not None:
        end, begin = pd.Timestamp(until), pd.Timestamp(info.test_from_time)
        if end > begin:
            return (
                f"The champion learnt from rows up to {end:%Y-%m-%d %H:%M}, and these test rows "
                f"begin at {begin:%Y-%m-%d %H:%M}: on the first of them its score is flattering.",
            )
        return ()
    before, now = champion.manifest.contract.data, contract.data
    if (before.split, before.test, before.id) != (now.split, now.test, now.id):
        return (
            "The test rows are chosen otherwise than when the champion was trained; it may have "
            "learnt from some of them, and its score may be flattering.",
        )
    return ()


def _precision(challenger: Bundle) -> Iterator[str]:
    """What was decided about a network's numbers, where the contract asks for smaller ones."""
    decided = challenger.manifest.data.get("precision")
    if decided is not None:
        yield f"Precision: {decided['note']}"


def _draws(contract: Contract, y: np.ndarray) -> Iterator[np.ndarray]:
    """The resamples of these rows."""
    return draw(
        len(y),
        contract.gates.resamples,
        contract.train.seed,
        strata=y if contract.task != "regression" else None,
        in_time=contract.data.time is not None,
    )


def _compared(
    contract: Contract, scored: dict[str, Scores], other: dict[str, Scores]
) -> Comparison | None:
    metric = contract.metric
    ours, theirs = scored.get(metric.name), other.get(metric.name)
    if ours is None or theirs is None or not (ours.defined and theirs.defined):
        return None
    return compare(ours, theirs, metric.sign, contract.gates.confidence)


def _intervals(scored: dict[str, Scores], confidence: float) -> dict[str, Interval]:
    return {n: interval(s, confidence) for n, s in scored.items() if s.defined}


def _slices(
    contract: Contract,
    test: pd.DataFrame,
    y: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
) -> tuple[Slice, ...]:
    """Both models on every group. A group decides if it has the rows and the metric is defined on
    it; the others are shown with their values only."""
    gates, metric = contract.gates, contract.metric
    found = [
        (column, value, members)
        for column in gates.slices.columns
        for value, members in groups(contract, column, test)
        if members.any()
    ]
    deciding = sum(int(members.sum()) >= gates.slices.min_rows for _, _, members in found)
    slices = []
    for column, value, members in found:
        truth, ours, theirs = y[members], challenger[members], champion[members]
        names = [metric.name] if _defined(contract, truth, ours) else []
        many = len(truth) >= gates.slices.min_rows
        draws = _draws(contract, truth) if many else iter((np.ones((1, len(truth)), np.int32),))
        scored, other = score(names, truth, [ours, theirs], draws)
        one, two = scored.get(metric.name), other.get(metric.name)
        compared = (
            compare_among(deciding, one, two, metric.sign, gates.confidence)
            if many and one and two and one.defined and two.defined
            else None
        )
        slices.append(
            Slice(
                column=column,
                value=value,
                rows=len(truth),
                challenger=one.value if one else None,
                champion=two.value if two else None,
                comparison=compared,
                passed=compared is None or compared.high >= -gates.slices.max_loss,
            )
        )
    return tuple(slices)


def _defined(contract: Contract, y: np.ndarray, output: np.ndarray) -> bool:
    return contract.metric.name in metrics.all_metrics(contract.task, y, output)


def _is_new(challenger: Bundle, champion: Bundle) -> Check:
    same = challenger.version == champion.version
    return Check(
        name="new version",
        passed=not same,
        detail=f"the challenger is the champion itself ({champion.version}), nothing to promote"
        if same
        else f"{challenger.version} is another model than the champion {champion.version}",
    )


def _is_better(
    contract: Contract,
    scored: dict[str, Scores],
    other: dict[str, Scores],
    comparison: Comparison | None,
    rival: _Rival,
) -> Check:
    """The interval's lower end must be above the margin: better, and surely so."""
    name, margin = contract.metric.name, contract.gates.margin
    if comparison is None:
        return Check(
            name="better",
            passed=False,
            detail=f"{name} cannot be measured on these test rows, so nothing shows a gain",
        )
    passed = comparison.low > margin
    if passed:
        finding = f"surely above the margin {_text(margin)}"
    elif comparison.high < 0:
        finding = "surely a loss"
    else:
        finding = f"not surely above the margin {_text(margin)}"
    return Check(
        name="better",
        passed=passed,
        detail=f"{name} {_text(scored[name].value)} against {_text(other[name].value)} of "
        f"{rival.words}: the gain of {_text(comparison.difference)} ({_range(comparison)}) is "
        + finding,
    )


def _floor(contract: Contract, scored: dict[str, Scores]) -> Iterator[Check]:
    metric, floor = contract.metric, contract.gates.floor
    if floor is None:
        return
    value = scored[metric.name].value if metric.name in scored else float("nan")
    yield Check(
        name="floor",
        passed=bool(metric.sign * (value - floor) >= 0),
        detail=f"{metric.name} {_text(value)}, must be at "
        f"{'least' if metric.sign > 0 else 'most'} {_text(floor)}",
    )


def _no_slice_is_worse(contract: Contract, slices: tuple[Slice, ...]) -> Iterator[Check]:
    """A group fails where even the upper end of its interval is a loss beyond `max_loss`: there
    the challenger is surely worse.

    The upper end, not the lower: a small group's interval is wide, and asking it to exclude a loss
    would turn away every model for lack of rows. And since many groups are looked at, the error is
    shared between them (`compare_among`): a challenger that is no worse anywhere is turned away
    with a probability below 1 - confidence, however many groups there are.
    """
    if not contract.gates.slices.columns:
        return
    name, limit = contract.metric.name, _text(contract.gates.slices.max_loss)
    deciding = [s for s in slices if s.comparison is not None]
    worse = sorted(
        (s for s in deciding if not s.passed),
        key=lambda s: s.comparison.high if s.comparison else 0.0,
    )
    if worse:
        first = worse[0]
        assert first.comparison is not None
        detail = (
            f"on {first.column} = {first.value} ({first.rows} rows) {name} is worse by "
            f"{_text(-first.comparison.difference)}, surely by more than {limit} "
            f"(at least {_text(-first.comparison.high)})"
        )
        if len(worse) > 1:
            rest = ", ".join(f"{s.column} = {s.value}" for s in worse[1:6])
            detail += f"; also on {rest}" + (" and others" if len(worse) > 6 else "")
    else:
        detail = f"on none of {len(deciding)} groups is {name} surely worse by more than {limit}"
        if len(deciding) < len(slices):
            few = len(slices) - len(deciding)
            detail += f"; {few} more {'is' if few == 1 else 'are'} too small to decide"
    yield Check(name="slices", passed=not worse, detail=detail)


def _limit(
    name: str,
    words: str,
    value: float,
    limit: float | None,
    unit: str = "",
    usual: float | None = None,
) -> Iterator[Check]:
    """A value that must not be above its limit, if there is one."""
    if limit is None:
        return
    unit = f" {unit}" if unit else ""
    aside = "" if usual is None else f" in 99 of 100 cases at most (median {_text(usual)}{unit})"
    yield Check(
        name=name,
        passed=value <= limit,
        detail=f"{words} {_text(value)}{unit}{aside}, allowed are {_text(limit)}{unit}",
    )


def _promotion(
    contract: Contract, comparison: Comparison | None, rival: _Rival, checks: list[Check]
) -> str:
    assert comparison is not None  # else the check `better` does not hold
    return (
        f"Promoted: {contract.metric.name} is better than that of {rival.words} by "
        f"{_text(comparison.difference)} ({_range(comparison)}), and all {len(checks)} checks hold."
    )


def _rejection(checks: list[Check]) -> str:
    first, *rest = (check for check in checks if not check.passed)
    also = f" (also failed: {', '.join(check.name for check in rest)})" if rest else ""
    return f"Not promoted: {first.detail}{also}."


def _range(comparison: Comparison) -> str:
    return (
        f"{comparison.confidence * 100:g} % interval "
        f"{_text(comparison.low)} to {_text(comparison.high)}"
    )


def _text(value: float) -> str:
    return f"{value:.4g}"
