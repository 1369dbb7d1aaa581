"""BentoML with PyTorch, as in BentoML's examples: a model in memory, a picture in, a dict out.

`BENCH_FOLDER` holds `contract.json` and `weights.safetensors`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import PIL.ImageOps
import torch
from PIL.Image import Image, Resampling
from safetensors.torch import load_file

from driftmill import contract
from driftmill.vision import nets


@bentoml.service(workers=1)
class Service:
    """A classifier of pictures."""

    def __init__(self) -> None:
        folder = Path(os.environ["BENCH_FOLDER"])
        of = contract.load(folder / "contract.json")
        assert of.data.image is not None
        self.labels = of.data.target.labels
        self.size = of.data.image.size[::-1]
        self.mode = "L" if of.data.image.channels == 1 else "RGB"
        self.net = nets.build(of.train.candidates[0], of.data.image, len(self.labels))
        self.net.load_state_dict(load_file(folder / "weights.safetensors"))
        self.net.eval()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    def predict(self, image: Image) -> dict[str, Any]:
        """Label and probabilities of a picture."""
        fitted = PIL.ImageOps.fit(image.convert(self.mode), self.size, Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(fitted).reshape(*self.size[::-1], -1))
        with torch.inference_mode():
            batch = self.net.normalise(pixels.permute(2, 0, 1)[None])
            probabilities = torch.softmax(self.net(batch), dim=1)[0].tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {
            "prediction": self.labels[best],
            "probabilities": dict(zip(self.labels, probabilities, strict=True)),
        }
