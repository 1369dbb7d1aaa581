"""What a request may be at most, on every route that takes a body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from driftmill import contract
from driftmill.contract import Contract
from driftmill.store import Store
from tests.serving.test_open_inference import asked
from tests.serving.test_server import RECORD, MakeBundle, go, predict, promote, quick, running

__all__ = ["quick"]

#: Of the contract `quick`.
BYTES, ROWS = 20_000, 100
INFER = "/v2/models/tiny/infer"
ROUTES = ["/predict", "/feedback", "/explain", INFER]
KIND = {"content-type": "application/json"}


@pytest.fixture
def often(quick: Contract) -> Contract:
    """The quick contract, and explanations as often as anything else."""
    values = json.loads(quick.to_json())
    values["serve"]["explain"]["rate"] = 1000
    return contract.parse(json.dumps(values))


async def post(
    client: httpx.AsyncClient, path: str, body: str | bytes | AsyncIterator[bytes]
) -> httpx.Response:
    """The answer, once there may be one: explanations have a rate."""
    await asyncio.sleep(0.002)
    return await client.post(path, content=body, headers=KIND)


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_has_so_many_bytes_whether_or_not_it_says_how_many(
    store: Store, make_bundle: MakeBundle, often: Contract, tmp_path: Path, path: str
) -> None:
    promote(store, make_bundle(of=often))

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            yield b" " * 1000
        yield b" " * (size % 1000)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for size, status in ((BYTES, 400), (BYTES + 1, 413), (10 * BYTES, 413)):
                for body in (b" " * size, chunks(size)):
                    response = await post(client, path, body)
                    assert response.status_code == status, size
                    assert response.json()["error"]

    go(check())


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_without_length_is_read_just_beyond_the_limit(
    store: Store, make_bundle: MakeBundle, often: Contract, tmp_path: Path, path: str
) -> None:
    promote(store, make_bundle(of=often))

    async def check() -> None:
        async with running(store, tmp_path) as (server, _):
            received, sent = 0, []

            async def receive() -> dict[str, Any]:
                nonlocal received
                received += 1
                return {"type": "http.request", "body": b" " * 1000, "more_body": True}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": path, "headers": []}
            await server(scope, receive, send)
            assert sent[0]["status"] == 413
            assert (b"connection", b"close") in sent[0]["headers"]
            assert received == BYTES // 1000 + 1

    go(check())


def test_a_request_has_so_many_rows(
    store: Store, make_bundle: MakeBundle, often: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=often))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            label = {"id": "0" * 26, "label": "no"}
            for rows, status in ((ROWS, 200), (ROWS + 1, 422)):
                assert (await predict(client, *[RECORD] * rows)).status_code == status
                for path, body in (
                    ("/feedback", {"labels": [label] * rows}),
                    (INFER, asked(*[1.0] * rows)),
                ):
                    assert (await client.post(path, json=body)).status_code == status, path

    go(check())


def nested(depth: int) -> list[str]:
    """Bodies that are nested so deep, each in another place."""
    lists = "[" * depth + "]" * depth
    objects = '{"a":' * depth + "1" + "}" * depth
    bodies = [lists, objects, "[" * depth]
    for deep in (lists, objects):
        tensor = {"name": "amount", "datatype": "FP64", "shape": [1], "data": [0]}
        bodies += [
            json.dumps(outer).replace("0", deep, 1)
            for outer in (
                {"records": [{**RECORD, "amount": 0, "age": 1}]},
                {"records": 0},
                {"labels": [{"id": "a", "label": 0}]},
                {"unknown": 0},
                {"inputs": [tensor]},
                {"inputs": [{**tensor, "parameters": 0, "shape": [1], "data": [1]}]},
                {"parameters": 0, "inputs": [{**tensor, "data": [1]}]},
            )
        ]
    return bodies


@pytest.mark.parametrize("path", ROUTES)
def test_no_depth_is_more_than_a_client_error(
    store: Store, make_bundle: MakeBundle, often: Contract, tmp_path: Path, path: str
) -> None:
    promote(store, make_bundle(of=often))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for body in (body for depth in (100, 900, 1500) for body in nested(depth)):
                assert len(body) < BYTES
                response = await post(client, path, body)
                assert response.status_code in (400, 422), body[:80]

    go(check())
