"""Prometheus' rules of a model, from its contract, and their unit tests for promtool.

`rules` is what Prometheus loads (or a PrometheusRule holds), `unit_tests` what
`promtool test rules` runs on it: for each alert one case in which it fires and one, close by, in
which it does not. Both come from the same list, so that no alert is without its test.

Whether a window has drifted, and for how many windows, the monitor has decided by the contract
before Prometheus sees it; what happens to the pods is taken out of the labels (`max by`), because
Alertmanager makes an alert's identity of them, and an incident is not over when a pod is replaced.

The alerts on broken promises burn the error budget in several windows at once: Beyer et al., "The
Site Reliability Workbook" (2018), chapter 5, https://sre.google/workbook/alerting-on-slos/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from driftmill.contract import Contract

#: Where the page `<alert>.md` of each alert lies.
RUNBOOKS = "https://github.com/driftmill/driftmill/blob/main/docs/runbooks"

#: Windows over which requests are counted.
_WINDOWS = ("5m", "30m", "1h", "6h", "3d")

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation, by name with labels, looked at after some time."""

    series: dict[str, str]
    at: str = "10m"
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the expected alert besides model, severity and owner."""
    step: str = "1m"
    """Time between two values of a series."""


@dataclass(frozen=True)
class Alert:
    """One alert with its tests."""

    name: str
    expr: str
    severity: Severity
    summary: str
    """May name labels of the series: `{{ $labels.version }}`."""
    description: str
    fires: Case
    calm: Case
    hold: str = ""
    """How long it must be true before it fires."""


def rules(contract: Contract, *, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The rule file: `groups` with recording rules and alerts.

    Args:
        contract: thresholds, promises and the model's name.
        runbooks: URL below which `<alert>.md` lies.
    """
    return {
        "groups": [
            {"name": f"driftmill-{contract.model}-slo", "rules": list(_recorded(contract))},
            {
                "name": f"driftmill-{contract.model}",
                "rules": [_rule(alert, contract, runbooks) for alert in alerts(contract)],
            },
        ]
    }


