"""The store on S3: what only a server across a network can do to it.

What all stores promise is in `test_store.py`, and runs on S3 as well.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from driftmill import rollout, s3
from driftmill.store import Store


class Proxy:
    """Passes bytes between a client and a server, and spoils an answer where it is told to.

    Attributes:
        lose: how many answers with status 200 to lose; the request has been done.
        cut: after how many bytes to cut the next answers off, and how many of them.
    """

    def __init__(self, upstream: str) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose = 0
        self.cut = (0, 0)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)
            threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while content := client.recv(1 << 16):
                server.sendall(content)
        except OSError:
            pass

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        try:
            while content := server.recv(1 << 16):
                if self.lose and content.split(b" ")[1] == b"200":
                    self.lose -= 1
                    break
                size, times = self.cut
                if times and passed + len(content) > size:
                    self.cut = (size, times - 1)
                    client.sendall(content[: size - passed])
                    break
                client.sendall(content)
                passed += len(content)
        except OSError:
            pass
        for side in (client, server):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)  # unlike close, also while another thread reads
            side.close()


@pytest.fixture
def proxy(s3_moto: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of moto, which the environment names as the endpoint."""
    between = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    s3._client.cache_clear()
    yield between
    between.close()


@contextmanager
def requests() -> Iterator[list[str]]:
    """The requests that leave this process."""
    sent: list[str] = []

    def note(request: object, **_: object) -> None:
        sent.append(request.method)  # type: ignore[attr-defined]

    events = s3.connect().meta.events
    events.register("before-send.s3", note)
    yield sent
    events.unregister("before-send.s3", note)


def test_a_poll_of_an_unchanged_rollout_is_one_look_up(s3_uri: str) -> None:
    store = Store(s3_uri)
    rollout.change(store, "m", champion="a", by="me")
    with requests() as sent:
        assert rollout.read(store, "m", after=1) is None
    assert sent == ["HEAD"]
    with requests() as sent:
        store.read("m/rollout/00000001.json")
    assert sent == ["GET"]


def test_what_another_process_wrote_is_seen_at_once(s3_uri: str) -> None:
    here = Store(s3_uri)
    code = "import sys; from driftmill.store import Store; Store(sys.argv[1]).{}"
    assert not here.exists("m/a/1")
    assert here.list("m") == []

    def there(call: str) -> None:
        subprocess.run([sys.executable, "-c", code.format(call), s3_uri], check=True, timeout=60)

    there("write('m/a/1', b'1')")
    assert here.exists("m/a/1")
    assert here.list("m") == ["m/a/1"]
    there("delete('m/a/1')")
    assert not here.exists("m/a/1")
    assert here.list("m") == []


def test_a_prefix_keeps_to_itself(s3_uri: str) -> None:
    store, beside = Store(f"{s3_uri}/a"), Store(f"{s3_uri}/ab")
    store.write("m/1", b"1")
    beside.write("m/2", b"2")
    assert store.list("") == ["m/1"]
    assert Store(s3_uri).list("a") == ["a/m/1"]


def test_more_objects_than_one_page(s3_moto: str) -> None:
    def small(params: dict[str, object], **_: object) -> None:
        params["MaxKeys"] = 10

    s3.connect().meta.events.register("before-parameter-build.s3.ListObjectsV2", small)
    store = Store(s3_moto)
    for n in range(25):
        store.write(f"m/{n:04d}", b"")
    with requests() as sent:
        assert store.list("m") == [f"m/{n:04d}" for n in range(25)]
    assert sent == ["GET"] * 3


def test_names_that_need_quoting(s3_uri: str) -> None:
    store = Store(s3_uri)
    keys = sorted(["m/a b+c=%20.json", "m/ä/ü.json", "m/x&y?.json"])
    for key in keys:
        store.write(key, key.encode())
    assert store.list("m") == keys
    assert [store.read(key).decode() for key in keys] == keys


def test_a_large_file_goes_in_parts(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "WHOLE", 6 << 20)
    monkeypatch.setattr(s3, "PART", 5 << 20)
    folder = tmp_path / "f"
    folder.mkdir()
    content = bytes(range(256)) * (13 << 12)  # 13 MiB
    (folder / "model.onnx").write_bytes(content)
    (folder / "manifest.json").write_text("{}")
    store = Store(s3_uri)
    with requests() as sent:
        store.put_folder(folder, "m/bundles/1", "manifest.json")
    assert sent.count("POST") == 2  # begin and complete
    assert sent.count("PUT") == 3 + 1
    got = store.get_folder("m/bundles/1", tmp_path / "copy", "manifest.json")
    assert (got / "model.onnx").read_bytes() == content


