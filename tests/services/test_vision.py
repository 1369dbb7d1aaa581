"""The service of images as a real process: asked by BentoML's client, by the command line, by a
replay; swapped, killed, drained, built."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from driftmill import replay, rollout
from driftmill.bundle import Manifest
from driftmill.features import ID, IMAGE, ORIGINAL
from driftmill.serving.log import labelled, read, segments
from driftmill.store import Store
from driftmill.vision import images
from tests.services.test_tabular import ROOT, Traffic, bentoml_command, build_bento, service
from tests.serving.pictures import frame, picture, put_bundle, shades

MODULE = [sys.executable, "-m", "services.vision", "--model", "shades", "--port"]
RECORD = {"image": base64.b64encode(picture(200, (100, 80), "jpeg")).decode()}


def promote(store: Store, manifest: Manifest) -> None:
    rollout.change(store, "shades", champion=manifest.version, by="test")


def logged(store: Store) -> list[str]:
    return list(read(store, segments(store, "shades", "predictions"))["_prediction_id"])


def driftmill(tmp_path: Path, store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "driftmill", "predict", *arguments],
        cwd=tmp_path,
        env=os.environ | {"DRIFTMILL_HOME": str(tmp_path), "DRIFTMILL_STORE": store.uri},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_killed_drained_and_swapped_under_load_it_loses_nothing(
    store: Store, tmp_path: Path
) -> None:
    old, new = put_bundle(store, tmp_path), put_bundle(store, tmp_path, slope=0.2)
    promote(store, old)
    with service(store, tmp_path, MODULE) as (process, url), Traffic(url, RECORD) as killed:
        killed.wait(100)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with service(store, tmp_path, MODULE) as (process, url), Traffic(url, RECORD) as drained:
        drained.wait(50)
        promote(store, new)
        while drained.answers[-1]["version"] != new.version:
            drained.wait(5)
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert killed.failures == drained.failures == []
    found = logged(store)
    assert len(found) == len(set(found))
    assert set(killed.ids + drained.ids) <= set(found)
    assert len(found) <= len(killed.ids + drained.ids) + 2 * killed.cut
    assert list((tmp_path / "spool").rglob("*.jsonl")) == []


@pytest.mark.slow
def test_bentoml_client_command_line_and_replay(store: Store, tmp_path: Path) -> None:
    import bentoml

    of = shades()
    promote(store, put_bundle(store, tmp_path, of))
    (tmp_path / "contract.json").write_text(of.to_json())
    files = [tmp_path / "dark.png", tmp_path / "light.jpg"]
    files[0].write_bytes(picture(30))
    files[1].write_bytes(picture(220, (64, 48), "jpeg"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture()[:70])
    expected = ["dark", "light"]
    rows = frame(of, 30).assign(**{ID: [f"r{i}" for i in range(30)]})
    # Some rows have the file they came as: it is sent in place of the pixels.
    originals = [picture(220, (50, 40)) if i % 3 == 0 else None for i in range(30)]
    rows[ORIGINAL] = originals
    command = [bentoml_command(), "serve", "services.vision:Service", "--host", "127.0.0.1"]
    asked = [str(tmp_path / "contract.json"), "--json", "--file", str(files[0])]
    with service(store, tmp_path, [*command, "--port"], model="shades") as (_, url):
        with bentoml.SyncHTTPClient(url) as client:
            records = [{"image": base64.b64encode(f.read_bytes()).decode()} for f in files]
            answer = client.predict(records=records)
            assert [p["prediction"] for p in answer["predictions"]] == expected
            by_file = [client.predict_file(image=file)["predictions"][0] for file in files]
            assert [p["prediction"] for p in by_file] == expected
        done = driftmill(tmp_path, store, *asked, str(files[1]), "--url", url)
        assert done.returncode == 0, done.stderr
        online = json.loads(done.stdout)["predictions"]
        assert [p["prediction"] for p in online] == expected
        refused = driftmill(tmp_path, store, *asked[:3], str(broken), "--url", url)
        assert refused.returncode != 0
        assert "cannot be decoded" in refused.stderr
        result = asyncio.run(replay.replay(rows, url, contract=of, rate=2000, label_delay=0.0))
        assert (result.ok, result.sent, result.labelled) == (True, 30, 30)
    done = driftmill(tmp_path, store, *asked, str(files[1]), "--offline")
    offline = json.loads(done.stdout)["predictions"]
    assert [p["score"] for p in offline] == [p["score"] for p in online]
    refused = driftmill(tmp_path, store, *asked[:3], str(broken), "--offline")
    assert refused.returncode != 0
    assert "cannot be decoded" in refused.stderr
    assert "Traceback" not in refused.stderr
    replayed = labelled(store, "shades").set_index(ID)
    assert replayed["_label"].tolist() == rows["shade"].tolist()
    for i, original in enumerate(originals):
        sent = dict(replayed.loc[f"r{i}"])
        if original is not None:
            assert (sent["width"], sent["height"]) == (50, 40)
        else:
            assert np.array_equal(images.from_png(sent[IMAGE]), rows[IMAGE].iloc[i])


@pytest.mark.slow
def test_bentoml_build(store: Store, tmp_path: Path) -> None:
    manifest = put_bundle(store, tmp_path)
    promote(store, manifest)
    build_bento(tmp_path, "services/bentofile-vision.yaml")
    command = [bentoml_command(), "serve", "driftmill-vision:latest", "--host", "127.0.0.1"]
    with service(store, tmp_path, [*command, "--port"], model="shades") as (_, url):
        headers = {"content-type": "image/png"}
        answer = httpx.post(f"{url}/predict", content=picture(), headers=headers).json()
        assert answer["version"] == manifest.version


def test_the_serving_path_needs_neither_torch_nor_pandas_nor_scikit_learn(
    store: Store, tmp_path: Path
) -> None:
    promote(store, put_bundle(store, tmp_path))
    # Not only the import: a version is loaded, and an image answered and logged.
    code = (
        "import asyncio, sys\n"
        "from services.bento import Request, server\n"
        "import services.vision\n"
        "async def check():\n"
        "    serving = server()\n"
        "    await serving.start()\n"
        "    while serving.versions.serving is None: await asyncio.sleep(0.01)\n"
        "    body = open(sys.argv[1], 'rb').read()\n"
        "    await serving.predict(Request(body, 'a', kind='image/png'))\n"
        "    await serving.stop()\n"
        "asyncio.run(check())\n"
        "heavy = {'torch', 'torchvision', 'pandas', 'sklearn', 'scipy', 'kfp', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    (tmp_path / "a.png").write_bytes(picture())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        cwd=ROOT,
        env=os.environ
        | {
            "DRIFTMILL_HOME": str(tmp_path),
            "DRIFTMILL_STORE": store.uri,
            "DRIFTMILL_MODEL": "shades",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert len(logged(store)) == 1
