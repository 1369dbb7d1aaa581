"""The training loop: it learns, twice the same, and goes on after it was killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from driftmill.contract import Image, Vision
from driftmill.store import Store
from driftmill.vision import nets, trainer
from driftmill.vision.checkpoints import Checkpoints
from driftmill.vision.nets import Net
from driftmill.vision.trainer import Result, Rows, TrainingError
from tests.vision.tasks import IMAGE, LABELS, settings, spots

LEARN, VALIDATE = spots(200, seed=1), spots(80, seed=2)
AUGMENT = {"flip": True, "shift": 0.1, "erase": 0.05, "brightness": 0.1}


def trained(
    of: Vision,
    family: str = "mlp",
    learn: Rows = LEARN,
    checkpoints: Checkpoints | None = None,
    image: Image = IMAGE,
    **more: Any,
) -> tuple[Net, Result]:
    net = nets.build(family, image, LABELS, 0)
    return net, trainer.train(net, learn, VALIDATE, of, 0, "cpu", checkpoints, **more)


def same(one: Net, other: Net) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("family", ["mlp", "small-cnn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(family: str, optimizer: str) -> None:
    net, result = trained(settings(optimizer=optimizer, epochs=4, batch=16), family)
    assert result.validation["accuracy"] > 0.9
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert not net.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("mlp", "bfloat16"),
        ("small-cnn", "float32"),
        ("small-cnn", "bfloat16"),
        ("mobilenet-v3-small", "float32"),
    ],
)
def test_the_same_seed_gives_the_same_bits(family: str, precision: str) -> None:
    of = settings(precision=precision, augment=AUGMENT, ema=0.9, label_smoothing=0.1, epochs=2)
    torch.manual_seed(1)
    one, first = trained(of, family)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two, second = trained(of, family)
    assert torch.equal(state, torch.get_rng_state())
    assert same(one, two)
    assert first.validation == second.validation
    assert first.precision == precision


def test_another_seed_gives_others() -> None:
    one, _ = trained(settings())
    two = nets.build("mlp", IMAGE, LABELS, 0)
    trainer.train(two, LEARN, VALIDATE, settings(), 1, "cpu")
    assert not same(one, two)


def test_images_on_the_disk_train_as_those_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.concatenate([VALIDATE.images, LEARN.images]))
    mapped = Rows(
        np.load(tmp_path / "images.npy", mmap_mode="r"),
        np.concatenate([VALIDATE.y, LEARN.y]),
        np.arange(len(VALIDATE), len(VALIDATE) + len(LEARN)),
    )
    of = settings(augment=AUGMENT, epochs=2)
    one, resident = trained(of)
    two, loaded = trained(of.model_copy(update={"resident": False}), learn=mapped)
    assert (resident.resident, loaded.resident) == (True, False)
    assert same(one, two)


def test_parts_of_a_batch_add_up() -> None:
    whole, _ = trained(settings(epochs=1))
    parts, _ = trained(settings(epochs=1, accumulate=3))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_image_is_seen_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    feed = trainer._Feed.batches

    def watched(self: trainer._Feed, places: list[torch.Tensor]) -> Any:
        if self.rows is LEARN:
            seen.extend(places)
        return feed(self, places)

    monkeypatch.setattr(trainer._Feed, "batches", watched)
    trained(settings(epochs=2, batch=48))
    assert [len(batch) for batch in seen] == [40] * 10  # of one size, none is left over
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(200))
    assert not torch.equal(first, second)


def test_the_average_is_taken() -> None:
    plain, _ = trained(settings())
    average, result = trained(settings(ema=0.95))
    assert not same(plain, average)
    assert result.validation["accuracy"] > 0.9
    fast, _ = trained(settings(ema=1e-12))  # the average of the last alone
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_patience_stops_and_takes_the_best() -> None:
    noise = replace(LEARN, y=np.random.default_rng(0).permutation(LEARN.y))
    of = settings(epochs=60, patience=3, schedule="constant", learning_rate=0.05)
    net, result = trained(of, learn=noise)
    losses = [epoch["validation_loss"] for epoch in result.history]
    assert result.epochs == result.best_epoch + 3 < 60
    assert losses[result.best_epoch - 1] == min(losses)
    assert result.validation["loss"] == pytest.approx(min(losses), rel=1e-5)
    probabilities, _ = trainer.predict(net, VALIDATE, "cpu")
    chosen = probabilities[np.arange(len(VALIDATE)), VALIDATE.y]
    assert -np.log(chosen).mean() == pytest.approx(min(losses), rel=1e-4)


def test_without_patience_the_last_is_taken() -> None:
    _, result = trained(settings(epochs=4))
    assert result.epochs == result.best_epoch == 4
    assert result.steps == 4 * 7
    last = result.history[-1]
    assert result.validation["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)


def test_frozen_layers_do_not_learn() -> None:
    weights = {"file": "/given", "sha256": "0" * 64}
    before = nets.build("small-cnn", IMAGE, LABELS, 0)
    of = settings(weights=weights, frozen=2, epochs=2, learning_rate=0.1)
    frozen, _ = trained(of, "small-cnn")
    for name, value in before.state_dict().items():
        learnt = not torch.equal(value, frozen.state_dict()[name])
        assert learnt == (not name.startswith("body.")), name
    thawed, _ = trained(of.model_copy(update={"frozen": 1}), "small-cnn")
    assert not torch.equal(
        thawed.get_parameter("body.features.0.0.weight"),
        before.get_parameter("body.features.0.0.weight"),
    )
    assert all(p.requires_grad for p in frozen.parameters())


def test_biases_and_norms_do_not_decay() -> None:
    net = nets.build("small-cnn", IMAGE, LABELS)
    decaying, free = trainer.make_optimizer(net, settings(weight_decay=0.1), 0.1).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decaying["params"]} == {2, 4}
    assert {p.dim() for p in free["params"]} == {1}
    count = len(decaying["params"]) + len(free["params"])
    assert count == len(list(net.parameters()))


def test_normalisation_is_of_the_training_rows() -> None:
    image = Image(size=(8, 8), channels=3)
    rows = spots(50, image=image)
    some = replace(rows, rows=np.arange(0, 50, 3))
    mean, std = trainer.measure_normalisation(some)
    pixels = rows.images[::3].astype(float)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-5)
    net, _ = trained(settings(epochs=1))
    np.testing.assert_allclose(net.mean.flatten(), LEARN.images.mean(), rtol=1e-5)


def test_predict_answers_in_order() -> None:
    net, result = trained(settings(), "small-cnn")
    probabilities, embedding = trainer.predict(net, VALIDATE, "cpu", batch=7)
    assert probabilities.shape == (80, LABELS)
    assert embedding.shape == (80, net.width)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    right = (probabilities.argmax(axis=1) == VALIDATE.y).mean()
    assert right == pytest.approx(result.validation["accuracy"])
    some = replace(VALIDATE, rows=np.array([5, 2]))
    np.testing.assert_allclose(
        trainer.predict(net, some, "cpu")[0], probabilities[[5, 2]], rtol=1e-4, atol=1e-6
    )


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.floats(0.01, 0.8), st.integers())
def test_split_keeps_every_row_and_the_proportions(y: list[int], part: float, seed: int) -> None:
    labels = np.array(y)
    learn, validate = trainer.split(labels, part, abs(seed))
    assert sorted([*learn, *validate]) == list(range(len(y)))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        kept = (labels[validate] == label).sum()
        assert abs(kept - part * count) <= 1
        assert kept < count
        assert kept > 0 or count == 1


@given(st.sampled_from(["one-cycle", "triangular"]), st.floats(0, 1))
def test_schedules_rise_and_fall(schedule: str, done: float) -> None:
    value = trainer.scheduled(schedule, done)
    assert trainer.LOWEST <= value <= 1
    later = trainer.scheduled(schedule, min(done + 0.01, 1))
    if done + 0.01 <= trainer.RISE:
        assert later > value
    if trainer.RISE <= done < 0.99:
        assert later < value


def test_schedules_meet_their_ends() -> None:
    for schedule in ("one-cycle", "triangular"):
        ends = [trainer.scheduled(schedule, done) for done in (0, trainer.RISE, 1)]
        assert ends == pytest.approx([trainer.LOWEST, 1, trainer.LOWEST])
    assert trainer.scheduled("constant", 0.3) == 1


def test_precision_is_what_the_processor_is_fast_with(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    plain, depthwise = (nets.build(f, IMAGE, 2) for f in ("small-cnn", "mobilenet-v3-small"))
    for able, expected in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert trainer.choose_precision("auto", cpu, plain) is expected
        assert trainer.choose_precision("auto", cpu, depthwise) is torch.float32
        assert trainer.choose_precision("bfloat16", cpu, depthwise) is torch.bfloat16
        assert trainer.choose_precision("float32", cpu, plain) is torch.float32


def test_threads_are_given_back_and_few_for_small_work() -> None:
    torch.set_num_threads(2)
    try:
        small = nets.build("small-cnn", IMAGE, LABELS)
        large = nets.build("small-cnn", Image(size=(28, 28), channels=1), LABELS)
        assert trainer._threads(small, 60_000, 1) == 1
        assert trainer._threads(large, 60_000, 1) == 2
        trained(settings(epochs=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_learning_rates() -> None:
    assert trainer.learning_rate(settings(learning_rate=0.3), "mlp") == 0.3
    assert trainer.learning_rate(settings(batch=512), "mlp") == pytest.approx(
        2 * trainer.learning_rate(settings(batch=256), "mlp")
    )
    weights = {"file": "/given", "sha256": "0" * 64}
    for optimizer in trainer.LEARNING_RATES:
        usual = trainer.learning_rate(settings(optimizer=optimizer), "resnet18")
        assert trainer.learning_rate(
            settings(optimizer=optimizer, weights=weights), "resnet18"
        ) == pytest.approx(usual / 10)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(TrainingError, match="too few"):
        trained(settings(), learn=replace(LEARN, rows=np.array([3])))
    with pytest.raises(TrainingError, match="not a number in epoch 1; lower"):
        trained(settings(learning_rate=1e30))
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="finds no GPU"):
            trainer.choose_device("cuda")


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "sgd", "ema": 0.9},
        {"optimizer": "adamw", "patience": 2},
        {"optimizer": "rmsprop", "accumulate": 2},
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_training_goes_on(store: Store, fields: dict[str, Any], at: int) -> None:
    of = settings(epochs=4, augment=AUGMENT, **fields)
    whole, expected = trained(of, "small-cnn")
    kept = Checkpoints(store, "digits", {"at": at})

    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == at + 1:
            raise Stop

    with pytest.raises(Stop):
        trained(of, "small-cnn", checkpoints=kept, on_epoch=stop)
    parts, result = trained(of, "small-cnn", checkpoints=kept)
    assert result.resumed_at == at * 7
    assert same(whole, parts)
    assert [e["train_loss"] for e in result.history] == [e["train_loss"] for e in expected.history]
    assert result.best_epoch == expected.best_epoch
    assert store.list("digits") == []


def test_a_damaged_checkpoint_costs_an_epoch(store: Store) -> None:
    of = settings(epochs=4)
    whole, _ = trained(of)
    kept = Checkpoints(store, "digits", {})

    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 4:
            raise Stop

    with pytest.raises(Stop):
        trained(of, checkpoints=kept, on_epoch=stop)
    assert store.folder is not None
    newest = store.folder / store.list(kept.folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    parts, result = trained(of, checkpoints=kept)
    assert result.resumed_at == 2 * 7
    assert same(whole, parts)


#: Trains with a checkpoint after almost every step and writes the weights.
SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from driftmill.store import Store
from driftmill.vision import nets, trainer
from driftmill.vision.checkpoints import Checkpoints
from tests.vision.tasks import IMAGE, LABELS, settings, spots

torch.set_num_threads(1)
folder = Path(sys.argv[1])
trainer.CHECKPOINT_SECONDS = 0.01
of = settings(epochs=12, batch=16, augment={"flip": True, "shift": 0.1}, ema=0.9, patience=11)
net = nets.build("small-cnn", IMAGE, LABELS, 0)
print("begins", flush=True)
result = trainer.train(
    net, spots(400, seed=1), spots(80, seed=2), of, 0, "cpu",
    Checkpoints(Store(folder / "store"), "digits", {}),
)
save_file(net.state_dict(), folder / "final.safetensors")
print("ends", result.resumed_at, flush=True)
"""


def process(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    started = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "begins\n"
    return started


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    run = process(tmp_path / "whole")
    began = time.monotonic()
    output, _ = run.communicate()
    assert output == "ends 0\n"
    seconds = time.monotonic() - began
    expected = load_file(tmp_path / "whole" / "final.safetensors")

    moments = random.Random(0)
    killed, resumed = 0, []
    for _ in range(60):
        run = process(tmp_path / "killed")
        time.sleep(moments.uniform(0.02, seconds / 3))
        run.kill()
        output, _ = run.communicate()
        if output.startswith("ends"):
            resumed.append(int(output.split()[1]))
            break
        killed += 1
    assert killed >= 2
    assert resumed
    assert resumed[0] > 0
    found = load_file(tmp_path / "killed" / "final.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert Store(tmp_path / "killed" / "store").list("digits") == []