def test_a_lost_answer_to_create_is_not_a_conflict(proxy: Proxy, s3_moto: str) -> None:
    """botocore tries again, and then finds the object that it has itself written."""
    store = Store(s3_moto)
    store.create("m/0", b"")
    proxy.lose = 1
    assert rollout.change(store, "m", champion="a", by="me").revision == 1
    assert proxy.lose == 0
    with pytest.raises(FileExistsError):
        store.create("m/rollout/00000001.json", b"")
    # Not even with the same content.
    with pytest.raises(FileExistsError):
        store.create("m/0", b"")


def test_a_body_that_breaks_off_is_read_on(proxy: Proxy, s3_moto: str, tmp_path: Path) -> None:
    store = Store(s3_moto)
    content = bytes(range(256)) * 4096
    store.write("m/x", content)
    proxy.cut = (300_000, 2)
    assert store.read("m/x") == content
    assert proxy.cut == (300_000, 0)
    proxy.cut = (300_000, 1)
    store.get_file("m/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    proxy.cut = (300_000, 100)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        store.read("m/x")


def test_a_server_that_ignores_conditions_is_found_out(
    s3_moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unconditional(params: dict[str, object], **_: object) -> None:
        params["headers"].pop("If-None-Match", None)  # type: ignore[attr-defined]

    monkeypatch.setattr(s3, "_exclusive", set())
    s3.connect().meta.events.register("before-call.s3.PutObject", unconditional)
    with pytest.raises(OSError, match=r"ignores If-None-Match.*use a store with conditional"):
        Store(s3_moto).create("m/1", b"")


def failing(uri: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """What a store says that cannot be used."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._client.cache_clear()
    store = Store(uri)
    said = set()
    for call in (
        lambda: store.exists("m/x"),
        lambda: store.list("m"),
        lambda: store.create("m/x", b""),
    ):
        with pytest.raises(OSError, match="AWS_") as caught:
            call()
        said.add(f"{type(caught.value).__name__}: {caught.value}")
        assert "secret" not in str(caught.value)
    assert len(said) == 1
    return said.pop()


def test_no_server(s3_moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        endpoint = f"http://user:secret@{place}"
        said = failing(s3_moto, monkeypatch, AWS_ENDPOINT_URL=endpoint)
    assert said.startswith(f"ConnectionError: the store {s3_moto} at {place} cannot be reached")


def test_a_server_that_does_not_answer(s3_moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ANSWER", 0.3)
    monkeypatch.setattr(s3, "TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        said = failing(s3_moto, monkeypatch, AWS_ENDPOINT_URL=endpoint)
        assert time.monotonic() - began < 10
    assert said.startswith(f"TimeoutError: the store {s3_moto}")


def test_no_credentials(s3_moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    said = failing(s3_moto, monkeypatch)
    assert "PermissionError: no credentials for the store" in said
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "NoCredentialsError" in failing(s3_moto, monkeypatch)
    # They may come later: nothing has to be started again.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert not Store(s3_moto).exists("m/x")


def test_a_wrong_password(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_server)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        s3._client.cache_clear()
        with pytest.raises(PermissionError, match=r"let this account list 'm' .*; check the cred"):
            store.list("m")
        with pytest.raises(PermissionError, match="does not let this account look up 'm/x'"):
            store.exists("m/x")
    s3._client.cache_clear()


def test_an_endpoint_that_is_no_url(s3_moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = failing(s3_moto, monkeypatch, AWS_ENDPOINT_URL="user:secret@host")
    assert said == "OSError: AWS_ENDPOINT_URL is not a URL such as https://s3.example.org"


def test_no_bucket(s3_uri: str) -> None:
    store = Store("s3://no-such-bucket-here/p")
    for call in (
        lambda: store.list("m"),
        lambda: store.read("m/x"),
        lambda: store.write("m/x", b""),
        lambda: store.create("m/x", b""),
    ):
        with pytest.raises(OSError, match="no bucket no-such-bucket-here; create it") as caught:
            call()
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("uri", ["s3://", "s3://key:secret@bucket/p", "s3://bucket?x=1"])
def test_uris_that_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="a store on S3 is named") as caught:
        Store(uri)
    assert "secret" not in str(caught.value)


def test_many_threads_share_a_store(s3_uri: str) -> None:
    store = Store(s3_uri)
    problems: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(10):
                store.write(f"m/{n}/{i}", str(n).encode())
                assert store.read(f"m/{n}/{i}") == str(n).encode()
        except (AssertionError, OSError) as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(store.list("m")) == 160
