"""The Open Inference Protocol (v2) over REST, as KServe, Triton and MLServer speak it.

https://github.com/kserve/open-inference-protocol: tensors in, tensors out. A model of tables takes
one tensor a column, of shape [rows] or [rows, 1]; a column that may be missing may be left out, and
a missing value is `null` or NaN. A model of images takes one tensor `image` of BYTES, each an image
file, as base64 in JSON. What comes out are `prediction`, of a classification also `score` and
`probabilities` [rows, labels], and `prediction_id`, by which labels can be given later.

Tensors may also be binary, as Triton's extension of the protocol has it
(https://github.com/triton-inference-server/server, `extension_binary_data.md`): the header
`Inference-Header-Content-Length` says where the JSON ends and the values begin, little-endian and
row by row, texts each after its length in four bytes.

Requests become those of `/predict`, so that there is one set of rules for what is valid; nothing
here is on that one's way.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np

from driftmill.contract import did_you_mean
from driftmill.features import Signature
from driftmill.serving.codec import Answers, RequestError

#: Data types of columns, by the contract's names; what each may be given as.
DATATYPES = {"float": "FP64", "int": "INT64", "bool": "BOOL", "category": "BYTES"}
#: Data types that any column of numbers may be given as, and what they are in binary.
_NUMBERS = {
    **{"BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"},
    **{"INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8"},
    **{"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"},
}
_IMAGE = "image"
#: Content type of bodies with binary tensors, and the header that says how long their JSON is.
BINARY, JSON_SIZE = "application/octet-stream", b"inference-header-content-length"


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
    extensions = ["binary_tensor_data"]
    return {"name": "driftmill", "version": version("driftmill"), "extensions": extensions}


def outputs(signature: Signature) -> dict[str, tuple[str, list[int]]]:
    """A model's outputs: data type and shape of each, -1 for the rows."""
    if not signature.labels:
        return {"prediction": ("FP64", [-1]), "prediction_id": ("BYTES", [-1])}
    return {
        "prediction": ("BYTES", [-1]),
        "score": ("FP64", [-1]),
        "probabilities": ("FP64", [-1, len(signature.labels)]),
        "prediction_id": ("BYTES", [-1]),
    }


def inputs(signature: Signature) -> dict[str, tuple[str, ...]]:
    """A model's inputs: data types that each may be given as, the best one first."""
    if signature.image is not None:
        return {_IMAGE: ("BYTES",)}
    return {
        column.name: tuple(dict.fromkeys((DATATYPES[column.type], *_NUMBERS)))
        if column.is_numeric
        else ("BYTES",)
        for column in signature.columns
    }


def model_metadata(model: str, versions: list[str], signature: Signature) -> dict[str, Any]:
    """The answer to `GET /v2/models/{model}`.

    Args:
        model: its name.
        versions: those that serve, the champion first.
        signature: the champion's.
    """
    return {
        "name": model,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": name, "datatype": datatypes[0], "shape": [-1]}
            for name, datatypes in inputs(signature).items()
        ],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, (datatype, shape) in outputs(signature).items()
        ],
    }


