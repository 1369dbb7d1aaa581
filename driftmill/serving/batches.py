"""Requests that wait together run as one batch.

The first request that waits for a model asks the event loop to call back, and whatever has arrived
by then goes into the same run, so that batching adds no delay. Models of images take long: they run
in a thread of their own, one batch at a time, and whatever arrives meanwhile is the next batch. So
does a challenger, whatever it reads: one that hangs holds up nobody but itself. So do all models
where the log waits for the disk (`serve.log.fsync: batch`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from driftmill.serving.codec import RETRY, Answer, Codec, RequestError, encode_answers
from driftmill.serving.log import Label, Log, Prediction, Role, Schema, now_us
from driftmill.serving.metrics import Metrics
from driftmill.serving.versions import Model, ModelError, Serving, Versions

logger = logging.getLogger(__name__)

#: Batches that may wait, or rows where these are more; requests beyond are turned away with 503.
WAITING_BATCHES, WAITING_ROWS = 16, 256


@dataclass(slots=True)
class Waiting:
    """A request that waits for its batch."""

    request_id: str
    records: Sequence[Any]
    serving: Serving
    role: Role
    since: float
    """When it came, by `time.perf_counter`."""
    deadline: float
    """When it waits no longer, and gets 504."""
    answered: asyncio.Future[tuple[Model, bytes]]
    ran: tuple[float, float, int] | None = None
    """Where requests are traced: when its batch began and ended, and the rows of that."""


class Batches:
    """Runs the models of one service.

    Args:
        model: the model's name.
        versions: told when a challenger must go.
        log: where predictions are kept before they are answered.
        metrics: of the model.
        new_id: makes ids of predictions.
    """

    def __init__(
        self,
        model: str,
        versions: Versions,
        log: Log,
        metrics: Metrics,
        new_id: Callable[[], str],
    ) -> None:
        self.model = model
        #: Rows that wait, those that are being decoded included.
        self.rows = 0
        #: Whether anybody asks when a batch ran.
        self.traced = False
        self._versions = versions
        self._log = log
        self._metrics = metrics
        self._new_id = new_id
        self._running: set[asyncio.Task[None]] = set()
        #: What the other model shall predict, too: by whom answered, of whom, and what.
        self._asides: deque[tuple[Serving, Role, list[tuple[str, Any]], list[Answer]]] = deque()
        self._aside_rows = 0
        self._aside_planned = False

    def check_room(self, codec: Codec, rows: int) -> None:
        """Raise RequestError (503) where so many more rows may not wait."""
        if self.rows and self.rows + rows > most_waiting(codec):
            self._metrics.rejected.inc()
            raise RequestError(503, "overloaded", "Too many requests wait", headers=(RETRY,))

    def put(self, waiting: Waiting) -> None:
        """Let a request wait for its model; `answered` will tell."""
        model = waiting.serving.model(waiting.role)
        model.waiting.append(waiting)
        self.rows += len(waiting.records)
        if not model.planned:
            model.planned = True
            # A disk that is asked at every batch would hold up the event loop, too.
            waits = model.codec.threaded or self._log.fsync == "batch"
            if waits or waiting.role == "challenger":
                self._start(self._run(model), f"batches-{model.version}")
            else:
                asyncio.get_running_loop().call_soon(self._flush, model)

    def append(
        self, model: Model, schema: Schema, rows: Sequence[Prediction] | Sequence[Label]
    ) -> bool:
        """Write to the log; False where it failed and the contract says to serve all the same.

        Raises:
            RequestError: it failed, and the contract says to refuse.
        """
        try:
            self._log.append(schema, rows)
        except OSError as error:
            self._metrics.log_failing.set(1)
            if model.settings.log.on_error == "serve":
                self._metrics.log_dropped.inc(len(rows))
                return False
            self._metrics.log_refused.inc(len(rows))
            raise RequestError(
                503,
                "log_unavailable",
                f"The inference log cannot be written: {error.strerror or error}",
                headers=(RETRY,),
            ) from error
        self._metrics.log_failing.set(0)
        return True

    async def stop(self) -> None:
        """Finish what waits; nothing may be put any more."""
        while self._running or self.rows:
            if self._running:
                await asyncio.wait(self._running)
            else:
                await asyncio.sleep(0)  # a flush is planned

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Begin what `stop` waits for."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _flush(self, model: Model) -> None:
        """Answer requests that wait, as many as fit into one batch, at once."""
        group = self._next_batch(model)
        try:
            if group:
                self._settle(model, group, partial(self._answer, model, group, self._ids(group)))
        finally:
            model.planned = bool(model.waiting)
            if model.planned:
                asyncio.get_running_loop().call_soon(self._flush, model)

    async def _run(self, model: Model) -> None:
        """Answer requests that wait in the model's thread, batch after batch, until none do."""
        loop = asyncio.get_running_loop()
        try:
            while group := self._next_batch(model):
                if model.stopped:
                    self._failed(group, model.gave_up())
                    continue
                serving = group[0].serving
                limit = serving.champion.settings.canary.abort.timeout
                answers = loop.run_in_executor(
                    model.worker, self._answer, model, group, self._ids(group)
                )
                done, _ = await asyncio.wait(
                    [answers], timeout=limit if model is serving.challenger else None
                )
                if done:
                    self._settle(model, group, answers.result)
                else:
                    self._failed(group, _give_up(model, answers, limit))
        finally:
            model.planned = False

    def _next_batch(self, model: Model) -> list[Waiting]:
        """Take the requests of one batch."""
        group: list[Waiting] = []
        rows = 0
        now = time.perf_counter()
        while model.waiting:
            waiting = model.waiting[0]
            count = len(waiting.records)
            if group and rows + count > model.codec.batch_rows:
                break
            model.waiting.popleft()
            self.rows -= count
            if waiting.answered.done():  # the client went away
                continue
            if now > waiting.deadline:
                _release(waiting, too_late())
                continue
            rows += count
            group.append(waiting)
        return group

    def _ids(self, group: list[Waiting]) -> list[str]:
        return [self._new_id() for waiting in group for _ in range(len(waiting.records))]

    def _answer(self, model: Model, group: list[Waiting], ids: list[str]) -> list[Answer]:
        """Run a model for some requests and log the predictions. Maybe in a thread.

        Raises:
            ModelError: the model failed.
            RequestError: the log did.
        """
        # One request's may be columns: they are taken apart only to be joined to others.
        records = group[0].records if len(group) == 1 else [r for w in group for r in w.records]
        self._metrics.batch_rows.observe(len(records))
        began = time.perf_counter()
        output, kept = model.run(records)
        if self.traced:
            ran = began, time.perf_counter(), len(records)
            for waiting in group:
                waiting.ran = ran
        if model.stopped:  # too late: others have answered
            raise model.gave_up()
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
        if self.append(model, model.schema, rows):
            self._metrics.logged_predictions.inc(len(rows))
        return answers

    def _settle(
        self, model: Model, group: list[Waiting], result: Callable[[], list[Answer]]
    ) -> None:
        """Release the answers of some requests, or what there is in their place."""
        try:
            answers = result()
        except ModelError as error:
            self._failed(group, error)
            return
        except RequestError as error:
            for waiting in group:
                _release(waiting, error)
            return
        except Exception:  # nobody waits for ever for what a mistake here took from them
            for waiting in group:
                _release(waiting, RequestError(500, "failed", "The service made a mistake"))
            raise
        start = 0
        scores: dict[Role, list[float | None]] = {}
        for waiting in group:
            stop = start + len(waiting.records)
            own = answers[start:stop]
            _release(waiting, (model, encode_answers(self.model, model.version, own)))
            scores.setdefault(waiting.role, []).extend([a.score for a in own])
            start = stop
        for role, values in scores.items():
            self._metrics.predictions(model.version, role, values)
        serving = self._versions.serving
        if serving is not None and serving.challenger is not None:
            self._watch(serving, model, group, answers)

    def _failed(self, group: list[Waiting], error: ModelError) -> None:
        """The champion answers for a challenger that failed; nobody answers for a champion."""
        again = [waiting for waiting in group if waiting.role == "challenger"]
        lost = [waiting for waiting in group if waiting.role != "challenger"]
        if again:
            self._versions.roll_back(again[0].serving, str(error))
        for waiting in again:
            waiting.role = "champion"
            self.put(waiting)
        if lost:
            logger.error("%s: %s", self.model, error)
        for waiting in lost:
            _release(waiting, RequestError(500, "model_failed", "The model gave no answer"))

    # The challenger

    def _watch(
        self, serving: Serving, model: Model, group: list[Waiting], answers: list[Answer]
    ) -> None:
        """See how the challenger does beside the champion; let the other one predict, too, where
        that is asked for."""
        challenger = serving.model("challenger")
        if model not in (serving.champion, challenger):
            return
        role: Role = "challenger" if model is challenger else "champion"
        now = time.perf_counter()
        for waiting in group:
            challenger.watch.answered(role, now - waiting.since)
        self._judge(serving)
        is_shadow = role == "champion" and serving.rollout.shadow
        is_compared = serving.champion.settings.canary.abort.disagreement is not None
        if is_shadow or (role == "challenger" and is_compared):
            self._predict_aside(serving, role, group, answers)

    def _predict_aside(
        self, serving: Serving, role: Role, group: list[Waiting], answers: list[Answer]
    ) -> None:
        """Let the other model see what one answered, in another thread."""
        asked = [(w.request_id, record) for w in group for record in w.records]
        if self._aside_rows + len(asked) > most_waiting(serving.champion.codec):
            self._metrics.shadow_dropped.inc(len(asked))
            return
        self._aside_rows += len(asked)
        self._asides.append((serving, role, asked, answers))
        if not self._aside_planned:
            self._aside_planned = True
            self._start(self._run_asides(), "asides")

    async def _run_asides(self) -> None:
        try:
            while self._asides:
                serving, role, asked, answers = self._asides.popleft()
                try:
                    await self._run_aside(serving, role, asked, answers)
                finally:
                    self._aside_rows -= len(asked)
        finally:
            self._aside_planned = False

    async def _run_aside(
        self,
        serving: Serving,
        role: Role,
        asked: list[tuple[str, Any]],
        answers: list[Answer],
    ) -> None:
        """Let the other model predict what one with a role answered."""
        if serving.model("challenger").stopped:
            return
        is_shadow = role == "champion"
        other = serving.model("challenger" if is_shadow else "champion")
        call = self._shadow if is_shadow else self._second_opinion
        limit = serving.champion.settings.canary.abort.timeout
        loop = asyncio.get_running_loop()
        aside = loop.run_in_executor(other.aside, call, serving, asked, answers)
        done, _ = await asyncio.wait([aside], timeout=limit)
        if done:
            self._compare(serving, role, answers, aside)
        elif is_shadow:
            self._versions.roll_back(serving, str(_give_up(other, aside, limit)))
        else:
            aside.add_done_callback(_forget)

    def _compare(
        self,
        serving: Serving,
        role: Role,
        answers: list[Answer],
        aside: asyncio.Future[list[str | float]],
    ) -> None:
        """Compare what one answered with what the other predicted aside."""
        challenger = serving.model("challenger")
        error = aside.exception()
        if error is None:
            pair = [a.prediction for a in answers], aside.result()
            challenger.watch.compared(*(pair if role == "champion" else pair[::-1]))
            self._judge(serving)
        elif isinstance(error, ModelError):
            if role == "champion":
                self._versions.roll_back(serving, str(error))
        elif isinstance(error, OSError):  # the log's
            self._metrics.shadow_dropped.inc(len(answers))
        else:
            raise error

    def _shadow(
        self, serving: Serving, asked: list[tuple[str, Any]], answered: list[Answer]
    ) -> list[str | float]:
        """What the challenger predicts, logged but not answered. In a thread."""
        model = serving.model("challenger")
        output, kept = model.run([record for _, record in asked], keep=False)
        answers = model.codec.answers([a.id for a in answered], output)
        at = now_us()
        rows = [
            Prediction(a.id, request_id, at, model.version, "shadow", a.prediction, a.score, record)
            for a, (request_id, _), record in zip(answers, asked, kept, strict=True)
        ]
        self._log.append(model.schema, rows, acknowledged=False)
        self._metrics.predictions(model.version, "shadow", [a.score for a in answers])
        self._metrics.logged_predictions.inc(len(rows))
        return [a.prediction for a in answers]

    def _second_opinion(
        self, serving: Serving, asked: list[tuple[str, Any]], answered: list[Answer]
    ) -> list[str | float]:
        """What the champion would have answered. In a thread."""
        model = serving.champion
        output, _ = model.run([record for _, record in asked], keep=False)
        return [a.prediction for a in model.codec.answers([a.id for a in answered], output)]

    def _judge(self, serving: Serving) -> None:
        challenger = serving.model("challenger")
        reason = challenger.watch.verdict()
        if reason is not None:
            self._versions.roll_back(serving, f"{challenger.version} {reason}")


def most_waiting(codec: Codec) -> int:
    """Rows that may wait."""
    return max(codec.batch_rows * WAITING_BATCHES, WAITING_ROWS)


def too_late() -> RequestError:
    """The error of a request that has waited too long."""
    return RequestError(504, "timeout", "The answer did not come in time", headers=(RETRY,))


def _release(waiting: Waiting, answer: tuple[Model, bytes] | RequestError) -> None:
    if waiting.answered.done():  # the client went away
        return
    if isinstance(answer, RequestError):
        waiting.answered.set_exception(answer)
    else:
        waiting.answered.set_result(answer)


def _give_up(model: Model, computing: asyncio.Future[Any], limit: float) -> ModelError:
    """End what a model that hangs computes just now; the error of who waited for it."""
    computing.add_done_callback(_forget)
    model.stop(f"gave no answer within {limit:g} s")
    return model.gave_up()


def _forget(done: asyncio.Future[Any]) -> None:
    """Take the result of what nobody waits for any more, so that nothing complains about it."""
    if not done.cancelled():
        done.exception()
