"""The inference log: every prediction and every label, kept before it is acknowledged.

A living process appends JSON lines to a spool file of its own, one write a batch: a process that
is killed has lost nothing that it acknowledged. A background thread turns closed spool files into
Parquet in the store, `<model>/log/<kind>/<YYYYMMDD>/<HHMMSSffffff>-<writer>-<seq>.parquet`, and
removes them. The key follows from the spool file's name, so that a crash between the two writes
the same segment again and nothing twice. A writer holds a lock (`flock`) on its open file: a
spool file without a lock is closed, or its writer is dead, and any process may move it.

What survives a loss of power follows from `fsync`: `none` leaves it to the operating system when
the disk takes what was written; `batch` has the disk take it before `append` returns; `interval`
has another thread do so every so often. Under the latter two a spool file is removed only after
the disk has its segment.

The rows of a model of images also hold `_image`, the pixels that the model saw as PNG (null where
the contract keeps none, and of a shadow), and `_embedding`, float16 little-endian: base64 in the
spool, bytes in Parquet. They are most of a segment: readers may leave them out (`without`).

Readers (`segments`, `read`, `labelled`) import pandas; the writing side does not.
"""

from __future__ import annotations

import base64
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet

from driftmill import contract
from driftmill.contract import Fsync, Task
from driftmill.features import EMBEDDING, ID, IMAGE, TIME, Signature
from driftmill.store import Store

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Kind = Literal["predictions", "labels"]
Role = Literal["champion", "challenger", "shadow"]

#: A spool file of more bytes is closed, so that it can be moved within memory.
ROTATE_BYTES = 64 * 1024 * 1024
#: Clocks of two processes may differ by this much.
_SKEW = timedelta(minutes=1)
_STAMP = pa.timestamp("us", "UTC")


class Schema(msgspec.Struct, frozen=True):
    """What the rows of a spool file look like: its first line."""

    kind: Kind
    task: Task
    numeric: tuple[str, ...] = ()
    boolean: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """All inputs in the contract's order."""
    binary: tuple[str, ...] = ()
    """Columns of bytes, last."""
    format: int = 1

    @classmethod
    def predictions(cls, signature: Signature) -> Schema:
        """The schema of a model's predictions."""
        columns = signature.columns
        return cls(
            kind="predictions",
            task=signature.task,
            numeric=tuple(c.name for c in columns if c.type in ("float", "int")),
            boolean=tuple(c.name for c in columns if c.type == "bool"),
            text=tuple(c.name for c in columns if c.type == "category"),
            columns=tuple(c.name for c in columns),
            binary=() if signature.image is None else (IMAGE, EMBEDDING),
        )

    @classmethod
    def labels(cls, signature: Signature) -> Schema:
        """The schema of a model's labels."""
        return cls(kind="labels", task=signature.task)


class Prediction(msgspec.Struct, gc=False, rename=lambda name: f"_{name}"):
    """A row of the log of predictions; `at` in microseconds since 1970."""

    prediction_id: str
    request_id: str
    at: int
    version: str
    role: Role
    prediction: str | float
    score: float | None
    record: Any
    """The request's record: `_id`, `_time` and the inputs."""


class Label(msgspec.Struct, gc=False, rename=lambda name: f"_{name}"):
    """A row of the log of labels; `at` in microseconds since 1970."""

    prediction_id: str
    at: int
    label: str | float


