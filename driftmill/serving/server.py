"""The service of one model: an ASGI handler with everything that a request needs.

One process, one event loop. Requests that wait together run as one batch: the first one asks the
loop to call back, and whatever has arrived by then goes into the same run of the model, so that
batching adds no delay. Models of images take long: they run in a thread, one batch at a time, and
whatever arrives meanwhile is the next batch; images are decoded in threads, too, unless tiny.

What serves is one immutable `Serving` value; a poll of the rollout loads new versions in a thread
and replaces the value in one assignment.

Routes: `POST /predict`, `POST /feedback`, `GET /model`, `/livez`, `/readyz`, `/metrics`,
`/docs.json`, and the Open Inference Protocol below `/v2`. All other paths go to the application
that the handler is wrapped around.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from driftmill import bundle, rollout
from driftmill.bundle import Bundle, BundleError
from driftmill.home import cores
from driftmill.rollout import Rollout, RolloutConflict
from driftmill.serving import open_inference
from driftmill.serving.codec import (
    JSON,
    Answer,
    Codec,
    RequestError,
    codec_for,
    encode_answers,
    is_json,
)
from driftmill.serving.log import Label, Log, Prediction, Role, Schema, now_us
from driftmill.serving.metrics import CONTENT_TYPE, Metrics
from driftmill.serving.openapi import openapi
from driftmill.store import Store

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Batches that may wait, or rows where these are more; requests beyond are turned away with 503.
WAITING_BATCHES, WAITING_ROWS = 16, 256
#: Requests that may be in the process at once, their bodies being read included.
MAX_REQUESTS = 1024
#: Seconds that the rest of a body may take.
BODY_TIMEOUT = 10.0
#: Images that are decoded at once.
_DECODERS = min(4, cores())
#: A version that did not load is tried again after this many seconds.
LOAD_AGAIN = 10.0

_METHODS = {
    "/predict": ("POST",),
    "/feedback": ("POST",),
    "/model": ("GET", "HEAD"),
    "/livez": ("GET", "HEAD"),
    "/readyz": ("GET", "HEAD"),
    "/metrics": ("GET", "HEAD"),
    "/docs.json": ("GET", "HEAD"),
}
#: Paths of the Open Inference Protocol begin so.
_V2 = "/v2"
_JSON = (b"content-type", b"application/json")
_RETRY = (b"retry-after", b"1")
_CLOSE = (b"connection", b"close")
_V2_MODEL = re.compile(
    r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/(?P<rest>infer|ready))?/?"
)


class Model:
    """A loaded version with what a request needs of it."""

    def __init__(self, loaded: Bundle) -> None:
        self.bundle = loaded
        self.version = loaded.version
        self.settings = loaded.manifest.contract.serve
        self.header = (b"x-model-version", loaded.version.encode())
        self.codec = codec_for(loaded.signature, loaded.manifest.contract)
        self.schema = Schema.predictions(loaded.signature)
        self.label_schema = Schema.labels(loaded.signature)
        # A record decoded for one model fits another with the same inputs.
        columns = [(c.name, c.type, c.nullable) for c in loaded.signature.columns]
        self.inputs = (columns, loaded.signature.image)

    def run(self, records: Sequence[Any], keep: bool = True) -> tuple[np.ndarray, Sequence[Any]]:
        """Predict, as `Codec.run`. Raises ModelError where the model fails or gives no number."""
        try:
            output, kept = self.codec.run(self.bundle.session, records, keep)
        # ONNX Runtime raises classes of its own, some of which derive from Exception only.
        except Exception as error:
            raise ModelError(f"{self.version} failed: {error}") from error
        if not np.isfinite(output).all():
            raise ModelError(f"{self.version} answered NaN or infinity")
        return output, kept


class ModelError(RuntimeError):
    """A model that did not answer."""


@dataclass(frozen=True)
class Serving:
    """What serves: replaced as a whole, never changed."""

    rollout: Rollout
    champion: Model
    challenger: Model | None = None
    """None also where the rollout names one that did not load or has failed."""
    refused: tuple[dict[str, str], ...] = ()
    """Versions of the rollout that did not load, and why."""

    def role(self, request_id: str) -> Role:
        """Who answers a request."""
        if self.challenger is not None and share(request_id) < self.rollout.weight:
            return "challenger"
        return "champion"

    def role_of(self, version: str) -> Role:
        """The role of a version that is asked for by name. Raises RequestError (404)."""
        if version == self.champion.version:
            return "champion"
        if self.challenger is not None and version == self.challenger.version:
            return "challenger"
        raise RequestError(404, "not_found", f"The version {version!r} does not serve")


def share(request_id: str) -> float:
    """Where a request lies in [0, 1): the challenger answers those below its weight.

    It is the first 53 bits of the BLAKE2b digest (8 bytes, big-endian) of the request id, over
    2**53: the same on every replica, and a request that the challenger answers at one weight it
    answers at every higher one.
    """
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(slots=True)
class _Waiting:
    """A request that waits for its batch."""

    request_id: str
    records: list[Any]
    serving: Serving
    model: Model
    role: Role
    answered: asyncio.Future[tuple[Model, bytes]]


@dataclass
class Response:
    """An answer, ready to be sent."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: [_JSON])


