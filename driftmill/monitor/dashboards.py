"""Grafana dashboards: one of all models, and one page for a model.

Plain JSON of Grafana's dashboard schema, made from one list of rows of panels, so that what is
shown, how it is laid out and what a test asks Prometheus come from the same place
(https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/).

A red mark on the time axis is an alarm, a blue one a change of what serves, a purple one a training
run.

Series of a cluster have the label `namespace`, and every query says which are meant. Series of a
laptop have none, which `.*` matches. Lines are of what outlives a pod.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from driftmill.monitor import rules

#: Version of the schema, of Grafana 11; newer ones read it.
SCHEMA = 39
#: Width of a dashboard in Grafana's units.
_WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Variables that Grafana fills in by itself.
_INTERVALS = ("__rate_interval", "__interval", "__range")

Kind = Literal["timeseries", "stat", "table", "status-history", "heatmap"]


@dataclass(frozen=True)
class Query:
    """One PromQL query and what its lines are called."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True)
class Panel:
    """One panel; a row's panels share its width."""

    title: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    description: str = ""
    limits: tuple[tuple[str, float], ...] = ()
    """Colours from a value on; below the first it is green."""
    highest: float | None = None
    """End of the scale."""
    stacked: bool = False
    names: tuple[tuple[str, str], ...] = ()
    """What values are called, e.g. `1` is `drifted`."""
    links: tuple[tuple[str, str, str], ...] = ()
    """Of a table: column, title and URL of what a click on it opens."""


@dataclass(frozen=True)
class Row:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 7


@dataclass(frozen=True)
class Annotation:
    """What is marked on every time axis."""

    name: str
    expr: str
    colour: str
    text: str


_ALARM = (("red", 1.0),)
_YES_NO = (("0", "no"), ("1", "yes"))
_HERE = 'namespace=~"$namespace"'
_M = f'{{model="$model",{_HERE}}}'
_ALL = f"{{{_HERE}}}"
_FIRING = 'alertstate="firing",alertname=~"Model.+|Retraining.+"'
_ANSWERS = (
    f'rate(model_predictions_total{{model="$model",{_HERE},role!="shadow"}}[$__rate_interval])'
)
#: Picks the model's services among all processes.
_SERVES = (
    "* on (namespace, job, instance) group_left (model)"
    f" group by (namespace, job, instance, model) (model_rollout_revision{_M})"
)
#: A link keeps what is chosen, and the span of time.
_KEEP = "${datasource:queryparam}&${__url_time_range}"
_PAGE = "/d/driftmill-model?var-model="

