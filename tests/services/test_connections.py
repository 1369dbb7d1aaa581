"""Connections that bring nothing, over real sockets: closed, and meanwhile in nobody's way."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from driftmill.serving.server import Receive, Scope, Send
from driftmill.store import Store
from services import connections
from services.connections import limited
from services.drain import Drainer
from tests.services.test_tabular import MODULE, RECORD, ROOT, MakeBundle, promote, service

#: More than the kernel keeps for a client that reads nothing.
LARGE = 32 * 1024 * 1024


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers little, or much to `/large`, after the whole body has come."""
    while (await receive()).get("more_body"):
        pass
    body = b"x" * (LARGE if scope["path"] == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(protocol: type[HttpToolsProtocol] = HttpToolsProtocol) -> Iterator[int]:
    """The port of a server in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            app,
            http=protocol,
            loop="uvloop",
            ws="none",
            lifespan="off",
            log_level="warning",
            timeout_keep_alive=75,
        )
        server = Drainer(config, 0, begin=lambda: None, is_ready=lambda: True)
        thread = threading.Thread(target=asyncio.run, args=(server._serve([listening]),))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=30)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed it; what it has sent before is thrown away."""
    connection.settimeout(0)
    try:
        while content := connection.recv(1 << 16):
            if b"HTTP" in content:
                return False
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def request(connection: http.client.HTTPConnection, path: str = "/") -> int:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


def test_who_sends_no_header_is_closed_and_who_is_idle_or_sends_a_body_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    with serving() as port, ExitStack() as stack:

        def client() -> socket.socket:
            return stack.enter_context(connect(port))

        silent, partial, second, body = client(), client(), client(), client()
        partial.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
        # The second request of a connection, too.
        second.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"xx"):
            answer += second.recv(4096)
        second.sendall(b"GET / HTT")
        body.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nxx")
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        assert request(idle) == 200
        same = idle.sock
        slow, sent = client(), b"GET / HTTP/1.1\r\nhost: "
        slow.sendall(sent)

        def trickle() -> bool:
            with suppress(OSError):
                slow.sendall(b"a")
            return is_closed(slow)

        until(lambda: all([trickle(), *map(is_closed, (silent, partial, second))]))
        assert request(idle) == 200
        assert idle.sock is same
        body.sendall(b"xx")
        assert b"200" in body.recv(4096)


def test_who_does_not_read_its_answer_is_cut_off_and_who_reads_slowly_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 2.0)
    ask = b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    with serving() as port, connect(port) as deaf, connect(port) as slow:
        deaf.sendall(ask)
        slow.sendall(ask)
        got = 0
        began = time.monotonic()
        # Longer than any may take that gets nothing.
        while time.monotonic() < began + 6:
            got += len(slow.recv(1 << 18))
            time.sleep(0.1)
        while content := slow.recv(1 << 20):
            got += len(content)
        assert got > LARGE

        def read_rest() -> int:
            rest = 0
            with suppress(ConnectionResetError):
                while content := deaf.recv(1 << 20):
                    rest += len(content)
            return rest

        assert read_rest() < LARGE


def test_beyond_the_limit_requests_are_turned_away_and_health_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "TOLD", 2)
    turned_away: list[None] = []
    with serving(limited(2, lambda: turned_away.append(None))) as port:
        held = [connect(port) for _ in range(2)]
        third = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        third.request("GET", "/predict")
        response = third.getresponse()
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert response.headers["connection"] == "close"
        assert json.loads(response.read())["error"]["code"] == "overloaded"
        # Closed by the answer, so that the next is a new connection.
        third.request("GET", "/livez")
        response = third.getresponse()
        assert (response.status, response.headers["connection"]) == (200, "close")
        response.read()
        assert len(turned_away) == 1
        # Those that say nothing are not even told.
        held += [connect(port) for _ in range(2)]
        with connect(port) as last:
            until(lambda: is_closed(last))
        for connection in held:
            connection.close()

        def is_welcome() -> bool:
            again = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with suppress(OSError, http.client.HTTPException):
                return request(again) == 200
            return False

        until(is_welcome)


def test_a_process_may_open_the_files_that_its_connections_take() -> None:
    code = (
        "import resource, sys\n"
        "from services.connections import make_room\n"
        "soft, hard = map(int, sys.argv[1:3])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "print(make_room(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )

    def room(soft: int, hard: int) -> list[int]:
        command = [sys.executable, "-c", code, str(soft), str(hard)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000:
        pytest.skip("a process may not open enough files here")
    needed = 1000 + connections.TOLD + connections.FILES
    assert room(2000, 2000) == [1000, 2000]
    assert room(256, 2000) == [1000, needed]
    assert room(256, needed - 100) == [900, needed - 100]


@pytest.mark.slow
def test_500_connections_that_send_byte_by_byte_are_in_nobodys_way(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    with service(store, tmp_path, [*MODULE[:-1], "--max-connections", "600", MODULE[-1]]) as (
        _,
        url,
    ):
        port = int(url.rpartition(":")[2])
        slow = [connect(port) for _ in range(500)]
        # Clients that vanish, as far as the service can know: they send, and close nothing.
        vanished = [connect(port) for _ in range(20)]
        for connection in vanished[10:]:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-le")
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"records": [RECORD]})
        answered = 0
        left = slow + vanished
        deadline = time.monotonic() + 60
        while left:
            assert time.monotonic() < deadline
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"x")
            client.request("POST", "/predict", body, {"content-type": "application/json"})
            response = client.getresponse()
            response.read()
            assert response.status == 200
            answered += 1
            left = [connection for connection in left if not is_closed(connection)]
        assert answered > 50
        for connection in slow + vanished:
            connection.close()
