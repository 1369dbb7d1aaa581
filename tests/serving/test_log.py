"""The inference log: what is acknowledged is in the store, once."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import contract
from driftmill.features import Signature
from driftmill.serving import log as log_module
from driftmill.serving.log import (
    Label,
    Log,
    Prediction,
    Role,
    Schema,
    labelled,
    now_us,
    read,
    segments,
)
from driftmill.store import Store
from tests.conftest import CONTRACT

SIGNATURE = Signature(
    task="classification",
    columns=contract.parse(CONTRACT).data.columns,
    target="fraud",
    labels=("no", "yes"),
)
PREDICTIONS, LABELS = Schema.predictions(SIGNATURE), Schema.labels(SIGNATURE)


def row(i: int, role: Role = "champion", at: int | None = None, **record: object) -> Prediction:
    values = {"amount": 1.5, "age": None, "channel": "web"} | record
    return Prediction(f"p{i}", "r", now_us() if at is None else at, "v1", role, "yes", 0.75, values)


def ids(store: Store) -> list[str]:
    frame = read(store, segments(store, "tiny", "predictions"))
    return [] if frame.empty else list(frame["_prediction_id"])


def spool_files(spool: Path) -> list[Path]:
    return sorted(spool.rglob("*.jsonl"))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def test_rows_come_back_with_the_types_of_the_schema(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1, _time="2026-01-02T03:04:05.678+02:00", _id="x"), row(2)])
    log.close()
    (key,) = segments(store, "tiny", "predictions")
    table = pyarrow.parquet.read_table(pa.BufferReader(store.read(key)))
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("_prediction_id", pa.string()),
            ("_request_id", pa.string()),
            ("_at", pa.timestamp("us", "UTC")),
            ("_id", pa.string()),
            ("_time", pa.timestamp("us", "UTC")),
            ("_version", pa.string()),
            ("_role", pa.string()),
            ("_prediction", pa.string()),
            ("_score", pa.float64()),
            ("amount", pa.float64()),
            ("age", pa.float64()),  # all null, and still a number
            ("channel", pa.string()),
        ]
    )
    first = table.to_pylist()[0]
    assert first["_time"] == datetime(2026, 1, 2, 1, 4, 5, 678000, tzinfo=UTC)
    assert (first["_id"], first["amount"], first["age"]) == ("x", 1.5, None)
    assert spool_files(tmp_path / "spool") == []


def test_regression_and_boolean_columns_are_numbers(store: Store, tmp_path: Path) -> None:
    schema = Schema("predictions", "regression", numeric=("a",), boolean=("b",), columns=("b", "a"))
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(schema, [Prediction("p", "r", 1, "v", "champion", 3.0, None, {"a": 2, "b": True})])
    log.append(Schema("labels", "regression"), [Label("p", 2, 4.0)])
    log.close()
    (found,) = labelled(store, "tiny").to_dict("records")
    assert (found["a"], found["b"], found["_prediction"], found["_label"]) == (2.0, 1.0, 3.0, 4.0)


def test_a_file_rotates_after_rows_and_after_time(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny", rotate_rows=10, rotate=3600)
    log.start()
    for i in range(25):
        log.append(PREDICTIONS, [row(i)])
    wait_for(lambda: len(segments(store, "tiny", "predictions")) == 2, "rotation by rows")
    assert sorted(ids(store)) == sorted(f"p{i}" for i in range(20))
    log.rotate = 0.0
    wait_for(lambda: len(ids(store)) == 25, "rotation by time")
    first = segments(store, "tiny", "predictions")
    log.append(PREDICTIONS, [row(99)])
    log.close()
    (new,) = segments(store, "tiny", "predictions", seen=first)
    assert read(store, [new])["_prediction_id"].tolist() == ["p99"]


def test_an_open_file_of_a_living_writer_is_left_alone(store: Store, tmp_path: Path) -> None:
    living = Log(tmp_path / "spool", store, "tiny")
    living.append(PREDICTIONS, [row(1)])
    Log(tmp_path / "spool", store, "tiny").sweep()
    assert ids(store) == []
    living.close()
    assert ids(store) == ["p1"]


def test_a_crash_between_store_and_spool_doubles_nothing(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1)])
    (path,) = spool_files(tmp_path)
    content = path.read_bytes()
    log.close()
    path.write_bytes(content)  # as if the process had died before it removed the file
    Log(tmp_path / "spool", store, "tiny").close()
    assert ids(store) == ["p1"]
    assert spool_files(tmp_path) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wherever_a_file_is_cut_its_whole_lines_are_recovered(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, spool = Store(Path(folder) / "store"), Path(folder) / "spool"
        log = Log(spool, store, "tiny")
        for i in range(4):
            log.append(PREDICTIONS, [row(i)])
        (path,) = spool_files(spool)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        log.close()
        for key in segments(store, "tiny", "predictions"):
            store.delete(key)
        path.write_bytes(content[:cut])
        Log(spool, store, "tiny").close()
        whole = max(content[:cut].count(b"\n") - 1, 0)  # without the header
        assert ids(store) == [f"p{i}" for i in range(whole)]
        assert spool_files(spool) == []


def test_a_file_that_makes_no_sense_stays_and_is_reported(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1)])
    (path,) = spool_files(tmp_path)
    strange = path.with_name("20260101-000000000000-aaaaaaaa-000001.jsonl")
    strange.write_bytes(b"nonsense\nmore\n")
    log.close()
    assert ids(store) == ["p1"]
    assert spool_files(tmp_path) == [strange]
    assert log.backlog == 1
    assert strange.name in (log.error or "")


def test_an_unreachable_store_keeps_the_spool_and_heals(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1)])
    (tmp_path / "store" / "tiny").write_text("in the way")
    log.close()
    assert log.backlog == 1
    assert len(spool_files(tmp_path / "spool")) == 1
    (tmp_path / "store" / "tiny").unlink()
    log.sweep()
    assert (log.backlog, log.error) == (0, None)
    assert ids(store) == ["p1"]


@pytest.mark.parametrize("room", [0, 1, 400, 1000, 1500])
def test_a_full_disk_refuses_whole_batches_and_heals(
    store: Store, tmp_path: Path, room: int
) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    accepted = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for i in range(20):
            batch = [row(2 * i), row(2 * i + 1)]
            try:
                log.append(PREDICTIONS, batch)
            except OSError:
                continue
            accepted += [r.prediction_id for r in batch]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(accepted) < 40
    log.append(PREDICTIONS, [row(99)])
    log.close()
    assert ids(store) == [*accepted, "p99"]


WRITER = """
import os, sys
from pathlib import Path
from driftmill.serving.log import Log
from driftmill.store import Store
from tests.serving.test_log import PREDICTIONS, row
log = Log(Path(sys.argv[1]), Store(sys.argv[2]), "tiny", rotate_rows=50, rotate=0.1)
log.start()
for i in range(1_000_000):
    log.append(PREDICTIONS, [row(2 * i), row(2 * i + 1)])
    os.write(1, b"p%d p%d\\n" % (2 * i, 2 * i + 1))