def to_predict(body: bytes, json_size: bytes | None, signature: Signature) -> tuple[bytes, Request]:
    """The body of `POST /predict` that asks the same.

    Args:
        body: of the request.
        json_size: its header `JSON_SIZE`; None: all of it is JSON.
        signature: what the model takes.

    Returns:
        The body, and the request, for `from_predict`.

    Raises:
        RequestError: 400 where it is not JSON, 422 where tensors and model do not fit.
    """
    size = len(body)
    if json_size is not None:
        size = int(json_size[:20]) if json_size.isdigit() else -1
        if not 0 <= size <= len(body):
            raise RequestError(
                400, "invalid_header", "Inference-Header-Content-Length is no length in the body"
            )
    try:
        request = _decoder.decode(memoryview(body)[:size])
    except msgspec.ValidationError as error:
        raise RequestError(422, "invalid_field", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"The body is not valid JSON: {error}") from None
    if not request.inputs:
        raise RequestError(422, "invalid_field", "One input is needed at least", "$.inputs")
    known = inputs(signature)
    truths = {column.name for column in signature.columns if column.type == "bool"}
    columns: dict[str, list[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        path = f"$.inputs[{index}]"
        if tensor.name not in known:
            near = did_you_mean(tensor.name, list(known))
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
        if tensor.datatype not in known[tensor.name]:
            raise RequestError(
                422,
                "invalid_field",
                f"{tensor.name} takes {known[tensor.name][0]}, got {tensor.datatype!r}",
                f"{path}.datatype",
            )
        length = (tensor.parameters or {}).get("binary_data_size")
        if length is not None:
            tensor.data = _unpack(tensor, _part(body, size, length, path), path)
            if tensor.datatype == "BYTES" and signature.image is None:
                tensor.data = _texts(tensor.data, path)
            size += length
        columns[tensor.name] = _values(tensor, path, truth=tensor.name in truths)
    if size != len(body):
        raise RequestError(422, "invalid_binary", "More bytes follow than the inputs have")
    rows = {len(values) for values in columns.values()}
    if len(rows) > 1:
        raise RequestError(
            422, "invalid_field", "The inputs differ in their number of rows", "$.inputs"
        )
    wanted = list(outputs(signature))
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


def _part(body: bytes, start: int, length: Any, path: str) -> bytes:
    """The bytes of one tensor."""
    if not isinstance(length, int) or not 0 <= length <= len(body) - start:
        raise RequestError(
            422,
            "invalid_binary",
            "Not so many bytes follow",
            f"{path}.parameters.binary_data_size",
        )
    return body[start : start + length]


def _unpack(tensor: Tensor, content: bytes, path: str) -> list[Any]:
    """The values of a binary tensor; BYTES stay bytes."""
    if tensor.datatype != "BYTES":
        kind = np.dtype(_NUMBERS[tensor.datatype])
        if len(content) % kind.itemsize:
            raise RequestError(
                422, "invalid_binary", f"Of {tensor.datatype} there is half a value", path
            )
        numbers: list[Any] = np.frombuffer(content, kind).tolist()
        return numbers
    values = []
    at = 0
    while at < len(content):
        start = at + 4
        at = start + int.from_bytes(content[at:start], "little")
        if at > len(content) or start > len(content):
            raise RequestError(422, "invalid_binary", "A text is longer than the tensor", path)
        values.append(content[start:at])
    return values


def _texts(values: list[Any], path: str) -> list[Any]:
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise RequestError(422, "invalid_binary", "A text is not UTF-8", path) from None


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
        raise RequestError(422, "invalid_field", "The field 'data' is needed", f"{path}.data")
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


def from_predict(
    body: bytes, request: Request, request_id: str, signature: Signature
) -> tuple[bytes, int | None]:
    """The answer to a request of this protocol.

    Args:
        body: the answer to `POST /predict`.
        request: as `to_predict` gave it.
        request_id: the answer's `id`, where the request has none.
        signature: what the model gives.

    Returns:
        The body, and how much of it is JSON; None: all.
    """
    answers = _answers.decode(body)
    rows = len(answers.predictions)
    named: dict[str, list[Any]] = {
        "prediction": [p.prediction for p in answers.predictions],
        "score": [p.score for p in answers.predictions],
        "probabilities": [
            (p.probabilities or {})[label]
            for p in answers.predictions
            for label in signature.labels
        ],
        "prediction_id": [p.id for p in answers.predictions],
    }
    known = outputs(signature)
    binary = bool((request.parameters or {}).get("binary_data_output"))
    tensors: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for wanted in request.outputs or [_Wanted(name) for name in known]:
        datatype, shape = known[wanted.name]
        tensor: dict[str, Any] = {
            "name": wanted.name,
            "datatype": datatype,
            "shape": [rows, *shape[1:]],
        }
        if (wanted.parameters or {}).get("binary_data", binary):
            parts.append(_pack(named[wanted.name], datatype))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = named[wanted.name]
        tensors.append(tensor)
    head = msgspec.json.encode(
        {
            "model_name": answers.model,
            "model_version": answers.version,
            "id": request.id or request_id,
            "outputs": tensors,
        }
    )
    return b"".join([head, *parts]), len(head) if parts else None


def _pack(values: list[Any], datatype: str) -> bytes:
    """The values of a tensor in binary."""
    if datatype != "BYTES":
        return np.array(values, _NUMBERS[datatype]).tobytes()
    texts = [value.encode() for value in values]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
