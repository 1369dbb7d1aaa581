"""Kept fits: taken where nothing has changed that they depend on, and only whole ones."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from driftmill import cache, runs, steps
from driftmill.contract import Contract, load, parse
from driftmill.store import Store
from tests.pipelines.contracts import IMAGES, write_contract

FILES = {"model.onnx": b"a network", "fit.json": b"{}"}


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    return load(write_contract(tmp_path, rows=300))


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A folder as a fit leaves it."""
    return folder_of(tmp_path / "fitted", FILES)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder as `prepare` leaves it, as far as a key goes by it."""
    return folder_of(tmp_path / "prepared", {"dataset.json": b'{"fingerprint": "f1"}'})


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(contract: Contract, path: str, value: object) -> Contract:
    """The contract with one field replaced, e.g. `train.seed`."""
    values = json.loads(contract.to_json())
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return Contract.model_validate(values)


def test_what_is_kept_is_taken(store: Store, fitted: Path, tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", {})
    assert not cache.take(store, "m/cache/fit/k", out)
    cache.keep(store, "m/cache/fit/k", fitted)
    assert cache.take(store, "m/cache/fit/k", out)
    assert content(out) == FILES


def no_entry(store: Store, place: str) -> None:
    store.delete(f"{place}/entry.json")


def no_model(store: Store, place: str) -> None:
    store.delete(f"{place}/{json.loads(store.read(f'{place}/entry.json'))['model.onnx']}")


def another_model(store: Store, place: str) -> None:
    digest = json.loads(store.read(f"{place}/entry.json"))["model.onnx"]
    store.write(f"{place}/{digest}", b"another network")


def half_an_entry(store: Store, place: str) -> None:
    store.write(f"{place}/entry.json", store.read(f"{place}/entry.json")[:40])


def a_way_out(store: Store, place: str) -> None:
    names = json.loads(store.read(f"{place}/entry.json"))
    store.write(f"{place}/entry.json", json.dumps({"../out": names["fit.json"]}).encode())


DAMAGES = (no_entry, no_model, another_model, half_an_entry, a_way_out)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_what_is_not_whole_is_not_taken_and_gets_replaced(
    damage: Callable[[Store, str], None], store: Store, fitted: Path, tmp_path: Path
) -> None:
    cache.keep(store, "m/cache/fit/k", fitted)
    damage(store, "m/cache/fit/k")
    out = folder_of(tmp_path / "inner", {})
    assert not cache.take(store, "m/cache/fit/k", out)
    assert content(out) == {}
    cache.keep(store, "m/cache/fit/k", fitted)
    assert cache.take(store, "m/cache/fit/k", out)
    assert content(out) == FILES


def test_of_many_who_keep_at_once_one_is_taken_whole(store: Store, tmp_path: Path) -> None:
    pairs = [{"model.onnx": b"%d" % i * 200_000, "fit.json": b"%d" % i} for i in range(4)]
    folders = [folder_of(tmp_path / f"{i}", files) for i, files in enumerate(pairs)]
    out, taken = folder_of(tmp_path / "out", {}), list[dict[str, bytes]]()

    def write(folder: Path) -> None:
        for _ in range(10):
            cache.keep(store, "m/cache/fit/k", folder)

    writers = [threading.Thread(target=write, args=(folder,)) for folder in folders]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if cache.take(store, "m/cache/fit/k", out):
            taken.append(content(out))
    assert cache.take(store, "m/cache/fit/k", out)
    taken.append(content(out))
    assert all(files in pairs for files in taken)


MATTERS = {
    "train.seed": 1,
    "train.search.method": "grid",
    "train.metric": "accuracy",
    "train.vision.epochs": 3,
    "data.target.labels": ["yes", "no"],
    "data.split.seed": 1,
}
#: What prepares, judges, serves or places a model does not change what is learnt from rows.
DOES_NOT = {
    "train.candidates": ["linear", "random-forest"],
    "train.resources.memory": "64Gi",
    "data.source.uri": "s3://elsewhere/rows.csv",
    "gates.confidence": 0.9,
    "serve.replicas": 3,
    "retrain.schedule": "0 3 * * *",
    "owner": "somebody",
}


@pytest.mark.parametrize("path", MATTERS)
def test_the_key_changes_with_what_the_fit_depends_on(
    path: str, contract: Contract, prepared: Path
) -> None:
    other = changed(contract, path, MATTERS[path])
    assert cache.key(other, "linear", prepared) != cache.key(contract, "linear", prepared)


@pytest.mark.parametrize("path", DOES_NOT)
def test_the_key_stays_with_all_else(path: str, contract: Contract, prepared: Path) -> None:
    other = changed(contract, path, DOES_NOT[path])
    assert cache.key(other, "linear", prepared) == cache.key(contract, "linear", prepared)


def test_the_key_changes_with_rows_code_packages_and_family(
    contract: Contract, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        cache.key(contract, "linear", prepared),
        cache.key(contract, "random-forest", prepared),
    }
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    keys.add(cache.key(contract, "linear", prepared))
    monkeypatch.setattr(cache, "PACKAGES", ("numpy",))
    keys.add(cache.key(contract, "linear", prepared))
    (prepared / "dataset.json").write_text('{"fingerprint": "f2"}')
    keys.add(cache.key(contract, "linear", prepared))
    assert len(keys) == 5


Train = Callable[[Contract, str], tuple[bool, str]]


@pytest.fixture
def train(store: Store, tmp_path: Path) -> Train:
    """The steps of a pipeline as far as the bundle; answers whether the fit was taken, and the
    version that came of it."""
    numbers = itertools.count()

    def run(contract: Contract, family: str) -> tuple[bool, str]:
        run_id = f"r{next(numbers)}"
        asked, folder = (contract.to_json(), store.uri, run_id), tmp_path / run_id
        steps.prepare(*asked, folder / "data")
        steps.fit(*asked, family, folder / "data", folder / "fit")
        steps.assemble(*asked, folder / "data", [folder / "fit"], folder / "bundle")
        found = {step.name: step.facts for step in runs.steps(store, contract.model, run_id)}
        return found[f"fit-{family}"]["cached"], found["assemble"]["version"]

    return run


@pytest.mark.slow
def test_a_table_is_fitted_once(
    train: Train, contract: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, version = train(contract, "linear")
    assert not cached
    assert train(contract, "linear") == (True, version)
    assert train(changed(contract, "train.cache", False), "linear") == (False, version)
    assert not train(changed(contract, "train.seed", 1), "linear")[0]
    assert not train(changed(contract, "train.search.folds", 4), "linear")[0]
    rows = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(rows.replace("web", "app", 1))
    assert not train(contract, "linear")[0]
    (tmp_path / "rows.csv").write_text(rows)
    assert train(contract, "linear") == (True, version)
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    assert train(contract, "linear") == (False, version)


@pytest.mark.slow
def test_a_damaged_fit_is_made_again(train: Train, store: Store, contract: Contract) -> None:
    _, version = train(contract, "linear")
    (entry,) = (k for k in store.list("tiny/cache") if k.endswith("/entry.json"))
    another_model(store, entry.removesuffix("/entry.json"))
    assert train(contract, "linear") == (False, version)
    assert train(contract, "linear") == (True, version)


@pytest.mark.slow
def test_a_network_is_fitted_once(train: Train) -> None:
    contract = parse(IMAGES)
    cached, version = train(contract, "mlp")
    assert not cached
    assert train(contract, "mlp") == (True, version)
    assert not train(changed(contract, "train.vision.label_smoothing", 0.1), "mlp")[0]
