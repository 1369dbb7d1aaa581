"""From a trained network to the ONNX file that is served, and the proof that both answer alike.

The exported graph takes `image`, uint8 (rows, channels, height, width) as Pillow decodes it, and
gives `probabilities` (rows, labels) and `embedding` (rows, width), the penultimate layer; float32.
Normalisation and softmax are inside.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from driftmill.contract import Image
from driftmill.serving.session import Session
from driftmill.store import write_atomic
from driftmill.vision.nets import Net

#: Largest difference between network and exported model: of a probability, and of an embedding as a
#: part of the largest one.
TOLERANCE = 1e-4
#: Operator set and file format that every supported onnxruntime knows.
OPSET, IR_VERSION = 18, 10
#: Images that are compared at a time.
_BATCH = 64

# The exporter tells of every constant that it folds.
for _name in ("onnx_ir", "onnxscript"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class ExportError(ValueError):
    """A network that could not be exported, or whose export answers otherwise."""


def to_onnx(net: Net, path: Path) -> None:
    """Write a network as an ONNX model. The same weights give the same bytes.

    Raises:
        ExportError: the network has no ONNX form.
    """
    rows = torch.zeros((2, net.image.channels, *net.image.size), dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            _Served(net).eval(),
            (rows,),
            dynamo=True,
            input_names=["image"],
            output_names=["probabilities", "embedding"],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"{net.family} has no ONNX form: {error}") from error
    assert program is not None
    write_atomic(path, plain(program.model_proto))


def plain(model: onnx.ModelProto) -> bytes:
    """A model as bytes, without what says where and with what it was made: paths, stack traces and
    versions would make another file, and so another bundle, of the same weights."""
    graph = model.graph
    for part in (
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
        graph,
    ):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    used = {node.domain for node in graph.node}
    made = helper.make_model(
        graph,
        producer_name="driftmill",
        opset_imports=[o for o in model.opset_import if o.domain in used],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(made)
    content: bytes = made.SerializeToString(deterministic=True)
    return content


def extremes(image: Image) -> np.ndarray:
    """Images that no camera takes, on which the export must agree too: black, white, a chessboard
    and noise; uint8 (4, channels, height, width)."""
    shape = (image.channels, *image.size)
    board = np.indices(image.size).sum(axis=0) % 2 * 255
    noise = np.random.default_rng(0).integers(0, 256, shape)
    every = [np.zeros(shape), np.full(shape, 255), np.broadcast_to(board, shape), noise]
    return np.stack(every).astype(np.uint8)


def parity(session: Session, net: Net, images: np.ndarray) -> float:
    """The largest difference between an exported model and its network on these images.

    Args:
        session: of the exported model.
        net: the network, on the CPU.
        images: uint8 (rows, channels, height, width), one at least.

    Raises:
        ExportError: it is above `TOLERANCE`, or an image gets another label though the network is
            not torn between two.
    """
    served = _Served(net).eval()
    largest = 0.0
    for start in range(0, len(images), _BATCH):
        part = np.ascontiguousarray(images[start : start + _BATCH])
        exported = session.embed(part)
        with torch.inference_mode():
            trained = [out.numpy() for out in served(torch.from_numpy(part))]
        for name, ours, theirs in zip(
            ("probabilities", "embedding"), exported, trained, strict=True
        ):
            if ours.shape != theirs.shape:
                raise ExportError(f"{net.family}: the export gives {name} {ours.shape}")
            scale = 1.0 if name == "probabilities" else max(1.0, float(np.abs(theirs).max()))
            difference = float(np.abs(ours - theirs).max()) / scale
            if not difference <= TOLERANCE:  # also where it is NaN
                raise ExportError(
                    f"{net.family}: {name} of the exported model differs from the trained one's by "
                    f"{difference:.3g}; allowed {TOLERANCE}"
                )
            largest = max(largest, difference)
        best = np.sort(trained[0], axis=1)[:, ::-1]
        torn = best[:, 0] - best[:, 1] <= 2 * TOLERANCE
        other = (exported[0].argmax(axis=1) != trained[0].argmax(axis=1)) & ~torn
        if other.any():
            raise ExportError(f"{net.family}: the exported model gives other labels")
    return largest


class _Served(nn.Module):
    """A network with everything that serving needs around it."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding: Any = self.net.embed(self.net.normalise(image))
        return torch.softmax(self.net.head(embedding), dim=1), embedding
