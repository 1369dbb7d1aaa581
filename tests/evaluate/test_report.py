"""The report page: complete, self-contained, and safe with whatever the data is called."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.data.prepare import Prepared
from driftmill.evaluate import gates, report
from tests.conftest import tiny_frame
from tests.evaluate import models, pictures

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
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if tag == "img" and name == "src":
                assert str(value).startswith("data:image/png;base64,")
            elif name in ("src", "href", "xlink:href", "action"):
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


def _shots(page: _Page) -> list[np.ndarray]:
    """The images on a page, (height, width, 3)."""
    found = []
    for tag, attributes in page.elements:
        if tag == "img":
            content = base64.b64decode(str(attributes["src"]).partition(",")[2])
            found.append(np.asarray(Image.open(io.BytesIO(content))))
    return found


def test_a_model_of_images(tmp_path: Path) -> None:
    of = pictures.make_contract()
    new = pictures.make_bundle(
        tmp_path / "new",
        of,
        pictures.network(of),
        data={
            "precision": {
                "asked": "int8",
                "served": "float32",
                "metric": "accuracy",
                "note": "int8 is surely worse",
                "float32": {"score": 0.9, "size_mb": 1.5, "ms": 2.5},
                "int8": {"score": 0.5, "size_mb": 0.4, "ms": 0.75},
            }
        },
    )
    html, verdict = _write(tmp_path, of, pictures.prepared(of, new), new)
    page = _Page(html)
    _assert_self_contained(page, html)
    assert verdict.notes == ("Precision: int8 is surely worse",)
    for text in (
        "Worst errors",
        "Accuracy by label",
        "Confusion matrix",
        "Training",
        "90 images; 10 were kept out",
        "2 runs: accuracy 0.82 on average with a standard deviation of 0.01",
        "learns 32 images by heart in 12 steps",
        "3 of 32 units",
        "the learning rate is <high>",
        "The weights are those of epoch 2",
        "Learning-rate test",
        "Gradients by layer",
        "Precision",
        "0.75 ms",
    ):
        assert text in page.text, text
    assert "Permutation importance" not in page.text
    assert "#040404" not in html, "a figure's colour was not replaced by a variable"
    assert page.text.count("truth: ") == 24
    shots = _shots(page)
    assert len(shots) == 48
    assert all(shot.shape == (96, 96, 3) for shot in shots)
    # The image itself is grey, with each pixel a square; what spoke for the answer is in colour.
    image, seen = shots[0].astype(int), shots[1].astype(int)
    assert (image[..., 0] == image[..., 2]).all()
    assert (image[:12, :12] == image[0, 0]).all()
    assert (seen[..., 0] != seen[..., 2]).any()


def test_a_model_of_images_that_makes_no_error(picture_model: Bundle, tmp_path: Path) -> None:
    of = picture_model.manifest.contract
    rows = pictures.prepared(of, picture_model, wrong=0)
    html, _ = _write(tmp_path, of, rows, picture_model)
    page = _Page(html)
    assert "all answers are right" in page.text
    assert "img" not in page.tags


@pytest.mark.slow
def test_large_images_in_colour_do_not_make_a_large_page(tmp_path: Path) -> None:
    """Noise is what a PNG file can compress least; `_write` holds the page below 2 MB."""
    of = pictures.make_contract(channels=3, size=112)
    new = pictures.make_bundle(tmp_path / "new", of, pictures.network(of))
    html, _ = _write(tmp_path, of, pictures.prepared(of, new, rows=60, wrong=30), new)
    assert {shot.shape for shot in _shots(_Page(html))} == {(96, 96, 3)}


def test_labels_of_images_are_never_markup(tmp_path: Path) -> None:
    evil = ("<script>alert('1')</script>", '"><img src=x onerror=alert(2)>', "$\\frac{$")
    of = pictures.make_contract(labels=evil)
    new = pictures.make_bundle(tmp_path / "new", of, pictures.network(of))
    html, _ = _write(tmp_path, of, pictures.prepared(of, new), new)
    page = _Page(html)
    _assert_self_contained(page, html)
    for label in evil:
        assert f"truth: {label}" in page.text
