"""Smaller numbers are taken only where they are not surely worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from driftmill.contract import Image
from driftmill.serving.session import Session
from driftmill.vision import export, nets, precision, trainer
from tests.vision import digits, tasks

IMAGE = Image(size=(16, 16), channels=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network that knows which quarter of an image is bright."""
    net = nets.build("small-cnn", IMAGE, tasks.LABELS)
    learn = tasks.spots(400, image=IMAGE)
    trainer.train(net, learn, tasks.spots(50, seed=1, image=IMAGE), tasks.settings(), 0, "cpu")
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export.to_onnx(net, path)
    return path


def _made(kind: str, model: Path, out: Path) -> Path:
    if kind == "float16":
        precision.to_float16(model, out)
    else:
        precision.to_int8(model, tasks.spots(100, image=IMAGE).images, out)
    return out


@pytest.mark.parametrize(("kind", "size", "most"), [("float16", 0.6, 0.01), ("int8", 0.45, 0.1)])
def test_a_variant_is_smaller_and_answers_nearly_alike(
    kind: str, size: float, most: float, model: Path, tmp_path: Path
) -> None:
    made = _made(kind, model, tmp_path / "made.onnx")
    assert made.stat().st_size < size * model.stat().st_size
    whole, small = Session(model), Session(made)
    assert (small.inputs, small.output, small.embeds) == (whole.inputs, whole.output, True)
    for rows in (1, 50):
        images = tasks.spots(rows, seed=3, image=IMAGE).images
        ours, theirs = small.embed(images), whole.embed(images)
        assert [out.dtype for out in ours] == [np.float32, np.float32]
        assert ours[0] == pytest.approx(theirs[0], abs=most)
        assert ours[0].sum(axis=1) == pytest.approx(1, abs=5e-4)
        assert ours[1] == pytest.approx(theirs[1], abs=0.2 * float(theirs[1].max()))
    kinds = {i.data_type for i in onnx.load(made).graph.initializer}
    wanted = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.INT8
    assert wanted in kinds


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_the_same_model_gives_the_same_variant(kind: str, model: Path, tmp_path: Path) -> None:
    first = _made(kind, model, tmp_path / "a.onnx").read_bytes()
    assert _made(kind, model, tmp_path / "b.onnx").read_bytes() == first
    assert str(tmp_path).encode() not in first


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_variant_that_is_as_good_is_taken(kind: str, model: Path, tmp_path: Path) -> None:
    of = digits.make_contract(serve={"precision": kind})
    learn, validate = tasks.spots(64, image=IMAGE), tasks.spots(200, seed=4, image=IMAGE)
    chosen, found = precision.choose(of, model, learn.images, validate.images, validate.y, tmp_path)
    assert chosen == tmp_path / f"{kind}.onnx"
    assert found["asked"] == found["served"] == kind
    assert found["rows"] == 200
    assert found["float32"]["score"] == pytest.approx(found[kind]["score"], abs=0.02)
    assert found["float32"]["size_mb"] > found[kind]["size_mb"]
    assert found[kind]["ms"] > 0
    assert f"the model serves in {kind}" in found["note"]


def test_a_variant_that_is_surely_worse_is_turned_down(model: Path, tmp_path: Path) -> None:
    of = digits.make_contract(serve={"precision": "int8"})
    validate = tasks.spots(200, seed=4, image=IMAGE)
    # Black images say nothing about the range of values that others bring: everything saturates.
    black = np.zeros_like(validate.images[:8])
    chosen, found = precision.choose(of, model, black, validate.images, validate.y, tmp_path)
    assert chosen == model
    assert (found["asked"], found["served"]) == ("int8", "float32")
    assert found["int8"]["score"] < found["float32"]["score"] - 0.1
    assert found["comparison"]["high"] < -of.gates.max_precision_loss
    assert "surely worse by more than 0.002, so the model serves in float32" in found["note"]


def test_a_loss_that_the_contract_allows_is_taken(model: Path, tmp_path: Path) -> None:
    of = digits.make_contract(serve={"precision": "int8"}, gates={"max_precision_loss": 1.0})
    validate = tasks.spots(200, seed=4, image=IMAGE)
    black = np.zeros_like(validate.images[:8])
    _, found = precision.choose(of, model, black, validate.images, validate.y, tmp_path)
    assert found["served"] == "int8"


def test_weights_leave_a_bit_free(model: Path, tmp_path: Path) -> None:
    """Products of 8-bit numbers saturate on processors without VNNI."""
    made = onnx.load(_made("int8", model, tmp_path / "made.onnx"))
    weights = [
        numpy_helper.to_array(i)
        for i in made.graph.initializer
        if i.name.endswith("_quantized") and i.data_type == onnx.TensorProto.INT8
    ]
    assert weights
    assert all(np.abs(w.astype(int)).max() <= 64 for w in weights)
