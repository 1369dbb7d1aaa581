"""Counting fresh labelled rows, against the log's own `labelled`."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from driftmill import bundle, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.features import signature
from driftmill.retrain.fresh import FreshRows
from driftmill.serving.log import Label, Log, Prediction, Role, Schema, labelled
from driftmill.store import Store
from tests.conftest import tiny_frame

START = datetime.now(UTC) - timedelta(minutes=30)


def micros(minute: float) -> int:
    return int((START + timedelta(minutes=minute)).timestamp() * 1e6)


@pytest.fixture
def write(tiny: Contract, store: Store, tmp_path: Path) -> Callable[..., None]:
    """Append predictions (id, minute, role) and labels (id, minute) and move them to the store."""
    of = signature(tiny, tiny_frame(100))

    def append(predictions: list[tuple[str, float, Role]], labels: list[tuple[str, float]]) -> None:
        log = Log(tmp_path / "spool", store, "tiny")
        record = {"amount": 1.0, "age": None, "channel": "web"}
        if predictions:
            log.append(
                Schema.predictions(of),
                [
                    Prediction(i, "r", micros(m), "v1", role, "no", 0.5, record)
                    for i, m, role in predictions
                ],
            )
        if labels:
            log.append(Schema.labels(of), [Label(i, micros(m), "yes") for i, m in labels])
        log.close()

    return append


@pytest.fixture
def learnt(
    make_bundle: Callable[..., Manifest], store: Store
) -> Callable[[float, float | None], str]:
    """Make a bundle that has learnt from the log up to a minute; give its version."""

    def make(slope: float, minute: float | None) -> str:
        version = make_bundle(slope).version
        key = f"{bundle.key('tiny', version)}/{bundle.MANIFEST}"
        manifest = Manifest.model_validate_json(store.read(key))
        until = None if minute is None else (START + timedelta(minutes=minute)).isoformat()
        data = manifest.data | {"log_until": until}
        store.write(key, manifest.model_copy(update={"data": data}).model_dump_json().encode())
        return version

    return make


def test_counts_labelled_rows_after_what_was_learnt(
    write: Callable[..., None], learnt: Callable[..., str], store: Store
) -> None:
    rows: list[Any] = [(f"p{i}", float(i), "champion") for i in range(20)]
    rows[12] = ("p12", 12.0, "shadow")
    rows[13] = ("p13", 13.0, "challenger")
    write(rows, [(f"p{i}", 21.0) for i in range(0, 16)])
    write([], [("p15", 22.0), ("unknown", 22.0)])
    now = rollout.change(store, "tiny", champion=learnt(0.02, 9.0), by="me")
    fresh = FreshRows(store, "tiny")
    assert fresh.count(now) == 5  # 10, 11, 13, 14, 15
    write([], [("p19", 23.0)])
    assert fresh.count(now) == 6


def test_what_the_challenger_has_learnt_is_not_fresh(
    write: Callable[..., None], learnt: Callable[..., str], store: Store
) -> None:
    write(
        [(f"p{i}", float(i), "champion") for i in range(20)], [(f"p{i}", 21.0) for i in range(20)]
    )
    first = rollout.change(store, "tiny", champion=learnt(0.02, None), by="me")
    fresh = FreshRows(store, "tiny")
    assert fresh.count(first) == 20
    canary = rollout.change(store, "tiny", challenger=learnt(0.03, 14.0), weight=0.1, by="r1")
    assert fresh.count(canary) == 5
    back = rollout.rollback(store, "tiny", by="me")
    assert fresh.count(back) == 20


def test_an_empty_log_has_none(learnt: Callable[..., str], store: Store) -> None:
    now = rollout.change(store, "tiny", champion=learnt(0.02, None), by="me")
    assert FreshRows(store, "tiny").count(now) == 0


def test_agrees_with_the_log_over_many_segments(
    write: Callable[..., None], learnt: Callable[..., str], store: Store
) -> None:
    rng = random.Random(3)
    for part in range(8):
        rows = [
            (f"p{part}-{i}", part + i / 50, rng.choice(["champion", "challenger", "shadow"]))
            for i in range(50)
        ]
        write(rows, [(f"p{rng.randrange(part + 1)}-{rng.randrange(50)}", 10.0) for _ in range(40)])
    fresh = FreshRows(store, "tiny")
    for number, minute in enumerate((2.5, 6.01, 7.5, None)):
        version = learnt(0.1 + number, minute)
        now = rollout.change(store, "tiny", champion=version, by="me")
        since = None if minute is None else START + timedelta(minutes=minute)
        expected = labelled(store, "tiny", since)
        if since is not None:
            expected = expected[expected["_at"] > since]
        assert fresh.count(now) == len(expected) > 0


def test_each_segment_is_read_once(
    write: Callable[..., None],
    learnt: Callable[..., str],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write([("a", 1.0, "champion")], [("a", 2.0)])
    now = rollout.change(store, "tiny", champion=learnt(0.02, None), by="me")
    fresh = FreshRows(store, "tiny")
    assert fresh.count(now) == 1
    for key in store.list("tiny/log"):
        store.write(key, b"not read again")
    assert fresh.count(now) == 1


def test_a_damaged_segment_is_an_error_and_not_a_count(
    write: Callable[..., None], learnt: Callable[..., str], store: Store
) -> None:
    write([("a", 1.0, "champion")], [("a", 2.0)])
    now = rollout.change(store, "tiny", champion=learnt(0.02, None), by="me")
    store.write(store.list("tiny/log/labels")[0], b"junk")
    with pytest.raises(ValueError, match="Parquet"):
        FreshRows(store, "tiny").count(now)
