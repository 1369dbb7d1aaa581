"""Why did the model answer this record as it did?

**Tables: Shapley values** of the columns (Shapley 1953), sampled as by Štrumbelj and Kononenko
(2014) in *Explaining prediction models and individual predictions with feature contributions*. A
walk leads from a row of the reference to the record: one column after the other, in a random order,
takes the record's value, and is credited with what that does to the score. Every order is walked
forwards and backwards, which makes the mean over few walks more exact (antithetic sampling), and
every reference row starts equally many walks, so that a record's contributions add up to its score
less the mean score of these rows, exactly. Rows and orders are the same for every record: the same
record gets the same answer.

**Images: occlusion** (Zeiler and Fergus 2014): what the probability of the chosen label loses when
a patch is hidden behind the image's mean colour.

Both ask only the model, so they work alike for every family. They do so in a thread of their own, a
small batch at a time, and rest after each for as long as it took: predictions hardly wait for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from driftmill import bundle, columns
from driftmill.features import MISSING, Signature
from driftmill.serving.codec import JSON, RequestError, TableCodec
from driftmill.serving.rate import Rate
from driftmill.serving.versions import Model, ModelError
from driftmill.store import Store

logger = logging.getLogger(__name__)

#: Rows that go through the model at once: little enough that nothing else waits long for Python's
#: lock or for a core. (A thread of low priority would be worse: it can lose its core while it has
#: the lock.)
BATCH_ROWS = 32
#: Requests that may wait, the one being answered included.
WAITING = 4
#: Patches of an image, across and down.
GRID = 7

_REFERENCE = "reference.parquet"


class Explanation(msgspec.Struct, gc=False, omit_defaults=True):
    """Why one record was answered as it was."""

    prediction: str | float
    label: str | None = None
    """Classification: of which the score is the probability."""
    score: float | None = None
    """Classification: what is explained; of a regression it is the prediction."""
    base: float | None = None
    """Of a table: mean score, or prediction, of the reference rows."""
    contributions: dict[str, float] | None = None
    """Of a table: of each column; they add up to what is explained less the base."""
    map: list[list[float]] | None = None
    """Of an image: what the score loses without each patch, from the top left, row by row."""


class Explanations(msgspec.Struct, gc=False):
    """The answer to `POST /explain`."""

    model: str
    version: str
    explanations: list[Explanation]


@dataclass(frozen=True)
class Background:
    """What the records of a version are compared with."""

    arrays: tuple[np.ndarray, np.ndarray]
    """Reference rows: (rows, a) float32 and (rows, b) str, as `features.arrays` makes them."""
    output: np.ndarray
    """The model's, of these rows."""
    orders: np.ndarray
    """(rows, walks, columns): the order of the columns in each walk from each row."""


