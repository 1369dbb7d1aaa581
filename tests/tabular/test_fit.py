"""The two training steps on prepared data: fit, then assemble into a bundle that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from driftmill import assemble, bundle, features
from driftmill.contract import Contract
from driftmill.data import prepare
from driftmill.evaluate import metrics
from driftmill.serving.session import Session
from driftmill.tabular import candidates, export, fit
from tests.tabular.conftest import NUMBERS, TEXTS, make_contract, rows

Prepare = Callable[..., tuple[Contract, Path]]


@pytest.mark.parametrize("labels", [2, 3, 0])
def test_fit_then_assemble_gives_a_bundle_that_loads(
    labels: int, prepared: Prepare, tmp_path: Path
) -> None:
    contract, data = prepared(labels)
    families = ["dummy", "linear", "hist-gradient-boosting"]
    for family in families:
        fit.fit(contract, family, data, tmp_path / family)
    manifest = assemble.assemble(contract, data, [tmp_path / f for f in families], tmp_path / "b")

    loaded = bundle.load(tmp_path / "b", "shapes")
    assert manifest.family in families[1:]
    assert manifest.data["fingerprint"] == prepare.read(data).info.fingerprint
    assert set(manifest.data["candidates"]) == set(families)
    test = prepare.read(data).test
    y = candidates.truth(test, loaded.signature)
    found = metrics.all_metrics(contract.task, y, loaded.predict(test))
    assert found["auc"] > 0.8 if labels else found["r2"] > 0.5
    assert set(loaded.reference) >= {"size", "age", "colour", "town", "y", bundle.PREDICTION}


@pytest.mark.parametrize("columns", [NUMBERS, TEXTS])
def test_a_model_of_numbers_or_texts_only_is_bundled(
    columns: list[dict[str, Any]], prepared: Prepare, tmp_path: Path
) -> None:
    contract, data = prepared(2, columns=columns)
    fit.fit(contract, "linear", data, tmp_path / "fit")
    assemble.assemble(contract, data, [tmp_path / "fit"], tmp_path / "bundle")
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.predict(prepare.read(data).test).shape[1] == 2


def test_the_record_says_how_it_was_found(prepared: Prepare, tmp_path: Path) -> None:
    contract, data = prepared(2)
    record = fit.fit(contract, "random-forest", data, tmp_path / "out")
    assert record == json.loads((tmp_path / "out" / "fit.json").read_text())
    assert record["family"] == "random-forest"
    assert record["tried"] == 2
    assert record["rows"] == len(prepare.read(data).train)
    assert record["search"]["method"] == "random"
    assert record["search"]["metric"] == "auc"
    assert record["search"]["trials"][0]["score"] == record["score"]
    assert record["params"] == record["search"]["trials"][0]["params"]
    assert 0 < record["parity"] <= export.TOLERANCE
    assert record["seconds"] > 0
    assert Session(tmp_path / "out" / "model.onnx").output == "probabilities"


def test_the_same_training_gives_the_same_version(prepared: Prepare, tmp_path: Path) -> None:
    contract, data = prepared(2)
    versions = set()
    for attempt in ("a", "b"):
        fit.fit(contract, "hist-gradient-boosting", data, tmp_path / attempt / "fit")
        made = assemble.assemble(
            contract, data, [tmp_path / attempt / "fit"], tmp_path / attempt / "bundle"
        )
        versions.add(made.version)
    assert len(versions) == 1


def test_time_ordered_rows_are_searched_in_order(prepared: Prepare, tmp_path: Path) -> None:
    contract, data = prepared(0, time="at")
    record = fit.fit(contract, "linear", data, tmp_path / "out")
    assert np.isfinite(record["score"])


def test_stressed_rows_hold_what_may_be_missing_or_unknown() -> None:
    contract, frame = make_contract(2), rows(2)
    hard = fit.stressed(frame, contract)
    assert not hard["size"].isna().any(), "size is not nullable"
    assert hard["age"].isna().mean() > frame["age"].isna().mean()
    assert hard["colour"].isna().sum() > 0
    assert hard["town"].eq("never seen in training").any()
    pd.testing.assert_frame_equal(frame, rows(2))


@pytest.mark.parametrize(("metric", "expected"), [("auc", "high"), ("log_loss", "low")])
def test_the_best_is_chosen_by_the_direction_of_the_metric(metric: str, expected: str) -> None:
    contract = make_contract(2, train={"metric": metric})
    records: list[tuple[Path, dict[str, Any]]] = [
        (Path("none"), {"score": float("nan")}),
        (Path("low"), {"score": 0.3}),
        (Path("high"), {"score": 0.9}),
    ]
    assert assemble.choose(contract, records)[0] == Path(expected)


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no fit to choose from"):
        assemble.choose(make_contract(2), [])


def test_the_reference_is_the_newest_or_a_fixed_sample() -> None:
    frame = pd.DataFrame({"n": range(25_000)})
    newest = assemble.reference(make_contract(2, time="at"), frame)
    assert newest["n"].tolist() == list(range(15_000, 25_000))
    drawn = assemble.reference(make_contract(2), frame)
    assert len(drawn) == 10_000
    assert drawn["n"].is_monotonic_increasing
    assert drawn["n"].mean() == pytest.approx(12_500, rel=0.03)
    pd.testing.assert_frame_equal(drawn, assemble.reference(make_contract(2), frame))
    assert len(assemble.reference(make_contract(2), frame.head(10))) == 10


def test_the_examples_are_varied() -> None:
    frame = rows(2, count=3000)
    chosen = assemble.examples(make_contract(2), frame)
    assert len(chosen) == 8
    assert chosen.index.is_unique
    assert chosen["age"].isna().any()
    assert chosen["age"].notna().any()
    assert set(chosen["colour"].dropna()) == {"red", "green"}
    assert chosen["colour"].isna().any()
    assert chosen["town"].nunique() == 8


def test_a_few_rows_are_all_examples() -> None:
    assert len(assemble.examples(make_contract(2), rows(2, count=3))) == 3


@pytest.mark.slow
def test_adult_reaches_its_goal(data_folder: Path, tmp_path: Path) -> None:
    from driftmill import contract as contracts

    examples = Path(__file__).parents[2] / "examples"
    adult = contracts.load(examples / "adult" / "contract.yaml")
    prepare.prepare(adult, tmp_path / "data")
    fit.fit(adult, "hist-gradient-boosting", tmp_path / "data", tmp_path / "fit")
    assemble.assemble(adult, tmp_path / "data", [tmp_path / "fit"], tmp_path / "bundle")
    loaded = bundle.load(tmp_path / "bundle")
    test = prepare.read(tmp_path / "data").test
    assert len(test) > 16_000
    y = metrics.encode(loaded.signature.labels, test[loaded.signature.target])
    assert metrics.score("auc", y, loaded.predict(test)) >= 0.925
    assert features.signature(adult, test).labels == loaded.signature.labels
