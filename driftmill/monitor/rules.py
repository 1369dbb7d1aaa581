"""Prometheus' rules of a model, from its contract, and their unit tests for promtool.

`rules` is what Prometheus loads (or a PrometheusRule holds), `unit_tests` what
`promtool test rules` runs on it: for each alert one case in which it fires and one, close by, in
which it does not. Both come from the same list, so that no alert is without its test.

Whether a window has drifted, and for how many windows, the monitor has decided by the contract
before Prometheus sees it; what happens to the pods is taken out of the labels (`max by`), because
Alertmanager makes an alert's identity of them, and an incident is not over when a pod is replaced.

Where one Prometheus sees several namespaces or clusters, `where` says whose series are meant: it is
in every selector, and a label of all that comes out.

The alerts on broken promises burn the error budget in several windows at once: Beyer et al., "The
Site Reliability Workbook" (2018), chapter 5, https://sre.google/workbook/alerting-on-slos/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from driftmill.contract import Contract

#: Where the page `<alert>.md` of each alert lies.
RUNBOOKS = "https://github.com/driftmill/driftmill/blob/main/docs/runbooks"

#: Stands for the namespace of a release until the chart puts the real one in its place.
NAMESPACE = "driftmill-release-namespace"

#: Nothing but the model's name tells its series from others.
EVERYWHERE: Mapping[str, str] = {}

#: Every monitor that has read the log shows it.
_WATCHED = "model_drift_last_success_timestamp_seconds"

#: Windows over which requests are counted.
_WINDOWS = ("5m", "30m", "1h", "6h", "3d")

Severity = Literal["critical", "warning", "info"]
#: Whose series an alert is about; each has a group of alerts.
Part = Literal["service", "monitor", "controller"]
PARTS: tuple[Part, ...] = ("service", "monitor", "controller")


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
    part: Part
    expr: str
    severity: Severity
    summary: str
    """May name labels of the series: `{{ $labels.version }}`."""
    description: str
    fires: Case
    calm: Case
    hold: str = ""
    """How long it must be true before it fires."""
    goes_on: Case | None = None
    """A pod is replaced, and it fires all the while."""


def rules(
    contract: Contract, *, runbooks: str = RUNBOOKS, where: Mapping[str, str] = EVERYWHERE
) -> dict[str, Any]:
    """The rule file: a group of recording rules, and one of alerts for each part.

    Args:
        contract: thresholds, promises and the model's name.
        runbooks: URL below which `<alert>.md` lies.
        where: labels that its series bear besides the model's, such as the namespace.
    """
    found = alerts(contract, where)
    groups = [{"name": f"driftmill-{contract.model}-slo", "rules": _recorded(contract, where)}]
    groups += [
        {
            "name": f"driftmill-{contract.model}-{part}",
            "rules": [_rule(a, contract, runbooks, where) for a in found if a.part == part],
        }
        for part in PARTS
    ]
    return {"groups": groups}


def unit_tests(
    contract: Contract,
    file: str,
    *,
    runbooks: str = RUNBOOKS,
    where: Mapping[str, str] = EVERYWHERE,
) -> dict[str, Any]:
    """The unit tests of `rules`. In each there is a neighbour, who does the opposite: another
    model, or with `where` the same one elsewhere.

    Args:
        contract: the same contract.
        file: path of the rule file, relative to the tests' file.
        runbooks: as given to `rules`.
        where: as given to `rules`.
    """
    mine = _matchers(contract.model, where)
    elsewhere = {name: f"not-{value}" for name, value in where.items()}
    other = _matchers(contract.model if where else f"not-{contract.model}", elsewhere)

    def test(alert: Alert, what: str, case: Case, neighbour: Case, *, fires: bool) -> Any:
        series = case.series | {
            name.replace(mine, other): values for name, values in neighbour.series.items()
        }
        expected = [_expected(alert, contract, runbooks, where, case)] if fires else []
        return {
            "name": f"{alert.name} {what}",
            "interval": case.step,
            "input_series": [{"series": k, "values": v} for k, v in series.items()],
            "alert_rule_test": [
                {"eval_time": case.at, "alertname": alert.name, "exp_alerts": expected}
            ],
        }

    tests = []
    for alert in alerts(contract, where):
        tests.append(test(alert, "fires", alert.fires, alert.calm, fires=True))
        tests.append(test(alert, "is calm", alert.calm, alert.fires, fires=False))
        if alert.goes_on is not None:
            tests.append(test(alert, "goes on", alert.goes_on, alert.calm, fires=True))
    return {"rule_files": [file], "evaluation_interval": "1m", "tests": tests}


def alerts(contract: Contract, where: Mapping[str, str] = EVERYWHERE) -> list[Alert]:
    """All alerts of a model.

    Args:
        contract: as for `rules`.
        where: as for `rules`.
    """
    mine = _matchers(contract.model, where)
    return [
        *_drift(contract, mine),
        *_quality(contract, mine),
        *_monitor(contract, mine),
        *_promises(contract, mine),
        *_service(contract, mine),
        *_labels_come(contract, mine),
        *_retraining(contract, mine),
    ]


def _matchers(model: str, where: Mapping[str, str]) -> str:
    """What picks the model's series, in a selector and in the name of a test's series alike."""
    return ",".join(f'{name}="{value}"' for name, value in {"model": model, **where}.items())


def _kept(metric: str, matchers: str, mine: str, reduce: str = "max") -> str:
    """What the monitor says of each version, and for five minutes what a monitor that is gone said
    last: an incident is not over, and none begins, because its pod is replaced."""
    selector, by = f"{metric}{{{matchers}}}", f"{reduce} by (model, version)"
    gone = f"{by} (last_over_time({selector}[5m])) unless on () {_WATCHED}{{{mine}}}"
    return f"({by} ({selector}) or ({gone}))"


def _pods(metric: str, matchers: str) -> list[str]:
    """The series of two pods, one after the other."""
    return [f'{metric}{{{matchers},pod="{pod}"}}' for pod in "ab"]


def _drift(contract: Contract, mine: str) -> Iterator[Alert]:
    model, windows = contract.model, contract.monitor.persistence
    series, after = _pods("model_drift_alarm", f'{mine},version="v1"')
    _, watched = _pods(_WATCHED, mine)
    yield Alert(
        name="ModelDrift",
        part="monitor",
        expr=f"{_kept('model_drift_alarm', mine, mine)} == 1",
        severity="warning",
        summary=f"{model}: what it is asked differs from what it has learnt",
        description=f"{windows} windows of {contract.monitor.window} rows in a row, answered by "
        "{{ $labels.version }}, differ from the reference. The controller decides about a "
        "retraining; the monitor's report says which columns.",
        fires=Case({series: "0x4 1x6"}, labels={"version": "v1"}),
        # Drifted windows below the contract's persistence raise no alarm.
        # A monitor that is back says what is true, whatever the one before it said last.
        calm=Case(
            {
                series: "1x6 stale",
                after: "_x8 0x10",
                watched: "_x8 1x10",
                series.replace("alarm", "detected"): "1x10",
            }
        ),
        goes_on=Case({series: "1x6 stale", after: "_x12 1x10"}, labels={"version": "v1"}),
    )


def _quality(contract: Contract, mine: str) -> Iterator[Alert]:
    model, metric = contract.model, contract.metric
    series, after = _pods("model_quality_alarm", f'{mine},version="v1"')
    _, watched = _pods(_WATCHED, mine)
    yield Alert(
        name="ModelQuality",
        part="monitor",
        expr=f"{_kept('model_quality_alarm', mine, mine)} == 1",
        severity="critical",
        summary=f"{model}: surely worse than on its test rows",
        description=f"The {metric.name} of {{{{ $labels.version }}}} on labelled rows is worse "
        "than the contract's monitor.max_quality_loss allows.",
        fires=Case({series: "0x4 1x6"}, labels={"version": "v1"}),
        calm=Case({series: "1x6 stale", after: "_x8 0x10", watched: "_x8 1x10"}),
        goes_on=Case({series: "1x6 stale", after: "_x12 1x10"}, labels={"version": "v1"}),
    )
    floor = contract.gates.floor
    if floor is None:
        return
    worse, reduce = ("<", "max") if metric.direction == "maximize" else (">", "min")
    step = 0.1 * abs(floor) or 0.1
    below, above = (floor - step, floor + step) if worse == "<" else (floor + step, floor - step)
    one = f'{mine},metric="{metric.name}"'
    series, after = _pods("model_quality", f'{one},version="v1"')
    yield Alert(
        name="ModelQualityBelowFloor",
        part="monitor",
        expr=f"{_kept('model_quality', one, mine, reduce)} {worse} {floor:g}",
        severity="critical",
        summary=f"{model}: {metric.name} is beyond the floor of {floor:g}",
        description="On the newest labelled rows {{ $labels.version }} would not be let through "
        "the gate (gates.floor). Roll back or take the model out of use.",
        hold="10m",
        fires=Case({series: f"{below:g}x20"}, at="15m", labels={"version": "v1"}),
        # Of a version that a monitor no longer speaks of, nothing is known.
        calm=Case(
            {
                series: f"{below:g}x12 stale",
                series.replace('"v1"', '"v2"'): f"{above:g}x20",
                watched: "1x20",
            },
            at="15m",
        ),
        goes_on=Case(
            {series: f"{below:g}x12 stale", after: f"_x16 {below:g}x10"},
            at="15m",
            labels={"version": "v1"},
        ),
    )


def _monitor(contract: Contract, mine: str) -> Iterator[Alert]:
    model = contract.model
    name = f"{_WATCHED}{{{mine}}}"
    stale = int(max(300, 20 * contract.monitor.poll))
    minutes = stale // 60 + 10
    yield Alert(
        name="ModelMonitorStale",
        part="monitor",
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
        part="monitor",
        expr=f"absent({name})",
        severity="warning",
        summary=f"{model}: there is no monitor",
        description="No process reports on drift: it is down, has not once read the inference log, "
        "or Prometheus does not reach it.",
        hold="5m",
        fires=Case({}),
        calm=Case({name: "0+60x10"}),
    )


def _promises(contract: Contract, mine: str) -> Iterator[Alert]:
    model, slo = contract.model, contract.serve.slo
    good, bad = (f'model_requests_total{{{mine},code="{c}"}}' for c in ("200", "503"))
    yield from _burn(
        "ModelErrorBudgetBurn",
        lambda window: f"model:request_errors:ratio_rate{window}{{{mine}}}",
        1 - slo.availability,
        summary=f"{model}: requests fail",
        description=f"The promise is that {slo.availability:.6g} of them do not "
        "(serve.slo.availability).",
        traffic=lambda share: {good: _rise(1 - share), bad: _rise(share)},
    )
    fast = f'model_request_duration_seconds_bucket{{{mine},le="{_edge(contract)}"}}'
    every = f"model_request_duration_seconds_count{{{mine}}}"
    yield from _burn(
        "ModelLatencyBudgetBurn",
        lambda window: f"model:request_slow:ratio_rate{window}{{{mine}}}",
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
        part="service",
        # 2 % of a month's budget in an hour, or 5 % of it in six.
        expr=f"{burns(14.4, '1h', '5m')} or {burns(6, '6h', '30m')}",
        severity="critical",
        summary=summary,
        description=f"{description} At this rate a month's budget is used up in five days at most.",
        fires=Case(traffic(16 * budget), at="70m"),
        calm=Case(traffic(4 * budget), at="70m"),
    )
    yield Alert(
        name=f"{name}Slow",
        part="service",
        # 10 % of a month's budget in three days.
        expr=burns(1, "3d", "6h"),
        severity="warning",
        summary=f"{summary}, a little too often",
        description=f"{description} The budget will not last the month.",
        fires=Case(traffic(2 * budget), at="70m"),
        calm=Case(traffic(0.5 * budget), at="70m"),
    )


def _service(contract: Contract, mine: str) -> Iterator[Alert]:
    model = contract.model
    revision = f"model_rollout_revision{{{mine}}}"
    training = f"retrain_run_active{{{mine}}}"
    pods = _pods("model_rollout_revision", mine)
    yield Alert(
        name="ModelServiceAbsent",
        part="service",
        # Revision 0 is a process without a model. That is well while the first one is trained.
        expr=f"absent({revision}) or (max by (model) ({revision}) == 0"
        f" unless on () {training} == 1)",
        severity="critical",
        summary=f"{model}: no service answers",
        description="No process serves the model: it is down, has no version that it can load, or "
        "Prometheus does not reach it.",
        hold="2m",
        fires=Case({}),
        calm=Case({pods[0]: "0x10", pods[1]: "0x6 1x4", training: "1x6 0x4"}, at="8m"),
        goes_on=Case({pods[0]: "0x10", pods[1]: "3x2 stale"}),
    )
    failing, after = _pods("model_inference_log_failing", mine)
    loss = (
        "Requests are answered with 503 until it can be."
        if contract.serve.log.on_error == "refuse"
        else "What is answered meanwhile is not kept: drift and labels miss it."
    )
    yield Alert(
        name="ModelLogFailing",
        part="service",
        expr=f"max by (model) (model_inference_log_failing{{{mine}}}) == 1",
        severity="critical",
        summary=f"{model}: predictions cannot be written down",
        description=f"The last write to the inference log failed, mostly for a full disk. {loss}",
        hold="1m",
        fires=Case({failing: "0x3 1x7", after: "0x10"}, at="6m"),
        calm=Case({failing: "0x5 1 0x8"}, at="6m"),
    )
    failures = f"model_load_failures_total{{{mine}}}"
    failed, after = _pods("model_load_failures_total", f'{mine},version="v2"')
    yield Alert(
        name="ModelVersionNotLoaded",
        part="service",
        # A counter that was not there has risen from 0, which `increase` does not see.
        expr=f"sum by (model, version) (increase({failures}[15m]) > 0"
        f" or ({failures} unless {failures} offset 15m)) > 0",
        severity="critical",
        summary=f"{model}: {{{{ $labels.version }}}} is to serve and does not load",
        description="The version before goes on serving. The service's log says why; mend it or "
        "roll back.",
        fires=Case({failed: "_x10 1x20"}, at="20m", labels={"version": "v2"}),
        calm=Case({failed: "1x30"}, at="20m"),
        goes_on=Case({failed: "1x12 stale", after: "_x16 1x6"}, at="20m", labels={"version": "v2"}),
    )


def _labels_come(contract: Contract, mine: str) -> Iterator[Alert]:
    model, within = contract.model, contract.monitor.labels_within
    if within is None:
        return
    # Rounded to what a rule can say; under a minute it would alert between two scrapes.
    window = max(round(within / 60), 1)

    def grown(counter: str) -> str:
        return f"sum by (model) (increase({counter}{{{mine}}}[{window}m])) > 0"

    asked = f'model_predictions_total{{{mine},pod="a"}}'
    labels = f'model_feedback_total{{{mine},pod="a"}}'
    step = max(window // 60, 1)
    hold = max(window // 10, 1)
    # Just long enough for a full window, the hold, and a value either way.
    until = window + hold + 2 * step
    values = until // step + 2
    at, every = f"{until}m", f"{step}m"
    yield Alert(
        name="ModelNoLabels",
        part="service",
        expr=f"{grown('model_predictions_total')} unless {grown('model_feedback_total')}",
        severity="warning",
        summary=f"{model}: no labels come",
        description=f"Predictions were made for {window} minutes and no label was given for any. "
        "Quality cannot be measured, and nothing can be learnt (monitor.labels_within).",
        hold=f"{hold}m",
        fires=Case({asked: f"0+9x{values}", labels: f"5x{values}"}, at=at, step=every),
        calm=Case({asked: f"0+9x{values}", labels: f"0+1x{values}"}, at=at, step=every),
    )


def _retraining(contract: Contract, mine: str) -> Iterator[Alert]:
    model = contract.model
    active = f"retrain_run_active{{{mine}}}"
    yield Alert(
        name="RetrainingAbsent",
        part="controller",
        expr=f"absent({active})",
        severity="warning",
        summary=f"{model}: there is no controller",
        description="Alarms lead to no retraining. It is down, or Prometheus does not reach it.",
        hold="5m",
        fires=Case({}),
        calm=Case({active: "0x10"}),
    )
    breaker = f'retrain_breaker_open{{{mine},pod="a"}}'
    failed = f'retrain_runs_total{{{mine},state="failed",pod="a"}}'
    yield Alert(
        name="RetrainingFailing",
        part="controller",
        expr=f"max by (model) (retrain_breaker_open{{{mine}}}) == 1 or sum by (model)"
        f' (increase(retrain_runs_total{{{mine},state="failed"}}[1d])) >= 2',
        severity="warning",
        summary=f"{model}: training fails again and again",
        description=f"Two runs failed within a day, or {contract.retrain.breaker} in a row "
        "promoted nothing, so that none starts until a person resets it (retrain.breaker).",
        fires=Case({breaker: "0x4 1x6", failed: "0x10"}),
        calm=Case({breaker: "0x10", failed: "0x4 1x6"}),
    )
    budget = f'retrain_budget_remaining{{{mine},pod="a"}}'
    yield Alert(
        name="RetrainingBudgetUsedUp",
        part="controller",
        expr=f"max by (model) (retrain_budget_remaining{{{mine}}}) == 0",
        severity="info",
        summary=f"{model}: the budget for retraining is used up",
        description=f"{contract.retrain.budget.runs} runs in "
        f"{contract.retrain.budget.period:g} s have been made (retrain.budget). Alarms start none "
        "until the period is over.",
        hold="15m",
        fires=Case({budget: "0x30"}, at="20m"),
        calm=Case({budget: "1x10 0x10"}, at="20m"),
    )


def _recorded(contract: Contract, where: Mapping[str, str]) -> list[dict[str, Any]]:
    """Shares of bad requests, of all pods together."""
    mine = _matchers(contract.model, where)
    fast = f'{mine},le="{_edge(contract)}"'

    def per_second(counter: str, matchers: str, window: str) -> str:
        return f"sum by (model) (rate({counter}{{{matchers}}}[{window}]))"

    found = []
    for window in _WINDOWS:
        failed = per_second("model_requests_total", f'{mine},code=~"5.."', window)
        asked = per_second("model_requests_total", mine, window)
        in_time = per_second("model_request_duration_seconds_bucket", fast, window)
        answered = per_second("model_request_duration_seconds_count", mine, window)
        found += [
            {"record": f"model:request_errors:ratio_rate{window}", "expr": f"{failed} / {asked}"},
            {
                "record": f"model:request_slow:ratio_rate{window}",
                "expr": f"1 - {in_time} / {answered}",
            },
        ]
    return [rule | ({"labels": dict(where)} if where else {}) for rule in found]


def _edge(contract: Contract) -> str:
    """The promised latency as the label of its bucket."""
    return repr(contract.serve.slo.latency_ms / 1000)


def _rise(share: float) -> str:
    """A counter that rises by a share of 100,000 a minute, for longer than any test looks."""
    return f"0+{round(100_000 * share)}x100"


def _rule(
    alert: Alert, contract: Contract, runbooks: str, where: Mapping[str, str]
) -> dict[str, Any]:
    hold = {"for": alert.hold} if alert.hold else {}
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **hold,
        "labels": _labels(alert, contract, where),
        "annotations": _annotations(alert, runbooks),
    }


def _labels(alert: Alert, contract: Contract, where: Mapping[str, str]) -> dict[str, str]:
    owner = {"owner": contract.owner} if contract.owner else {}
    return {"severity": alert.severity, **owner, **where}


def _annotations(alert: Alert, runbooks: str) -> dict[str, str]:
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": f"{runbooks}/{alert.name}.md",
    }


def _expected(
    alert: Alert, contract: Contract, runbooks: str, where: Mapping[str, str], case: Case
) -> dict[str, Any]:
    """The alert that a case makes."""
    labels = {"model": contract.model, **_labels(alert, contract, where), **case.labels}
    annotations = _annotations(alert, runbooks)
    for name, value in labels.items():
        annotations = {
            k: text.replace(f"{{{{ $labels.{name} }}}}", value) for k, text in annotations.items()
        }
    return {"exp_labels": labels, "exp_annotations": annotations}