class Explainer:
    """Explains predictions of one model, one request at a time.

    Args:
        store: where the bundles' reference rows lie.
        model: the model's name.
    """

    def __init__(self, store: Store, model: str) -> None:
        self.model = model
        self._store = store
        self._waiting = 0
        self._rate = Rate(1.0)
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, "explain")
        self._backgrounds: WeakKeyDictionary[Model, Background] = WeakKeyDictionary()

    async def explain(self, model: Model, body: bytes, kind: str = JSON) -> bytes:
        """The answer to a body of `POST /explain`.

        Args:
            model: which version is asked.
            body: that of `POST /predict`, of few records.
            kind: its content type.

        Raises:
            RequestError: as of `/predict`, and 404 where the contract allows no explanations, 429
                for those beyond its rate.
        """
        settings = model.settings.explain
        self._check_rate(settings.rate)
        records = model.codec.records(body, kind)
        if len(records) > settings.max_records:
            text = f"Expected at most {settings.max_records} records to explain, got {len(records)}"
            raise RequestError(422, "invalid_field", text, "$.records")
        if self._waiting == WAITING:
            raise _later(503, "overloaded", "Too many explanations wait", 1)
        self._waiting += 1
        left = threading.Event()
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._all, model, records, left)
        except ModelError:
            raise RequestError(500, "model_failed", "The model gave no answer") from None
        except OSError as error:
            text = f"The reference rows of {model.version} cannot be read"
            logger.error("%s: %s: %s", self.model, text, error)
            raise _later(503, "reference_unavailable", text, 10) from error
        finally:
            self._waiting -= 1
            left.set()
        return msgspec.json.encode(Explanations(self.model, model.version, found))

    def stop(self) -> None:
        """End what runs and wait for the thread."""
        self._stopped = True
        self._thread.shutdown(cancel_futures=True)

    def _check_rate(self, rate: float) -> None:
        """Raise RequestError: 404 where nothing is explained, 429 beyond so many a second."""
        if not rate:
            raise RequestError(
                404, "not_found", "Explanations are switched off: see serve.explain.rate"
            )
        self._rate.change(rate)  # that of the version that is asked
        wait = self._rate.wait(None, time.monotonic())
        if wait:
            text = f"At most {rate:g} explanations a second are made"
            raise _later(429, "too_many_requests", text, math.ceil(wait))

    def _all(
        self, model: Model, records: Sequence[Any], left: threading.Event
    ) -> list[Explanation]:
        """Explain some records. In the thread. Raises ModelError, OSError, RequestError."""

        def ask(*arrays: np.ndarray) -> np.ndarray:
            if left.is_set() or self._stopped:
                raise ModelError("nobody waits for the explanation any more")
            began = time.perf_counter()
            output = model.ask(*arrays)
            left.wait(time.perf_counter() - began)
            return output

        decoded = model.codec.decode(records)
        if not isinstance(model.codec, TableCodec):
            return [
                _occluded(ask, r.decoded.pixels, model.bundle.signature, model.codec.batch_rows)
                for r in decoded
            ]
        background = self._background(model)
        numeric, categorical = model.codec.arrays(decoded)
        return [
            explained(ask, pair, background, model.bundle.signature)
            for pair in zip(numeric, categorical, strict=True)
        ]

    def _background(self, model: Model) -> Background:
        """Made at a version's first explanation: most versions never need it. Raises OSError."""
        found = self._backgrounds.get(model)
        if found is None:
            # A copy of a remote bundle is gone by now.
            content = self._store.read(f"{bundle.key(self.model, model.version)}/{_REFERENCE}")
            if hashlib.sha256(content).hexdigest() != model.bundle.manifest.files[_REFERENCE]:
                raise OSError(f"{_REFERENCE} is not the file that the manifest names (sha256)")
            settings = model.settings.explain
            signature = model.bundle.signature
            arrays = sample(content, signature, settings.background)
            orders = orders_of(len(signature.columns), len(arrays[0]), settings.samples)
            found = Background(arrays, model.ask(*arrays), orders)
            self._backgrounds[model] = found
        return found


#: Asks a model: its inputs, as `Session.run` takes them, to its output.
Ask = Callable[..., np.ndarray]


