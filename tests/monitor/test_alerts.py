from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from driftmill.monitor import alerts
from driftmill.monitor.drift import ColumnResult, Quality, WindowResult
from driftmill.store import Store
from tests.monitor.receiver import Receiver

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A webhook that takes everything."""
    with Receiver() as receiver:
        yield receiver


def window(streak: int, index: int = 5, quality: Quality | None = None) -> WindowResult:
    column = ColumnResult(
        name="amount",
        kind="input",
        test="ks",
        p_value=0.0,
        effect=0.4,
        drifted=streak > 0,
        missing=0,
        unseen=0,
        out_of_range=0,
    )
    return WindowResult(
        index=index,
        version="abc",
        rows=500,
        from_at=START,
        to_at=START + timedelta(minutes=1),
        columns=(column,),
        drifted=streak > 0,
        score=0.4,
        features_drifted=1,
        streak=streak,
        alarm=streak >= 2,
        started_at=START if streak else None,
        quality=quality,
    )


def test_only_alarms_are_alerts() -> None:
    assert alerts.active("m", None) == []
    assert alerts.active("m", window(0)) == []
    assert alerts.active("m", window(1)) == []
    (alert,) = alerts.active("m", window(2))
    assert alert.labels == {
        "alertname": "ModelDrift",
        "model": "m",
        "version": "abc",
        "severity": "warning",
    }
    assert "amount (ks 0.40)" in alert.annotations["description"]
    quality = Quality(
        metric="auc",
        value=0.7,
        reference=0.9,
        rows=400,
        drifted=True,
        until=START,
        streak=2,
        alarm=True,
        started_at=START,
    )
    both = alerts.active("m", window(2, quality=quality))
    assert [a.labels["alertname"] for a in both] == ["ModelDrift", "ModelQuality"]
    assert both[1].annotations["summary"] == "m: auc is 0.7, expected 0.9"
    assert both[0].fingerprint != both[1].fingerprint


def test_what_has_changed_is_told_in_plain_words() -> None:
    drifted = window(2)
    (amount,) = drifted.columns
    columns = tuple(
        amount.model_copy(update={"name": name, "test": test, "effect": effect})
        for name, test, effect in (
            ("brightness", "ks", 0.2),
            ("_prediction", "chi2", 0.3),
            ("_score", "ks", 0.1),
            ("embedding", "classifier", 0.62),
        )
    )
    (alert,) = alerts.active("m", drifted.model_copy(update={"columns": columns}))
    assert (
        "embedding (classifier 0.62), answers (chi2 0.30), brightness (ks 0.20), "
        "confidence (ks 0.10)" in alert.annotations["description"]
    )


def test_the_payload_is_alertmanagers() -> None:
    (alert,) = alerts.active("m", window(2))
    body = alerts.payload(alert, "firing", "http://monitor")
    assert body["version"] == "4"
    assert body["groupKey"] == '{}:{alertname="ModelDrift", model="m"}'
    (one,) = body["alerts"]
    assert one["startsAt"] == "2026-01-01T00:00:00Z"
    assert one["endsAt"] == "0001-01-01T00:00:00Z"
    assert len(one["fingerprint"]) == 16
    later = alerts.active("m", window(3, index=6))[0]
    assert (later.fingerprint, later.starts_at) == (alert.fingerprint, alert.starts_at)
    ended = alerts.payload(alert, "resolved", "http://monitor", START + timedelta(hours=1))
    assert ended["alerts"][0]["endsAt"] == "2026-01-01T01:00:00Z"


def notifier(
    store: Store, receiver: Receiver, token: Path | None = None
) -> tuple[alerts.Notifier, Counter[str]]:
    outcomes: Counter[str] = Counter()

    def count(outcome: str) -> None:
        outcomes[outcome] += 1

    return alerts.Notifier(store, "m", receiver.url, token, "http://monitor", count), outcomes


def test_it_tells_each_window_and_the_end_once(store: Store, receiver: Receiver) -> None:
    async def run() -> None:
        told, outcomes = notifier(store, receiver)
        on = alerts.active("m", window(2))
        await told.step([], news=True)
        await told.step(on, news=True)
        await told.step(on, news=False)
        await told.step(alerts.active("m", window(3, index=6)), news=True)
        await told.step([], news=True)
        await told.step([], news=True)
        await told.close()
        assert outcomes == {"accepted": 3}

    asyncio.run(run())
    assert [body["status"] for body in receiver.bodies] == ["firing", "firing", "resolved"]
    assert (
        len({(b["alerts"][0]["fingerprint"], b["alerts"][0]["startsAt"]) for b in receiver.bodies})
        == 1
    )


def test_a_receiver_that_refuses_is_told_at_the_next_poll(
    store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        told, outcomes = notifier(store, receiver)
        on = alerts.active("m", window(2))
        receiver.status = 503
        await told.step(on, news=True)
        await told.step(on, news=False)
        receiver.status = 202
        await told.step(on, news=False)
        await told.step(on, news=False)
        receiver.status = 500
        await told.step([], news=True)
        receiver.status = 202
        await told.step([], news=False)
        await told.close()
        assert outcomes == {"failed": 3, "accepted": 2}

    asyncio.run(run())
    accepted = [body["status"] for body in receiver.bodies if body["answered"] == 202]
    assert accepted == ["firing", "resolved"]
    assert caplog.text.count("does not take alerts: it answered 503") == 1


def test_a_receiver_that_is_gone_is_counted(store: Store) -> None:
    with Receiver() as receiver:
        pass

    async def run() -> None:
        told, outcomes = notifier(store, receiver)
        await told.step(alerts.active("m", window(2)), news=True)
        await told.close()
        assert outcomes == {"failed": 1}

    asyncio.run(run())


def test_the_token_is_read_for_every_post(store: Store, receiver: Receiver, tmp_path: Path) -> None:
    token = tmp_path / "token"

    async def run() -> None:
        told, outcomes = notifier(store, receiver, token)
        on = alerts.active("m", window(2))
        await told.step(on, news=True)
        token.write_text("one\n")
        await told.step(on, news=True)
        token.write_text("two\n")
        await told.step(on, news=True)
        await told.close()
        assert outcomes == {"failed": 1, "accepted": 2}

    asyncio.run(run())
    assert receiver.authorizations == ["Bearer one", "Bearer two"]


def test_the_end_is_told_after_a_restart(store: Store, receiver: Receiver) -> None:
    async def run() -> None:
        first, _ = notifier(store, receiver)
        await first.step(alerts.active("m", window(2)), news=True)
        await first.close()
        second, _ = notifier(store, receiver)
        await second.step([], news=False)
        await second.close()
        third, _ = notifier(store, receiver)
        await third.step([], news=False)
        await third.close()

    asyncio.run(run())
    assert [body["status"] for body in receiver.bodies] == ["firing", "resolved"]
    assert json.loads(store.read("m/monitor/alerts.json")) == []
