"""The OpenAPI document; `tests/services/test_schemathesis.py` holds it against what services do."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from driftmill.contract import Contract, Explain
from driftmill.features import Signature
from driftmill.serving.codec import RequestError, TableCodec
from driftmill.serving.openapi import openapi
from tests.serving.test_codec import GOOD, WIDE, body, codec


def validator(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    """Of one of the document's schemas."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("champion", [None, codec()])
@pytest.mark.parametrize("prefix", ["", "/models/wide"])
def test_all_that_is_referred_to_is_there(champion: TableCodec | None, prefix: str) -> None:
    document = openapi("wide", champion, Explain(), prefix)
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"][name])
    for part in text.split('"$ref": "#/components/schemas/')[1:]:
        assert part.partition('"')[0] in document["components"]["schemas"]
    assert ("/explain" in document["paths"]) == (champion is not None)
    # What several models share is not below the path of one.
    assert document["servers"] == [{"url": prefix or "/"}]
    shared = {path for path, item in document["paths"].items() if "servers" in item}
    every = {path for path in document["paths"] if path.startswith(("/v2", "/models"))}
    assert shared == (every if prefix else set())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"an amount": 1000, "age": None, "paid": 1, "strict": "Red."},
        {"an amount": 1000.5},
        {"age": 5.5},
        {"age": 5.0, "paid": False},
        {"paid": 0.5},
        {"strict": "blue"},
        {"a.free": ""},
        {"_time": "1700-01-01T00:00:00Z"},
        {"_time": "1699-12-31T00:00:00Z"},
        {"_time": "2200-01-01T00:00:00Z"},
        {"_id": "x" * 513},
        {"unknown": 1},
    ],
)
def test_the_schema_takes_what_the_decoder_takes(change: dict[str, Any]) -> None:
    records = [GOOD | change]
    fits = validator(openapi("wide", codec()), "PredictRequest").is_valid({"records": records})
    try:
        codec().records(body(*records))
        taken = True
    except RequestError:
        taken = False
    assert fits == taken


@pytest.mark.parametrize(
    ("labels", "prediction"),
    [
        (("a", "b"), {"prediction": "a", "score": 0.2, "probabilities": {"a": 0.8, "b": 0.2}}),
        ((), {"prediction": 1.5}),
    ],
)
def test_answers_fit_their_schema(labels: tuple[str, ...], prediction: dict[str, Any]) -> None:
    task: Any = "classification" if labels else "regression"
    sign = Signature(task=task, columns=WIDE.data.columns, target="t", labels=labels)
    answers = validator(openapi("wide", TableCodec(sign, of(task))), "Answers")
    whole = {"model": "wide", "version": "v"}
    assert answers.is_valid(whole | {"predictions": [{"id": "0" * 26, **prediction}]})
    for name in ("id", *prediction):
        less = {k: v for k, v in ({"id": "0" * 26} | prediction).items() if k != name}
        assert not answers.is_valid(whole | {"predictions": [less]})


def of(task: str) -> Contract:
    return WIDE if task == "classification" else Contract.model_validate(regression())


def regression() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(WIDE.to_json())
    values["task"], values["data"]["target"] = "regression", {"name": "t"}
    return values