def explained(
    ask: Ask, record: tuple[np.ndarray, np.ndarray], background: Background, signature: Signature
) -> Explanation:
    """Explain a record of a table.

    Args:
        ask: the model.
        record: its numbers (a,) and its texts (b,).
        background: what it is compared with.
        signature: of the model.
    """
    (output,) = ask(*(part[None] for part in record))
    prediction, label, score_of = _reading(output, signature)
    starts = score_of(background.output).astype(np.float64)
    score = float(score_of(output[None])[0])
    orders = background.orders
    rows, walks, width = orders.shape
    places = [
        np.array([c.is_numeric == is_numeric for c in signature.columns]).nonzero()[0]
        for is_numeric in (True, False)
    ]
    steps = orders.reshape(-1, width)
    ranks = np.argsort(steps, axis=1)
    start = np.repeat(np.arange(rows), walks)
    sums = np.zeros(width)
    at_once = max(1, BATCH_ROWS // max(1, width - 1))
    for first in range(0, len(steps), at_once):
        part = slice(first, first + at_once)
        # (walks, steps but the last, columns): whether the record's value has been taken by then.
        taken = ranks[part, None, :] < np.arange(1, width)[:, None]
        asked = len(taken) * (width - 1)
        mixed = [
            np.where(taken[..., at], own, others[start[part], None]).reshape(asked, len(at))
            for at, own, others in zip(places, record, background.arrays, strict=True)
        ]
        scores = np.empty((len(taken), width + 1))
        scores[:, 0] = starts[start[part]]
        scores[:, -1] = score
        if width > 1:
            scores[:, 1:-1] = score_of(ask(*mixed)).reshape(len(taken), -1)
        np.add.at(sums, steps[part], np.diff(scores, axis=1))
    shares = (sums / len(steps)).tolist()
    return Explanation(
        prediction,
        label,
        None if label is None else score,
        float(starts.mean()),
        {c.name: share for c, share in zip(signature.columns, shares, strict=True)},
    )


def orders_of(width: int, rows: int, samples: int, seed: int = 0) -> np.ndarray:
    """Orders of columns for each row: int16 (rows, walks, width).

    Args:
        width: columns.
        rows: of the reference.
        samples: random orders for each row; each stands there backwards, too. Where there are not
            more orders than that, all of them are returned, and the values are exact.
        seed: of the orders.
    """
    if width <= 8 and math.factorial(width) <= 2 * samples:
        every = np.array(list(itertools.permutations(range(width))), dtype=np.int16)
        return np.broadcast_to(every, (rows, *every.shape))
    rng = np.random.default_rng(seed)
    columns = np.broadcast_to(np.arange(width, dtype=np.int16), (rows, samples, width))
    forwards = rng.permuted(columns, axis=2)
    return np.concatenate([forwards, forwards[:, :, ::-1]], axis=1)


def sample(content: bytes, signature: Signature, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced rows of a `reference.parquet`, all where it has no more, as `features.arrays`
    makes them of a table."""
    names = [c.name for c in signature.columns]
    table = pa.parquet.read_table(pa.BufferReader(content), columns=names)
    chosen = np.linspace(0, len(table) - 1, min(rows, len(table))).round().astype(int)
    table = table.take(pa.array(chosen))
    numeric = np.empty((len(table), len(signature.numeric)), np.float32)
    for place, name in enumerate(signature.numeric):
        numeric[:, place] = columns.wide(table[name].combine_chunks())
    texts = np.empty((len(table), len(signature.categorical)), object)
    for place, name in enumerate(signature.categorical):
        texts[:, place] = [MISSING if v is None else v for v in table[name].to_pylist()]
    return numeric, texts


def _occluded(ask: Ask, image: np.ndarray, signature: Signature, at_once: int) -> Explanation:
    """Explain an image: uint8 (channels, height, width)."""
    (output,) = ask(image[None])
    prediction, label, score_of = _reading(output, signature)
    score = float(score_of(output[None])[0])
    _, height, width = image.shape
    down, across = (np.linspace(0, n, min(GRID, n) + 1).astype(int) for n in (height, width))
    mean = image.mean(axis=(1, 2)).round().astype(np.uint8)[:, None, None]
    hidden = []
    for top, bottom in itertools.pairwise(down):
        for left, right in itertools.pairwise(across):
            hidden.append(image.copy())
            hidden[-1][:, top:bottom, left:right] = mean
    lost = np.concatenate(
        [
            score - score_of(ask(np.stack(hidden[i : i + at_once])))
            for i in range(0, len(hidden), at_once)
        ]
    )
    return Explanation(
        prediction, label, score, map=lost.reshape(len(down) - 1, len(across) - 1).tolist()
    )


def _reading(
    output: np.ndarray, signature: Signature
) -> tuple[str | float, str | None, Callable[[np.ndarray], np.ndarray]]:
    """How a model's output of one record is read: the prediction; the label whose probability its
    score is, None of a regression; and what makes scores (rows,) of outputs."""
    labels = signature.labels
    if not labels:
        return float(output), None, lambda outputs: outputs
    chosen = int(output.argmax())
    column = 1 if len(labels) == 2 else chosen
    return labels[chosen], labels[column], lambda outputs: outputs[:, column]


def _later(status: int, code: str, message: str, seconds: int) -> RequestError:
    headers = ((b"retry-after", b"%d" % seconds),)
    return RequestError(status, code, message, headers=headers)