#: The page of one model.
MODEL = (
    Row(
        "Now",
        (
            Panel(
                "Requests",
                (Query(f"sum(rate(model_requests_total{_M}[$__rate_interval]))", "all"),),
                "stat",
                "reqps",
            ),
            Panel(
                "Failed",
                (
                    Query(
                        "(sum(rate(model_requests_total"
                        f'{{model="$model",{_HERE},code=~"5.."}}[$__rate_interval])) or vector(0))'
                        f" / sum(rate(model_requests_total{_M}[$__rate_interval]))",
                        "share",
                    ),
                ),
                "stat",
                "percentunit",
                limits=(("orange", 0.001), ("red", 0.01)),
            ),
            Panel(
                "99th percentile",
                (
                    Query(
                        "histogram_quantile(0.99, sum by (le) (rate("
                        f"model_request_duration_seconds_bucket{_M}[$__rate_interval])))",
                        "p99",
                    ),
                ),
                "stat",
                "s",
            ),
            Panel(
                "Drift alarm",
                (Query(f"max(model_drift_alarm{_M})", "alarm"),),
                "stat",
                limits=_ALARM,
                names=(("0", "calm"), ("1", "drift")),
            ),
            Panel(
                "Training",
                (Query(f"max(retrain_run_active{_M})", "active"),),
                "stat",
                limits=(("blue", 1.0),),
                names=(("0", "none"), ("1", "running")),
            ),
            Panel(
                "Serves",
                (
                    Query(
                        f"sum by (version, role) (model_version_info{_M})", "{{version}} {{role}}"
                    ),
                ),
                "stat",
                description="Version and role; the value is the number of pods.",
            ),
        ),
        height=4,
    ),
    Row(
        "Traffic",
        (
            Panel(
                "Requests by status",
                (
                    Query(
                        f"sum by (code) (rate(model_requests_total{_M}[$__rate_interval]))",
                        "{{code}}",
                    ),
                ),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                "Latency",
                tuple(
                    Query(
                        f"histogram_quantile({q}, sum by (le) (rate("
                        f"model_request_duration_seconds_bucket{_M}[$__rate_interval])))",
                        f"p{100 * q:g}",
                    )
                    for q in (0.5, 0.95, 0.99)
                ),
                unit="s",
                description="From the first byte of a request until its answer is ready.",
            ),
            Panel(
                "Promises",
                (
                    Query(
                        f"max(model:request_errors:ratio_rate1h{_M})"
                        f" or 0 * max(model:request_slow:ratio_rate1h{_M})",
                        "failed",
                    ),
                    Query(f"max(model:request_slow:ratio_rate1h{_M})", "late"),
                ),
                unit="percentunit",
                description="Part of the requests of the last hour that failed, or took longer "
                "than serve.slo.latency_ms.",
            ),
            Panel(
                "Who answers",
                (
                    Query(
                        f"sum by (version, role) ({_ANSWERS})"
                        f" / ignoring (version, role) group_left () sum({_ANSWERS})",
                        "{{version}} {{role}}",
                    ),
                ),
                unit="percentunit",
                highest=1.0,
                stacked=True,
                description="Part of the answers by version: the weight of a canary in fact.",
            ),
        ),
    ),
    Row(
        "Drift",
        (
            Panel(
                "Drift by column",
                (
                    Query(
                        f"max by (feature) (model_feature_drift_score{_M})",
                        "{{feature}}",
                    ),
                ),
                "status-history",
                "percentunit",
                description="Distance from the reference in the newest window: 0 none, 1 all.",
                limits=(("yellow", 0.1), ("orange", 0.25), ("red", 0.5)),
                highest=1.0,
            ),
            Panel(
                "Drift score",
                (
                    Query(f"max(model_drift_score{_M})", "score"),
                    Query(f"max(evidently_drifted_columns_share{_M})", "Evidently's share"),
                ),
                unit="percentunit",
                highest=1.0,
            ),
            Panel(
                "Data quality",
                (
                    Query(
                        f"topk(5, max by (feature) (model_feature_missing_ratio{_M}))",
                        "{{feature}} missing",
                    ),
                    Query(
                        f"topk(5, max by (feature) (model_feature_unseen_ratio{_M}))",
                        "{{feature}} unseen",
                    ),
                    Query(
                        f"topk(5, max by (feature) (model_feature_out_of_range_ratio{_M}))",
                        "{{feature}} out of range",
                    ),
                ),
                unit="percentunit",
                description="Part of the rows of the newest window; the five worst columns each.",
            ),
        ),
        height=9,
    ),
    Row(
        "Answers and quality",
        (
            Panel(
                "Scores",
                (
                    Query(
                        "sum by (le) (increase("
                        f"model_prediction_score_bucket{_M}[$__rate_interval]))",
                        "{{le}}",
                    ),
                ),
                "heatmap",
                description="How often which score was answered (classification).",
            ),
            Panel(
                "Quality on labelled rows",
                (
                    Query(
                        f"max by (metric, version) (model_quality{_M})", "{{metric}} {{version}}"
                    ),
                    Query(
                        f"max by (metric, version) (model_quality_reference{_M})",
                        "{{metric}} expected of {{version}}",
                    ),
                ),
                description="Realised on the newest labelled rows, beside what is to be expected:"
                " what the version reached on its test rows.",
            ),
            Panel(
                "Labels",
                (
                    Query(f"sum(rate(model_feedback_total{_M}[$__rate_interval]))", "accepted"),
                    Query(f"sum(rate(model_labelled_rows_total{_M}[$__rate_interval]))", "joined"),
                ),
                unit="cps",
            ),
        ),
    ),
    Row(
        "Retraining",
        (
            Panel(
                "Decisions: why, and why not",
                (
                    Query(
                        f"sum by (action, code) (retrain_decisions_total{_M})",
                        "{{action}}: {{code}}",
                    ),
                ),
                stacked=True,
                description="Answers to alarms, to the schedule and to people, since the controller"
                " was started.",
            ),
            Panel(
                "What may start a run",
                (
                    Query(f"max(retrain_fresh_rows{_M})", "fresh rows"),
                    Query(f"max(retrain_budget_remaining{_M})", "runs left in the budget"),
                ),
            ),
        ),
    ),
    Row(
        "Cost",
        (
            Panel(
                "Training time",
                (Query(f"sum(increase(retrain_run_duration_seconds_sum{_M}[1d]))", "a day"),),
                unit="s",
                description="Time that training runs took within a day, by the clock.",
            ),
            Panel(
                "CPU that serves",
                (
                    Query(
                        f"sum(rate(process_cpu_seconds_total[$__rate_interval]) {_SERVES})",
                        "CPUs",
                    ),
                ),
                description="CPU seconds a second of all processes that serve.",
            ),
            Panel(
                "Memory that serves",
                (Query(f"process_resident_memory_bytes {_SERVES}", "{{instance}}"),),
                unit="bytes",
            ),
            Panel(
                "Runs by how they ended",
                (
                    Query(
                        f"sum by (state) (increase(retrain_runs_total{_M}[$__range]))",
                        "{{state}}",
                    ),
                ),
                "stat",
            ),
            Panel(
                "Breaker",
                (Query(f"max(retrain_breaker_open{_M})", "open"),),
                "stat",
                limits=_ALARM,
                names=_YES_NO,
                description="Open: runs promoted nothing, and none starts until it is reset.",
            ),
        ),
    ),
    Row(
        "Health",
        (
            Panel(
                "Inference log",
                (
                    Query(
                        f"sum(rate(model_inference_log_rows_total{_M}[$__rate_interval]))",
                        "rows a second",
                    ),
                    Query(f"max(model_inference_log_backlog_files{_M})", "files that wait"),
                    Query(f"max(model_inference_log_failing{_M})", "failing"),
                ),
            ),
            Panel(
                "The monitor's lag",
                (
                    Query(f"max(model_monitor_lag_rows{_M})", "rows"),
                    Query(
                        f"time() - max(model_drift_last_success_timestamp_seconds{_M})",
                        "seconds since it last read",
                    ),
                ),
            ),
            Panel(
                "Alerts",
                (
                    Query(
                        "count by (alertname, severity)"
                        f' (ALERTS{{model="$model",{_HERE},{_FIRING}}})',
                        "alerts",
                    ),
                ),
                "table",
                description="What fires now. Click an alert for its runbook.",
                links=(("alertname", "What to do", f"{rules.RUNBOOKS}/${{__value.raw}}.md"),),
            ),
        ),
    ),
)

