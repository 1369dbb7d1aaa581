from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from driftmill import contract, rollout
from driftmill.bundle import BundleError, Manifest
from driftmill.contract import Contract
from driftmill.monitor import windows
from driftmill.monitor.drift import WindowResult
from driftmill.monitor.windows import Cursor, Monitor
from driftmill.store import Store
from driftmill.vision import images
from tests.conftest import CONTRACT, tiny_frame
from tests.monitor import traffic
from tests.serving import pictures

START = datetime.now(UTC) - timedelta(hours=1)
Make = Callable[..., Manifest]


@pytest.fixture
def tiny() -> Contract:
    """The small contract with windows of 100 rows."""
    return contract.parse(
        CONTRACT + "monitor: {window: 100, min_rows: 50, max_quality_loss: 0.05, effect: 0.2}\n"
    )


@pytest.fixture
def champion(store: Store, make_bundle: Make) -> str:
    """The version that serves."""
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test")
    return version


@pytest.fixture
def send(store: Store, tmp_path: Path) -> Callable[..., list[str]]:
    """Send rows through a version; each call is a second later than the one before."""
    calls = iter(range(1000))

    def send(version: str, rows: int, shift: float = 0.0, **more: str) -> list[str]:
        i = next(calls)
        at = START + timedelta(seconds=i)
        frame = tiny_frame(rows, seed=i, shift=shift)
        ids = traffic.answer(store, "tiny", version, frame, tmp_path / "spool", at=at, **more)  # type: ignore[arg-type]
        if more.get("role") is None:
            traffic.label(store, "tiny", version, ids, list(frame["fraud"]), tmp_path / "spool")
        return ids

    return send


Send = Callable[..., list[str]]


def test_it_waits_for_a_champion(tiny: Contract, store: Store, make_bundle: Make) -> None:
    monitor = Monitor(tiny, store)
    assert monitor.tick() == []
    assert monitor.champion is None
    rollout.change(store, "tiny", champion=make_bundle().version, by="test")
    assert monitor.tick() == []
    assert monitor.champion is not None


def test_windows_are_cut_in_order_and_kept(
    tiny: Contract, store: Store, champion: str, send: Send
) -> None:
    monitor = Monitor(tiny, store)
    for rows in (70, 70, 170):
        send(champion, rows)
    found = monitor.tick()
    assert [w.index for w in found] == [0, 1, 2]
    assert [w.rows for w in found] == [100, 100, 100]
    assert monitor.lag_rows == 10
    assert all(a.to_at < b.from_at for a, b in itertools.pairwise(found))
    assert found == windows.results(store, "tiny")
    assert windows.results(store, "tiny", last=2) == found[1:]
    assert windows.results(store, "tiny", after=found[0].index) == found[1:]
    assert windows.results(store, "tiny", after=found[-1].index) == []
    assert monitor.tick() == []


def test_only_what_the_champion_answered_counts(
    tiny: Contract, store: Store, champion: str, make_bundle: Make, send: Send
) -> None:
    other = make_bundle(0.03).version
    monitor = Monitor(tiny, store)
    send(champion, 60)
    send(other, 300, role="challenger")
    send(other, 300, role="shadow")
    assert monitor.tick() == []
    send(champion, 60)
    assert [w.version for w in monitor.tick()] == [champion]


def test_a_new_champion_starts_anew(
    tiny: Contract, store: Store, champion: str, make_bundle: Make, send: Send
) -> None:
    monitor = Monitor(tiny, store)
    send(champion, 250, shift=3)
    assert monitor.tick()[-1].alarm
    new = make_bundle(0.03).version
    rollout.change(store, "tiny", champion=new, by="test")
    send(new, 90)
    assert monitor.tick() == []
    assert monitor.current is None
    send(new, 20, shift=3)
    (window,) = monitor.tick()
    assert (window.index, window.version, window.streak) == (2, new, 0)

    # Back to the first: its rows from before do not count again.
    send(champion, 99)
    rollout.change(store, "tiny", champion=champion, by="test")
    assert monitor.tick() == []
    assert monitor.lag_rows == 0


