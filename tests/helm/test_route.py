"""The way in through a Gateway, and what of it a canary gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import APIS, CHART, CI, NAME, NAMESPACE, RELEASE, helm, of, refused, render
from tests.k8s.conftest import Api, kubeconfig

GATEWAY = {"route": {"mode": "always", "parentRefs": [{"name": "public"}]}}
CANARY = f"{NAME}-payments-canary"


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A Kubernetes API."""
    served = Api({})
    yield served
    served.close()


def slice_(service: str, *ready: bool | None) -> dict[str, Any]:
    """The endpoints of a service, as a cluster lists them."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [
            {"addresses": ["10.0.0.9"], "conditions": {} if r is None else {"ready": r}}
            for r in ready
        ],
    }


def test_a_route_leads_each_model_to_its_service() -> None:
    values = {"route": {**GATEWAY["route"], "prefix": "/v1/models", "hostnames": ["m.example.com"]}}
    routes = of(render(values, "two-models"), "HTTPRoute")
    services = of(render(values, "two-models"), "Service")
    assert set(routes) == {f"{NAME}-payments", f"{NAME}-refunds"}
    spec = routes[f"{NAME}-refunds"]["spec"]
    assert spec["parentRefs"] == [{"name": "public"}]
    assert spec["hostnames"] == ["m.example.com"]
    (rule,) = spec["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1/models/refunds"}}]
    rewrite = rule["filters"][0]["urlRewrite"]["path"]
    assert rewrite == {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}
    (backend,) = rule["backendRefs"]
    assert backend["port"] in [p["port"] for p in services[backend["name"]]["spec"]["ports"]]
    (rule,) = of(render(GATEWAY), "HTTPRoute")[f"{NAME}-payments"]["spec"]["rules"]
    assert rule["matches"][0]["path"]["value"] == "/payments"


def test_the_gateway_is_named_as_far_as_it_is_said() -> None:
    parent = {"name": "public", "namespace": "gateways", "sectionName": "https"}
    values = {"route": {"mode": "always", "parentRefs": [parent]}}
    (route,) = of(render(values), "HTTPRoute").values()
    assert route["spec"]["parentRefs"] == [parent]


@pytest.mark.parametrize(
    ("mode", "apis", "made"),
    [
        ("never", APIS, False),
        ("skipIfMissing", APIS, True),
        ("skipIfMissing", (), False),
        ("always", (), True),
    ],
)
def test_the_mode_decides(mode: str, apis: tuple[str, ...], made: bool) -> None:
    objects = render({"route": {**GATEWAY["route"], "mode": mode}}, apis=apis)
    assert bool(of(objects, "HTTPRoute")) is made


def test_what_cannot_be_is_refused() -> None:
    assert "route.parentRefs is empty" in refused({"route": {"mode": "always"}})
    said = refused({"route": {**GATEWAY["route"], "mode": "failIfMissing"}}, apis=())
    assert "install the Gateway API" in said


def test_a_model_that_is_not_served_has_no_route() -> None:
    objects = render({**GATEWAY, "service": {"enabled": False}})
    assert not of(objects, "HTTPRoute")


@pytest.mark.parametrize(
    ("slices", "weight"),
    [
        ([], 0),
        ([slice_(CANARY)], 0),
        ([slice_(CANARY, False)], 0),
        ([slice_(f"{NAME}-payments", True), slice_("canary", True)], 0),
        ([slice_(CANARY, False), slice_(CANARY, False, True)], 5),
        ([slice_(CANARY, None)], 5),
    ],
    ids=["nothing", "no pod", "none ready", "others'", "one ready", "ready unless said"],
)
def test_a_canary_gets_its_weight_once_a_pod_is_ready(
    api: Api, tmp_path: Path, slices: list[dict[str, Any]], weight: int
) -> None:
    api.answers = _discovery() | {
        f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices": {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSliceList",
            "items": slices,
        }
    }
    config = tmp_path / "kubeconfig"
    kubeconfig(config, api.url)
    done = helm(
        *("template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(CI["canary-route"])),
        *("--dry-run=server", f"--kubeconfig={config}", "--kube-context=test"),
        *("--show-only", "templates/route.yaml"),
    )
    assert done.returncode == 0, done.stderr
    backends = yaml.safe_load(done.stdout)["spec"]["rules"][0]["backendRefs"]
    assert {b["name"]: b["weight"] for b in backends} == {
        f"{NAME}-payments": 100 - weight,
        CANARY: weight,
    }


def test_a_canary_has_a_service_and_pods_of_its_own() -> None:
    objects = render({}, "canary-route")
    (route,) = of(objects, "HTTPRoute").values()
    backends = [b["name"] for b in route["spec"]["rules"][0]["backendRefs"]]
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in of(objects, "Deployment").values()]
    for name in backends:
        selector = of(objects, "Service")[name]["spec"]["selector"]
        assert sum(selector.items() <= labels.items() for labels in pods) == 1


def _discovery() -> dict[str, Any]:
    """What a cluster says of the kinds that the chart looks up."""

    def kind(version: str, name: str, singular: str) -> dict[str, Any]:
        resource = {"name": name, "kind": singular, "namespaced": True, "verbs": ["get", "list"]}
        return {"kind": "APIResourceList", "groupVersion": version, "resources": [resource]}

    return {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api/v1": kind("v1", "secrets", "Secret"),
        "/apis/discovery.k8s.io/v1": kind("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    }