#: All models.
OVERVIEW = (
    Row(
        "Models",
        (
            Panel(
                "Models",
                (
                    Query(
                        f"sum by (namespace, model) (rate(model_requests_total{_ALL}[5m]))",
                        "requests/s",
                    ),
                    Query(
                        "(sum by (namespace, model)"
                        f' (rate(model_requests_total{{{_HERE},code=~"5.."}}[5m]))'
                        f" or 0 * sum by (namespace, model) (rate(model_requests_total{_ALL}[5m])))"
                        f" / sum by (namespace, model) (rate(model_requests_total{_ALL}[5m]))",
                        "failed",
                    ),
                    Query(
                        "histogram_quantile(0.99, sum by (namespace, model, le)"
                        f" (rate(model_request_duration_seconds_bucket{_ALL}[5m])))",
                        "p99 (s)",
                    ),
                    Query(f"max by (namespace, model) (model_drift_alarm{_ALL})", "drift alarm"),
                    Query(f"max by (namespace, model) (model_drift_score{_ALL})", "drift score"),
                    Query(f"max by (namespace, model) (model_quality{_ALL})", "quality"),
                    Query(f"max by (namespace, model) (retrain_run_active{_ALL})", "training"),
                    Query(
                        f"max by (namespace, model) (retrain_budget_remaining{_ALL})", "budget left"
                    ),
                    Query(f"max by (namespace, model) (model_rollout_revision{_ALL})", "revision"),
                    Query(f"count by (namespace, model) (ALERTS{{{_HERE},{_FIRING}}})", "alerts"),
                ),
                "table",
                description="Click a model for its page, a namespace for the page of the model "
                "there.",
                links=(
                    (
                        "model",
                        "Its page",
                        f"{_PAGE}${{__value.raw}}&${{namespace:queryparam}}&{_KEEP}",
                    ),
                    (
                        "namespace",
                        "Its page, of this namespace",
                        f"{_PAGE}${{__data.fields.model}}&var-namespace=${{__value.raw}}&{_KEEP}",
                    ),
                ),
            ),
        ),
        height=9,
    ),
    Row(
        "Together",
        (
            Panel(
                "Requests",
                (
                    Query(
                        f"sum by (namespace, model) (rate(model_requests_total{_ALL}"
                        "[$__rate_interval]))",
                        "{{namespace}} {{model}}",
                    ),
                ),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                "Drift alarms",
                (
                    Query(
                        f"max by (namespace, model) (model_drift_alarm{_ALL})",
                        "{{namespace}} {{model}}",
                    ),
                ),
                "status-history",
                limits=_ALARM,
                names=(("0", "calm"), ("1", "drift")),
            ),
            Panel(
                "Training runs",
                (
                    Query(
                        "sum by (namespace, model, state)"
                        f" (increase(retrain_runs_total{_ALL}[$__range]))",
                        "{{namespace}} {{model}} {{state}}",
                    ),
                ),
                "stat",
            ),
        ),
    ),
)

