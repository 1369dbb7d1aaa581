"""Tells a webhook about alarms, in the words of Alertmanager (webhook payload, version 4).

Like Alertmanager, it says again and again what is firing, with the same `startsAt` and fingerprint,
and says once that it is over. So a receiver that was down misses nothing, and one that counts by
fingerprint and start counts each incident once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, TypeAdapter

from driftmill.monitor.drift import ColumnResult, WindowResult
from driftmill.store import Store

logger = logging.getLogger(__name__)

#: Seconds after which a firing alert is told again without a new window.
REPEAT = 5.0
#: Columns that a description names.
_NAMED = 5
#: What Alertmanager sends as the end of an alert that has none.
_NO_END = "0001-01-01T00:00:00Z"


class Alert(BaseModel):
    """An alarm that is on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[str, str]
    """Its identity."""
    annotations: dict[str, str]
    starts_at: datetime

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits from the labels."""
        return hashlib.sha256(json.dumps(sorted(self.labels.items())).encode()).hexdigest()[:16]

    @property
    def incident(self) -> tuple[str, datetime]:
        """What tells this incident from every other."""
        return self.fingerprint, self.starts_at


_ALERTS = TypeAdapter(list[Alert])


def active(model: str, result: WindowResult | None) -> list[Alert]:
    """The alerts that the newest window of the champion calls for; none where there is none."""
    if result is None:
        return []
    alerts = []
    if result.alarm and result.started_at is not None:
        alerts.append(
            Alert(
                labels=_labels("ModelDrift", model, result.version, "warning"),
                annotations={
                    "summary": f"{model}: {result.streak} windows in a row have drifted",
                    "description": _describe(result),
                },
                starts_at=result.started_at,
            )
        )
    quality = result.quality
    if quality is not None and quality.alarm and quality.started_at is not None:
        alerts.append(
            Alert(
                labels=_labels("ModelQuality", model, result.version, "critical"),
                annotations={
                    "summary": f"{model}: {quality.metric} is {quality.value:.4g}, "
                    f"expected {quality.reference:.4g}",
                    "description": f"On {quality.rows} labelled rows up to {quality.until:%F %T} "
                    f"UTC, version {result.version}; standard error {quality.error:.2g}. "
                    f"{quality.note}".strip(),
                },
                starts_at=quality.started_at,
            )
        )
    return alerts


def payload(alert: Alert, status: str, url: str, ended: datetime | None = None) -> dict[str, Any]:
    """One alert as Alertmanager's webhook body.

    Args:
        alert: which.
        status: `firing` or `resolved`.
        url: where the monitor can be looked at.
        ended: when it was over, if it is.
    """
    group = {name: alert.labels[name] for name in ("alertname", "model")}
    return {
        "version": "4",
        "groupKey": "{}:{" + ", ".join(f'{k}="{v}"' for k, v in group.items()) + "}",
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "driftmill",
        "groupLabels": group,
        "commonLabels": alert.labels,
        "commonAnnotations": alert.annotations,
        "externalURL": url,
        "alerts": [
            {
                "status": status,
                "labels": alert.labels,
                "annotations": alert.annotations,
                "startsAt": _rfc3339(alert.starts_at),
                "endsAt": _rfc3339(ended) if ended else _NO_END,
                "generatorURL": f"{url}/windows",
                "fingerprint": alert.fingerprint,
            }
        ],
    }


class Notifier:
    """Keeps a webhook informed; what it has told survives a restart.

    Args:
        store: where it keeps that, as `<model>/monitor/alerts.json`.
        model: whose alerts.
        webhook: where to post.
        token_file: file with the bearer token, read again for every post; None for no token.
        url: where the monitor can be looked at.
        count: called with `accepted` or `failed` for each post.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        webhook: str,
        token_file: Path | None,
        url: str,
        count: Callable[[str], None],
    ) -> None:
        self.store = store
        self.webhook = webhook
        self.token_file = token_file
        self.url = url
        self._key = f"{model}/monitor/alerts.json"
        self._count = count
        self._client = httpx.AsyncClient(timeout=5.0)
        self._told: list[Alert] | None = None
        self._sent: dict[tuple[str, datetime], float] = {}
        self._problem = ""

    async def step(self, alerts: list[Alert], news: bool) -> None:
        """Post what is due: call it at every poll.

        Args:
            alerts: those that are on.
            news: whether a window has been judged since the last call.
        """
        if self._told is None:
            known = self.store.exists(self._key)
            self._told = _ALERTS.validate_json(self.store.read(self._key)) if known else []
        on = {alert.incident for alert in alerts}
        over = [alert for alert in self._told if alert.incident not in on]
        # Written before the first post: whoever was told that it fires will be told the end.
        self._remember(over + alerts)
        now = time.monotonic()
        for alert in alerts:
            due = self._sent.get(alert.incident, -REPEAT) + REPEAT
            if not news and now < due:
                continue
            if await self._post(payload(alert, "firing", self.url)):
                self._sent[alert.incident] = now
            else:
                self._sent.pop(alert.incident, None)
        for alert in over:
            if await self._post(payload(alert, "resolved", self.url, datetime.now(UTC))):
                self._sent.pop(alert.incident, None)
                self._remember([a for a in self._told if a.incident != alert.incident])

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    def _remember(self, alerts: list[Alert]) -> None:
        if alerts != self._told:
            self.store.write(self._key, _ALERTS.dump_json(alerts))
            self._told = alerts

    async def _post(self, body: dict[str, Any]) -> bool:
        """Whether the webhook took it; if not, the next poll tries again."""
        problem = ""
        try:
            headers = {}
            if self.token_file is not None:
                headers["Authorization"] = f"Bearer {self.token_file.read_text().strip()}"
            answer = await self._client.post(self.webhook, json=body, headers=headers)
            if not answer.is_success:
                problem = f"it answered {answer.status_code}: {answer.text[:200]}"
        except (OSError, httpx.HTTPError) as error:
            problem = f"{type(error).__name__}: {error}"
        self._count("failed" if problem else "accepted")
        # A webhook that stays down is one line in the log, not one a second.
        if problem != self._problem:
            if problem:
                logger.error("the webhook %s does not take alerts: %s", self.webhook, problem)
            else:
                logger.info("the webhook %s takes alerts again", self.webhook)
        self._problem = problem
        return not problem


def _labels(name: str, model: str, version: str, severity: str) -> dict[str, str]:
    return {"alertname": name, "model": model, "version": version, "severity": severity}


def _describe(result: WindowResult) -> str:
    def text(column: ColumnResult) -> str:
        what = "missing" if column.test in ("missing", "schema") else column.test
        return f"{column.plain_name} ({what} {column.effect:.2f})"

    drifted = sorted((c for c in result.columns if c.drifted), key=lambda c: -c.effect)
    names = ", ".join(text(c) for c in drifted[:_NAMED])
    more = f" and {len(drifted) - _NAMED} more" if len(drifted) > _NAMED else ""
    return (
        f"Window {result.index} ({result.rows} rows answered by {result.version}) differs from "
        f"the reference in {names}{more}."
    )


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
