"""Is something wrong with a training? Checks for the report, on copies: they change no result.

| key | what |
|---|---|
| `gradients` | norm of gradient and weights of each layer, at the start and at the end |
| `dead_units` | units behind a ReLU that no image makes positive, by layer |
| `overfit` | whether a fresh network can learn one small batch by heart |
| `learning_rate` | loss while the learning rate rises (Smith 2017), and what that recommends |
| `gap` | accuracy on training and validation images, where a result is given |
| `warnings` | what a person should know, in plain words; empty if all is well |

Each check stops after `SECONDS`, so that a large network costs no more than a small one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from driftmill.contract import Vision
from driftmill.vision import nets, trainer
from driftmill.vision.nets import Net
from driftmill.vision.trainer import Result, Rows

#: Most seconds for one check.
SECONDS = 5.0
#: Images of each check: gradients, dead units, overfitting, a step of the learning-rate test.
GRADIENT_ROWS, UNIT_ROWS, OVERFIT_ROWS, RATE_ROWS = 256, 1024, 32, 64
#: Steps to learn a batch by heart, and of the learning-rate test.
OVERFIT_STEPS, RATE_STEPS = 80, 70
#: The test's rates, as parts of what is usual for optimizer and family.
RATE_RANGE = (1e-4, 1e3)
#: A layer's gradient this many times below the layers' median has vanished.
VANISHED = 1e-4
#: From where on a warning is due: change of a loss, part of a layer's units, gap between
#: accuracies; and the accuracy that counts as learnt by heart.
NOTICED = 0.02
MANY_DEAD, LARGE_GAP, BY_HEART = 0.25, 0.1, 0.95


def run(
    net: Net,
    learn: Rows,
    settings: Vision,
    seed: int,
    device: str | torch.device = "auto",
    result: Result | None = None,
) -> dict[str, Any]:
    """All checks.

    Args:
        net: the trained network.
        learn: what it has learnt from.
        settings: the contract's `train.vision`.
        seed: of the run; it picks the images.
        device: as in `trainer.choose_device`, or a device.
        result: of the training, for what its history shows.

    Returns:
        A JSON-able mapping with the keys above.
    """
    place = trainer.choose_device(device) if isinstance(device, str) else device
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(learn))[:UNIT_ROWS])
        images, y = torch.from_numpy(learn.read(chosen)).to(place), learn.labels()[chosen].to(place)
        mixed = torch.randperm(len(y)).to(place)
        images, y = images[mixed], y[mixed]
        trained = copy.deepcopy(net).to(place)
        fresh = nets.build(net.family, net.image, net.labels, seed)
        if settings.weights is not None:
            nets.load_weights(fresh, settings.weights)
        fresh.set_normalisation(net.mean.cpu(), net.std.cpu())
        fresh = fresh.to(place)

        found: dict[str, Any] = {
            "gradients": [
                {"layer": layer, "weights": weights, "start": start, "end": end}
                for (layer, weights, end), (_, _, start) in zip(
                    gradients(trained, images[:GRADIENT_ROWS], y[:GRADIENT_ROWS]),
                    gradients(copy.deepcopy(fresh), images[:GRADIENT_ROWS], y[:GRADIENT_ROWS]),
                    strict=True,
                )
            ],
            "dead_units": dead_units(trained, images),
            "overfit": overfit(copy.deepcopy(fresh), images[:OVERFIT_ROWS], y[:OVERFIT_ROWS]),
            "learning_rate": rate_range(fresh, images, y, settings),
            "gap": None
            if result is None
            else {
                "train": result.train["accuracy"],
                "validation": result.validation["accuracy"],
                "gap": result.gap,
            },
        }
    found["warnings"] = [
        *_of_gradients(found["gradients"]),
        *_of_units(found["dead_units"]),
        *_of_overfit(found["overfit"]),
        *_of_rate(found["learning_rate"]),
        *(_of_history(result, settings) if result is not None else ()),
    ]
    return found


def gradients(net: Net, images: Tensor, y: Tensor) -> list[tuple[str, float, float]]:
    """(name, norm of the weights, norm of the loss's gradient) of each layer with weights, from
    the first to the last."""
    net.requires_grad_(True).train()
    loss = functional.cross_entropy(net(net.normalise(images)), y)
    loss.backward()
    return [
        (name.removesuffix(".weight"), p.norm().item(), p.grad.norm().item())
        for name, p in net.named_parameters()
        if p.dim() > 1 and p.grad is not None
    ]


def dead_units(net: Net, images: Tensor) -> list[dict[str, Any]]:
    """For each ReLU: its number of units (channels, or neurons), and how many of them no image
    makes positive."""
    highest: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        calls = 0  # torchvision's blocks use one ReLU several times

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            nonlocal calls
            key = name if calls == 0 else f"{name} ({calls + 1})"
            calls += 1
            most = output.float().amax(dim=[d for d in range(output.dim()) if d != 1])
            highest[key] = torch.maximum(highest[key], most) if key in highest else most

        def begin() -> None:
            nonlocal calls
            calls = 0

        return module.register_forward_hook(hook), begin

    watched = [watch(n, m) for n, m in net.named_modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
    net.eval()
    with torch.no_grad():
        for _, some in zip(_clock(), images.split(GRADIENT_ROWS), strict=False):
            for _, begin in watched:
                begin()
            net(net.normalise(some))
    for handle, _ in watched:
        handle.remove()
    return [
        {"layer": name, "units": len(most), "dead": int((most <= 0).sum())}
        for name, most in highest.items()
    ]


def overfit(net: Net, images: Tensor, y: Tensor) -> dict[str, Any]:
    """Learn one batch by heart: a network that cannot is wired wrongly, or its labels are noise."""
    net.requires_grad_(True).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss, accuracy, steps = math.inf, 0.0, 0
    for _ in zip(_clock(), range(OVERFIT_STEPS), strict=False):
        logits = net(net.normalise(images))
        value = functional.cross_entropy(logits, y)
        loss, accuracy = value.item(), (logits.argmax(dim=1) == y).float().mean().item()
        steps += 1
        if accuracy == 1.0 and loss < 0.1:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return {
        "images": len(y),
        "steps": steps,
        "loss": _number(loss),
        "accuracy": accuracy,
        "passed": accuracy >= BY_HEART,
        "finished": accuracy >= BY_HEART or steps == OVERFIT_STEPS,
    }


def rate_range(net: Net, images: Tensor, y: Tensor, settings: Vision) -> dict[str, Any]:
    """The loss while the learning rate rises step by step. Recommended is the rate where the
    smoothed loss falls fastest; beyond `diverges` (null: not seen) it grows."""
    rate = trainer.learning_rate(settings, net.family)
    usual = trainer.learning_rate(settings.model_copy(update={"learning_rate": None}), net.family)
    rates = np.geomspace(usual * RATE_RANGE[0], usual * RATE_RANGE[1], RATE_STEPS)
    optimizer = trainer.make_optimizer(net, settings, rate)
    net.requires_grad_(True).train()
    losses: list[float] = []
    smooth, least, diverges = 0.0, math.inf, None
    order = torch.arange(RATE_STEPS * min(RATE_ROWS, len(y)), device=y.device) % len(y)
    for _, lr, places in zip(_clock(), rates, order.split(min(RATE_ROWS, len(y))), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        loss = functional.cross_entropy(net(net.normalise(images[places])), y[places])
        value = loss.item()
        smooth = 0.8 * smooth + 0.2 * value
        corrected = smooth / (1 - 0.8 ** (len(losses) + 1))
        losses.append(corrected)
        least = min(least, corrected)
        if not math.isfinite(corrected) or corrected > 2 * least:
            diverges = float(lr)
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finite = [value for value in losses if math.isfinite(value)]
    slopes = np.gradient(finite) if len(finite) > 2 else np.zeros(1)
    return {
        "used": rate,
        "recommended": float(rates[int(np.argmin(slopes))]),
        "diverges": diverges,
        "rates": [float(r) for r in rates[: len(losses)]],
        "losses": [_number(value) for value in losses],
    }


def _clock() -> Iterator[None]:
    """Goes on until a check has had its seconds."""
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        yield


def _number(value: float) -> float | None:
    """JSON knows no infinities."""
    return value if math.isfinite(value) else None


def _of_gradients(layers: list[dict[str, Any]]) -> Iterator[str]:
    start = [layer["start"] for layer in layers]
    median = float(np.median(start))
    if not all(math.isfinite(layer[when]) for layer in layers for when in ("start", "end")):
        yield "some gradients are infinite; lower the learning rate or train in float32"
    for layer in layers:
        if math.isfinite(median) and layer["start"] < VANISHED * median:
            yield (
                f"the gradient of {layer['layer']} is {layer['start'] / median:.0e} of the "
                "layers' median at the start: it will hardly learn"
            )


def _of_units(layers: list[dict[str, Any]]) -> Iterator[str]:
    for layer in layers:
        if layer["dead"] > MANY_DEAD * layer["units"]:
            yield (
                f"{layer['dead']} of {layer['units']} units behind {layer['layer']} are dead: no "
                "image makes them positive; a lower learning rate or a smaller network may help"
            )


def _of_overfit(found: dict[str, Any]) -> Iterator[str]:
    if found["finished"] and not found["passed"]:
        yield (
            f"a fresh network did not learn {found['images']} images by heart in "
            f"{found['steps']} steps (accuracy {found['accuracy']:.0%}); look at the labels: "
            "equal images may have different ones"
        )


def _of_rate(found: dict[str, Any]) -> Iterator[str]:
    used, diverges = found["used"], found["diverges"]
    if diverges is not None and used > diverges:
        yield (
            f"the learning rate {used:g} is above {diverges:.2g}, where a fresh network's loss "
            f"grows; about {found['recommended']:.2g} is recommended"
        )
    elif used < found["recommended"] / 30:
        yield (
            f"the learning rate {used:g} is low; a fresh network learns fastest at about "
            f"{found['recommended']:.2g}"
        )


def _of_history(result: Result, settings: Vision) -> Iterator[str]:
    if result.gap > LARGE_GAP:
        yield (
            f"accuracy is {result.train['accuracy']:.1%} on training and "
            f"{result.validation['accuracy']:.1%} on validation images: it learns by heart; "
            "augmentation, weight decay or more images may help"
        )
    losses = [entry["validation_loss"] for entry in result.history]
    best = int(np.argmin(losses)) + 1
    if settings.patience is None and losses[-1] > 1.1 * losses[best - 1] + NOTICED:
        yield (
            f"the validation loss was lowest in epoch {best} ({losses[best - 1]:.3f}) and ended at "
            f"{losses[-1]:.3f}; fewer epochs or `patience` would keep the best"
        )
    if len(losses) > 2 and best == len(losses) and losses[-1] < 0.95 * losses[-2] - NOTICED:
        yield (
            f"the validation loss still fell in the last epoch ({losses[-2]:.3f} to "
            f"{losses[-1]:.3f}); more epochs may help"
        )
