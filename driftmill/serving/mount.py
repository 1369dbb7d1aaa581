"""Puts the servers of a process before another application, and lets them answer together.

Paths of one model are below `/models/{name}`; those without a name mean the first one. Where there
are several models, or several processes at one port, `/readyz`, `/livez` and `/metrics` speak for
all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from driftmill.serving.access import Access, refuse
from driftmill.serving.codec import CLOSE, JSON, RETRY, RequestError
from driftmill.serving.exposition import merge
from driftmill.serving.metrics import CONTENT_TYPE
from driftmill.serving.server import (
    ROUTES,
    App,
    Receive,
    Response,
    Scope,
    Send,
    Server,
    not_allowed,
    ours,
)

logger = logging.getLogger(__name__)

#: Seconds that the servers get to stop once no request is left. A store that does not answer takes
#: for ever; the log is then moved by the next process.
STOP = 10.0

_MODELS = "/models"
_LIVE = ("/livez", "/v2/health/live")
_READY = ("/readyz", "/v2/health/ready")
_METRICS = "/metrics"
_TOGETHER = (*_LIVE, *_READY, _METRICS)
_READS = ("GET", "HEAD")


class Siblings(Protocol):
    """Other processes at the same port."""

    @property
    def others_ready(self) -> bool:
        """Whether no other one gets requests that it cannot answer."""

    async def may_listen(self, is_ready: Callable[[], bool]) -> None:
        """Wait until this one may listen."""

    def answer(self, metrics: Callable[[], str]) -> None:
        """Tell the others this one's metrics when they ask."""

    async def all_metrics(self) -> str:
        """The metrics of all, with a label for each."""


class Mount:
    """ASGI middleware that puts servers before an application and shares its lifespan.

    Args:
        app: what answers all other paths.
        make: gives the servers, of a model each; at least one.
        access: gives who is let in; None: all are.
        siblings: other processes at the same port; None: there are none.
    """

    def __init__(
        self,
        app: App,
        make: Callable[[], Sequence[Server]],
        access: Callable[[], Access | None] = lambda: None,
        siblings: Siblings | None = None,
    ) -> None:
        servers = make()
        self._app = app
        self._servers = {server.model: server for server in servers}
        self._first = servers[0]
        self._access = access()
        self._siblings = siblings
        #: What the first server answers alone: one look-up for most requests.
        self._plain = ROUTES
        if len(servers) > 1 or siblings is not None:
            self._plain -= frozenset(_TOGETHER)
        if len(servers) > 1:
            for server in servers:
                server.prefix = f"{_MODELS}/{server.model}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        answer: App = self._first
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._with_lifespan(send))
            return
        if scope["type"] != "http":
            answer = self._app
        elif scope["path"] not in self._plain:
            answer, scope = self._find(scope)
        if self._access is not None:
            why = self._access.check(scope)
            if why is not None:
                metrics = self._first.metrics
                (metrics.rate_limited if why.status == 429 else metrics.unauthorized).inc()
                await refuse(scope, send, why)
                return
        await answer(scope, receive, send)

    @property
    def ready(self) -> bool:
        """Whether requests for all models are welcome."""
        return all(server.ready for server in self._servers.values())

    def _find(self, scope: Scope) -> tuple[App, Scope]:
        """Who answers, and what it is asked."""
        path: str = scope["path"]
        if path in _TOGETHER:
            return self._answer_for_all, scope
        if path == _MODELS:
            return self._list, scope
        if path.startswith(f"{_MODELS}/"):
            name, slash, rest = path.removeprefix(f"{_MODELS}/").partition("/")
            path = slash + rest or "/model"
            if name in self._servers and path in ROUTES:
                return self._servers[name], {**scope, "path": path}
            return _nothing, scope
        if path.startswith("/v2/models/"):
            return self._servers.get(path.split("/")[3], self._first), scope
        return (self._first if ours(path) else self._app), scope

    async def _answer_for_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Metrics of all; whether all are alive, or ready: who is not says so."""
        path, servers, who = scope["path"], self._servers.values(), self._first
        if scope["method"] in _READS:
            if path == _METRICS:
                siblings = self._siblings
                text = await siblings.all_metrics() if siblings else self._metrics()
                await self._send(send, text.encode(), CONTENT_TYPE)
                return
            if path in _LIVE:
                who = next((server for server in servers if not server.alive), who)
            else:
                who = next((server for server in servers if not server.ready), who)
                if self.ready and self._siblings is not None and not self._siblings.others_ready:
                    why = {"status": "a worker has no version loaded"}
                    await self._send(send, json.dumps(why).encode(), JSON, 503)
                    return
        await who(scope, receive, send)

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET /models`."""
        if scope["method"] not in _READS:
            await refuse(scope, send, not_allowed(_MODELS, _READS))
            return
        models = []
        for model, server in self._servers.items():
            serving = server.versions.serving
            version = serving.champion.version if serving else None
            models.append({"model": model, "version": version, "ready": server.ready})
        await self._send(send, json.dumps({"models": models}).encode(), JSON)

    def _metrics(self) -> str:
        """Those of this process. What several models have in common is of the first."""
        return merge(("", s.metrics.render().decode()) for s in self._servers.values())

    async def _send(self, send: Send, body: bytes, kind: str, status: int = 200) -> None:
        response = Response(status, body, [(b"content-type", kind.encode())])
        if status == 503:
            response.headers.append(RETRY)
        if self._first.draining:
            response.headers.append(CLOSE)
        for message in response.messages():
            await send(message)

    def _with_lifespan(self, send: Send) -> Send:
        async def around(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start()
            elif message["type"] == "lifespan.shutdown.complete":
                await self._stop()
            await send(message)

        return around

    async def _start(self) -> None:
        for server in self._servers.values():
            await server.start()
        if self._access is not None:
            await self._access.start()
        if self._siblings is not None:
            self._siblings.answer(self._metrics)
            await self._siblings.may_listen(lambda: self.ready)

    async def _stop(self) -> None:
        if self._access is not None:
            await self._access.stop()
        try:
            async with asyncio.timeout(STOP):
                await asyncio.gather(*(server.stop() for server in self._servers.values()))
        except TimeoutError:
            logger.error(
                "stopping takes more than %g s, and is given up: what is left of the inference log "
                "stays in the spool, and the next process moves it",
                STOP,
            )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    why = RequestError(404, "not_found", f"There is nothing at {scope['path']}")
    await refuse(scope, send, why)
