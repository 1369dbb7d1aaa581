"""The exported network answers as the trained one, and the same weights give the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from driftmill.contract import Image
from driftmill.serving.session import Session
from driftmill.vision import export, nets
from driftmill.vision.export import ExportError
from driftmill.vision.nets import Net
from tests.vision import tasks

IMAGE = Image(size=(12, 16), channels=3)


def _net(family: str, image: Image = IMAGE, labels: int = 5) -> Net:
    """A network with some normalisation, and norms that have seen images, as after a training."""
    net = nets.build(family, image, labels, seed=3)
    channels = torch.arange(1, image.channels + 1)
    net.set_normalisation(90.0 + 10 * channels, 40.0 + 5 * channels)
    with torch.no_grad():
        net.train()
        net(net.normalise(torch.from_numpy(_images(image, 32))))
    net.eval()
    return net


def _images(image: Image, rows: int, seed: int = 0) -> np.ndarray:
    shape = (rows, image.channels, *image.size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "family",
    [
        "mlp",
        "small-cnn",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in nets.FAMILIES
            if family not in ("mlp", "small-cnn")
        ),
    ],
)
def test_every_family_is_exported_and_answers_alike(family: str, tmp_path: Path) -> None:
    image = Image(size=32, channels=3) if family == "convnext-tiny" else IMAGE
    net = _net(family, image)
    export.to_onnx(net, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    assert session.names == ("image",)
    assert session.embeds
    tried = np.concatenate([_images(image, 70, seed=1), export.extremes(image)])
    assert export.parity(session, net, tried) <= 1e-5
    for rows in (1, 3, 200):
        probabilities, embedding = session.embed(_images(image, rows))
        assert probabilities.shape == (rows, 5)
        assert embedding.shape == (rows, net.width)
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_the_normalisation_is_inside(tmp_path: Path) -> None:
    net = _net("mlp")
    export.to_onnx(net, tmp_path / "model.onnx")
    images = _images(IMAGE, 4)
    with torch.no_grad():
        logits = net((torch.from_numpy(images).float() - net.mean) / net.std)
    expected = torch.softmax(logits, dim=1).numpy()
    assert Session(tmp_path / "model.onnx").run(images) == pytest.approx(expected, abs=1e-5)


def test_the_same_weights_give_the_same_bytes_wherever_they_are_exported(tmp_path: Path) -> None:
    contents = []
    for folder in ("a", "another-folder"):
        (tmp_path / folder).mkdir()
        export.to_onnx(_net("small-cnn"), tmp_path / folder / "model.onnx")
        contents.append((tmp_path / folder / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert str(Path(__file__).parents[2]).encode() not in contents[0]
    assert b"pytorch" not in contents[0].lower()
    model = onnx.load(tmp_path / "a" / "model.onnx")
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert model.ir_version == export.IR_VERSION


def test_other_weights_give_other_bytes(tmp_path: Path) -> None:
    net = _net("mlp")
    export.to_onnx(net, tmp_path / "a.onnx")
    with torch.no_grad():
        net.head.bias += 0.1
    export.to_onnx(net, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.head.bias.add_(torch.arange(5) * 0.01), "differs from the trained one's"),
        (lambda net: net.head.weight.fill_(float("nan")), "differs from the trained one's by nan"),
    ],
)
def test_a_network_that_answers_otherwise_is_found(
    change: object, message: str, tmp_path: Path
) -> None:
    net = _net("small-cnn")
    export.to_onnx(net, tmp_path / "model.onnx")
    with torch.no_grad():
        assert callable(change)
        change(net)
    with pytest.raises(ExportError, match=message):
        export.parity(Session(tmp_path / "model.onnx"), net, _images(IMAGE, 5))


def test_a_difference_in_the_embedding_alone_is_found(tmp_path: Path) -> None:
    net = _net("mlp")
    export.to_onnx(net, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    # The graph's embedding times 1.1, after the head has taken it.
    for node in model.graph.node:
        node.output[:] = ["inner" if o == "embedding" else o for o in node.output]
        node.input[:] = ["inner" if i == "embedding" else i for i in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.1), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["inner", "factor"], ["embedding"]))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ExportError, match="embedding of the exported model"):
        export.parity(Session(tmp_path / "changed.onnx"), net, _images(IMAGE, 5))


def test_extreme_images() -> None:
    black, white, board, noise = export.extremes(tasks.IMAGE)
    assert (black == 0).all()
    assert (white == 255).all()
    assert board[0, 0, :3].tolist() == [0, 255, 0]
    assert len(np.unique(noise)) > 32
