"""Augmentation against slow versions of itself, and the bounds of what is drawn."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from driftmill.contract import Augment
from driftmill.vision import augment

BLANK = torch.full((1, 1, 1), 7.0)


def pictures(count: int = 6, channels: int = 1, height: int = 8, width: int = 10) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8))


def drawn(how: Augment, count: int = 2000, seed: int = 0) -> augment.Draws:
    return augment.draw(how, count, (8, 10), torch.Generator().manual_seed(seed))


def test_nothing_asked_changes_nothing() -> None:
    images = pictures()
    assert drawn(Augment()) == {}
    assert torch.equal(augment.apply(images, {}, Augment(), BLANK), images)


def test_the_same_seed_draws_the_same() -> None:
    how = Augment(
        flip=True, shift=0.2, rotate=20, scale=0.1, erase=0.1, brightness=0.2, contrast=0.2
    )
    one, same, other = drawn(how, seed=1), drawn(how, seed=1), drawn(how, seed=2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_draws_fill_their_range_and_no_more() -> None:
    how = Augment(
        flip=True, shift=0.25, rotate=30, scale=0.2, erase=0.1, brightness=0.3, contrast=0.4
    )
    found = drawn(how)
    assert found["flip"].unique().tolist() == [0, 1]
    assert found["down"].unique().tolist() == [-2, -1, 0, 1, 2]
    assert found["right"].unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert found["erase_down"].unique().tolist() == list(range(8))
    for name, least, most in (
        ("turn", -math.pi / 6, math.pi / 6),
        ("scale", 0.8, 1.2),
        ("brightness", 0.7, 1.3),
        ("contrast", 0.6, 1.4),
    ):
        assert least <= found[name].min() < least + 0.02
        assert most - 0.02 < found[name].max() <= most


@given(
    flip=st.lists(st.booleans(), min_size=6, max_size=6),
    down=st.lists(st.integers(-4, 4), min_size=6, max_size=6),
    right=st.lists(st.integers(-4, 4), min_size=6, max_size=6),
    channels=st.sampled_from([1, 3]),
)
def test_flips_and_shifts_move_pixels(
    flip: list[bool], down: list[int], right: list[int], channels: int
) -> None:
    images = pictures(channels=channels)
    draws = {
        "flip": torch.tensor(flip).float(),
        "down": torch.tensor(down).float(),
        "right": torch.tensor(right).float(),
    }
    result = augment.apply(images, draws, Augment(flip=True, shift=0.5), BLANK)
    for i in range(6):
        picture = images[i].numpy()
        if flip[i]:
            picture = picture[:, :, ::-1]
        padded = np.pad(picture, ((0, 0), (4, 4), (4, 4)), mode="edge")
        expected = padded[:, 4 - down[i] : 12 - down[i], 4 - right[i] : 14 - right[i]]
        assert np.array_equal(result[i].numpy(), expected)


def test_interpolation_of_nothing_changes_nothing() -> None:
    images = pictures(channels=3)
    draws = {"turn": torch.zeros(6), "scale": torch.ones(6)}
    result = augment.apply(images, draws, Augment(rotate=1), BLANK)
    torch.testing.assert_close(result, images.float(), rtol=0, atol=1e-2)


def test_a_quarter_turn() -> None:
    images = pictures(height=9, width=9)
    draws = {"turn": torch.full((6,), math.pi / 2)}
    result = augment.apply(images, draws, Augment(rotate=90), BLANK)
    turned = [torch.rot90(images, k, (2, 3)).float() for k in (1, -1)]
    assert min((result - t).abs().max() for t in turned) < 0.05


def test_shift_and_flip_are_the_same_with_and_without_interpolation() -> None:
    images = pictures()
    draws = {
        "flip": torch.tensor([0.0, 1, 0, 1, 0, 1]),
        "down": torch.tensor([1.0, 2, -1, 0, 3, -3]),
        "right": torch.tensor([-2.0, 1, 0, 3, 1, -1]),
    }
    exact = augment.apply(images, draws, Augment(flip=True, shift=0.3), BLANK)
    close = augment.apply(images, draws | {"scale": torch.ones(6)}, Augment(scale=0.1), BLANK)
    torch.testing.assert_close(close, exact.float(), rtol=0, atol=0.05)


def test_a_disc_turns_and_stays_round_in_an_oblong_picture() -> None:
    down, right = np.mgrid[:20, :40]
    disc = 255 * np.exp(-((down - 9.5) ** 2 + (right - 19.5) ** 2) / 18)
    images = torch.from_numpy(disc.astype(np.uint8))[None, None]
    result = augment.apply(images, {"turn": torch.tensor([0.8])}, Augment(rotate=90), BLANK)
    assert (result - images.float()).abs().max() < 6


def test_scale_enlarges() -> None:
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 6:10, 6:10] = 255
    bright = [
        augment.apply(images, {"scale": torch.tensor([s])}, Augment(scale=0.5), BLANK).mean()
        for s in (0.75, 1.0, 1.5)
    ]
    assert bright[0] < bright[1] < bright[2]


def test_erase_blanks_one_square() -> None:
    images = torch.full((500, 1, 20, 20), 200, dtype=torch.uint8)
    how = Augment(erase=0.09)  # 6 x 6
    draws = augment.draw(how, 500, (20, 20), torch.Generator().manual_seed(0))
    blank = augment.apply(images, draws, how, BLANK)[:, 0] == 7
    sizes = blank.sum(dim=(1, 2))
    assert sizes.max() == 36
    assert sizes.min() >= 9  # cut by a corner
    for picture in blank[:50]:
        rows, columns = picture.any(dim=1).sum(), picture.any(dim=0).sum()
        assert picture.sum() == rows * columns


def test_brightness_and_contrast() -> None:
    images = pictures(channels=3)
    how = Augment(brightness=0.5, contrast=0.5)
    once = torch.ones(6)
    brighter = augment.apply(images, {"brightness": once * 1.5}, how, BLANK)
    torch.testing.assert_close(brighter, (images.float() * 1.5).clamp(0, 255))
    flat = augment.apply(images, {"contrast": once * 0}, how, BLANK)
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, mean.expand_as(images))
