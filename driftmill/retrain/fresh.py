"""How many labelled rows there are that no serving model has learnt from.

The count is asked for with every alert, so it reads three columns of each segment of the
inference log once and keeps them, and looks only at segments that can hold rows after the point
up to which the models have learnt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from driftmill import bundle
from driftmill.rollout import Rollout
from driftmill.serving.log import segments
from driftmill.store import Store

#: Clocks of two processes may differ by this much.
_SKEW = timedelta(minutes=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FreshRows:
    """Counts the fresh labelled rows of one model. Threads may share it."""

    def __init__(self, store: Store, model: str) -> None:
        self._store = store
        self._model = model
        self._lock = threading.Lock()
        self._segments: dict[str, pa.Table] = {}
        self._learnt: dict[str, datetime] = {}

    def count(self, rollout: Rollout) -> int:
        """Answered predictions with a label that neither champion nor challenger has learnt from.

        Raises:
            OSError: the store cannot be read, or a bundle is not there.
            ValueError: a bundle's manifest or a segment is damaged.
        """
        with self._lock:
            versions = [v for v in (rollout.champion, rollout.challenger) if v is not None]
            since = max(self._learnt_until(version) for version in versions)
            names = {
                kind: _recent(segments(self._store, self._model, kind), since)
                for kind in ("predictions", "labels")
            }
            wanted = {key for keys in names.values() for key in keys}
            self._segments = {
                key: self._segments[key] if key in self._segments else self._read(key)
                for key in wanted
            }
            predictions = self._table(names["predictions"])
            labels = self._table(names["labels"])
            if predictions is None or labels is None:
                return 0
            fresh = predictions.filter(pc.greater(predictions["_at"], pa.scalar(since)))
            found = pc.is_in(fresh["_prediction_id"], labels["_prediction_id"].combine_chunks())
            return int(pc.sum(found).as_py() or 0)

    def _table(self, keys: Iterable[str]) -> pa.Table | None:
        tables = [self._segments[key] for key in keys]
        return pa.concat_tables(tables) if tables else None

    def _read(self, key: str) -> pa.Table:
        file = pq.ParquetFile(pa.BufferReader(self._store.read(key)))
        columns = ["_prediction_id", "_at"]
        if "_role" not in file.schema_arrow.names:
            return file.read(columns)
        table = file.read([*columns, "_role"])
        return table.filter(pc.not_equal(table["_role"], "shadow")).select(columns)

    def _learnt_until(self, version: str) -> datetime:
        """Time of the newest row of the log that a version has learnt from."""
        if version not in self._learnt:
            content = self._store.read(f"{bundle.key(self._model, version)}/{bundle.MANIFEST}")
            until = bundle.Manifest.model_validate_json(content).data.get("log_until")
            self._learnt[version] = datetime.fromisoformat(until) if until else _EPOCH
        return self._learnt[version]


def _recent(keys: list[str], since: datetime) -> list[str]:
    """Without the segments that end before `since`. A segment is named by the time of its first
    row and ends before the next of its writer begins, so of the earlier ones only the last of
    each writer can reach beyond."""
    stamp = f"{max(since - _SKEW, _EPOCH).astimezone(UTC):%Y%m%d/%H%M%S%f}"
    earlier: dict[str, str] = {}
    later = []
    for key in keys:
        day, name = key.split("/")[-2:]
        if f"{day}/{name}" < stamp:
            earlier[name.split("-")[1]] = key
        else:
            later.append(key)
    return [*earlier.values(), *later]
