"""The service of one model: an ASGI handler with everything that a request needs.

One process, one event loop. A request is read and checked here, waits for its batch (`batches`) of
the version that serves (`versions`), and is answered. Images are decoded in threads, unless tiny.

Routes: `POST /predict`, `POST /explain`, `POST /feedback`, `GET /model`, `/livez`, `/readyz`,
`/metrics`, `/docs.json`, and the Open Inference Protocol below `/v2`. All other paths go to the
application that the handler is wrapped around.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftmill import rollout
from driftmill.home import cores
from driftmill.serving import arrow, open_inference
from driftmill.serving.batches import Batches, Waiting, too_late
from driftmill.serving.codec import (
    ARROW,
    CLOSE,
    JSON,
    RETRY,
    RequestError,
    is_json,
    media_type,
)
from driftmill.serving.explain import Explainer
from driftmill.serving.log import Label, Log, now_us
from driftmill.serving.metrics import CONTENT_TYPE, Metrics
from driftmill.serving.openapi import openapi
from driftmill.serving.tracing import Lines, Tracing
from driftmill.serving.versions import Model, Serving, Versions
from driftmill.store import Store

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Requests that may be in the process at once, their bodies being read included.
MAX_REQUESTS = 1024
#: Seconds that the rest of a body may take.
BODY_TIMEOUT = 10.0
#: Images that are decoded at once.
_DECODERS = min(4, cores())

_METHODS = {
    "/predict": ("POST",),
    "/feedback": ("POST",),
    "/explain": ("POST",),
    "/model": ("GET", "HEAD"),
    "/livez": ("GET", "HEAD"),
    "/readyz": ("GET", "HEAD"),
    "/metrics": ("GET", "HEAD"),
    "/docs.json": ("GET", "HEAD"),
}
#: Paths of one model, but for the Open Inference Protocol's.
ROUTES = frozenset(_METHODS)
#: Paths of the Open Inference Protocol begin so.
_V2 = "/v2"
_JSON = (b"content-type", b"application/json")
_ARROW = (b"content-type", ARROW.encode())
_PATIENCE = b"x-request-timeout"
_V2_MODEL = re.compile(
    r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/(?P<rest>infer|ready))?/?"
)


@dataclass(slots=True)
class Request:
    """A request for predictions or with labels, its body read."""

    body: bytes
    id: str
    """Its name, in answers and in the log."""
    key: str = ""
    """By what the rollout chooses who answers; empty: by `id`."""
    kind: str = JSON
    """Content type."""
    wants: str = JSON
    """Content type of the answer."""
    patience: float | None = None
    """Seconds that its client waits; None: as long as the contract says."""
    span: Span | None = None
    """Of its trace; None where nobody asked for any."""


@dataclass
class Response:
    """An answer, ready to be sent."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: [_JSON])

    def messages(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """ASGI's, in the order in which they are sent."""
        size = (b"content-length", str(len(self.body)).encode())
        start = {"status": self.status, "headers": [*self.headers, size]}
        return (
            {"type": "http.response.start", **start},
            {"type": "http.response.body", "body": self.body},
        )


class Server:
    """Serves one model.

    Args:
        store: where bundles, rollout and log lie.
        model: the model's name.
        spool: local folder of the inference log before it moves into the store.
        cache: local folder for bundles of a remote store.
    """

    def __init__(self, store: Store, model: str, spool: Path, cache: Path | None = None) -> None:
        self.model = model
        self.log = Log(spool, store, model)
        self.metrics = Metrics(model, self.log)
        self.versions = Versions(store, model, cache, self.metrics, self._set_up)
        self.batches = Batches(model, self.versions, self.log, self.metrics, self.new_id)
        self.explainer = Explainer(store, model)
        self.lines = Lines(model)
        self._tracing: Tracing | None = None
        self.draining = False
        #: Where its paths are, if it is not the only model.
        self.prefix = ""
        self._id_prefix = secrets.token_hex(8)
        self._id_count = 0
        self._requests = 0
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")

    # Life

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        return self.versions.serving is not None and not self.draining

    @property
    def alive(self) -> bool:
        """Whether all that runs in the background does."""
        return self.versions.alive and self.log.alive

    async def start(self) -> None:
        """Start the log and the poll of the rollout; the first version loads in the background."""
        self.log.start()
        self.versions.start()

    def drain(self) -> None:
        """Ask clients to leave: not ready any more, and no connection outlives its next answer."""
        logger.info("%s drains", self.model)
        self.draining = True

    async def stop(self) -> None:
        """Finish what waits and move the log into the store."""
        self.draining = True
        await self.versions.stop()
        await self.batches.stop()
        await asyncio.to_thread(self.explainer.stop)
        await asyncio.to_thread(self._decoders.shutdown)
        await asyncio.to_thread(self.log.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)

    def trace(self, tracing: Tracing) -> None:
        """Make a span of every request from now on, and send what is left at the stop."""
        self._tracing = tracing
        self.batches.traced = True

    def _set_up(self, champion: Model) -> None:
        """Take a new champion's settings."""
        self.log.configure(champion.settings.log)

    # Requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to a path that is `ours`."""
        path = scope["path"]
        v2 = path not in _METHODS
        asks = path == "/predict" or (v2 and path.endswith("/infer"))
        started = time.perf_counter()
        request_id = ""
        version = why = ""
        tracing, span = self._tracing, None
        if tracing is not None and scope["method"] == "POST":
            span = tracing.begin(scope)
        self._requests += 1
        try:
            methods = _METHODS.get(path) or _v2_methods(path)
            if scope["method"] not in methods:
                raise not_allowed(path, methods)
            if scope["method"] == "POST":
                request = await self._receive(scope, receive)
                request_id = request.id
                request.span = span
            if asks:
                answer = self._infer(scope, request) if v2 else self.predict(request)
                champion = self._serving().champion
                if champion.codec.threaded:
                    wait = _most(champion.settings.timeout, request.patience)
                    answer = _while_connected(answer, receive, wait)
                response, version = await answer
            elif path == "/feedback":
                response = self.feedback(request.body)
            elif path == "/explain":
                wait = _most(self._serving().champion.settings.timeout, request.patience)
                explaining = self.explain(request)
                response, version = await _while_connected(explaining, receive, wait)
            else:
                response = self._get_v2(path) if v2 else self._get(path)
        except RequestError as error:
            response = refusal(path, error)
            why = error.message
        finally:
            self._requests -= 1
        if request_id:
            response.headers.append((b"x-request-id", request_id.encode()))
        if self.draining and CLOSE not in response.headers:
            response.headers.append(CLOSE)
        if asks:
            self.metrics.request(version, response.status)
            self.metrics.seconds.observe(time.perf_counter() - started)
        elif path == "/explain":
            self.metrics.explained(response.status, time.perf_counter() - started)
        if tracing is not None and span is not None:
            ended = span, _route(path), response.status, self.model, version, request_id
            response.headers.append(tracing.end(*ended))
        if response.status >= 400 or self.lines.every:
            seconds = time.perf_counter() - started
            self.lines.write(scope, response.status, seconds, request_id, version, why, span)
        for message in response.messages():
            await send(message)

    async def predict(self, request: Request, version: str | None = None) -> tuple[Response, str]:
        """The answer to a request for predictions, and the version that gave it.

        Args:
            request: whose body is that of `POST /predict`.
            version: who must answer; None leaves it to the rollout.

        Raises:
            RequestError: there is no answer.
        """
        since = time.perf_counter()
        serving = self._serving()
        role = (
            serving.role(request.key or request.id) if version is None else serving.role_of(version)
        )
        champion = serving.champion
        codec = champion.codec
        records = codec.records(request.body, request.kind)
        batches = self.batches
        batches.check_room(codec, len(records))
        loop = asyncio.get_running_loop()
        decoded = codec.decode_now(records)
        if decoded is None:
            batches.rows += len(records)
            try:
                decoded = await loop.run_in_executor(self._decoders, codec.decode, records)
            finally:
                batches.rows -= len(records)
        deadline = since + _most(champion.settings.timeout, request.patience)
        answered: asyncio.Future[tuple[Model, bytes]] = loop.create_future()
        waiting = Waiting(request.id, decoded, serving, role, since, deadline, answered)
        batches.put(waiting)
        model, body = await answered
        if self._tracing is not None and request.span is not None:
            self._tracing.answered(request.span, waiting, model)
        if request.wants == ARROW:
            body = arrow.answer(body, codec.signature)
            return Response(200, body, [_ARROW, model.header]), model.version
        return Response(200, body, [_JSON, model.header]), model.version

    def feedback(self, body: bytes) -> Response:
        """The answer to a body of `POST /feedback`. Raises RequestError."""
        champion = self._serving().champion
        given = champion.codec.labels(body)
        at = now_us()
        rows = [Label(label.id, at, label.label) for label in given]
        if self.batches.append(champion, champion.label_schema, rows):
            self.metrics.logged_labels.inc(len(rows))
        self.metrics.feedback.inc(len(rows))
        return Response(200, b'{"accepted":%d}' % len(rows))

    async def explain(self, request: Request) -> tuple[Response, str]:
        """The answer to a request of `POST /explain`, and the version that it is about: the one
        that answers a prediction with the same id or key. Raises RequestError."""
        serving = self._serving()
        model = serving.model(serving.role(request.key or request.id))
        body = await self.explainer.explain(model, request.body, request.kind)
        return Response(200, body, [_JSON, model.header]), model.version

    async def _infer(self, scope: Scope, request: Request) -> tuple[Response, str]:
        """The answer to an inference request of the Open Inference Protocol, and who gave it."""
        _, named, _ = self._named(scope["path"])
        signature = self._serving().champion.bundle.signature
        size = dict(scope["headers"]).get(open_inference.JSON_SIZE)
        request.body, asked = open_inference.to_predict(request.body, size, signature)
        request.kind = JSON
        response, version = await self.predict(request, named)
        response.body, json_size = open_inference.from_predict(
            response.body, asked, request.id, signature
        )
        if json_size is not None:
            response.headers[0] = (b"content-type", open_inference.BINARY.encode())
            response.headers.append((open_inference.JSON_SIZE, str(json_size).encode()))
        return response, version

    def _get_v2(self, path: str) -> Response:
        """The answer to the other requests of the Open Inference Protocol. Raises RequestError."""
        match path.removeprefix(_V2).strip("/"):
            case "":
                return Response(200, json.dumps(open_inference.server_metadata()).encode())
            case "health/live":
                return _flag(self.alive, {"live": self.alive})
            case "health/ready":
                return _flag(self.ready, {"ready": self.ready})
        model, version, rest = self._named(path)
        serving = self._serving()
        if version is not None:
            serving.role_of(version)
        if rest == "ready":
            return _flag(self.ready, {"name": model, "ready": self.ready})
        versions = [m.version for m in (serving.champion, serving.challenger) if m is not None]
        signature = serving.champion.bundle.signature
        metadata = open_inference.model_metadata(model, versions, signature)
        return Response(200, json.dumps(metadata).encode())

    def _named(self, path: str) -> tuple[str, str | None, str]:
        """Model, version and the rest of `/v2/models/{model}[/versions/{version}][/{rest}]`. Raises
        RequestError (404)."""
        match = _V2_MODEL.fullmatch(path)
        if match is None or match["model"] != self.model:
            raise RequestError(404, "not_found", f"There is nothing at {path}")
        return match["model"], match["version"], match["rest"] or ""

    def _serving(self) -> Serving:
        serving = self.versions.serving
        if serving is None:
            raise RequestError(
                503, "not_ready", f"No version of {self.model} is loaded yet", headers=(RETRY,)
            )
        return serving

    async def _receive(self, scope: Scope, receive: Receive) -> Request:
        """A request with its body. Raises RequestError."""
        headers = dict(scope["headers"])
        request_id = _visible(headers, "X-Request-Id") if b"x-request-id" in headers else ""
        key = _visible(headers, "X-Routing-Key") if b"x-routing-key" in headers else ""
        patience = _patience(headers[_PATIENCE]) if _PATIENCE in headers else None
        kind = headers.get(b"content-type", _JSON[1]).decode("latin-1")
        champion = self._serving().champion
        if scope["path"] in ("/predict", "/explain"):
            champion.codec.check_kind(kind)
        elif not is_json(kind) and not (
            media_type(kind) == open_inference.BINARY and scope["path"].endswith("/infer")
        ):
            raise RequestError(415, "unsupported_media_type", f"Send Content-Type: {JSON}")
        if headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise RequestError(415, "unsupported_encoding", "Send the body uncompressed")
        if self._requests > MAX_REQUESTS:
            self.metrics.rejected.inc()
            raise RequestError(
                503,
                "overloaded",
                "Too many requests at once",
                headers=(RETRY, CLOSE),
            )
        limit = champion.settings.max_body_bytes
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length[:20]) > limit:
                raise _too_large(limit)
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    body = await _rest(receive, body, limit)
            except TimeoutError:
                raise RequestError(
                    408,
                    "body_timeout",
                    f"The body did not come within {BODY_TIMEOUT:.0f} s",
                    headers=(CLOSE,),
                ) from None
        if len(body) > limit:
            raise _too_large(limit)
        wants = JSON
        if ARROW in kind and ARROW.encode() in headers.get(b"accept", b""):
            wants = ARROW
        return Request(body, request_id or self.new_id(), key, kind, wants, patience)

    def _get(self, path: str) -> Response:
        match path:
            case "/livez":
                if not self.alive:
                    return Response(503, b'{"status":"a background task has ended"}')
                return Response(200, b'{"status":"alive"}')
            case "/readyz":
                if not self.ready:
                    status = "draining" if self.draining else "no version is loaded"
                    return Response(503, json.dumps({"status": status}).encode(), [_JSON, RETRY])
                return Response(200, b'{"status":"ready"}')
            case "/metrics":
                headers = [(b"content-type", CONTENT_TYPE.encode())]
                return Response(200, self.metrics.render(), headers)
            case "/docs.json":
                serving = self.versions.serving
                champion = serving.champion if serving else None
                codec = champion.codec if champion else None
                explains = champion.settings.explain if champion else None
                document = openapi(self.model, codec, explains, self.prefix)
                return Response(200, json.dumps(document).encode())
            case _:
                return Response(200, json.dumps(self.describe()).encode())

    def describe(self) -> dict[str, Any]:
        """What `GET /model` answers; `version` is null before the first version is loaded."""
        serving = self.versions.serving
        answer: dict[str, Any] = {
            "model": self.model,
            "version": None,
            "challenger": None,
            "rollout": None,
            "refused": list(self.versions.refused),
        }
        if serving is None:
            return answer
        manifest = serving.champion.bundle.manifest
        return answer | {
            "version": manifest.version,
            "challenger": serving.challenger.version if serving.challenger else None,
            "rollout": rollout.to_dict(serving.rollout),
            "digests": manifest.files,
            "created": manifest.created.isoformat(),
            "family": manifest.family,
            "metrics": manifest.metrics,
            "schema": serving.champion.bundle.signature.model_dump(mode="json"),
        }

    def new_id(self) -> str:
        """An id of a prediction or a request: who made it (16 digits) and a counter (10)."""
        self._id_count += 1
        return f"{self._id_prefix}{self._id_count:010x}"


