"""Diagnostics: each warning where it is due, none where it is not, and nothing is changed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from driftmill.contract import Image
from driftmill.vision import diagnose, nets, trainer
from driftmill.vision.nets import Net
from driftmill.vision.trainer import Result
from tests.vision.tasks import IMAGE, LABELS, settings, spots

LEARN, VALIDATE = spots(300, seed=1), spots(80, seed=2)


@pytest.fixture(scope="module")
def trained() -> tuple[Net, Result]:
    net = nets.build("small-cnn", IMAGE, LABELS, 0)
    return net, trainer.train(net, LEARN, VALIDATE, settings(epochs=6), 0, "cpu")


def test_a_good_training_has_no_warnings(trained: tuple[Net, Result]) -> None:
    net, result = trained
    found = diagnose.run(net, LEARN, settings(), 0, "cpu", result)
    assert found["warnings"] == []
    assert found["overfit"]["passed"]
    assert found["gap"]["gap"] == pytest.approx(result.gap)
    layers = [layer["layer"] for layer in found["gradients"]]
    assert layers[0] == "body.features.0.0"
    assert layers[-1] == "head"
    assert all(layer["start"] > 0 and layer["weights"] > 0 for layer in found["gradients"])
    assert [layer["units"] for layer in found["dead_units"]] == [32, 64, 64, 128, 128]
    rate = found["learning_rate"]
    assert len(rate["rates"]) == len(rate["losses"])
    json.dumps(found, allow_nan=False)


def test_nothing_is_changed(trained: tuple[Net, Result]) -> None:
    net, result = trained
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    diagnose.run(net, LEARN, settings(), 0, "cpu", result)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_dead_units_are_counted(trained: tuple[Net, Result]) -> None:
    net = nets.build("small-cnn", IMAGE, LABELS, 0)
    net.load_state_dict(trained[0].state_dict())
    with torch.no_grad():
        norm = net.get_submodule("body.features.0.1")
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.bias[:20] = -1000.0
    found = diagnose.run(net, LEARN, settings(), 0, "cpu")
    assert found["dead_units"][0]["dead"] >= 20
    assert any("units behind body.features.0.2 are dead" in text for text in found["warnings"])
    assert found["gap"] is None


def test_a_relu_that_is_used_twice_counts_twice() -> None:
    image = Image(size=(16, 16), channels=1)
    net = nets.build("resnet18", image, LABELS)
    images = torch.from_numpy(spots(8, image=image).images)
    layers = diagnose.dead_units(net, images)
    assert len(layers) == 17
    assert {layer["layer"] for layer in layers} >= {
        "body.layer1.0.relu",
        "body.layer1.0.relu (2)",
    }


def test_labels_that_contradict_each_other() -> None:
    same = replace(LEARN, images=np.repeat(LEARN.images[:1], 300, axis=0))
    net = nets.build("small-cnn", IMAGE, LABELS, 0)
    net.set_normalisation(torch.tensor([100.0]), torch.tensor([40.0]))
    found = diagnose.run(net, same, settings(), 0, "cpu")
    assert any("by heart" in text and "labels" in text for text in found["warnings"])


@pytest.mark.parametrize(("rate", "text"), [(1e4, "is above"), (1e-9, "is low")])
def test_learning_rates_that_cannot_be_right(
    trained: tuple[Net, Result], rate: float, text: str
) -> None:
    found = diagnose.run(trained[0], LEARN, settings(learning_rate=rate), 0, "cpu")
    assert any(f"the learning rate {rate:g} {text}" in line for line in found["warnings"])
    assert 0.001 < found["learning_rate"]["recommended"] < 1


def test_what_a_history_shows(trained: tuple[Net, Result]) -> None:
    def warnings(losses: list[float], train: float = 0.9, patience: int | None = None) -> str:
        history = [
            dict(trained[1].history[0], epoch=i + 1, validation_loss=loss)
            for i, loss in enumerate(losses)
        ]
        result = replace(
            trained[1],
            history=history,
            train={"loss": 0.1, "accuracy": train},
            validation={"loss": 0.1, "accuracy": 0.85},
        )
        return " ".join(diagnose._of_history(result, settings(patience=patience)))

    assert warnings([1.0, 0.5, 0.49]) == ""
    assert "learns by heart" in warnings([1.0, 0.5, 0.49], train=1.0)
    rising = [1.0, 0.5, 0.9]
    assert "lowest in epoch 2 (0.500) and ended at 0.900" in warnings(rising)
    assert warnings(rising, patience=1) == ""
    assert "still fell in the last epoch" in warnings([1.0, 0.7, 0.5])
