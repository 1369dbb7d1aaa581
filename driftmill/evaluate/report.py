"""The report of a verdict: one HTML page that needs nothing else.

The words and tables are in `report.html.j2`; this module computes what they show and draws the
figures as inline SVG. Colours in the figures are CSS variables, so that the page follows the
reader's light or dark scheme. All text from the data is escaped: a category may be called
`<script>`.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from driftmill import features
from driftmill.bundle import Bundle
from driftmill.contract import METRICS, Contract
from driftmill.evaluate import metrics
from driftmill.evaluate.explain import Importance, WrongAnswer, importance, worst_errors
from driftmill.evaluate.gates import DUMMY, Slice, Verdict, rival_output
from driftmill.store import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from driftmill.data.prepare import Prepared

#: Colours in the figures are written as these and then replaced by the page's CSS variables.
_INK, _MUTED, _GRID, _CHALLENGER, _RIVAL = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _CHALLENGER: "var(--challenger)",
    _RIVAL: "var(--rival)",
}
#: Lines of several labels, told apart in light and dark.
_LINES = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6")
#: Most points of a scatter plot and of a curve; more make the page heavy, not clearer.
_SCATTER, _CURVE = 1500, 250
#: Most labels in the confusion matrix, inputs in the importance plot, and groups in the table.
_LABELS, _INPUTS, _GROUPS = 12, 20, 60
#: Most labels and layers in a plot with a bar for each.
_BARS = 30
#: Longer side in pixels to which larger images are shrunk, so that the page stays light; smaller
#: ones are enlarged in whole steps up to it, each pixel a square.
_SHOT = 96
_DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class _Plot:
    """A figure with the sentence that tells how to read it."""

    title: str
    note: str
    svg: Markup
    wide: bool = False


def write(
    path: Path,
    contract: Contract,
    prepared: Prepared,
    challenger: Bundle,
    champion: Bundle | None,
    verdict: Verdict,
) -> None:
    """Write the report.

    Args:
        path: the `.html` file; its folder exists.
        contract: what was asked for.
        prepared: the rows that the verdict is about.
        challenger: the model that was judged.
        champion: the model that it was compared with, if any.
        verdict: from `gates.judge`, of the same arguments.
    """
    plots: list[_Plot] = []
    confusion, thresholds = None, None
    errors: dict[str, Any] | None = None
    if verdict.challenger_metrics:  # else its answers are no numbers: there is nothing to plot
        y = metrics.encode(challenger.signature.labels, prepared.test[challenger.signature.target])
        output = challenger.predict(prepared.test)
        rival = rival_output(contract, prepared, challenger, champion)
        labels = challenger.signature.labels
        if verdict.comparison is not None:
            plots.append(_gain(contract, verdict))
        if labels:
            confusion = _confusion(y, output, labels)
            thresholds = _thresholds(y, output) if len(labels) == 2 else None
            plots += _classification(y, output, rival, labels, verdict)
        else:
            plots += _regression(y, output, rival, verdict)
        if features.TIME in prepared.test:
            plots += _over_time(prepared.test[features.TIME], y, output, rival, verdict)
        if contract.is_vision:
            plots.append(_by_label(y, output, rival, labels, verdict))
            errors = _errors(*worst_errors(challenger, prepared.test, output))
        elif verdict.metric in verdict.challenger_metrics:
            found = importance(challenger, prepared.test, contract.metric, contract.train.seed)
            plots.append(_importance(found, contract))
    page = (
        _environment()
        .from_string(_template())
        .render(
            contract=contract,
            contract_yaml=yaml.safe_dump(
                json.loads(contract.to_json()), sort_keys=False, allow_unicode=True, width=90
            ),
            info=prepared.info,
            manifest=challenger.manifest,
            verdict=verdict,
            rival="dummy" if verdict.against == DUMMY else "champion",
            directions={name: direction for name, (direction, _) in METRICS.items()},
            plots=plots,
            errors=errors,
            training=challenger.training,
            training_plots=_training(challenger.training) if challenger.training else [],
            precision=challenger.manifest.data.get("precision"),
            confusion=confusion,
            thresholds=thresholds,
            slices=_largest(verdict.slices),
            slices_left=max(0, len(verdict.slices) - _GROUPS),
            scale=_scale(verdict, contract),
        )
    )
    write_atomic(path, page.encode())


def _template() -> str:
    return files("driftmill.evaluate").joinpath("report.html.j2").read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = lambda v: _DASH if v is None else f"{v * 100:.0f} %"
    environment.filters["time"] = lambda t: f"{t:%Y-%m-%d %H:%M} UTC" if t else _DASH
    return environment


def _number(value: float | None) -> str:
    """Four significant digits, with a real minus sign; a dash for nothing."""
    if value is None:
        return _DASH
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", _MINUS)
    return f"{value:,.4g}".replace("-", _MINUS)


def _largest(slices: tuple[Slice, ...]) -> list[Slice]:
    """Those that failed and those with the most rows, in their own order."""
    ranked = sorted(slices, key=lambda s: (s.passed, -s.rows))[:_GROUPS]
    return [s for s in slices if s in ranked]


def _scale(verdict: Verdict, contract: Contract) -> Callable[[float], float]:
    """Where a difference lies between the left end (0) and the right end (100) of the interval
    column of the slices' table."""
    ends = [0.0, -contract.gates.slices.max_loss]
    for group in verdict.slices:
        if group.comparison is not None:
            ends += [group.comparison.low, group.comparison.high]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0
    return lambda value: round(4 + 92 * (value - low) / width, 2)


