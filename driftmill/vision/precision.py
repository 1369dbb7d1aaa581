"""Networks in smaller numbers: float16 or int8 variants of an exported model, and whether one may
take its place.

float16 halves the file; without hardware for it, it computes no faster. int8 (static quantisation,
calibrated on training images) has a quarter of the size and is several times as fast on CPUs.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from driftmill.contract import Contract
from driftmill.evaluate.compare import compare, draw, score
from driftmill.serving.session import Session
from driftmill.store import write_atomic
from driftmill.vision import export

log = logging.getLogger("driftmill")

#: Training images that show the range of every layer's values.
CALIBRATION = 512
_BATCH = 64
#: Images timed one by one.
_TIMED = 50


def choose(
    contract: Contract,
    model: Path,
    calibration: np.ndarray,
    validation: np.ndarray,
    y: np.ndarray,
    folder: Path,
) -> tuple[Path, dict[str, Any]]:
    """The variant that the contract asks for, if it is good enough, else the model itself.

    It is turned down if, on the validation images, its metric is surely worse by more than
    `gates.max_precision_loss`: if the whole interval of the paired bootstrap lies below. The test
    rows play no part: they stay fresh for the gate.

    Args:
        contract: `serve.precision` says which variant.
        model: the float32 model.
        calibration: training images, uint8 (some, channels, height, width).
        validation: images (rows, channels, height, width) that the model has not learnt from.
        y: (rows,) their labels, as int codes.
        folder: gets the variant.

    Returns:
        The file to serve, and what was found: `asked`, `served`, `metric`, `rows`, the comparison,
        `note`, and of both variants `score`, `size_mb` and `ms` (median time for one image).
    """
    asked, metric = contract.serve.precision, contract.metric
    variant = folder / f"{asked}.onnx"
    if asked == "float16":
        to_float16(model, variant)
    else:
        to_int8(model, calibration, variant)

    files = {"float32": model, asked: variant}
    outputs = [_answers(Session(file), validation) for file in files.values()]
    draws = draw(
        len(y),
        contract.gates.resamples,
        contract.train.seed,
        strata=y,
        in_time=contract.data.time is not None,
    )
    full, small = (scored[metric.name] for scored in score([metric.name], y, outputs, draws))
    found = compare(small, full, metric.sign, contract.gates.confidence)
    limit = contract.gates.max_precision_loss
    taken = bool(found.high >= -limit)  # False where the metric is undefined
    note = (
        f"{asked} against float32 on {len(y)} validation images: {metric.name} {small.value:.4g} "
        f"and {full.value:.4g}, a difference of {found.difference:.2g} ({found.low:.2g} to "
        f"{found.high:.2g}); "
        + (
            f"not surely worse by more than {limit:g}, so the model serves in {asked}."
            if taken
            else f"surely worse by more than {limit:g}, so the model serves in float32."
        )
    )
    log.info(note)
    record: dict[str, Any] = {
        "asked": asked,
        "served": asked if taken else "float32",
        "metric": metric.name,
        "rows": len(y),
        "comparison": found.model_dump(),
        "note": note,
    }
    for (name, file), scored in zip(files.items(), (full, small), strict=True):
        record[name] = {
            "score": scored.value,
            "size_mb": file.stat().st_size / 1e6,
            "ms": _milliseconds(Session(file), validation),
        }
    return files[record["served"]], record


def to_float16(model: Path, out: Path) -> None:
    """Write a float16 variant: weights and computation; input and outputs keep their types."""
    small = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    write_atomic(out, export.plain(small))


def to_int8(model: Path, images: np.ndarray, out: Path) -> None:
    """Write an int8 variant: convolutions and matrix products in int8, the rest in float32.

    Weights have a scale for each channel, and only 7 bits: with 8, processors without VNNI
    saturate, and answer otherwise than the others.

    Args:
        model: the float32 model.
        images: uint8 (some, channels, height, width), typical ones; ranges are taken from them.
        out: the new file.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready, made = Path(folder) / "ready.onnx", Path(folder) / "made.onnx"
        quant_pre_process(model, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            made,
            _Calibration(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=_INT8,
            # Logits in 256 steps would make steps of the probabilities, too.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        write_atomic(out, export.plain(onnx.load(made)))


#: What is computed in int8, and what stands between: softmax and normalisation stay as they are.
_INT8 = ["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"]


class _Calibration(CalibrationDataReader):
    """Images in batches, as the calibration takes them."""

    def __init__(self, images: np.ndarray) -> None:
        self._parts = _batches(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _BATCH):
        yield np.ascontiguousarray(images[start : start + _BATCH])


def _answers(session: Session, images: np.ndarray) -> np.ndarray:
    return np.concatenate([session.run(part) for part in _batches(images)])


def _milliseconds(session: Session, images: np.ndarray) -> float:
    """Median time for one image."""
    took = []
    for run in range(_TIMED):
        begin = time.perf_counter()
        session.run(images[run % len(images)][None])
        took.append(time.perf_counter() - begin)
    return float(np.median(took) * 1000)
