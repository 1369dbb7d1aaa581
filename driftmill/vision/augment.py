"""Random changes to a batch of training images, all images of the batch at once and on its device.

`draw` decides, `apply` does. They are apart so that processes that train together can draw the
same numbers for the whole batch and apply each its own part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from driftmill.contract import Augment


def draw(how: Augment, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
    """What to do to each of `count` images of height and width `size`.

    Returns:
        A tensor (count,) for each change that `how` asks for, on the generator's device: `flip` 0
        or 1, `down` and `right` in pixels, `turn` in radians, `scale`, `brightness` and `contrast`
        as factors, `erase_down` and `erase_right` the middle of the blank square in pixels.
    """

    def uniform(least: float, most: float) -> Tensor:
        values = torch.rand(count, generator=generator, device=generator.device)
        return values * (most - least) + least

    height, width = size
    draws: Draws = {}
    if how.flip:
        draws["flip"] = uniform(0, 2).floor()
    if how.shift:
        for name, pixels in (("down", height), ("right", width)):
            # Whole pixels, each as probable as the others: nothing is blurred.
            most = math.floor(how.shift * pixels + 0.5)
            draws[name] = uniform(-most, most + 1).floor()
    if how.rotate:
        draws["turn"] = uniform(-math.radians(how.rotate), math.radians(how.rotate))
    if how.scale:
        draws["scale"] = uniform(1 - how.scale, 1 + how.scale)
    if how.erase:
        draws["erase_down"] = uniform(0, height).floor()
        draws["erase_right"] = uniform(0, width).floor()
    for name in ("brightness", "contrast"):
        if part := getattr(how, name):
            draws[name] = uniform(1 - part, 1 + part)
    return draws


#: What `draw` returns.
Draws = dict[str, Tensor]


def apply(images: Tensor, draws: Draws, how: Augment, blank: Tensor) -> Tensor:
    """The changed images. Beyond an image's edge its edge goes on.

    Args:
        images: (N, C, H, W) uint8.
        draws: of `draw`, with N values each.
        how: what they were drawn for.
        blank: (C, 1, 1) pixel values for what is erased.

    Returns:
        (N, C, H, W), in channels-last order, uint8 or, where values were interpolated, float.
    """
    if "turn" in draws or "scale" in draws:
        images = _affine(images, draws)
    elif "flip" in draws or "down" in draws:
        images = _moved(images, draws)
    if "brightness" in draws or "contrast" in draws:
        images = images.float()
        if "contrast" in draws:
            middle = images.mean(dim=(1, 2, 3), keepdim=True)
            images = (images - middle) * _each(draws["contrast"]) + middle
        if "brightness" in draws:
            images = images * _each(draws["brightness"])
        images = images.clamp(0, 255)
    if "erase_down" in draws:
        images = torch.where(_erased(images, draws, how.erase), blank.to(images.dtype), images)
    return images


def _each(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def _moved(images: Tensor, draws: Draws) -> Tensor:
    """Flipped and shifted by whole pixels, in one gather that also orders channels last."""
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).repeat(count, 1)
    columns = torch.arange(width, device=images.device).repeat(count, 1)
    if "down" in draws:
        rows = (rows - draws["down"][:, None].long()).clamp(0, height - 1)
        columns = (columns - draws["right"][:, None].long()).clamp(0, width - 1)
    if "flip" in draws:
        columns = torch.where(draws["flip"][:, None] > 0, width - 1 - columns, columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    return images[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _affine(images: Tensor, draws: Draws) -> Tensor:
    """Flipped, turned, scaled and shifted by one bilinear interpolation."""
    count, _, height, width = images.shape
    one = torch.ones(count, device=images.device)
    zero = torch.zeros(count, device=images.device)
    turn, scale = draws.get("turn", zero), draws.get("scale", one)
    sign = 1 - 2 * draws.get("flip", zero)
    cos, sin = torch.cos(turn) / scale, torch.sin(turn) / scale
    # Where a pixel of the result comes from, with coordinates from -1 to 1 along either side.
    right, down = draws.get("right", zero) * 2 / width, draws.get("down", zero) * 2 / height
    ratio = height / width
    matrix = torch.stack(
        [
            torch.stack([sign * cos, sign * sin * ratio, zero], dim=1),
            torch.stack([-sin / ratio, cos, zero], dim=1),
        ],
        dim=1,
    )
    matrix[:, :, 2] = -(matrix[:, :, :2] @ torch.stack([right, down], dim=1)[:, :, None])[:, :, 0]
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    source = images.float().contiguous(memory_format=torch.channels_last)
    return functional.grid_sample(source, grid, padding_mode="border", align_corners=False)


def _erased(images: Tensor, draws: Draws, part: float) -> Tensor:
    """(N, 1, H, W): whether a pixel is in the blank square, which the edge may cut."""
    height, width = images.shape[2:]
    side = max(1, round(math.sqrt(part * height * width)))
    inside = []
    for name, pixels in (("erase_down", height), ("erase_right", width)):
        first = draws[name].long() - side // 2
        place = torch.arange(pixels, device=images.device)
        inside.append((place >= first[:, None]) & (place < first[:, None] + side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
