"""Small image tasks that a network learns in a second."""

from __future__ import annotations

import numpy as np

from driftmill.contract import Image, Vision
from driftmill.vision.trainer import Rows

IMAGE = Image(size=(8, 8), channels=1)
LABELS = 4


def spots(count: int, seed: int = 0, noise: float = 40.0, image: Image = IMAGE) -> Rows:
    """Images with a bright quarter, whose place is the label, and noise."""
    rng = np.random.default_rng(seed)
    height, width = image.size
    y = rng.integers(0, LABELS, count)
    images = rng.normal(100, noise, (count, image.channels, height, width))
    for i, label in enumerate(y):
        rows = slice(0, height // 2) if label < 2 else slice(height // 2, height)
        columns = slice(0, width // 2) if label % 2 == 0 else slice(width // 2, width)
        images[i, :, rows, columns] += 60
    return Rows(images.clip(0, 255).astype(np.uint8), y.astype(np.int64))


def settings(**fields: object) -> Vision:
    """Settings of a short training in float32."""
    return Vision.model_validate(
        {"epochs": 3, "batch": 32, "precision": "float32", "device": "cpu", **fields}
    )