_encoder = msgspec.json.Encoder()


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Log:
    """The writing side, for one model in one process.

    `append` may be called from any thread; shipping runs in a thread of its own between `start` and
    `close`.

    Args:
        spool: folder of the spool files, on a local disk.
        store: where the segments go.
        model: whose log it is.
        rotate_rows: rows after which a spool file is closed.
        rotate: seconds after which one that holds rows is closed.
        fsync: when the disk has to take what was written.
        fsync_interval: seconds between two times, for `interval`.
    """

    def __init__(
        self,
        spool: Path,
        store: Store,
        model: str,
        rotate_rows: int = 20_000,
        rotate: float = 2.0,
        fsync: Fsync = "none",
        fsync_interval: float = 1.0,
    ) -> None:
        self.folder = spool / model
        self.store = store
        self.model = model
        self.rotate_rows = rotate_rows
        self.rotate = rotate
        self.fsync: Fsync = fsync
        self.fsync_interval = fsync_interval
        #: Spool files that wait, as of the last sweep.
        self.backlog = 0
        #: Why the last sweep left something behind, if it did.
        self.error: str | None = None
        self.ship_failures = 0
        #: Times that the disk failed under `interval`.
        self.sync_failures = 0
        self._seq = 0
        self._files: dict[Schema, _SpoolFile] = {}
        # One for each schema: of one writer's files, one ends before the next begins.
        self._writers: dict[Schema, str] = {}
        self._known: set[Path] = set()
        # Under `interval`: full files that the disk has yet to take; closed by `_sync` alone.
        self._full: list[_SpoolFile] = []
        # The disk failed under `interval`: until it works again, `append` waits for it.
        self._sync_failed = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._sync_now = threading.Event()
        self._stop = False
        # A store that hangs must not keep the disk from being asked: two threads.
        self._threads = [
            threading.Thread(target=self._ship, name="inference-log", daemon=True),
            threading.Thread(target=self._keep_synced, name="inference-log-sync", daemon=True),
        ]

    def configure(self, settings: contract.Log) -> None:
        """Work by a contract's section from now on."""
        changed = settings.fsync != self.fsync
        self.rotate_rows = settings.rotate_rows
        self.rotate = settings.rotate
        self.fsync = settings.fsync
        self.fsync_interval = settings.fsync_interval
        if changed:  # a file keeps the policy that it was opened with
            self._close_files(due_only=False)
        self._sync_now.set()

    def start(self) -> None:
        """Move what dead writers left, and whatever is closed from now on."""
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether the log's threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Close the open files and move all there is into the store."""
        self._stop = True
        self._wake.set()
        self._sync_now.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._close_files(due_only=False)
        self._sync()
        self.sweep()

    def append(
        self,
        schema: Schema,
        rows: Sequence[Prediction] | Sequence[Label],
        acknowledged: bool = True,
    ) -> None:
        """Write rows with one system call.

        Args:
            schema: of the rows.
            rows: at least one.
            acknowledged: whether somebody will be told that they are kept; `batch` has the disk
                take them only then.

        Raises:
            OSError: they are not kept; the next call tries again.
        """
        content = _encoder.encode_lines(rows)
        with self._lock:
            file = self._files.get(schema)
            if file is None:
                file = self._files[schema] = self._open(schema)
            sync = acknowledged and (file.fsync == "batch" or self._sync_failed)
            try:
                file.write(content, len(rows), sync)
            except OSError:
                if file.broken:
                    self._drop(schema)
                raise
            if sync:
                self._sync_failed = False
            if file.rows >= self.rotate_rows or file.size >= ROTATE_BYTES:
                self._drop(schema)
                self._wake.set()

    def sweep(self) -> None:
        """Move every spool file without a living writer into the store."""
        waiting, error = 0, None
        for path in sorted(self.folder.glob("*/*.jsonl")):
            try:
                _move(path, self.store, durably=self.fsync != "none")
            except (OSError, pa.ArrowException, msgspec.DecodeError) as problem:
                waiting += 1
                self.ship_failures += 1
                error = f"{path.name} stays in the spool: {problem}"
        if error != self.error:
            if error:
                logger.error("%s", error)
            else:
                logger.info("the inference log moves into the store again")
        self.backlog, self.error = waiting, error

    def _ship(self) -> None:
        while not self._stop:
            self.sweep()
            self._wake.wait(min(max(self.rotate / 4, 0.05), 1.0))
            self._wake.clear()
            self._close_files(due_only=True)

    def _keep_synced(self) -> None:
        while not self._stop:
            self._sync_now.wait(self.fsync_interval)
            self._sync_now.clear()
            self._sync()

    def _sync(self) -> None:
        """Under `interval`, have the disk take what was written, while others write on."""
        with self._lock:
            full, self._full = self._full, []
            # Of two threads that ask about one file, the disk tells only one that it failed.
            files = [] if self._sync_failed else list(self._files.values())
        for file in (*full, *files):
            if file.fsync == "interval":
                try:
                    file.sync()
                except OSError as error:
                    self._not_synced(file, error)
        for file in full:
            file.close()
        if full:
            self._wake.set()

    def _not_synced(self, file: _SpoolFile, error: OSError) -> None:
        """Write to another file from now on: what became of this one's pages is not known, and to
        ask the disk again proves nothing."""
        if not self._sync_failed:
            logger.error(
                "the disk did not take the inference log's last rows; "
                "they are lost if the machine stops before they are in the store: %s",
                error,
            )
        with self._lock:
            self._sync_failed = True
            self.sync_failures += 1
            for schema, open_file in list(self._files.items()):
                if open_file is file:
                    self._drop(schema)

    def _close_files(self, due_only: bool) -> None:
        with self._lock:
            due = time.monotonic() - self.rotate
            for schema, file in list(self._files.items()):
                if not due_only or (file.rows and file.opened <= due):
                    self._drop(schema)

    def _drop(self, schema: Schema) -> None:
        file = self._files.pop(schema)
        if file.fsync == "interval":
            self._full.append(file)
            self._sync_now.set()
        else:
            file.close()

    def _open(self, schema: Schema) -> _SpoolFile:
        folder = self.folder / schema.kind
        folder.mkdir(parents=True, exist_ok=True)
        writer = self._writers.setdefault(schema, secrets.token_hex(4))
        while True:
            self._seq += 1
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S%f")
            path = folder / f"{stamp}-{writer}-{self._seq:06d}.jsonl"
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            # A sweep between the two calls takes the file for a dead writer's and removes it.
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            if os.fstat(fd).st_nlink:
                header = _encoder.encode(schema) + b"\n"
                return _SpoolFile(fd, header, self.fsync, folder, self._known)
            os.close(fd)


