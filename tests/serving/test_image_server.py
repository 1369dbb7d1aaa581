"""Requests with images: three forms, bad images, batches in a thread, canary, shadow, the log."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import bundle, contract, rollout
from driftmill.bundle import Manifest
from driftmill.features import EMBEDDING, IMAGE
from driftmill.serving.batches import WAITING_ROWS
from driftmill.serving.image_codec import BATCH_NUMBERS, ImageCodec
from driftmill.serving.log import labelled, read, segments
from driftmill.serving.server import Server
from driftmill.serving.versions import Model, Serving, share
from driftmill.store import Store
from driftmill.vision import images
from tests.conftest import CONTRACT
from tests.serving.pictures import picture, put_bundle, shades
from tests.serving.test_server import running as running_server
from tests.serving.test_server import until

#: At this slope the tiny model overflows, and answers NaN, where a picture is all white.
BREAKS = 2.8e36
PNG = {"content-type": "image/png"}


@asynccontextmanager
async def running(store: Store, folder: Path) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    async with running_server(store, folder, model="shades") as both:
        yield both


def go(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(what)


def promote(store: Store, manifest: Manifest, **more: Any) -> None:
    rollout.change(store, "shades", champion=manifest.version, by="test", **more)


def metric(server: Server, name: str, **labels: str) -> float:
    value = server.metrics.registry.get_sample_value(name, {"model": "shades"} | labels)
    return 0.0 if value is None else value


def record(content: bytes, **more: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(content).decode(), **more}


async def predict(
    client: httpx.AsyncClient, *contents: bytes, request_id: str = ""
) -> httpx.Response:
    headers = {"x-request-id": request_id} if request_id else {}
    body = {"records": [record(c) for c in contents]}
    return await client.post("/predict", json=body, headers=headers)


async def error(client: httpx.AsyncClient, **request: Any) -> tuple[int, str, str | None]:
    """Status, code and path of what must be refused."""
    response = await client.post("/predict", **request)
    found = response.json()["error"]
    assert set(found) <= {"code", "message", "path"}
    return response.status_code, found["code"], found.get("path")


def serving(server: Server) -> Serving:
    assert server.versions.serving is not None
    return server.versions.serving


def logged(store: Store, **options: Any) -> Any:
    return read(store, segments(store, "shades", "predictions"), **options)


def test_three_forms_of_a_request_get_the_same_answer(store: Store, tmp_path: Path) -> None:
    manifest = put_bundle(store, tmp_path)
    promote(store, manifest)
    dark, light = picture(30, (20, 12)), picture(220, (20, 12), "jpeg")

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            as_json = await predict(client, dark, light)
            forms: list[Any] = [
                {"files": [("image", ("a.png", dark)), ("images", ("b.jpg", light))]},
                {"files": [("file", ("a", dark)), ("file", ("b", light))]},
            ]
            answers = [as_json] + [await client.post("/predict", **form) for form in forms]
            for answer in answers:
                assert answer.status_code == 200, answer.text
                body = answer.json()
                assert (body["model"], body["version"]) == ("shades", manifest.version)
                first, second = body["predictions"]
                assert (first["prediction"], second["prediction"]) == ("dark", "light")
                assert first["score"] == first["probabilities"]["light"] < 0.1
                assert first["score"] == as_json.json()["predictions"][0]["score"]
            for kind in ("image/jpeg", "IMAGE/PNG; a=b", "application/octet-stream"):
                raw = await client.post("/predict", content=light, headers={"content-type": kind})
                (only,) = raw.json()["predictions"]
                assert only["score"] == second["score"]

    go(check())


def test_a_label_and_what_the_log_keeps(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path))
    wide = picture(100, (30, 10))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            named = record(wide, _id="a", _time="2026-01-02T03:04:05Z")
            body = {"records": [named, record(picture(220))]}
            first, _ = (await client.post("/predict", json=body)).json()["predictions"]
            label = {"labels": [{"id": first["id"], "label": "light"}]}
            assert (await client.post("/feedback", json=label)).json() == {"accepted": 1}
            bad = {"labels": [{"id": first["id"], "label": "lite"}]}
            answer = (await client.post("/feedback", json=bad)).json()["error"]
            assert "did you mean 'light'?" in answer["message"]
            form = await client.post("/feedback", content=wide, headers=PNG)
            assert form.status_code == 415

    go(check())
    (row,) = labelled(store, "shades").to_dict("records")
    spec = shades().data.image
    assert spec is not None
    seen = images.decode(wide, spec)
    statistics = images.statistics(seen.pixels[None], np.array([[30, 10]]))
    assert {name: row[name] for name in statistics} == pytest.approx(
        {name: values[0] for name, values in statistics.items()}
    )
    assert (row["width"], row["height"], row["aspect"]) == (30, 10, 3)
    assert (row["_id"], row["_label"], row["_prediction"]) == ("a", "light", "dark")
    assert np.array_equal(images.from_png(row[IMAGE]), seen.pixels)
    embedding = np.frombuffer(row[EMBEDDING], "<f2")
    assert embedding == pytest.approx([seen.pixels.mean(), seen.pixels.max()], rel=1e-3)
    assert len(logged(store)) == 2
    key = segments(store, "shades", "predictions")[0]
    stored = pyarrow.parquet.read_schema(pa.BufferReader(store.read(key)))
    assert stored.names[-2:] == [IMAGE, EMBEDDING]
    assert {stored.field(name).type for name in (IMAGE, EMBEDDING)} == {pa.binary()}
    light = labelled(store, "shades", without=[IMAGE, EMBEDDING])
    assert list(light.columns) == [
        c for c in labelled(store, "shades") if c not in stored.names[-2:]
    ]


def test_the_log_keeps_no_images_where_the_contract_says_so(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path, shades(serve={"log": {"images": False}})))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            assert (await predict(client, picture())).status_code == 200

    go(check())
    (row,) = logged(store).to_dict("records")
    assert row[IMAGE] is None
    assert len(row[EMBEDDING]) == 4


def test_bad_images_get_their_own_errors(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path))
    good = picture()
    frames = [PIL.Image.new("L", (8, 8), level) for level in (0, 255)]
    animated = io.BytesIO()
    frames[0].save(animated, "webp", save_all=True, append_images=frames[1:], lossless=True)
    cmyk = io.BytesIO()
    PIL.Image.new("CMYK", (8, 8)).save(cmyk, "jpeg")
    clear = io.BytesIO()
    PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "png")
    deep = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(deep, "png")
    bomb = io.BytesIO()
    PIL.Image.new("1", (5000, 5000)).save(bomb, "png")
    breaking = [animated.getvalue(), cmyk.getvalue(), clear.getvalue(), deep.getvalue()]
    breaking += [bomb.getvalue(), good[:60], picture(kind="jpeg")[:-90], good[:40] + b"x" * 50]
    assert len(bomb.getvalue()) < 20_000
    heavy = picture(200, (190, 190))
    assert len(heavy) > 20_000

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            for content in breaking:
                for request in (
                    {"content": content, "headers": PNG},
                    {"files": {"image": content}},
                    {"json": {"records": [record(content)]}},
                ):
                    answer = await error(client, **request)
                    assert answer == (422, "invalid_image", "$.records[0].image"), content[:20]
            batch = {"records": [record(good)] * 3 + [record(breaking[0])]}
            assert (await error(client, json=batch))[2] == "$.records[3].image"
            # A body that is no image, or one of a format that is not listed, has the wrong type.
            for content in (b"", b"hello", b"%PDF-1.7", picture(kind="gif")):
                wrong = 422 if not content else 415
                assert (await error(client, content=content, headers=PNG))[0] == wrong
                assert (await error(client, files={"image": content}))[0] == wrong
                assert (await error(client, json={"records": [record(content)]}))[0] == 422
            for request in (
                {"content": heavy, "headers": PNG},
                {"json": {"records": [record(heavy)]}},
            ):
                assert (await error(client, **request))[:2] == (413, "image_too_large")
            assert (await error(client, content=b"x" * 100_001, headers=PNG))[0] == 413
            assert (await predict(client, good)).status_code == 200
            version = serving(server).champion.version
            labels = {"version": version, "role": "champion"}
            assert metric(server, "model_predictions_total", **labels) == 1

    go(check())
    assert len(logged(store)) == 1


def test_bad_requests_get_their_own_errors(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path))
    good = picture()

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            for kind in (
                "image/gif",
                "image/svg+xml",
                "text/plain",
                "application/x-www-form-urlencoded",
                "",
            ):
                answer = await error(client, content=good, headers={"content-type": kind})
                assert answer[:2] == (415, "unsupported_media_type")
            wrong: list[list[dict[str, Any]]] = [
                [{"image": "%%%"}],
                [{"image": 5}],
                [{"image": None}],
                [{}],
                [record(good, width=3.0)],
                [record(good, _time="yesterday")],
                [],
                [record(good)] * 101,
            ]
            for records in wrong:
                assert (await error(client, json={"records": records}))[0] == 422
            for text in (b"", b"{", b"\xff", b"[" * 100_000):
                answer = await error(
                    client, content=text, headers={"content-type": "application/json"}
                )
                assert answer[0] in (400, 422)
            typo = await client.post("/predict", json={"records": [{"imgae": ""}]})
            assert "did you mean 'image'?" in typo.json()["error"]["message"]
            form = {"content-type": "multipart/form-data; boundary=b"}
            head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            for kind, body in (
                ("multipart/form-data", head + good + b"\r\n--b--\r\n"),
                ("multipart/form-data; boundary=b", head + good),
                ("multipart/form-data; boundary=b", b""),
                ("multipart/form-data; boundary=b", b"--b--\r\n"),
                ("multipart/form-data; boundary=b", b"nothing"),
                ("multipart/form-data; boundary=b", b"--b\r\n\r\n\r\n--b--\r\n"),
            ):
                answer = await error(client, content=body, headers={"content-type": kind})
                assert answer[0] in (400, 422)
                assert answer[1] == "invalid_form"
            for files in ([("imagse", ("a", good))], [("image", ("a", good))] * 101):
                assert (await error(client, files=files))[:2] == (422, "invalid_form")
            field = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n'
            assert (await error(client, content=field, headers=form))[:2] == (422, "invalid_form")

    go(check())


def test_a_picture_is_turned_as_its_exif_says(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = picture(200, (16, 8), "jpeg", exif=exif)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            assert (await client.post("/predict", content=turned, headers=PNG)).status_code == 200

    go(check())
    (row,) = logged(store).to_dict("records")
    assert (row["width"], row["height"]) == (8, 16)


def slowly(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int]]:
    """Let a model wait in its thread for the event; the list tells the rows of each batch."""
    let_go, batches, run = threading.Event(), [], model.run

    def waiting(records: Sequence[Any], keep: bool = True) -> Any:
        batches.append(len(records))
        assert let_go.wait(20)
        return run(records, keep)

    monkeypatch.setattr(model, "run", waiting)
    return let_go, batches


def test_a_deadline_ends_the_wait_for_a_slow_model(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, put_bundle(store, tmp_path))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            let_go, batches = slowly(serving(server).champion, monkeypatch)
            first = asyncio.create_task(predict(client, picture()))
            await until(lambda: batches == [1])
            headers = {"content-type": "image/png", "x-request-timeout": "0.05"}
            late = await client.post("/predict", content=picture(), headers=headers)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            let_go.set()
            assert (await first).status_code == 200
            await until(lambda: server.batches.rows == 0)
            assert batches == [1]  # nobody waits for the other any more

    go(check())


def test_while_a_batch_runs_the_service_answers_and_the_next_batch_gathers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, put_bundle(store, tmp_path))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            let_go, batches = slowly(serving(server).champion, monkeypatch)
            levels = list(range(10, 250, 8))
            first = asyncio.create_task(predict(client, picture(levels[0])))
            await until(lambda: batches == [1])
            others = [
                # Half of them are large, so that they are decoded in a thread.
                asyncio.create_task(
                    predict(
                        client, picture(level, (100, 100), "jpeg") if level % 16 else picture(level)
                    )
                )
                for level in levels[1:]
            ]
            await until(lambda: len(serving(server).champion.waiting) == len(others))
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            let_go.set()
            answers = await asyncio.gather(first, *others)
            scores = [a.json()["predictions"][0]["score"] for a in answers]
            assert scores == sorted(scores)  # each got its own answer
            assert batches == [1, len(others)]
            assert server.batches.rows == 0

    go(check())
    assert len(logged(store)) == 30


def test_too_many_waiting_images_are_turned_away(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, put_bundle(store, tmp_path, shades(serve={"max_batch_rows": 4})))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            let_go, batches = slowly(serving(server).champion, monkeypatch)
            first = asyncio.create_task(predict(client, picture()))
            await until(lambda: batches == [1])
            content = picture(200, (100, 100), "jpeg")
            most = WAITING_ROWS
            sent = [asyncio.create_task(predict(client, content)) for _ in range(most + 9)]
            await until(lambda: len(serving(server).champion.waiting) == most)
            await until(lambda: sum(task.done() for task in sent) == 9)
            refused = [task.result() for task in sent if task.done()]
            assert {(r.status_code, r.headers["retry-after"]) for r in refused} == {(503, "1")}
            let_go.set()
            answers = await asyncio.gather(first, *sent)
            assert sum(a.status_code == 200 for a in answers) == 1 + most
            assert max(batches) == 4
            assert metric(server, "model_overload_total") == 9
            assert server.batches.rows == 0

    go(check())


def test_a_request_larger_than_a_batch_is_run_in_parts(store: Store, tmp_path: Path) -> None:
    of = shades(image={"size": [128, 128], "channels": 3}, serve={"max_body_bytes": 10**7})
    manifest = put_bundle(store, tmp_path, of)
    loaded = bundle.fetch(store, "shades", manifest.version)
    codec = ImageCodec(loaded.signature, of)
    assert codec.batch_rows == BATCH_NUMBERS // (128 * 128 * 3) < 40
    levels = np.linspace(10, 240, 60).astype(int)
    sent = [record(picture(int(level), (128, 128), "jpeg")) for level in levels]
    uploads = codec.records(json.dumps({"records": sent}).encode())
    assert codec.decode_now(uploads) is None
    output, kept = codec.run(loaded.session, codec.decode(uploads))
    whole = loaded.session.run(np.stack([images.from_png(row[IMAGE]) for row in kept]))
    assert np.allclose(output, whole)
    assert (np.diff(output[:, 1]) > 0).all()


def test_nobody_works_for_a_client_that_has_gone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, put_bundle(store, tmp_path))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            let_go, batches = slowly(serving(server).champion, monkeypatch)
            first = asyncio.create_task(predict(client, picture()))
            await until(lambda: batches == [1])
            left = asyncio.Event()
            messages = [{"type": "http.request", "body": picture()}] * 2  # as uvicorn may repeat it

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"content-type", b"image/png")]
            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
            gone = asyncio.create_task(server(scope, receive, send))
            await until(lambda: len(serving(server).champion.waiting) == 1)
            left.set()
            await gone
            assert sent[0]["status"] == 499
            let_go.set()
            assert (await first).status_code == 200
            assert (await predict(client, picture())).status_code == 200
            assert batches == [1, 1]
            assert server.batches.rows == 0

    go(check())
    assert len(logged(store)) == 2


def test_stopping_answers_what_waits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, put_bundle(store, tmp_path))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            let_go, batches = slowly(serving(server).champion, monkeypatch)
            first = asyncio.create_task(predict(client, picture()))
            await until(lambda: batches == [1])
            second = asyncio.create_task(predict(client, picture()))
            await until(lambda: len(serving(server).champion.waiting) == 1)
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.05)
            assert not stopping.done()
            let_go.set()
            await stopping
            assert [a.status_code for a in await asyncio.gather(first, second)] == [200, 200]

    go(check())
    assert len(logged(store)) == 2


def test_a_canary_and_a_shadow_see_the_same_images(store: Store, tmp_path: Path) -> None:
    old, new = put_bundle(store, tmp_path), put_bundle(store, tmp_path, slope=0.2)
    promote(store, old, challenger=new.version, weight=0.4, shadow=True)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            names = [f"request-{i}" for i in range(40)]
            answers = await asyncio.gather(
                *(predict(client, picture(100), request_id=name) for name in names)
            )
            for name, answer in zip(names, answers, strict=True):
                by = new if share(name) < 0.4 else old
                assert answer.json()["version"] == by.version

    go(check())
    rows = logged(store).set_index("_prediction_id")
    assert set(rows["_role"]) == {"champion", "challenger", "shadow"}
    champion, shadow = (rows[rows["_role"] == role] for role in ("champion", "shadow"))
    assert set(champion.index) == set(shadow.index)
    # The shadow's rows name the same predictions; their images are kept once.
    assert shadow[IMAGE].isna().all()
    assert rows[rows["_role"] != "shadow"][IMAGE].notna().all()
    shadow = shadow.loc[champion.index]
    assert (shadow["brightness"] == champion["brightness"]).all()
    assert (shadow["_score"] != champion["_score"]).all()


@pytest.mark.parametrize("how", [{"weight": 1.0}, {"shadow": True}])
def test_a_challenger_that_answers_nan_is_rolled_back(
    store: Store, tmp_path: Path, how: dict[str, Any]
) -> None:
    old, new = put_bundle(store, tmp_path), put_bundle(store, tmp_path, slope=BREAKS)
    promote(store, old, challenger=new.version, **how)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            # Only far from the middle does the challenger overflow.
            assert (await predict(client, picture(130))).status_code == 200
            answers = await asyncio.gather(*(predict(client, picture(255)) for _ in range(5)))
            assert {a.json()["version"] for a in answers} == {old.version}
            await until(lambda: len(rollout.history(store, "shades")) == 2)
            failures = metric(server, "model_challenger_failures_total", version=new.version)
            assert failures >= 1
            assert server.batches.rows == 0

    go(check())
    assert "NaN" in rollout.history(store, "shades")[-1].reason


def test_a_champion_that_answers_nan_is_a_500(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path, slope=BREAKS))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await predict(client, picture(255))
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "model_failed"
            assert (await predict(client, picture(130))).status_code == 200

    go(check())


@pytest.mark.parametrize("change", [{"size": [9, 9]}, {"resize": "pad"}, {"max_pixels": 100}])
def test_a_challenger_that_sees_images_differently_is_refused(
    store: Store, tmp_path: Path, change: dict[str, Any]
) -> None:
    old = put_bundle(store, tmp_path)
    new = put_bundle(store, tmp_path, shades(image=change), slope=0.2)
    promote(store, old, challenger=new.version, weight=1.0)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            found = (await client.get("/model")).json()
            assert found["challenger"] is None
            assert "inputs" in found["refused"][0]["reason"]
            assert (await predict(client, picture())).json()["version"] == old.version

    go(check())


@pytest.mark.parametrize("images_first", [True, False])
def test_a_model_of_tables_and_one_of_images_replace_each_other(
    store: Store, tmp_path: Path, make_bundle: Callable[..., Manifest], images_first: bool
) -> None:
    values = json.loads(contract.parse(CONTRACT.replace("tiny", "shades")).to_json())
    values["serve"]["poll"] = 0.02
    table = make_bundle(of=contract.parse(json.dumps(values)))
    pictures = put_bundle(store, tmp_path)
    bodies = {
        table.version: {"records": [{"amount": 700.0, "channel": "web"}]},
        pictures.version: {"records": [record(picture())]},
    }
    order = [pictures, table] if images_first else [table, pictures]
    promote(store, order[0])

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            for manifest in order:
                promote(store, manifest)
                await until(lambda m=manifest: serving(server).champion.version == m.version)  # type: ignore[misc]
                answer = await client.post("/predict", json=bodies[manifest.version])
                assert answer.json()["version"] == manifest.version

    go(check())
    assert len(logged(store)) == 2


def test_the_openapi_document_shows_the_three_forms(store: Store, tmp_path: Path) -> None:
    promote(store, put_bundle(store, tmp_path))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            document = (await client.get("/docs.json")).json()
            post = document["paths"]["/predict"]["post"]
            body = post["requestBody"]["content"]
            formats = {"image/png", "image/jpeg", "image/webp", "image/bmp"}
            json_kinds = {"application/json", "multipart/form-data", "application/octet-stream"}
            assert set(body) == json_kinds | formats
            assert "image" in body["multipart/form-data"]["schema"]["properties"]
            schema = document["components"]["schemas"]["Record"]
            assert schema["properties"]["image"]["contentEncoding"] == "base64"
            assert schema["required"] == ["image"]
            assert {"200", "400", "413", "415", "422", "503"} <= set(post["responses"])
            # What the document shows is taken, kind by kind.
            for kind in body:
                answer = await client.post("/predict", content=b"", headers={"content-type": kind})
                assert answer.status_code != 415

    go(check())


GOOD = [picture(200, (12, 9), kind) for kind in ("png", "jpeg", "webp", "bmp")]
KINDS = [*(f"image/{name}" for name in ("png", "jpeg")), "application/octet-stream"]
KINDS += ["multipart/form-data; boundary=b", "application/json", "image/x", "a", ""]


def mutated(content: bytes, cut: int, place: int, noise: bytes) -> bytes:
    """A file that is cut off, and has some bytes replaced."""
    content = content[: len(content) - cut % len(content)]
    place %= len(content)
    return content[:place] + noise + content[place + len(noise) :]


BYTES = st.one_of(
    st.binary(max_size=300),
    st.builds(
        mutated,
        st.sampled_from(GOOD),
        st.integers(0, 600),
        st.integers(0, 600),
        st.binary(max_size=9),
    ),
)
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n--b--\r\n'
FORMS = st.one_of(
    BYTES,
    BYTES.map(lambda content: PART % content),
    st.builds(
        mutated, BYTES.map(lambda c: PART % c), st.integers(0, 80), st.integers(0, 90), BYTES
    ),
)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(KINDS), FORMS, BYTES), min_size=20, max_size=20))
def test_no_input_is_a_5xx(requests: list[tuple[str, bytes, bytes]]) -> None:
    async def check(folder: Path) -> None:
        store = Store(folder / "store")
        promote(store, put_bundle(store, folder))
        async with running(store, folder) as (_, client):
            for kind, body, content in requests:
                headers = {"content-type": kind}
                raw = await client.post("/predict", content=body, headers=headers)
                for answer in (raw, await predict(client, content)):
                    assert answer.status_code in (200, 400, 413, 415, 422), answer.text
                    if answer.status_code != 200:
                        assert set(answer.json()["error"]) <= {"code", "message", "path"}

    with tempfile.TemporaryDirectory() as folder:
        go(check(Path(folder)))
