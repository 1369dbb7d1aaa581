"""The Open Inference Protocol (v2) over REST, as KServe, Triton and MLServer speak it.

https://github.com/kserve/open-inference-protocol: tensors in, tensors out. A model of tables takes
one tensor a column, of shape [rows] or [rows, 1]; a column that may be missing may be left out, and
a missing value is `null` or NaN. A model of images takes one tensor `image` of BYTES, each an image
file as base64. What comes out are `prediction`, of a classification also `score` and
`probabilities` [rows, labels], and `prediction_id`, by which labels can be given later.

Requests become those of `/predict`, so that there is one set of rules for what is valid; nothing
here is on that one's way.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import msgspec

from driftmill.contract import did_you_mean
from driftmill.features import Signature
from driftmill.serving.codec import Answers, RequestError

#: Data types of columns, by the contract's names; what each may be given as.
DATATYPES = {"float": "FP64", "int": "INT64", "bool": "BOOL", "category": "BYTES"}
_NUMBERS = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64"),
)
_IMAGE = "image"


class Tensor(msgspec.Struct, kw_only=True):
    """An input or an output."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class _Wanted(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class Request(msgspec.Struct):
    """The body of `POST /v2/models/{model}/infer`."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[_Wanted] | None = None


_decoder = msgspec.json.Decoder(Request)
_answers = msgspec.json.Decoder(Answers)


def server_metadata() -> dict[str, Any]:
    """The answer to `GET /v2`."""
    return {"name": "driftmill", "version": version("driftmill"), "extensions": []}


def model_metadata(model: str, versions: list[str], signature: Signature) -> dict[str, Any]:
    """The answer to `GET /v2/models/{model}`.

    Args:
        model: its name.
        versions: those that serve, the champion first.
        signature: the champion's.
    """
    if signature.image is not None:
        inputs = [{"name": _IMAGE, "datatype": "BYTES", "shape": [-1]}]
    else:
        inputs = [
            {"name": c.name, "datatype": DATATYPES[c.type], "shape": [-1]}
            for c in signature.columns
        ]
    answer = "BYTES" if signature.labels else "FP64"
    outputs = [{"name": "prediction", "datatype": answer, "shape": [-1]}]
    if signature.labels:
        outputs += [
            {"name": "score", "datatype": "FP64", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP64", "shape": [-1, len(signature.labels)]},
        ]
    outputs.append({"name": "prediction_id", "datatype": "BYTES", "shape": [-1]})
    return {
        "name": model,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": inputs,
        "outputs": outputs,
    }


def to_predict(body: bytes, signature: Signature) -> tuple[bytes, Request]:
    """The body of `POST /predict` that asks the same.

    Args:
        body: of the request.
        signature: what the model takes.

    Returns:
        The body, and the request, for `from_predict`.

    Raises:
        RequestError: 400 where it is not JSON, 422 where tensors and model do not fit.
    """
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise RequestError(422, "invalid_field", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"The body is not valid JSON: {error}") from None
    if not request.inputs:
        raise RequestError(422, "invalid_field", "One input is needed at least", "$.inputs")
    names = {c.name: c for c in signature.columns} if signature.image is None else {_IMAGE: None}
    columns: dict[str, list[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        path = f"$.inputs[{index}]"
        if tensor.name not in names:
            near = did_you_mean(tensor.name, list(names))
            raise RequestError(
                422,
                "invalid_field",
                f"The model has no input {tensor.name!r}{near}",
                f"{path}.name",
            )
        if tensor.name in columns:
            raise RequestError(
                422, "invalid_field", f"The input {tensor.name!r} is given twice", f"{path}.name"
            )
        column = names[tensor.name]
        is_text = column is None or not column.is_numeric
        if (tensor.datatype == "BYTES") != is_text or tensor.datatype not in ("BYTES", *_NUMBERS):
            needed = "BYTES" if is_text else DATATYPES[column.type] if column else "BYTES"
            raise RequestError(
                422,
                "invalid_field",
                f"{tensor.name} takes {needed}, got {tensor.datatype!r}",
                f"{path}.datatype",
            )
        is_bool = column is not None and column.type == "bool"
        columns[tensor.name] = _values(tensor, path, truth=is_bool)
    rows = {len(values) for values in columns.values()}
    if len(rows) > 1:
        raise RequestError(
            422, "invalid_field", "The inputs differ in their number of rows", "$.inputs"
        )
    wanted = {"prediction", "prediction_id"} | (
        {"score", "probabilities"} if signature.labels else set()
    )
    for index, output in enumerate(request.outputs or ()):
        if output.name not in wanted:
            raise RequestError(
                422,
                "invalid_field",
                f"The model has no output {output.name!r}{did_you_mean(output.name, wanted)}",
                f"$.outputs[{index}].name",
            )
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return msgspec.json.encode({"records": records}), request


def _values(tensor: Tensor, path: str, *, truth: bool) -> list[Any]:
    """A tensor's values, one a row. NaN stands for a missing value, and JSON has none of it."""
    size = math.prod(tensor.shape) if tensor.shape else 0
    if len(tensor.shape) not in (1, 2) or size != tensor.shape[0] or min(tensor.shape) < 0:
        raise RequestError(
            422,
            "invalid_shape",
            f"{tensor.name} takes the shape [rows] or [rows, 1]",
            f"{path}.shape",
        )
    if tensor.data is None:
        raise RequestError(
            422,
            "invalid_field",
            "Send `data` as JSON; binary tensors are not taken",
            f"{path}.data",
        )
    values = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in tensor.data]
    if len(values) != size:
        raise RequestError(
            422,
            "invalid_shape",
            f"The shape says {size} values, and there are {len(values)}",
            f"{path}.data",
        )
    if truth:  # as 0 and 1, which some clients have in their place
        return [bool(v) if v in (0, 1) else v for v in values]
    return values


def from_predict(body: bytes, request: Request, request_id: str, signature: Signature) -> bytes:
    """The answer to a request of this protocol.

    Args:
        body: the answer to `POST /predict`.
        request: as `to_predict` gave it.
        request_id: the answer's `id`, where the request has none.
        signature: what the model gives.
    """
    answers = _answers.decode(body)
    predictions = answers.predictions
    rows = len(predictions)
    kind = "BYTES" if signature.labels else "FP64"
    outputs = [_output("prediction", kind, [rows], [p.prediction for p in predictions])]
    if signature.labels:
        spread = [(p.probabilities or {})[label] for p in predictions for label in signature.labels]
        shape = [rows, len(signature.labels)]
        outputs.append(_output("score", "FP64", [rows], [p.score for p in predictions]))
        outputs.append(_output("probabilities", "FP64", shape, spread))
    outputs.append(_output("prediction_id", "BYTES", [rows], [p.id for p in predictions]))
    if request.outputs:
        by_name = {o["name"]: o for o in outputs}
        outputs = [by_name[output.name] for output in request.outputs]
    return msgspec.json.encode(
        {
            "model_name": answers.model,
            "model_version": answers.version,
            "id": request.id or request_id,
            "outputs": outputs,
        }
    )


def _output(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}
