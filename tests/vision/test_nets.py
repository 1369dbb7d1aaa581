"""Networks: what goes in and comes out, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from driftmill.contract import Image, Weights
from driftmill.store import sha256
from driftmill.vision import nets
from driftmill.vision.nets import Net, NetError

WIDTHS = {
    "mlp": 256,
    "small-cnn": 128,
    "resnet18": 512,
    "resnet50": 2048,
    "mobilenet-v3-small": 1024,
    "efficientnet-b0": 1280,
    "convnext-tiny": 768,
}
SMALL = Image(size=(8, 8), channels=1)


def noise(count: int, image: Image) -> torch.Tensor:
    shape = (count, image.channels, *image.size)
    return torch.randint(0, 256, shape, generator=torch.manual_seed(0), dtype=torch.uint8)


def saved(tensors: dict[str, torch.Tensor], folder: Path) -> Weights:
    path = folder / "given.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return Weights(file=str(path), sha256=sha256(path))


def test_widths_are_of_all_families() -> None:
    assert tuple(WIDTHS) == nets.FAMILIES


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", WIDTHS)
def test_image_to_embedding_to_logits(family: str, channels: int) -> None:
    image = Image(size=(32, 40), channels=channels)
    net = nets.build(family, image, 5).eval()
    x = net.normalise(noise(2, image))
    embedding = net.embed(x)
    assert embedding.shape == (2, WIDTHS[family])
    assert net.width == WIDTHS[family]
    assert net.forward(x).shape == (2, 5)
    assert torch.equal(net(x), net.head(embedding))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 13), (28, 28), (65, 33)])
@pytest.mark.parametrize("family", ["mlp", "small-cnn"])
def test_our_families_take_any_size(family: str, size: tuple[int, int]) -> None:
    image = Image(size=size, channels=1)
    net = nets.build(family, image, 3)
    logits = net(net.normalise(noise(4, image)))
    logits.sum().backward()
    assert logits.shape == (4, 3)
    assert all(p.grad is not None for p in net.parameters())


def test_the_seed_decides_and_no_other_generator_moves() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (nets.build("small-cnn", SMALL, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(("size", "feature"), [(32, 4), (64, 8), (96, 3)])
def test_resnets_keep_the_resolution_of_small_images(size: int, feature: int) -> None:
    image = Image(size=(size, size), channels=1)
    net = nets.build("resnet18", image, 2).eval()
    seen: list[torch.Tensor] = []
    net.last_feature_map().register_forward_hook(lambda _, __, output: seen.append(output))
    net(net.normalise(noise(1, image)))
    assert seen[0].shape == (1, 512, feature, feature)


def test_normalisation_goes_with_the_weights() -> None:
    net = nets.build("mlp", Image(size=(4, 4), channels=3), 2)
    net.set_normalisation(torch.tensor([10.0, 20, 30]), torch.tensor([2.0, 4, 0]))
    other = nets.build("mlp", Image(size=(4, 4), channels=3), 2, seed=1)
    other.load_state_dict(net.state_dict())
    pixels = torch.tensor([14, 24, 31], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    # A deviation of nothing counts as one pixel.
    assert other.normalise(pixels)[0, :, 0, 0].tolist() == [2.0, 1.0, 1.0]


def test_what_cannot_be_built() -> None:
    with pytest.raises(NetError, match="no family 'vgg'"):
        nets.build("vgg", SMALL, 2)
    with pytest.raises(NetError, match="32 pixels at least"):
        nets.build("convnext-tiny", SMALL, 2)
    with pytest.raises(NetError, match="keeps no places"):
        nets.build("mlp", SMALL, 2).last_feature_map()


MAKERS = {
    "resnet18": models.resnet18,
    "mobilenet-v3-small": models.mobilenet_v3_small,
    "efficientnet-b0": models.efficientnet_b0,
    "convnext-tiny": models.convnext_tiny,
}


@pytest.mark.parametrize("family", MAKERS)
def test_weights_of_torchvision_answer_as_torchvision_does(family: str, tmp_path: Path) -> None:
    image = Image(size=(96, 96), channels=3)
    theirs = MAKERS[family](weights=None, num_classes=5).eval()
    net = nets.build(family, image, 5).eval()
    assert nets.load_weights(net, saved(theirs.state_dict(), tmp_path)) == []
    x = net.normalise(noise(2, image))
    torch.testing.assert_close(net(x), theirs(x))


def test_a_last_layer_for_other_labels_is_left_out(tmp_path: Path) -> None:
    image = Image(size=(96, 96), channels=3)
    theirs = models.resnet18(weights=None).eval()
    net = nets.build("resnet18", image, 5).eval()
    head = net.head.weight.clone()
    weights = saved(theirs.state_dict(), tmp_path)
    assert nets.load_weights(net, weights) == ["head.weight", "head.bias"]
    assert torch.equal(net.head.weight, head)
    x = net.normalise(noise(1, image))
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(net.embed(x), theirs(x))


@pytest.mark.parametrize("family", ["resnet18", "efficientnet-b0"])
def test_grey_images_see_what_three_equal_channels_would(family: str, tmp_path: Path) -> None:
    grey = Image(size=(96, 96), channels=1)
    theirs = MAKERS[family](weights=None, num_classes=5).eval()
    net = nets.build(family, grey, 5).eval()
    nets.load_weights(net, saved(theirs.state_dict(), tmp_path))
    x = net.normalise(noise(2, grey))
    torch.testing.assert_close(net(x), theirs(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["small-cnn", "resnet18"])
def test_weights_of_a_bundle(family: str, tmp_path: Path) -> None:
    before = nets.build(family, SMALL, 3, seed=1)
    before.set_normalisation(torch.tensor([50.0]), torch.tensor([9.0]))
    net = nets.build(family, SMALL, 3, seed=2)
    assert nets.load_weights(net, saved(before.state_dict(), tmp_path)) == []
    for name, value in before.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def refused(net: Net, weights: Weights) -> str:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NetError) as caught:
        nets.load_weights(net, weights)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    return str(caught.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    net = nets.build("small-cnn", SMALL, 3)
    good = net.state_dict()
    missing = Weights(file=str(tmp_path / "none.safetensors"), sha256="0" * 64)
    assert "does not exist" in refused(net, missing)
    other = saved(good, tmp_path).model_copy(update={"sha256": "0" * 64})
    assert "is not the expected file: its sha256 is" in refused(net, other)
    (tmp_path / "text").write_text("not tensors")
    text = Weights(file=str(tmp_path / "text"), sha256=sha256(tmp_path / "text"))
    assert "is not a safetensors file" in refused(net, text)
    for name in ("body.features.0.0.weight", "mean"):
        fewer = {k: v for k, v in good.items() if k != name}
        assert f"1 tensors are missing, e.g. {name}" in refused(net, saved(fewer, tmp_path))
    more = good | {"body.more": torch.zeros(1)}
    assert "1 tensors are unknown, e.g. body.more" in refused(net, saved(more, tmp_path))
    mlp = nets.build("mlp", SMALL, 3).state_dict()
    assert "does not hold a small-cnn" in refused(net, saved(mlp, tmp_path))
    name = "body.features.0.0.weight"
    wrong = good | {name: torch.zeros(32, 1, 5, 5)}
    assert "is (32, 1, 5, 5) and should be (32, 1, 3, 3)" in refused(net, saved(wrong, tmp_path))


def test_weights_for_large_images_do_not_fit_small_ones(tmp_path: Path) -> None:
    net = nets.build("resnet18", Image(size=(32, 32)), 3)
    weights = saved(models.resnet18(weights=None).state_dict(), tmp_path)
    assert "raise data.image.size" in refused(net, weights)