class Server:
    """Serves one model.

    Args:
        store: where bundles, rollout and log lie.
        model: the model's name.
        spool: local folder of the inference log before it moves into the store.
        cache: local folder for bundles of a remote store.
    """

    def __init__(self, store: Store, model: str, spool: Path, cache: Path | None = None) -> None:
        self.store = store
        self.model = model
        self.cache = cache
        self.log = Log(spool, store, model)
        self.metrics = Metrics(model, self.log)
        self.serving: Serving | None = None
        self.draining = False
        #: Versions that did not load while nothing serves yet.
        self.refused: tuple[dict[str, str], ...] = ()
        self._poll_seconds = 1.0
        self._poll_error: str | None = None
        self._load_again = 0.0
        self._rejected_revision = 0
        self._rollback: tuple[Serving, str] | None = None
        self._id_prefix = secrets.token_hex(8)
        self._id_count = 0
        self._requests = 0
        self._waiting: deque[_Waiting] = deque()
        self._waiting_rows = 0
        self._flush_planned = False
        self._wake = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._batches: asyncio.Task[None] | None = None
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._shadows = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._shadow_rows = 0

    # Life

    async def start(self) -> None:
        """Start the log and the poll of the rollout; the first version loads in the background."""
        self.log.start()
        self._poller = asyncio.create_task(self._poll(), name="rollout-poll")
        self._poller.add_done_callback(_report_end)

    def drain(self) -> None:
        """Ask clients to leave: not ready any more, and no connection outlives its next answer."""
        logger.info("%s drains", self.model)
        self.draining = True

    async def stop(self) -> None:
        """Finish what waits and move the log into the store."""
        self.draining = True
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])
        while self._waiting or self._batches is not None:
            if self._batches is None:
                self._flush()
            else:
                await asyncio.wait([self._batches])
        for threads in (self._decoders, self._worker, self._shadows):
            await asyncio.to_thread(threads.shutdown)
        await asyncio.to_thread(self.log.close)

    async def _poll(self) -> None:
        while True:
            self._wake.clear()
            if self._rollback is not None:
                pending = self._rollback
                done = await asyncio.to_thread(self._write_rollback, *pending)
                if done and self._rollback is pending:
                    self._rollback = None
            try:
                found = await asyncio.to_thread(self._look)
                self._poll_error = None
            except (OSError, ValueError) as error:
                self.metrics.poll_failures.inc()
                if str(error) != self._poll_error:
                    logger.error("the rollout of %s cannot be read: %s", self.model, error)
                self._poll_error = str(error)
            else:
                if found is not None:
                    self._swap(found)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll_seconds)

    def _look(self) -> Serving | None:
        """What must serve from now on, loaded and warm; None where nothing changes. In a thread."""
        before = self.serving
        newest = rollout.read(self.store, self.model, before.rollout.revision if before else 0)
        if newest is None:
            if before is None or not before.refused or time.monotonic() < self._load_again:
                return None
            newest = before.rollout
        elif newest.revision == self._rejected_revision and time.monotonic() < self._load_again:
            return None
        loaded = {m.version: m for m in (before.champion, before.challenger) if m} if before else {}
        refused = []
        for version in filter(None, (newest.champion, newest.challenger)):
            if version not in loaded:
                try:
                    loaded[version] = Model(self._fetch(version))
                except (BundleError, OSError) as error:
                    refused.append({"version": version, "reason": str(error)})
                    self.metrics.load_failed(version)
                    logger.error("%s %s is refused: %s", self.model, version, error)
        if refused:
            self._load_again = time.monotonic() + LOAD_AGAIN
        champion = loaded.get(newest.champion)
        if champion is None:
            self._rejected_revision = newest.revision
            self.refused = tuple(refused)
            return replace(before, refused=self.refused) if before else None
        challenger = loaded.get(newest.challenger) if newest.challenger else None
        if challenger is not None and challenger.inputs != champion.inputs:
            reason = "its inputs are not the champion's: it can replace it, but not stand beside it"
            refused.append({"version": challenger.version, "reason": reason})
            self.metrics.load_failed(challenger.version)
            logger.error("%s %s is refused: %s", self.model, challenger.version, reason)
            self._load_again = time.monotonic() + LOAD_AGAIN
            challenger = None
        return Serving(newest, champion, challenger, tuple(refused))

    def _fetch(self, version: str) -> Bundle:
        """Load a version. Raises BundleError, OSError."""
        found = bundle.fetch(self.store, self.model, version, self.cache)
        if self.store.folder is None:
            # A copy, of which all that serving needs is in memory: many promotions fill no disk.
            shutil.rmtree(found.folder)
        return found

    def _swap(self, new: Serving) -> None:
        """Serve something else from now on; batches that wait keep the models they came for."""
        before = self.serving
        if self._rollback is not None and new.challenger is not None:
            failed, reason = self._rollback
            if failed.challenger is new.challenger:  # it failed while the new rollout was loaded
                self._rollback = (new, reason)
                new = replace(new, challenger=None)
        settings = new.champion.settings
        self._poll_seconds = settings.poll
        self.log.rotate_rows = settings.log.rotate_rows
        self.log.rotate = settings.log.rotate
        self.serving = new
        self.refused = new.refused
        self.metrics.serving(
            new.rollout, new.challenger.version if new.challenger is not None else None
        )
        if before is None:
            # What start-up made lives for ever: the collector need not look at it again.
            gc.collect()
            gc.freeze()
        logger.info(
            "%s serves %s (revision %d%s)",
            self.model,
            new.champion.version,
            new.rollout.revision,
            f", challenger {new.challenger.version}" if new.challenger else "",
        )

    # Requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to a path that is `ours`."""
        path = scope["path"]
        is_v2 = path not in _METHODS
        asks = path == "/predict" or (is_v2 and path.endswith("/infer"))
        started = time.perf_counter()
        request_id = ""
        version = ""
        self._requests += 1
        try:
            methods = _METHODS.get(path) or _v2_methods(path)
            if scope["method"] not in methods:
                allowed = ", ".join(methods)
                raise RequestError(
                    405,
                    "method_not_allowed",
                    f"{path} takes {allowed}",
                    headers=((b"allow", allowed.encode()),),
                )
            if asks:
                request_id, kind, body = await self._receive(scope, receive)
                answer = (
                    self._infer(path, body, request_id)
                    if is_v2
                    else self.predict(body, request_id, kind)
                )
                if self._serving().champion.codec.threaded:
                    answer = _while_connected(answer, receive)
                response, version = await answer
            elif path == "/feedback":
                request_id, _, body = await self._receive(scope, receive)
                response = self.feedback(body)
            else:
                response = self._get_v2(path) if is_v2 else self._get(path)
        except RequestError as error:
            content = json.dumps({"error": error.message}).encode() if is_v2 else error.body()
            response = Response(error.status, content, [_JSON, *error.headers])
        finally:
            self._requests -= 1
        if request_id:
            response.headers.append((b"x-request-id", request_id.encode()))
        response.headers.append((b"content-length", str(len(response.body)).encode()))
        if self.draining and _CLOSE not in response.headers:
            response.headers.append(_CLOSE)
        if asks:
            self.metrics.request(version, response.status)
            self.metrics.seconds.observe(time.perf_counter() - started)
        await send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": response.headers,
            }
        )
        await send({"type": "http.response.body", "body": response.body})

    async def predict(
        self, body: bytes, request_id: str = "", kind: str = JSON, version: str | None = None
    ) -> tuple[Response, str]:
        """The answer to a body of `POST /predict`, and the version that gave it.

        Args:
            body: of the request.
            request_id: its name; one is made up for none.
            kind: its content type.
            version: who must answer; None leaves it to the rollout.

        Raises:
            RequestError: there is no answer.
        """
        serving = self._serving()
        request_id = request_id or self._new_id()
        role = serving.role(request_id) if version is None else serving.role_of(version)
        model = serving.champion
        codec = model.codec
        records = codec.records(body, kind)
        if role == "challenger" and serving.challenger is not None:
            model = serving.challenger
        most = _most_waiting(codec)
        if self._waiting_rows and self._waiting_rows + len(records) > most:
            self.metrics.rejected.inc()
            raise RequestError(503, "overloaded", "Too many requests wait", headers=(_RETRY,))
        loop = asyncio.get_running_loop()
        decoded = codec.decode_now(records)
        if decoded is None:
            self._waiting_rows += len(records)
            try:
                decoded = await loop.run_in_executor(self._decoders, codec.decode, records)
            finally:
                self._waiting_rows -= len(records)
        waiting = _Waiting(request_id, decoded, serving, model, role, loop.create_future())
        self._waiting.append(waiting)
        self._waiting_rows += len(decoded)
        if not self._flush_planned:
            self._flush_planned = True
            loop.call_soon(self._flush)
        model, answer = await waiting.answered
        return Response(200, answer, [_JSON, model.header]), model.version

    def feedback(self, body: bytes) -> Response:
        """The answer to a body of `POST /feedback`. Raises RequestError."""
        champion = self._serving().champion
        given = champion.codec.labels(body)
        at = now_us()
        rows = [Label(label.id, at, label.label) for label in given]
        if self._append(champion, champion.label_schema, rows):
            self.metrics.logged_labels.inc(len(rows))
        self.metrics.feedback.inc(len(rows))
        return Response(200, b'{"accepted":%d}' % len(rows))

    async def _infer(self, path: str, body: bytes, request_id: str) -> tuple[Response, str]:
        """The answer to an inference request of the Open Inference Protocol, and who gave it."""
        _, named, _ = self._named(path)
        signature = self._serving().champion.bundle.signature
        asked, request = open_inference.to_predict(body, signature)
        response, version = await self.predict(asked, request_id, version=named)
        response.body = open_inference.from_predict(response.body, request, request_id, signature)
        return response, version

    def _get_v2(self, path: str) -> Response:
        """The answer to the other requests of the Open Inference Protocol. Raises RequestError."""
        match path.removeprefix(_V2).strip("/"):
            case "":
                return Response(200, json.dumps(open_inference.server_metadata()).encode())
            case "health/live":
                return self._get("/livez")
            case "health/ready":
                return self._get("/readyz")
        model, version, rest = self._named(path)
        serving = self._serving()
        if version is not None:
            serving.role_of(version)
        if rest == "ready":
            return self._get("/readyz")
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
        if self.serving is None:
            raise RequestError(
                503, "not_ready", f"No version of {self.model} is loaded yet", headers=(_RETRY,)
            )
        return self.serving

    async def _receive(self, scope: Scope, receive: Receive) -> tuple[str, str, bytes]:
        """Request id (maybe made up), content type and body of a request."""
        request_id = length = ""
        kind = JSON
        encoding = "identity"
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = value.decode("latin-1")
            elif name == b"x-request-id":
                request_id = value.decode("latin-1")
            elif name == b"content-type":
                kind = value.decode("latin-1")
            elif name == b"content-encoding":
                encoding = value.decode("latin-1")
        if request_id and not (len(request_id) <= 128 and _is_visible(request_id)):
            raise RequestError(
                400, "invalid_request_id", "X-Request-Id takes at most 128 visible ASCII characters"
            )
        champion = self._serving().champion
        if scope["path"] == "/predict":
            champion.codec.check_kind(kind)
        elif not is_json(kind):
            raise RequestError(415, "unsupported_media_type", f"Send Content-Type: {JSON}")
        if encoding.strip().lower() not in ("", "identity"):
            raise RequestError(415, "unsupported_encoding", "Send the body uncompressed")
        if self._requests > MAX_REQUESTS:
            self.metrics.rejected.inc()
            raise RequestError(
                503,
                "overloaded",
                "Too many requests at once",
                headers=(_RETRY, _CLOSE),
            )
        limit = champion.settings.max_body_bytes
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    body = await _rest(receive, body, limit)
            except TimeoutError:
                raise RequestError(
                    408,
                    "body_timeout",
                    f"The body did not come within {BODY_TIMEOUT:.0f} s",
                    headers=(_CLOSE,),
                ) from None
        if len(body) > limit:
            raise _too_large(limit)
        return request_id or self._new_id(), kind, body

    def _get(self, path: str) -> Response:
        match path:
            case "/livez":
                if self._poller is None or self._poller.done() or not self.log.alive:
                    return Response(503, b'{"status":"a background task has ended"}')
                return Response(200, b'{"status":"alive"}')
            case "/readyz":
                if self.serving is None or self.draining:
                    status = "draining" if self.draining else "no version is loaded"
                    return Response(503, json.dumps({"status": status}).encode(), [_JSON, _RETRY])
                return Response(200, b'{"status":"ready"}')
            case "/metrics":
                headers = [(b"content-type", CONTENT_TYPE.encode())]
                return Response(200, self.metrics.render(), headers)
            case "/docs.json":
                champion = self.serving.champion if self.serving else None
                document = openapi(self.model, champion.codec if champion else None)
                return Response(200, json.dumps(document).encode())
            case _:
                return Response(200, json.dumps(self.describe()).encode())

    def describe(self) -> dict[str, Any]:
        """What `GET /model` answers; `version` is null before the first version is loaded."""
        serving = self.serving
        answer: dict[str, Any] = {
            "model": self.model,
            "version": None,
            "challenger": None,
            "rollout": None,
            "refused": list(self.refused),
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

    # Batches

    def _flush(self) -> None:
        """Answer the requests that wait, as many as fit into one batch."""
        if self._waiting and self._waiting[0].model.codec.threaded:
            self._batches = asyncio.create_task(self._run_batches(), name="batches")
            return
        self._flush_planned = False
        try:
            for model, group in self._next_batch().items():
                self._settle(model, group, partial(self._answer, model, group, self._ids(group)))
        finally:
            if self._waiting:
                self._flush_planned = True
                asyncio.get_running_loop().call_soon(self._flush)

    async def _run_batches(self) -> None:
        """Answer the requests that wait in a thread, batch after batch, until none is left."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                for model, group in self._next_batch().items():
                    answers = loop.run_in_executor(
                        self._worker, self._answer, model, group, self._ids(group)
                    )
                    await asyncio.wait([answers])
                    self._settle(model, group, answers.result)
        finally:
            self._flush_planned = False
            self._batches = None

    def _next_batch(self) -> dict[Model, list[_Waiting]]:
        """Take the requests of one batch, by model."""
        groups: dict[Model, list[_Waiting]] = {}
        rows = 0
        first: _Waiting | None = None
        while self._waiting:
            waiting = self._waiting[0]
            codec = waiting.serving.champion.codec
            if waiting.answered.done():  # the client went away
                self._waiting_rows -= len(self._waiting.popleft().records)
                continue
            if first is not None and (
                rows + len(waiting.records) > codec.batch_rows
                or codec.threaded != first.model.codec.threaded  # two tasks, amid a swap
            ):
                break
            first = first or waiting
            rows += len(waiting.records)
            groups.setdefault(waiting.model, []).append(self._waiting.popleft())
        self._waiting_rows -= rows
        return groups

    def _ids(self, group: list[_Waiting]) -> list[str]:
        return [self._new_id() for waiting in group for _ in waiting.records]

    def _answer(self, model: Model, group: list[_Waiting], ids: list[str]) -> list[Answer]:
        """Run a model for some requests and log the predictions. Maybe in a thread.

        Raises:
            ModelError: the model failed.
            RequestError: the log did.
        """
        records = [r for waiting in group for r in waiting.records]
        self.metrics.batch_rows.observe(len(records))
        output, kept = model.run(records)
        answers = model.codec.answers(ids, output)
        at = now_us()
        rows = []
        start = 0
        for waiting in group:
            stop = start + len(waiting.records)
            rows += [
                Prediction(
                    answer.id,
                    waiting.request_id,
                    at,
                    model.version,
                    waiting.role,
                    answer.prediction,
                    answer.score,
                    record,
                )
                for answer, record in zip(answers[start:stop], kept[start:stop], strict=True)
            ]
            start = stop
        if self._append(model, model.schema, rows):
            self.metrics.logged_predictions.inc(len(rows))
        return answers

    def _settle(
        self, model: Model, group: list[_Waiting], result: Callable[[], list[Answer]]
    ) -> None:
        """Release the answers of some requests, or what there is in their place."""
        try:
            answers = result()
        except ModelError as error:
            self._failed(model, group, error)
            return
        except RequestError as error:
            for waiting in group:
                _release(waiting, error)
            return
        start = 0
        for waiting in group:
            stop = start + len(waiting.records)
            body = encode_answers(self.model, model.version, answers[start:stop])
            _release(waiting, (model, body))
            self.metrics.predictions(
                model.version, waiting.role, [a.score for a in answers[start:stop]]
            )
            start = stop
        self._send_to_shadow(group, answers)

    def _failed(self, model: Model, group: list[_Waiting], error: ModelError) -> None:
        """The champion answers for a challenger that failed, in the next batch; nobody answers for
        a champion."""
        again = [w for w in group if w.role == "challenger"]
        for waiting in again:
            self._roll_back(waiting.serving, str(error))
            waiting.model, waiting.role = waiting.serving.champion, "champion"
            self._waiting_rows += len(waiting.records)
        self._waiting.extendleft(reversed(again))
        if not again:
            logger.error("%s: %s", self.model, error)
            for waiting in group:
                _release(waiting, RequestError(500, "model_failed", "The model gave no answer"))

    def _append(
        self, model: Model, schema: Schema, rows: Sequence[Prediction] | Sequence[Label]
    ) -> bool:
        """Write to the log; False where it failed and the contract says to serve all the same.

        Raises:
            RequestError: it failed, and the contract says to refuse.
        """
        try:
            self.log.append(schema, rows)
        except OSError as error:
            self.metrics.log_failing.set(1)
            if model.settings.log.on_error == "serve":
                self.metrics.log_dropped.inc(len(rows))
                return False
            self.metrics.log_refused.inc(len(rows))
            raise RequestError(
                503,
                "log_unavailable",
                f"The inference log cannot be written: {error.strerror or error}",
                headers=(_RETRY,),
            ) from error
        self.metrics.log_failing.set(0)
        return True

    # The challenger

    def _send_to_shadow(self, group: list[_Waiting], answers: list[Answer]) -> None:
        """Let the challenger see what the champion answered, in another thread."""
        start = 0
        rows: list[tuple[str, str, Any]] = []
        serving: Serving | None = None
        for waiting in group:
            stop = start + len(waiting.records)
            if (
                waiting.role == "champion"
                and waiting.serving is self.serving
                and waiting.serving.rollout.shadow
                and waiting.serving.challenger is not None
            ):
                serving = waiting.serving
                rows += [
                    (answer.id, waiting.request_id, record)
                    for answer, record in zip(answers[start:stop], waiting.records, strict=True)
                ]
            start = stop
        if serving is None:
            return
        if self._shadow_rows + len(rows) > _most_waiting(serving.champion.codec):
            self.metrics.shadow_dropped.inc(len(rows))
            return
        self._shadow_rows += len(rows)
        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._shadows, self._shadow, serving, rows).add_done_callback(
            lambda done: self._shadow_done(done, serving, len(rows))
        )

    def _shadow(self, serving: Serving, rows: list[tuple[str, str, Any]]) -> None:
        """Predict and log without answering. In a thread."""
        model = serving.challenger
        assert model is not None
        output, kept = model.run([record for _, _, record in rows], keep=False)
        answers = model.codec.answers([i for i, _, _ in rows], output)
        at = now_us()
        self.log.append(
            model.schema,
            [
                Prediction(
                    a.id, request_id, at, model.version, "shadow", a.prediction, a.score, record
                )
                for a, (_, request_id, _), record in zip(answers, rows, kept, strict=True)
            ],
        )
        self.metrics.predictions(model.version, "shadow", [a.score for a in answers])
        self.metrics.logged_predictions.inc(len(rows))

    def _shadow_done(self, done: asyncio.Future[None], serving: Serving, rows: int) -> None:
        self._shadow_rows -= rows
        error = done.exception()
        if isinstance(error, ModelError):
            self._roll_back(serving, str(error))
        elif isinstance(error, OSError):
            self.metrics.shadow_dropped.inc(rows)
        elif error is not None:
            raise error

    def _roll_back(self, serving: Serving, reason: str) -> None:
        """Stop using a challenger at once, and tell the store at the next poll, which is now."""
        challenger = serving.challenger
        assert challenger is not None
        self.metrics.challenger_failed(challenger.version)
        if self.serving is not None and self.serving.challenger is challenger:
            logger.error("%s: the challenger %s", self.model, reason)
            self._rollback = (self.serving, reason)
            self.serving = replace(self.serving, challenger=None)
            self.metrics.serving(self.serving.rollout, None)
            self._wake.set()

    def _write_rollback(self, serving: Serving, reason: str) -> bool:
        """Take the challenger out of the rollout; False where the store does not answer."""
        try:
            rollout.change(
                self.store,
                self.model,
                champion=serving.rollout.champion,
                by="service",
                reason=f"the challenger {reason}",
                expected=serving.rollout.revision,
            )
        except RolloutConflict as error:
            logger.info("somebody else changed the rollout: %s", error)
        except OSError as error:
            logger.error("the rollout of %s cannot be written: %s", self.model, error)
            return False
        return True

    def _new_id(self) -> str:
        self._id_count += 1
        return f"{self._id_prefix}{self._id_count:010x}"


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


def ours(path: str) -> bool:
    """Whether the handler answers a path."""
    return path in _METHODS or path == _V2 or path.startswith(f"{_V2}/")


def _v2_methods(path: str) -> tuple[str, ...]:
    return ("POST",) if path.endswith("/infer") else ("GET", "HEAD")


def _most_waiting(codec: Codec) -> int:
    """Rows that may wait."""
    return max(codec.batch_rows * WAITING_BATCHES, WAITING_ROWS)


async def _while_connected(
    answer: Coroutine[Any, Any, tuple[Response, str]], receive: Receive
) -> tuple[Response, str]:
    """Wait for an answer that takes long, but no longer than its client does."""
    working = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
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


def _release(waiting: _Waiting, answer: tuple[Model, bytes] | RequestError) -> None:
    if waiting.answered.done():  # the client went away
        return
    if isinstance(answer, RequestError):
        waiting.answered.set_exception(answer)
    else:
        waiting.answered.set_result(answer)


def _report_end(poller: asyncio.Task[None]) -> None:
    """Say why the poll ended, if not by `stop`; /livez then asks for a restart."""
    if not poller.cancelled() and (error := poller.exception()) is not None:
        logger.critical("the poll of the rollout has ended", exc_info=error)


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
        headers=(_CLOSE,),
    )


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable()
