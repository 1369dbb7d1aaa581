"""Prometheus metrics of a service.

Label values are bounded: versions are forgotten when more than `KEPT` others came after them.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

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
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from driftmill.contract import LATENCY_BUCKETS
from driftmill.rollout import Rollout
from driftmill.serving.log import Log, Role

#: Versions that keep their series.
KEPT = 5

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_EXPLANATION_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
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
        self._predictions = Counter(
            "model_predictions", "Predictions by role.", [*version, "role"], registry=add
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
        self.seconds = Tally(LATENCY_BUCKETS)
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
        self._explanations = Counter(
            "model_explanations",
            "Requests to /explain, by status.",
            ["model", "code"],
            registry=add,
        )
        self._explanation_seconds = Histogram(
            "model_explanation_duration_seconds",
            "Time until an explanation is ready.",
            one,
            buckets=_EXPLANATION_SECONDS,
            registry=add,
        ).labels(model)
        self.rejected = Counter(
            "model_overload", "Requests turned away because too many waited.", one, registry=add
        ).labels(model)
        self.unauthorized = Counter(
            "model_unauthorized", "Requests without a right to what they asked.", one, registry=add
        ).labels(model)
        self.rate_limited = Counter(
            "model_rate_limited", "Requests of clients beyond their rate.", one, registry=add
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
        #: Requests by version and status; like tallies, counted by the event loop only.
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        # Looking a child up costs more than counting.
        self._prediction_children: dict[tuple[str, Role], Counter] = {}
        self.scores: dict[str, Tally] = {}
        #: Role by version, of those in use.
        self.in_use: dict[str, Role] = {}
        self._versions: list[str] = []

    def request(self, version: str, status: int) -> None:
        """Count a request to /predict; the version is empty where none was chosen yet."""
        self.requests[version, status] += 1

    def explained(self, status: int, seconds: float) -> None:
        """Count a request to /explain, and the time that an explanation took."""
        self._explanations.labels(self.model, status).inc()
        if status == 200:
            self._explanation_seconds.observe(seconds)

    def predictions(self, version: str, role: Role, scores: list[float | None]) -> None:
        """Count predictions and, unless made in shadow, their scores."""
        counter = self._prediction_children.get((version, role))
        if counter is None:
            counter = self._predictions.labels(self.model, version, role)
            self._prediction_children[version, role] = counter
        counter.inc(len(scores))
        if role == "shadow":
            return
        tally = self.scores.get(version)
        if tally is None:
            tally = self.scores[version] = Tally(_SCORES)
        for score in scores:
            if score is not None:
                tally.observe(score)

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
            self._predictions,
            self._load_failures,
            self._challenger_failures,
        )
        for family in families:
            family.remove_by_labels({"model": self.model, "version": version})
        for key in [key for key in self.requests if key[0] == version]:
            del self.requests[key]
        self._prediction_children = {
            k: v for k, v in self._prediction_children.items() if k[0] != version
        }
        self.scores.pop(version, None)


class Tally:
    """A histogram that costs a tenth of prometheus_client's, which locks twice and searches its
    bounds one by one; only the event loop may observe.

    Args:
        bounds: upper ends of the buckets, rising; one without end comes after them.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Show what was counted."""
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets, self._sum)


class _State(Collector):
    """What is kept elsewhere than in prometheus_client's metrics, read when they are."""

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
        requests = CounterMetricFamily(
            "model_requests",
            "Requests to /predict, by status.",
            labels=["model", "version", "code"],
        )
        for (version, status), count in self._metrics.requests.items():
            requests.add_metric([model, version, str(status)], count)
        yield requests
        seconds = HistogramMetricFamily(
            "model_request_duration_seconds",
            "Time from the first byte of a request to /predict until its answer is ready.",
            labels=["model"],
        )
        self._metrics.seconds.add_to(seconds, [model])
        yield seconds
        scores = HistogramMetricFamily(
            "model_prediction_score",
            "Scores of a classification: the probability of the last label of two, or of the "
            "chosen one of more.",
            labels=["model", "version"],
        )
        for version, tally in self._metrics.scores.items():
            tally.add_to(scores, [model, version])
        yield scores
