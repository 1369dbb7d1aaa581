"""Networks for images: `build` makes one, `load_weights` gives it weights to start from.

Every network is a `Net`: normalisation with buffers that go wherever the weights go, a body that
turns an image into an embedding (the penultimate layer, which the monitor compares), and a linear
head that turns an embedding into logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from driftmill.contract import Image, VisionFamily, Weights
from driftmill.store import sha256

FAMILIES: tuple[str, ...] = get_args(VisionFamily)
#: ResNets keep the resolution in their first layer up to this many pixels (He et al. 2016, 4.2).
SMALL = 64
#: Fewer pixels than this leave nothing of an image in the last layers.
LEAST = {"convnext-tiny": 32}
#: Channels of `small-cnn` at a half, a quarter and an eighth of the resolution.
CHANNELS = (32, 64, 128)
#: Units of the hidden layers of `mlp`.
HIDDEN = (512, 256)


class NetError(ValueError):
    """A network that cannot be built, or weights that do not fit it."""


class Net(nn.Module):
    """An image classifier.

    Args:
        family: its family's name.
        image: height, width and channels of its input.
        body: normalised images (N, C, H, W) -> embeddings (N, width).
        head: embeddings -> logits (N, labels).
        inner: for torchvision's models, the name of the head in their state dict; else None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, family: str, image: Image, body: nn.Module, head: nn.Linear, inner: str | None = None
    ) -> None:
        super().__init__()
        self.family, self.image, self.inner = family, image, inner
        self.labels, self.width = head.out_features, head.in_features
        self.body, self.head = body, head
        shape = (image.channels, 1, 1)
        self.register_buffer("mean", torch.full(shape, 127.5))
        self.register_buffer("std", torch.full(shape, 63.75))

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels 0..255 (N, C, H, W), integer or float, to about zero mean and unit variance."""
        return (images.float() - self.mean) / self.std

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings (N, width) of normalised images."""
        embedding: Tensor = self.body(x)
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, labels) of normalised images."""
        logits: Tensor = self.head(self.embed(x))
        return logits

    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and deviation of each channel (C,), in units of pixels 0..255."""
        self.mean.copy_(mean.reshape(-1, 1, 1))
        # A constant channel would divide by nothing.
        self.std.copy_(std.reshape(-1, 1, 1).clamp(min=1.0))

    def freeze(self, frozen: bool) -> None:
        """Let only the head learn, or all."""
        self.body.requires_grad_(not frozen)

    def last_feature_map(self) -> nn.Module:
        """The module whose output (N, K, h, w) is the last that still has places, for Grad-CAM.

        Raises:
            NetError: the family has none.
        """
        for name in ("layer4", "features"):
            if hasattr(self.body, name):
                return self.body.get_submodule(name)
        raise NetError(f"{self.family} keeps no places; Grad-CAM needs a convolutional network")