# Figures


@contextmanager
def _figure(name: str, width: float = 4.8, height: float = 3.4) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot in the page's style; `name` keeps its SVG ids apart from other figures'."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a label may hold dollar signs
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> Markup:
    """The figure as SVG for a page: no XML prologue, as wide as its column, colours by variable."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # Matplotlib escapes all text that it writes.
    return Markup(text)  # noqa: S704


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers along it: formulas are switched off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", size=0)


def _gain(contract: Contract, verdict: Verdict) -> _Plot:
    """The difference with its interval, and the margin that it must clear."""
    found, margin = verdict.comparison, contract.gates.margin
    assert found is not None
    with _figure("gain", 9.6, 1.5) as (figure, axes):
        axes.grid(axis="y", visible=False)
        axes.axvline(0, color=_MUTED, linewidth=1)
        if margin:
            axes.axvline(margin, color=_MUTED, linewidth=1, linestyle="--")
            axes.annotate(
                f"margin {_number(margin)}",
                (margin, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                va="top",
                color=_MUTED,
                fontsize=9,
            )
        axes.plot([found.low, found.high], [0, 0], color=_CHALLENGER, linewidth=5, alpha=0.35)
        axes.plot([found.difference], [0], "o", color=_CHALLENGER, markersize=9)
        axes.annotate(
            _number(found.difference),
            (found.difference, 0),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
        axes.set(yticks=[], ylim=(-0.6, 1.2))
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"gain in {verdict.metric}  (right of 0: the challenger is better)")
        return _Plot(
            f"Gain over the {'dummy' if verdict.against == DUMMY else 'champion'}",
            f"Difference on the same rows with its {found.confidence * 100:g} % interval, from "
            f"{_number(found.resamples)} paired resamples. The whole bar must lie right of "
            f"{'the margin' if margin else '0'}.",
            _svg(figure),
            wide=True,
        )


def _classification(
    y: np.ndarray,
    output: np.ndarray,
    rival: np.ndarray,
    labels: Sequence[str],
    verdict: Verdict,
) -> Iterator[_Plot]:
    """ROC, precision-recall and calibration: of both models for two labels; for more, of the
    challenger's most frequent labels against the rest."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    if output.shape[1] == 2:
        name = "dummy" if verdict.against == DUMMY else "champion"
        curves = [
            (name, y == 1, rival[:, 1], _RIVAL),
            ("challenger", y == 1, output[:, 1], _CHALLENGER),
        ]
        what = f"of “{labels[1]}”"
    else:
        often = np.bincount(y, minlength=len(labels)).argsort()[::-1][: len(_LINES)]
        curves = [
            (_short(labels[k]), y == k, output[:, k], colour)
            for k, colour in zip(often, _LINES, strict=False)
        ]
        what = "of each label against the rest"
    curves = [c for c in curves if 0 < c[1].sum() < len(y)]

    if curves:
        with _figure("roc") as (figure, axes):
            axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
            for name, positive, stated, colour in curves:
                wrong, right, _ = roc_curve(positive, stated)
                axes.plot(*_thin(wrong, right), color=colour, label=name)
            axes.set(xlabel="false positive rate", ylabel="true positive rate")
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axes.legend(loc="lower right")
            yield _Plot(
                "ROC curve", f"ROC {what}; a curve nearer to the top left is better.", _svg(figure)
            )

        with _figure("pr") as (figure, axes):
            for name, positive, stated, colour in curves:
                precision, recall, _ = precision_recall_curve(positive, stated)
                axes.plot(*_thin(recall, precision), color=colour, label=name)
            axes.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
            axes.legend(loc="lower left")
            yield _Plot(
                "Precision and recall",
                f"Curve {what}; nearer to the top right is better.",
                _svg(figure),
            )

    two = output.shape[1] == 2
    with _figure("calibration") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
        for name, answer, colour in (
            ("dummy" if verdict.against == DUMMY else "champion", rival, _RIVAL),
            ("challenger", output, _CHALLENGER),
        ):
            stated = answer[:, 1] if two else answer.max(axis=1)
            happened = y == 1 if two else answer.argmax(axis=1) == y
            axes.plot(*_binned(stated, happened), "o-", color=colour, markersize=4, label=name)
        whose = _short(labels[1]) if two else "the chosen label"
        axes.set(
            xlabel=f"stated probability of {whose}",
            ylabel="observed frequency",
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
        )
        axes.legend(loc="upper left")
        error = verdict.calibration_error
        yield _Plot(
            "Calibration",
            "Ten groups of rows of equal size by stated probability; on the diagonal, what is "
            f"stated is what happens. Expected calibration error {_number(error)}.",
            _svg(figure),
        )


