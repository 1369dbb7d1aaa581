"""The demo's page: whole, self-contained, and no way in for what the data says."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from driftmill import demo_page
from driftmill.contract import Contract
from driftmill.demo_page import Check, Event, Picture, Story, Stretch
from driftmill.monitor.drift import ColumnResult, WindowResult

VERSIONS = ["c236eae602f2", "03f11a040a6a", "e4ec156e50d9", "176f7115a23a", "56d7a9a28e70"]


def window(index: int, effect: float, drifted: bool, alarm: bool) -> WindowResult:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=index)
    column = ColumnResult(
        name="amount",
        kind="input",
        test="ks",
        p_value=0.5,
        effect=effect,
        drifted=drifted,
        missing=0.0,
        unseen=0.0,
        out_of_range=0.0,
    )
    return WindowResult(
        index=index,
        version=VERSIONS[index % len(VERSIONS)],
        rows=500,
        from_at=at,
        to_at=at,
        columns=(column,),
        drifted=drifted,
        score=effect if drifted else 0.0,
        features_drifted=int(drifted),
        streak=int(drifted),
        alarm=alarm,
    )


def story(contract: Contract, reason: str, passed: bool = True) -> Story:
    at = np.linspace(10, 110, 5000)
    return Story(
        contract=contract,
        title="tiny: from drift to a better model",
        answers=pd.DataFrame(
            {
                "at": at,
                "row": np.arange(5000),
                "version": np.repeat(VERSIONS, 1000),
                "block": np.arange(5000) // 500,
                "_time": pd.date_range("2011-07-01", periods=5000, freq="h", tz="UTC"),
            }
        ),
        quality=pd.DataFrame(
            {"at": at[::500], "served": 0.9, "never_retrained": np.linspace(0.9, 0.6, 10)}
        ),
        windows=[window(i, 0.05 + 0.08 * (i > 4), i > 4, i > 5) for i in range(9)],
        window_at=[20.0 + 10 * i for i in range(9)],
        events=[Event(12.0, "first champion", reason)],
        decisions=pd.DataFrame({"second": ["50.1"], "answer": ["start"], "reason": [reason]}),
        stretches=[Stretch("03f11a040a6a", 1000, 0.9, 0.8)],
        checks=[Check("every request was answered", passed, reason)],
        facts={"failed requests": "0"},
        marks={"onset": 60.0, "alarm": 70.0, "run started": 70.3},
    )


@pytest.mark.parametrize("reason", ["fine", "<script>alert(1)</script>", '"><img src=x onerror=1>'])
def test_the_page_is_self_contained_and_escapes(
    tiny: Contract, tmp_path: Path, reason: str
) -> None:
    page = tmp_path / "folder" / "demo.html"
    demo_page.write(page, story(tiny, reason))
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 3
    assert "Every stage happened." in text
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    for version in VERSIONS:
        assert version in text


def test_a_stage_that_did_not_happen_is_said_first(tiny: Contract, tmp_path: Path) -> None:
    demo_page.write(tmp_path / "demo.html", story(tiny, "no promotion", passed=False))
    text = (tmp_path / "demo.html").read_text()
    assert text.index("Not every stage happened") < text.index("What happened")
    assert "✗" in text


def test_a_story_without_windows_and_stretches(tiny: Contract, tmp_path: Path) -> None:
    full = story(tiny, "x")
    empty = Story(**{**vars(full), "windows": [], "window_at": [], "stretches": []})
    demo_page.write(tmp_path / "demo.html", empty)
    assert (tmp_path / "demo.html").stat().st_size > 1000


def test_pictures_stand_before_and_after_the_onset(tiny: Contract, tmp_path: Path) -> None:
    shown = [Picture("before", b"\x89PNG", "<b>7</b>"), Picture("after", b"\x89PNG", "3")]
    demo_page.write(tmp_path / "demo.html", Story(**{**vars(story(tiny, "x")), "pictures": shown}))
    text = (tmp_path / "demo.html").read_text()
    assert text.count("<img alt='' src='data:image/png;base64,iVBORw==") == 2
    assert "&lt;b&gt;7" in text
    assert text.index("Before the onset") < text.index("After the onset")
