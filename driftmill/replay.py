"""Send rows of a data set to a service as traffic, in order and at a constant rate, and their
labels some time later, as they would arrive in production."""

from __future__ import annotations

import asyncio
import math
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pandas as pd

from driftmill.contract import Contract
from driftmill.features import ID, IMAGE, ORIGINAL, TIME

#: Most labels in one request, and how often labels that are due are sent.
LABELS, LABEL_PERIOD = 500, 0.2
TIMEOUT = httpx.Timeout(30.0)


@dataclass(frozen=True)
class Answer:
    """What the service said to one row."""

    at: float
    """When it was answered, seconds since the epoch."""
    row: int
    """Position of the row in the table."""
    id: str
    """The prediction's id."""
    version: str
    prediction: str | float
    score: float | None
    label: str | float | None
    """The row's true label; None where the table has none."""


@dataclass
class ReplayResult:
    """What became of the rows."""

    sent: int = 0
    """Rows that were answered."""
    failed: int = 0
    """Rows whose request failed."""
    labelled: int = 0
    """Labels that the service accepted."""
    labels_failed: int = 0
    """Labels whose request failed."""
    seconds: float = 0.0
    """From the first request to the last answer."""
    versions: Counter[str] = field(default_factory=Counter)
    """Rows that each version answered."""
    errors: Counter[str] = field(default_factory=Counter)
    """What went wrong, and for how many requests."""
    answers: list[Answer] = field(default_factory=list)
    """An entry for each row answered, in order."""

    @property
    def ok(self) -> bool:
        """Whether no request failed."""
        return self.failed == 0 and self.labels_failed == 0


async def replay(
    rows: pd.DataFrame,
    url: str,
    *,
    contract: Contract,
    rate: float = 200.0,
    batch: int | None = None,
    label_delay: float | None = None,
    on_progress: Callable[[ReplayResult], None] | None = None,
    stop_event: asyncio.Event | None = None,
    hold: Callable[[int], Awaitable[None]] | None = None,
    token: str | None = None,
    feedback_token: str | None = None,
) -> ReplayResult:
    """Send rows to `/predict`, then their labels to `/feedback`.

    One request is in flight at a time, so that rows arrive in order. Each is due at a time fixed
    at the start: a slow answer delays the next requests, but not the average rate.

    Args:
        rows: a prepared table (see `driftmill.data.prepare`); only the contract's inputs, `_id`,
            `_time` and the target are used; for inputs that are images `_original` or `_image`.
        url: of the service, e.g. `http://127.0.0.1:3000`.
        contract: names and types of the inputs, and the target.
        rate: rows in a second.
        batch: rows in a request; None: one, or as many as keep it to 100 requests a second.
        label_delay: seconds from a row's answer to its label; None sends no labels. Labels that
            are not yet due when the rows end are sent at once.
        on_progress: called after each request.
        stop_event: when set, no further rows are sent; the labels of those sent still are.
        hold: awaited before each request, with the position of its first row: traffic pauses for
            as long as it takes.
        token: bearer token of the right `predict`; None sends none.
        feedback_token: that of the right `feedback`; None: `token` gives both.

    Returns:
        Counts and answers. A request that fails is counted and not repeated.
    """
    if batch is None:
        batch = max(1, math.ceil(rate / 100))
    stop = stop_event or asyncio.Event()
    result = ReplayResult()
    due: deque[tuple[float, str, str | float]] = deque()
    done = asyncio.Event()
    labels = label_values(rows, contract)
    async with (
        _client(url, token) as client,
        _client(url, feedback_token or token) as labeller,
    ):
        labelling = asyncio.create_task(_label(labeller, due, done, result))
        start = time.monotonic()
        for number, (first, records) in enumerate(_batches(rows, contract, batch)):
            if hold is not None:
                paused = time.monotonic()
                await hold(first)
                start += time.monotonic() - paused
            wait = start + number * batch / rate - time.monotonic()
            if wait > 0 and not stop.is_set():
                await _wait(stop, wait)
            if stop.is_set():
                break
            answers = await _predict(client, records, first, labels, result)
            result.seconds = time.monotonic() - start
            if label_delay is not None:
                at = time.monotonic() + label_delay
                due.extend((at, a.id, a.label) for a in answers if a.label is not None)
            if on_progress is not None:
                on_progress(result)
        done.set()
        await labelling
    return result


