"""What each step asks of Kubernetes. The local runner needs none of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfp import kubernetes

from driftmill.contract import Resources, Toleration
from pipelines.training import Need

#: Taints that clouds put on nodes which can be taken away.
SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
#: Taint that clouds and NVIDIA's operator put on nodes with GPUs, to keep other pods away.
GPU_TAINT = "nvidia.com/gpu"
#: Label by which NVIDIA's feature discovery tells what GPU a node has.
GPU_PRODUCT = "nvidia.com/gpu.product"
#: Where processes that train together pass tensors on; 64 MiB unless a volume is put there.
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (not a file: what the kernel calls it)


def configure(task: Any, need: Need, *, resources: Resources, image: str) -> None:
    """Set image, resources, placement and retries of one KFP task.

    Args:
        task: the task.
        need: `little` for steps that mostly wait for the store, `data` for those that hold the
            rows (the contract's CPU and memory), `training` for all that the contract asks for.
        resources: from the contract.
        image: the image to run in.
    """
    if need == "little":
        task.set_cpu_request("100m").set_memory_request("256Mi").set_memory_limit("1Gi")
    else:
        # No CPU limit: it would slow a step down on a node that has nothing else to do.
        task.set_cpu_request(resources.cpu)
        task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if need == "training":
        _place(task, resources)
    # Every step may be repeated: its writes are atomic and it finds what it did before.
    task.set_retry(num_retries=2, backoff_duration="10s", backoff_factor=2.0)
    # A cache key knows neither the rows behind a source nor the rollout.
    task.set_caching_options(False)
    task.set_container_image(image)


def tolerations(resources: Resources) -> Iterator[Toleration]:
    """The contract's own, and those that GPUs and nodes which can be taken away call for."""
    yield from resources.tolerations
    keys = [GPU_TAINT] if resources.gpu else []
    for key in [*keys, *(SPOT_TAINTS if resources.spot else ())]:
        if key not in {t.key for t in resources.tolerations}:
            yield Toleration(key=key)


def gpu_products(resources: Resources) -> list[dict[str, Any]]:
    """What a node's labels must match to have one of the contract's GPU models."""
    if not (resources.gpu and resources.gpu_products):
        return []
    return [{"key": GPU_PRODUCT, "operator": "In", "values": list(resources.gpu_products)}]


def _place(task: Any, resources: Resources) -> None:
    if resources.gpu:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpu)
        kubernetes.empty_dir_mount(
            task,
            volume_name="shared-memory",
            mount_path=SHARED_MEMORY,
            medium="Memory",
            size_limit=resources.shared_memory,
        )
    if expressions := gpu_products(resources):
        kubernetes.add_node_affinity(task, match_expressions=expressions)
    for key, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label_key=key, label_value=value)
    for toleration in tolerations(resources):
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
        )