_MARKS = (
    Annotation("Alarm", f"max(model_drift_alarm{_M}) == 1", "red", "drift alarm"),
    Annotation(
        "Rollout",
        f"max(changes(model_rollout_revision{_M}[$__interval])) > 0",
        "blue",
        "another version serves",
    ),
    Annotation("Training", f"max(retrain_run_active{_M}) == 1", "purple", "a training run"),
)


def files() -> dict[str, str]:
    """The text of both dashboards by the name of their file, for any model."""
    return {
        "dashboard.json": text(model()),
        "dashboard-models.json": text(overview()),
    }


def text(dashboard: dict[str, Any]) -> str:
    """A dashboard as the text of a file."""
    return json.dumps(dashboard, indent=1) + "\n"


def overview() -> dict[str, Any]:
    """The dashboard of all models."""
    return _dashboard("Driftmill: models", "driftmill-models", OVERVIEW, [_namespace()], ())


def model(name: str | None = None) -> dict[str, Any]:
    """The page of one model.

    Args:
        name: the model that is shown first; None: the first that there is.
    """
    variable = _variable("model", "Model", f"label_values(model_rollout_revision{_ALL}, model)")
    if name is not None:
        variable["current"] = {"text": name, "value": name}
    return _dashboard(
        "Driftmill: a model", "driftmill-model", MODEL, [_namespace(), variable], _MARKS
    )


def queries(
    dashboard: dict[str, Any], model: str, window: str = "1m", namespace: str = ".*"
) -> list[str]:
    """Every query of a dashboard's panels and marks, as Grafana would ask it.

    Args:
        dashboard: from `overview` or `model`.
        model: the chosen model.
        window: stands for Grafana's intervals.
        namespace: the chosen namespaces, as a regular expression.
    """
    found = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", ())]
    found += [a["expr"] for a in dashboard["annotations"]["list"]]
    chosen = {"model": model, "namespace": namespace, **dict.fromkeys(_INTERVALS, window)}
    for name, value in chosen.items():
        found = [q.replace(f"${name}", value) for q in found]
    return found