def build(family: str, image: Image, labels: int, seed: int = 0) -> Net:
    """A network with random weights; the same seed gives the same, and no other generator moves.

    Raises:
        NetError: no such family, or the images are too small for it.
    """
    if family not in FAMILIES:
        raise NetError(f"no family {family!r}; choose one of {', '.join(FAMILIES)}")
    least = LEAST.get(family, 1)
    if min(image.size) < least:
        raise NetError(
            f"{family} needs images of {least} pixels at least; raise data.image.size "
            f"from {image.size[0]}x{image.size[1]} or choose another family"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[family](image, labels)


def load_weights(net: Net, weights: Weights) -> list[str]:
    """Start from a file's weights instead of random ones.

    The file is a state dict of the family's torchvision model, or of a `Net` (a bundle's
    `weights.safetensors`). Grey images take the sum of an RGB network's first filters: what it
    would see if all three channels were alike.

    Returns:
        Names of the file's tensors that were left out: a last layer for other labels.

    Raises:
        NetError: it is missing, has another digest, or does not fit the network.
    """
    path = Path(weights.file)
    if not path.is_file():
        raise NetError(f"{path} does not exist; check train.vision.weights.file")
    found = sha256(path)
    if found != weights.sha256:
        raise NetError(
            f"{path} is not the expected file: its sha256 is {found}, the contract says "
            f"{weights.sha256}"
        )
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise NetError(f"{path} is not a safetensors file: {error}") from None

    ours = net.state_dict()
    if not any(name.startswith("body.") for name in given) and net.inner is not None:
        head = f"{net.inner}."
        given = {
            f"head.{name.removeprefix(head)}" if name.startswith(head) else f"body.{name}": value
            for name, value in given.items()
        }
        # Not in the file: they are of our training images.
        given = {name: ours[name] for name in ("mean", "std")} | given
    left_out = []
    for name in ("head.weight", "head.bias"):
        if name in given and given[name].shape != ours[name].shape:
            left_out.append(name)
        if name in left_out or name not in given:
            given[name] = ours[name]
    for name, value in given.items():
        if name in ours and value.shape != ours[name].shape:
            given[name] = _as_grey(value, ours[name], f"{path}: {name}")
    missing, unknown = sorted(ours.keys() - given.keys()), sorted(given.keys() - ours.keys())
    if missing or unknown:
        raise NetError(
            f"{path} does not hold a {net.family}: "
            + "; ".join(
                f"{len(names)} tensors {what}, e.g. {names[0]}"
                for what, names in (("are missing", missing), ("are unknown", unknown))
                if names
            )
        )
    net.load_state_dict(given)
    return left_out


def _as_grey(value: Tensor, ours: Tensor, name: str) -> Tensor:
    """RGB filters (K, 3, h, w) summed to grey ones; NetError for any other difference in shape."""
    if value.dim() == 4 and value.shape[1] == 3 and ours.shape[1] == 1:
        value = value.sum(dim=1, keepdim=True)
    if value.numel() == 3 and ours.numel() == 1:  # mean and deviation of a Net
        value = value.mean().reshape(ours.shape)
    if value.shape != ours.shape:
        hint = (
            f" (images of up to {SMALL} pixels have a first layer of 3x3; raise data.image.size)"
            if value.dim() == 4 and ours.shape[2:] == (3, 3)
            else ""
        )
        raise NetError(f"{name} is {tuple(value.shape)} and should be {tuple(ours.shape)}{hint}")
    return value


class _Mlp(nn.Sequential):
    def __init__(self, pixels: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip((pixels, *HIDDEN), HIDDEN, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers)


class _SmallCnn(nn.Module):
    """A first layer that halves the resolution, then two blocks that halve it again and double the
    channels; after each a convolution that is added to what it sees (He et al. 2016).

    Made for CPUs: at full resolution memory traffic, not arithmetic, would take most of the time,
    and pooling before the norm leaves it a quarter of the work. Images below 16 pixels keep their
    resolution in the first layer.
    """

    def __init__(self, image: Image) -> None:
        super().__init__()
        first, second, third = CHANNELS
        stem = (
            nn.Conv2d(image.channels, first, 3, padding=1, bias=False)
            if min(image.size) < 16
            else nn.Conv2d(image.channels, first, 4, stride=2, padding=1, bias=False)
        )
        self.features = nn.Sequential(
            _after(stem),
            *_halved(first, second),
            _Added(second),
            *_halved(second, third),
            _Added(third),
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.pool(self.features(x))
        return embedding


class _Added(nn.Module):
    """What a convolution sees, and what it makes of it, added up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = _after(nn.Conv2d(channels, channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _after(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(
        convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
    )


def _halved(before: int, after: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    ]


def _mlp(image: Image, labels: int) -> Net:
    body = _Mlp(image.channels * image.size[0] * image.size[1])
    return Net("mlp", image, body, nn.Linear(HIDDEN[-1], labels))


def _small_cnn(image: Image, labels: int) -> Net:
    return Net("small-cnn", image, _SmallCnn(image), nn.Linear(CHANNELS[-1], labels))


def _resnet(family: str, make: Callable[..., models.ResNet], image: Image, labels: int) -> Net:
    body = make(weights=None, num_classes=labels)
    small = max(image.size) <= SMALL
    if small:
        body.conv1 = nn.Conv2d(image.channels, 64, 3, padding=1, bias=False)
        body.maxpool = nn.Identity()
    elif image.channels != 3:
        body.conv1 = nn.Conv2d(image.channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    head, body.fc = body.fc, nn.Identity()
    return Net(family, image, body, head, inner="fc")


def _classifier(family: str, make: Callable[..., nn.Module], image: Image, labels: int) -> Net:
    """A torchvision model that ends in `classifier`, whose last layer becomes the head."""
    body = make(weights=None, num_classes=labels)
    features, classifier = body.get_submodule("features"), body.get_submodule("classifier")
    assert isinstance(features, nn.Sequential)
    assert isinstance(classifier, nn.Sequential)
    first = features[0][0]
    assert isinstance(first, nn.Conv2d)
    if image.channels != 3:
        grey = nn.Conv2d(
            image.channels,
            first.out_channels,
            first.kernel_size,
            first.stride,
            first.padding,
            bias=first.bias is not None,
        )
        features[0][0] = grey
    last = len(classifier) - 1
    head = classifier[last]
    assert isinstance(head, nn.Linear)
    classifier[last] = nn.Identity()
    return Net(family, image, body, head, inner=f"classifier.{last}")


_BUILDERS: dict[str, Callable[[Image, int], Net]] = {
    "mlp": _mlp,
    "small-cnn": _small_cnn,
    "resnet18": partial(_resnet, "resnet18", models.resnet18),
    "resnet50": partial(_resnet, "resnet50", models.resnet50),
    "mobilenet-v3-small": partial(_classifier, "mobilenet-v3-small", models.mobilenet_v3_small),
    "efficientnet-b0": partial(_classifier, "efficientnet-b0", models.efficientnet_b0),
    "convnext-tiny": partial(_classifier, "convnext-tiny", models.convnext_tiny),
}
