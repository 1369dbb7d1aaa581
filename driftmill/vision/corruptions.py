"""What happens to cameras, done on purpose: corruptions that a monitor should notice, for demos,
drills and benchmarks (in the manner of Hendrycks and Dietterich 2019)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

Kind = Literal["blur", "brightness", "contrast", "rotation", "noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def corrupt(pixels: np.ndarray, kind: Kind, strength: int, rng: np.random.Generator) -> np.ndarray:
    """A corrupted copy of an image.

    Args:
        pixels: uint8, (height, width) or (height, width, 3), from 8 to some hundred pixels a side.
        kind: `blur` as out of focus, `brightness` overexposed, `contrast` washed out, `rotation`
            turned either way, `noise` of a sensor.
        strength: 1 can be seen, 2 plainly, 3 makes some images hard to tell for a person.
        rng: decides the noise and the turn; the same state gives the same image.

    Returns:
        uint8 of the same shape.
    """
    step = strength - 1
    match kind:
        case "blur":
            # In pixels; a larger image needs more of it to look the same.
            sigma = strength * (0.25 + 0.015 * min(pixels.shape[:2]))
            return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))
        case "brightness":
            return _clip(pixels + np.float32((40, 75, 110)[step]))
        case "contrast":
            mean = pixels.mean(dtype=np.float32)
            return _clip(mean + (pixels - mean) * np.float32((0.65, 0.4, 0.25)[step]))
        case "rotation":
            angle = (15, 30, 50)[step] * rng.uniform(0.7, 1.0) * rng.choice((-1, 1))
            turned = Image.fromarray(pixels).rotate(
                angle, Image.Resampling.BILINEAR, fillcolor=_background(pixels)
            )
            return np.asarray(turned)
        case "noise":
            sigma = (15, 32, 55)[step]
            return _clip(pixels + rng.normal(0, sigma, pixels.shape).astype(np.float32))


def _clip(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _background(pixels: np.ndarray) -> int | tuple[int, ...]:
    """Median of the border, so that the corners of a turned image do not stand out."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    median = np.median(border, axis=0)
    return int(median) if pixels.ndim == 2 else tuple(int(v) for v in median)
