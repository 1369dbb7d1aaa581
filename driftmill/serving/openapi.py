"""The OpenAPI document of a service, with the schema of the model that serves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec

from driftmill.serving.codec import Answers, Codec


class Accepted(msgspec.Struct):
    """The answer to `POST /feedback`."""

    accepted: int


class _Problem(msgspec.Struct, omit_defaults=True):
    code: str
    message: str
    path: str | None = None


class Error(msgspec.Struct):
    """The answer to a request that failed."""

    error: _Problem


_MEANINGS = {
    "400": "The body is not valid JSON.",
    "413": "The body, or an image in it, is too large.",
    "415": "The content type is none that is taken, or the body is no image of a listed format.",
    "422": "A field is wrong, or an image breaks a rule; `path` says which.",
    "503": "No version is loaded, too many requests wait, or the log cannot be written.",
}


def openapi(model: str, codec: Codec | None) -> dict[str, Any]:
    """The document, OpenAPI 3.1.

    Args:
        model: the model's name.
        codec: the champion's; None before one is loaded leaves the requests open.
    """
    requests = (codec.predict_type, codec.feedback_type) if codec else (dict, dict)
    (predict, feedback, answers, accepted, error), components = msgspec.json.schema_components(
        (*requests, Answers, Accepted, Error), ref_template="#/components/schemas/{name}"
    )
    request_id = {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Names the request, in answers and in the log. While a canary runs, the "
        "same id is answered by the same version.",
        "schema": {"type": "string", "maxLength": 128},
    }

    def post(
        summary: str, request: Any, answer: Any, more: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        failures = {
            status: {"description": text, "content": _json(error)}
            for status, text in _MEANINGS.items()
        }
        return {
            "post": {
                "summary": summary,
                "parameters": [request_id],
                "requestBody": {"required": True, "content": _json(request) | (more or {})},
                "responses": {
                    "200": {"description": "Done.", "content": _json(answer)},
                    **failures,
                },
            }
        }

    def get(summary: str, media: str = "application/json") -> dict[str, Any]:
        content: dict[str, Any] = {media: {"schema": {}}}
        return {
            "get": {
                "summary": summary,
                "responses": {"200": {"description": "Done.", "content": content}},
            }
        }

    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": version("driftmill")},
        "paths": {
            "/predict": post(
                "Predict one record or many.", predict, answers, codec.content() if codec else None
            ),
            "/feedback": post("Give labels of earlier predictions, by id.", feedback, accepted),
            "/model": get("What serves: version, digests, schema, rollout, refused versions."),
            "/livez": get("Whether the process lives."),
            "/readyz": get("Whether a version is loaded; 503 until then."),
            "/metrics": get("Prometheus metrics.", "text/plain"),
        },
        "components": {"schemas": components},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
