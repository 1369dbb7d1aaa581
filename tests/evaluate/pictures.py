"""A model of images with known errors, and the rows that it is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from driftmill import bundle, contract, features
from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.data.prepare import Prepared
from driftmill.features import IMAGE
from driftmill.vision import export, images, nets
from driftmill.vision.nets import Net
from tests.evaluate import models

LABELS = ("ape", "bee", "cat")

#: What a fit records of a training.
TRAINING: dict[str, Any] = {
    "history": [
        {
            "epoch": epoch,
            "train_loss": 1.0 / epoch,
            "validation_loss": 1.1 / epoch,
            "validation_accuracy": 1 - 0.5 / epoch,
            "lr": 0.1 / epoch,
            "seconds": 0.5,
        }
        for epoch in (1, 2, 3)
    ],
    "validation": {"loss": 0.4, "accuracy": 0.83},
    "train": {"loss": 0.3, "accuracy": 0.9},
    "gap": 0.07,
    "best_epoch": 2,
    "epochs": 3,
    "seconds": 1.5,
    "device": "cpu",
    "precision": "float32",
    "processes": 1,
    "parameters": 1234,
    "learn_rows": 90,
    "validation_rows": 10,
    "metric": "accuracy",
    "score": 0.82,
    "score_std": 0.01,
    "seeds": [
        {"seed": 0, "score": 0.81, "loss": 0.4, "epochs": 3, "seconds": 1.5},
        {"seed": 1, "score": 0.83, "loss": 0.4, "epochs": 3, "seconds": 1.5},
    ],
    "diagnostics": {
        "gradients": [
            {"layer": "body.features.0", "weights": 1.0, "start": 0.5, "end": 0.01},
            {"layer": "head", "weights": 1.0, "start": 0.7, "end": 0.0},
        ],
        "dead_units": [{"layer": "body.features.2", "units": 32, "dead": 3}],
        "overfit": {
            "images": 32,
            "steps": 12,
            "loss": 0.05,
            "accuracy": 1.0,
            "passed": True,
            "finished": True,
        },
        "learning_rate": {
            "used": 0.1,
            "recommended": 0.05,
            "diverges": None,
            "rates": [0.01, 0.1, 1.0],
            "losses": [2.0, 1.0, None],
        },
        "gap": {"train": 0.9, "validation": 0.83, "gap": 0.07},
        "warnings": ["the learning rate is <high>"],
    },
}


def make_contract(labels: tuple[str, ...] = LABELS, channels: int = 1, size: int = 8) -> Contract:
    """A contract of images."""
    return contract.Contract.model_validate(
        {
            "apiVersion": "driftmill/v1",
            "model": "pictures",
            "task": "image-classification",
            "data": {
                "source": "sklearn:digits",
                "target": {"name": "label", "labels": labels},
                "image": {"size": size, "channels": channels},
            },
            "gates": {"slices": {"columns": ["brightness"]}},
            "tracking": {"backend": "none"},
        }
    )


def network(of: Contract, family: str = "small-cnn", seed: int = 0) -> Net:
    """A network with random weights that gives each label to some images."""
    assert of.data.image is not None
    net = nets.build(family, of.data.image, len(of.data.target.labels), seed)
    net.eval()
    with torch.no_grad():
        seen = np.stack(list(frame(of, 100, seed=4)[IMAGE]))
        logits = net(net.normalise(torch.from_numpy(seen)))
        spread = logits.std(dim=0)
        net.head.weight /= spread[:, None]
        net.head.bias.copy_((net.head.bias - logits.mean(dim=0)) / spread)
    return net


def frame(of: Contract, rows: int, seed: int) -> pd.DataFrame:
    """Images at random with their statistics, all with the first label."""
    assert of.data.image is not None
    image = of.data.image
    rng = np.random.default_rng(seed)
    light = rng.uniform(0.2, 1, (rows, image.channels, 1, 1))
    pixels = (rng.integers(0, 256, (rows, image.channels, *image.size)) * light).astype(np.uint8)
    sizes = np.tile(image.size[::-1], (rows, 1))
    table = pd.DataFrame(images.statistics(pixels, sizes))
    labels = [of.data.target.labels[0]] * rows
    return table.assign(label=labels, **{IMAGE: images.column(pixels, rows)})


def make_bundle(
    folder: Path,
    of: Contract,
    net: Net,
    data: dict[str, Any] | None = None,
    with_weights: bool = True,
) -> Bundle:
    """A bundle of a network."""
    folder.mkdir(parents=True)
    export.to_onnx(net, folder / "model.onnx")
    save_file(net.state_dict(), folder / "weights.safetensors")
    reference = frame(of, 50, seed=3)
    bundle.write(
        folder / "bundle",
        contract=of,
        signature=features.signature(of, reference),
        model=folder / "model.onnx",
        reference=reference,
        examples=reference.head(4),
        family=net.family,
        params={},
        data=data or {},
        weights=folder / "weights.safetensors" if with_weights else None,
        training=TRAINING,
    )
    return bundle.load(folder / "bundle")


def prepared(of: Contract, model: Bundle, rows: int = 400, wrong: int = 40) -> Prepared:
    """Rows whose labels are the model's own answers, but for the first `wrong` of them, which it
    gets wrong."""
    parts = []
    for seed, count in ((1, 200), (2, rows)):
        table = frame(of, count, seed)
        answers = model.predict(table).argmax(axis=1)
        answers[: wrong if seed == 2 else 0] += 1
        names = np.array(of.data.target.labels, dtype=object)
        parts.append(table.assign(label=names[answers % len(names)]))
    return models.prepared(*parts)
