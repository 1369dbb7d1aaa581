"""What each step asks of Kubernetes. The local runner needs none of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from driftmill.contract import Contract, Resources, Toleration

if TYPE_CHECKING:
    from pipelines.training import Need

#: Taints of nodes that can be taken away: what clouds put there, and ours where one puts none.
SPOT_TAINTS = (
    "driftmill/spot",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
)
#: Taint that clouds and NVIDIA's operator put on nodes with GPUs, to keep other pods away.
GPU_TAINT = "nvidia.com/gpu"
#: Label by which NVIDIA's feature discovery tells what GPU a node has.
GPU_PRODUCT = "nvidia.com/gpu.product"
#: Label by which Kueue knows the queue of a pod or a TrainJob.
QUEUE = "kueue.x-k8s.io/queue-name"
#: Where processes that train together pass tensors on; 64 MiB unless a volume is put there.
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (not a file: what the kernel calls it)
#: User and group of every image.
USER = 65532
#: What steps read from their namespace, each under its own name; all of it may be missing, as where
#: a cloud gives the service account its rights.
CONFIG: dict[str, tuple[str, ...]] = {
    "driftmill": ("AWS_ENDPOINT_URL", "AWS_REGION", "MLFLOW_TRACKING_URI", "DRIFTMILL_TRUSTED_KEYS")
}
SECRETS: dict[str, tuple[str, ...]] = {
    "driftmill-store": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "driftmill-tracking": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
}
#: What only the step that signs and promotes reads.
SIGNING: dict[str, tuple[str, ...]] = {"driftmill-signing": ("DRIFTMILL_SIGNING_KEY",)}
#: Longest time of a step that only moves files.
LITTLE_TIME = 3600.0


def configure(task: Any, need: Need, *, contract: Contract, images: dict[Need, str]) -> None:
    """Set image, resources, placement, rights and retries of one KFP task.

    Args:
        task: the task.
        need: `little` for steps that mostly wait for the store, `data` for those that hold the
            rows (the contract's CPU and memory), `training` for all that the contract asks for.
        contract: says what it asks for.
        images: the image to run in, for each need.
    """
    from kfp import kubernetes  # a second, which the runner of Jobs has no use for

    resources = contract.train.resources
    if need == "little":
        task.set_cpu_request("100m").set_memory_request("256Mi").set_memory_limit("1Gi")
        kubernetes.set_timeout(task, int(min(resources.timeout, LITTLE_TIME)))
    else:
        # No CPU limit: it would slow a step down on a node that has nothing else to do.
        task.set_cpu_request(resources.cpu)
        task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
        kubernetes.set_timeout(task, int(resources.timeout))
        # Without a limit a pod sees all cores of its node, and memory for as many threads it has
        # not.
        for name in ("DRIFTMILL_CORES", "OMP_NUM_THREADS"):
            task.set_env_variable(name, str(cores(resources.cpu)))
        # Steps without the label never wait in a queue: the outcome is recorded when it is due.
        if resources.queue:
            kubernetes.add_pod_label(task, QUEUE, resources.queue)
    if need == "training":
        _place(task, resources)
    for name, value in labels(contract, task.name).items():
        kubernetes.add_pod_label(task, name, value)
    for name, keys in CONFIG.items():
        kubernetes.use_config_map_as_env(task, name, {key: key for key in keys}, optional=True)
    for name, keys in (SECRETS | (SIGNING if task.name == "promote" else {})).items():
        kubernetes.use_secret_as_env(task, name, {key: key for key in keys}, optional=True)
    # What else the Pod Security level `restricted` asks for, the back end adds to every pod.
    kubernetes.set_security_context(task, USER, USER, run_as_non_root=True)
    # Tags go by content, so that an image on the node is the one that is meant.
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    # Every step may be repeated: its writes are atomic and it finds what it did before.
    task.set_retry(num_retries=2, backoff_duration="10s", backoff_factor=2.0)
    # KFP's cache knows neither the rows behind a source nor the code; `driftmill.cache` does.
    task.set_caching_options(False)
    task.set_container_image(images[need])


def labels(contract: Contract, component: str) -> dict[str, str]:
    """The labels of a pod."""
    return {
        "app.kubernetes.io/part-of": "driftmill",
        "app.kubernetes.io/component": component,
        "driftmill/model": contract.model,
    }


def cores(cpu: str) -> int:
    """Whole cores of an amount of CPU as Kubernetes writes it, one at least."""
    amount = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return max(1, math.ceil(amount))


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
    from kfp import kubernetes

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