def _regression(
    y: np.ndarray, output: np.ndarray, rival: np.ndarray, verdict: Verdict
) -> Iterator[_Plot]:
    """Predicted against observed, residuals, error by decile, calibration."""
    name = "dummy" if verdict.against == DUMMY else "champion"
    sample = np.arange(len(y))
    if len(y) > _SCATTER:
        sample = np.random.default_rng(0).choice(len(y), _SCATTER, replace=False)
    both = [float(min(y.min(), output.min())), float(max(y.max(), output.max()))]
    with _figure("scatter") as (figure, axes):
        axes.plot(both, both, color=_MUTED, linewidth=1, linestyle="--")
        axes.plot(
            output[sample], y[sample], ".", color=_CHALLENGER, markersize=4, alpha=0.45, mew=0
        )
        axes.set(xlabel="predicted", ylabel="observed")
        some = f" ({_SCATTER} of {_number(len(y))} rows)" if len(y) > _SCATTER else ""
        yield _Plot("Predicted and observed", f"On the dashed line both agree{some}.", _svg(figure))

    residual = y - output
    low, high = np.quantile(residual, [0.005, 0.995])
    with _figure("residuals") as (figure, axes):
        axes.hist(np.clip(residual, low, high), bins=40, color=_CHALLENGER, alpha=0.75)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set(xlabel=f"observed {_MINUS} predicted", ylabel="rows")
        yield _Plot(
            "Residuals",
            f"Mean {_number(residual.mean())}, median {_number(float(np.median(residual)))}; "
            "the outermost 1 % of rows is gathered in the outermost bars.",
            _svg(figure),
        )

    decile = _deciles(output)
    places = np.unique(decile)
    with _figure("deciles") as (figure, axes):
        for shift, label, answer, colour in (
            (-0.2, name, rival, _RIVAL),
            (0.2, "challenger", output, _CHALLENGER),
        ):
            means = [float(np.abs(y - answer)[decile == d].mean()) for d in places]
            axes.bar(places + 1 + shift, means, width=0.38, color=colour, label=label)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="decile of the prediction", ylabel="mean absolute error")
        axes.set_xticks(places + 1)
        axes.legend(loc="upper left")
        axes.margins(y=0.2)
        yield _Plot(
            "Error by decile",
            "Rows in ten groups of equal size, by the challenger's prediction, lowest first.",
            _svg(figure),
        )

    with _figure("calibration") as (figure, axes):
        axes.plot(both, both, color=_MUTED, linewidth=1, linestyle="--")
        axes.plot(*_binned(output, y), "o-", color=_CHALLENGER, markersize=5)
        axes.set(xlabel="mean prediction", ylabel="mean observed")
        yield _Plot(
            "Calibration",
            "The same ten groups: on the dashed line, predictions are right on average.",
            _svg(figure),
        )


