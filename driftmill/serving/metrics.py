"""Prometheus metrics of a service.

Label values are bounded: versions are forgotten when more than `KEPT` others came after them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from driftmill.contract import LATENCY_BUCKETS
from driftmill.rollout import Rollout
from driftmill.serving.log import Log, Role

#: Versions that keep their series.
KEPT = 5

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SCORES = tuple(i / 20 for i in range(1, 21))

# A second series for each counter and histogram, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one service; each has the label `model`.

    Args:
        model: the model's name.
        log: the inference log whose state is shown, too.
    """

    def __init__(self, model: str, log: Log) -> None:
        self.model = model
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_State(self, log))
        add = self.registry
        one, version = ["model"], ["model", "version"]
        self._requests = Counter(
            "model_requests", "Requests to /predict, by status.", [*version, "code"], registry=add
        )
        self._predictions = Counter(
            "model_predictions", "Predictions by role.", [*version, "role"], registry=add
        )
        self._scores = Histogram(
            "model_prediction_score",
            "Scores of a classification: the probability of the last label of two, or of the "
            "chosen one of more.",
            version,
            buckets=_SCORES,
            registry=add,
        )
        self._load_failures = Counter(
            "model_load_failures", "Versions that did not load.", version, registry=add
        )
        self._challenger_failures = Counter(
            "model_challenger_failures",
            "Batches in which the challenger failed and the champion answered.",
            version,
            registry=add,
        )
        self.seconds = Histogram(
            "model_request_duration_seconds",
            "Time from the first byte of a request to /predict until its answer is ready.",
            one,
            buckets=LATENCY_BUCKETS,
            registry=add,
        ).labels(model)
        self.batch_rows = Histogram(
            "model_batch_rows", "Rows in a batch.", one, buckets=_ROWS, registry=add
        ).labels(model)
        self.revision = Gauge(
            "model_rollout_revision", "Revision of the rollout that serves.", one, registry=add
        ).labels(model)
        self.poll_failures = Counter(
            "model_rollout_poll_failures", "Times the rollout was not read.", one, registry=add
        ).labels(model)
        self.feedback = Counter(
            "model_feedback", "Labels accepted by /feedback.", one, registry=add
        ).labels(model)
        self.rejected = Counter(
            "model_overload", "Requests turned away because too many waited.", one, registry=add
        ).labels(model)
        self.shadow_dropped = Counter(
            "model_shadow_dropped_rows", "Rows that the shadow was too slow for.", one, registry=add
        ).labels(model)
        self._logged = Counter(
            "model_inference_log_rows", "Rows written to the log.", ["model", "kind"], registry=add
        )
        self.logged_predictions = self._logged.labels(model, "predictions")
        self.logged_labels = self._logged.labels(model, "labels")
        self.log_dropped = Counter(
            "model_inference_log_dropped_rows",
            "Rows answered although the log could not be written.",
            one,
            registry=add,
        ).labels(model)
        self.log_refused = Counter(
            "model_inference_log_refused_rows",
            "Rows refused because the log could not be written.",
            one,
            registry=add,
        ).labels(model)
        self.log_failing = Gauge(
            "model_inference_log_failing",
            "1 while the last write to the log failed: alarm on this.",
            one,
            registry=add,
        ).labels(model)
        # Looking a child up costs more than counting.
        self._request_children: dict[tuple[str, int], Counter] = {}
        self._prediction_children: dict[tuple[str, Role], Counter] = {}
        self._score_children: dict[str, Histogram] = {}
        #: Role by version, of those in use.
        self.in_use: dict[str, Role] = {}
        self._versions: list[str] = []

    def request(self, version: str, status: int) -> None:
        """Count a request to /predict; the version is empty where none was chosen yet."""
        child = self._request_children.get((version, status))
        if child is None:
            child = self._requests.labels(self.model, version, status)
            self._request_children[version, status] = child
        child.inc()

    def predictions(self, version: str, role: Role, scores: list[float | None]) -> None:
        """Count predictions and, unless made in shadow, their scores."""
        counter = self._prediction_children.get((version, role))
        if counter is None:
            counter = self._predictions.labels(self.model, version, role)
            self._prediction_children[version, role] = counter
        counter.inc(len(scores))
        if role == "shadow":
            return
        histogram = self._score_children.get(version)
        if histogram is None:
            histogram = self._score_children[version] = self._scores.labels(self.model, version)
        for score in scores:
            if score is not None:
                histogram.observe(score)

    def load_failed(self, version: str) -> None:
        """Count a version that did not load."""
        self._load_failures.labels(self.model, version).inc()

    def challenger_failed(self, version: str) -> None:
        """Count a batch in which the challenger failed."""
        self._challenger_failures.labels(self.model, version).inc()

    def serving(self, rollout: Rollout, challenger: str | None) -> None:
        """Show what serves from now on, and forget versions that are long gone."""
        self.revision.set(rollout.revision)
        self.in_use = {rollout.champion: "champion"}
        if challenger is not None:
            self.in_use[challenger] = "challenger"
        for version in self.in_use:
            if version in self._versions:
                self._versions.remove(version)
            self._versions.append(version)
        gone, self._versions = self._versions[:-KEPT], self._versions[-KEPT:]
        for version in gone:
            self._forget(version)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _forget(self, version: str) -> None:
        families: tuple[MetricWrapperBase, ...] = (
            self._requests,
            self._predictions,
            self._scores,
            self._load_failures,
            self._challenger_failures,
        )
        for family in families:
            family.remove_by_labels({"model": self.model, "version": version})
        self._request_children = {
            k: v for k, v in self._request_children.items() if k[0] != version
        }
        self._prediction_children = {
            k: v for k, v in self._prediction_children.items() if k[0] != version
        }
        self._score_children.pop(version, None)


class _State(Collector):
    """What is known without counting, read when metrics are."""

    def __init__(self, metrics: Metrics, log: Log) -> None:
        self._metrics = metrics
        self._log = log

    def collect(self) -> Iterator[Metric]:
        model = self._metrics.model
        info = GaugeMetricFamily(
            "model_version_info",
            "1 for each version in use.",
            labels=["model", "version", "role"],
        )
        for version, role in self._metrics.in_use.items():
            info.add_metric([model, version, role], 1)
        yield info
        backlog = GaugeMetricFamily(
            "model_inference_log_backlog_files",
            "Spool files that could not be moved into the store.",
            labels=["model"],
        )
        backlog.add_metric([model], self._log.backlog)
        yield backlog
        failures = CounterMetricFamily(
            "model_inference_log_ship_failures",
            "Attempts to move a spool file into the store that failed.",
            labels=["model"],
        )
        failures.add_metric([model], self._log.ship_failures)
        yield failures
