"""A service is replaced under load, by clients that never try twice."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.rollouts import Switch
from driftmill import bundle, rollout
from driftmill.store import Store
from tests.services.test_tabular import MODULE, RECORD, MakeBundle, logged, service
from tests.test_store_s3 import Proxy

BODY = json.dumps({"records": [RECORD]})
HEADERS = {"content-type": "application/json"}


class Clients:
    """Clients that keep their connection for as long as the server lets them, and count."""

    def __init__(self, port: int, number: int = 6) -> None:
        self.ok = 0
        self.failed: list[str] = []
        self._port = port
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        pause = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        while not self._stopped.is_set():
            try:
                connection.request("POST", "/predict", BODY, HEADERS)
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    self.failed.append(str(response.status))
                self.ok += 1
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
            # Some come at once, some leave the connection idle for a moment.
            self._stopped.wait(pause.choice((0, 0.001, 0.02)))
        connection.close()


def replace(store: Store, folder: Path, drain: float, times: int) -> tuple[Clients, list[int]]:
    """Let services replace each other under load: one gets SIGTERM, and only a moment later the
    network sends nothing more to it. The clients, and the exit codes of the services."""
    switch = Switch()
    command = [*MODULE[:-1], "--drain-seconds", str(drain), MODULE[-1]]
    codes: list[int] = []
    with ExitStack() as stack:
        old, url = stack.enter_context(service(store, folder / "0", command))
        switch.to = [int(url.rpartition(":")[2])]
        with Clients(switch.port) as clients:
            for number in range(1, times + 1):
                new, url = stack.enter_context(service(store, folder / str(number), command))
                port = int(url.rpartition(":")[2])
                switch.to = [*switch.to, port]
                time.sleep(0.3)  # load on both
                old.send_signal(signal.SIGTERM)
                time.sleep(0.3)  # the time in which nobody knows yet
                switch.to = [port]
                codes.append(old.wait(30))
                old = new
    return clients, codes


@pytest.fixture
def served(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> Store:
    """A store with a model that serves."""
    rollout.change(store, "tiny", champion=make_bundle().version, by="test", reason="first")
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    return store


@pytest.mark.slow
def test_a_service_is_replaced_and_no_request_fails(served: Store, tmp_path: Path) -> None:
    clients, codes = replace(served, tmp_path, drain=10, times=2)
    assert clients.failed == []
    assert clients.ok > 500
    assert codes == [0, 0]


@pytest.mark.slow
def test_without_the_drain_requests_fail(served: Store, tmp_path: Path) -> None:
    """What the test above would see if the drain did nothing."""
    clients, _ = replace(served, tmp_path, drain=0, times=1)
    assert clients.failed


def test_an_idle_connection_holds_the_end_up_no_longer_than_the_drain(
    served: Store, tmp_path: Path
) -> None:
    command = [*MODULE[:-1], "--drain-seconds", "2", MODULE[-1]]
    with service(served, tmp_path, command) as (process, url), httpx.Client(base_url=url) as client:
        assert client.get("/livez").status_code == 200
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while client.get("/readyz").json()["status"] != "draining":
            assert process.poll() is None
        # Asked once more, it closes; a second connection is opened and left alone.
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            assert process.wait(10) == 0
        assert 1.5 < time.monotonic() - began < 6


def test_a_second_signal_ends_the_drain(served: Store, tmp_path: Path) -> None:
    command = [*MODULE[:-1], "--drain-seconds", "30", MODULE[-1]]
    with service(served, tmp_path, command) as (process, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=url) as client:
                while client.get("/readyz").json()["status"] != "draining":
                    assert process.poll() is None
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(10)
        assert time.monotonic() - began < 5


def test_on_a_loopback_it_ends_at_once(served: Store, tmp_path: Path) -> None:
    with service(served, tmp_path) as (process, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(10)
        assert time.monotonic() - began < 5


class HangingProxy(Proxy):
    """Takes requests and gives no answer, for as long as `hangs` is set."""

    hangs = False

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while content := client.recv(1 << 16):
                if not self.hangs:
                    server.sendall(content)


@pytest.mark.slow
def test_a_store_that_does_not_answer_holds_the_end_up_for_seconds_and_loses_nothing(
    store: Store,
    make_bundle: MakeBundle,
    s3_moto: str,
    moto: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = make_bundle().version
    on_s3 = Store(s3_moto)
    assert store.folder is not None
    key = bundle.key("tiny", version)
    on_s3.put_folder(store.folder / key, key, bundle.MANIFEST)
    rollout.change(on_s3, "tiny", champion=version, by="test", reason="first")
    proxy = HangingProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    command = [*MODULE[:-1], "--drain-seconds", "1", MODULE[-1]]
    with service(on_s3, tmp_path, command) as (process, url):
        proxy.hangs = True
        response = httpx.post(f"{url}/predict", content=BODY, headers=HEADERS)
        (answer,) = response.json()["predictions"]
        process.terminate()
        # A look-up alone takes the client of the store longer than this to give up.
        assert process.wait(25) == 0
    assert list((tmp_path / "spool").rglob("*.jsonl"))
    proxy.hangs = False
    with service(on_s3, tmp_path, command) as (process, url):
        process.terminate()
        assert process.wait(25) == 0
    proxy.close()
    assert logged(on_s3) == [answer["id"]]
