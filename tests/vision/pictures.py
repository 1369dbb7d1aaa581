"""Small sets of images on disk, and contracts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from driftmill import contract
from driftmill.contract import Contract
from driftmill.vision import images

#: Thirty grey images of 7 by 9 pixels, and a label for each.
PICTURES = np.random.default_rng(0).integers(0, 256, (30, 9, 7), dtype=np.uint8)
LABELS = np.arange(30) % 3


def build(folder: Path, source: str | dict[str, Any], **data: Any) -> Contract:
    """A contract in a folder; `data` is put into its data section."""
    content = {
        "apiVersion": "driftmill/v1",
        "model": "tiny",
        "task": "image-classification",
        "data": {
            "source": source,
            "target": "label",
            "image": {"size": [9, 7], "channels": 1},
            **data,
        },
    }
    (folder / "contract.yaml").write_text(yaml.safe_dump(content))
    return contract.load(folder / "contract.yaml")


def write_folder(root: Path) -> None:
    """The images as PNG files, in a sub-folder for each label and some below."""
    for i, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        folder = root / f"class {label}" / ("deeper" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02}.png").write_bytes(images.array_to_png(picture))
