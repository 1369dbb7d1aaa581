"""What the controller counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Training takes seconds on a laptop and hours on a GPU node.
_BUCKETS = (5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)


class Metrics:
    """The controller's metrics in a registry of their own, each with the label `model`."""

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ("model",)
        self.decisions = Counter(
            "retrain_decisions",
            "Answers to alerts, scheduled times and requests; repeats count.",
            (*labels, "action", "code"),
            registry=registry,
        )
        self.runs = Counter(
            "retrain_runs",
            "Runs that ended, by how they ended.",
            (*labels, "state"),
            registry=registry,
        )
        self.run_duration = Histogram(
            "retrain_run_duration_seconds",
            "Time from the start of a run to its end.",
            labels,
            buckets=_BUCKETS,
            registry=registry,
        )
        self.run_active = Gauge(
            "retrain_run_active", "1 while a run is waiting or running.", labels, registry=registry
        )
        self.breaker_open = Gauge(
            "retrain_breaker_open",
            "1 while runs without a promotion keep new ones from starting.",
            labels,
            registry=registry,
        )
        self.budget_remaining = Gauge(
            "retrain_budget_remaining",
            "Runs that the budget still allows in its period.",
            labels,
            registry=registry,
        )
        self.fresh_rows = Gauge(
            "retrain_fresh_rows",
            "Labelled rows that no serving model has learnt from.",
            labels,
            registry=registry,
        )
        self.last_success = Gauge(
            "retrain_last_success_timestamp_seconds",
            "When the last promoted run ended.",
            labels,
            registry=registry,
        )
        self.contract_reload_failures = Counter(
            "contract_reload_failures",
            "Changes of the contract file that were not valid and not used.",
            labels,
            registry=registry,
        )
        self.tick_failures = Counter(
            "retrain_tick_failures",
            "Ticks that store or ledger kept from being finished.",
            labels,
            registry=registry,
        )
        # Shown from the start, at 0: Prometheus counts no increase of a series that was not there.
        for metric in (self.contract_reload_failures, self.tick_failures, self.run_duration):
            metric.labels(model)
        for state in ("promoted", "rejected", "stopped", "failed"):
            self.runs.labels(model, state)