def test_drifted_windows_alarm_and_keep_their_rows(
    tiny: Contract, store: Store, champion: str, send: Send
) -> None:
    monitor = Monitor(tiny, store)
    send(champion, 100)
    send(champion, 100)
    send(champion, 200, shift=2)
    found = monitor.tick()
    assert [w.drifted for w in found] == [False, False, True, True]
    assert [w.alarm for w in found] == [False, False, False, True]
    assert found[3].started_at == found[2].from_at
    assert [c.name for c in found[3].columns if c.drifted] == ["amount", "_score"]
    # The first window of a champion is the baseline.
    assert monitor.unreported == [0, 2, 3]
    assert len(windows.rows(store, "tiny", 3)) == 100
    assert Monitor(tiny, store).unreported == []
    again = Monitor(tiny, store)
    again.tick()
    assert again.unreported == [0, 2, 3]


def test_quality_is_measured_when_labels_come(
    tiny: Contract, store: Store, champion: str, send: Send, tmp_path: Path
) -> None:
    monitor = Monitor(tiny, store)
    good = tiny_frame(200, seed=1)
    ids = traffic.answer(store, "tiny", champion, good, tmp_path / "spool")
    assert [w.quality for w in monitor.tick()] == [None, None]
    flipped = ["no" if v == "yes" else "yes" for v in good["fraud"]]
    traffic.label(store, "tiny", champion, ids, flipped, tmp_path / "spool")
    traffic.answer(store, "tiny", champion, good.head(100), tmp_path / "spool")
    (window,) = monitor.tick()
    assert window.quality is not None
    assert window.quality.rows == 100
    assert window.quality.value < 0.5
    assert window.quality.drifted
    assert monitor.labelled_rows == 200

    # A monitor that starts now knows the answers to labels that come later.
    late = Monitor(tiny, store)
    late.tick()
    more = traffic.answer(store, "tiny", champion, good.head(100), tmp_path / "spool")
    traffic.label(store, "tiny", champion, more, flipped[:100], tmp_path / "spool")
    (window,) = late.tick()
    assert window.quality is not None
    assert window.quality.alarm


