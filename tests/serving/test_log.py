"""The inference log: what is acknowledged is in the store, once."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import contract
from driftmill.contract import Fsync
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
POLICIES: tuple[Fsync, ...] = ("none", "batch", "interval")


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
log = Log(Path(sys.argv[1]), Store(sys.argv[2]), "tiny", 50, 0.1, sys.argv[3], 0.05)
log.start()
for i in range(1_000_000):
    log.append(PREDICTIONS, [row(2 * i), row(2 * i + 1)])
    os.write(1, b"p%d p%d\\n" % (2 * i, 2 * i + 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsync", POLICIES)
def test_kill_9_loses_and_doubles_nothing(store: Store, tmp_path: Path, fsync: Fsync) -> None:
    for _ in range(3):
        acknowledged = tmp_path / "acknowledged"
        with acknowledged.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / "spool"), store.uri, fsync],
                stdout=out,
            )
            wait_for(lambda: acknowledged.stat().st_size > 6_000, "some rows")  # noqa: B023
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


WRITERS = """
import sys
from pathlib import Path
from driftmill.serving.log import Log
from driftmill.store import Store
from tests.serving.test_log import PREDICTIONS, row
log = Log(Path(sys.argv[1]), Store(sys.argv[2]), "tiny", 20, 0.05, sys.argv[3], 0.05)
log.start()
print("ready", flush=True)
first = int(input())
for i in range(first, first + 1000, 2):
    log.append(PREDICTIONS, [row(i), row(i + 1)])
