"""The Open Inference Protocol: what `/predict` answers, as tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from driftmill.contract import Contract
from driftmill.store import Store
from tests.serving.test_server import (
    RECORD,
    MakeBundle,
    go,
    metric,
    predict,
    promote,
    quick,
    running,
    until,
)

__all__ = ["quick"]


def tensor(name: str, datatype: str, *data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": list(data)}


def asked(*amounts: float) -> dict[str, Any]:
    """A request for records that differ in their amounts."""
    rows = len(amounts)
    return {
        "inputs": [
            tensor("amount", "FP64", *amounts),
            tensor("age", "INT64", *([41] * rows), shape=[rows, 1]),
            tensor("channel", "BYTES", *(["web"] * rows)),
        ]
    }


async def infer(client: httpx.AsyncClient, body: Any, path: str = "tiny") -> httpx.Response:
    return await client.post(f"/v2/models/{path}/infer", json=body)


def test_tensors_are_answered_as_records_are(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=quick)
    promote(store, manifest)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            plain = (await predict(client, RECORD, RECORD | {"amount": 100.0})).json()
            response = await infer(client, asked(700.0, 100.0) | {"id": "mine"})
            assert response.headers["x-model-version"] == manifest.version
            answer = response.json()
            assert answer["id"] == "mine"
            assert (answer["model_name"], answer["model_version"]) == ("tiny", manifest.version)
            by_name = {o["name"]: o for o in answer["outputs"]}
            expected = plain["predictions"]
            assert by_name["prediction"]["data"] == [p["prediction"] for p in expected]
            assert by_name["score"]["data"] == [p["score"] for p in expected]
            assert by_name["probabilities"]["shape"] == [2, 2]
            flat = [p["probabilities"][label] for p in expected for label in ("no", "yes")]
            assert by_name["probabilities"]["data"] == flat
            # The ids are those of the log: a label can be given to them.
            label = {"labels": [{"id": by_name["prediction_id"]["data"][0], "label": "yes"}]}
            assert (await client.post("/feedback", json=label)).json() == {"accepted": 1}
            counted = {"version": manifest.version, "code": "200"}
            assert metric(server, "model_requests_total", **counted) == 2

    go(check())


def test_outputs_are_chosen(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            body = asked(700.0) | {"outputs": [{"name": "score"}]}
            assert [o["name"] for o in (await infer(client, body)).json()["outputs"]] == ["score"]

    go(check())


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"inputs": []}, 422, "One input is needed"),
        ({"inputs": [tensor("amuont", "FP64", 1.0)]}, 422, "no input 'amuont'; did you mean 'amou"),
        ({"inputs": [tensor("amount", "FP64", 1.0)] * 2}, 422, "'amount' is given twice"),
        ({"inputs": [tensor("amount", "BYTES", "1")]}, 422, "amount takes FP64, got 'BYTES'"),
        ({"inputs": [tensor("channel", "FP32", 1.0)]}, 422, "channel takes BYTES, got 'FP32'"),
        ({"inputs": [tensor("amount", "FP99", 1.0)]}, 422, "amount takes FP64, got 'FP99'"),
        ({"inputs": [tensor("amount", "FP64", 1.0, shape=[2])]}, 422, "says 2 values, and there"),
        ({"inputs": [tensor("amount", "FP64", 1.0, 2.0, shape=[1, 2])]}, 422, "the shape [rows]"),
        ({"inputs": [tensor("amount", "FP64", 1.0)]}, 422, "The field 'channel' is needed"),
        (
            {"inputs": [tensor("amount", "FP64") | {"data": None, "shape": [1]}]},
            422,
            "'data' is needed",
        ),
        ({"outputs": [{"name": "scroe"}]}, 422, "no output 'scroe'; did you mean 'score'"),
        ({"inputs": 3}, 422, "Expected `array`, got `int`"),
    ],
)
def test_what_does_not_fit_is_named(
    store: Store,
    make_bundle: MakeBundle,
    quick: Contract,
    tmp_path: Path,
    change: dict[str, Any],
    status: int,
    message: str,
) -> None:
    """In the protocol's form of an error: one sentence."""
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await infer(client, asked(700.0) | change)
            assert response.status_code == status
            assert message in response.json()["error"]

    go(check())