class _SpoolFile:
    """An open, locked spool file; the header goes out with the first rows."""

    def __init__(
        self, fd: int, header: bytes, fsync: Fsync, folder: Path, known: set[Path]
    ) -> None:
        self.fd = fd
        self.header = header
        self.fsync = fsync
        self.folder = folder
        #: Folders that the disk knows by name.
        self.known = known
        #: The disk knows the file by name.
        self.named = False
        #: The disk may not have all that was written.
        self.dirty = False
        self.size = 0
        self.rows = 0
        self.opened = time.monotonic()
        #: It ends in half a batch that could not be taken back, or the disk failed.
        self.broken = False

    def write(self, content: bytes, rows: int, sync: bool) -> None:
        if not self.size:
            content = self.header + content
            self.opened = time.monotonic()
        try:
            written = os.write(self.fd, content)
            if written < len(content):
                raise OSError(28, "No space left on device: only part of the batch was written")
            self.dirty = True
            if sync:
                self.sync()
        except OSError:
            try:
                os.ftruncate(self.fd, self.size)
            except OSError:
                self.broken = True
            raise
        self.size += written
        self.rows += rows

    def sync(self) -> None:
        """Have the disk take what was written so far. After an OSError, what it has is unknown."""
        if not self.dirty:
            return
        self.dirty = False  # before, as others may write meanwhile
        try:
            os.fdatasync(self.fd)
            if not self.named:
                self._name()
        except OSError:
            self.broken = True
            raise

    def _name(self) -> None:
        """Have the disk take the names of the file, of its folder, the model's and the spool's."""
        for folder in (self.folder, *self.folder.parents[:2]):
            if folder not in self.known:
                _sync_folder(folder.parent)
                self.known.add(folder)
        _sync_folder(self.folder)
        self.named = True

    def close(self) -> None:
        os.close(self.fd)


def _sync_folder(folder: Path) -> None:
    """Have the disk take the names in a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def segment(path: Path) -> str:
    """Key of the segment that a spool file, `<model>/<kind>/<file>`, becomes."""
    model, kind = path.parts[-3:-1]
    day, rest = path.stem.split("-", 1)
    return f"{model}/log/{kind}/{day}/{rest}.parquet"


def _move(path: Path, store: Store, durably: bool) -> None:
    """Move one spool file, unless its writer lives or another process is at it.

    Args:
        path: of the file.
        store: where to.
        durably: have the disk take the segment before the file is removed.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not os.fstat(file.fileno()).st_nlink:
            return
        content = file.read()
        table = _table(content)
        if table is not None:
            # Not in Python's memory: it would take the GIL for each of many small writes.
            buffer = pa.BufferOutputStream()
            # Numbers, pixels and embeddings are mostly different: a dictionary of them is work,
            # and makes the segment larger.
            texts = [c.name for c in table.schema if c.type == pa.string()]
            pyarrow.parquet.write_table(table, buffer, compression="zstd", use_dictionary=texts)
            key = segment(path)
            store.write(key, buffer.getvalue().to_pybytes())
            if durably and store.folder is not None:
                for folder in list((store.folder / key).parents)[: key.count("/") + 1]:
                    _sync_folder(folder)
            # Arrow keeps what it has freed, once for each thread that it worked in.
            del table, buffer, content
            pa.default_memory_pool().release_unused()
        path.unlink()


