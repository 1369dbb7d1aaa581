"""Checkpoints: the last two are kept, and a damaged one is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftmill.store import Store
from driftmill.vision.checkpoints import Checkpoints

IDENTITY = {"data": "abc", "family": "mlp", "settings": {"epochs": 3}, "seed": 0}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((2, 3), float(step)),
        "count": torch.tensor(step),
        "half": torch.full((3,), step, dtype=torch.bfloat16),
    }


def written(store: Store, *steps: int) -> tuple[Checkpoints, list[Path]]:
    kept = Checkpoints(store, "digits", IDENTITY)
    for step in steps:
        kept.save(step, tensors(step), {"step": step, "history": [{"loss": 0.1 + step}]})
    assert store.folder is not None
    return kept, [store.folder / key for key in store.list(kept.folder)]


def test_what_was_saved_comes_back(store: Store) -> None:
    kept, _ = written(store, 7)
    found = kept.load()
    assert found is not None
    assert found.step == 7
    assert found.facts == {"step": 7, "history": [{"loss": 7.1}]}
    for name, value in tensors(7).items():
        assert torch.equal(found.tensors[name], value)
        assert found.tensors[name].dtype == value.dtype


def test_the_last_two_are_kept_whatever_their_length(store: Store) -> None:
    kept, files = written(store, 8, 9, 10, 100)
    assert [int(path.name[:9]) for path in files] == [10, 100]
    found = kept.load()
    assert found is not None
    assert found.step == 100


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_one_falls_back(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, cut: bool
) -> None:
    kept, files = written(Store(tmp_path_factory.mktemp("store")), 1, 2)
    content = bytearray(files[-1].read_bytes())
    at = int(place * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    files[-1].write_bytes(bytes(content))
    found = kept.load()
    assert found is not None
    assert found.step == 1


def test_all_damaged_means_from_the_start(store: Store) -> None:
    kept, files = written(store, 1, 2)
    for path in files:
        path.write_bytes(b"")
    assert kept.load() is None


def test_another_training_has_others(store: Store) -> None:
    kept, _ = written(store, 1)
    other = Checkpoints(store, "digits", IDENTITY | {"seed": 1})
    assert other.load() is None
    again = Checkpoints(store, "digits", dict(reversed(IDENTITY.items())))
    assert again.load() is not None
    assert Checkpoints.at(store, kept.folder).load() is not None


def test_clear_leaves_nothing(store: Store) -> None:
    kept, files = written(store, 1, 2)
    (files[0].parent / ".tmp-of-a-killed-write").write_bytes(b"half")
    kept.clear()
    assert kept.load() is None
    assert not files[0].parent.exists()
    kept.clear()
