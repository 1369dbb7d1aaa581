"""Grad-CAM finds the place that decides, and says why where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from driftmill.contract import Image
from driftmill.vision import gradcam, nets
from driftmill.vision.nets import Net, NetError
from tests.vision import tasks

IMAGE = Image(size=(16, 16), channels=1)


class _Bright(nn.Module):
    """Two channels: light, and darkness; the embedding is the mean of each."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, h, w) to (N, 2)."""
        places: Tensor = self.features(x)
        return places.mean(dim=(2, 3))


@pytest.fixture
def bright() -> Net:
    """A network of three labels: light speaks for the first, darkness for the second, and against
    the third speaks all."""
    head = nn.Linear(2, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        head.bias.zero_()
    net = Net("bright", IMAGE, _Bright(), head)
    net.eval()
    return net


@pytest.fixture
def trained() -> Net:
    """Some convolutional network."""
    net = nets.build("small-cnn", IMAGE, tasks.LABELS, seed=1)
    net.eval()
    return net


def test_the_map_is_what_spoke_for_the_label(bright: Net) -> None:
    image = np.full((1, 1, 16, 16), 127, dtype=np.uint8)  # a little below the mean of 127.5
    image[0, 0, 2:5, 10:14] = 255
    seen = gradcam.maps(bright, np.repeat(image, 3, axis=0), np.arange(3))
    assert seen.shape == (3, 16, 16)
    assert seen.dtype == np.float32
    # Light is where it is bright and nowhere else.
    assert seen[0] == pytest.approx((image[0, 0] == 255).astype(float), abs=1e-5)
    # Darkness is everywhere else, and as dark everywhere.
    assert seen[1] == pytest.approx((image[0, 0] == 127).astype(float), abs=1e-5)
    # Light and darkness cancel: nothing speaks for the third.
    assert not seen[2].any()


def test_a_coarse_map_is_enlarged(trained: Net) -> None:
    rows = tasks.spots(20, seed=2, image=IMAGE)
    seen = gradcam.maps(trained, rows.images, rows.y)
    assert seen.shape == (20, 16, 16)
    assert seen.min() >= 0
    assert set(np.unique(seen.max(axis=(1, 2)).round(5))) <= {0.0, 1.0}


def test_each_image_is_explained_by_itself(trained: Net) -> None:
    rows = tasks.spots(6, seed=3, image=IMAGE)
    together = gradcam.maps(trained, rows.images, rows.y)
    for place in range(6):
        alone = gradcam.maps(trained, rows.images[place : place + 1], rows.y[place : place + 1])
        assert alone[0] == pytest.approx(together[place], abs=1e-4)


def test_it_changes_nothing(trained: Net) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    rows = tasks.spots(4, seed=4, image=IMAGE)
    gradcam.maps(trained, rows.images, rows.y)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert not trained.last_feature_map()._forward_hooks


def test_weights_are_read_from_a_file(trained: Net, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    net = gradcam.load(tmp_path / "weights.safetensors", "small-cnn", IMAGE, tasks.LABELS)
    rows = tasks.spots(5, seed=5, image=IMAGE)
    expected = gradcam.maps(trained, rows.images, rows.y)
    assert gradcam.maps(net, rows.images, rows.y) == pytest.approx(expected, abs=1e-5)


def test_weights_that_do_not_fit_are_refused(trained: Net, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(NetError, match=r"weights\.safetensors does not hold a small-cnn"):
        gradcam.load(path, "small-cnn", IMAGE, tasks.LABELS)
    path.write_bytes(b"not weights")
    with pytest.raises(NetError, match="does not hold a small-cnn"):
        gradcam.load(path, "small-cnn", IMAGE, tasks.LABELS)
    save_file(trained.state_dict(), path)
    with pytest.raises(NetError, match="does not hold a mlp"):
        gradcam.load(path, "mlp", IMAGE, tasks.LABELS)


def test_a_network_without_places_has_none() -> None:
    net = nets.build("mlp", IMAGE, tasks.LABELS).eval()
    with pytest.raises(NetError, match="keeps no places"):
        gradcam.maps(net, np.zeros((1, 1, 16, 16), dtype=np.uint8), np.zeros(1))
