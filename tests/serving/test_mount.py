"""Several models in one process: each at its own paths, and together where one answer must do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from driftmill import contract, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.serving import mount
from driftmill.serving.access import Access
from driftmill.serving.log import labelled, read, segments
from driftmill.serving.mount import Mount
from driftmill.serving.server import Receive, Scope, Send, Server
from driftmill.store import Store
from tests.serving.test_server import not_found, until

RECORD = {"amount": 700.0, "age": 41, "channel": "web"}
MakeBundle = Callable[..., Manifest]


@pytest.fixture
def two(store: Store, tiny: Contract, make_bundle: MakeBundle) -> dict[str, str]:
    """Models `a`, which serves, and `b`, which could: the versions by name."""
    versions = {}
    for name, slope in (("a", 0.02), ("b", -0.02)):
        values = json.loads(tiny.to_json()) | {"model": name}
        values["serve"] |= {"poll": 0.02}
        versions[name] = make_bundle(slope, of=contract.parse(json.dumps(values))).version
    rollout.change(store, "a", champion=versions["a"], by="test")
    return versions


@asynccontextmanager
async def mounted(
    store: Store, folder: Path, *models: str, **more: Any
) -> AsyncIterator[tuple[list[Server], httpx.AsyncClient]]:
    """The servers of some models, and a client of what they are mounted before."""
    servers = [Server(store, model, folder / "spool") for model in models]
    app = Mount(lifespan, lambda: servers, **more)
    began, end = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not began.is_set():
            return {"type": "lifespan.startup"}
        await end.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        began.set()

    life = asyncio.create_task(app({"type": "lifespan"}, receive, send))
    await began.wait()
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield servers, client
    finally:
        end.set()
        await life


async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that has nothing but a beginning and an end."""
    if scope["type"] != "lifespan":
        await not_found(scope, receive, send)
        return
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def serves(server: Server) -> Callable[[], bool]:
    return lambda: server.versions.serving is not None


async def ask(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await client.post(path, json={"records": [RECORD]})
    answer: dict[str, Any] = response.json() | {"status": response.status_code}
    return answer


def test_each_model_has_its_paths_and_one_that_is_not_ready_takes_no_other_down(
    store: Store, two: dict[str, str], tmp_path: Path
) -> None:
    async def check() -> None:
        async with mounted(store, tmp_path, "a", "b") as ((a, b), client):
            await until(serves(a))

            async def status(path: str) -> int:
                return (await client.get(path)).status_code

            # Only `a` serves.
            assert (await ask(client, "/predict"))["version"] == two["a"]
            assert (await ask(client, "/models/a/predict"))["version"] == two["a"]
            assert (await ask(client, "/models/b/predict"))["error"]["code"] == "not_ready"
            assert (await status("/readyz"), await status("/v2/health/ready")) == (503, 503)
            assert (await status("/models/a/readyz"), await status("/models/b/readyz")) == (
                200,
                503,
            )
            assert (await status("/v2/models/a/ready"), await status("/v2/models/b")) == (200, 503)
            models = (await client.get("/models")).json()["models"]
            assert models == [
                {"model": "a", "version": two["a"], "ready": True},
                {"model": "b", "version": None, "ready": False},
            ]
            # Now both do.
            rollout.change(store, "b", champion=two["b"], by="test")
            await until(serves(b))
            assert (await status("/readyz"), await status("/v2/health/ready")) == (200, 200)
            assert (await status("/livez"), await status("/v2/health/live")) == (200, 200)
            answers = {n: await ask(client, f"/models/{n}/predict") for n in ("a", "b")}
            assert {n: answer["version"] for n, answer in answers.items()} == two
            assert (await client.get("/models/b")).json()["model"] == "b"
            assert (await client.get("/model")).json()["model"] == "a"
            assert (await client.get("/v2/models/b")).json()["name"] == "b"
            docs = (await client.get("/models/b/docs.json")).json()
            assert docs["servers"] == [{"url": "/models/b"}]
            for name, answer in answers.items():
                given = {"labels": [{"id": answer["predictions"][0]["id"], "label": "yes"}]}
                response = await client.post(f"/models/{name}/feedback", json=given)
                assert response.json() == {"accepted": 1}
            for path in ("/models/c/predict", "/models/a/", "/models/a/other", "/v2/models/c"):
                response = await client.get(path)
                assert response.status_code == 404, path
                assert response.json()["error"], path
            assert (await client.post("/models")).headers["allow"] == "GET, HEAD"
            assert await status("/elsewhere") == 404
            # The end of one is the end of readiness.
            b.drain()
            assert (await status("/readyz"), await status("/models/a/readyz")) == (503, 200)

    asyncio.run(check())
    assert len(read(store, segments(store, "a", "predictions"))) == 3
    for name, version in two.items():
        assert labelled(store, name)["_version"].tolist() == [version]


def test_metrics_have_each_family_once_and_each_model_by_its_label(
    store: Store, two: dict[str, str], tmp_path: Path
) -> None:
    async def check() -> str:
        async with mounted(store, tmp_path, "a", "b") as ((a, _), client):
            await until(serves(a))
            for path in ("/predict", "/models/b/predict", "/models/a/predict"):
                await ask(client, path)
            response = await client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert (await client.head("/metrics")).status_code == 200
            assert (await client.post("/metrics")).status_code == 405
            return response.text

    families = list(text_string_to_metric_families(asyncio.run(check())))
    assert len({family.name for family in families}) == len(families)
    samples = [(s.name, tuple(s.labels.items())) for f in families for s in f.samples]
    assert len(set(samples)) == len(samples)
    counts = {
        (s.labels["model"], s.labels["code"]): s.value
        for f in families
        for s in f.samples
        if s.name == "model_requests_total"
    }
    assert counts == {("a", "200"): 2.0, ("b", "503"): 1.0}
    assert ("process_cpu_seconds_total", ()) in samples


def test_rights_are_those_of_the_path_without_the_name(
    store: Store, two: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "predict").write_text("token-of-predict\n")

    async def check() -> None:
        access = Access(folder)
        async with mounted(store, tmp_path, "a", "b", access=lambda: access) as ((a, _), client):
            await until(serves(a))
            assert (await ask(client, "/models/a/predict"))["status"] == 401
            client.headers["authorization"] = "Bearer token-of-predict"
            assert (await ask(client, "/models/a/predict"))["status"] == 200
            assert (await client.get("/models/a/readyz")).status_code == 200
            for path in ("/models", "/models/a", "/models/b/metrics", "/metrics"):
                assert (await client.get(path)).status_code == 403, path

    asyncio.run(check())


def test_a_server_that_does_not_stop_is_left_behind(
    store: Store, two: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount, "STOP", 0.1)

    async def check() -> None:
        async with mounted(store, tmp_path, "a", "b") as ((a, _), _client):
            await until(serves(a))

            async def never() -> None:
                await asyncio.Event().wait()

            a.stop, stop = never, a.stop  # type: ignore[method-assign]
        await stop()

    asyncio.run(check())