def test_a_damaged_segment_is_skipped_and_counted(
    tiny: Contract,
    store: Store,
    champion: str,
    send: Send,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(champion, 60)
    (whole,) = store.list("tiny/log/predictions")
    content = store.read(whole)
    day = whole.rsplit("/", 1)[0]
    store.write(f"{day}/000000000001-x-1.parquet", content[: len(content) // 2])
    store.write(f"{day}/000000000002-x-2.parquet", b"")
    store.write(f"{day}/000000000003-x-3.parquet", content[:-40] + bytes(40))
    labels = store.list("tiny/log/labels")[0]
    store.write(f"{day}/000000000004-x-4.parquet", store.read(labels))
    store.write(f"{day}/zz-strange-name.parquet", b"PAR1")
    send(champion, 60)
    monitor = Monitor(tiny, store)
    assert len(monitor.tick()) == 1
    assert monitor.skipped_segments == 5
    assert "is skipped: it has no column" in caplog.text
    monitor.tick()
    assert monitor.skipped_segments == 5


def test_a_champion_without_a_bundle_is_an_error_that_heals(
    tiny: Contract, store: Store, champion: str, make_bundle: Make, send: Send
) -> None:
    monitor = Monitor(tiny, store)
    rollout.change(store, "tiny", champion="0" * 12, by="test")
    with pytest.raises(BundleError, match="no version"):
        monitor.tick()
    new = make_bundle(0.03).version
    rollout.change(store, "tiny", champion=new, by="test")
    send(new, 100)
    assert [w.version for w in monitor.tick()] == [new]


def test_columns_may_be_absent_or_of_another_type(
    tiny: Contract, store: Store, champion: str, send: Send
) -> None:
    send(champion, 50)
    send(champion, 60)
    keys = store.list("tiny/log/predictions")
    monitor = Monitor(tiny, store)

    def rewrite(key: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
        buffer = io.BytesIO()
        change(pd.read_parquet(io.BytesIO(store.read(key)))).to_parquet(buffer)
        store.write(key, buffer.getvalue())

    rewrite(keys[0], lambda f: f.drop(columns="channel").assign(amount="text"))
    rewrite(keys[1], lambda f: f.drop(columns="channel"))
    (window,) = monitor.tick()
    columns = {c.name: c for c in window.columns}
    assert columns["channel"].reason == "the column is absent from the window"
    assert columns["amount"].reason == "50 of 100 values are not finite numbers"
    assert len(windows.rows(store, "tiny", 0)) == 100


class Killed(BaseException):
    """The process is gone."""


class Mortal(Store):
    """A store whose process is killed before or after its n-th write."""

    def __init__(self, uri: str, writes: int, after: bool) -> None:
        super().__init__(uri)
        self.left = writes
        self.after = after

    def write(self, key: str, content: bytes) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        super().write(key, content)
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_it_loses_and_doubles_nothing(
    tiny: Contract, store: Store, champion: str, send: Send, after: bool
) -> None:
    def work(monitor: Monitor) -> None:
        """As the service does: poll while traffic comes."""
        while monitor.tick():
            pass

    def clear() -> None:
        for key in store.list("tiny/monitor"):
            store.delete(key)

    for rows, shift in ((130, 0), (90, 0), (250, 2), (40, 2)):
        send(champion, rows, shift)
    keys = store.list("tiny/log/predictions")
    late = {key: store.read(key) for key in keys[2:]}

    def run(writes: int) -> tuple[list[WindowResult], int]:
        """Part of the log, a death, a new process, the rest of the log."""
        clear()
        deaths = 0
        for key in late:
            store.delete(key)
        monitor = Monitor(tiny, Mortal(store.uri, writes, after))
        parts: list[dict[str, bytes]] = [{}, late]
        for part in parts:
            for key, content in part.items():
                store.write(key, content)
            try:
                work(monitor)
            except Killed:
                deaths += 1
                monitor = Monitor(tiny, store)
                work(monitor)
        assert monitor.lag_rows == 10
        return windows.results(store, "tiny"), deaths

    expected, deaths = run(10_000)
    assert deaths == 0
    assert [w.index for w in expected] == [0, 1, 2, 3, 4]
    assert [w.alarm for w in expected] == [False, False, False, True, True]
    writes = 1
    while True:
        found, deaths = run(writes)
        assert [w.model_copy(update={"quality": None}) for w in found] == [
            w.model_copy(update={"quality": None}) for w in expected
        ]
        if not deaths:
            break
        writes += 1
    assert writes > 10


def test_a_long_backlog_is_read_in_batches(
    tiny: Contract, store: Store, champion: str, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "BATCH_ROWS", 150)
    for _ in range(5):
        send(champion, 100)
    monitor = Monitor(tiny, store)
    found = monitor.tick()
    assert monitor.behind
    while monitor.behind:
        found += monitor.tick()
    assert [w.index for w in found] == [0, 1, 2, 3, 4]


def test_the_list_of_segments_read_stays_bounded() -> None:
    cursor = Cursor()
    folder = "m/log/predictions"
    old = [f"{folder}/20260101/{hour:02d}0000000000-w-1.parquet" for hour in range(24)]
    cursor.seen.update(old)
    cursor.prune()
    assert sorted(cursor.seen) == old[17:]
    assert cursor.new([*old, f"{folder}/20260102/000000000000-w-2.parquet"]) == [
        f"{folder}/20260102/000000000000-w-2.parquet"
    ]
    ahead = f"{folder}/29990101/000000000000-w-3.parquet"
    cursor.seen.add(ahead)
    cursor.prune()
    today = f"{folder}/{datetime.now(UTC):%Y%m%d/%H%M%S}000000-w-4.parquet"
    assert cursor.new([ahead, today]) == [today]


@pytest.fixture
def shades() -> Contract:
    """The contract of a tiny model of images, with windows of 100 rows."""
    return pictures.shades(monitor={"window": 100, "min_rows": 50, "effect": 0.2})


@pytest.fixture
def show(store: Store, tmp_path: Path, shades: Contract) -> Callable[..., None]:
    """Send images through a champion; each call is a second later than the one before."""
    version = pictures.put_bundle(store, tmp_path, shades).version
    rollout.change(store, "shades", champion=version, by="test")
    calls = iter(range(1000))

    def show(rows: int, lighter: int = 0) -> None:
        i = next(calls)
        frame = pictures.frame(shades, rows, seed=i + 1, lighter=lighter)
        at = START + timedelta(seconds=i)
        traffic.answer(store, "shades", version, frame, tmp_path / "spool", at=at)

    return show


def test_windows_of_images_keep_them(
    shades: Contract, store: Store, show: Callable[..., None]
) -> None:
    monitor = Monitor(shades, store)
    show(150)
    show(150, lighter=150)
    found = monitor.tick()
    assert [w.drifted for w in found] == [False, True, True]
    changed = {c.name for c in found[2].columns if c.drifted}
    assert {"brightness", "_score", "embedding"} <= changed
    for index in (0, 2):
        rows = windows.rows(store, "shades", index)
        assert len(rows) == 100
        for content, level in zip(rows["_image"], rows["brightness"], strict=True):
            pixels = images.from_png(content)
            assert pixels.shape == (1, 8, 8)
            assert pixels.mean() / 255 == pytest.approx(level, abs=1e-4)
        assert {len(e) for e in rows["_embedding"]} == {4}


def test_a_log_without_images_is_watched_all_the_same(
    shades: Contract, store: Store, show: Callable[..., None]
) -> None:
    show(100, lighter=150)
    (key,) = store.list("shades/log/predictions")
    buffer = io.BytesIO()
    pd.read_parquet(io.BytesIO(store.read(key))).assign(_image=None).to_parquet(buffer)
    store.write(key, buffer.getvalue())
    show(50)  # with images again: both in one window
    show(50)
    found = Monitor(shades, store).tick()
    assert [w.drifted for w in found] == [True, False]
    assert windows.rows(store, "shades", 0)["_image"].isna().all()


@pytest.mark.parametrize("writes", range(1, 7))
def test_killed_with_images_it_goes_on_with_them(
    shades: Contract, store: Store, show: Callable[..., None], writes: int
) -> None:
    show(130)
    show(130, lighter=150)
    expected = Monitor(shades, store).tick()
    kept = windows.rows(store, "shades", 1)
    for key in store.list("shades/monitor"):
        store.delete(key)
    dying = Monitor(shades, Mortal(store.uri, writes, after=False))
    with pytest.raises(Killed):
        dying.tick()
    monitor = Monitor(shades, store)
    monitor.tick()
    assert windows.results(store, "shades") == expected
    pd.testing.assert_frame_equal(windows.rows(store, "shades", 1), kept)
    assert monitor.lag_rows == 60
    show(40)
    assert len(monitor.tick()) == 1


def test_images_are_read_in_batches_of_bytes(
    shades: Contract,
    store: Store,
    show: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windows, "BATCH_BYTES", 1)
    for _ in range(5):
        show(80)
    monitor = Monitor(shades, store)
    # However large its images are, a window is read whole.
    assert [w.index for w in monitor.tick()] == [0]
    assert monitor.behind
    assert monitor.lag_rows == 60
    while monitor.behind:
        monitor.tick()
    assert [w.index for w in windows.results(store, "shades")] == [0, 1, 2, 3]
