"""A first look at the data: `profile.json` for programs, `profile.html` for people.

It describes the training rows only, so that nobody tunes on the test rows by looking at them.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftmill.contract import Contract
from driftmill.data import split
from driftmill.features import IMAGE, TIME

#: A column that alone explains this part of the target is suspected to leak it.
LEAK = 0.98
BINS = 20
TOP = 10
#: Images of a label that the page shows, and labels.
SHOWN, SHOWN_LABELS = 12, 50


def write(out: Path, contract: Contract, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, Any]:
    """Write `profile.json` and `profile.html` of a prepared data set into a folder.

    Returns:
        What `profile.json` holds.
    """
    found = describe(contract, train, test)
    (out / "profile.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    pictures = _montage(train, contract.data.target.name) if contract.is_vision else ""
    (out / "profile.html").write_text(_page(found, pictures), encoding="utf-8")
    return found


def describe(contract: Contract, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, Any]:
    """The profile of the training rows as plain JSON values."""
    target = contract.data.target.name
    inputs = [c.name for c in contract.data.columns]
    content = [*inputs, target]
    columns = []
    for column in contract.data.columns:
        entry = _column(train[column.name])
        entry["type"] = column.type
        entry["correlation"] = _correlation(train[column.name], train[target], contract)
        entry["alone"] = _alone(train[column.name], train[target])
        columns.append(entry)
    rows, test_rows = _digests(train, content), _digests(test, content)
    return {
        "model": contract.model,
        "task": contract.task,
        "train_rows": len(train),
        "test_rows": len(test),
        "from_time": train[TIME].min().isoformat() if TIME in train else None,
        "to_time": train[TIME].max().isoformat() if TIME in train else None,
        "target": {**_column(train[target]), "labels": _labels(train[target], contract)},
        "columns": columns,
        "duplicates": int(rows.duplicated().sum()),
        "test_rows_in_train": int(test_rows.isin(rows).sum()),
        "constant": [c["name"] for c in columns if c["distinct"] <= 1],
        "suspected_leaks": [c["name"] for c in columns if (c["alone"] or 0.0) >= LEAK],
    }


def _digests(frame: pd.DataFrame, content: list[str]) -> pd.Series:
    """A number for each row that is the same for rows of the same content."""
    if IMAGE in frame:
        content = [*content, IMAGE]
        frame = frame.assign(**{IMAGE: split.image_digests(frame[IMAGE])})
    return pd.util.hash_pandas_object(frame[content], index=False)


def _column(values: pd.Series) -> dict[str, Any]:
    present = values.dropna()
    entry: dict[str, Any] = {
        "name": values.name,
        "count": len(present),
        "missing": len(values) - len(present),
        "distinct": int(present.nunique()),
    }
    if present.empty:
        return entry
    if not pd.api.types.is_numeric_dtype(values.dtype):
        counts = present.value_counts()
        entry["top"] = {str(k): int(n) for k, n in counts.head(TOP).items()}
        entry["other"] = int(counts.iloc[TOP:].sum())
        return entry
    numbers = present.to_numpy(np.float64)
    counts_, edges = np.histogram(numbers, bins=min(BINS, max(entry["distinct"], 1)))
    quantiles = np.quantile(numbers, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    names = ("min", "q05", "q25", "median", "q75", "q95", "max")
    entry |= {
        "mean": float(numbers.mean()),
        "std": float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0,
        **dict(zip(names, map(float, quantiles), strict=True)),
        "histogram": {"counts": counts_.tolist(), "edges": edges.tolist()},
    }
    return entry


def _labels(values: pd.Series, contract: Contract) -> dict[str, int] | None:
    """How often each label occurs, those of the contract even where they do not."""
    if contract.task == "regression":
        return None
    counts = dict.fromkeys(contract.data.target.labels, 0)
    return counts | {str(k): int(n) for k, n in values.value_counts().items()}


def _correlation(values: pd.Series, target: pd.Series, contract: Contract) -> float | None:
    """Spearman's rank correlation of a number with a number, or with the second of two labels."""
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return None
    if contract.task != "regression":
        labels = contract.data.target.labels or tuple(sorted(target.unique()))
        if len(labels) != 2:
            return None
        target = (target == labels[1]).astype(np.float64)
    present = values.notna()
    ranks, target_ranks = values[present].rank(), target[present].rank()
    if ranks.nunique() < 2 or target_ranks.nunique() < 2:
        return None
    return float(np.corrcoef(ranks, target_ranks)[0, 1])