def ours(path: str) -> bool:
    """Whether the handler answers a path."""
    return path in _METHODS or is_v2(path)


def is_v2(path: str) -> bool:
    """Whether a path is the Open Inference Protocol's."""
    return path == _V2 or path.startswith(f"{_V2}/")


def not_allowed(path: str, methods: tuple[str, ...]) -> RequestError:
    """The error (405) of a request whose path takes other methods."""
    allowed = ", ".join(methods)
    headers = ((b"allow", allowed.encode()),)
    return RequestError(405, "method_not_allowed", f"{path} takes {allowed}", headers=headers)


def refusal(path: str, error: RequestError) -> Response:
    """The answer to a request that failed, in the shape that the path's protocol has."""
    body = json.dumps({"error": error.message}).encode() if is_v2(path) else error.body()
    return Response(error.status, body, [_JSON, *error.headers])


def _flag(good: bool, body: dict[str, Any]) -> Response:
    """The answer to a probe."""
    if good:
        return Response(200, json.dumps(body).encode())
    return Response(503, json.dumps(body).encode(), [_JSON, RETRY])


def _route(path: str) -> str:
    """A path without what it names, of which there may be many."""
    if path in _METHODS:
        return path
    version = "/versions/{version}" if "/versions/" in path else ""
    return f"{_V2}/models/{{model}}{version}/infer"