def _over_time(
    times: pd.Series, y: np.ndarray, output: np.ndarray, rival: np.ndarray, verdict: Verdict
) -> Iterator[_Plot]:
    """The metric of both models on successive blocks of test rows."""
    count = min(24, len(y) // 60)
    if count < 3 or verdict.metric not in verdict.challenger_metrics:
        return
    blocks = np.array_split(np.arange(len(y)), count)
    from matplotlib.dates import ConciseDateFormatter

    with _figure("time", 9.6, 2.6) as (figure, axes):
        for name, answer, colour in (
            ("dummy" if verdict.against == DUMMY else "champion", rival, _RIVAL),
            ("challenger", output, _CHALLENGER),
        ):
            values = [metrics.score(verdict.metric, y[b], answer[b]) for b in blocks]
            middles = [times.iloc[b[len(b) // 2]].to_datetime64() for b in blocks]
            axes.plot(middles, values, "o-", color=colour, markersize=4, label=name)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
        axes.set(ylabel=verdict.metric)
        axes.legend(loc="best")
        yield _Plot(
            "Over the test period",
            f"{verdict.metric} on {len(blocks)} successive blocks of some {len(blocks[0])} rows.",
            _svg(figure),
            wide=True,
        )


def _importance(found: list[Importance], contract: Contract) -> _Plot:
    """Bars of permutation importance, the most important on top."""
    shown = found[:_INPUTS][::-1]
    with _figure("importance", 9.6, 0.8 + 0.3 * max(len(shown), 2)) as (figure, axes):
        axes.barh(
            [_short(i.column, 32) for i in shown],
            [i.loss for i in shown],
            xerr=[i.spread for i in shown],
            color=_CHALLENGER,
            error_kw={"ecolor": _MUTED, "elinewidth": 1},
            height=0.65,
        )
        axes.grid(axis="y", visible=False)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set_xlabel(f"loss in {contract.metric.name} when the input is shuffled")
        more = f" The {len(shown)} most important of {len(found)}." if len(found) > _INPUTS else ""
        return _Plot(
            "Permutation importance",
            "What the metric loses when one input is shuffled between test rows (mean and standard "
            f"deviation of 5 shuffles). Of inputs that say the same, each may look small.{more}",
            _svg(figure),
            wide=True,
        )


def _by_label(
    y: np.ndarray,
    output: np.ndarray,
    rival: np.ndarray,
    labels: Sequence[str],
    verdict: Verdict,
) -> _Plot:
    """Bars of the part of each label's rows that a model gets right, the challenger's worst label
    on top. A dummy, which gives all rows the same label, has none."""
    present = np.unique(y)
    models = [("challenger", output, _CHALLENGER)]
    if verdict.against != DUMMY:
        models.append(("champion", rival, _RIVAL))
    right = {
        name: [float((answer.argmax(axis=1)[y == k] == k).mean()) for k in present]
        for name, answer, _ in models
    }
    shown = np.argsort(right["challenger"], kind="stable")[:_BARS]
    places, height = np.arange(len(shown))[::-1], 0.72 / len(models)
    with _figure("labels", 9.6, 0.9 + 0.36 * max(len(shown), 2)) as (figure, axes):
        for i, (name, _, colour) in enumerate(models):
            middle = places + (len(models) - 1 - 2 * i) * height / 2
            values = [right[name][k] for k in shown]
            axes.barh(middle, values, height=height, color=colour, label=name)
        names = [_short(f"{labels[k]} ({(y == k).sum()})", 32) for k in present[shown]]
        axes.set_yticks(places, names)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="part of the label's test rows with the right answer", xlim=(0, 1.01))
        if len(models) > 1:
            figure.legend(loc="outside upper right", ncols=2)
        more = f" The {_BARS} worst of {len(present)}." if len(present) > _BARS else ""
        return _Plot(
            "Accuracy by label",
            f"The challenger's worst label on top; in brackets its test rows.{more}",
            _svg(figure),
            wide=True,
        )


def _errors(found: list[WrongAnswer], trouble: str) -> dict[str, Any]:
    """The worst errors as the page shows them."""
    return {
        "trouble": trouble,
        "shots": [
            {
                "image": _png(_shot(wrong.image)),
                "seen": None if wrong.seen is None else _png(_overlaid(wrong)),
                "truth": wrong.truth,
                "answer": wrong.answer,
                "probability": wrong.probability,
            }
            for wrong in found
        ],
    }


def _shot(image: np.ndarray) -> np.ndarray:
    """An image (channels, height, width) as it is shown: uint8 (height, width, 3)."""
    from PIL import Image

    shown = np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1)
    longest = max(shown.shape[:2])
    if longest <= _SHOT:
        times = _SHOT // longest
        return shown.repeat(times, axis=0).repeat(times, axis=1)
    smaller = Image.fromarray(np.ascontiguousarray(shown))
    smaller.thumbnail((_SHOT, _SHOT))
    return np.asarray(smaller)


def _overlaid(wrong: WrongAnswer) -> np.ndarray:
    """The image in grey, with what spoke for the answer in colour upon it."""
    from matplotlib import colormaps
    from PIL import Image

    shot = _shot(wrong.image)
    assert wrong.seen is not None
    large = Image.fromarray(wrong.seen).resize(shot.shape[1::-1], Image.Resampling.BILINEAR)
    seen = np.asarray(large)[..., None].clip(0, 1)
    colour = colormaps["turbo"](seen[..., 0])[..., :3] * 255
    grey = shot.mean(axis=2, keepdims=True)
    mixed: np.ndarray = grey + (colour - grey) * (0.15 + 0.5 * seen)
    return mixed.astype(np.uint8)


def _png(shot: np.ndarray) -> str:
    from driftmill.vision import images

    content = images.to_png(np.moveaxis(shot, -1, 0))
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _training(training: dict[str, Any]) -> Iterator[_Plot]:
    """How a network learnt, by epoch."""
    history = training["history"]
    epochs = [entry["epoch"] for entry in history]
    best = training["best_epoch"]
    marker = "o-" if len(epochs) <= 30 else "-"

    def curve(axes: Axes, key: str, colour: str, label: str | None = None) -> None:
        axes.plot(
            epochs, [e[key] for e in history], marker, markersize=3.5, color=colour, label=label
        )
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("epoch")

    with _figure("loss") as (figure, axes):
        curve(axes, "train_loss", _RIVAL, "training")
        curve(axes, "validation_loss", _CHALLENGER, "validation")
        axes.axvline(best, color=_MUTED, linewidth=1, linestyle="--")
        axes.set(ylabel="loss (cross-entropy)")
        axes.legend(loc="upper right")
        yield _Plot(
            "Loss",
            f"The weights are those of epoch {best}, at the dashed line. The training loss is with "
            "augmentation and label smoothing.",
            _svg(figure),
        )
    with _figure("accuracy") as (figure, axes):
        curve(axes, "validation_accuracy", _CHALLENGER)
        axes.axvline(best, color=_MUTED, linewidth=1, linestyle="--")
        axes.set(ylabel="validation accuracy")
        yield _Plot(
            "Accuracy",
            f"On {_number(training['validation_rows'])} rows kept out of the training.",
            _svg(figure),
        )
    with _figure("rate") as (figure, axes):
        curve(axes, "lr", _CHALLENGER)
        axes.set(ylabel="learning rate")
        axes.set_ylim(bottom=0)
        yield _Plot("Learning rate", "At the end of each epoch.", _svg(figure))
    if training["diagnostics"]:
        yield from _diagnostics(training["diagnostics"])


def _diagnostics(found: dict[str, Any]) -> Iterator[_Plot]:
    """The learning-rate test and the gradients of `vision.diagnose`."""
    test = found["learning_rate"]
    with _figure("range") as (figure, axes):
        axes.plot(test["rates"], [np.nan if v is None else v for v in test["losses"]], color=_RIVAL)
        axes.axvline(test["used"], color=_CHALLENGER, linewidth=1.4, label="used")
        axes.axvline(test["recommended"], color=_MUTED, linestyle="--", label="steepest")
        axes.set(xlabel="learning rate", ylabel="loss")
        _logarithmic(axes)
        axes.legend(loc="best")
        yield _Plot(
            "Learning-rate test",
            "Loss of a fresh network while its learning rate rises step by step (Smith 2017). The "
            "highest rate in use should lie where it falls, and before it grows.",
            _svg(figure),
        )
    layers = found["gradients"]
    step = math.ceil(len(layers) / _BARS)
    shown = layers[::step] if step == 1 else [*layers[:-1:step], layers[-1]]
    places = np.arange(len(shown))[::-1]
    with _figure("gradients", 9.6, 0.9 + 0.26 * max(len(shown), 3)) as (figure, axes):
        for when, colour in (("start", _RIVAL), ("end", _CHALLENGER)):
            # A norm of 0 has no place on a logarithmic axis.
            norms = [layer[when] or np.nan for layer in shown]
            axes.plot(norms, places, "o", color=colour, markersize=6, label=f"at the {when}")
        axes.set_yticks(
            places, [_short(layer["layer"].removeprefix("body."), 44) for layer in shown]
        )
        axes.set(xlabel="norm of the gradient")
        _logarithmic(axes)
        figure.legend(loc="outside upper right", ncols=2)
        some = f" {len(shown)} of {len(layers)} layers." if step > 1 else ""
        yield _Plot(
            "Gradients by layer",
            "From the first layer to the last, before and after the training. A layer far left of "
            f"the others hardly learns.{some}",
            _svg(figure),
            wide=True,
        )


def _confusion(y: np.ndarray, output: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Counts of true label (rows) by answer (columns), for the most frequent labels."""
    chosen = output.argmax(axis=1)
    often = np.sort(np.bincount(y, minlength=len(labels)).argsort(kind="stable")[::-1][:_LABELS])
    table = []
    for k in often:
        of = y == k
        cells = [int((of & (chosen == j)).sum()) for j in often]
        total = int(of.sum())
        table.append(
            {
                "label": labels[k],
                "rows": total,
                "cells": [
                    {"count": c, "share": round(c / total, 3) if total else 0.0, "right": j == k}
                    for j, c in zip(often, cells, strict=True)
                ],
            }
        )
    return {
        "labels": [labels[k] for k in often],
        "rows": table,
        "left": len(labels) - len(often),
    }


def _thresholds(y: np.ndarray, output: np.ndarray) -> list[dict[str, float | None]]:
    """What answering "yes" from some probability on would mean, for two labels."""
    positive, found = y == 1, []
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        yes = output[:, 1] >= threshold
        found.append(
            {
                "threshold": threshold,
                "share": float(yes.mean()),
                "precision": float(positive[yes].mean()) if yes.any() else None,
                "recall": float(yes[positive].mean()) if positive.any() else None,
            }
        )
    return found


def _binned(by: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of both in ten groups of equal size."""
    place = _deciles(by)
    seen = np.unique(place)
    return (
        np.array([by[place == k].mean() for k in seen]),
        np.array([value[place == k].mean() for k in seen]),
    )


def _deciles(values: np.ndarray) -> np.ndarray:
    """(rows,) 0 to 9; equal values stay together, so that there may be fewer groups."""
    edges = np.unique(np.quantile(values, np.linspace(0.1, 0.9, 9)))
    place = np.searchsorted(edges, values, side="right")
    _, dense = np.unique(place, return_inverse=True)
    return np.asarray(dense)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_CURVE` points of a curve, its ends among them."""
    keep = np.unique(np.linspace(0, len(x) - 1, _CURVE).round().astype(int))
    return x[keep], y[keep]


def _short(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
