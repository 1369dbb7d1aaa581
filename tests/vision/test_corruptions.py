"""Corruptions: deterministic, of the same shape at any size, and stronger by strength."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from driftmill.vision import images
from driftmill.vision.corruptions import KINDS, Kind, corrupt


def scene(side: int, colour: bool) -> np.ndarray:
    """A grey cross and a bright disc on a dark ground."""
    y, x = np.mgrid[:side, :side] / side
    picture = np.where((abs(x - 0.5) < 0.15) | (abs(y - 0.4) < 0.1), 120, 20)
    picture = np.where((x - 0.7) ** 2 + (y - 0.7) ** 2 < 0.04, 200, picture).astype(np.uint8)
    return np.stack([picture, picture // 2, 200 - picture // 2], axis=2) if colour else picture


@given(
    arrays.arrays(np.uint8, st.sampled_from([(8, 8), (8, 8, 3), (9, 17), (31, 12, 3)])),
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**32),
)
def test_the_same_state_gives_the_same_image(
    pixels: np.ndarray, kind: Kind, strength: int, seed: int
) -> None:
    before = pixels.copy()
    one, two = (corrupt(pixels, kind, strength, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(pixels, before)
    assert one.shape == pixels.shape
    assert one.dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("side", [8, 28, 224])
def test_a_stronger_one_changes_more(kind: Kind, colour: bool, side: int) -> None:
    pixels = scene(side, colour)
    rng = np.random.default_rng(0)
    changes = [
        np.mean([np.abs(corrupt(pixels, kind, s, rng) - pixels.astype(float)) for _ in range(8)])
        for s in (1, 2, 3)
    ]
    assert 2 < changes[0] < changes[1] < changes[2] < 128


def test_each_kind_moves_its_statistic() -> None:
    pixels = scene(28, False)
    rng = np.random.default_rng(0)

    def measured(of: np.ndarray) -> dict[str, float]:
        found = images.statistics(of[None, None], np.array([[28, 28]]))
        return {name: float(values[0]) for name, values in found.items()}

    before = measured(pixels)
    after = {kind: measured(corrupt(pixels, kind, 2, rng)) for kind in KINDS}
    assert after["blur"]["sharpness"] < 0.5 * before["sharpness"]
    assert after["brightness"]["brightness"] > before["brightness"] + 0.2
    assert after["contrast"]["contrast"] < 0.5 * before["contrast"]
    assert after["contrast"]["brightness"] == pytest.approx(before["brightness"], abs=0.01)
    assert after["noise"]["noise"] > before["noise"] + 0.05
    assert after["rotation"]["brightness"] == pytest.approx(before["brightness"], abs=0.1)


def test_the_corners_of_a_turned_image_have_its_background() -> None:
    pixels = scene(28, True)
    pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:] = 240, 240, 240, 240
    turned = corrupt(pixels, "rotation", 3, np.random.default_rng(1))
    assert turned[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 240


def test_turning_goes_both_ways() -> None:
    # A vertical bar's top moves to the left or to the right.
    bar = np.zeros((28, 28), dtype=np.uint8)
    bar[2:26, 12:16] = 255
    rng = np.random.default_rng(0)
    tops = [corrupt(bar, "rotation", 2, rng)[4].argmax() for _ in range(20)]
    assert min(tops) < 12 < 16 < max(tops)
    assert Image.fromarray(bar).size == (28, 28)