def _alone(values: pd.Series, target: pd.Series) -> float | None:
    """How much of the target a column explains alone, from 0 to 1, on rows it was not learnt from.

    Every second row teaches the mean (the commonest label) of each category or of each of fifty
    bins; the other half is scored: 1 - error / error of a constant guess.
    """
    if pd.api.types.is_numeric_dtype(values.dtype):
        groups = pd.qcut(values, 50, labels=False, duplicates="drop").fillna(-1)
    else:
        groups = values.fillna("")
    odd = np.arange(len(values)) % 2 == 1
    teach, check = target[~odd], target[odd]
    if len(teach) < 10 or len(check) < 10 or teach.nunique() < 2:
        return None
    known = groups[odd].isin(groups[~odd])
    if pd.api.types.is_numeric_dtype(target.dtype):
        guess, means = teach.mean(), teach.groupby(groups[~odd]).mean()
        base = float(((check - guess) ** 2).sum())
        answer = groups[odd].map(means).where(known, guess).astype(np.float64)
        error = float(((check - answer) ** 2).sum())
    else:
        guess = teach.mode()[0]
        common = teach.groupby(groups[~odd]).agg(lambda labels: labels.mode()[0])
        base = float((check != guess).sum())
        error = float((check != groups[odd].map(common).where(known, guess)).sum())
    return max(0.0, 1.0 - error / base) if base > 0 else None


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #66727f; --line: #dde3ea;
  --bar: #3d7dca; --bad: #b3261e; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #94a1ae; --line: #333d48;
  --bar: #6ea8ea; --bad: #ff8a80; --page: #14191f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
