"""The page that a demo leaves behind: one HTML file with the story in plots and tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from driftmill.contract import Contract
from driftmill.monitor.drift import WindowResult

#: Colours of the versions, in the order in which they served (Okabe and Ito, safe for most eyes).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#7a828e"


@dataclass(frozen=True)
class Event:
    """Something that happened, `at` seconds after the demo began."""

    at: float
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """A stage that must have happened."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Stretch:
    """Rows answered by one retrained version, and what the first champion says to the same rows."""

    version: str
    rows: int
    served: float
    never_retrained: float


@dataclass(frozen=True)
class Picture:
    """An image of the stream."""

    when: str
    """`before` or `after` the onset."""
    png: bytes
    label: str


@dataclass(frozen=True)
class Story:
    """All that the page shows.

    `answers` has a row for each answered record, in order: `at` (seconds), `version`, `block`
    (number of the block of rows whose quality is measured together) and, where there is a time,
    `_time`. `quality` has a row for each block: `at`, `served`, `never_retrained`, `oracle`.
    """

    contract: Contract
    title: str
    answers: pd.DataFrame
    quality: pd.DataFrame
    windows: Sequence[WindowResult]
    window_at: Sequence[float]
    events: Sequence[Event]
    decisions: pd.DataFrame
    stretches: Sequence[Stretch]
    checks: Sequence[Check]
    facts: dict[str, str]
    marks: dict[str, float] = field(default_factory=dict)
    """Vertical lines of the plots: what, and at which second."""
    pictures: Sequence[Picture] = ()
    """Of a stream of images: some of them."""


