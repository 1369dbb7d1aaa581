"""A step that asks for a GPU lands on a node that has one, and only there.

No GPU is needed: the resource is written into a node's status, as a device plugin would do, and
the scheduler believes it. The pods are those that Kubeflow Pipelines makes of a compiled contract.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from k8s.explain import explain, main
from tests.cluster.kubeflow import Package
from tests.cluster.objects import Cluster, Namespace
from tests.k8s.test_explain import sentence
from tests.pipelines.contracts import IMAGES

#: In every node, for it holds the network of a pod; it runs as a user other than root.
PAUSE = "registry.k8s.io/pause:3.10.1"
RESOURCE = "nvidia.com/gpu"
PRODUCT_LABEL, PRODUCT = "nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3"
SMALL = {"cpu": "50m", "memory": "64Mi", "shared_memory": "16Mi"}


@pytest.fixture(scope="module")
def gpu_node(cluster: Cluster) -> Iterator[str]:
    """The worker that stands for a GPU node, with one GPU; as it was before at the end."""
    workers = cluster.workers()
    node = next((n for n in workers if PRODUCT_LABEL in n["metadata"]["labels"]), workers[-1])
    name = node["metadata"]["name"]
    taints, labels = node["spec"].get("taints", []), node["metadata"]["labels"]
    tainted = [t for t in taints if t["key"] != RESOURCE]
    tainted.append({"key": RESOURCE, "value": "present", "effect": "NoSchedule"})
    cluster.core.patch_node(
        name,
        {"metadata": {"labels": {PRODUCT_LABEL: PRODUCT}}, "spec": {"taints": tainted}},
    )
    announce(cluster, name, "1")
    yield name
    cluster.core.patch_node(
        name,
        {
            "metadata": {"labels": {PRODUCT_LABEL: labels.get(PRODUCT_LABEL)}},
            "spec": {"taints": taints or None},
        },
    )
    announce(cluster, name, node["status"]["allocatable"].get(RESOURCE))


def announce(cluster: Cluster, node: str, gpus: str | None) -> None:
    """Say how many GPUs a node has; None: nothing."""
    amount = {RESOURCE: gpus}
    cluster.core.patch_node_status(node, {"status": {"capacity": amount, "allocatable": amount}})


def fit_pod(package: Package) -> dict[str, Any]:
    """The pod of the step `fit`, but with an image that does nothing."""
    pod = package.pod("exec-fit", f"fit-{uuid.uuid4().hex[:8]}", {})
    (container,) = pod["spec"]["containers"]
    container["image"] = PAUSE
    del container["command"], container["args"]
    return pod


@pytest.fixture
def start(namespace: Namespace) -> Iterator[Callable[[Package], str]]:
    """Starts the pod of `fit` and gives its name; deletes all pods afterwards."""

    def start_pod(package: Package) -> str:
        pod = fit_pod(package)
        namespace.apply(pod)
        return str(pod["metadata"]["name"])

    yield start_pod
    core = namespace.cluster.core
    core.delete_collection_namespaced_pod(namespace.name, grace_period_seconds=0)


def has_started(pod: dict[str, Any]) -> bool:
    return bool(pod["status"]["phase"] == "Running")


def is_refused(pod: dict[str, Any]) -> bool:
    """Whether the scheduler has looked at it and found no node."""
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in conditions)


@pytest.mark.parametrize("products", [[], [PRODUCT], ["NVIDIA-L4", PRODUCT]])
def test_a_step_with_a_gpu_lands_on_the_node_with_one(
    namespace: Namespace,
    gpu_node: str,
    compiled: Callable[..., Package],
    start: Callable[[Package], str],
    products: list[str],
) -> None:
    resources = {**SMALL, "gpu": 1, "gpu_products": products}
    name = start(compiled(IMAGES, resources=resources))
    pod = namespace.until(name, has_started)
    assert pod["spec"]["nodeName"] == gpu_node
    (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "shared-memory"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Mi"}
    assert namespace.explain(name) == f"{name} runs on {gpu_node}."


def test_a_step_without_a_gpu_stays_away_from_that_node(
    namespace: Namespace,
    gpu_node: str,
    compiled: Callable[..., Package],
    start: Callable[[Package], str],
) -> None:
    package = compiled(IMAGES, resources=SMALL)
    for name in [start(package) for _ in range(4)]:
        assert namespace.until(name, has_started)["spec"]["nodeName"] != gpu_node


TOLERATION = {"key": RESOURCE, "operator": "Equal", "value": "team-a"}


@pytest.mark.parametrize(
    ("case", "resources"),
    [
        ("gpu-taint", {"tolerations": [TOLERATION]}),
        ("gpu-too-many", {"gpu": 8}),
        ("gpu-product", {"gpu_products": ["NVIDIA-L4"]}),
        ("gpu-two-reasons", {"gpu_products": ["NVIDIA-L4", "NVIDIA-A10"], "gpu": 2}),
        ("gpu-type", {"gpu_type": "amd.com/gpu"}),
        ("gpu-selector", {"node_selector": {"pool": "train"}}),
        ("gpu-cpu", {"cpu": "400"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_that_no_node_will_do_for_waits_and_says_why(
    namespace: Namespace,
    gpu_node: str,
    compiled: Callable[..., Package],
    start: Callable[[Package], str],
    capsys: pytest.CaptureFixture[str],
    case: str,
    resources: dict[str, Any],
) -> None:
    name = start(compiled(IMAGES, resources={**SMALL, "gpu": 1, **resources}))
    namespace.until(name, is_refused)
    said = sentence(case, namespace.surroundings(name))
    assert gpu_node in said or "no node has" in said
    assert namespace.explain(name, case) == said
    assert main([name, "-n", namespace.name, "--context", namespace.cluster.context]) == 0
    assert capsys.readouterr().out == said + "\n"
    assert namespace.pod(name)["status"]["phase"] == "Pending"


def test_a_gpu_that_is_taken_is_waited_for(
    namespace: Namespace,
    gpu_node: str,
    compiled: Callable[..., Package],
    start: Callable[[Package], str],
) -> None:
    package = compiled(IMAGES, resources={**SMALL, "gpu": 1})
    first = start(package)
    namespace.until(first, has_started)
    second = start(package)
    namespace.until(second, is_refused)
    said = sentence("gpu-taken", namespace.surroundings(second))
    assert namespace.explain(second, "gpu-taken") == said
    assert first in said
    assert gpu_node in said
    namespace.cluster.core.delete_namespaced_pod(first, namespace.name, grace_period_seconds=0)
    assert namespace.until(second, has_started)["spec"]["nodeName"] == gpu_node


def test_without_nodes_the_scheduler_is_quoted(
    namespace: Namespace,
    gpu_node: str,
    compiled: Callable[..., Package],
    start: Callable[[Package], str],
) -> None:
    name = start(compiled(IMAGES, resources={**SMALL, "gpu": 8}))
    pod = namespace.until(name, is_refused)
    # As for a user who may not list nodes.
    said = explain(pod)
    assert said.startswith(f"{name} waits: the scheduler says: 0/")
    assert "Insufficient nvidia.com/gpu" in said
