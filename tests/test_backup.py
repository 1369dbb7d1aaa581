"""Backup while everything is being written to, and what comes back of it."""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driftmill import backup as backups
from driftmill import bundle, rollout
from driftmill.backup import BackupError
from driftmill.cli import app
from driftmill.contract import Retrain
from driftmill.home import Home, find
from driftmill.retrain.ledger import Ledger
from driftmill.retrain.policy import Trigger
from driftmill.serving import log as logs
from driftmill.serving.log import Log, Prediction, now_us
from driftmill.store import Store
from tests.serving.test_log import PREDICTIONS

Make = Callable[..., bundle.Manifest]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home that is not there yet."""
    for name in ("DRIFTMILL_STORE", "DRIFTMILL_LEDGER", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return find(tmp_path / "home")


def predictions(number: int) -> list[Prediction]:
    record = {"amount": 1.5, "age": None, "channel": "web"}
    return [Prediction(f"p{number}", "r", now_us(), "v1", "champion", "yes", 0.7, record)]


def filled(home: Home, store: Store, version: str) -> None:
    """A model that serves, a decision, a run's file, two predictions of which one has moved."""
    shutil.copytree(Path(store.uri.removeprefix("file://")), home.folder / "store")
    rollout.change(home.store, "tiny", champion=version, by="test", reason="first")
    home.store.write("tiny/cache/fit/abc/model.onnx", b"made anew")
    log = Log(home.spool, home.store, "tiny")
    log.append(PREDICTIONS, predictions(1))
    log.close()
    left = Log(home.spool, home.store, "tiny")
    left.append(PREDICTIONS, predictions(2))
    ledger = Ledger(home.ledger_url)
    decide(ledger, 0)
    ledger.close()
    (home.folder / "webhook-token").write_text("secret")
    (home.folder / "mlflow-artifacts/tiny/1").mkdir(parents=True)
    (home.folder / "mlflow-artifacts/tiny/1/report.html").write_text("<p>")


def decide(ledger: Ledger, number: int) -> None:
    at = datetime(2026, 5, 1, tzinfo=UTC) + timedelta(days=number)
    trigger = Trigger("drift", f"f{number}", at, note="")
    decision = ledger.decide(
        "tiny", Retrain(cooldown=0, min_fresh_rows=0), trigger, fresh_rows=9, now=at
    )
    if decision.run_id is not None:
        ledger.started(decision.run_id, 1, 1.0, at)
        ledger.end(decision.run_id, "promoted", "", None, at)