def write(path: Path, story: Story) -> None:
    """Write the page; it needs no other file and no network."""
    passed = all(check.passed for check in story.checks)
    metric = story.contract.metric.name
    verdict = (
        "Every stage happened." if passed else "Not every stage happened: see the checks below."
    )
    facts = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in story.facts.items()
    )
    parts = [
        f"<h1>{html.escape(story.title)}</h1>",
        f"<p class='lead'>{html.escape(story.contract.description)}</p>",
        f"<p class='verdict {'good' if passed else 'bad'}'>{verdict}</p>",
        f"<section class='facts'>{facts}</section>",
        "<h2>What happened, and when</h2>",
        _table(
            ["second", "what", ""],
            [[f"{e.at:.1f}", e.name, e.detail] for e in story.events],
            numbers={0},
        ),
        _pictures(story),
        "<h2>Traffic</h2>",
        "<p>Predictions a second, by the version that answered.</p>",
        _svg(_traffic, story),
        "<h2>Drift</h2>",
        f"<p>One bar a window of {story.contract.monitor.window} answered rows: the largest change "
        f"of a column, 0 none to 1 all. A bar is filled where the window drifted (tests at a "
        f"false-discovery rate of {story.contract.monitor.false_alarm_rate:g} and an effect of at "
        f"least {story.contract.monitor.effect:g}); {story.contract.monitor.persistence} in a row "
        f"raise the alarm (▲).</p>",
        _svg(_drift, story),
        "<h2>Quality</h2>",
        f"<p>{metric} of what was served, block by block, and of the first champion on the same "
        f"rows, as if it had never been retrained "
        f"({'higher' if story.contract.metric.sign > 0 else 'lower'} is better).</p>",
        _svg(_quality, story),
        _table(
            [
                "after the promotion of",
                "rows",
                f"{metric} served",
                f"{metric} never retrained",
                "better",
            ],
            [
                [
                    s.version,
                    f"{s.rows:,}",
                    f"{s.served:.4f}",
                    f"{s.never_retrained:.4f}",
                    "yes"
                    if (s.served - s.never_retrained) * story.contract.metric.sign > 0
                    else "no",
                ]
                for s in story.stretches
            ],
            numbers={1, 2, 3},
        ),
        "<h2>Decisions</h2>",
        "<p>The controller's ledger: each answer to an alarm, with its reason.</p>",
        _table(
            list(story.decisions.columns),
            story.decisions.astype(str).to_numpy().tolist(),
            numbers={0},
        ),
        "<h2>Checks</h2>",
        _table(
            ["", "stage", "evidence"],
            [["✓" if c.passed else "✗", c.name, c.detail] for c in story.checks],
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(story.title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>",
        encoding="utf-8",
    )


def _table(head: list[str], rows: list[list[str]], numbers: set[int] | None = None) -> str:
    if not rows:
        return "<p class='none'>none</p>"
    right = numbers or set()

    def cells(tag: str, values: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in right else ''}>{html.escape(v)}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><thead><tr>{cells('th', head)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _svg(draw: Callable[[Axes, Story], None], story: Story) -> str:
    with mpl.rc_context(
        {
            "font.size": 10,
            "svg.fonttype": "none",
            "text.color": GREY,
            "axes.labelcolor": GREY,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    ):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, story)
        axes.set_xlim(story.answers["at"].min() - 1, story.answers["at"].max() + 1)
        _mark(axes, story.marks)
        _dates(axes, story)
        axes.set_xlabel("seconds since the demo began")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _mark(axes: Axes, marks: dict[str, float]) -> None:
    """Vertical lines, their names staggered so that close ones stay readable."""
    bottom, top = axes.get_ylim()
    height = top - bottom
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set_ylim(bottom, top + 0.34 * height)
    for i, (name, at) in enumerate(sorted(marks.items(), key=lambda m: m[1])):
        axes.axvline(at, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            f" {name}",
            (at, top + (0.31 - 0.105 * (i % 3)) * height),
            fontsize=8.5,
            va="top",
            annotation_clip=True,
        )


def _dates(axes: Axes, story: Story) -> None:
    """A second axis with the rows' own time, where the stream spans some months."""
    answers = story.answers
    if "_time" not in answers or answers["_time"].isna().all():
        return
    span = answers["_time"].max() - answers["_time"].min()
    if span < pd.Timedelta(days=60):
        return
    ticks = pd.date_range(answers["_time"].min(), answers["_time"].max(), periods=6)
    at = np.interp(
        ticks.astype("int64").to_numpy(),
        answers["_time"].astype("int64").to_numpy(),
        answers["at"].to_numpy(),
    )
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(at, [f"{t:%b %Y}" for t in ticks])
    upper.spines["top"].set_visible(False)
    upper.tick_params(length=0, labelsize=8.5)


def _colours(story: Story) -> dict[str, str]:
    order = list(dict.fromkeys(story.answers["version"]))
    return {version: COLOURS[i % len(COLOURS)] for i, version in enumerate(order)}


def _traffic(axes: Axes, story: Story) -> None:
    edges = np.arange(story.answers["at"].min(), story.answers["at"].max() + 1.0, 1.0)
    colours = _colours(story)
    counts = [
        np.histogram(story.answers.loc[story.answers["version"] == v, "at"], edges)[0]
        for v in colours
    ]
    axes.stackplot(edges[:-1], *counts, colors=list(colours.values()), step="post", alpha=0.75)
    axes.set_ylabel("predictions / s")
    _legend(axes, [Patch(color=c, label=v, alpha=0.75) for v, c in colours.items()])


def _drift(axes: Axes, story: Story) -> None:
    if not story.windows:
        return
    at = np.asarray(story.window_at)
    scores = np.array([max((c.effect for c in w.columns), default=0.0) for w in story.windows])
    drifted = np.array([w.drifted for w in story.windows])
    alarm = np.array([w.alarm for w in story.windows])
    width = max(0.25, 0.7 * float(np.median(np.diff(at))) if len(at) > 1 else 1.0)
    colours = _colours(story)
    edge = [colours.get(w.version, GREY) for w in story.windows]
    axes.bar(
        at,
        scores,
        width,
        color=[c if d else "none" for c, d in zip(edge, drifted, strict=True)],
        edgecolor=edge,
        linewidth=1.1,
    )
    axes.plot(at[alarm], scores[alarm] + 0.02, "^", color="#D55E00", markersize=6)
    axes.axhline(story.contract.monitor.effect, color=GREY, linewidth=0.8)
    axes.set_ylim(0, max(0.4, float(scores.max()) * 1.15))
    axes.set_ylabel("largest effect")


def _quality(axes: Axes, story: Story) -> None:
    frame = story.quality
    axes.plot(
        frame["at"],
        frame["never_retrained"],
        color=COLOURS[0],
        linestyle=(0, (2, 2)),
        linewidth=1.4,
        label="never retrained",
    )
    axes.plot(frame["at"], frame["served"], color="#009E73", linewidth=2.0, label="served")
    axes.set_ylabel(story.contract.metric.name)
    _legend(axes, axes.get_legend_handles_labels()[0])


def _pictures(story: Story) -> str:
    """Images from before and after the onset, side by side."""
    parts = []
    for when in ("before", "after"):
        shown = [p for p in story.pictures if p.when == when]
        if shown:
            tiles = "".join(
                f"<li><img alt='' src='data:image/png;base64,{base64.b64encode(p.png).decode()}'>"
                f"{html.escape(p.label)}</li>"
                for p in shown
            )
            parts.append(f"<p>{when.capitalize()} the onset</p><ul class='tiles'>{tiles}</ul>")
    return f"<h2>What the model sees</h2>{''.join(parts)}" if parts else ""


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Below the plot, where it covers nothing."""
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.01, -0.2),
        fontsize=8.5,
        labelcolor=GREY,
        ncols=6,
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6573; --line: #d9dee5;
  --paper: #fff; --panel: #f5f7f9; --good: #00734f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b1; --line: #333b46;
  --paper: #14181e; --panel: #1c222a; --good: #4cc38a; --bad: #ff8a80; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0 .6rem; color: var(--soft); max-width: 46rem; }
.lead { color: var(--ink); }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .6rem;
  margin-top: 1rem; }
.facts div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.25rem; }
.facts span { color: var(--soft); font-size: .82rem; }
figure { margin: .4rem 0; } figure svg { width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(4rem, 1fr)); gap: .5rem;
  list-style: none; margin: 0; padding: 0; font-size: .82rem; text-align: center; }
.tiles img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; background: #000; border-radius: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""
