"""What each step asks of Kubernetes. The local runner needs none of it."""

from __future__ import annotations

from typing import Any

from kfp import kubernetes

from driftmill.contract import Resources
from pipelines.tabular import Need

#: Taints that clouds put on nodes which can be taken away.
SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def configure(task: Any, need: Need, *, resources: Resources, image: str | None) -> None:
    """Set image, resources, placement and retries of one KFP task.

    Args:
        task: the task.
        need: `little` for steps that mostly wait for the store, `data` for those that hold the
            rows (the contract's CPU and memory), `training` for all that the contract asks for.
        resources: from the contract.
        image: the image to run in; None keeps the component's own.
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
    if image is not None:
        task.set_container_image(image)


def _place(task: Any, resources: Resources) -> None:
    if resources.gpu:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpu)
    for key, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label_key=key, label_value=value)
    for toleration in resources.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
        )
    if resources.spot:
        for key in SPOT_TAINTS:
            kubernetes.add_toleration(task, key=key, operator="Exists", effect="NoSchedule")
