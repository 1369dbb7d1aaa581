from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from driftmill import bundle
from driftmill.contract import Monitor
from driftmill.features import EMBEDDING, IMAGE, Signature
from driftmill.monitor import drift, gallery
from driftmill.monitor.drift import WindowResult
from driftmill.store import Store
from driftmill.vision import images
from tests.serving import pictures

AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def champion(store: Store, tmp_path: Path) -> tuple[Signature, pd.DataFrame]:
    """Signature and reference rows of the tiny model of images."""
    version = pictures.put_bundle(store, tmp_path).version
    loaded = bundle.fetch(store, "shades", version)
    return loaded.signature, loaded.reference


def logged(signature: Signature, rows: int, lighter: int = 0) -> pd.DataFrame:
    """Rows of the log, as the tiny model answers; it says `<light>` for `light`."""
    frame = pictures.frame(pictures.shades(), rows, seed=1, lighter=lighter)
    pixels = np.stack(list(frame[IMAGE]))
    both = np.column_stack([pixels.mean(axis=(1, 2, 3)), pixels.max(axis=(1, 2, 3))])
    return frame.assign(
        _at=AT,
        _prediction=np.where(frame["shade"] == "dark", "dark", "<light>"),
        _score=1 / (1 + np.exp(-0.1 * (both[:, 0] - 127.5))),
        **{
            IMAGE: [images.to_png(p) for p in pixels],
            EMBEDDING: [row.tobytes() for row in both.astype("<f2")],
        },
    )


def judge(signature: Signature, reference: pd.DataFrame, window: pd.DataFrame) -> WindowResult:
    compiled = drift.compile_reference(signature, reference)
    return drift.decide(compiled, Monitor(min_rows=20), window, index=3, version="abc")


def pixels_of(page: str) -> list[np.ndarray]:
    found = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    return [images.from_png(base64.b64decode(data)) for data in found]


def test_it_shows_reference_window_and_what_differs_most(
    champion: tuple[Signature, pd.DataFrame],
) -> None:
    signature, reference = champion
    window = logged(signature, 60, lighter=150)
    page = gallery.section(signature, reference, window, judge(signature, reference, window))
    assert "Window 3 of version abc has drifted" in page
    assert re.search(r"<td>brightness</td><td>ks</td><td>0\.\d+</td><td>median 0\.5", page)
    assert len(pixels_of(page)) == 3 * gallery.MOST_IMAGES
    assert "&lt;light&gt; 1.00" in page
    assert "<light>" not in page
    strange = pixels_of(page.partition("Least like")[2])
    assert min(p.mean() for p in strange) > 150
    # It has no other file to load and nothing to run.
    assert "<script" not in page
    assert not re.search(r"src='(?!data:)|href|url\(", page)


def test_the_strangest_rows_come_first(champion: tuple[Signature, pd.DataFrame]) -> None:
    signature, reference = champion
    window = logged(signature, 80)
    strange = np.full((1, 8, 8), 255, dtype=np.uint8)
    both = np.array([255, 60000], dtype="<f2").tobytes()
    for place in (5, 40):
        window.at[place, EMBEDDING] = both
        window.at[place, IMAGE] = images.to_png(strange)
        window.at[place, "brightness"] = 9.0
    first = gallery.least_alike(reference, window)
    assert set(first[:2]) == {5, 40}
    assert sorted(first) == list(range(80))
    page = gallery.section(signature, reference, window, judge(signature, reference, window))
    last = page.partition("Least like")[2]
    assert "brightness 9, usually 0." in last
    assert (pixels_of(last)[0] == strange).all()


def test_what_is_not_there_is_not_shown(champion: tuple[Signature, pd.DataFrame]) -> None:
    signature, reference = champion
    window = logged(signature, 60).assign(_prediction=reference["_prediction"].to_numpy())
    for broken in (
        window.drop(columns=[IMAGE, EMBEDDING]),
        window.assign(**{IMAGE: None, EMBEDDING: None}),
        window.assign(**{IMAGE: b"no image", EMBEDDING: b"no"}),
    ):
        result = judge(signature, reference, broken)
        page = gallery.section(signature, reference, broken, result)
        assert "is calm" in page
        assert "No image has been kept" in page
        assert "Least like" not in page
        assert len(pixels_of(page)) == gallery.MOST_IMAGES
    few = window.head(3)
    assert len(gallery.least_alike(reference, few)) == 0


def test_large_images_are_shown_small(champion: tuple[Signature, pd.DataFrame]) -> None:
    signature, reference = champion
    noise = np.random.default_rng(0).integers(0, 256, (3, 300, 200), dtype=np.uint8)
    window = logged(signature, 60).assign(**{IMAGE: images.to_png(noise)})
    page = gallery.section(signature, reference, window, judge(signature, reference, window))
    assert {p.shape for p in pixels_of(page)} == {(1, 8, 8), (3, 96, 64)}
    assert len(page) < 3_000_000
