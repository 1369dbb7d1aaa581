"""How many pods serve: by CPU, by requests, or as many as the values say."""

from __future__ import annotations

import pytest

from tests.helm.chart import NAME, NAMESPACE, of, refused, render

SCALERS = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}


def scaled(**settings: object) -> dict[str, object]:
    return {"service": {"autoscaling": settings}}


@pytest.mark.parametrize(("kind", "scaler"), SCALERS.items())
def test_it_scales_the_deployment_which_then_says_no_number(kind: str, scaler: str) -> None:
    objects = render(scaled(type=kind), "two-models")
    found = of(objects, scaler)
    assert set(found) == {f"{NAME}-payments", f"{NAME}-refunds"}
    for thing in found.values():
        target = thing["spec"]["scaleTargetRef"]
        assert target["kind"] == "Deployment"
        assert "replicas" not in of(objects, target["kind"])[target["name"]]["spec"]
    others = set(SCALERS.values()) - {scaler}
    assert not any(of(objects, other) for other in others)


def test_nothing_scales_unless_it_is_asked_for() -> None:
    objects = render()
    assert not any(of(objects, kind) for kind in SCALERS.values())
    assert of(objects, "Deployment")[f"{NAME}-payments"]["spec"]["replicas"] == 2


def test_by_cpu() -> None:
    up = {"scaleUp": {"stabilizationWindowSeconds": 30}}
    settings = scaled(type="hpa", minReplicas=3, maxReplicas=7, cpuPercent=50, behavior=up)
    (thing,) = of(render(settings), "HorizontalPodAutoscaler").values()
    spec = thing["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 7)
    (metric,) = spec["metrics"]
    assert metric["resource"]["target"] == {"type": "Utilization", "averageUtilization": 50}
    assert spec["behavior"] == up


def test_cpu_is_measured_against_what_the_pods_ask_for() -> None:
    objects = render(scaled(type="hpa"))
    pod = of(objects, "Deployment")[f"{NAME}-payments"]["spec"]["template"]["spec"]
    assert all("cpu" in c["resources"]["requests"] for c in pod["containers"])


def test_by_requests() -> None:
    (thing,) = of(render({}, "keda"), "ScaledObject").values()
    spec = thing["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 20)
    assert spec["pollingInterval"] == 10
    (trigger,) = spec["triggers"]
    settings = trigger["metadata"]
    assert settings["serverAddress"] == "http://prometheus.example.com:9090"
    assert settings["threshold"] == "300"
    selector = f'model_requests_total{{namespace="{NAMESPACE}",model="payments"}}'
    assert settings["query"] == f"sum(rate({selector}[2m]))"
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {"scaleDown": {"stabilizationWindowSeconds": 120}}


def test_a_model_has_its_own_setting() -> None:
    own = {"models": {"refunds": {"service": {"autoscaling": {"type": "hpa", "maxReplicas": 4}}}}}
    (thing,) = of(render(own, "two-models"), "HorizontalPodAutoscaler").values()
    assert thing["metadata"]["name"] == f"{NAME}-refunds"
    assert thing["spec"]["maxReplicas"] == 4


def test_more_at_least_than_at_most_is_a_mistake() -> None:
    said = refused(scaled(type="hpa", minReplicas=5, maxReplicas=4))
    assert "model payments: service.autoscaling.minReplicas is 5 and maxReplicas 4" in said


def test_a_model_that_is_not_served_does_not_scale() -> None:
    objects = render({"service": {"enabled": False, "autoscaling": {"type": "hpa"}}})
    assert not of(objects, "HorizontalPodAutoscaler")
