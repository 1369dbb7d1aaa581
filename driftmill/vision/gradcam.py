"""Where did a network look? Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391).

The last feature map still knows places. Each of its channels is weighed by how much a label's logit
grows with it, on average over places; the weighted sum, where positive, shows what spoke for the
label.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from driftmill.contract import Image
from driftmill.vision import nets
from driftmill.vision.nets import Net, NetError


def load(weights: Path, family: str, image: Image, labels: int) -> Net:
    """The network of a bundle, ready to answer, on the CPU.

    Raises:
        NetError: the file is missing or not this network's.
    """
    net = nets.build(family, image, labels)
    try:
        net.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise NetError(f"{weights.name} does not hold a {family}: {error}") from None
    net.eval()
    return net


def maps(net: Net, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What spoke for a label in each image.

    Args:
        net: as `load` gives it.
        images: uint8 (rows, channels, height, width).
        labels: (rows,) int, the label of each image to explain.

    Returns:
        float32 (rows, height, width), from 0 to 1, the most important place of each image; all 0
        where nothing spoke for the label.

    Raises:
        NetError: the family keeps no places (`mlp`).
    """
    kept: list[Tensor] = []
    hook = net.last_feature_map().register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        with torch.enable_grad():
            logits = net(net.normalise(torch.from_numpy(np.array(images))).requires_grad_())
    finally:
        hook.remove()
    (places,) = kept
    chosen = logits.gather(1, torch.from_numpy(np.asarray(labels, dtype=np.int64))[:, None])
    # Rows do not mix in evaluation, so the sum's gradient holds each row's own.
    (gradient,) = torch.autograd.grad(chosen.sum(), places)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    found = torch.relu((weights * places).sum(dim=1, keepdim=True)).detach()
    found = torch.nn.functional.interpolate(
        found, size=net.image.size, mode="bilinear", align_corners=False
    )[:, 0]
    most = found.amax(dim=(1, 2), keepdim=True)
    scaled: np.ndarray = (found / most.clamp(min=1e-12)).numpy()
    return scaled