def _namespace() -> dict[str, Any]:
    variable = _variable(
        "namespace", "Namespace", "label_values(model_rollout_revision, namespace)"
    )
    everything = {"multi": True, "includeAll": True, "allValue": ".*"}
    return {**variable, **everything, "current": {"text": ["All"], "value": ["$__all"]}}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
    }


def _dashboard(
    title: str,
    uid: str,
    rows: tuple[Row, ...],
    variables: list[dict[str, Any]],
    marks: tuple[Annotation, ...],
) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": _WIDTH, "h": 1},
            }
        )
        width = _WIDTH // len(row.panels)
        for place, panel in enumerate(row.panels):
            where = {"x": place * width, "y": top + 1, "w": width, "h": row.height}
            panels.append({"id": len(panels) + 1, "gridPos": where, **_panel(panel)})
        top += 1 + row.height
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
    }
    links = [_link("Runbooks", f"{rules.RUNBOOKS}/README.md")]
    if uid != "driftmill-models":
        links.insert(0, _link("All models", "/d/driftmill-models?${namespace:queryparam}"))
    return {
        "uid": uid,
        "title": title,
        "tags": ["driftmill"],
        "schemaVersion": SCHEMA,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "links": links,
        "templating": {"list": [source, *variables]},
        "annotations": {"list": [_mark(mark) for mark in marks]},
        "panels": panels,
    }


def _link(title: str, url: str) -> dict[str, Any]:
    return {"title": title, "type": "link", "url": url, "keepTime": True, "includeVars": False}


def _mark(mark: Annotation) -> dict[str, Any]:
    return {
        "name": mark.name,
        "datasource": _SOURCE,
        "enable": True,
        "expr": mark.expr,
        "iconColor": mark.colour,
        "titleFormat": mark.text,
        "step": "15s",
    }


def _panel(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for colour, value in panel.limits]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind in _BY_VALUE else "palette-classic"},
    }
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        fill = 30 if panel.stacked else 5
        defaults["custom"] = {"fillOpacity": fill, "stacking": stacking, "spanNulls": True}
    if panel.highest is not None:
        defaults["max"] = panel.highest
    if panel.names:
        options = {value: {"text": text} for value, text in panel.names}
        defaults["mappings"] = [{"type": "value", "options": options}]
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(panel, query, i) for i, query in enumerate(panel.queries)],
    }
    if panel.kind == "table":
        made |= _table(panel)
    return made


#: Panels whose colour tells the value, not the line.
_BY_VALUE = ("stat", "status-history")
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "table": {"showHeader": True, "cellHeight": "md"},
    "status-history": {"showValue": "never", "rowHeight": 0.9, "legend": {"showLegend": False}},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Blues"},
        "yAxis": {"axisPlacement": "left"},
    },
}


def _target(panel: Panel, query: Query, place: int) -> dict[str, Any]:
    target: dict[str, Any] = {
        "refId": chr(ord("A") + place),
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "range": True,
    }
    if panel.kind == "heatmap":
        target["format"] = "heatmap"
    if panel.kind == "table":
        target |= {"format": "table", "instant": True, "range": False}
    return target


def _table(panel: Panel) -> dict[str, Any]:
    """One row for the labels that all queries have, one column a query."""
    names = {f"Value #{chr(ord('A') + i)}": q.legend for i, q in enumerate(panel.queries)}
    if len(names) == 1:
        names = {"Value": panel.queries[0].legend}
    overrides = [
        {
            "matcher": {"id": "byName", "options": column},
            "properties": [{"id": "links", "value": [{"title": title, "url": url}]}],
        }
        for column, title, url in panel.links
    ]
    defaults = {"unit": "short", "decimals": 3}
    return {
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "transformations": [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {"excludeByName": {"Time": True}, "renameByName": names},
            },
        ],
    }
