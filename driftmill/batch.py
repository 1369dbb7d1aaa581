"""Scores a Parquet set: `driftmill batch CONTRACT --input rows.parquet --output scores/`.

The input is cut into parts of whole row groups, about `PART_ROWS` rows each. A part's scores are
one file `part-00000.parquet`, which appears as a whole; what an earlier call has finished, the
next one keeps. `_batch.json` says of what input and by what version they are: with another the
folder is refused, so that no set is ever scored half by one version and half by another.

Rows go through in batches of a few thousand, several at a time (ONNX Runtime and Arrow compute
without Python's lock), so memory does not grow with the input.

| column | what |
|---|---|
| as asked for by `keep` | copied from the input; usually what names the row |
| `prediction`, `score` | as the service answers; null where there is a problem |
| `problem` | why the service would refuse the row, else null |
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from driftmill import columns
from driftmill.bundle import PREDICTION, SCORE, Bundle, answers
from driftmill.contract import Contract, did_you_mean
from driftmill.home import cores
from driftmill.store import Store

#: Rows of a part, if row groups allow, and of what is computed at once.
PART_ROWS, BATCH_ROWS = 500_000, 16_384
MANIFEST = "_batch.json"
#: Columns that are added.
ADDED = (PREDICTION.lstrip("_"), SCORE.lstrip("_"), "problem")


class BatchError(RuntimeError):
    """A set that cannot be scored, or not into this folder; the message says why."""


@dataclass(frozen=True)
class Part:
    """Row groups of one file that are scored into one file."""

    file: str
    groups: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Summary:
    """What was done."""

    model: str
    version: str
    rows: int
    problems: int
    """Rows without a prediction."""
    parts: int
    kept: int
    """Parts that an earlier call had finished."""


def score(
    loaded: Bundle,
    source: str,
    into: Store,
    *,
    keep: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Summary:
    """Score a Parquet set.

    Args:
        loaded: the model.
        source: a Parquet file, a folder of them or a pattern: a path or a URL that fsspec reads.
        into: where the parts go.
        keep: columns to copy from the input; None: the contract's `data.id`, where it is there.
        progress: called with the rows that are done, and all.

    Raises:
        BatchError: the input is not there, not Parquet or lacks columns; or the folder holds scores
            of something else.
        OSError: input or output cannot be used.
    """
    if loaded.signature.image is not None:
        raise BatchError("only models of tables are scored in batches; ask the service for images")
    fs, files = _files(source)
    parts = [part for file in files for part in _parts(fs, file)]
    schema = _schema(fs, files)
    kept = _kept(loaded.manifest.contract, schema, keep)
    _claim(into, _identity(loaded, fs, files, parts, kept))
    done = {key for key in into.list("") if key.startswith("part-")}
    total = sum(part.rows for part in parts)
    rows = problems = 0
    table = _Rows(loaded, kept)
    with ThreadPoolExecutor(cores(), thread_name_prefix="batch") as pool:
        for index, part in enumerate(parts):
            key = f"part-{index:05d}.parquet"
            if key in done:
                problems += _problems(into.read(key))
            else:
                content, bad = _score(fs, part, table, pool, partial(_from, progress, total, rows))
                into.write(key, content)
                problems += bad
            rows += part.rows
            progress(rows, total)
    return Summary(loaded.manifest.model, loaded.version, rows, problems, len(parts), len(done))


def _from(progress: Callable[[int, int], None], total: int, before: int, rows: int) -> None:
    progress(before + rows, total)


def _score(
    fs: Any, part: Part, table: _Rows, pool: ThreadPoolExecutor, progress: Callable[[int], None]
) -> tuple[bytes, int]:
    """The content of a part's file, and how many rows have a problem."""
    output = io.BytesIO()
    problems = rows = 0
    writer: pq.ParquetWriter | None = None
    with fs.open(part.file, "rb") as file:
        batches = pq.ParquetFile(file).iter_batches(
            BATCH_ROWS, row_groups=list(part.groups), columns=table.wanted
        )
        for scored in _ordered(pool, table.score, batches):
            if writer is None:
                writer = pq.ParquetWriter(output, scored.schema, compression="zstd")
            writer.write_batch(scored)
            rows += scored.num_rows
            problems += scored.num_rows - scored.column("problem").null_count
            progress(rows)
    assert writer is not None
    writer.close()
    return output.getvalue(), problems


