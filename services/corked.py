"""Uvicorn's HTTP/1.1, with the head and the body of an answer in one write.

Uvicorn writes the head when it has it and the body when that comes. For small answers the second
system call, and the second packet that wakes the client, are a good part of the whole request.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class _Corked:
    """A transport that keeps the head of an answer until there is more to write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._write = transport.write
        # What each request asks for; the rest goes through `__getattr__`.
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write, or keep the head of an answer; that of a 100 is all there is of it."""
        if self._head:
            head, self._head = self._head, b""
            self._write(head + data)
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
        else:
            self._write(data)

    def flush(self) -> None:
        """Write what was kept: an answer without a body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Write what was kept, and close."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(_Corked(transport))  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        """Called when an answer is complete."""
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
