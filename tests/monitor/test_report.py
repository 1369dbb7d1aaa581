from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from driftmill import contract, features, rollout
from driftmill.bundle import BundleError, Manifest
from driftmill.contract import Contract
from driftmill.monitor import report, windows
from driftmill.monitor.windows import Monitor
from driftmill.store import Store
from tests.conftest import CONTRACT, tiny_frame
from tests.monitor import traffic
from tests.serving import pictures


@pytest.fixture
def tiny() -> Contract:
    """The small contract with windows of 200 rows."""
    return contract.parse(CONTRACT + "monitor: {window: 200}\n")


def answered(rows: int, seed: int = 0) -> pd.DataFrame:
    frame = tiny_frame(rows, seed)
    return frame.assign(_prediction=frame["fraud"], _score=0.5)


def test_evidently_is_imported_in_one_module_only() -> None:
    root = Path(report.__file__).parents[2]
    files = [p for part in ("driftmill", "services") for p in (root / part).rglob("*.py")]
    pattern = re.compile(r"^\s*(from|import) evidently", re.MULTILINE)
    found = [p.name for p in files if pattern.search(p.read_text())]
    assert found == ["report.py"]


def test_what_evidently_cannot_take_is_left_out_and_named(tiny: Contract) -> None:
    sign = features.signature(tiny, tiny_frame(100))
    window = answered(100).drop(columns="channel").assign(age=np.nan, amount="much")
    data = report.tables(sign, answered(500), window, rows=50)
    assert data.left_out == {
        "amount": "no valid value in the window",
        "age": "no valid value in the window",
        "channel": "absent from the window",
    }
    assert data.numbers == ["_score"]
    assert data.categories == ["_prediction"]
    assert len(data.reference) == len(data.window) == 50
    many = answered(1000).assign(channel=[f"c{i}" for i in range(1000)])
    left_out = report.tables(sign, answered(500), many, rows=1000).left_out
    assert left_out == {"channel": "more than 200 categories in the window"}


def test_without_any_column_there_is_a_reason(tiny: Contract) -> None:
    sign = features.signature(tiny, tiny_frame(100))
    data = report.tables(sign, answered(100), pd.DataFrame({"other": [1.0]}), rows=50)
    with pytest.raises(report.ReportError, match="no column is left"):
        report.render(data)


@pytest.mark.slow
def test_reports_of_windows(
    tiny: Contract, store: Store, make_bundle: Callable[..., Manifest], tmp_path: Path
) -> None:
    """The worker process makes a page of a good window, a broken one, and survives a lost one."""
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test")
    good, broken = tiny_frame(200, 1), tiny_frame(200, 2, shift=3).assign(age=np.nan)
    for i, frame in enumerate((good, broken, broken)):
        at = datetime.now(UTC) - timedelta(minutes=9 - i)
        traffic.answer(store, "tiny", version, frame, tmp_path / "spool", at=at)
    monitor = Monitor(tiny, store)
    monitor.tick()
    assert monitor.unreported == [0, 1, 2]
    # The bundle is lost while the last report waits.
    command = [sys.executable, "-m", "driftmill.monitor.report", "--store", store.uri]
    command += ["--model", "tiny", "--rows", "150"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        lines = []
        for index in (0, 1):
            worker.stdin.write(f"{index}\n")
            worker.stdin.flush()
            lines.append(json.loads(worker.stdout.readline()))
        store.delete(f"tiny/bundles/{version}/reference.parquet")
        worker.stdin.write("2\n")
        worker.stdin.flush()
        lines.append(json.loads(worker.stdout.readline()))
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0
    calm, drifted, lost = lines
    assert calm["error"] == drifted["error"] == ""
    assert calm["reference_rows"] == calm["window_rows"] == 150
    assert set(calm["scores"]) == {"amount", "age", "channel", "_score", "_prediction"}
    assert drifted["left_out"] == {"age": "no valid value in the window"}
    assert drifted["scores"]["amount"] > 1 > calm["scores"]["amount"]
    assert drifted["share"] > calm["share"]
    assert "reference.parquet is missing" in lost["error"]
    for index in (0, 1):
        key = windows.window_key("tiny", index)
        assert b"<!DOCTYPE html>" in store.read(f"{key}/report.html")
        kept = report.Report.model_validate_json(store.read(f"{key}/report.json"))
        assert kept.evidently["metrics"]
    # A report that failed is not tried at every start.
    again = Monitor(tiny, store)
    with pytest.raises(BundleError):
        again.tick()
    assert again.unreported == []


@pytest.mark.slow
def test_the_report_of_a_window_of_images_shows_them(store: Store, tmp_path: Path) -> None:
    shades = pictures.shades(monitor={"window": 100, "min_rows": 50})
    version = pictures.put_bundle(store, tmp_path, shades).version
    rollout.change(store, "shades", champion=version, by="test")
    frame = pictures.frame(shades, 100, seed=1, lighter=100)
    traffic.answer(store, "shades", version, frame, tmp_path / "spool")
    Monitor(shades, store).tick()
    made = report.make(store, "shades", 0, 1000)
    assert made.error == ""
    assert made.scores["brightness"] > 0.5
    assert made.scores["width"] == 0
    assert "_embedding" not in made.scores
    page = store.read(f"{windows.window_key('shades', 0)}/report.html").decode()
    assert page.index("<body>") < page.index("Least like the reference") < page.index("<script>var")