def _ordered(
    pool: ThreadPoolExecutor,
    work: Callable[[pa.RecordBatch], pa.RecordBatch],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """What becomes of each batch, in their order, with a few more at work than there are cores."""
    waiting: deque[Future[pa.RecordBatch]] = deque()
    for batch in batches:
        waiting.append(pool.submit(work, batch))
        if len(waiting) > 2 * cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Rows:
    """Turns batches of rows into scores."""

    def __init__(self, loaded: Bundle, kept: Sequence[str]) -> None:
        self._bundle = loaded
        self._columns = loaded.signature.columns
        self._numbers = columns.Numbers([c for c in self._columns if c.is_numeric])
        self._kept = list(kept)
        #: Columns that are read.
        self.wanted = list(dict.fromkeys([*kept, *(c.name for c in self._columns)]))

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """What the output holds of a batch."""
        rows = batch.num_rows
        problem = columns.Problems(rows)
        numeric, texts = [], []
        for column in self._columns:
            values = batch.column(column.name)
            if column.is_numeric:
                numeric.append(columns.wide(values))
            else:
                texts.append(columns.texts(values, column, problem))
        output = self._bundle.session.run(
            self._numbers.take(numeric, rows, problem),
            np.stack(texts, axis=1) if texts else np.empty((rows, 0), object),
        )
        found = answers(output, self._bundle.signature)
        bad = problem.codes != 0
        added = {
            name: pa.array(found[f"_{name}"], mask=bad) for name in ADDED if f"_{name}" in found
        }
        added["problem"] = problem.column()
        kept = {name: batch.column(name) for name in self._kept}
        return pa.RecordBatch.from_pydict(kept | added)


def _files(source: str) -> tuple[Any, list[str]]:
    """The file system and the Parquet files of a set, in the order of their names."""
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:  # a package that is missing, an unknown scheme
        raise BatchError(f"{source} cannot be read: {error}") from None
    if any(sign in path for sign in "*?["):
        files = fs.glob(path)
    elif fs.isdir(path):
        files = [file for file in fs.find(path) if file.endswith(".parquet")]
    else:
        files = [path] if fs.exists(path) else []
    if not files:
        raise BatchError(f"there is no Parquet file at {source}")
    return fs, sorted(files)


def _parts(fs: Any, file: str) -> Iterator[Part]:
    """The parts of one file."""
    with fs.open(file, "rb") as opened:
        try:
            metadata = pq.ParquetFile(opened).metadata
        except pa.ArrowInvalid as error:
            raise BatchError(f"{file} is not Parquet: {error}") from None
    groups: list[int] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= PART_ROWS:
            yield Part(file, tuple(groups), rows)
            groups, rows = [], 0
    if rows:
        yield Part(file, tuple(groups), rows)


def _schema(fs: Any, files: list[str]) -> pa.Schema:
    """The columns that all files have."""
    common: pa.Schema | None = None
    for file in files:
        with fs.open(file, "rb") as opened:
            found = pq.read_schema(opened)
        if common is not None:
            found = pa.schema([field for field in common if field.name in found.names])
        common = found
    assert common is not None
    return common


def _kept(contract: Contract, schema: pa.Schema, keep: Sequence[str] | None) -> list[str]:
    """The columns to copy, all needed ones being there."""
    names = set(schema.names)
    if keep is None:
        keep = [name for name in (contract.data.id,) if name is not None and name in names]
    for name in [*keep, *(column.name for column in contract.data.columns)]:
        if name not in names:
            raise BatchError(f"the input has no column {name!r}{did_you_mean(name, names)}")
    for column in contract.data.columns:
        kind = schema.field(column.name).type
        if not columns.fits(kind, column):
            needed = column.type if column.is_numeric else "text"
            raise BatchError(f"the column {column.name!r} holds {kind}; {needed} is needed")
    if taken := set(keep) & set(ADDED):
        raise BatchError(f"{', '.join(sorted(taken))} is what is added; keep other columns")
    return list(keep)


def _identity(
    loaded: Bundle, fs: Any, files: list[str], parts: list[Part], kept: list[str]
) -> dict[str, Any]:
    """What tells one scoring from another."""
    seen = [
        [file, fs.size(file), str(fs.info(file).get("ETag") or fs.modified(file))] for file in files
    ]
    return {
        "model": loaded.manifest.model,
        "version": loaded.version,
        "keep": kept,
        "input": hashlib.sha256(json.dumps(seen).encode()).hexdigest(),
        "parts": [asdict(part) for part in parts],
    }


def _claim(into: Store, identity: dict[str, Any]) -> None:
    """Say whose the folder is. Raises BatchError where it is another's."""
    content = (json.dumps(identity, indent=1) + "\n").encode()
    try:
        into.create(MANIFEST, content)
    except FileExistsError:
        known = json.loads(into.read(MANIFEST))
        for name, what in (
            ("model", "the model"),
            ("version", "the version"),
            ("input", "the input"),
            ("keep", "the kept columns"),
        ):
            if known.get(name) != json.loads(content)[name]:
                raise BatchError(
                    f"{into.uri} holds scores for which {what} was another; name an empty folder"
                ) from None


def _problems(content: bytes) -> int:
    column = pq.read_table(io.BytesIO(content), columns=["problem"]).column(0)
    return len(column) - int(column.null_count)
