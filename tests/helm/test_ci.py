"""The sets of values that come with the chart: each is valid and renders to valid objects, on a
cluster with and without the kinds that others bring.
"""

from __future__ import annotations

import json

import pytest
import yaml

from driftmill import contract
from driftmill.values import Values
from tests.helm.chart import APIS, CHART, CI, KUBERNETES, check, helm, render

#: The oldest cluster that the chart takes.
OLDEST = "1.30.0"
#: What there is in a set beside what every set has.
KINDS = {
    "by-the-clock": {"CronJob", "Job"},
    "canary-route": {"HTTPRoute"},
    "existing-secrets": set(),
    "full": {"HorizontalPodAutoscaler", "HTTPRoute", "PrometheusRule"},
    "image-store": set(),
    "keda": {"ScaledObject"},
    "locked-down": set(),
    "minimal": set(),
    "postgres-kubeflow": set(),
    "pvc": {"PersistentVolumeClaim"},
    "two-models": set(),
    "vision-gpu": set(),
}
EVERYWHERE = {"ConfigMap", "Deployment", "Service", "NetworkPolicy", "Pod", "ServiceMonitor"}


def test_every_set_is_known() -> None:
    assert set(KINDS) == set(CI)


def test_the_oldest_cluster_is_the_charts() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["kubeVersion"] == f">={OLDEST}-0"


@pytest.mark.parametrize("name", CI)
def test_a_set_is_valid_and_its_contracts_are(name: str) -> None:
    values = Values.model_validate(yaml.safe_load(CI[name].read_text()))
    for model, settings in values.models.items():
        assert contract.parse(settings.contract).model == model


@pytest.mark.parametrize("name", CI)
def test_lint_finds_nothing(name: str) -> None:
    done = helm("lint", str(CHART), "--strict", "--kube-version=1.34.0", "-f", str(CI[name]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize(
    ("apis", "kubernetes"),
    [(APIS, KUBERNETES), ((), OLDEST)],
    ids=["with kinds of others", "without"],
)
@pytest.mark.parametrize("name", CI)
def test_a_set_renders_to_valid_objects(name: str, apis: tuple[str, ...], kubernetes: str) -> None:
    if name == "image-store" and kubernetes == OLDEST:
        kubernetes = "1.33.0"  # images as volumes came then
    objects = render({}, name, apis=apis, kubernetes=kubernetes)
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(keys) == len(set(keys))
    for thing in objects:
        check(json.dumps(thing), kubernetes)


@pytest.mark.parametrize("name", CI)
def test_nothing_is_left_out(name: str) -> None:
    kinds = {o["kind"] for o in render({}, name)}
    assert EVERYWHERE | KINDS[name] <= kinds


@pytest.mark.parametrize("name", CI)
def test_without_the_kinds_of_others_only_what_was_asked_for_is_made(name: str) -> None:
    values = Values.model_validate(yaml.safe_load(CI[name].read_text()))
    monitoring = values.monitoring
    asked = {
        "ServiceMonitor": monitoring.service_monitor.mode == "always",
        "PrometheusRule": monitoring.prometheus_rule.mode == "always",
        "AlertmanagerConfig": monitoring.alertmanager_config.mode == "always",
        "HTTPRoute": values.route.mode == "always",
        "ScaledObject": values.service.autoscaling.type == "keda",
    }
    made = {o["kind"] for o in render({}, name, apis=())} & set(asked)
    assert made == {kind for kind, wanted in asked.items() if wanted}
