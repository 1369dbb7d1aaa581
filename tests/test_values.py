"""The values of the chart, and what a contract makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from driftmill import contract, images, values
from driftmill.monitor import rules


def made(name: str = "payments", store: str = "s3://models/driftmill") -> dict[str, Any]:
    found = contract.load(Path("examples", name, "contract.yaml"))
    return values.for_model(found, store=store, text=found.to_json())


def test_a_contract_says_what_differs_from_the_defaults() -> None:
    found = made()
    assert set(found) == {"models", "images", "store"}
    assert found["store"] == {"type": "s3", "uri": "s3://models/driftmill"}
    (model,) = found["models"].values()
    assert set(model) == {"kind", "contract", "rules"}
    values.Values.model_validate(found)


def test_images_are_those_that_are_built() -> None:
    found = made()["images"]
    assert set(found) == {"serviceTabular", "monitor", "controller", "trainingTabular"}
    for name, image in (
        ("serviceTabular", "service-tabular"),
        ("monitor", "monitor"),
        ("controller", "controller"),
    ):
        assert f"{found[name]['repository']}:{found[name]['tag']}" == images.reference(image)
    assert set(made("digits")["images"]) >= {"serviceVision", "trainingVision"}


def test_replicas_are_the_contracts_where_it_names_them() -> None:
    document = json.loads(contract.load("examples/payments/contract.yaml").to_json())
    document["serve"]["replicas"] = 3
    found = contract.Contract.model_validate(document)
    (model,) = values.for_model(found, store="s3://a/b", text="-")["models"].values()
    assert model["service"] == {"replicas": 3}


@pytest.mark.parametrize(
    ("reference", "image"),
    [
        ("a/b:1", {"repository": "a/b", "tag": "1"}),
        ("registry:5000/a", {"repository": "registry:5000/a"}),
        ("registry:5000/a:1", {"repository": "registry:5000/a", "tag": "1"}),
        (f"a@sha256:{'0' * 64}", {"repository": "a", "digest": f"sha256:{'0' * 64}"}),
        (f"a:1@sha256:{'0' * 64}", {"repository": "a", "tag": "1", "digest": f"sha256:{'0' * 64}"}),
    ],
)
def test_another_image_of_training_is_taken(reference: str, image: dict[str, str]) -> None:
    found = contract.load("examples/payments/contract.yaml")
    made = values.for_model(found, store="s3://a/b", text="-", training=reference)
    assert made["images"]["trainingTabular"] == image


@pytest.mark.parametrize("store", ["/var/models", "file:///var/models"])
def test_a_folder_becomes_a_volume(store: str) -> None:
    assert made(store=store)["store"] == {"type": "pvc"}


def test_rules_ask_for_the_namespace() -> None:
    (model,) = made()["models"].values()
    alerts = [rule for group in model["rules"] for rule in group["rules"] if rule.get("alert")]
    assert alerts
    for alert in alerts:
        assert rules.NAMESPACE in alert["expr"] or "ALERTS" in alert["expr"], alert
        assert alert["labels"]["namespace"] == rules.NAMESPACE


@pytest.mark.parametrize(
    "wrong",
    [
        {"service": {"replica": 1}},
        {"models": {"Payments": {"contract": "x"}}},
        {"models": {"payments": {}}},
        {"store": {"uri": "models"}},
        {"store": {"pvc": {"size": "1 Gi"}}},
        {"images": {"monitor": {"digest": "abc"}}},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        values.Values.model_validate(wrong)
