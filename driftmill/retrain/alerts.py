"""Alertmanager's webhook payload, version 4, and what of it may ask for a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from driftmill.retrain.policy import Kind, Trigger

#: Which alert is which trigger; others are none of the controller's business.
ALERTS: dict[str, Kind] = {"ModelDrift": "drift", "ModelQuality": "quality"}

_Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z._:-]{1,128}$")]


class PayloadError(ValueError):
    """A body that is not such a payload.

    `syntax` is true where it is not even JSON; `problems` holds a line for each mistake.
    """

    def __init__(self, problems: list[str], syntax: bool) -> None:
        self.problems = problems
        self.syntax = syntax
        super().__init__("; ".join(problems))


class Alert(BaseModel):
    """One alert of a payload. Fields that decide nothing are not looked at."""

    model_config = ConfigDict(frozen=True)

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] = {}
    startsAt: AwareDatetime  # noqa: N815 (the spelling of Alertmanager)
    fingerprint: _Fingerprint


class Payload(BaseModel):
    """A delivery."""

    model_config = ConfigDict(frozen=True)

    version: Literal["4"]
    groupKey: str  # noqa: N815
    status: Literal["firing", "resolved"]
    alerts: tuple[Alert, ...] = Field(min_length=1, max_length=500)


def parse(body: bytes) -> Payload:
    """Read a request's body. Raises PayloadError."""
    try:
        return Payload.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        syntax = found[0]["type"] == "json_invalid"
        problems = [
            f"{'.'.join(str(part) for part in p['loc']) or 'body'}: {p['msg']}" for p in found[:20]
        ]
        raise PayloadError(problems, syntax) from None


def trigger(alert: Alert) -> Trigger | None:
    """The event behind an alert; None where the alert is of another kind."""
    kind = ALERTS.get(alert.labels.get("alertname", ""))
    if kind is None:
        return None
    return Trigger(
        kind=kind,
        fingerprint=alert.fingerprint,
        starts_at=alert.startsAt.astimezone(UTC),
        version=alert.labels.get("version") or None,
        note=clean(alert.annotations.get("summary", "")),
    )


def manual(note: str, now: datetime) -> Trigger:
    """A person's request; each is an event of its own."""
    return Trigger(kind="manual", fingerprint="manual", starts_at=now, note=clean(note))


def scheduled(at: datetime) -> Trigger:
    """A time of the schedule."""
    return Trigger(kind="schedule", fingerprint="schedule", starts_at=at)


def first(failed: datetime | None) -> Trigger:
    """The wish for a first model: one for all times, or once more after a run that failed then."""
    starts_at = failed or datetime.fromtimestamp(0, UTC)
    return Trigger(kind="first", fingerprint="first", starts_at=starts_at)


def clean(text: str, length: int = 300) -> str:
    """Text from outside, fit for a database, a log line and a command's argument."""
    return "".join(c if c.isprintable() else " " for c in text)[:length].strip()
