"""The service as real processes: started, killed, drained, swapped, built."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from driftmill import bundle, rollout
from driftmill.bundle import Manifest
from driftmill.serving.log import labelled, read, segments
from driftmill.store import Store

ROOT = Path(__file__).parents[2]
RECORD = {"amount": 700.0, "age": 41, "channel": "web"}
MODULE = [sys.executable, "-m", "services.tabular", "--model", "tiny", "--port"]
MakeBundle = Callable[..., Manifest]


@contextmanager
def service(
    store: Store,
    tmp_path: Path,
    command: list[str] | None = None,
    model: str = "tiny",
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service process that is ready, and its URL, https where `tls` trusts it; ended at the
    latest when the test is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "service.log"
    with output.open("ab") as out:
        process = subprocess.Popen(
            [*(command or MODULE), str(port)],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=os.environ
            | {
                "DRIFTMILL_HOME": str(tmp_path),
                "DRIFTMILL_STORE": store.uri,
                "DRIFTMILL_MODEL": model,
                "BENTOML_HOME": str(tmp_path / "bentoml"),
            },
        )
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            try:
                if httpx.get(f"{url}/readyz", timeout=5, verify=tls or True).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        yield process, url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Traffic:
    """Clients that send until they are stopped, or until the service is gone."""

    def __init__(self, url: str, record: dict[str, Any] = RECORD, clients: int = 4) -> None:
        self.answers: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.cut = 0
        self._url = url
        self._record = record
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        with httpx.Client(base_url=self._url) as client:
            while not self._stop.is_set():
                try:
                    response = client.post("/predict", json={"records": [self._record] * 2})
                except httpx.TransportError:
                    self.cut += 1
                    return
                if response.status_code == 200:
                    self.answers.append(response.json())
                else:
                    self.failures.append(response.text)

    def wait(self, answers: int) -> None:
        goal = len(self.answers) + answers
        deadline = time.monotonic() + 60
        while len(self.answers) < goal:
            assert time.monotonic() < deadline, self.failures
            time.sleep(0.01)

    @property
    def ids(self) -> list[str]:
        return [p["id"] for a in self.answers for p in a["predictions"]]


def logged(store: Store) -> list[str]:
    return list(read(store, segments(store, "tiny", "predictions"))["_prediction_id"])


def promote(store: Store, manifest: Manifest) -> None:
    rollout.change(store, "tiny", champion=manifest.version, by="test")


@pytest.mark.slow
def test_sigterm_answers_what_it_took_and_empties_the_spool(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    with service(store, tmp_path) as (process, url), Traffic(url) as traffic:
        traffic.wait(200)
        first = traffic.ids[0]
        label = {"labels": [{"id": first, "label": "no"}]}
        assert httpx.post(f"{url}/feedback", json=label).json() == {"accepted": 1}
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert traffic.failures == []
    assert sorted(logged(store)) == sorted(traffic.ids)  # all that was logged was answered, too
    assert labelled(store, "tiny")["_prediction_id"].tolist() == [first]
    assert list((tmp_path / "spool").rglob("*.jsonl")) == []


@pytest.mark.slow
def test_a_swap_under_load_and_a_refused_version(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    old, new, bad = make_bundle(0.02), make_bundle(0.03), make_bundle(0.04)
    store.write(f"{bundle.key('tiny', bad.version)}/model.onnx", b"not a model")
    promote(store, old)
    with service(store, tmp_path) as (_, url), Traffic(url) as traffic:
        traffic.wait(100)
        promote(store, new)
        deadline = time.monotonic() + 30
        while traffic.answers[-1]["version"] != new.version:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        promote(store, bad)
        while not (refused := httpx.get(f"{url}/model").json()["refused"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        traffic.wait(50)
        assert traffic.answers[-1]["version"] == new.version
        assert refused[0]["version"] == bad.version
        text = httpx.get(f"{url}/metrics").text
        assert f'model_load_failures_total{{model="tiny",version="{bad.version}"}}' in text
    assert (traffic.failures, traffic.cut) == ([], 0)
    assert {a["version"] for a in traffic.answers} == {old.version, new.version}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_really_full_disk_refuses_and_heals(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    disk = tmp_path / "spool"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        (disk / "filler").write_bytes(b"x" * 52 * 1024)  # leaves three pages
        with service(store, tmp_path) as (_, url), httpx.Client(base_url=url) as client:
            ids, codes = [], set()
            records = [RECORD] * 40
            for _ in range(20):
                response = client.post("/predict", json={"records": records})
                codes.add(response.status_code)
                if response.status_code == 200:
                    ids += [p["id"] for p in response.json()["predictions"]]
            assert 503 in codes
            assert codes <= {200, 503}
            assert "model_inference_log_failing" in client.get("/metrics").text
            (disk / "filler").unlink()
            response = client.post("/predict", json={"records": records})
            assert response.status_code == 200
            ids += [p["id"] for p in response.json()["predictions"]]
            text = client.get("/metrics").text
            assert 'model_inference_log_failing{model="tiny"} 0.0' in text
        assert sorted(logged(store)) == sorted(ids)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def bentoml_command() -> str:
    command = shutil.which("bentoml", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("the bentoml command is not installed")
    return command


@pytest.mark.slow
def test_bentoml_serve(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> None:
    import bentoml

    manifest = make_bundle()
    promote(store, manifest)
    serve = [bentoml_command(), "serve", "services.tabular:Service", "--host", "127.0.0.1"]
    with service(store, tmp_path, [*serve, "--port"]) as (_, url):
        answer = httpx.post(f"{url}/predict", json={"records": [RECORD]}).json()
        assert answer["version"] == manifest.version
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert "Record" in httpx.get(f"{url}/docs.json").json()["components"]["schemas"]
        bad = httpx.post(f"{url}/predict", json={"records": [{}]})
        assert (bad.status_code, bad.json()["error"]["path"]) == (422, "$.records[0].amount")
        assert 'code="200"' in httpx.get(f"{url}/metrics").text
        with bentoml.SyncHTTPClient(url) as client:
            assert client.predict(records=[RECORD])["version"] == manifest.version
    assert len(logged(store)) == 2


def build_bento(tmp_path: Path, file: str) -> None:
    """What `bentoml build` makes of a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("driftmill", "services", "components", "pipelines"):
        # What others compile just now comes and goes.
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "dist").mkdir()
    environment = os.environ | {"BENTOML_HOME": str(tmp_path / "bentoml")}
    wheel = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    build = [bentoml_command(), "build", "-f", file, "."]
    for command in ([sys.executable, "-c", wheel], build):
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_bentoml_build(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> None:
    manifest = make_bundle()
    promote(store, manifest)
    build_bento(tmp_path, "services/bentofile.yaml")
    serve = [bentoml_command(), "serve", "driftmill-tabular:latest", "--host", "127.0.0.1"]
    with service(store, tmp_path, [*serve, "--port"]) as (_, url):
        answer = httpx.post(f"{url}/predict", json={"records": [RECORD]}).json()
        assert answer["version"] == manifest.version


def test_a_service_without_a_model_says_what_to_set() -> None:
    code = "from services.bento import server; server()"
    environment = {k: v for k, v in os.environ.items() if k != "DRIFTMILL_MODEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "set DRIFTMILL_MODEL" in done.stderr


def test_the_serving_path_needs_neither_pandas_nor_scikit_learn() -> None:
    code = (
        "import sys, services.tabular\n"
        "heavy = {'pandas', 'sklearn', 'torch', 'PIL', 'kfp', 'mlflow', 'evidently'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
