"""Cuts the inference log into windows, has them judged, and keeps the results.

A window is `monitor.window` rows that the champion answered, in the order of `_at`. Everything
lies below `<model>/monitor` in the store:

| key | what |
|---|---|
| `windows/<index>/result.json` | the `WindowResult`; written last, and never changed |
| `windows/<index>/window.parquet` | the rows, where the window gets a report |
| `windows/<index>/report.{html,json}` | the report, written later by `driftmill.monitor.report` |
| `state.json`, `rest-<index>.parquet` | what has been read, and the rows read but not yet judged |

The state is written before the windows of a batch are judged, and the results that exist say how
far the batch has come. So a monitor that is killed at any point goes on with the same rows under
the same index: no window is lost, and none is counted twice.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from driftmill import bundle, rollout
from driftmill.bundle import PREDICTION, SCORE, Manifest
from driftmill.contract import Contract
from driftmill.features import EMBEDDING, IMAGE, Signature
from driftmill.monitor import drift, quality
from driftmill.monitor.drift import Quality, WindowResult
from driftmill.serving import log
from driftmill.store import Store

logger = logging.getLogger(__name__)

#: A segment that appears in the store this long after newer ones is not read any more. It bounds
#: the list of segments that have been read.
LATE = timedelta(hours=6)
#: Rows read at a time. A long backlog is worked off in batches of about this size.
BATCH_ROWS = 50_000
#: Bytes of images and embeddings after which no further segment is read, once a window is full.
BATCH_BYTES = 128 * 1024 * 1024
#: Answers and labels remembered for the quality; older ones are forgotten.
LABELLED_ROWS = 100_000
#: Windows of one streak that get a report: these first ones, then every hundredth.
REPORTS = 10

_ANSWER = ["_prediction_id", "_at", PREDICTION, SCORE]
#: Columns of the log that hold bytes.
_BINARY = (IMAGE, EMBEDDING)


class State(BaseModel):
    """What survives a restart, beside the results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    """The champion whose rows these are."""
    index: int
    """Of the first window of the batch."""
    rest: str
    """Key of the batch's rows, in order."""
    floor: str
    """Segments whose keys sort before this have been read."""
    seen: tuple[str, ...]
    """Segments after it that have been read."""


@dataclass(frozen=True)
class Champion:
    """What serves, as far as the monitor needs it."""

    version: str
    since: datetime | None
    """Rows before this belong to an earlier reign of the same version."""
    signature: Signature
    reference: tuple[drift.Profile, ...]
    expectation: quality.Expectation | None