def _client(url: str, token: str | None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, headers=headers)


def records(rows: pd.DataFrame, contract: Contract) -> Iterator[dict[str, Any]]:
    """The rows as `/predict` takes them: values that JSON can carry, null for a missing one; of an
    image base64 of its file."""
    if contract.is_vision:
        names = ["image"]
        columns: list[list[Any]] = [[b64encode(file).decode() for file in _files(rows)]]
    else:
        names = [c.name for c in contract.data.columns]
        columns = [_values(rows[c.name], c.type) for c in contract.data.columns]
    if ID in rows:
        names.append(ID)
        columns.append([str(v) for v in rows[ID]])
    if TIME in rows:
        names.append(TIME)
        times = pd.to_datetime(rows[TIME], utc=True)
        columns.append([None if pd.isna(t) else t.isoformat() for t in times])
    for values in zip(*columns, strict=True):
        record = dict(zip(names, values, strict=True))
        if record.get(TIME, "") is None:
            del record[TIME]
        yield record


def _files(rows: pd.DataFrame) -> Iterator[bytes]:
    """The file of each image as it came, where it is known, else the pixels that the model sees."""
    from driftmill.vision import images

    originals = rows[ORIGINAL] if ORIGINAL in rows else [None] * len(rows)
    for original, pixels in zip(originals, rows[IMAGE], strict=True):
        yield original if original is not None else images.to_png(pixels)


def label_values(rows: pd.DataFrame, contract: Contract) -> list[str | float | None]:
    """The label of each row as `/feedback` takes it; None where it is missing."""
    name = contract.data.target.name
    if name not in rows:
        return [None] * len(rows)
    kind = str if contract.task != "regression" else float
    return [None if pd.isna(v) else kind(v) for v in rows[name]]


def _values(column: pd.Series[Any], kind: str) -> list[Any]:
    convert = {"int": int, "bool": bool, "float": float, "category": str}[kind]
    return [None if pd.isna(v) else convert(v) for v in column]


def _batches(
    rows: pd.DataFrame, contract: Contract, size: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for first in range(0, len(rows), size):
        yield first, list(records(rows.iloc[first : first + size], contract))


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


async def _predict(
    client: httpx.AsyncClient,
    batch: list[dict[str, Any]],
    first: int,
    labels: list[str | float | None],
    result: ReplayResult,
) -> list[Answer]:
    body = await _post(client, "/predict", {"records": batch}, result)
    if body is None:
        result.failed += len(batch)
        return []
    now = time.time()
    answers = [
        Answer(
            at=now,
            row=first + i,
            id=p["id"],
            version=body["version"],
            prediction=p["prediction"],
            score=p.get("score"),
            label=labels[first + i],
        )
        for i, p in enumerate(body["predictions"])
    ]
    result.sent += len(answers)
    result.versions[body["version"]] += len(answers)
    result.answers.extend(answers)
    return answers


async def _label(
    client: httpx.AsyncClient,
    due: deque[tuple[float, str, str | float]],
    done: asyncio.Event,
    result: ReplayResult,
) -> None:
    """Send labels when they are due, in order, and what is left once the rows have ended."""
    while True:
        ended = done.is_set()
        while due and (ended or due[0][0] <= time.monotonic()):
            now = time.monotonic()
            batch: list[dict[str, Any]] = []
            while due and len(batch) < LABELS and (ended or due[0][0] <= now):
                _, identity, label = due.popleft()
                batch.append({"id": identity, "label": label})
            body = await _post(client, "/feedback", {"labels": batch}, result)
            if body is None:
                result.labels_failed += len(batch)
            else:
                result.labelled += body["accepted"]
        if ended:
            return
        await _wait(done, LABEL_PERIOD)


async def _post(
    client: httpx.AsyncClient, page: str, body: dict[str, Any], result: ReplayResult
) -> dict[str, Any] | None:
    """The answer, or None after counting what went wrong."""
    try:
        response = await client.post(page, json=body)
    except httpx.HTTPError as error:
        result.errors[f"{page}: {type(error).__name__}: {error}".rstrip(": ")] += 1
        return None
    if response.status_code != 200:
        text = " ".join(response.text.split())[:200]
        result.errors[f"{page}: {response.status_code}: {text}"] += 1
        return None
    answer: dict[str, Any] = response.json()
    return answer
