"""Tracking against MLflow's own server, on Postgres, with artifacts on S3, behind a password."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from driftmill import rollout, tracking
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.store import Store
from tests.conftest import MOTO_KEY
from tests.postgres import database
from tests.test_tracking import aliases, ended, tracked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the server makes its tables first

USER, PASSWORD = "driftmill", "password-of-the-tests"


@pytest.fixture(scope="module")
def server(postgres: str, moto: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an MLflow server."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("MLflow's passwords need Flask-WTF: pip install 'mlflow[auth]'")
    folder = tmp_path_factory.mktemp("mlflow")

    def base(name: str) -> str:
        return database(postgres, name).replace("postgresql", "postgresql+psycopg")

    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {base('accounts')}\n"
    )
    httpx.put(f"{moto}/driftmill-mlflow").raise_for_status()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "AWS_ENDPOINT_URL": moto,
        "MLFLOW_S3_ENDPOINT_URL": moto,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": MOTO_KEY[0],
        "AWS_SECRET_ACCESS_KEY": MOTO_KEY[1],
    }
    places = ["--backend-store-uri", base("mlflow")]
    places += ["--artifacts-destination", "s3://driftmill-mlflow/artifacts"]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments = ["server", "--app-name", "basic-auth", *places, *address]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process, folder / "log")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.2)  # while it starts


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a Secret gives a step."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    # However busy the machine of the tests is.
    monkeypatch.setattr(tracking, "PATIENCE", 600)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


def test_runs_versions_and_aliases(
    server: str,
    account: None,
    tiny: Contract,
    store: Store,
    make_bundle: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    contract = tracked(tiny, None)
    first, second = make_bundle(0.02), make_bundle(0.03)
    outcome = ended(store, "r1", first)
    said = tracking.record(contract, store, outcome)
    assert re.fullmatch("mlflow run [0-9a-f]{32}", said)
    assert tracking.record(contract, store, outcome) == said
    assert aliases(server) == {"champion": first.version}

    from mlflow import MlflowClient

    client: Any = MlflowClient(server, registry_uri=server)
    run = client.get_run(said.removeprefix("mlflow run "))
    assert run.data.metrics == {"auc": 0.9}
    assert run.info.status == "FINISHED"
    listed = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "verdict.json", "model"} <= listed
    assert len(client.search_model_versions("name = 'tiny'")) == 1

    rollout.change(store, "tiny", challenger=second.version, weight=0.1, by="me")
    assert tracking.mirror(contract, store) == "mirrored"
    assert aliases(server) == {"champion": first.version}  # nobody has registered the second
    tracking.record(contract, store, ended(store, "r2", second))
    assert aliases(server) == {"champion": second.version}
    rollout.rollback(store, "tiny", by="me")
    assert tracking.mirror(contract, store) == "mirrored"
    assert aliases(server) == {"champion": first.version}
    kept = str(outcome) + "".join(map(str, client.search_runs([run.info.experiment_id])))
    assert PASSWORD not in kept


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_is_said(
    server: str,
    tiny: Contract,
    store: Store,
    password: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if password is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    said = tracking.record(tracked(tiny, server), store, ended(store, "r1", None))
    assert said.startswith("unavailable: ")
    assert "401" in said or "not authenticated" in said


def test_a_password_in_the_uri_is_not_repeated(
    tiny: Contract, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://{USER}:{PASSWORD}@127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        rollout.change(store, "tiny", champion="lost", by="me")
        said = tracking.mirror(tracked(tiny, None), store)
    assert said.startswith("unavailable: ")
    assert PASSWORD not in said


def test_a_server_that_hangs_is_given_up(
    tiny: Contract, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    outcome = ended(store, "r1", None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        contract = tracked(tiny, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        said = tracking.record(contract, store, outcome)
        assert time.monotonic() - began < 30
    assert said.startswith("unavailable: ")
    assert "timeout" in said.lower()


class _Slow(BaseHTTPRequestHandler):
    """Knows the experiment, after a while."""

    def do_GET(self) -> None:
        time.sleep(1)
        content = b'{"experiment": {"experiment_id": "1", "name": "tiny"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextmanager
def _slow() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_slow_server_is_given_up(
    tiny: Contract, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer comes in time, and there are too many of them."""
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    outcome = ended(store, "r1", None)
    with _slow() as url:
        said = tracking.record(tracked(tiny, url), store, outcome)
    assert said == "unavailable: the tracking server is slow: not done after 0.5 seconds"


def test_a_database_that_cannot_be_opened(tiny: Contract, store: Store, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    began = time.monotonic()
    contract = tracked(tiny, f"sqlite:///{tmp_path / 'mlflow.db'}")
    said = tracking.record(contract, store, ended(store, "r1", None))
    assert said.startswith("unavailable: ")
    assert time.monotonic() - began < 60