def _v2_methods(path: str) -> tuple[str, ...]:
    return ("POST",) if path.endswith("/infer") else ("GET", "HEAD")


async def _while_connected(
    answer: Coroutine[Any, Any, tuple[Response, str]], receive: Receive, seconds: float
) -> tuple[Response, str]:
    """Wait for an answer that takes long, but no longer than its client does, or than allowed."""
    working = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        done, _ = await asyncio.wait(
            [working, gone], timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise too_late()
        if not working.done():
            raise RequestError(499, "client_gone", "The client did not wait for the answer")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnect(receive: Receive) -> None:
    """Return when the client has gone; after the body there is nothing else to receive."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _rest(receive: Receive, body: bytes, limit: int) -> bytes:
    """The whole body, read no further than just beyond the limit."""
    parts, size = [body], len(body)
    while size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "incomplete_body", "The body ended early")
        part: bytes = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if not message.get("more_body"):
            break
    return b"".join(parts)


def _too_large(limit: int) -> RequestError:
    return RequestError(
        413,
        "body_too_large",
        f"The body may have at most {limit} bytes",
        headers=(CLOSE,),
    )


def _visible(headers: dict[bytes, bytes], name: str) -> str:
    """The value of a header that names something. Raises RequestError (400)."""
    text = headers[name.lower().encode()].decode("latin-1")
    if len(text) > 128 or not (text.isascii() and text.isprintable()):
        code = f"invalid_{name.lower().removeprefix('x-').replace('-', '_')}"
        raise RequestError(400, code, f"{name} takes at most 128 visible ASCII characters")
    return text


def _most(allowed: float, patience: float | None) -> float:
    """Seconds that a request waits at most."""
    return allowed if patience is None else min(allowed, patience)


def _patience(value: bytes) -> float:
    """Seconds that a client says it waits. Raises RequestError (400)."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise RequestError(400, "invalid_request_timeout", "X-Request-Timeout takes seconds")
    return seconds
