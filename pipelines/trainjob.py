"""From a contract to TrainJobs of Kubeflow Trainer, for networks that several processes train.

One KFP step is one pod, on one node. A TrainJob is a pod on each of several nodes, with torchrun's
variables set so that they find each other. What it trains it leaves in the store, and the
pipeline's fit step takes it from there: see `driftmill.vision.job`.

The objects are those of trainer.kubeflow.org/v1alpha1 as of Trainer 2.3
(https://github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from driftmill.contract import Contract
from driftmill.store import write_atomic
from pipelines.pods import CONFIG, QUEUE, SECRETS, SHARED_MEMORY, gpu_products, tolerations

#: The runtime that Kubeflow Trainer installs for PyTorch; its one container and job are `node`.
RUNTIME, NODE = "torch-distributed", "node"
#: Pods are named after the job, with an index and Trainer's suffix, in at most 63 characters.
MAX_NAME = 40
#: The contract stays on one line of the file.
MAX_LINE = 1_000_000

_COMMENT = """\
# Trains {model} on {nodes} node(s) with {processes} process(es) each, as one network (DDP), by
# Kubeflow Trainer 2.2 or newer. Run it before the pipeline, which then takes the result from the
# store instead of training on its one node:
#
#   kubectl create -f trainjob.yaml
#   kubectl wait --for=condition=Complete --timeout=24h trainjob -l driftmill/model={model}
#   kfp run create -e {model} -f pipeline.yaml
"""


def write(contract: Contract, path: Path, *, store: str, image: str) -> None:
    """Write a TrainJob for each candidate family; where one process trains, none, and a file from
    an earlier contract goes.

    Args:
        contract: what to train.
        path: the file.
        store: store that data, checkpoints and result lie in.
        image: image of the pods; it holds the driftmill package with PyTorch.
    """
    resources = contract.train.resources
    if not (contract.is_vision and resources.distributed):
        path.unlink(missing_ok=True)
        return
    jobs = [
        build(contract, family, store=store, image=image) for family in contract.train.candidates
    ]
    comment = _COMMENT.format(
        model=contract.model, nodes=resources.nodes, processes=max(resources.gpu, 1)
    )
    write_atomic(
        path, (comment + yaml.safe_dump_all(jobs, sort_keys=False, width=MAX_LINE)).encode()
    )


def build(contract: Contract, family: str, *, store: str, image: str) -> dict[str, Any]:
    """The TrainJob of one candidate family."""
    resources = contract.train.resources
    memory = {"memory": resources.memory}
    gpus = {resources.gpu_type: resources.gpu} if resources.gpu else {}
    queue = {QUEUE: resources.queue} if resources.queue else {}
    # torchrun takes the number of nodes and of processes, and whom to ask, from variables.
    command = ["torchrun", "--module", "driftmill.vision.job"]
    command += ["--family", family, "--store", store]
    # Kubernetes replaces $(NAME) in a command, and reads $$ as $.
    command += ["--contract", contract.to_json().replace("$", "$$"), "--job", "$(DRIFTMILL_JOB)"]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "generateName": f"{_name(contract.model, family)}-",
            "labels": {"driftmill/model": contract.model, "driftmill/family": family, **queue},
        },
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": image,
                "command": command,
                "env": [
                    {
                        "name": "DRIFTMILL_JOB",
                        "valueFrom": _label("jobset.sigs.k8s.io/jobset-name"),
                    },
                    *_references("configMapKeyRef", CONFIG),
                    *_references("secretKeyRef", SECRETS),
                ],
                "numNodes": resources.nodes,
                "numProcPerNode": max(resources.gpu, 1),
                "resourcesPerNode": {
                    "requests": {"cpu": resources.cpu, **memory, **gpus},
                    "limits": {**memory, **gpus},
                },
            },
            "runtimePatches": [
                {"manager": "driftmill/compile", "trainingRuntimeSpec": _patch(_pod(contract))}
            ],
        },
    }


def _name(model: str, family: str) -> str:
    """Begins with a letter, as the name of a TrainJob must."""
    name = f"train-{model}-{family}"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _label(name: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": f"metadata.labels['{name}']"}}


def _references(kind: str, names: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Variables that the pod reads from its namespace, as the pipeline's steps do."""
    return [
        {"name": key, "valueFrom": {kind: {"name": name, "key": key, "optional": True}}}
        for name, keys in names.items()
        for key in keys
    ]


def _pod(contract: Contract) -> dict[str, Any]:
    """Placement and shared memory of each pod."""
    resources = contract.train.resources
    memory = {"medium": "Memory", "sizeLimit": resources.shared_memory}
    mount = {"name": "shared-memory", "mountPath": SHARED_MEMORY}
    pod: dict[str, Any] = {
        "volumes": [{"name": "shared-memory", "emptyDir": memory}],
        "containers": [{"name": NODE, "volumeMounts": [mount]}],
    }
    if resources.node_selector:
        pod["nodeSelector"] = dict(resources.node_selector)
    if tolerated := [t.model_dump(exclude_none=True) for t in tolerations(resources)]:
        pod["tolerations"] = tolerated
    if expressions := gpu_products(resources):
        terms = [{"matchExpressions": expressions}]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        pod["affinity"] = {"nodeAffinity": required}
    return pod


def _patch(pod: dict[str, Any]) -> dict[str, Any]:
    """A patch of the runtime's pods."""
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
