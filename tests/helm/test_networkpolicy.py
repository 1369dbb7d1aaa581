"""Who may talk to whom: the rendered policies, applied to the pods that the chart makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from tests.helm.chart import APIS, NAME, NAMESPACE, RELEASE, Object, of, render

#: Labels of the namespaces.
SPACES = {
    NAMESPACE: {"kubernetes.io/metadata.name": NAMESPACE},
    "web": {"kubernetes.io/metadata.name": "web", "driftmill/may-call": "true"},
    "monitoring": {"kubernetes.io/metadata.name": "monitoring"},
    "storage": {"kubernetes.io/metadata.name": "storage"},
    "kube-system": {"kubernetes.io/metadata.name": "kube-system"},
    "observability": {"kubernetes.io/metadata.name": "observability"},
    "other": {"kubernetes.io/metadata.name": "other"},
}
#: Where each part of a model listens.
PORTS = {"service": 3000, "monitor": 3001, "controller": 3002}

#: An address, or labels and namespace of a pod.
End = str | tuple[dict[str, str], str]


def stranger(namespace: str, **labels: str) -> End:
    return (labels or {"app": "stranger"}, namespace)


def pod(component: str, model: str = "payments", release: str = RELEASE) -> End:
    labels = {
        "app.kubernetes.io/name": "driftmill",
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/component": component,
        "driftmill/model": model,
    }
    return (labels, NAMESPACE)


def open_(objects: Iterable[Object], source: End, target: End, port: int) -> bool:
    """Whether the policies let a connection by TCP pass, as Kubernetes defines it."""
    policies = of(objects, "NetworkPolicy").values()
    out = _lets(policies, "egress", "to", source, target, port)
    return out and _lets(policies, "ingress", "from", target, source, port)


def _lets(
    policies: Iterable[Object], side: str, peers: str, subject: End, other: End, port: int
) -> bool:
    if isinstance(subject, str):
        return True
    labels, namespace = subject
    mine = [
        p["spec"]
        for p in policies
        if p["metadata"]["namespace"] == namespace
        and side.title() in p["spec"]["policyTypes"]
        and _selects(p["spec"]["podSelector"], labels)
    ]
    rules = [rule for spec in mine for rule in spec.get(side) or []]
    return not mine or any(
        (not rule.get(peers) or any(_is(peer, other, namespace) for peer in rule[peers]))
        and (not rule.get("ports") or any(_tcp(p, port) for p in rule["ports"]))
        for rule in rules
    )


def _tcp(wanted: dict[str, Any], port: int) -> bool:
    return bool(wanted.get("protocol", "TCP") == "TCP" and wanted["port"] == port)


def _is(peer: dict[str, Any], end: End, own: str) -> bool:
    if isinstance(end, str):
        block = peer.get("ipBlock")
        return bool(
            block
            and ip_address(end) in ip_network(block["cidr"])
            and not any(ip_address(end) in ip_network(n) for n in block.get("except", ()))
        )
    if "ipBlock" in peer:
        return False
    labels, namespace = end
    spaces = peer.get("namespaceSelector")
    return (
        namespace == own if spaces is None else _selects(spaces, SPACES[namespace])
    ) and _selects(peer.get("podSelector", {}), labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    plain = selector.get("matchLabels", {}).items() <= labels.items()
    return plain and all(
        e["operator"] == "In" and labels.get(e["key"]) in e["values"]
        for e in selector.get("matchExpressions", ())
    )


@pytest.mark.parametrize(
    ("source", "target", "port", "passes"),
    [
        # Who may ask a service.
        (stranger("web"), pod("service"), 3000, True),
        (stranger("monitoring"), pod("service"), 3000, True),
        (pod("test"), pod("service"), 3000, True),
        (stranger("other"), pod("service"), 3000, False),
        (stranger(NAMESPACE), pod("service"), 3000, False),
        ("203.0.113.7", pod("service"), 3000, False),
        (stranger("web"), pod("service"), 3001, False),
        (pod("monitor"), pod("service"), 3000, False),
        (pod("service", "refunds"), pod("service"), 3000, False),
        # A monitor.
        (stranger("monitoring"), pod("monitor"), 3001, True),
        (pod("test"), pod("monitor"), 3001, True),
        (stranger("web"), pod("monitor"), 3001, False),
        (pod("service"), pod("monitor"), 3001, False),
        # A controller, which starts training for those that it hears.
        (stranger("monitoring"), pod("controller"), 3002, True),
        (stranger("web"), pod("controller"), 3002, False),
        (stranger("other"), pod("controller"), 3002, False),
        (pod("test"), pod("controller"), 3002, False),
        (pod("service"), pod("controller"), 3002, False),
        (pod("training"), pod("controller"), 3002, False),
        (pod("controller"), "10.0.0.1", 6443, True),
        # Nobody asks what trains, or the test.
        (stranger("monitoring"), pod("training"), 8080, False),
        (stranger("web"), pod("training"), 3000, False),
        (stranger("monitoring"), pod("test"), 3000, False),
        # What all but the test reach.
        *[
            (pod(component), target, 443, component != "test")
            for component in ("service", "monitor", "controller", "training", "test")
            for target in ("198.51.100.3", stranger("storage"))
        ],
        (pod("training"), "169.254.169.254", 80, False),
        (pod("test"), stranger("kube-system"), 53, True),
        (pod("service"), "169.254.20.10", 53, True),
        (pod("test"), stranger("kube-system"), 443, False),
    ],
)
def test_paths(source: End, target: End, port: int, passes: bool) -> None:
    objects = render({}, "two-models")
    assert open_(objects, source, target, port) is passes


@pytest.mark.parametrize(
    ("webhook", "apis", "posts"),
    [
        ("auto", APIS, False),
        ("auto", (), True),
        ("direct", APIS, True),
        ("none", (), False),
    ],
)
def test_a_monitor_reaches_its_controller_where_it_posts(
    webhook: str, apis: tuple[str, ...], posts: bool
) -> None:
    objects = render({"monitor": {"webhook": webhook}}, "locked-down", apis=apis)
    assert open_(objects, pod("monitor"), pod("controller"), 3002) is posts
    assert not open_(objects, pod("monitor", "refunds"), pod("controller"), 3002)
    assert not open_(objects, pod("monitor"), pod("controller", "refunds"), 3002)


def test_narrow_values_leave_only_what_they_name() -> None:
    objects = render({}, "locked-down")
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    for source, target, port, passes in [
        (pod("service"), stranger("storage"), 7070, True),
        (pod("service"), stranger("storage"), 443, False),
        (pod("service"), "198.51.100.3", 443, False),
        (pod("service"), stranger("kube-system"), 53, True),
        (pod("controller"), "10.0.0.1", 6443, True),
        (pod("controller"), "10.0.0.2", 6443, False),
        (pod("monitor"), "10.0.0.1", 6443, False),
        (stranger(NAMESPACE, app="checkout"), pod("service"), 3000, True),
        (stranger("web"), pod("service"), 3000, False),
        (stranger("monitoring"), pod("controller"), 3002, False),
        ((prometheus, "observability"), pod("controller"), 3002, True),
        (stranger("observability"), pod("controller"), 3002, False),
    ]:
        assert open_(objects, source, target, port) is passes, (source, target, port)


def _pods(objects: Iterable[Object]) -> Iterator[dict[str, str]]:
    """Labels of all pods that the chart makes, or that its controllers make."""
    for thing in objects:
        match thing["kind"]:
            case "Pod":
                yield thing["metadata"]["labels"]
            case "Deployment" | "Job":
                yield thing["spec"]["template"]["metadata"]["labels"]
            case "CronJob":
                yield thing["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
            case "ConfigMap" if "job.yaml" in thing["data"]:
                yield from _pods([yaml.safe_load(thing["data"]["job.yaml"])])


SHUT: dict[str, Any] = {"clients": [], "monitoring": [], "egress": [], "kubernetesApi": []}
CLOCK = {"controller": {"enabled": False}, "training": {"recurring": {"type": "cronjob"}}}


@pytest.mark.parametrize(
    ("base", "more", "components"),
    [
        ("two-models", {}, {*PORTS, "training", "test"}),
        ("image-store", {}, {"service", "test"}),
        ("minimal", CLOCK, {"service", "monitor", "training", "test"}),
    ],
)
def test_every_pod_is_shut_first(base: str, more: dict[str, Any], components: set[str]) -> None:
    objects = render({"networkPolicy": SHUT, **more}, base)
    pods = list(_pods(objects))
    assert {labels["app.kubernetes.io/component"] for labels in pods} == components
    for labels in pods:
        end = (labels, NAMESPACE)
        for port in PORTS.values():
            assert not open_(objects, stranger("web"), end, port)
            assert not open_(objects, stranger("monitoring"), end, port)
        assert not open_(objects, end, "198.51.100.3", 443)
        assert open_(objects, end, stranger("kube-system"), 53)


def test_another_release_of_the_namespace_is_a_stranger() -> None:
    objects = render({}, "two-models")
    assert not open_(objects, pod("test", release="second"), pod("service"), 3000)
    both = (*objects, *render({}, "two-models", release="second"))
    assert open_(both, pod("test", release="second"), pod("service", release="second"), 3000)
    assert not open_(both, pod("test"), pod("service", release="second"), 3000)


def test_controllers_without_jobs_do_not_reach_the_api() -> None:
    objects = render({"networkPolicy": {"egress": []}}, "postgres-kubeflow")
    assert not open_(objects, pod("controller"), "10.0.0.1", 6443)


def test_without_a_test_there_is_no_way_for_one() -> None:
    objects = render({"test": {"enabled": False}})
    assert not open_(objects, pod("test"), pod("service"), 3000)
    assert f"{NAME}-test" not in of(objects, "NetworkPolicy")


def test_they_can_be_left_out() -> None:
    assert not of(render({"networkPolicy": {"enabled": False}}), "NetworkPolicy")
