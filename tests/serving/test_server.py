"""The ASGI handler: errors, batches, swaps, canary, shadow, and the log's answer to a full disk."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import bundle, contract, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.serving import server as server_module
from driftmill.serving.log import labelled, read, segments
from driftmill.serving.mount import Mount
from driftmill.serving.server import MAX_REQUESTS, Receive, Scope, Send, Server
from driftmill.serving.versions import share
from driftmill.store import Store

RECORD = {"amount": 700.0, "age": 41, "channel": "web"}
#: At this slope the `tiny` model overflows, and answers NaN, for amounts above 850.
BREAKS = 4e35
MakeBundle = Callable[..., Manifest]


@pytest.fixture
def quick(tiny: Contract) -> Contract:
    """The tiny contract with a fast poll and a fast log."""
    values = json.loads(tiny.to_json())
    values["serve"] |= {
        "poll": 0.02,
        "max_body_bytes": 20_000,
        "max_records": 100,
        "log": {"rotate": 0.05, "rotate_rows": 1000, "on_error": "refuse"},
    }
    return contract.parse(json.dumps(values))


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def running(
    store: Store, folder: Path, loaded: bool = True, model: str = "tiny"
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = Server(store, model, folder / "spool")
    app: Any = Mount(not_found, lambda: [server])
    await server.start()
    try:
        if loaded:
            await until(lambda: server.versions.serving is not None)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=True), base_url="http://test"
        ) as client:
            yield server, client
    finally:
        await server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def predict(
    client: httpx.AsyncClient, *records: dict[str, Any], request_id: str | None = None
) -> httpx.Response:
    headers = {"x-request-id": request_id} if request_id else {}
    return await client.post("/predict", json={"records": records or [RECORD]}, headers=headers)


def go(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(what)


def promote(store: Store, manifest: Manifest, **more: Any) -> None:
    rollout.change(store, "tiny", champion=manifest.version, by="test", **more)


def metric(server: Server, name: str, **labels: str) -> float:
    value = server.metrics.registry.get_sample_value(name, {"model": "tiny"} | labels)
    return 0.0 if value is None else value


def test_a_prediction_and_its_label(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=quick)
    promote(store, manifest)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await predict(client, RECORD | {"_id": "a"}, RECORD | {"amount": 100})
            assert response.status_code == 200
            answer = response.json()
            assert (answer["model"], answer["version"]) == ("tiny", manifest.version)
            assert response.headers["x-model-version"] == manifest.version
            first, second = answer["predictions"]
            assert (first["prediction"], second["prediction"]) == ("yes", "no")
            assert first["score"] == first["probabilities"]["yes"] > 0.9
            assert first["id"] != second["id"]
            for label in ("no", "yes"):
                given = {"labels": [{"id": first["id"], "label": label}]}
                response = await client.post("/feedback", json=given)
                assert response.json() == {"accepted": 1}

    go(check())
    (row,) = labelled(store, "tiny").to_dict("records")
    assert (row["_id"], row["_prediction"], row["_label"]) == ("a", "yes", "yes")
    assert (row["amount"], row["channel"], row["_role"]) == (700.0, "web", "champion")
    assert len(read(store, segments(store, "tiny", "predictions"))) == 2


def test_before_a_version_is_loaded_everything_says_so(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    async def check() -> None:
        async with running(store, tmp_path, loaded=False) as (server, client):
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            response = await predict(client)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert response.json()["error"]["code"] == "not_ready"
            assert (await client.get("/model")).json()["version"] is None
            assert (await client.get("/docs.json")).status_code == 200
            promote(store, make_bundle(of=quick))
            await until(lambda: server.versions.serving is not None)
            assert (await client.get("/readyz")).status_code == 200
            assert (await predict(client)).status_code == 200
            server.draining = True
            assert (await client.get("/readyz")).status_code == 503

    go(check())


def test_bad_requests_get_their_own_errors(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def chunks(size: int, taken: list[int]) -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            taken.append(1000)
            yield b" " * 1000

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):

            async def error(method: str, path: str, **more: Any) -> tuple[int, str]:
                response = await client.request(method, path, **more)
                found = response.json()["error"]
                assert set(found) <= {"code", "message", "path"}
                return response.status_code, found["code"]

            json_type = {"content-type": "application/json"}
            post = "POST", "/predict"
            assert await error("GET", "/predict") == (405, "method_not_allowed")
            assert await error("POST", "/model") == (405, "method_not_allowed")
            assert await error(*post, content=b"a=1") == (400, "invalid_json")
            assert (await error(*post, data={"a": "1"}))[0] == 415
            assert (await error(*post, content=b"{}", headers={"content-encoding": "gzip"}))[
                0
            ] == 415
            assert (await error(*post, content=b"{", headers=json_type))[0] == 400
            assert (await error(*post, json={"records": []}))[0] == 422
            assert (await error(*post, json={"records": [RECORD] * 101}))[0] == 422
            assert (await error(*post, content=b" " * 20_001, headers=json_type))[0] == 413
            assert (await error(*post, content=b"{}", headers={"x-request-id": "a\tb"}))[0] == 400
            assert (await error(*post, content=b"{}", headers={"x-request-id": "a" * 129}))[
                0
            ] == 400
            response = await predict(client, RECORD, RECORD | {"amount": "5"})
            assert response.status_code == 422
            assert response.json()["error"]["path"] == "$.records[1].amount"
            assert response.headers["x-request-id"]
            # Without a length, no more is read than shows that it is too much.
            taken: list[int] = []
            assert (await error(*post, content=chunks(10**6, taken), headers=json_type))[0] == 413
            assert (await client.get("/nowhere")).status_code == 404
            assert metric(server, "model_requests_total", version="", code="413") == 2
            assert (await predict(client)).status_code == 200

    go(check())


def test_a_body_without_length_is_not_read_to_its_end(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, _):
            received = 0

            async def receive() -> dict[str, Any]:
                nonlocal received
                received += 1
                return {"type": "http.request", "body": b" " * 1000, "more_body": True}

            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
            await server(scope, receive, send)
            assert sent[0]["status"] == 413
            assert (b"connection", b"close") in sent[0]["headers"]
            assert received == 21

    go(check())


def test_a_slow_body_is_refused(
    store: Store,
    make_bundle: MakeBundle,
    quick: Contract,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote(store, make_bundle(of=quick))
    monkeypatch.setattr(server_module, "BODY_TIMEOUT", 0.05)

    async def check() -> None:
        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(3600)

        async with running(store, tmp_path) as (_, client):
            assert (await client.post("/predict", content=slow())).status_code == 408

    go(check())


def test_too_many_requests_are_turned_away(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            answers = await asyncio.gather(*(predict(client) for _ in range(MAX_REQUESTS + 100)))
            codes = Counter(a.status_code for a in answers)
            assert set(codes) == {200, 503}
            assert codes[503] >= 100
            refused = next(a for a in answers if a.status_code == 503)
            assert refused.headers["retry-after"] == "1"
            assert metric(server, "model_overload_total") == codes[503]
            assert (await predict(client)).status_code == 200

    go(check())


def test_who_waits_too_long_gets_a_504(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            for seconds, status in (("1e-9", 504), ("30", 200), ("0", 400), ("soon", 400)):
                asked = await client.post(
                    "/predict", json={"records": [RECORD]}, headers={"x-request-timeout": seconds}
                )
                assert asked.status_code == status
            assert asked.json()["error"]["code"] == "invalid_request_timeout"
            assert server.batches.rows == 0

    go(check())
    assert len(read(store, segments(store, "tiny", "predictions"))) == 1


def test_requests_that_wait_together_are_one_batch(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            amounts = [float(i) for i in range(300)]
            answers = await asyncio.gather(
                *(predict(client, RECORD | {"amount": a}) for a in amounts)
            )
            scores = [a.json()["predictions"][0]["score"] for a in answers]
            assert scores == sorted(scores)  # each got its own answer
            assert metric(server, "model_batch_rows_sum") == 300
            assert metric(server, "model_batch_rows_count") < 100

    go(check())


def test_swaps_under_load_fail_no_request(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    versions = [make_bundle(slope, quick) for slope in (0.02, 0.03)]
    promote(store, versions[0])

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            done = False
            seen: Counter[str] = Counter()

            async def client_loop() -> None:
                while not done:
                    response = await predict(client)
                    assert response.status_code == 200
                    assert response.headers["x-model-version"] == response.json()["version"]
                    seen[response.json()["version"]] += 1

            clients = [asyncio.create_task(client_loop()) for _ in range(4)]
            for i in range(1, 9):
                version = versions[i % 2]
                await asyncio.to_thread(promote, store, version)
                await until(
                    lambda v=version: server.versions.serving.champion.version == v.version  # type: ignore
                )
            done = True
            await asyncio.gather(*clients)
            assert set(seen) == {v.version for v in versions}
            assert metric(server, "model_rollout_revision") == 9

    go(check())


def test_a_tampered_version_is_refused_and_the_old_one_goes_on(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    good, bad = make_bundle(0.02, quick), make_bundle(0.03, quick)
    path = f"{bundle.key('tiny', bad.version)}/model.onnx"
    content = store.read(path)
    store.write(path, content[:-1] + b"x")
    promote(store, good)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            promote(store, bad)
            await until(lambda: bool(server.versions.refused))
            answer = (await client.get("/model")).json()
            assert answer["version"] == good.version
            assert answer["refused"][0]["version"] == bad.version
            assert "sha256" in answer["refused"][0]["reason"]
            assert (await predict(client)).json()["version"] == good.version
            failures = metric(server, "model_load_failures_total", version=bad.version)
            assert failures >= 1
            await asyncio.sleep(0.2)  # polls go on, and do not load it again at each
            assert metric(server, "model_load_failures_total", version=bad.version) == failures
            # Mended, it is served without anyone telling the service.
            store.write(path, content)
            server.versions._load_again = 0.0
            await until(lambda: server.versions.serving.champion.version == bad.version)  # type: ignore
            assert (await client.get("/model")).json()["refused"] == []

    go(check())


def test_a_vanished_bundle_breaks_nothing(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=quick)
    promote(store, manifest)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for key in store.list(bundle.key("tiny", manifest.version)):
                store.delete(key)
            for key in store.list("tiny/rollout"):
                store.delete(key)
            await asyncio.sleep(0.1)
            assert (await predict(client)).status_code == 200
            assert (await client.get("/model")).json()["version"] == manifest.version

    go(check())


def test_a_canary_answers_its_share_and_sticks_to_request_ids(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    old, new = make_bundle(0.02, quick), make_bundle(0.03, quick)
    promote(store, old, challenger=new.version, weight=0.3)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            names = [f"request-{i}" for i in range(600)]
            for _ in range(2):
                answers = [await predict(client, request_id=name) for name in names]
                by_name = {a.headers["x-request-id"]: a.headers["x-model-version"] for a in answers}
                assert by_name == {
                    name: new.version if share(name) < 0.3 else old.version for name in names
                }
            assert 130 < Counter(by_name.values())[new.version] < 230

    go(check())
    rows = read(store, segments(store, "tiny", "predictions"))
    roles = set(zip(rows["_version"], rows["_role"], strict=True))
    assert roles == {(old.version, "champion"), (new.version, "challenger")}


@given(st.text(st.characters(codec="utf-8")))
def test_the_share_is_stable_and_in_range(request_id: str) -> None:
    assert 0 <= share(request_id) < 1
    # Written down, because all replicas and all releases must agree on it.
    assert share("request-0") == pytest.approx(0.1264697853988969, abs=1e-12)


def test_a_shadow_is_logged_and_never_answers(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    old, new = make_bundle(0.02, quick), make_bundle(0.03, quick)
    promote(store, old, challenger=new.version, shadow=True)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for _ in range(20):
                assert (await predict(client)).json()["version"] == old.version

    go(check())
    rows = read(store, segments(store, "tiny", "predictions"))
    shadow, answered = rows[rows["_role"] == "shadow"], rows[rows["_role"] == "champion"]
    assert len(shadow) == len(answered) == 20
    assert set(shadow["_prediction_id"]) == set(answered["_prediction_id"])
    assert set(shadow["_version"]) == {new.version}


@pytest.mark.parametrize("how", [{"weight": 1.0}, {"shadow": True}])
def test_a_challenger_that_answers_nan_is_rolled_back(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path, how: dict[str, Any]
) -> None:
    old, new = make_bundle(0.02, quick), make_bundle(BREAKS, quick)
    promote(store, old, challenger=new.version, **how)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            assert (await predict(client, RECORD)).status_code == 200
            for _ in range(3):
                response = await predict(client, RECORD | {"amount": 900})
                assert response.status_code == 200
                assert response.json()["version"] == old.version
                assert response.json()["predictions"][0]["prediction"] == "yes"
            await until(lambda: len(rollout.history(store, "tiny")) == 2)
            await until(lambda: server.versions.serving.rollout.revision == 2)  # type: ignore[union-attr]
            assert metric(server, "model_challenger_failures_total", version=new.version) >= 1

    go(check())
    last = rollout.history(store, "tiny")[-1]
    assert (last.champion, last.challenger, last.by) == (old.version, None, "service")
    assert "NaN" in last.reason


def test_a_rollback_that_another_was_faster_with_is_left_alone(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    old, new = make_bundle(0.02, quick), make_bundle(BREAKS, quick)
    promote(store, old, challenger=new.version, weight=1.0)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            before = server.versions.serving
            assert before is not None
            promote(store, old)  # somebody takes the challenger back
            server.versions.roll_back(before, "failed")
            assert (await predict(client, RECORD | {"amount": 900})).status_code == 200
            await until(lambda: server.versions._rollback is None)
            assert len(rollout.history(store, "tiny")) == 2

    go(check())


def test_a_champion_that_answers_nan_is_a_500_for_those_requests_only(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(BREAKS, quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await predict(client, RECORD | {"amount": 900})
            assert (response.status_code, response.json()["error"]["code"]) == (
                500,
                "model_failed",
            )
            assert (await predict(client)).status_code == 200

    go(check())


def test_a_challenger_with_other_inputs_is_refused(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    old = make_bundle(0.02, quick)
    values = json.loads(quick.to_json())
    values["data"]["columns"][1]["nullable"] = True
    values["data"]["columns"][0]["nullable"] = True
    new = make_bundle(0.03, contract.parse(json.dumps(values)))
    promote(store, old, challenger=new.version, weight=0.5)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            answer = (await client.get("/model")).json()
            assert answer["challenger"] is None
            assert "inputs" in answer["refused"][0]["reason"]
            for _ in range(5):
                assert (await predict(client)).json()["version"] == old.version
            promote(store, new)
            await asyncio.sleep(0.3)
            assert (await client.get("/model")).json()["version"] == new.version
            assert (await predict(client, RECORD | {"amount": None})).status_code == 200

    go(check())


@pytest.mark.parametrize("on_error", ["refuse", "serve"])
def test_a_full_disk(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path, on_error: str
) -> None:
    values = json.loads(quick.to_json())
    values["serve"]["log"]["on_error"] = on_error
    promote(store, make_bundle(of=contract.parse(json.dumps(values))))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    accepted: list[str] = []

    async def send(client: httpx.AsyncClient) -> httpx.Response:
        response = await predict(client)
        if response.status_code == 200:
            accepted.append(response.json()["predictions"][0]["id"])
        return response

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            await send(client)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            try:
                answers = [await send(client) for _ in range(3)]
                label = {"labels": [{"id": accepted[0], "label": "yes"}]}
                feedback = await client.post("/feedback", json=label)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert metric(server, "model_inference_log_failing") == 1
            if on_error == "refuse":
                assert {a.status_code for a in [*answers, feedback]} == {503}
                assert answers[0].json()["error"]["code"] == "log_unavailable"
                assert metric(server, "model_inference_log_refused_rows_total") == 4
            else:
                assert {a.status_code for a in [*answers, feedback]} == {200}
                assert metric(server, "model_inference_log_dropped_rows_total") == 4
                del accepted[1:]
            assert (await send(client)).status_code == 200
            assert metric(server, "model_inference_log_failing") == 0

    go(check())
    rows = read(store, segments(store, "tiny", "predictions"))
    assert sorted(rows["_prediction_id"]) == sorted(accepted)


def test_an_unreadable_rollout_is_counted_and_serving_goes_on(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            store.write("tiny/rollout/00000002.json", b"{")
            await until(lambda: metric(server, "model_rollout_poll_failures_total") > 1)
            assert (await predict(client)).status_code == 200

    go(check())


def test_a_dead_background_task_asks_for_a_restart(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            assert (await client.get("/livez")).status_code == 200
            assert server.versions._poller is not None
            server.versions._poller.cancel()
            await asyncio.wait([server.versions._poller])
            assert (await client.get("/livez")).status_code == 503
            assert (await predict(client)).status_code == 200

    go(check())


def test_the_document_describes_the_champions_schema(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            document = (await client.get("/docs.json")).json()
            assert document["openapi"].startswith("3.")
            record = document["components"]["schemas"]["Record"]
            assert {"amount", "age", "channel", "_id", "_time"} == set(record["properties"])
            assert record["properties"]["amount"]["maximum"] == 1000
            assert sorted(record["required"]) == ["amount", "channel"]
            text = json.dumps(document)
            for reference in set(text.split('"$ref": "#/components/schemas/')[1:]):
                assert reference.split('"')[0] in document["components"]["schemas"]

    go(check())


def test_series_of_old_versions_are_forgotten(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    versions = [make_bundle(0.02 + i / 1000, quick) for i in range(8)]
    promote(store, versions[0])

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            for manifest in versions:
                promote(store, manifest)
                await until(
                    lambda v=manifest: server.versions.serving.champion.version == v.version  # type: ignore
                )
                await predict(client)
            text = (await client.get("/metrics")).text
            known = [v.version for v in versions if v.version in text]
            assert known == [v.version for v in versions[-5:]]
            info = f'model_version_info{{model="tiny",role="champion",version="{known[-1]}"}} 1.0'
            assert text.count("model_version_info{") == 1
            assert info in text

    go(check())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*RECORD, "_id", "_time"]) | st.text(max_size=5)
bodies = st.binary() | st.lists(st.dictionaries(fields, json_values), max_size=4).map(
    lambda records: json.dumps({"records": [RECORD | r for r in records]}).encode()
)


def test_no_input_makes_a_5xx(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=quick))
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"])
    paths = st.sampled_from(["/predict", "/feedback", "/model", "/livez", "/metrics"])
    headers = st.dictionaries(
        st.sampled_from(["content-type", "x-request-id", "content-encoding"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
        | st.just("application/json"),
    )

    with asyncio.Runner() as runner:
        context = running(store, tmp_path)
        _, client = runner.run(_enter(context))

        @settings(max_examples=300, deadline=None)
        @given(methods, paths, headers, bodies)
        def fuzz(method: str, path: str, sent: dict[str, str], content: bytes) -> None:
            response = runner.run(
                _send(client.request(method, path, headers=sent, content=content))
            )
            assert response.status_code < 500
            if response.status_code >= 400 and method != "HEAD":
                assert set(response.json()["error"]) <= {"code", "message", "path"}

        try:
            fuzz()
        finally:
            runner.run(_exit(context))


async def _enter(context: Any) -> Any:
    return await context.__aenter__()


async def _exit(context: Any) -> None:
    await context.__aexit__(None, None, None)


async def _send(request: Awaitable[httpx.Response]) -> httpx.Response:
    return await request


def test_copies_from_a_remote_store_do_not_pile_up(
    store: Store, make_bundle: MakeBundle, quick: Contract, tmp_path: Path
) -> None:
    """A version that serves is in memory; its copy on the disk goes, and it can come back."""
    remote = Store("memory://copies")
    manifests = [make_bundle(slope=slope, of=quick) for slope in (0.02, 0.03)]
    for manifest in manifests:
        folder = bundle.locate(store, "tiny", manifest.version)
        remote.put_folder(folder, bundle.key("tiny", manifest.version), bundle.MANIFEST)

    async def check() -> None:
        server = Server(remote, "tiny", tmp_path / "spool", tmp_path / "cache")
        await server.start()
        try:
            for manifest in (*manifests, manifests[0]):
                promote(remote, manifest)
                await until(
                    lambda wanted=manifest.version: (  # type: ignore[misc]
                        server.versions.serving is not None
                        and server.versions.serving.champion.version == wanted
                    )
                )
                assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
        finally:
            await server.stop()

    go(check())