.soft { color: var(--soft) } .bad { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th { font-weight: 600; color: var(--soft) }
th:first-child, td:first-child, .text { text-align: left }
svg rect { fill: var(--bar) }
td.text img { height: 3rem; image-rendering: pixelated; display: block }
"""


def _page(found: dict[str, Any], pictures: str) -> str:
    """The profile as one HTML page without any other file; `pictures` is a section of it."""
    name = html.escape(found["model"])
    span = ""
    if found["from_time"]:
        span = f", from {found['from_time'][:16]} to {found['to_time'][:16]}"
    target = found["target"]
    rows = "".join(_row(column) for column in found["columns"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: data profile</title><style>{_STYLE}</style></head><body>
<h1>{name}: data profile</h1>
<p class="soft">{found["train_rows"]:,} training rows{span}; {found["test_rows"]:,} test rows
are kept aside and not shown.</p>
<ul>{"".join(_remarks(found))}</ul>
<h2>Target: {html.escape(target["name"])}</h2>
<p>{_summary(target)}</p><p>{_picture(target)}</p>
{pictures}<h2>{"Statistics of the images" if pictures else "Inputs"}</h2>
<div class="scroll"><table><thead><tr><th>column</th><th>type</th><th>missing</th><th>distinct</th>
<th>summary</th><th>distribution</th><th>correlation</th><th>alone</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="soft">Correlation: Spearman's, with the target. Alone: the part of the target that the
column explains by itself on rows it was not learnt from, 0 to 1; {LEAK:g} or more looks like a
leak.</p>
</body></html>
"""


def _montage(train: pd.DataFrame, target: str) -> str:
    """Some images of each label, evenly from first to last, as a section of the page."""
    from driftmill.vision import images  # needs Pillow, which tables do not

    rows = []
    for label, of_label in list(train.groupby(target)[IMAGE])[:SHOWN_LABELS]:
        places = np.unique(np.linspace(0, len(of_label) - 1, SHOWN).round().astype(int))
        strip = np.concatenate(list(of_label.iloc[places]), axis=2)
        content = base64.b64encode(images.to_png(strip)).decode()
        name = html.escape(str(label))
        rows.append(
            f'<tr><td>{name}</td><td>{len(of_label):,}</td><td class="text">'
            f'<img alt="images of {name}" src="data:image/png;base64,{content}"></td></tr>'
        )
    return f"""<h2>Images</h2>
<div class="scroll"><table>
<thead><tr><th>label</th><th>images</th><th class="text">some of them</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
"""


def _remarks(found: dict[str, Any]) -> list[str]:
    remarks = []
    if found["suspected_leaks"]:
        listed = html.escape(", ".join(found["suspected_leaks"]))
        remarks.append(
            f'<li class="bad">Suspected leak: {listed} alone tells the target almost surely. '
            "Is it known when the model is asked?</li>"
        )
    if found["constant"]:
        listed = html.escape(", ".join(found["constant"]))
        # Of images these are measured for the monitor; no model learns from them.
        of_images = found["task"] == "image-classification"
        text = "The same for every image" if of_images else "Constant, so of no use"
        remarks.append(f"<li>{text}: {listed}.</li>")
    if found["duplicates"]:
        remarks.append(f"<li>{found['duplicates']:,} rows repeat another row.</li>")
    if found["test_rows_in_train"]:
        remarks.append(
            f"<li>{found['test_rows_in_train']:,} test rows equal a training row; "
            "the test is that much easier.</li>"
        )
    return remarks or ["<li>No duplicates, constant columns or suspected leaks.</li>"]


def _row(column: dict[str, Any]) -> str:
    total = column["count"] + column["missing"]
    missing = f"{column['missing'] / total:.1%}" if column["missing"] else "0"
    correlation = "" if column["correlation"] is None else f"{column['correlation']:+.2f}"
    alone = "" if column["alone"] is None else f"{column['alone']:.2f}"
    style = ' class="bad"' if (column["alone"] or 0.0) >= LEAK else ""
    return (
        f"<tr><td>{html.escape(column['name'])}</td><td>{column['type']}</td><td>{missing}</td>"
        f'<td>{column["distinct"]:,}</td><td class="text">{_summary(column)}</td>'
        f'<td class="text">{_picture(column)}</td><td>{correlation}</td>'
        f"<td{style}>{alone}</td></tr>"
    )


def _summary(column: dict[str, Any]) -> str:
    if "mean" in column:
        return (
            f"{column['mean']:.4g} ± {column['std']:.4g}, "
            f"{column['min']:.4g} … {column['median']:.4g} … {column['max']:.4g}"
        )
    shares = [f"{k} {n / column['count']:.0%}" for k, n in column.get("top", {}).items()]
    more = " …" if len(shares) > 3 else ""
    return html.escape(", ".join(shares[:3])) + more


def _picture(column: dict[str, Any]) -> str:
    """A small bar chart: the histogram, or the counts of the commonest categories."""
    if "histogram" in column:
        counts = column["histogram"]["counts"]
        edges = column["histogram"]["edges"]
        names = [f"{a:.4g} to {b:.4g}" for a, b in itertools.pairwise(edges)]
    else:
        counts, names = list(column.get("top", {}).values()), list(column.get("top", {}))
    if not counts:
        return ""
    width, height, highest = 160, 32, max(counts)
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height * (1 - n / highest):.1f}" '
        f'width="{max(step - 1, 1):.1f}" height="{height * n / highest:.1f}">'
        f"<title>{html.escape(name)}: {n:,}</title></rect>"
        for i, (n, name) in enumerate(zip(counts, names, strict=True))
    )
    label = html.escape(f"distribution of {column['name']}")
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{bars}</svg>'
