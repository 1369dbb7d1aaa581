"""FastAPI with ONNX Runtime, as their documentation shows them: a file in, a dict out.

`BENCH_FOLDER` holds `contract.json` and `model.onnx`.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import PIL.Image
import PIL.ImageOps
from fastapi import FastAPI, File
from PIL.Image import Resampling

from driftmill import contract

folder = Path(os.environ["BENCH_FOLDER"])
of = contract.load(folder / "contract.json")
assert of.data.image is not None
labels = of.data.target.labels
size = of.data.image.size[::-1]
mode = "L" if of.data.image.channels == 1 else "RGB"
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
app = FastAPI()


@app.get("/readyz")
def ready() -> dict[str, str]:
    """Whether it has started."""
    return {"status": "ready"}


@app.post("/predict")
def predict(image: Annotated[bytes, File()]) -> dict[str, Any]:
    """Label and probabilities of a picture; FastAPI runs this in a pool of threads."""
    opened = PIL.Image.open(BytesIO(image)).convert(mode)
    fitted = PIL.ImageOps.fit(opened, size, Resampling.BILINEAR)
    pixels = np.asarray(fitted).reshape(*size[::-1], -1)
    batch = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))[None]
    (probabilities,) = session.run(["probabilities"], {"image": batch})[0].tolist()
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {
        "prediction": labels[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }
