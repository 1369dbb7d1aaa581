"""A webhook on 127.0.0.1 that remembers what it was sent."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

from tests.http_server import Handler, listening


class Receiver:
    """Use as a context manager; `status` is what it answers."""

    def __init__(self) -> None:
        self.status = 202
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        receiver = self

        class Hook(Handler):
            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.bodies.append({**body, "answered": receiver.status})
                if "Authorization" in self.headers:
                    receiver.authorizations.append(self.headers["Authorization"])
                self.respond(receiver.status, b"")

        self._running = ExitStack()
        self._handler = Hook

    def __enter__(self) -> Receiver:
        self.url = f"{self._running.enter_context(listening(self._handler))}/alerts"
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()
