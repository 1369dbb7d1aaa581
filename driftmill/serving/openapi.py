"""The OpenAPI document of a service, with the schema of the model that serves.

It is exact: what fits a schema is taken, what does not is refused, and no answer has a status,
header or body that is not in it. Two rules are beyond JSON Schema and stand in descriptions: that
the tensors of a request have the same number of rows, and that a shape fits its data.

A new route is one more entry of `paths` in `openapi`; a new status one of `_MEANINGS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version as version_of
from typing import Any

import msgspec

from driftmill.contract import Explain
from driftmill.features import Signature
from driftmill.serving import open_inference
from driftmill.serving.codec import ID_PATTERN, JSON, Codec

Schema = dict[str, Any]

_MEANINGS = {
    "400": "The body is not valid JSON or ends early, or a header is wrong.",
    "401": "A token is asked for, and the request has none that is valid.",
    "403": "The token, or the client's certificate, does not give the right to this.",
    "404": "No version of this name serves.",
    "408": "The body came too slowly.",
    "413": "The body, or an image in it, is too large.",
    "415": "The content type is none that is taken, or the body is no image of a listed format.",
    "422": "A field is wrong, or an image breaks a rule; `path` says which.",
    "429": "This client sends too many requests, or more are to be explained than is allowed.",
    "500": "The model gave no answer.",
    "503": "No version is loaded, too many requests wait, or the log cannot be written.",
    "504": "The answer did not come in time.",
}
#: Statuses of a route that a token may guard; of one that reads a body; of one that predicts.
_GUARDED = ("401", "403")
_READS = (*_GUARDED, "400", "408", "413", "415", "422", "429", "503")
_PREDICTS = (*_READS, "500", "504")
#: Statuses whose answers may say when to try again.
_LATER = ("429", "503", "504")

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_VISIBLE: Schema = {"type": "string", "maxLength": 128, "pattern": "^[ -~]*$"}
_REQUEST_ID = {
    "description": "Names the request, in answers and in the log. While a canary runs, the same id "
    "is answered by the same version.",
    "schema": _VISIBLE,
}
_MODEL_VERSION = {
    "description": "The version that answered.",
    "required": True,
    "schema": _TEXT,
}
_HEADERS = [
    {"name": "X-Request-Id", "in": "header", **_REQUEST_ID},
    {
        "name": "X-Routing-Key",
        "in": "header",
        "description": "While a canary runs, requests of the same key are answered by the same "
        "version; without it, those of the same id.",
        "schema": _VISIBLE,
    },
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds that the client waits; then it gets 504. The contract's "
        "`serve.timeout` where that is less.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]

_JSON_SIZE = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "How much of the body is JSON; binary tensors follow. Without it, all is JSON.",
    "schema": {"type": "integer", "minimum": 0},
}


def openapi(
    model: str, codec: Codec | None, explains: Explain | None = None, prefix: str = ""
) -> dict[str, Any]:
    """The document, OpenAPI 3.1.

    Args:
        model: the model's name.
        codec: the champion's; None before one is loaded leaves the requests open.
        explains: the champion's `serve.explain`.
        prefix: where the model's own paths begin, if it is not the only one.
    """
    requests = (codec.predict_type, codec.feedback_type) if codec else (dict, dict)
    (predict, feedback), components = msgspec.json.schema_components(
        requests, ref_template="#/components/schemas/{name}"
    )
    signature = codec.signature if codec else None
    components |= {
        "Answers": _answers(signature),
        "Error": _object(error=_object({"path": _TEXT}, code=_TEXT, message=_TEXT)),
        "Status": _object(status=_TEXT),
        "Model": _model(model),
        "InferRequest": _infer_request(signature, components),
        "InferAnswer": _infer_answer(model, signature),
        "InferError": _object(error=_TEXT),
    }
    route = _Routes(_ref("Error"))
    v2 = _Routes(_ref("InferError"))
    named = f"/v2/models/{model}"
    paths = {
        "/predict": route.post(
            "Predict one record or many.",
            _json(predict) | (codec.content() if codec else {}),
            codec.answer_content(_ref("Answers")) if codec else _json(_ref("Answers")),
            _PREDICTS,
        ),
        "/feedback": route.post(
            "Give labels of earlier predictions, by id.",
            _json(feedback),
            _json(_object(accepted={"type": "integer", "minimum": 1})),
            _READS,
        ),
        "/model": route.get(
            "What serves: version, digests, schema, rollout, refused versions.", _ref("Model")
        ),
        "/livez": route.probe("Whether the process lives.", _ref("Status")),
        "/readyz": route.probe("Whether a version is loaded; 503 until then.", _ref("Status")),
        "/metrics": route.get("Prometheus metrics.", _TEXT, media="text/plain"),
        "/docs.json": route.get("This document.", {"type": "object"}),
        "/models": route.get("The models that the service has.", _models()),
        "/v2": v2.get("Open Inference Protocol: the server.", _server()),
        "/v2/health/live": v2.probe("Whether the process lives.", _flag("live")),
        "/v2/health/ready": v2.probe("Whether a version is loaded.", _flag("ready")),
    }
    if codec and explains and explains.rate:
        paths["/explain"] = _explain(route, predict, codec, explains)
    of_version = [
        {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}},
    ]
    for path, more in ((named, []), (f"{named}/versions/{{version}}", of_version)):
        missing = ("404",) if more else ()
        paths |= {
            path: v2.get(
                "Open Inference Protocol: the model's tensors.",
                _metadata(model),
                (*missing, "503"),
                more,
            ),
            f"{path}/ready": v2.probe(
                "Whether the model is ready.",
                _object(name={"const": model}, ready={"type": "boolean"}),
                missing,
                more,
            ),
            f"{path}/infer": v2.post(
                "Open Inference Protocol: predict. All tensors have the same number of rows, and "
                "a shape as many values as it says.",
                _json(_ref("InferRequest")) | {open_inference.BINARY: {}},
                _json(_ref("InferAnswer")) | {open_inference.BINARY: {}},
                (*_PREDICTS, *missing),
                [*more, _JSON_SIZE],
            ),
        }
    shared = [path for path in paths if path.startswith(("/v2", "/models"))]
    for path in shared if prefix else ():
        paths[path]["servers"] = [{"url": "/"}]
    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": version_of("driftmill")},
        # A token only where the service was started with some.
        "security": [{}, {"token": []}],
        "servers": [{"url": prefix or "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Routes:
    """Makes the descriptions of routes whose errors have one shape.

    Args:
        error: their schema.
    """

    def __init__(self, error: Schema) -> None:
        self._error = error

    def post(
        self,
        summary: str,
        request: Schema,
        answer: Schema,
        failures: Iterable[str],
        parameters: Sequence[Schema] = (),
    ) -> Schema:
        """A route that takes a body and gives answers, each by content type."""
        predicts = "504" in failures
        headers: Schema = {"X-Request-Id": _REQUEST_ID | {"required": True}}
        if predicts:
            headers["X-Model-Version"] = _MODEL_VERSION
        return {
            "post": {
                "summary": summary,
                "parameters": [*parameters, *(_HEADERS if predicts else _HEADERS[:1])],
                "requestBody": {"required": True, "content": request},
                "responses": {
                    "200": {"description": "Done.", "headers": headers, "content": answer},
                    **{
                        status: self._failure(status, {"X-Request-Id": _REQUEST_ID})
                        for status in failures
                    },
                },
            }
        }

    def get(
        self,
        summary: str,
        answer: Schema,
        failures: Iterable[str] = (),
        parameters: Sequence[Schema] = (),
        media: str = JSON,
    ) -> Schema:
        """A route that tells something."""
        operation: Schema = {
            "summary": summary,
            "responses": {
                "200": {"description": "Done.", "content": {media: {"schema": answer}}},
                **{status: self._failure(status, {}) for status in (*_GUARDED, *failures)},
            },
        }
        if parameters:
            operation["parameters"] = list(parameters)
        return {"get": operation}

    def probe(
        self,
        summary: str,
        answer: Schema,
        failures: Iterable[str] = (),
        parameters: Sequence[Schema] = (),
    ) -> Schema:
        """A route that tells the same with 200 and with 503."""
        path = self.get(summary, answer, failures, parameters)
        path["get"]["responses"]["503"] = {
            "description": "It does not.",
            "headers": {"Retry-After": _RETRY_AFTER},
            "content": _json({"anyOf": [answer, _ref("Status"), self._error]}),
        }
        return path

    def _failure(self, status: str, headers: Schema) -> Schema:
        more: Schema = {"Retry-After": _RETRY_AFTER} if status in _LATER else {}
        if status == "401":
            more = {"WWW-Authenticate": {"schema": _TEXT}}
        return {
            "description": _MEANINGS[status],
            "headers": headers | more,
            "content": _json(self._error),
        }


_RETRY_AFTER = {
    "description": "Seconds until it may be worth trying again.",
    "schema": {"type": "integer", "minimum": 0},
}


def _answers(signature: Signature | None) -> Schema:
    """The answer to `POST /predict`."""
    answer = _object(id={"type": "string", "pattern": ID_PATTERN}, prediction={})
    if signature is not None and signature.labels:
        labels = list(signature.labels)
        answer = _object(
            id=answer["properties"]["id"],
            prediction={"enum": labels},
            score=_NUMBER
            | {
                "description": "The probability of the last label of two, or of the chosen label "
                "of more."
            },
            probabilities=_object(**dict.fromkeys(labels, _NUMBER)),
        )
    elif signature is not None:
        answer["properties"]["prediction"] = _NUMBER
    predictions = {"type": "array", "items": answer, "minItems": 1}
    return _object(model=_TEXT, version=_TEXT, predictions=predictions)


def _explain(route: _Routes, predict: Schema, codec: Codec, explains: Explain) -> Schema:
    """`POST /explain`."""
    few = {"properties": {"records": {"maxItems": explains.max_records}}}
    fields: Schema = {"prediction": _NUMBER, "base": _NUMBER}
    labels = list(codec.signature.labels)
    if labels:
        fields = {"prediction": {"enum": labels}, "label": {"enum": labels}, "score": _NUMBER}
    if codec.signature.image is not None:
        fields["map"] = {"type": "array", "items": {"type": "array", "items": _NUMBER}}
    else:
        names = [column.name for column in codec.signature.columns]
        fields |= {"base": _NUMBER, "contributions": _object(**dict.fromkeys(names, _NUMBER))}
    explanations = {"type": "array", "items": _object(**fields), "minItems": 1}
    return route.post(
        f"Explain predictions, of {explains.max_records} records at most: what each column, or "
        "each part of an image, contributed.",
        _json({"allOf": [predict, few]}) | codec.content(),
        _json(_object(model=_TEXT, version=_TEXT, explanations=explanations)),
        _PREDICTS,
    )


def _model(model: str) -> Schema:
    """The answer to `GET /model`."""
    maybe = {"type": ["string", "null"]}
    refused = {"type": "array", "items": _object(version=_TEXT, reason=_TEXT)}
    rollout = _object(
        revision={"type": "integer"},
        champion=_TEXT,
        challenger=maybe,
        weight=_NUMBER,
        shadow={"type": "boolean"},
        at={"type": "string", "format": "date-time"},
        by=_TEXT,
        reason=_TEXT,
    )
    loaded = {
        "digests": {"type": "object", "additionalProperties": _TEXT},
        "created": {"type": "string", "format": "date-time"},
        "family": _TEXT,
        "metrics": {"type": "object", "additionalProperties": _NUMBER},
        "schema": {"type": "object"},
    }
    return _object(
        loaded,
        model={"const": model},
        version=maybe,
        challenger=maybe,
        rollout={"anyOf": [rollout, {"type": "null"}]},
        refused=refused,
    )


def _models() -> Schema:
    """The answer to `GET /models`."""
    one = _object(model=_TEXT, version={"type": ["string", "null"]}, ready={"type": "boolean"})
    return _object(models={"type": "array", "items": one, "minItems": 1})


def _server() -> Schema:
    return _object(name=_TEXT, version=_TEXT, extensions={"type": "array", "items": _TEXT})


def _metadata(model: str) -> Schema:
    tensors = {
        "type": "array",
        "items": _object(
            name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": {"type": "integer"}}
        ),
    }
    return _object(
        name={"const": model},
        versions={"type": "array", "items": _TEXT},
        platform=_TEXT,
        inputs=tensors,
        outputs=tensors,
    )


def _infer_request(signature: Signature | None, components: Schema) -> Schema:
    """A request of the Open Inference Protocol; its values are those of the fields of a record."""
    if signature is None:
        return {"type": "object"}
    fields = components["Record"]["properties"]
    tensors = [
        _tensor(name, datatypes, fields[name])
        for name, datatypes in open_inference.inputs(signature).items()
    ]
    wanted = _object(name={"enum": list(open_inference.outputs(signature))})
    more = {
        "id": {"type": ["string", "null"]},
        "outputs": {"anyOf": [{"type": "array", "items": wanted}, {"type": "null"}]},
        "parameters": {"type": ["object", "null"]},
    }
    return _object(more, inputs={"type": "array", "minItems": 1, "items": {"oneOf": tensors}})


def _tensor(name: str, datatypes: Sequence[str], value: Schema) -> Schema:
    rows = {"type": "integer", "minimum": 1}
    one = {"type": "array", "items": value, "minItems": 1, "maxItems": 1}
    return _object(
        name={"const": name},
        datatype={"enum": list(datatypes)},
        shape={
            "type": "array",
            "prefixItems": [rows, {"const": 1}],
            "minItems": 1,
            "maxItems": 2,
        },
        data={"type": "array", "items": {"anyOf": [value, one]}, "minItems": 1},
    )


def _infer_answer(model: str, signature: Signature | None) -> Schema:
    names = {"enum": list(open_inference.outputs(signature))} if signature else _TEXT
    output = _object(
        name=names,
        datatype={"enum": ["BYTES", "FP64"]},
        shape={"type": "array", "items": {"type": "integer", "minimum": 1}},
        data={"type": "array", "items": {"type": ["string", "number"]}},
    )
    return _object(
        model_name={"const": model},
        model_version=_TEXT,
        id=_TEXT,
        outputs={"type": "array", "items": output},
    )


def _flag(name: str) -> Schema:
    return _object(**{name: {"type": "boolean"}})


def _object(optional: Schema | None = None, /, **properties: Schema) -> Schema:
    """An object that has all properties, and may have the optional ones."""
    return {
        "type": "object",
        "properties": properties | (optional or {}),
        "required": list(properties),
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {JSON: {"schema": schema}}
