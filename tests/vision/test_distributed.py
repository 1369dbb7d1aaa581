"""Two real processes over gloo, against one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from driftmill.store import Store
from driftmill.vision import distributed, nets, trainer
from driftmill.vision.checkpoints import Checkpoints
from driftmill.vision.trainer import TrainingError
from tests.vision.tasks import IMAGE, LABELS, settings, spots

LEARN, VALIDATE = spots(203, seed=1), spots(81, seed=2)


@pytest.mark.slow
def test_two_processes_train_as_one(store: Store) -> None:
    of = settings(
        augment={"flip": True, "shift": 0.1}, epochs=3, ema=0.8, label_smoothing=0.1, accumulate=2
    )
    alone, pair = (nets.build("mlp", IMAGE, LABELS, 0) for _ in range(2))
    one = trainer.train(alone, LEARN, VALIDATE, of, 0, "cpu")
    kept = Checkpoints(store, "digits", {})
    two = distributed.train(pair, LEARN, VALIDATE, of, 0, 2, kept)
    assert (one.processes, two.processes) == (1, 2)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    for before, after in zip(one.history, two.history, strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-4)
        assert after["validation_accuracy"] == before["validation_accuracy"]
    assert two.validation == pytest.approx(one.validation, rel=1e-4)
    assert store.list("digits") == []


@pytest.mark.slow
def test_two_processes_with_norms_are_as_good(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", LEARN.images)
    mapped = replace(LEARN, images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    of = settings(epochs=4, batch=16, resident=False)
    alone, pair = (nets.build("small-cnn", IMAGE, LABELS, 0) for _ in range(2))
    one = trainer.train(alone, LEARN, VALIDATE, of, 0, "cpu")
    two = distributed.train(pair, mapped, VALIDATE, of, 0, 2)
    assert two.validation["accuracy"] == pytest.approx(one.validation["accuracy"], abs=0.05)
    assert two.validation["accuracy"] > 0.9
    assert not pair.training


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_of_one(store: Store) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 2:
            raise Stop

    kept = Checkpoints(store, "digits", {})
    of = settings(epochs=3)
    net = nets.build("mlp", IMAGE, LABELS, 0)
    with pytest.raises(Stop):
        trainer.train(net, LEARN, VALIDATE, of, 0, "cpu", kept, stop)
    net, whole = (nets.build("mlp", IMAGE, LABELS, 0) for _ in range(2))
    result = distributed.train(net, LEARN, VALIDATE, of, 0, 2, kept)
    assert result.resumed_at == 7
    trainer.train(whole, LEARN, VALIDATE, of, 0, "cpu")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_what_a_process_says_is_what_is_raised() -> None:
    net = nets.build("mlp", IMAGE, LABELS, 0)
    with pytest.raises(TrainingError, match=r"lower train\.vision\.learning_rate"):
        distributed.train(net, LEARN, VALIDATE, settings(learning_rate=1e30), 0, 2)


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", LEARN.images)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    some = replace(LEARN, images=images, rows=np.arange(50))
    part = replace(LEARN, images=images[10:], y=LEARN.y[10:])
    (tmp_path / "job").mkdir()
    net = nets.build("mlp", IMAGE, LABELS, 0)
    distributed.write_job(tmp_path / "job", net, some, part, settings(), 0)
    names = {path.name for path in (tmp_path / "job").iterdir()}
    assert "learn-images.npy" not in names
    # A view of a file has other rows than the file.
    assert np.array_equal(np.load(tmp_path / "job" / "validate-images.npy"), LEARN.images[10:])


def test_without_a_gpu_one_process_trains() -> None:
    assert distributed.processes(4, "cpu") == 1
    if not torch.cuda.is_available():
        assert distributed.processes(4, "auto") == 1