@dataclass
class Cursor:
    """Which segments of a log have been read, in bounded space."""

    floor: str = ""
    seen: set[str] = field(default_factory=set)

    def new(self, keys: Iterable[str]) -> list[str]:
        """Those that have not been read."""
        return [key for key in keys if key >= self.floor and key not in self.seen]

    def prune(self) -> None:
        """Forget the segments that are older than the newest by more than `LATE`."""
        if not self.seen:
            return
        folder, day, name = max(self.seen).rsplit("/", 2)
        try:
            newest = datetime.strptime(day + name[:6], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        except ValueError:
            return  # a file that the log did not write
        # A segment from a clock that runs ahead must not hide those to come.
        oldest = min(newest, datetime.now(UTC)) - LATE
        self.floor = max(self.floor, f"{folder}/{oldest:%Y%m%d/%H%M%S}")
        self.seen = {key for key in self.seen if key >= self.floor}


class Monitor:
    """Watches one model. Not thread-safe: one call at a time.

    Args:
        contract: the model, and the settings of its monitor.
        store: where log, bundles and rollout lie.
    """

    def __init__(self, contract: Contract, store: Store) -> None:
        self.contract = contract
        self.store = store
        self.champion: Champion | None = None
        #: The newest result of the present champion.
        self.current: WindowResult | None = None
        #: Number of the next window.
        self.next_index = 0
        self.skipped_segments = 0
        self.labelled_rows = 0
        #: Whether the log held more than the last tick read.
        self.behind = False
        #: Windows whose rows were kept for a report that is not made yet; the caller empties it.
        self.unreported: list[int] = []
        self._revision = 0
        self._predictions = Cursor()
        self._labels = Cursor()
        self._buffer = pd.DataFrame()
        self._rest_key: str | None = None
        self._answers = pd.DataFrame(columns=_ANSWER)
        self._truth = pd.DataFrame(columns=["_prediction_id", "_at", quality.LABEL])
        self._new_labels = False
        self._restored = False

    @property
    def lag_rows(self) -> int:
        """Rows that have been read and not yet judged."""
        return len(self._buffer)

    def tick(self) -> list[WindowResult]:
        """Read what is new, up to a batch, and judge the windows that are full.

        Raises:
            BundleError: the champion's bundle cannot be used.
            OSError: the store cannot be reached. Call again later.
        """
        model = self.contract.model
        # The order matters: a version is in the rollout before any row of it is in the log.
        predictions = log.segments(self.store, model, "predictions")
        labels = log.segments(self.store, model, "labels")
        if not self._restored:
            self._restore()
        if not self._follow_rollout():
            return []
        new = self._predictions.new(predictions)
        self._read_predictions(new)
        self._read_labels(self._labels.new(labels))
        return self._judge()

    def _restore(self) -> None:
        """Take up where the last process was stopped."""
        key = f"{_folder(self.contract.model)}/state.json"
        if self.store.exists(key):
            state = State.model_validate_json(self.store.read(key))
            self._predictions = Cursor(state.floor, set(state.seen))
            rows = pd.read_parquet(io.BytesIO(self.store.read(state.rest)))
            self.next_index, done = state.index, 0
            while result := _result(self.store, self.contract.model, self.next_index):
                self.current = result
                self.next_index += 1
                done += result.rows
            self._buffer = rows.iloc[done:].reset_index(drop=True)
            self._rest_key = state.rest
            if self.current is None and self.next_index:
                self.current = _result(self.store, self.contract.model, self.next_index - 1)
            version = state.version
            self._buffer = self._buffer[self._buffer["_version"] == version]
        self.unreported = _unreported(self.store, self.contract.model)
        self._restored = True

    def _follow_rollout(self) -> bool:
        """Load the champion where it has changed. False while there is none."""
        model = self.contract.model
        now = rollout.read(self.store, model, after=self._revision)
        if now is None:
            return self.champion is not None
        if self.champion is None or now.champion != self.champion.version:
            since = _reigns_since(rollout.history(self.store, model), now.champion)
            self.champion = _load(self.contract, self.store, now.champion, since)
            if self.current is not None and self.current.version != now.champion:
                self.current = None
            self._buffer = self._mine(self._buffer)
            self._answers = self._answers.iloc[:0]
            self._recall()
            logger.info("the champion is %s", now.champion)
        self._revision = now.revision
        return True

    def _recall(self) -> None:
        """Read the champion's newest answers again, for labels that are still to come."""
        count = 0
        frames: list[pd.DataFrame] = []
        for key in sorted(self._predictions.seen, reverse=True):
            rows = self._segment(key, without=_BINARY)
            if rows is None:
                continue
            mine = self._mine(rows)
            if len(mine):
                frames.insert(0, mine.reindex(columns=_ANSWER))
            count += len(mine)
            if count >= LABELLED_ROWS or (len(rows) and not len(mine)):
                break
        if frames:
            self._answers = pd.concat(frames)

    def _read_predictions(self, keys: list[str]) -> None:
        count, size = len(self._buffer), _bytes(self._buffer)
        window = self.contract.monitor.window
        frames: list[pd.DataFrame] = []
        done = []
        for key in keys:
            if count >= window and (count >= BATCH_ROWS or size >= BATCH_BYTES):
                break
            rows = self._segment(key)
            done.append(key)
            mine = None if rows is None else self._mine(rows)
            if mine is not None and len(mine):
                frames.append(mine)
                count += len(mine)
                size += _bytes(mine)
        # Only now: where the store fails half-way, the next call reads all of them again.
        self._predictions.seen.update(done)
        self.behind = len(done) < len(keys)
        if not frames:
            return
        held = [self._buffer] if len(self._buffer) else []
        self._buffer = pd.concat([*held, *frames], ignore_index=True).sort_values(
            ["_at", "_prediction_id"], ignore_index=True
        )
        held = [self._answers] if len(self._answers) else []
        fresh = [frame.reindex(columns=_ANSWER) for frame in frames]
        self._answers = pd.concat([*held, *fresh]).tail(LABELLED_ROWS)

    def _read_labels(self, keys: list[str]) -> None:
        """Read labels, newest segments first, until enough are remembered."""
        frames: list[pd.DataFrame] = []
        count = 0
        for key in reversed(keys):
            rows = self._segment(key) if count < LABELLED_ROWS else None
            if rows is not None:
                frames.insert(0, rows)
                count += len(rows)
        self._labels.seen.update(keys)
        if not frames:
            return
        self.labelled_rows += count
        self._new_labels = True
        held = [self._truth] if len(self._truth) else []
        truth = pd.concat([*held, *frames], ignore_index=True).sort_values("_at", kind="stable")
        self._truth = truth.drop_duplicates("_prediction_id", keep="last").tail(LABELLED_ROWS)
        self._labels.prune()

    def _segment(self, key: str, without: tuple[str, ...] = ()) -> pd.DataFrame | None:
        """The rows of a segment; None, with a word in the log, where it cannot be read."""
        try:
            rows = log.read(self.store, [key], without=without)
        except (OSError, pa.ArrowException) as error:
            # Arrow also raises OSError for damaged content, but without an errno.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._skip(key, str(error))
            return None
        wanted = {"_prediction_id", "_at"}
        wanted |= {quality.LABEL} if "/log/labels/" in key else {"_version", "_role", PREDICTION}
        if absent := sorted(wanted - set(rows.columns)):
            self._skip(key, f"it has no column {', '.join(absent)}")
            return None
        rows["_at"] = pd.to_datetime(rows["_at"], utc=True)
        return rows

    def _skip(self, key: str, reason: str) -> None:
        self.skipped_segments += 1
        logger.error("segment %s is skipped: %s", key, reason)

    def _mine(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows that the champion answered in its present reign."""
        assert self.champion is not None
        if rows.empty:
            return rows.iloc[:0]
        mine = (rows["_version"] == self.champion.version) & (rows["_role"] == "champion")
        if self.champion.since is not None:
            mine &= rows["_at"] >= self.champion.since
        return rows[mine]

    def _judge(self) -> list[WindowResult]:
        size = self.contract.monitor.window
        if len(self._buffer) < size:
            return []
        self._save()
        results = []
        while len(self._buffer) >= size:
            results.append(self._judge_one(self._buffer.iloc[:size].reset_index(drop=True)))
            self._buffer = self._buffer.iloc[size:]
        return results

    def _save(self) -> None:
        """Write down the batch before the first of its windows is judged."""
        assert self.champion is not None
        self._predictions.prune()
        folder = _folder(self.contract.model)
        old, self._rest_key = self._rest_key, f"{folder}/rest-{self.next_index:06d}.parquet"
        self.store.write(self._rest_key, _parquet(self._buffer))
        state = State(
            version=self.champion.version,
            index=self.next_index,
            rest=self._rest_key,
            floor=self._predictions.floor,
            seen=tuple(sorted(self._predictions.seen)),
        )
        self.store.write(f"{folder}/state.json", state.model_dump_json().encode())
        if old is not None and old != self._rest_key:
            self.store.delete(old)

    def _judge_one(self, rows: pd.DataFrame) -> WindowResult:
        assert self.champion is not None
        result = drift.decide(
            self.champion.reference,
            self.contract.monitor,
            rows,
            index=self.next_index,
            version=self.champion.version,
            previous=self.current,
            quality=self._quality(),
        )
        key = window_key(self.contract.model, self.next_index)
        if self.current is None or (
            result.drifted and (result.streak <= REPORTS or result.streak % 100 == 0)
        ):
            self.store.write(f"{key}/window.parquet", _parquet(rows))
            self.unreported.append(self.next_index)
        self.store.write(f"{key}/result.json", result.model_dump_json(indent=1).encode())
        self.current = result
        self.next_index += 1
        return result

    def _quality(self) -> Quality | None:
        assert self.champion is not None
        previous = self.current.quality if self.current is not None else None
        if self.champion.expectation is None or not self._new_labels:
            return previous
        self._new_labels = False
        truth = self._truth.set_index("_prediction_id")[quality.LABEL]
        rows = self._answers.join(truth, on="_prediction_id", how="inner")
        return quality.measure(
            self.champion.expectation, self.contract, self.champion.signature, rows, previous
        )


def window_key(model: str, index: int) -> str:
    """The folder of a window in the store."""
    return f"{_folder(model)}/windows/{index:06d}"


def results(
    store: Store, model: str, last: int | None = None, after: int | None = None
) -> list[WindowResult]:
    """The results of all windows, of the last few, or of those after an index; oldest first."""
    keys = [k for k in store.list(f"{_folder(model)}/windows") if k.endswith("/result.json")]
    if after is not None:
        keys = [k for k in keys if k > f"{window_key(model, after)}/result.json"]
    keys = keys if last is None else keys[max(0, len(keys) - last) :]
    return [WindowResult.model_validate_json(store.read(key)) for key in keys]


def rows(store: Store, model: str, index: int) -> pd.DataFrame:
    """The rows of a window. Raises FileNotFoundError where they have not been kept."""
    return pd.read_parquet(io.BytesIO(store.read(f"{window_key(model, index)}/window.parquet")))


def reference(store: Store, model: str, version: str) -> tuple[Manifest, Signature, pd.DataFrame]:
    """Manifest, signature and reference rows of a bundle, verified; the model is not loaded.

    Raises:
        BundleError: it is not there, or damaged.
    """
    folder = bundle.locate(store, model, version)
    manifest = bundle.verify(folder)
    signature = Signature.model_validate_json((folder / "schema.json").read_bytes())
    return manifest, signature, pd.read_parquet(folder / "reference.parquet")


def _load(contract: Contract, store: Store, version: str, since: datetime | None) -> Champion:
    manifest, signature, rows = reference(store, contract.model, version)
    test_rows = manifest.data.get("test_rows", 0)
    return Champion(
        version=version,
        since=since,
        signature=signature,
        reference=drift.compile_reference(signature, rows),
        expectation=quality.expect(contract, signature, manifest.metrics, test_rows, rows),
    )


def _reigns_since(revisions: list[rollout.Rollout], champion: str) -> datetime | None:
    """When a version that had been champion before became it again; None for the first time."""
    reigns = [
        now
        for before, now in zip([None, *revisions], revisions, strict=False)
        if now.champion == champion and (before is None or before.champion != champion)
    ]
    return reigns[-1].at if len(reigns) > 1 else None


def _result(store: Store, model: str, index: int) -> WindowResult | None:
    key = f"{window_key(model, index)}/result.json"
    return WindowResult.model_validate_json(store.read(key)) if store.exists(key) else None


def _unreported(store: Store, model: str) -> list[int]:
    files: dict[str, set[str]] = {}
    for key in store.list(f"{_folder(model)}/windows"):
        window, name = key.rsplit("/", 2)[1:]
        files.setdefault(window, set()).add(name)
    wanted = {"result.json", "window.parquet"}
    return [int(w) for w, names in files.items() if wanted <= names and "report.json" not in names]


def _folder(model: str) -> str:
    return f"{model}/monitor"


def _bytes(rows: pd.DataFrame) -> int:
    """Size of a table's images and embeddings."""
    return sum(
        len(value)
        for name in _BINARY
        if name in rows
        for value in rows[name]
        if isinstance(value, bytes)
    )


def _parquet(rows: pd.DataFrame) -> bytes:
    """Rows as Parquet; a column that mixes types is kept as text, and of images and embeddings
    what is bytes."""
    rows = rows.copy(deep=False)
    for name in rows.select_dtypes("object").columns:
        values = rows[name]
        if name in _BINARY:
            rows[name] = [value if isinstance(value, bytes) else None for value in values]
        else:
            rows[name] = values.where(values.isna(), values.map(str))
    buffer = io.BytesIO()
    rows.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()
