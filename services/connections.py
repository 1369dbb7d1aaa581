"""Connections that cost the service and bring it nothing are closed.

| a client that | is closed after |
|---|---|
| has sent nothing, or only part of a header | `PATIENCE` |
| sends a body slowly | `BODY_TIMEOUT` of `driftmill.serving.server`, with 408 |
| does not take its answer | `PATIENCE` without a byte of it taken |
| has had its answer and is idle | uvicorn's `timeout_keep_alive` |

So each state of a connection has its end, and one whose client has vanished without a word is in
one of them, too: TCP's keepalive would find nothing more. One look a second at all connections
costs the requests nothing.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from driftmill.serving.access import refuse
from driftmill.serving.codec import CLOSE, RETRY, RequestError
from driftmill.serving.server import App, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: Seconds that a client may keep a connection from getting on.
PATIENCE = 10.0
#: Connections beyond the limit that are told so; more are closed at once.
TOLD = 64
#: Files that a process has open besides.
FILES = 256

#: What is answered even then: an orchestrator must not take a full service for a dead one.
_ALWAYS = ("/livez", "/readyz", "/metrics")
_FULL = RequestError(503, "overloaded", "Too many connections", headers=(RETRY, CLOSE))


def make_room(most: int) -> int:
    """Let the process open as many files as so many connections take.

    Returns:
        How many connections there is room for: fewer where the machine allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = most + TOLD + FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return most
    given = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (given, hard))
    room = max(1, given - TOLD - FILES)
    if room < most:
        logger.warning("%d connections at most: a process may open %d files here", room, given)
    return room


def limited(
    most: int, full: Callable[[], None], base: type[HttpToolsProtocol] = HttpToolsProtocol
) -> type[HttpToolsProtocol]:
    """A protocol that holds only so many connections.

    Args:
        most: how many; requests on others get 503.
        full: called for each request, or connection, that is turned away.
        base: uvicorn's protocol, or one made of it.
    """

    class Limited(base):  # type: ignore[valid-type, misc]
        app: App

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            count = len(self.connections)
            if count > most + TOLD:
                full()
                transport.abort()
            elif count > most:
                self.app = partial(_turn_away, self.app, full)

    return Limited


async def _turn_away(
    app: App, full: Callable[[], None], scope: Scope, receive: Receive, send: Send
) -> None:
    if scope["type"] == "http" and scope["path"] in _ALWAYS:

        async def and_close(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        await app(scope, receive, and_close)
        return
    full()
    await refuse(scope, send, _FULL)


class Sweep:
    """Closes connections that do not get on.

    Args:
        connections: those of the server, as it keeps them.
    """

    def __init__(self, connections: Iterable[Any]) -> None:
        self._connections = connections
        #: Where those that may be stuck were, and since when.
        self._seen: dict[Any, tuple[tuple[str, Any], float]] = {}

    def __call__(self, now: float) -> None:
        """Look at all; to be called about once a second.

        Args:
            now: seconds of a clock that never goes back.
        """
        seen = {}
        for connection in list(self._connections):
            where = _where(connection)
            if where is None:
                continue
            known = self._seen.get(connection)
            if known is None or known[0] != where:
                seen[connection] = (where, now)
            elif now - known[1] < PATIENCE:
                seen[connection] = known
            elif where[0] == "answer":
                connection.transport.abort()
            else:
                connection.transport.close()
        self._seen = seen


def _where(connection: HttpToolsProtocol) -> tuple[str, Any] | None:
    """What a connection waits for of its client, and how far it is; None: for nothing, or for the
    next request, or a body, which have times of their own."""
    unsent = connection.transport.get_write_buffer_size()
    if unsent:
        return "answer", unsent
    cycle = connection.cycle
    if connection.timeout_keep_alive_task is None and (cycle is None or cycle.response_complete):
        # One and the same last request: the header of the next has not come meanwhile.
        return "header", cycle
    return None
