"""A model's service: how it starts, stops and is replaced, and its canary."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from driftmill.serving.access import RIGHTS
from tests.helm.chart import NAME, of, render
from tests.helm.pods import container, environment, mounts, templates

PAYMENTS = f"{NAME}-payments"
ACCESS = f"{PAYMENTS}-access"


def deployment(
    values: dict[str, Any] | None = None, name: str = PAYMENTS, base: str = "minimal"
) -> Any:
    return of(render(values, base), "Deployment")[name]


def test_a_new_pod_is_ready_before_an_old_one_goes() -> None:
    spec = deployment()["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.parametrize(("wait", "drain", "grace"), [(5, 20, 85), (0, 60, 120)])
def test_a_pod_has_time_to_drain(wait: int, drain: int, grace: int) -> None:
    values = {"service": {"preStopSeconds": wait, "drainSeconds": drain}}
    spec = deployment(values)["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == grace
    each = spec["containers"][0]
    assert f"--drain-seconds={drain}" in each["args"]
    # Kubernetes 1.30 takes no sleep of 0 seconds.
    assert each.get("lifecycle") == ({"preStop": {"sleep": {"seconds": wait}}} if wait else None)


def test_tokens_are_asked_for_unless_that_is_switched_off() -> None:
    template = deployment()["spec"]["template"]
    assert "--tokens=/etc/driftmill/tokens" in container(template)["args"]
    assert mounts(template)["/etc/driftmill/tokens"] == {
        "name": "tokens",
        "secret": {"secretName": ACCESS},
    }
    (mount,) = (m for m in container(template)["volumeMounts"] if m["name"] == "tokens")
    # Of a file that is mounted by itself the kubelet would bring no new token.
    assert mount == {"name": "tokens", "mountPath": "/etc/driftmill/tokens", "readOnly": True}
    off = {"service": {"access": {"enabled": False}}}
    template = deployment(off)["spec"]["template"]
    assert container(template)["args"] == ["--drain-seconds=20"]
    assert "tokens" not in {v["name"] for v in template["spec"]["volumes"]}
    assert ACCESS not in of(render(off), "Secret")


def test_tokens_are_long_and_apart() -> None:
    releases = ("one", "two")
    made = [
        of(render(release=name), "Secret")[f"{name}-driftmill-payments-access"]["data"]
        for name in releases
    ]
    assert [set(data) for data in made] == [set(RIGHTS)] * 2
    tokens = {base64.b64decode(token) for data in made for token in data.values()}
    assert len(tokens) == 8
    assert {len(token) for token in tokens} == {40}


def test_tokens_of_ones_own_are_used_and_none_are_made() -> None:
    values = {"models": {"payments": {"service": {"access": {"existingSecret": "ours"}}}}}
    objects = render(values, "two-models")
    services = of(objects, "Deployment")
    assert mounts(services[PAYMENTS]["spec"]["template"])["/etc/driftmill/tokens"]["secret"] == {
        "secretName": "ours"
    }
    assert {name for name in of(objects, "Secret") if name.endswith("-access")} == {
        f"{NAME}-refunds-access"
    }


def test_a_rate_is_passed_on() -> None:
    template = deployment({"service": {"access": {"rate": 1000}}})["spec"]["template"]
    assert "--rate=1000" in container(template)["args"]


def test_pods_are_spread_over_zones_and_nodes() -> None:
    spec = deployment()["spec"]
    pod = spec["template"]["spec"]
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
    assert spread["matchLabelKeys"] == ["pod-template-hash"]
    ((wish,),) = pod["affinity"]["podAntiAffinity"].values()
    term = wish["podAffinityTerm"]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    for selector in (spread["labelSelector"], term["labelSelector"]):
        assert selector["matchLabels"] == spec["selector"]["matchLabels"]


def test_they_may_be_spread_in_another_way() -> None:
    wanted = [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]
    found = deployment({"service": {"topologySpreadConstraints": wanted}})
    assert found["spec"]["template"]["spec"]["topologySpreadConstraints"] == wanted
    affinity: dict[str, Any] = {
        "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}
    }
    found = deployment({"service": {"affinity": affinity}})
    assert found["spec"]["template"]["spec"]["affinity"] == affinity


@pytest.mark.parametrize(
    ("service", "budget"),
    [
        ({}, True),
        ({"replicas": 1}, False),
        ({"disruptionBudget": {"enabled": False}}, False),
        ({"replicas": 1, "autoscaling": {"type": "hpa", "minReplicas": 2}}, True),
        ({"replicas": 5, "autoscaling": {"type": "hpa", "minReplicas": 1}}, False),
    ],
)
def test_a_node_drain_leaves_pods_alone_where_there_are_several(
    service: dict[str, Any], budget: bool
) -> None:
    found = of(render({"service": service}), "PodDisruptionBudget")
    assert set(found) == ({PAYMENTS} if budget else set())
    for each in found.values():
        assert each["spec"]["maxUnavailable"] == 1
        assert each["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_pod_knows_its_model_and_its_store() -> None:
    values = {"store": {"endpoint": "http://s3.storage:7070", "existingSecret": "keys"}}
    template = deployment(values)["spec"]["template"]
    assert environment(template) == {
        "DRIFTMILL_MODEL": "payments",
        "DRIFTMILL_HOME": "/var/lib/driftmill",
        "DRIFTMILL_STORE": "s3://models/driftmill",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://s3.storage:7070",
        **{
            name: {"secretKeyRef": {"name": "keys", "key": name, "optional": True}}
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        },
    }
    assert mounts(template)["/var/lib/driftmill"]["emptyDir"] == {"sizeLimit": "1Gi"}


def test_a_store_that_is_not_s3_gets_none_of_its_keys() -> None:
    template = deployment({"store": {"uri": "gs://models/driftmill"}})["spec"]["template"]
    assert not [name for name in environment(template) if name.startswith("AWS_")]


def test_the_kubernetes_service_is_as_the_values_say() -> None:
    values = {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}}
    found = of(render(values), "Service")
    assert found[PAYMENTS]["spec"]["type"] == "LoadBalancer"
    assert found[PAYMENTS]["metadata"]["annotations"] == {"a": "b"}
    (port,) = found[PAYMENTS]["spec"]["ports"]
    assert (port["name"], port["port"]) == ("http", 3000)
    assert "type" not in found[f"{PAYMENTS}-controller"]["spec"]


def test_a_canary_is_other_software_and_nothing_else() -> None:
    canary = {"enabled": True, "replicas": 3, "digest": f"sha256:{'0' * 64}"}
    values = {"service": {"canary": canary, "autoscaling": {"type": "hpa"}}}
    stable = deployment(values)["spec"]
    other = deployment(values, f"{PAYMENTS}-canary")["spec"]
    assert "replicas" not in stable
    assert other["replicas"] == 3
    assert container(other["template"])["image"] == f"driftmill/service-tabular@sha256:{'0' * 64}"
    assert environment(other["template"]) == environment(stable["template"])
    assert set(of(render(values), "PodDisruptionBudget")) == {PAYMENTS}


def test_a_tag_of_the_canary_is_not_outdone_by_the_services_digest() -> None:
    values = {"service": {"canary": {"enabled": True, "tag": "next"}}}
    found = templates(render(values, "existing-secrets"))
    assert container(found[f"Deployment {PAYMENTS}-canary"])["image"].endswith(
        "/service-tabular:next"
    )


def test_what_stands_below_a_model_comes_first() -> None:
    found = of(render({}, "two-models"), "Deployment")
    assert found[PAYMENTS]["spec"]["replicas"] == 3
    refunds = found[f"{NAME}-refunds"]["spec"]
    assert refunds["replicas"] == 1
    resources = container(refunds["template"])["resources"]
    assert resources == {
        "requests": {"cpu": "100m", "memory": "256Mi"},
        "limits": {"memory": "1Gi"},
    }
    assert {n for n in found if "refunds" in n} == {f"{NAME}-refunds"}


def test_a_model_may_go_unserved() -> None:
    found = render({"service": {"enabled": False}})
    assert PAYMENTS not in of(found, "Deployment")
    assert PAYMENTS not in of(found, "Service")
    assert not of(found, "Pod")
    assert not of(found, "PodDisruptionBudget")
