"""An image task on prepared data: fit, then assemble into a bundle that loads and is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from driftmill import assemble, bundle, features
from driftmill.contract import Contract
from driftmill.data import prepare, split
from driftmill.evaluate import metrics
from driftmill.serving.session import Session
from driftmill.store import Store
from driftmill.vision import export, fit
from driftmill.vision.trainer import TrainingError
from tests.vision import digits


@pytest.fixture(scope="module")
def prepared_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of `digits.make_contract`."""
    return digits.prepared(tmp_path_factory.mktemp("digits"))


def _fit(
    contract: Contract, data: Path, out: Path, store: Store, family: str = "small-cnn"
) -> dict[str, Any]:
    return fit.fit(contract, family, data, out, store)


def test_fit_then_assemble_gives_a_bundle_that_loads(
    prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    contract = digits.make_contract()
    for family in ("mlp", "small-cnn"):
        _fit(contract, prepared_digits, tmp_path / family, store, family)
    manifest = assemble.assemble(
        contract, prepared_digits, [tmp_path / "mlp", tmp_path / "small-cnn"], tmp_path / "b"
    )
    loaded = bundle.load(tmp_path / "b", "digits")
    assert set(manifest.data["candidates"]) == {"mlp", "small-cnn"}
    best = max(manifest.data["candidates"].items(), key=lambda item: item[1]["score"])[0]
    assert manifest.family == best
    assert "precision" not in manifest.data

    test = prepare.read(prepared_digits).test
    output = loaded.predict(test)
    y = metrics.encode(loaded.signature.labels, test["label"])
    assert metrics.score("accuracy", y, output) > 0.8
    # A label that no training row has keeps its column.
    assert output.shape == (len(test), 11)
    assert output[:, 10].mean() < 0.05

    assert set(loaded.reference) >= {"brightness", "label", features.IMAGE, features.EMBEDDING}
    training = loaded.training
    assert training is not None
    assert [entry["epoch"] for entry in training["history"]] == [1, 2, 3]
    assert set(load_file(tmp_path / "b" / "weights.safetensors")) >= {"mean", "std", "head.bias"}


def test_the_record_says_how_it_was_found(
    prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    contract = digits.make_contract({"seeds": 2, "diagnostics": True, "epochs": 2})
    record = _fit(contract, prepared_digits, tmp_path, store, "mlp")
    assert record == json.loads((tmp_path / "fit.json").read_text())
    assert record["family"] == "mlp"
    assert record["tried"] == 2
    assert 0 < record["parity"] <= export.TOLERANCE
    assert record["rows"] == len(prepare.read(prepared_digits).train)
    training = record["training"]
    assert training["learn_rows"] + training["validation_rows"] == record["rows"]
    assert [run["seed"] for run in training["seeds"]] == [0, 1]
    scores = [run["score"] for run in training["seeds"]]
    assert record["score"] == pytest.approx(np.mean(scores))
    assert record["score_std"] == pytest.approx(np.std(scores))
    assert record["params"]["seed"] == int(np.argmax(scores))
    assert set(training["diagnostics"]) >= {"gradients", "dead_units", "overfit", "warnings"}
    assert training["device"] == "cpu"


def test_the_exported_model_is_the_best_run(
    prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    contract = digits.make_contract({"seeds": 2, "epochs": 1})
    record = _fit(contract, prepared_digits, tmp_path, store, "mlp")
    train = prepare.read(prepared_digits).train
    sign = features.signature(contract, train)
    unseen = train[split.held_out(train, contract, contract.train.vision.validation)]
    assert len(unseen) == record["training"]["validation_rows"]
    y = metrics.encode(sign.labels, unseen["label"])
    output = Session(tmp_path / "model.onnx").run(*features.arrays(unseen, sign))
    best = max(run["score"] for run in record["training"]["seeds"])
    assert metrics.score("accuracy", y, output) == pytest.approx(best)


def test_the_test_rows_play_no_part(prepared_digits: Path, store: Store, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in prepared_digits.iterdir():
        if not path.name.startswith("test"):
            (other / path.name).write_bytes(path.read_bytes())
    test = prepare.read(prepared_digits).test
    test.iloc[:50].drop(columns=features.IMAGE).to_parquet(other / "test.parquet", index=False)
    np.save(other / "test-images.npy", np.zeros((50, 1, 8, 8), dtype=np.uint8))
    contract = digits.make_contract({"epochs": 1})
    files = []
    for data, name in ((prepared_digits, "a"), (other, "b")):
        _fit(contract, data, tmp_path / name, store, "mlp")
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_the_same_training_gives_the_same_version(
    prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    contract = digits.make_contract({"epochs": 1}, serve={"precision": "int8"})
    versions = set()
    for attempt in ("a", "b"):
        _fit(contract, prepared_digits, tmp_path / attempt / "fit", store)
        manifest = assemble.assemble(
            contract, prepared_digits, [tmp_path / attempt / "fit"], tmp_path / attempt / "bundle"
        )
        versions.add(manifest.version)
    assert len(versions) == 1


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_bundle_in_a_smaller_precision(
    precision: str, prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    contract = digits.make_contract(
        serve={"precision": precision}, gates={"max_precision_loss": 0.05}
    )
    _fit(contract, prepared_digits, tmp_path / "fit", store)
    manifest = assemble.assemble(contract, prepared_digits, [tmp_path / "fit"], tmp_path / "b")
    found = manifest.data["precision"]
    assert found["served"] == manifest.precision == precision
    whole, small = tmp_path / "fit" / "model.onnx", tmp_path / "b" / "model.onnx"
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    bundle.load(tmp_path / "b", "digits")


def test_rows_are_validated_with_the_newest_where_there_is_a_time() -> None:
    contract = digits.make_contract()
    train = pd.DataFrame({features.TIME: range(30), "label": ["0", "1"] * 15})
    chosen = split.held_out(train, contract, 0.1)
    assert np.flatnonzero(chosen).tolist() == [27, 28, 29]


def test_a_metric_that_cannot_be_measured_is_said(
    prepared_digits: Path, store: Store, tmp_path: Path
) -> None:
    """AUC needs two labels among the validation rows."""
    data = tmp_path / "data"
    data.mkdir()
    prepared = prepare.read(prepared_digits)
    # In order of time, and the newest rows are all the same digit.
    order = np.argsort(prepared.train["label"] == "3", kind="stable")
    train = prepared.train.iloc[order].drop(columns=features.IMAGE)
    images = np.load(prepared_digits / "train-images.npy")[order]
    train.assign(**{features.TIME: range(len(train))}).to_parquet(data / "train.parquet")
    np.save(data / "train-images.npy", images)
    for name in ("test.parquet", "dataset.json"):
        (data / name).write_bytes((prepared_digits / name).read_bytes())
    contract = digits.make_contract({"epochs": 1}, metric="auc")
    with pytest.raises(TrainingError, match=r"auc cannot be measured.*raise train\.vision"):
        _fit(contract, data, tmp_path / "fit", store, "mlp")
