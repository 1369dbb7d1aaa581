"""Evidently reports of windows: what people look at. They decide nothing.

This is the only module of the library that imports Evidently. Importing it takes seconds and its
reports take a core, so the monitor runs this module as a process of its own, which reads the
windows to report from its standard input and ends when that closes:

    python -m driftmill.monitor.report --store URI --model NAME --rows N

Each line in is a window's index, each line out a `Report` as JSON. Evidently fails as a whole on a
column that is absent, all missing or of the wrong type: such columns are taken out first, and
listed. On the page of a window of images, these come first (`driftmill.monitor.gallery`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from driftmill.bundle import PREDICTION, SCORE, BundleError
from driftmill.features import MISSING, Signature
from driftmill.monitor import windows
from driftmill.monitor.drift import WindowResult
from driftmill.store import Store

#: Distances, not p-values: higher is worse whatever the number of rows.
METHODS = {"number": "wasserstein", "category": "jensenshannon"}
THRESHOLD = 0.1
#: Evidently draws every category; beyond this the page is of no use.
MOST_CATEGORIES = 200


class Report(BaseModel):
    """What a report says; `report.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    version: str
    scores: dict[str, float] = {}
    """Evidently's distance of each column: normed Wasserstein of numbers, Jensen-Shannon of
    categories."""
    share: float | None = None
    """Part of the columns that Evidently calls drifted."""
    left_out: dict[str, str] = {}
    """Columns that Evidently cannot take, and why."""
    reference_rows: int = 0
    window_rows: int = 0
    seconds: float = 0.0
    error: str = ""
    """Why there is no page."""
    evidently: dict[str, Any] = {}
    """Evidently's own results."""


class ReportError(RuntimeError):
    """Evidently could not make a report."""


@dataclass(frozen=True)
class Tables:
    """Reference and window as Evidently takes them."""

    reference: pd.DataFrame
    window: pd.DataFrame
    numbers: list[str]
    categories: list[str]
    left_out: dict[str, str]


def tables(
    signature: Signature, reference: pd.DataFrame, window: pd.DataFrame, rows: int
) -> Tables:
    """Take out what Evidently would fail on, and sample.

    Args:
        signature: which columns there are.
        reference: the bundle's reference rows.
        window: rows of the inference log.
        rows: most rows to keep of either.
    """
    kinds = {c.name: "number" if c.is_numeric else "category" for c in signature.columns}
    kinds |= {PREDICTION: "number" if signature.task == "regression" else "category"}
    if signature.task != "regression":
        kinds[SCORE] = "number"
    left_out: dict[str, str] = {}
    sides: tuple[dict[str, pd.Series], dict[str, pd.Series]] = ({}, {})
    for name, kind in kinds.items():
        columns = []
        for place, frame in (("reference", reference), ("window", window)):
            if name not in frame:
                left_out[name] = f"absent from the {place}"
                break
            column = _clean(frame[name], kind)
            if not column.notna().any():
                left_out[name] = f"no valid value in the {place}"
                break
            if kind == "category" and column.nunique() > MOST_CATEGORIES:
                left_out[name] = f"more than {MOST_CATEGORIES} categories in the {place}"
                break
            columns.append(column)
        else:
            for side, column in zip(sides, columns, strict=True):
                side[name] = column
    kept = [name for name in kinds if name not in left_out]
    old, new = (_sample(pd.DataFrame(side), rows) for side in sides)
    # A sample may miss the few values that a column has.
    for name in kept:
        if not (old[name].notna().any() and new[name].notna().any()):
            left_out[name] = "hardly any valid value"
    kept = [name for name in kept if name not in left_out]
    return Tables(
        reference=old[kept],
        window=new[kept],
        numbers=[name for name in kept if kinds[name] == "number"],
        categories=[name for name in kept if kinds[name] == "category"],
        left_out=left_out,
    )


def render(data: Tables) -> tuple[str, dict[str, Any], dict[str, float], float]:
    """Have Evidently compare.

    Returns:
        The page, Evidently's results, the distance of each column, and the part of the columns that
        it calls drifted.

    Raises:
        ReportError: there is no column to compare, or Evidently failed.
    """
    # Here and not above, so that others can read reports without the wait.
    import evidently
    from evidently import DataDefinition, Dataset
    from evidently.presets import DataDriftPreset

    columns = data.numbers + data.categories
    if not columns:
        raise ReportError("no column is left to compare")
    definition = DataDefinition(numerical_columns=data.numbers, categorical_columns=data.categories)
    preset = DataDriftPreset(
        columns=columns,
        num_method=METHODS["number"],
        cat_method=METHODS["category"],
        num_threshold=THRESHOLD,
        cat_threshold=THRESHOLD,
    )
    try:
        snapshot = evidently.Report([preset], include_tests=False).run(
            Dataset.from_pandas(data.window, data_definition=definition),
            Dataset.from_pandas(data.reference, data_definition=definition),
        )
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            snapshot.save_html(str(page))
            html = page.read_text(encoding="utf-8")
        found = json.loads(snapshot.json())
    # It fails with whatever exception its statistics or plots run into.
    except Exception as error:
        raise ReportError(f"Evidently failed: {type(error).__name__}: {error}") from error
    scores, share = _by_name(found)
    return html, found, scores, share


def make(store: Store, model: str, index: int, rows: int) -> Report:
    """Make and keep the report of a window: `report.html` and `report.json` beside its result.

    A report that cannot be made is kept as well, with the reason.

    Args:
        store: where the window lies.
        model: whose.
        index: number of the window; its rows have been kept.
        rows: most rows to compare.
    """
    started = time.perf_counter()
    key = windows.window_key(model, index)
    result = WindowResult.model_validate_json(store.read(f"{key}/result.json"))
    report = Report(index=index, version=result.version)
    try:
        _, signature, reference = windows.reference(store, model, result.version)
        window = windows.rows(store, model, index)
        data = tables(signature, reference, window, rows)
        report = report.model_copy(
            update={
                "left_out": data.left_out,
                "reference_rows": len(data.reference),
                "window_rows": len(data.window),
            }
        )
        html, found, scores, share = render(data)
        if signature.image is not None:
            from driftmill.monitor import gallery  # needs Pillow, which tables do not

            part = gallery.section(signature, reference, window, result)
            html = html.replace("<body>", f"<body>{part}", 1)
    except (BundleError, ReportError) as error:
        report = report.model_copy(update={"error": str(error)})
    else:
        store.write(f"{key}/report.html", html.encode())
        report = report.model_copy(update={"scores": scores, "share": share, "evidently": found})
    report = report.model_copy(update={"seconds": round(time.perf_counter() - started, 3)})
    store.write(f"{key}/report.json", report.model_dump_json(indent=1).encode())
    return report


def main() -> None:
    """Make the reports that standard input asks for."""
    parser = argparse.ArgumentParser(description="Make Evidently reports of windows.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, type=int)
    options = parser.parse_args()
    os.nice(10)  # reports wait for the services, never the other way round
    # Ctrl-C goes to the monitor, too, which then closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Evidently prints to standard output, where only results belong.
    results, sys.stdout = sys.stdout, sys.stderr
    os.environ["DO_NOT_TRACK"] = "1"  # no usage statistics to Evidently's makers
    import evidently  # noqa: F401 (the first report shall not wait for it)

    store = Store(options.store)
    for line in sys.stdin:
        report = make(store, options.model, int(line), options.rows)
        print(report.model_dump_json(exclude={"evidently"}), file=results, flush=True)


def _clean(column: pd.Series, kind: str) -> pd.Series:
    if kind == "number":
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32).astype(np.float64)
        return pd.Series(np.where(np.isfinite(numbers), numbers, np.nan))
    column = column.reset_index(drop=True)
    texts = column.map(str).where(column.notna())
    return texts.where(texts != MISSING)


def _sample(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    if len(frame) > rows:
        frame = frame.sample(rows, random_state=0).sort_index()
    return frame.reset_index(drop=True)


def _by_name(found: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Read Evidently's results by metric and column, never by position."""
    scores: dict[str, float] = {}
    share = float("nan")
    for metric in found["metrics"]:
        kind = metric["config"]["type"].rsplit(":", 1)[-1]
        if kind == "ValueDrift":
            if np.isfinite(distance := float(metric["value"])):
                scores[metric["config"]["column"]] = distance
        elif kind == "DriftedColumnsCount":
            share = float(metric["value"]["share"])
    return scores, share


if __name__ == "__main__":
    main()