def _table(content: bytes) -> pa.Table | None:
    """The rows of a spool file; None where it has none. A torn last line was never acknowledged."""
    start, end = content.find(b"\n") + 1, content.rfind(b"\n") + 1
    if start == end:
        return None
    schema = msgspec.json.decode(content[:start], type=Schema)
    # A view: to copy tens of megabytes holds up every other thread.
    lines = pa.py_buffer(content).slice(start, end - start)
    answer = pa.float64() if schema.task == "regression" else pa.string()
    fields: list[tuple[str, pa.DataType]]
    if schema.kind == "labels":
        fields = [("_prediction_id", pa.string()), ("_at", pa.int64()), ("_label", answer)]
    else:
        types = dict.fromkeys(schema.numeric, pa.float64())
        types |= dict.fromkeys(schema.boolean, pa.bool_())
        types |= dict.fromkeys(schema.text, pa.string())
        types |= dict.fromkeys(schema.binary, pa.string())
        inputs = (*schema.columns, *schema.binary)
        record = [(ID, pa.string()), (TIME, _STAMP), *((c, types[c]) for c in inputs)]
        fields = [
            ("_prediction_id", pa.string()),
            ("_request_id", pa.string()),
            ("_at", pa.int64()),
            ("_version", pa.string()),
            ("_role", pa.string()),
            ("_prediction", answer),
            ("_score", pa.float64()),
            ("_record", pa.struct(record)),
        ]
    # Arrow parses with the types given (an all-null column keeps its type) and without the GIL.
    table = pyarrow.json.read_json(
        pa.BufferReader(lines),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=lines.size + 1),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=pa.schema(fields), unexpected_field_behavior="error"
        ),
    )
    columns = {name: table[name] for name, _ in fields if name != "_record"}
    columns["_at"] = columns["_at"].cast(_STAMP)
    if schema.kind == "predictions":
        flat = table["_record"].combine_chunks().flatten()
        parts = dict(zip((name for name, _ in record), flat, strict=True))
        given = (ID, TIME)
        middle = {name: parts[name] for name in given}
        rest = {
            c: parts[c].cast(pa.float64()) if c in schema.boolean else parts[c]
            for c in schema.columns
        }
        rest |= {c: _decoded(parts[c]) for c in schema.binary}
        head = {name: columns[name] for name in ("_prediction_id", "_request_id", "_at")}
        columns = head | middle | columns | rest
    return pa.table(columns)


def _decoded(texts: pa.Array) -> pa.Array:
    """Base64 as bytes."""
    values = [None if t is None else base64.b64decode(t) for t in texts.to_pylist()]
    # Made of its buffers, as `pa.array` would import pandas.
    ends = np.cumsum([0, *(len(v or b"") for v in values)], dtype=np.int32)
    known = np.packbits([v is not None for v in values], bitorder="little")
    content = b"".join(v for v in values if v is not None)
    buffers = [pa.py_buffer(part) for part in (known, ends, content)]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def segments(store: Store, model: str, kind: Kind, seen: Collection[str] = ()) -> list[str]:
    """Keys of the log's segments that are not among `seen`, oldest first."""
    known = frozenset(seen)
    return [
        key
        for key in store.list(f"{model}/log/{kind}")
        if key.endswith(".parquet") and key not in known
    ]


def read(store: Store, keys: Iterable[str], without: Collection[str] = ()) -> pd.DataFrame:
    """The rows of some segments, in the order of the keys, without some columns.

    Columns that only some segments have are null in the others. No keys give an empty table
    without columns.
    """
    import pandas as pd

    tables = []
    for key in keys:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(store.read(key)))
        tables.append(file.read([name for name in file.schema_arrow.names if name not in without]))
    if not tables:
        return pd.DataFrame()
    frame: pd.DataFrame = pa.concat_tables(tables, promote_options="permissive").to_pandas()
    return frame


def labelled(
    store: Store, model: str, since: datetime | None = None, without: Collection[str] = ()
) -> pd.DataFrame:
    """Answered predictions (not those in shadow) whose label has come.

    Args:
        store: where the log lies.
        model: whose log.
        since: leave out predictions before this time (`_at`).
        without: columns that are not read.

    Returns:
        The columns of the log of predictions and `_label`, the newest label of each, in the order
        of `_at`. Empty where nothing is labelled.
    """
    import pandas as pd

    predictions = read(store, _recent(segments(store, model, "predictions"), since), without)
    labels = read(store, _recent(segments(store, model, "labels"), since))
    if predictions.empty or labels.empty:
        return pd.DataFrame()
    if since is not None:
        predictions = predictions[predictions["_at"] >= since]
    predictions = predictions[predictions["_role"] != "shadow"]
    newest = (
        labels.sort_values("_at", kind="stable")
        .drop_duplicates("_prediction_id", keep="last")
        .set_index("_prediction_id")["_label"]
    )
    joined = predictions.join(newest, on="_prediction_id", how="inner")
    return joined.sort_values("_at", kind="stable").reset_index(drop=True)


def _recent(keys: list[str], since: datetime | None) -> list[str]:
    """Without the segments that surely hold nothing since then.

    A segment's name tells when its first row came; all its rows came before the next segment of
    the same writer began.
    """
    if since is None:
        return keys
    limit = (since - _SKEW).astimezone(UTC)
    started: dict[str, datetime] = {}
    keep = []
    for key in reversed(keys):
        day, name = key.removesuffix(".parquet").rsplit("/", 2)[1:]
        stamp, writer, _ = name.split("-")
        following = started.get(writer)
        if following is None or following > limit:
            keep.append(key)
        started[writer] = datetime.strptime(f"{day}{stamp}", "%Y%m%d%H%M%S%f").replace(tzinfo=UTC)
    return keep[::-1]
