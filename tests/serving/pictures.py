"""A tiny model of images, dark or light, and pictures for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import PIL.Image
from onnx import TensorProto, helper

from driftmill import bundle, contract, features
from driftmill.bundle import Manifest
from driftmill.contract import Contract, Image
from driftmill.store import Store
from driftmill.vision import images

CONTRACT = """
apiVersion: driftmill/v1
model: shades
task: image-classification
data:
  source: file:shades.parquet
  target: {name: shade, labels: [dark, light]}
  image: {size: 8, channels: 1, max_bytes: 20000, max_pixels: 40000}
serve:
  {poll: 20ms, max_body_bytes: 100000, max_records: 100, log: {rotate: 50ms, rotate_rows: 1000}}
tracking: none
"""


def shades(**sections: dict[str, Any]) -> Contract:
    """The contract of the tiny model, with changes: `image` stands for `data.image`."""
    values = json.loads(contract.parse(CONTRACT).to_json())
    values["data"]["image"] |= sections.pop("image", {})
    values["data"]["columns"] = []
    for name, changes in sections.items():
        values[name] |= changes
    return contract.parse(json.dumps(values))


def picture(
    level: int = 200, size: tuple[int, int] = (8, 8), kind: str = "png", **options: Any
) -> bytes:
    """A file with a grey picture, slightly grained; `size` is width and height."""
    grain = np.random.default_rng(level).integers(-5, 6, (size[1], size[0], 3))
    pixels = np.clip(grain + level, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def frame(of: Contract, rows: int = 60, seed: int = 0, lighter: int = 0) -> pd.DataFrame:
    """A prepared table of pictures; `lighter` is added to their levels."""
    spec = of.data.image
    assert spec is not None
    rng = np.random.default_rng(seed)
    levels = np.minimum(rng.integers(10, 246, rows) + lighter, 245)
    grain = rng.integers(-9, 10, (rows, *spec.size))
    arrays = np.clip(levels[:, None, None] + grain, 0, 255).astype(np.uint8)
    pixels = np.stack([images.from_array(array, spec).pixels for array in arrays])
    table = images.statistics(pixels, np.full((rows, 2), spec.size[::-1]))
    shade = np.where(levels > 127, "light", "dark")
    return pd.DataFrame({**table, "shade": shade}).assign(
        **{features.IMAGE: images.column(pixels, rows)}
    )


def shades_onnx(path: Path, image: Image, slope: float = 0.1) -> Path:
    """P(light) = sigmoid(slope * (mean of the pixels - 127.5)); embedding: mean and maximum."""
    shape = [None, image.channels, *image.size]
    nodes = [
        helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "axes"], ["mean4"], keepdims=1),
        helper.make_node("ReduceMax", ["numbers", "axes"], ["max4"], keepdims=1),
        helper.make_node("Flatten", ["mean4"], ["mean"], axis=1),
        helper.make_node("Flatten", ["max4"], ["max"], axis=1),
        helper.make_node("Concat", ["mean", "max"], ["embedding"], axis=1),
        helper.make_node("Sub", ["mean", "middle"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "shades",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 2]),
        ],
        [
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("middle", TensorProto.FLOAT, [], [127.5]),
            helper.make_tensor("weight", TensorProto.FLOAT, [1, 2], [0.0, slope]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def put_bundle(
    store: Store, folder: Path, of: Contract | None = None, slope: float = 0.1
) -> Manifest:
    """A bundle of the tiny model in the store; each slope is a version."""
    of = of or shades()
    assert of.data.image is not None
    rows = frame(of)
    place = folder / f"bundle-{slope}-{len(list(folder.iterdir()))}"
    manifest = bundle.write(
        place,
        contract=of,
        signature=features.signature(of, rows),
        model=shades_onnx(folder / f"model-{slope}.onnx", of.data.image, slope),
        reference=rows,
        examples=rows.head(4),
        family="small-cnn",
        params={"slope": slope},
        data={"fingerprint": "0" * 64},
    )
    store.put_folder(place, bundle.key(of.model, manifest.version), bundle.MANIFEST)
    return manifest