log.close()
"""


@pytest.mark.slow
def test_processes_that_share_a_spool_lose_and_double_nothing(store: Store, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITERS, str(tmp_path / "spool"), store.uri, fsync],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for fsync in (*POLICIES, "none")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for number, writer in enumerate(writers):
        assert writer.stdin is not None
        print(1000 * number, file=writer.stdin, flush=True)
    # All append and move at the same time; so does a process that only moves.
    while any(writer.poll() is None for writer in writers):
        Log(tmp_path / "spool", store, "tiny").sweep()
    assert [writer.communicate()[0] for writer in writers] == [""] * len(writers)
    assert [writer.returncode for writer in writers] == [0] * len(writers)
    assert sorted(ids(store)) == sorted(f"p{i}" for i in range(4000))
    assert spool_files(tmp_path / "spool") == []


def test_a_store_that_hangs_holds_up_nobody_who_writes(tmp_path: Path) -> None:
    class Hanging(Store):
        asked, answers = threading.Event(), threading.Event()

        def write(self, key: str, content: bytes) -> None:
            self.asked.set()
            assert self.answers.wait(60)
            super().write(key, content)

    store = Hanging(tmp_path / "store")
    log = Log(tmp_path / "spool", store, "tiny", rotate_rows=5, fsync="interval")
    log.start()
    for i in range(5):
        log.append(PREDICTIONS, [row(i)])
    assert store.asked.wait(60)
    for i in range(5, 103):  # by now it moves nothing, and twenty files become full
        log.append(PREDICTIONS, [row(i)])
    # The disk is asked all the while: only the file that is not yet full still has a writer.
    wait_for(lambda: unlocked(tmp_path / "spool") == 19, "full files, taken by the disk")
    assert segments(store, "tiny", "predictions") == []
    store.answers.set()
    log.close()
    assert sorted(ids(store)) == sorted(f"p{i}" for i in range(103))


def unlocked(spool: Path) -> int:
    """Spool files that any process may move."""
    count = 0
    for path in spool_files(spool):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            count += 1
    return count


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, failing: Callable[[], bool]) -> Iterator[list[str]]:
    """A disk that fails at will; the threads that asked it to take a file, and files by number."""
    asked: list[str] = []
    sync = os.fdatasync

    def fdatasync(fd: int) -> None:
        asked.append(threading.current_thread().name)
        if failing():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        yield asked


def test_the_policy_says_who_waits_for_the_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = threading.current_thread().name
    with disk(monkeypatch, lambda: False) as asked:
        log = Log(tmp_path / "spool", store, "tiny", rotate=3600)
        log.start()
        log.append(PREDICTIONS, [row(1)])
        assert asked == []
        log.configure(contract.Log(fsync="batch"))
        log.append(PREDICTIONS, [row(2)])
        assert asked == [me]
        log.append(PREDICTIONS, [row(3, role="shadow")], acknowledged=False)
        assert asked == [me]
        log.configure(contract.Log(fsync="interval", fsync_interval=0.02))
        log.append(PREDICTIONS, [row(4)])
        wait_for(lambda: "inference-log-sync" in asked, "the disk is asked")
        assert asked.count(me) == 1
        log.close()
    assert sorted(ids(store)) == ["p1", "p2", "p3", "p4"]


def test_after_the_disk_has_failed_its_word_for_that_file_is_not_taken(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = False
    with disk(monkeypatch, lambda: fails):
        log = Log(tmp_path / "spool", store, "tiny", fsync="batch")
        log.append(PREDICTIONS, [row(1)])
        fails = True
        for i in (2, 3):
            with pytest.raises(OSError, match="Input/output error"):
                log.append(PREDICTIONS, [row(i)])
        fails = False
        log.append(PREDICTIONS, [row(4)])
        assert len(spool_files(tmp_path / "spool")) == 3  # a new one after each failure
        log.close()
    assert ids(store) == ["p1", "p4"]


def test_the_disk_has_the_names_of_all_folders_before_a_row_counts_as_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = tmp_path / "spool"
    log = Log(spool, store, "tiny")
    log.append(PREDICTIONS, [row(1)])
    log.configure(contract.Log(fsync="batch"))
    sync, failures = os.fsync, 1
    taken: list[Path] = []

    def fsync(fd: int) -> None:
        nonlocal failures
        if len(taken) == 1 and failures:
            failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)
        taken.append(Path(os.readlink(f"/proc/self/fd/{fd}")))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output error"):
            log.append(PREDICTIONS, [row(2)])
        assert len(set(taken)) == 1
        log.append(PREDICTIONS, [row(3)])
        kind = spool / "tiny" / "predictions"
        assert set(taken) == {kind, kind.parent, spool, tmp_path}
        log.append(PREDICTIONS, [row(4)])
        assert len(taken) == 4  # once each
    log.close()
    assert ids(store) == ["p1", "p3", "p4"]


def test_when_the_disk_fails_between_requests_the_next_ones_learn_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = True
    with disk(monkeypatch, lambda: fails) as asked:
        log = Log(tmp_path / "spool", store, "tiny", fsync="interval", fsync_interval=0.02)
        log.start()
        log.append(PREDICTIONS, [row(1)])
        wait_for(lambda: log.sync_failures == 1, "the disk fails")
        for i in (2, 3):
            with pytest.raises(OSError, match="Input/output error"):
                log.append(PREDICTIONS, [row(i)])
        fails = False
        log.append(PREDICTIONS, [row(4)])
        waited = asked.count(threading.current_thread().name)
        log.append(PREDICTIONS, [row(5)])
        assert asked.count(threading.current_thread().name) == waited == 3
        log.close()
    assert sorted(ids(store)) == ["p1", "p4", "p5"]  # the process lives: so did the first


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["append", "append", "shadow", "fail", "sync", "sweep", *POLICIES]),
        max_size=40,
    )
)
def test_whatever_happens_exactly_what_was_taken_is_in_the_log(steps: list[str]) -> None:
    failures = 0

    def failing() -> bool:
        nonlocal failures
        failures -= 1
        return failures >= 0

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        store, spool = Store(Path(folder) / "store"), Path(folder) / "spool"
        log = Log(spool, store, "tiny", rotate_rows=5)
        taken = []
        with disk(monkeypatch, failing):
            for i, step in enumerate(steps):
                if step in ("append", "shadow"):
                    try:
                        log.append(PREDICTIONS, [row(i)], acknowledged=step == "append")
                    except OSError:
                        continue
                    taken.append(f"p{i}")
                elif step == "fail":
                    failures = 1
                elif step == "sync":
                    log._sync()
                elif step == "sweep":
                    log.sweep()
                else:
                    log.configure(contract.Log.model_validate({"fsync": step, "rotate_rows": 5}))
            log.close()
        assert sorted(ids(store)) == sorted(taken)
        assert spool_files(spool) == []


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
