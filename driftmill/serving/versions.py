"""What serves of one model: versions are loaded beside those that serve, and swapped in at once.

The rollout is polled; a version that it names is fetched, verified and warmed up in a thread, and
one assignment of `Versions.serving` swaps. What serves is one immutable `Serving`: a request takes
it once and keeps it, whatever is swapped meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from driftmill import bundle, rollout
from driftmill.bundle import Bundle, BundleError
from driftmill.rollout import Rollout, RolloutConflict
from driftmill.serving.canary import Watch
from driftmill.serving.codec import RequestError, codec_for
from driftmill.serving.log import Role, Schema
from driftmill.serving.metrics import Metrics
from driftmill.store import Store

if TYPE_CHECKING:
    from driftmill.serving.batches import Waiting

logger = logging.getLogger(__name__)

#: A version that did not load is tried again after this many seconds.
LOAD_AGAIN = 10.0


T = TypeVar("T")


class ModelError(RuntimeError):
    """A model that did not answer."""


class Model:
    """A loaded version with what requests need of it."""

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
        #: Requests that wait for it, and whether something will soon look at them.
        self.waiting: deque[Waiting] = deque()
        self.planned = False
        #: How it does as a challenger.
        self.watch = Watch(self.settings.canary.abort, self.settings.slo.latency_ms / 1000)
        #: Why it must not be asked any more.
        self.stopped = ""

    @cached_property
    def worker(self) -> ThreadPoolExecutor:
        """The one thread that it answers in when not on the event loop; ends with the model."""
        return ThreadPoolExecutor(1, thread_name_prefix=f"model-{self.version}")

    @cached_property
    def aside(self) -> ThreadPoolExecutor:
        """The one thread for what it predicts without answering."""
        return ThreadPoolExecutor(1, thread_name_prefix=f"aside-{self.version}")

    def run(self, records: Sequence[Any], keep: bool = True) -> tuple[np.ndarray, Sequence[Any]]:
        """Predict, as `Codec.run`. Raises ModelError where the model fails or gives no number."""
        output, kept = self._call(self.codec.run, self.bundle.session, records, keep)
        return self._finite(output), kept

    def ask(self, *arrays: np.ndarray) -> np.ndarray:
        """The output of arrays, as `Session.run`. Raises ModelError, as `run`."""
        return self._finite(self._call(self.bundle.session.run, *arrays))

    def gave_up(self) -> ModelError:
        """The error of what is asked of it after `stop`."""
        return ModelError(f"{self.version} {self.stopped}")

    def stop(self, reason: str) -> None:
        """Give up on it: what it computes just now ends at its next operator, with an error."""
        self.stopped = reason
        self.bundle.session.stop()

    def _call(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return call(*arguments)
        # ONNX Runtime raises classes of its own, some of which derive from Exception only.
        except Exception as error:
            if self.stopped:
                raise self.gave_up() from error
            raise ModelError(f"{self.version} failed: {error}") from error

    def _finite(self, output: np.ndarray) -> np.ndarray:
        if not np.isfinite(output).all():
            raise ModelError(f"{self.version} answered NaN or infinity")
        return output


@dataclass(frozen=True)
class Serving:
    """What serves: replaced as a whole, never changed."""

    rollout: Rollout
    champion: Model
    challenger: Model | None = None
    """None also where the rollout names one that did not load or has failed."""
    refused: tuple[dict[str, str], ...] = ()
    """Versions of the rollout that did not load, and why."""

    def role(self, key: str) -> Role:
        """Who answers requests with a key."""
        if self.challenger is not None and share(key) < self.rollout.weight:
            return "challenger"
        return "champion"

    def model(self, role: Role) -> Model:
        """Who has a role: the champion, or for anything else the challenger."""
        if role == "champion":
            return self.champion
        assert self.challenger is not None
        return self.challenger

    def role_of(self, version: str) -> Role:
        """The role of a version that is asked for by name. Raises RequestError (404)."""
        if version == self.champion.version:
            return "champion"
        if self.challenger is not None and version == self.challenger.version:
            return "challenger"
        raise RequestError(404, "not_found", f"The version {version!r} does not serve")


def share(key: str) -> float:
    """Where a request lies in [0, 1): the challenger answers those below its weight.

    It is the first 53 bits of the BLAKE2b digest (8 bytes, big-endian) of the key, over 2**53: the
    same on every replica, and a request that the challenger answers at one weight it answers at
    every higher one.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Versions:
    """Keeps what serves of one model.

    Args:
        store: where bundles and rollout lie.
        model: the model's name.
        cache: local folder for bundles of a remote store.
        metrics: of the model.
        on_swap: called with the new champion before it serves.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        cache: Path | None,
        metrics: Metrics,
        on_swap: Callable[[Model], None],
    ) -> None:
        self.store = store
        self.model = model
        self.serving: Serving | None = None
        #: Versions that did not load, while nothing serves yet or not the rollout's champion.
        self.refused: tuple[dict[str, str], ...] = ()
        self._cache = cache
        self._metrics = metrics
        self._on_swap = on_swap
        self._poll_seconds = 1.0
        self._poll_error: str | None = None
        self._load_again = 0.0
        self._rejected_revision = 0
        self._rollback: tuple[Serving, str] | None = None
        self._wake = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether the rollout is polled."""
        return self._poller is not None and not self._poller.done()

    def start(self) -> None:
        """Poll from now on; the first version loads in the background."""
        self._poller = asyncio.create_task(self._poll(), name="rollout-poll")
        self._poller.add_done_callback(_report_end)

    async def stop(self) -> None:
        """Poll no more."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])

    def roll_back(self, serving: Serving, reason: str) -> None:
        """Stop using a challenger at once, and tell the store at the next poll, which is now."""
        challenger = serving.challenger
        assert challenger is not None
        self._metrics.challenger_failed(challenger.version)
        if self.serving is not None and self.serving.challenger is challenger:
            logger.error("%s: the challenger %s", self.model, reason)
            self._rollback = (self.serving, reason)
            self.serving = replace(self.serving, challenger=None)
            self._metrics.serving(self.serving.rollout, None)
            self._wake.set()

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
                self._metrics.poll_failures.inc()
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
        loaded: dict[str, Model] = {}
        if before is not None:
            loaded = {m.version: m for m in (before.champion, before.challenger) if m}
        refused = []
        for version in filter(None, (newest.champion, newest.challenger)):
            if version not in loaded:
                try:
                    loaded[version] = Model(self._fetch(version))
                except (BundleError, OSError) as error:
                    refused.append({"version": version, "reason": str(error)})
                    self._metrics.load_failed(version)
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
            self._metrics.load_failed(challenger.version)
            logger.error("%s %s is refused: %s", self.model, challenger.version, reason)
            self._load_again = time.monotonic() + LOAD_AGAIN
            challenger = None
        if challenger is not None and (before is None or challenger is not before.challenger):
            rules = champion.settings
            challenger.watch = Watch(rules.canary.abort, rules.slo.latency_ms / 1000)
        return Serving(newest, champion, challenger, tuple(refused))

    def _fetch(self, version: str) -> Bundle:
        """Load a version. Raises BundleError, OSError."""
        found = bundle.fetch(self.store, self.model, version, self._cache)
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
        if new.champion.stopped:  # it failed as a challenger while it was promoted: load it anew
            self._wake.set()
            return
        self._poll_seconds = new.champion.settings.poll
        self._on_swap(new.champion)
        self.serving = new
        self.refused = new.refused
        self._metrics.serving(
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


def _report_end(poller: asyncio.Task[None]) -> None:
    """Say why the poll ended, if not by `stop`; /livez then asks for a restart."""
    if not poller.cancelled() and (error := poller.exception()) is not None:
        logger.critical("the poll of the rollout has ended", exc_info=error)
