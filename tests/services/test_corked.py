"""Each answer is one write, and every kind of answer comes whole."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from driftmill.serving.server import Receive, Scope, Send
from services.corked import Protocol, _Corked


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers by the path: with a body, without, in parts, or not at all."""
    path = scope["path"]
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    if path == "/fails":
        raise RuntimeError("on purpose")
    length = {"/empty": [(b"content-length", b"0")], "/body": [(b"content-length", b"5")]}
    status = 204 if path == "/none" else 200
    await send({"type": "http.response.start", "status": status, "headers": length.get(path, [])})
    if path == "/half":
        raise RuntimeError("on purpose")
    if path == "/parts":
        for part in (b"ab", b"cd", b"e"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    body = b"hello" if path == "/body" else b""
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(
        app, port=0, http=Protocol, lifespan="off", log_config=None, log_level="critical"
    )
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def answer(port: int, request: str, until: bytes, times: int = 1) -> bytes:
    """What comes on a connection that stays open, up to some bytes of the last answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request.encode())
        got = b""
        while not (got.endswith(until) and got.count(b"HTTP/1.1") == times):
            part = connection.recv(4096)
            assert part, got
            got += part
    return got


@pytest.mark.parametrize(
    ("method", "path", "until"),
    [
        ("GET", "/body", b"\r\n\r\nhello"),
        ("HEAD", "/body", b"content-length: 5\r\n\r\n"),
        ("GET", "/empty", b"content-length: 0\r\n\r\n"),
        ("GET", "/none", b"\r\n\r\n"),
        ("GET", "/parts", b"2\r\nab\r\n2\r\ncd\r\n1\r\ne\r\n0\r\n\r\n"),
    ],
)
def test_answers_come_whole(port: int, method: str, path: str, until: bytes) -> None:
    one = f"{method} {path} HTTP/1.1\r\nhost: a\r\n\r\n"
    assert answer(port, one, until).startswith(b"HTTP/1.1 20")
    pipelined = answer(port, 2 * one, until, times=2)
    assert pipelined.count(b"HTTP/1.1 20") == 2


def test_a_client_that_waits_for_100_gets_it(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        head = "POST /body HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"ab")
        assert connection.recv(4096).endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("path", ["/fails", "/half"])
def test_an_application_that_fails_ends_the_connection(port: int, path: str) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        got = b""
        while part := connection.recv(4096):
            got += part
    assert got.startswith(b"HTTP/1.1 500" if path == "/fails" else b"HTTP/1.1 200")


def test_rubbish_gets_a_400(port: int) -> None:
    assert b"400 Bad Request" in answer(port, "rubbish\r\n\r\n", b"received.")


def test_head_and_body_are_one_write() -> None:
    class Wire(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.written: list[bytes] = []

        def write(self, data: Any) -> None:
            self.written.append(bytes(data))

        def is_closing(self) -> bool:
            return False

    wire = Wire()
    corked = _Corked(wire)
    for data in (b"HTTP/1.1 200 OK\r\n\r\n", b"body", b"more", b"HTTP/1.1 204 No Content\r\n\r\n"):
        corked.write(data)
    corked.flush()
    corked.flush()
    assert wire.written == [
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"more",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ]