def test_a_column_that_may_be_missing_may_be_left_out(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            body = asked(700.0)
            del body["inputs"][1]
            assert (await infer(client, body)).status_code == 200
            body["inputs"].append(tensor("age", "FP64", None))
            assert (await infer(client, body)).status_code == 200

    go(check())


def test_a_version_can_be_named(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    """The champion and the challenger, whatever the weight; no other."""
    champion, challenger = make_bundle(of=quick), make_bundle(slope=0.5, of=quick)
    promote(store, champion, challenger=challenger.version, weight=0.0)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for manifest in (champion, challenger):
                path = f"tiny/versions/{manifest.version}"
                answer = (await infer(client, asked(510.0), path)).json()
                assert answer["model_version"] == manifest.version
                assert (await client.get(f"/v2/models/{path}/ready")).status_code == 200
            missing = await infer(client, asked(510.0), "tiny/versions/000000000000")
            assert missing.status_code == 404
            assert "does not serve" in missing.json()["error"]

    go(check())


def test_metadata_and_health(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=quick)

    async def check() -> None:
        async with running(store, tmp_path, loaded=False) as (server, client):
            assert (await client.get("/v2/health/live")).status_code == 200
            assert (await client.get("/v2/health/ready")).status_code == 503
            assert (await client.get("/v2/models/tiny")).status_code == 503
            promote(store, manifest)
            await until(lambda: server.versions.serving is not None)
            assert (await client.get("/v2/")).json()["name"] == "driftmill"
            assert (await client.get("/v2/health/ready")).status_code == 200
            about = (await client.get("/v2/models/tiny")).json()
            assert about["versions"] == [manifest.version]
            assert [(i["name"], i["datatype"]) for i in about["inputs"]] == [
                ("amount", "FP64"),
                ("age", "INT64"),
                ("channel", "BYTES"),
            ]
            for path in ("/v2/models/other", "/v2/models", "/v2/nothing", "/v2/models/tiny/x"):
                assert (await client.get(path)).status_code == 404, path
            assert (await client.get("/v2/models/tiny/infer")).status_code == 405
            assert (await client.post("/v2/models/tiny")).status_code == 405

    go(check())


def binary(tensors: list[dict[str, Any]], parts: list[bytes], **more: Any) -> dict[str, Any]:
    """Body and headers of a request whose tensors lie behind the JSON."""
    for one, part in zip(tensors, parts, strict=True):
        del one["data"]
        one["parameters"] = {"binary_data_size": len(part)}
    head = json.dumps({"inputs": tensors} | more).encode()
    return {
        "content": b"".join([head, *parts]),
        "headers": {
            "inference-header-content-length": str(len(head)),
            "content-type": "application/octet-stream",
        },
    }


def text(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def three(kind: str = "FP64") -> list[dict[str, Any]]:
    return [
        tensor("amount", kind, 700.0, 100.0),
        tensor("age", "FP32", 41, None),
        tensor("channel", "BYTES", "web", "app"),
    ]


NAN = float("nan")


@pytest.mark.parametrize("kind", ["FP64", "FP32", "FP16", "INT64", "INT16", "UINT32"])
def test_binary_tensors(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path, kind: str
) -> None:
    promote(store, make_bundle(of=quick))
    size = {"FP64": "<f8", "FP32": "<f4", "FP16": "<f2", "INT64": "<i8"} | {
        "INT16": "<i2",
        "UINT32": "<u4",
    }
    parts = [
        np.array([700, 100], size[kind]).tobytes(),
        np.array([41, NAN], "<f4").tobytes(),
        text(b"web", b"app"),
    ]

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            records = [RECORD, RECORD | {"amount": 100.0, "age": None, "channel": "app"}]
            plain = (await predict(client, *records)).json()["predictions"]
            url = "/v2/models/tiny/infer"
            answer = (await client.post(url, **binary(three(kind), parts))).json()
            assert answer["outputs"][1]["data"] == [p["score"] for p in plain]
            # All outputs in binary but one.
            more = {
                "parameters": {"binary_data_output": True},
                "outputs": [
                    {"name": "prediction"},
                    {"name": "score", "parameters": {"binary_data": False}},
                    {"name": "probabilities"},
                ],
            }
            response = await client.post(url, **binary(three(kind), parts, **more))
            assert response.headers["content-type"] == "application/octet-stream"
            length = int(response.headers["inference-header-content-length"])
            labels, score, spread = json.loads(response.content[:length])["outputs"]
            rest = response.content[length:]
            assert score["data"] == [p["score"] for p in plain]
            cut = labels["parameters"]["binary_data_size"]
            assert rest[:cut] == text(*(p["prediction"].encode() for p in plain))
            assert len(rest) == cut + spread["parameters"]["binary_data_size"]
            values = np.frombuffer(rest[cut:], "<f8").reshape(spread["shape"]).tolist()
            assert values == [list(p["probabilities"].values()) for p in plain]

    go(check())


@pytest.mark.parametrize(
    ("place", "part", "message"),
    [
        (0, b"\0" * 15, "half a value"),
        (0, b"\0" * 8, "says 2 values, and there are 1"),
        (2, text(b"web") + b"\4\0\0\0app", "longer than the tensor"),
        (2, text(b"web") + b"\3\0", "longer than the tensor"),
        (2, text(b"web", b"\xff"), "not UTF-8"),
        (2, b"", "says 2 values, and there are 0"),
    ],
)
def test_binary_tensors_that_do_not_fit_are_named(
    store: Store,
    make_bundle: MakeBundle,
    quick: Contract,
    tmp_path: Path,
    place: int,
    part: bytes,
    message: str,
) -> None:
    promote(store, make_bundle(of=quick))
    numbers = np.array([700.0, 100.0])
    parts = [numbers.tobytes(), numbers.astype("<f4").tobytes(), text(b"web", b"app")]
    parts[place] = part

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            url = "/v2/models/tiny/infer"
            response = await client.post(url, **binary(three(), parts))
            assert response.status_code == 422
            assert message in response.json()["error"]

    go(check())


@pytest.mark.parametrize("length", ["-1", "x", "99999", "9" * 30, ""])
def test_a_wrong_length_of_the_json_is_refused(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path, length: str
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            sent = binary(three(), [b"", b"", b""])
            sent["headers"]["inference-header-content-length"] = length
            response = await client.post("/v2/models/tiny/infer", **sent)
            assert response.status_code == 400
            # More or fewer bytes than the tensors say.
            sent = binary(three(), [b"\0" * 16, b"\0" * 8, text(b"web", b"app")])
            for content in (sent["content"] + b"x", sent["content"][:-1]):
                response = await client.post(
                    "/v2/models/tiny/infer", content=content, headers=sent["headers"]
                )
                assert response.status_code == 422
                assert "bytes follow" in response.json()["error"]

    go(check())