def unit_tests(contract: Contract, file: str, *, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The unit tests of `rules`.

    Args:
        contract: the same contract.
        file: path of the rule file, relative to the tests' file.
        runbooks: as given to `rules`.
    """
    return {
        "rule_files": [file],
        "evaluation_interval": "1m",
        "tests": [
            _test(alert, contract, runbooks, fires=fires)
            for alert in alerts(contract)
            for fires in (True, False)
        ],
    }


def alerts(contract: Contract) -> list[Alert]:
    """All alerts of a model."""
    return [
        *_drift(contract),
        *_quality(contract),
        *_monitor(contract),
        *_promises(contract),
        *_service(contract),
        *_labels_come(contract),
        *_retraining(contract),
    ]


def _drift(contract: Contract) -> Iterator[Alert]:
    model, windows = contract.model, contract.monitor.persistence
    series = f'model_drift_alarm{{model="{model}",version="v1",pod="a"}}'
    yield Alert(
        name="ModelDrift",
        expr=f'max by (model, version) (model_drift_alarm{{model="{model}"}}) == 1',
        severity="warning",
        summary=f"{model}: what it is asked differs from what it has learnt",
        description=f"{windows} windows of {contract.monitor.window} rows in a row, answered by "
        "{{ $labels.version }}, differ from the reference. The controller decides about a "
        "retraining; the monitor's report says which columns.",
        fires=Case({series: "0x4 1x6"}, labels={"version": "v1"}),
        # Drifted windows below the contract's persistence raise no alarm.
        calm=Case({series: "0x10", series.replace("alarm", "detected"): "1x10"}),
    )


def _quality(contract: Contract) -> Iterator[Alert]:
    model, metric = contract.model, contract.metric
    series = f'model_quality_alarm{{model="{model}",version="v1"}}'
    yield Alert(
        name="ModelQuality",
        expr=f'max by (model, version) (model_quality_alarm{{model="{model}"}}) == 1',
        severity="critical",
        summary=f"{model}: surely worse than on its test rows",
        description=f"The {metric.name} of {{{{ $labels.version }}}} on labelled rows is worse "
        "than the contract's monitor.max_quality_loss allows.",
        fires=Case({series: "0x4 1x6"}, labels={"version": "v1"}),
        calm=Case({series: "0x10"}),
    )
    floor = contract.gates.floor
    if floor is None:
        return
    worse, reduce = ("<", "max") if metric.direction == "maximize" else (">", "min")
    step = 0.1 * abs(floor) or 0.1
    below, above = (floor - step, floor + step) if worse == "<" else (floor + step, floor - step)
    series = f'model_quality{{model="{model}",metric="{metric.name}",version="v1"}}'
    selector = f'model_quality{{model="{model}",metric="{metric.name}"}}'
    yield Alert(
        name="ModelQualityBelowFloor",
        expr=f"{reduce} by (model, version) ({selector}) {worse} {floor:g}",
        severity="critical",
        summary=f"{model}: {metric.name} is beyond the floor of {floor:g}",
        description="On the newest labelled rows {{ $labels.version }} would not be let through "
        "the gate (gates.floor). Roll back or take the model out of use.",
        hold="10m",
        fires=Case({series: f"{below:g}x20"}, at="15m", labels={"version": "v1"}),
        calm=Case({series: f"{above:g}x20"}, at="15m"),
    )


def _monitor(contract: Contract) -> Iterator[Alert]:
    model = contract.model
    name = f'model_drift_last_success_timestamp_seconds{{model="{model}"}}'
    stale = int(max(300, 20 * contract.monitor.poll))
    minutes = stale // 60 + 10
    yield Alert(
        name="ModelMonitorStale",
        expr=f"time() - max by (model) ({name}) > {stale}",
        severity="warning",
        summary=f"{model}: the monitor runs and sees nothing",
        description=f"For more than {stale} s it could not read the inference log. Drift goes "
        "unnoticed.",
        # Promtool's clock begins at 0: a success at 60 s that never moves on, and one that does.
        fires=Case({name: f"60x{minutes}"}, at=f"{minutes}m"),
        calm=Case({name: f"0+60x{minutes}"}, at=f"{minutes}m"),
    )
    yield Alert(
        name="ModelMonitorAbsent",
        expr=f"absent({name})",
        severity="warning",
        summary=f"{model}: there is no monitor",
        description="No process reports on drift. It is down, or Prometheus does not reach it.",
        hold="5m",
        fires=Case({}),
        calm=Case({name: "0+60x10"}),
    )


def _promises(contract: Contract) -> Iterator[Alert]:
    model, slo = contract.model, contract.serve.slo
    good, bad = (f'model_requests_total{{model="{model}",code="{c}"}}' for c in ("200", "503"))
    yield from _burn(
        "ModelErrorBudgetBurn",
        lambda window: f'model:request_errors:ratio_rate{window}{{model="{model}"}}',
        1 - slo.availability,
        summary=f"{model}: requests fail",
        description=f"The promise is that {slo.availability:.6g} of them do not "
        "(serve.slo.availability).",
        traffic=lambda share: {good: _rise(1 - share), bad: _rise(share)},
    )
    fast = f'model_request_duration_seconds_bucket{{model="{model}",le="{_edge(contract)}"}}'
    every = f'model_request_duration_seconds_count{{model="{model}"}}'
    yield from _burn(
        "ModelLatencyBudgetBurn",
        lambda window: f'model:request_slow:ratio_rate{window}{{model="{model}"}}',
        1 - slo.latency,
        summary=f"{model}: answers come late",
        description=f"The promise is that {slo.latency:.6g} of them come within "
        f"{slo.latency_ms:g} ms (serve.slo.latency).",
        traffic=lambda share: {fast: _rise(1 - share), every: _rise(1)},
    )


def _burn(
    name: str,
    ratio: Callable[[str], str],
    budget: float,
    *,
    summary: str,
    description: str,
    traffic: Callable[[float], dict[str, str]],
) -> Iterator[Alert]:
    """A page for a budget that will be gone within days, a ticket for one that does not last its
    month. The short window ends the alert soon after its cause has ended.

    Args:
        name: of the page; the ticket is named `<name>Slow`.
        ratio: the recorded share of bad requests in a window.
        budget: the share that may be bad.
        summary: of both.
        description: of both.
        traffic: series in which a given share of the requests is bad.
    """

    def burns(rate: float, long: str, short: str) -> str:
        limit = f"{rate * budget:.6g}"
        return f"({ratio(long)} > {limit} and {ratio(short)} > {limit})"

    yield Alert(
        name=name,
        # 2 % of a month's budget in an hour, or 5 % of it in six.
        expr=f"{burns(14.4, '1h', '5m')} or {burns(6, '6h', '30m')}",
        severity="critical",
        summary=summary,
        description=f"{description} At this rate a month's budget is used up in five days at most.",
        fires=Case(traffic(16 * budget), at="70m"),
        calm=Case(traffic(4 * budget), at="7h", step="2m"),
    )
    yield Alert(
        name=f"{name}Slow",
        # 10 % of a month's budget in three days.
        expr=burns(1, "3d", "6h"),
        severity="warning",
        summary=f"{summary}, a little too often",
        description=f"{description} The budget will not last the month.",
        fires=Case(traffic(2 * budget), at="7h", step="2m"),
        calm=Case(traffic(0.5 * budget), at="7h", step="2m"),
    )


def _service(contract: Contract) -> Iterator[Alert]:
    model = contract.model
    revision = f'model_rollout_revision{{model="{model}"}}'
    yield Alert(
        name="ModelServiceAbsent",
        expr=f"absent({revision})",
        severity="critical",
        summary=f"{model}: no service answers",
        description="No process serves the model. It is down, or Prometheus does not reach it.",
        hold="2m",
        fires=Case({}),
        calm=Case({revision: "3x10"}),
    )
    failing = f'model_inference_log_failing{{model="{model}",pod="a"}}'
    loss = (
        "Requests are answered with 503 until it can be."
        if contract.serve.log.on_error == "refuse"
        else "What is answered meanwhile is not kept: drift and labels miss it."
    )
    yield Alert(
        name="ModelLogFailing",
        expr=f'max by (model) (model_inference_log_failing{{model="{model}"}}) == 1',
        severity="critical",
        summary=f"{model}: predictions cannot be written down",
        description=f"The last write to the inference log failed, mostly for a full disk. {loss}",
        hold="1m",
        fires=Case({failing: "0x3 1x7"}, at="6m"),
        calm=Case({failing: "0 1 0x8"}, at="3m"),
    )
    # Counted from 0, which a counter of a version that has never failed does not show.
    now = f'sum by (model, version) (model_load_failures_total{{model="{model}"}})'
    before = f'sum by (model, version) (model_load_failures_total{{model="{model}"}} offset 15m)'
    failures = f'model_load_failures_total{{model="{model}",version="v2",pod="a"}}'
    yield Alert(
        name="ModelVersionNotLoaded",
        expr=f"{now} - ({before} or {now} * 0) > 0",
        severity="critical",
        summary=f"{model}: {{{{ $labels.version }}}} is to serve and does not load",
        description="The version before goes on serving. The service's log says why; mend it or "
        "roll back.",
        fires=Case({failures: "_x4 1x6"}, labels={"version": "v2"}),
        calm=Case({failures: "1x30"}, at="20m"),
    )


def _labels_come(contract: Contract) -> Iterator[Alert]:
    model, within = contract.model, contract.monitor.labels_within
    if within is None:
        return
    # Rounded to what a rule can say; under a minute it would alert between two scrapes.
    window = max(round(within / 60), 1)

    def grown(counter: str) -> str:
        return f'sum by (model) (increase({counter}{{model="{model}"}}[{window}m])) > 0'

    asked = f'model_predictions_total{{model="{model}",pod="a"}}'
    labels = f'model_feedback_total{{model="{model}",pod="a"}}'
    step = max(window // 60, 1)
    hold = max(window // 10, 1)
    # Just long enough for a full window, the hold, and a value either way.
    until = window + hold + 2 * step
    values = until // step + 2
    at, every = f"{until}m", f"{step}m"
    yield Alert(
        name="ModelNoLabels",
        expr=f"{grown('model_predictions_total')} unless {grown('model_feedback_total')}",
        severity="warning",
        summary=f"{model}: no labels come",
        description=f"Predictions were made for {window} minutes and no label was given for any. "
        "Quality cannot be measured, and nothing can be learnt (monitor.labels_within).",
        hold=f"{hold}m",
        fires=Case({asked: f"0+9x{values}", labels: f"5x{values}"}, at=at, step=every),
        calm=Case({asked: f"0+9x{values}", labels: f"0+1x{values}"}, at=at, step=every),
    )


def _retraining(contract: Contract) -> Iterator[Alert]:
    model = contract.model
    active = f'retrain_run_active{{model="{model}"}}'
    yield Alert(
        name="RetrainingAbsent",
        expr=f"absent({active})",
        severity="warning",
        summary=f"{model}: there is no controller",
        description="Alarms lead to no retraining. It is down, or Prometheus does not reach it.",
        hold="5m",
        fires=Case({}),
        calm=Case({active: "0x10"}),
    )
    breaker = f'retrain_breaker_open{{model="{model}",pod="a"}}'
    failed = f'retrain_runs_total{{model="{model}",state="failed",pod="a"}}'
    yield Alert(
        name="RetrainingFailing",
        expr=f'max by (model) (retrain_breaker_open{{model="{model}"}}) == 1 or sum by (model)'
        f' (increase(retrain_runs_total{{model="{model}",state="failed"}}[1d])) >= 2',
        severity="warning",
        summary=f"{model}: training fails again and again",
        description=f"Two runs failed within a day, or {contract.retrain.breaker} in a row "
        "promoted nothing, so that none starts until a person resets it (retrain.breaker).",
        fires=Case({breaker: "0x4 1x6", failed: "0x10"}),
        calm=Case({breaker: "0x10", failed: "0x4 1x6"}),
    )
    budget = f'retrain_budget_remaining{{model="{model}",pod="a"}}'
    yield Alert(
        name="RetrainingBudgetUsedUp",
        expr=f'max by (model) (retrain_budget_remaining{{model="{model}"}}) == 0',
        severity="info",
        summary=f"{model}: the budget for retraining is used up",
        description=f"{contract.retrain.budget.runs} runs in "
        f"{contract.retrain.budget.period:g} s have been made (retrain.budget). Alarms start none "
        "until the period is over.",
        hold="15m",
        fires=Case({budget: "0x30"}, at="20m"),
        calm=Case({budget: "1x10 0x10"}, at="20m"),
    )


def _recorded(contract: Contract) -> Iterator[dict[str, Any]]:
    """Shares of bad requests, of all pods together."""
    requests = f'model_requests_total{{model="{contract.model}"'
    seconds = f'model_request_duration_seconds_%s{{model="{contract.model}"'
    for window in _WINDOWS:
        yield {
            "record": f"model:request_errors:ratio_rate{window}",
            "expr": f'sum by (model) (rate({requests},code=~"5.."}}[{window}]))'
            f" / sum by (model) (rate({requests}}}[{window}]))",
        }
        fast = f'{seconds % "bucket"},le="{_edge(contract)}"}}[{window}]'
        yield {
            "record": f"model:request_slow:ratio_rate{window}",
            "expr": f"1 - sum by (model) (rate({fast}))"
            f" / sum by (model) (rate({seconds % 'count'}}}[{window}]))",
        }


def _edge(contract: Contract) -> str:
    """The promised latency as the label of its bucket."""
    return repr(contract.serve.slo.latency_ms / 1000)


def _rise(share: float) -> str:
    """A counter that rises by a share of 100,000 a step, for longer than any test looks."""
    return f"0+{round(100_000 * share)}x500"


def _rule(alert: Alert, contract: Contract, runbooks: str) -> dict[str, Any]:
    hold = {"for": alert.hold} if alert.hold else {}
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **hold,
        "labels": _labels(alert, contract),
        "annotations": _annotations(alert, runbooks),
    }


def _labels(alert: Alert, contract: Contract) -> dict[str, str]:
    owner = {"owner": contract.owner} if contract.owner else {}
    return {"severity": alert.severity, **owner}


def _annotations(alert: Alert, runbooks: str) -> dict[str, str]:
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": f"{runbooks}/{alert.name}.md",
    }


def _test(alert: Alert, contract: Contract, runbooks: str, *, fires: bool) -> dict[str, Any]:
    case = alert.fires if fires else alert.calm
    labels = {"model": contract.model, **_labels(alert, contract), **case.labels}
    annotations = _annotations(alert, runbooks)
    for name, value in labels.items():
        annotations = {
            k: text.replace(f"{{{{ $labels.{name} }}}}", value) for k, text in annotations.items()
        }
    expected = [{"exp_labels": labels, "exp_annotations": annotations}] if fires else []
    return {
        "name": f"{alert.name} {'fires' if fires else 'is calm'}",
        "interval": case.step,
        "input_series": [{"series": k, "values": v} for k, v in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": alert.name, "exp_alerts": expected}
        ],
    }
