"""The part of a report that shows images: some of the reference, some of the window, and those of
the window that look least like the reference.

It stands on top of Evidently's page, so its style is its own and every rule names it. It follows
the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

import numpy as np
import pandas as pd
import PIL.Image

from driftmill.bundle import PREDICTION, SCORE
from driftmill.features import EMBEDDING, IMAGE, Signature
from driftmill.monitor import embedding
from driftmill.monitor.drift import WindowResult
from driftmill.vision import images
from driftmill.vision.images import ImageError

#: Images of a kind, and pixels of their longer side: together they bound the page's size.
MOST_IMAGES, MOST_PIXELS = 24, 96
#: Quantiles of the reference between which a value is usual.
USUAL = (0.05, 0.95)


def section(
    signature: Signature, reference: pd.DataFrame, window: pd.DataFrame, result: WindowResult
) -> str:
    """HTML of the part, to stand in a page's body.

    Args:
        signature: the model's; of an image task.
        reference: the bundle's reference rows, some of which have their image.
        window: the window's rows, as `windows.rows` gives them.
        result: what the monitor found in them.
    """
    usual = {
        c.name: (*map(float, np.quantile(values, (*USUAL, 0.5))),)
        for c in signature.columns
        if len(values := _numbers(reference, c.name))
    }
    strange = least_alike(reference, window)
    state = "has drifted" if result.drifted else "is calm"
    parts = [
        f"<h2>Window {result.index} of version {html.escape(result.version)} {state}</h2>",
        _changes(result, reference, window),
        "<h3>The reference</h3>",
        _figures(reference, _spread(reference), usual=None),
        "<h3>This window</h3>",
        _figures(window, _spread(window), usual=None),
    ]
    if len(strange):
        parts += [
            "<h3>Least like the reference</h3>",
            "<p>The rows of this window that a classifier tells most surely from the reference by "
            "their embeddings, and what is most unusual about each.</p>",
            _figures(window, strange, usual),
        ]
    parts.append(
        "<p>Below is Evidently's report. Its thresholds are its own and look at one column at a "
        "time: it decides nothing, and may call drifted what is calm here.</p>"
    )
    return f"<style>{_STYLE}</style><section class='dm'>{''.join(parts)}</section>"


def least_alike(reference: pd.DataFrame, window: pd.DataFrame) -> np.ndarray:
    """Positions of the window's rows, those least like the reference first, by the classifier that
    compares embeddings. Empty where there are too few embeddings."""
    if EMBEDDING not in reference or EMBEDDING not in window:
        return np.empty(0, dtype=int)
    _, old = embedding.read(reference[EMBEDDING])
    places, new = embedding.read(window[EMBEDDING], old.shape[1])
    chosen = embedding.sample(len(new))
    if min(len(old), len(chosen)) < embedding.FOLDS:
        return np.empty(0, dtype=int)
    old = old[embedding.sample(len(old))]
    scores = embedding.separate(old, new[chosen]).scores
    return np.asarray(places[chosen][np.argsort(-scores, kind="stable")])


def _changes(result: WindowResult, reference: pd.DataFrame, window: pd.DataFrame) -> str:
    """A table of what has drifted."""
    rows = []
    for column in sorted((c for c in result.columns if c.drifted), key=lambda c: -c.effect):
        if column.name == PREDICTION:
            before, now = _moved_label(reference, window)
        else:
            before, now = (_median(side, column.name) for side in (reference, window))
        cells = [column.plain_name, column.test, f"{column.effect:.2f}", before, now]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    if not rows:
        return "<p>No column has drifted.</p>"
    head = ("what", "test", "effect, 0 to 1", "in the reference", "in the window")
    return (
        f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    )


def _median(rows: pd.DataFrame, name: str) -> str:
    values = _numbers(rows, name)
    return f"median {np.median(values):.3g}" if len(values) else ""


def _moved_label(reference: pd.DataFrame, window: pd.DataFrame) -> tuple[str, str]:
    """The answer that has become most more or less frequent, and its part before and now."""
    before, now = (side[PREDICTION].value_counts(normalize=True) for side in (reference, window))
    label = now.sub(before, fill_value=0).abs().idxmax()
    old, new = (f"{label} {100 * parts.get(label, 0):.0f} %" for parts in (before, now))
    return old, new


def _spread(rows: pd.DataFrame) -> list[int]:
    """Positions of rows that have an image, from all over the table."""
    there = np.flatnonzero(rows[IMAGE].notna()) if IMAGE in rows else np.empty(0, dtype=int)
    picked = np.linspace(0, len(there) - 1, min(MOST_IMAGES, len(there)))
    return [int(i) for i in there[picked.astype(int)]]


def _figures(
    rows: pd.DataFrame,
    positions: Iterable[int],
    usual: dict[str, tuple[float, ...]] | None,
) -> str:
    """The first images among the rows at some positions, each with the model's answer and, where it
    is given what is usual (low, high and median of each statistic), with what is not."""
    figures: list[str] = []
    for row in (rows.iloc[int(i)] for i in positions):
        if len(figures) == MOST_IMAGES:
            break
        picture = _picture(row.get(IMAGE))
        if picture is None:
            continue
        score = row.get(SCORE)
        sure = f" {score:.2f}" if isinstance(score, float) and np.isfinite(score) else ""
        lines = [f"{row.get(PREDICTION)}{sure}"]
        if usual is not None and (unusual := _most_unusual(row, usual)):
            lines.append(unusual)
        text = "<br>".join(html.escape(line) for line in lines)
        figures.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
    if not figures:
        return "<p>No image has been kept (serve.log.images).</p>"
    return f"<div class='dm-row'>{''.join(figures)}</div>"


def _picture(content: object) -> str | None:
    """An `img` that needs no other file; None for what is not an image."""
    if not isinstance(content, bytes):
        return None
    try:
        pixels = images.to_array(images.from_png(content))
    except ImageError:
        return None
    if max(pixels.shape[:2]) > MOST_PIXELS:
        smaller = PIL.Image.fromarray(pixels)
        smaller.thumbnail((MOST_PIXELS, MOST_PIXELS))
        pixels = np.asarray(smaller)
    data = base64.b64encode(images.array_to_png(pixels)).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>"


def _most_unusual(row: pd.Series, usual: dict[str, tuple[float, ...]]) -> str:
    """The statistic that lies furthest out of the usual, in words; empty where none does."""
    worst, text = 1.0, ""
    for name, (low, high, median) in usual.items():
        (value,) = _numbers(pd.DataFrame([row]), name) if name in row else (np.nan,)
        side = high - median if value > median else median - low
        if not np.isfinite(value) or low <= value <= high:
            continue
        distance = abs(value - median) / side if side > 0 else np.inf
        if distance > worst:
            worst = distance
            span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            text = f"{name} {value:.3g}, usually {span}"
    return text


def _numbers(rows: pd.DataFrame, name: str) -> np.ndarray:
    if name not in rows:
        return np.empty(0)
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    return np.asarray(values[np.isfinite(values)])


_STYLE = """
.dm { --ink: #1b1f27; --muted: #5d6676; --line: #e2e6ec; --card: #ffffff;
  color-scheme: light dark; margin: 1rem; padding: 1rem 1.2rem; border: 1px solid var(--line);
  border-radius: 12px; background: var(--card); color: var(--ink);
  font: 15px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  .dm { --ink: #e7eaf0; --muted: #9aa4b4; --line: #2f3643; --card: #1a1f28; } }
.dm h2 { font-size: 1.25rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.dm h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.dm p { color: var(--muted); margin: .2rem 0 .6rem; }
.dm table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.dm th { color: var(--muted); font-weight: 600; text-align: left; font-size: .85rem; }
.dm th, .dm td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
.dm-row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); }
.dm figure { margin: 0; }
.dm img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  border: 1px solid var(--line); image-rendering: pixelated; background: #80808030; }
.dm figcaption { color: var(--muted); font-size: .75rem; line-height: 1.3;
  overflow-wrap: anywhere; }
"""
