"""The report page: complete, self-contained, and safe with whatever the data is called."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.data.prepare import Prepared
from driftmill.evaluate import gates, report
from tests.conftest import tiny_frame
from tests.evaluate import models

#: Elements that HTML does not close.
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class _Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def _write(
    folder: Path,
    of: Contract,
    rows: Prepared,
    challenger: Bundle,
    champion: Bundle | None = None,
) -> tuple[str, gates.Verdict]:
    verdict = gates.judge(of, rows, challenger, champion)
    path = folder / "report.html"
    report.write(path, of, rows, challenger, champion, verdict)
    assert path.stat().st_size < 2_000_000
    return path.read_text(), verdict


def _assert_self_contained(page: _Page, html: str) -> None:
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action"):
                assert str(value).startswith("#"), value
    assert "url(http" not in html
    assert "@import" not in html


def test_a_promotion_of_a_classification(tiny: Contract, tmp_path: Path) -> None:
    of = models.changed(tiny, gates={"slices": {"columns": ["channel", "age"]}})
    new = models.classifier(tmp_path / "new", of)
    old = models.classifier(tmp_path / "old", of, noise=0.1)
    html, verdict = _write(tmp_path, of, models.tiny_prepared(), new, old)
    page = _Page(html)
    _assert_self_contained(page, html)
    assert "Not promoted" not in page.text
    assert "Promoted" in page.text
    assert verdict.reason.partition(": ")[2] in page.text
    for check in verdict.checks:
        assert check.detail in page.text
    for title in (
        "Gain over the champion",
        "Confusion matrix",
        "ROC curve",
        "Precision and recall",
        "Calibration",
        "Permutation importance",
        "Slices",
        "2 \N{MULTIPLICATION SIGN} amount above 1000",
        "apiVersion: driftmill/v1",
        old.version,
        "made",
        "by hand",
        "a" * 64,
    ):
        assert title in page.text, title
    assert "prefers-color-scheme: dark" in html
    assert "#040404" not in html, "a figure's colour was not replaced by a variable"
    assert html.count("<svg") == 5


def test_a_rejected_regression(tmp_path: Path) -> None:
    of = models.changed(models.numbers(), gates={"slices": {"columns": ["kind", "x"]}})
    rows = models.prepared(models.numbers_frame(800, 1), models.numbers_frame(500, 2))
    times = pd.date_range("2024-01-01", periods=500, freq="h", tz="UTC")
    rows.test["_time"] = times.as_unit("ns")
    new, old = (models.regressor(tmp_path / f"{slope}", of, slope) for slope in (2.0, 3.0))
    html, verdict = _write(tmp_path, of, rows, new, old)
    page = _Page(html)
    _assert_self_contained(page, html)
    assert not verdict.promote
    for title in (
        "Not promoted",
        "Predicted and observed",
        "Residuals",
        "Error by decile",
        "Over the test period",
        "kind",
    ):
        assert title in page.text, title
    assert "Confusion matrix" not in page.text


def test_more_than_two_labels(tmp_path: Path) -> None:
    of = models.sizes()
    rows = models.prepared(models.sizes_frame(500, 1), models.sizes_frame(400, 2))
    html, verdict = _write(tmp_path, of, rows, models.three_labels(tmp_path / "new", of))
    page = _Page(html)
    _assert_self_contained(page, html)
    assert verdict.promote
    assert "Gain over the dummy" in page.text
    confusion = page.text[page.text.index("Confusion matrix") :]
    assert all(label in confusion for label in ("small", "middle", "large"))


def test_answers_that_cannot_be_scored_leave_a_page_without_plots(
    tiny: Contract, tmp_path: Path
) -> None:
    broken = models.classifier(tmp_path / "new", tiny, nan_above=700)
    html, verdict = _write(tmp_path, tiny, models.tiny_prepared(), broken)
    page = _Page(html)
    assert not verdict.promote
    assert "are not numbers" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("label", ["yes", "no"])
def test_test_rows_of_one_label_leave_a_page(tiny: Contract, tmp_path: Path, label: str) -> None:
    rows = models.tiny_prepared()
    rows.test["fraud"] = label
    html, _ = _write(tmp_path, tiny, rows, models.classifier(tmp_path / "new", tiny))
    assert "cannot be measured" in _Page(html).text
    assert "ROC curve" not in html


def test_a_handful_of_rows_leaves_a_page(tiny: Contract, tmp_path: Path) -> None:
    rows = models.tiny_prepared(12)
    rows.test["_time"] = pd.date_range("2024-01-01", periods=12, freq="h", tz="UTC")
    html, _ = _write(tmp_path, tiny, rows, models.classifier(tmp_path / "new", tiny))
    assert "12 test rows, at least 100" in _Page(html).text


def test_text_from_the_data_is_never_markup(tmp_path: Path, tiny: Contract) -> None:
    evil = "<script>alert('1')</script>"
    image = '"><img src=x onerror=alert(2)>'
    values = tiny.model_dump(mode="json")
    values["owner"] = f"{evil} & co"
    values["description"] = "</pre><script>alert(3)</script>"
    values["data"]["target"]["labels"] = [image, evil]
    values["data"]["columns"][2]["categories"] = [evil, "$\\frac{$"]
    values["gates"]["slices"]["columns"] = ["channel"]
    of = Contract.model_validate(values)

    def rows(seed: int) -> pd.DataFrame:
        frame = tiny_frame(800, seed)
        frame["channel"] = frame["channel"].map({"web": evil, "app": "$\\frac{$"})
        frame["fraud"] = frame["fraud"].map({"no": image, "yes": evil})
        return frame

    table = models.prepared(rows(1), rows(2), reasons={evil: 2})
    new = models.classifier(tmp_path / "new", of, labels=(image, evil), frame=rows(3))
    html, verdict = _write(tmp_path, of, table, new)
    page = _Page(html)
    _assert_self_contained(page, html)
    assert verdict.promote
    assert evil in page.text
    assert image in page.text
    assert "$\\frac{$" in page.text
