"""Puts the server before another application."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from driftmill.serving.server import App, Receive, Scope, Send, Server, ours


class Mount:
    """ASGI middleware that puts a server before an application and shares its lifespan.

    Args:
        app: what answers all other paths.
        make: gives the server.
    """

    def __init__(self, app: App, make: Callable[[], Server]) -> None:
        self._app = app
        self._server = make()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "http" and ours(scope["path"]):
            await self._server(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, self._with_lifespan(send))
        else:
            await self._app(scope, receive, send)

    def _with_lifespan(self, send: Send) -> Send:
        async def around(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._server.start()
            elif message["type"] == "lifespan.shutdown.complete":
                await self._server.stop()
            await send(message)

        return around