"""


@pytest.mark.slow
def test_kill_9_loses_and_doubles_nothing(store: Store, tmp_path: Path) -> None:
    for _ in range(3):
        acknowledged = tmp_path / "acknowledged"
        with acknowledged.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / "spool"), store.uri], stdout=out
            )
            wait_for(lambda: acknowledged.stat().st_size > 20_000, "some rows")  # noqa: B023
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        given = acknowledged.read_text().rpartition("\n")[0].split()
        Log(tmp_path / "spool", store, "tiny").close()
        found = ids(store)
        assert len(found) == len(set(found))
        assert set(given) <= set(found)
        assert len(found) <= len(given) + 4  # at most a batch was written and not yet acknowledged
        assert spool_files(tmp_path / "spool") == []
        for key in segments(store, "tiny", "predictions"):
            store.delete(key)


def test_labels_join_newest_first_and_never_shadows(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1, at=100), row(2, at=200), row(3, at=300)])
    log.append(PREDICTIONS, [row(1, role="shadow", at=150)])
    log.append(LABELS, [Label("p1", 500, "yes"), Label("p2", 500, "no")])
    log.append(LABELS, [Label("p1", 400, "no"), Label("p2", 600, "yes"), Label("other", 1, "no")])
    log.close()
    found = labelled(store, "tiny")
    assert found["_prediction_id"].tolist() == ["p1", "p2"]
    assert found["_label"].tolist() == ["yes", "yes"]
    assert set(found["_role"]) == {"champion"}


def test_nothing_labelled_is_an_empty_table(store: Store) -> None:
    assert labelled(store, "tiny").empty
    assert read(store, []).empty


def test_since_leaves_out_old_predictions(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny", rotate_rows=1)
    now = datetime.now(UTC)
    for i in range(3):
        at = int((now - timedelta(hours=2 - i)).timestamp() * 1e6)
        log.append(PREDICTIONS, [row(i, at=at)])
        log.append(LABELS, [Label(f"p{i}", at, "yes")])
    log.close()
    found = labelled(store, "tiny", now - timedelta(minutes=90))
    assert found["_prediction_id"].tolist() == ["p1", "p2"]


def test_segments_that_surely_ended_before_since_are_not_read(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny", rotate_rows=1)
    for i in range(3):
        log.append(PREDICTIONS, [row(i)])
        log.append(LABELS, [Label(f"p{i}", now_us(), "yes")])
    log.close()
    for key in segments(store, "tiny", "predictions")[:-1]:
        store.write(key, b"would raise if it were read")
    # The last segment of a writer may have been written to until any time.
    assert labelled(store, "tiny", datetime.now(UTC) + timedelta(days=1)).empty


def test_the_lock_is_what_tells_dead_from_living(store: Store, tmp_path: Path) -> None:
    log = Log(tmp_path / "spool", store, "tiny")
    log.append(PREDICTIONS, [row(1)])
    (path,) = spool_files(tmp_path)
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    log.close()


@given(st.lists(st.tuples(st.none() | st.binary(max_size=40), st.binary(max_size=40)), max_size=20))
def test_bytes_come_back_and_can_be_left_out(
    rows: list[tuple[bytes | None, bytes]],
) -> None:
    schema = Schema("predictions", "image-classification", binary=("_image", "_embedding"))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        log = Log(Path(folder) / "spool", store, "tiny")
        log.append(
            schema,
            [
                Prediction(
                    f"p{i}", "r", i, "v", "champion", "a", 0.5, {"_image": a, "_embedding": b}
                )
                for i, (a, b) in enumerate(rows)
            ],
        )
        log.close()
        keys = segments(store, "tiny", "predictions")
        whole, light = read(store, keys), read(store, keys, without=["_image", "_embedding"])
    if rows:
        assert list(zip(whole["_image"], whole["_embedding"], strict=True)) == rows
        assert list(light.columns) == list(whole.columns[:-2])


def test_a_spool_file_rotates_by_size(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "ROTATE_BYTES", 2000)
    log = Log(tmp_path / "spool", store, "tiny", rotate=3600)
    for i in range(40):
        log.append(PREDICTIONS, [row(i)])
    files = spool_files(tmp_path / "spool")
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) < 2500
    log.close()
    assert sorted(ids(store)) == sorted(f"p{i}" for i in range(40))