def test_what_was_there_comes_back(
    home: Home, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """Model, rollout, ledger, tracking, and predictions that had not moved yet; no token, and
    nothing that training makes anew."""
    version = make_bundle().version
    filled(home, store, version)
    archive = tmp_path / "backups" / "one.tar.gz"
    made = backups.backup(home, archive)
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    assert made.files == len(names) - 1
    assert not [n for n in names if "token" in n or "/cache/" in n]

    other = find(tmp_path / "other")
    assert backups.restore(other, archive) == made
    assert rollout.read(other.store, "tiny") == rollout.read(home.store, "tiny")
    assert bundle.fetch(other.store, "tiny", version).version == version
    assert (other.folder / "mlflow-artifacts/tiny/1/report.html").read_text() == "<p>"
    ledger = Ledger(other.ledger_url)
    assert [d.fingerprint for d in ledger.decisions("tiny")] == ["f0"]
    ledger.close()
    Log(other.spool, other.store, "tiny").sweep()
    assert ids(other.store) == ["p1", "p2"]


def ids(store: Store) -> list[str]:
    frame = logs.read(store, logs.segments(store, "tiny", "predictions"))
    return sorted(frame["_prediction_id"], key=lambda i: int(i[1:]))


@pytest.mark.slow
def test_a_backup_is_whole_whenever_it_is_made(
    home: Home, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """While bundles are promoted, decisions made and predictions logged as fast as they can be,
    each backup holds the bundle of every version that it says serves, a sound ledger, and every
    prediction that was acknowledged before it began, once."""
    filled(home, store, make_bundle().version)
    template = next((home.folder / "store/tiny/bundles").iterdir())
    acknowledged = 2
    stopped = threading.Event()
    failures: list[BaseException] = []

    def until_stopped(work: Callable[[int], None]) -> threading.Thread:
        def run() -> None:
            number = 10
            try:
                while not stopped.is_set():
                    work(number)
                    number += 1
            except BaseException as error:  # noqa: BLE001 (shown by the main thread)
                failures.append(error)

        return threading.Thread(target=run)

    def promote(number: int) -> None:
        version = f"{number:012x}"
        home.store.put_folder(template, f"tiny/bundles/{version}", bundle.MANIFEST)
        rollout.change(home.store, "tiny", champion=version, by="test", reason="next")

    ledger = Ledger(home.ledger_url)
    log = Log(home.spool, home.store, "tiny", rotate_rows=7)
    log.start()

    def answer(number: int) -> None:
        nonlocal acknowledged
        log.append(PREDICTIONS, predictions(number - 7))
        acknowledged = number - 7

    threads = [until_stopped(w) for w in (promote, answer, lambda n: decide(ledger, n))]
    for thread in threads:
        thread.start()
    try:
        before = []
        for number in range(4):
            before.append(acknowledged)
            backups.backup(home, tmp_path / f"{number}.tar")
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        log.close()
        ledger.close()
    assert not failures
    assert before[-1] > before[0] + 20
    for number, least in enumerate(before):
        other = find(tmp_path / f"home-{number}")
        backups.restore(other, tmp_path / f"{number}.tar")
        for revision in rollout.history(other.store, "tiny"):
            assert other.store.exists(f"tiny/bundles/{revision.champion}/{bundle.MANIFEST}")
        with closing(sqlite3.connect(other.ledger_url.removeprefix("sqlite:///"))) as database:
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        Log(other.spool, other.store, "tiny").sweep()
        found = ids(other.store)
        assert len(found) == len(set(found))
        assert {f"p{i}" for i in range(1, least + 1)} <= set(found)


def test_a_segment_that_moved_meanwhile_is_not_shortened(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spool file is read early and its segment, longer, late: the segment counts."""
    log = Log(home.spool, home.store, "tiny")
    log.append(PREDICTIONS, predictions(1))
    read = Path.read_bytes

    def read_and_go_on(path: Path) -> bytes:
        content = read(path)
        if path.suffix == ".jsonl" and not log.backlog and len(list(home.spool.rglob("*.jsonl"))):
            log.append(PREDICTIONS, predictions(2))
            log.close()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_go_on)
    backups.backup(home, tmp_path / "b.tar")
    monkeypatch.undo()
    other = find(tmp_path / "other")
    backups.restore(other, tmp_path / "b.tar")
    Log(other.spool, other.store, "tiny").sweep()
    assert ids(other.store) == ["p1", "p2"]


def test_restore_overwrites_nothing(
    home: Home, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """An installation that went on is refused; one whose restore was interrupted is completed."""
    filled(home, store, make_bundle().version)
    backups.backup(home, tmp_path / "b.tar")
    with pytest.raises(BackupError, match="is there already; name a new file"):
        backups.backup(home, tmp_path / "b.tar")
    home.store.delete("tiny/cache/fit/abc/model.onnx")
    home.store.write("tiny/runs/later/outcome.json", b"{}")
    with pytest.raises(BackupError, match=r"something already, such as .*tiny/runs/later"):
        backups.restore(home, tmp_path / "b.tar")
    other = find(tmp_path / "other")
    backups.restore(other, tmp_path / "b.tar")
    other.store.delete("tiny/rollout/00000001.json")
    backups.restore(other, tmp_path / "b.tar")
    assert rollout.read(other.store, "tiny") is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "cut off"),
        (lambda b: b.replace(b"<p>", b"<q>"), "report.html is not what was backed up"),
        (lambda b: b"not a tar" * 100, "is not a backup"),
        (lambda b: b"", "is not a backup"),
    ],
)
def test_a_damaged_backup_is_refused(
    home: Home,
    make_bundle: Make,
    store: Store,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    """Nothing is written then."""
    filled(home, store, make_bundle().version)
    path = tmp_path / "b.tar"
    backups.backup(home, path)
    path.write_bytes(damage(path.read_bytes()))
    other = find(tmp_path / "other")
    with pytest.raises(BackupError, match=message):
        backups.restore(other, path)
    assert other.store.list("") == []


def test_a_backup_moves_into_another_kind_of_store(
    home: Home,
    make_bundle: Make,
    store: Store,
    any_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after the loss of a region: from a folder into a bucket, and what is backed up there is
    the same."""
    version = make_bundle().version
    filled(home, store, version)
    backups.backup(home, tmp_path / "b.tar")
    here = {key: home.store.read(key) for key in home.store.list("") if "/cache/" not in key}
    monkeypatch.setenv("DRIFTMILL_STORE", any_store.uri)
    there = find(tmp_path / "there")
    backups.restore(there, tmp_path / "b.tar")
    assert {key: there.store.read(key) for key in there.store.list("")} == here
    assert bundle.fetch(there.store, "tiny", version, tmp_path / "cache").version == version
    again = backups.backup(there, tmp_path / "again.tar")
    monkeypatch.delenv("DRIFTMILL_STORE")
    assert backups.restore(find(tmp_path / "back"), tmp_path / "again.tar") == again


def test_what_was_answered_after_the_backup_is_added_to_what_was_restored(
    home: Home, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """Segments of the log have names of their own, so that two logs are joined by copying."""
    filled(home, store, make_bundle().version)
    backups.backup(home, tmp_path / "b.tar")
    log = Log(home.spool, home.store, "tiny")
    log.append(PREDICTIONS, predictions(3))
    log.close()
    other = find(tmp_path / "other")
    backups.restore(other, tmp_path / "b.tar")
    rest = (home.folder / "store/tiny/log", other.folder / "store/tiny/log")
    shutil.copytree(*rest, dirs_exist_ok=True)
    Log(other.spool, other.store, "tiny").sweep()
    assert ids(other.store) == ["p1", "p2", "p3"]


def test_a_foreign_archive_writes_nowhere_else(tmp_path: Path, home: Home) -> None:
    """Names that lead out of the home are refused."""
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "evil", "../evil")
    with pytest.raises(BackupError, match=r"it names '\.\./evil'"):
        backups.restore(home, tmp_path / "b.tar")


def test_the_commands_say_what_they_did(
    home: Home, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """And nothing to back up is one sentence."""
    run = CliRunner().invoke
    nothing = run(app, ["--home", str(tmp_path / "none"), "backup", str(tmp_path / "b.tar")])
    assert isinstance(nothing.exception, BackupError)
    assert "there is nothing at" in str(nothing.exception)
    filled(home, store, make_bundle().version)
    made = run(app, ["--home", str(home.folder), "backup", str(tmp_path / "b.tar")])
    assert made.exit_code == 0, made.output
    assert "files, " in made.output
    back = run(app, ["--home", str(tmp_path / "other"), "restore", str(tmp_path / "b.tar")])
    assert back.exit_code == 0, back.output
    assert "files as of 20" in back.output
