"""The Open Inference Protocol: what `/predict` answers, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
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
            "as JSON; bin",
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
