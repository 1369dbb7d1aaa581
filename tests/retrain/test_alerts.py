"""Alertmanager's payload: what is taken, what is refused, and which event it becomes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill.monitor import alerts as monitor
from driftmill.retrain import alerts


def payload(**alert: Any) -> dict[str, Any]:
    """A delivery as Alertmanager 0.28 sends it, with one alert that differs as told."""
    return {
        "receiver": "driftmill",
        "status": "firing",
        "alerts": [
            {
                "status": "firing",
                "labels": {
                    "alertname": "ModelDrift",
                    "model": "tiny",
                    "version": "v1",
                    "severity": "warning",
                },
                "annotations": {"summary": "amount drifted"},
                "startsAt": "2026-05-01T12:00:00.123456789+02:00",
                "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "http://prometheus/graph",
                "fingerprint": "7c1f0d5a9b3e2468",
            }
            | alert
        ],
        "groupLabels": {"alertname": "ModelDrift"},
        "commonLabels": {"alertname": "ModelDrift"},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "version": "4",
        "groupKey": '{}:{alertname="ModelDrift"}',
        "truncatedAlerts": 0,
    }


def parse(value: Any) -> alerts.Payload:
    return alerts.parse(json.dumps(value).encode())


def test_an_alert_becomes_an_event() -> None:
    trigger = alerts.trigger(parse(payload()).alerts[0])
    assert trigger is not None
    assert (trigger.kind, trigger.fingerprint) == ("drift", "7c1f0d5a9b3e2468")
    assert trigger.starts_at == datetime(2026, 5, 1, 10, 0, 0, 123456, tzinfo=UTC)
    assert (trigger.version, trigger.note) == ("v1", "amount drifted")


def test_what_the_monitor_posts_is_taken() -> None:
    alert = monitor.Alert(
        labels={"alertname": "ModelQuality", "model": "tiny", "version": "v1"},
        annotations={"summary": "tiny: auc is 0.7"},
        starts_at=datetime(2026, 5, 1, tzinfo=UTC),
    )
    read = parse(monitor.payload(alert, "firing", "http://127.0.0.1:3001"))
    trigger = alerts.trigger(read.alerts[0])
    assert trigger is not None
    assert (trigger.kind, trigger.fingerprint) == ("quality", alert.fingerprint)
    assert trigger.starts_at == alert.starts_at


def test_other_alerts_are_no_event() -> None:
    for name in ("HighLatency", "modeldrift", ""):
        labels = {"alertname": name, "model": "tiny"}
        assert alerts.trigger(parse(payload(labels=labels)).alerts[0]) is None


@pytest.mark.parametrize(
    ("body", "syntax"),
    [
        (b"", True),
        (b"{", True),
        (b"\xff\xfe", True),
        (b"[" * 100_000, True),
        (b"null", False),
        (b"[]", False),
        (b"{}", False),
    ],
)
def test_what_is_no_payload(body: bytes, syntax: bool) -> None:
    with pytest.raises(alerts.PayloadError) as caught:
        alerts.parse(body)
    assert caught.value.syntax is syntax
    assert caught.value.problems


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"status": "burning"}, "alerts.0.status"),
        ({"labels": {"alertname": 3}}, "alerts.0.labels.alertname"),
        ({"startsAt": "yesterday"}, "alerts.0.startsAt"),
        ({"startsAt": "2026-05-01T12:00:00"}, "alerts.0.startsAt"),
        ({"fingerprint": ""}, "alerts.0.fingerprint"),
        ({"fingerprint": "a\u0000b"}, "alerts.0.fingerprint"),
        ({"fingerprint": "x" * 129}, "alerts.0.fingerprint"),
    ],
)
def test_a_wrong_alert_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(alerts.PayloadError) as caught:
        parse(payload(**change))
    assert caught.value.problems[0].startswith(f"{field}: ")
    assert not caught.value.syntax


@pytest.mark.parametrize(
    "change", [{"version": "3"}, {"version": 4}, {"alerts": []}, {"alerts": None}]
)
def test_a_wrong_payload_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(alerts.PayloadError):
        parse(payload() | change)


def test_too_many_alerts_are_refused() -> None:
    many = payload()
    many["alerts"] = many["alerts"] * 501
    with pytest.raises(alerts.PayloadError):
        parse(many)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(body: bytes) -> None:
    with pytest.raises(alerts.PayloadError):
        alerts.parse(body)


@given(st.text(st.characters(), max_size=1000))
def test_cleaned_text_fits_everywhere(text: str) -> None:
    cleaned = alerts.clean(text)
    assert len(cleaned) <= 300
    assert cleaned.isprintable()
    cleaned.encode("utf-8")
