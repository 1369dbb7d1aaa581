"""Why a pod does not run, on objects recorded from a cluster (`tests/cluster/test_explain.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k8s.explain import CONTROL_PLANE, KUEUE_GATE, KUEUE_QUEUE, explain, main, refusal, requests

RECORDED = Path(__file__).with_name("recorded")

#: What is said of each recorded pod.
SENTENCES = {
    "image-absent": (
        "image-absent waits on {node}: the image registry.invalid/python-tabular:1 cannot be "
        "pulled, as its registry cannot be reached from the node; `driftmill images build --push` "
        "puts it into a registry, `kind load docker-image registry.invalid/python-tabular:1` onto "
        "the nodes of kind."
    ),
    "image-never": (
        "image-never waits on {node}: the image driftmill/none:1 is not on the node and its pull "
        "policy is Never; `driftmill images build --push` puts it into a registry, "
        "`kind load docker-image driftmill/none:1` onto the nodes of kind."
    ),
    "secret-absent": (
        "secret-absent waits on {node}: the Secret driftmill-store is missing from its namespace; "
        "create it (`kubectl create secret generic driftmill-store --from-literal=KEY=VALUE`)."
    ),
    "key-absent": (
        "key-absent waits on {node}: the ConfigMap kfp-launcher has no key KEY; add it."
    ),
    "mount-absent": (
        "mount-absent waits on {node}: the ConfigMap none is missing from its namespace; "
        "create it (`kubectl create configmap none --from-literal=KEY=VALUE`)."
    ),
    "claim-absent": (
        "claim-absent waits: the volume claim none does not exist; "
        "create it in the pod's namespace."
    ),
    "claim-unbound": (
        "claim-unbound waits: the volume claim unbound (of storage class none) has no volume: "
        'storageclass.storage.k8s.io "none" not found; '
        "`kubectl get storageclass` lists the classes that there are."
    ),
    "command-absent": (
        'command-absent failed: the image of main has no program "/none"; correct the command or '
        "build the image again."
    ),
    "deadline": "deadline failed: it ran longer than its 1 s; raise train.resources.timeout.",
    "gated": (
        "gated waits: Kueue has not admitted it from the queue gpu-queue; wait for quota, or see "
        "`kubectl get localqueue,workload`."
    ),
    "scheduler-absent": (
        "scheduler-absent waits: no scheduler has looked at it yet, and it asks for the one called "
        "none; see whether that runs."
    ),
    "runs": "runs runs on {node}.",
    "memory": (
        "{name} failed: main was killed because it used more than its 128Mi of memory; "
        "raise train.resources.memory."
    ),
    "gpu-taint": (
        "{name} waits: the taint nvidia.com/gpu=present:NoSchedule of {gpu_node} is not tolerated; "
        "add a toleration to train.resources.tolerations."
    ),
    "gpu-too-many": (
        "{name} waits: it asks for 8 nvidia.com/gpu, more than the 1 of {gpu_node}; "
        "lower train.resources.gpu or add a larger node."
    ),
    "gpu-product": (
        "{name} waits: it asks for nodes with nvidia.com/gpu.product=NVIDIA-L4, and "
        "nvidia.com/gpu.product of {gpu_node} is NVIDIA-H100-80GB-HBM3; "
        "add such a node or change train.resources.gpu_products."
    ),
    "gpu-two-reasons": (
        "{name} waits: it asks for nodes with nvidia.com/gpu.product in NVIDIA-L4, NVIDIA-A10, and "
        "nvidia.com/gpu.product of {gpu_node} is NVIDIA-H100-80GB-HBM3, and it asks for "
        "2 nvidia.com/gpu, more than the 1 of {gpu_node}; add such a node or change "
        "train.resources.gpu_products, and lower train.resources.gpu or add a larger node."
    ),
    "gpu-type": (
        "{name} waits: it asks for 1 amd.com/gpu, and no node has any; "
        "add a GPU node, or install the device plugin that announces its GPUs."
    ),
    "gpu-selector": (
        "{name} waits: it asks for nodes with pool=train, and no node has the label pool; label a "
        "node (`kubectl label node NODE pool=train`) or change train.resources.node_selector."
    ),
    "gpu-cpu": (
        "{name} waits: it asks for 400 CPU, more than the {cpu} of {gpu_node}; "
        "lower train.resources.cpu or add a larger node."
    ),
    "gpu-taken": (
        "{name} waits: it asks for 1 nvidia.com/gpu, and of the 1 of {gpu_node} none is free "
        "({taker} holds the rest); wait until that ends, lower train.resources.gpu or add a node."
    ),
}
#: What is said of pods that were refused, after `NAME was refused: `.
NEVER_MADE = {
    "level": (
        "its namespace takes only pods of the restricted Pod Security level, and this one breaks "
        "it (runAsNonRoot != true, seccompProfile); set a security context that passes, as "
        "compiled packages do."
    ),
    "quota": (
        "it exceeds the quota no-gpus of its namespace (requested: requests.nvidia.com/gpu=1, "
        "used: requests.nvidia.com/gpu=0, limited: requests.nvidia.com/gpu=0); wait until other "
        "pods have ended, ask for less in train.resources, or raise the quota."
    ),
    "account": (
        "the service account none is missing from the namespace {namespace}; "
        "`kubectl -n {namespace} create serviceaccount none` makes it."
    ),
}


def recorded(case: str) -> dict[str, Any]:
    """What a cluster said: the arguments of `explain`."""
    around: dict[str, Any] = json.loads((RECORDED / f"{case}.json").read_text())
    return around


def sentence(case: str, around: dict[str, Any]) -> str:
    """What is to be said of a pod in its surroundings."""
    pod, nodes, pods = around["pod"], around.get("nodes", []), around.get("pods", [])
    gpu: dict[str, Any] = next(
        (n for n in nodes if "nvidia.com/gpu" in n["status"]["allocatable"]), {}
    )
    placed = [p for p in pods if p["spec"].get("nodeName")]
    takers = [p["metadata"] for p in placed if "nvidia.com/gpu" in requests(p)]
    return SENTENCES[case].format(
        name=pod["metadata"]["name"],
        node=pod["spec"].get("nodeName"),
        gpu_node=gpu.get("metadata", {}).get("name"),
        cpu=gpu.get("status", {}).get("allocatable", {}).get("cpu"),
        taker=next((f"{t['namespace']}/{t['name']}" for t in takers), None),
    )


@pytest.mark.parametrize("case", SENTENCES)
def test_a_recorded_pod_says_why(case: str) -> None:
    around = recorded(case)
    assert explain(**around) == sentence(case, around)


@pytest.mark.parametrize("case", NEVER_MADE)
def test_a_recorded_refusal_says_why(case: str) -> None:
    (event,) = recorded(case)["events"]
    said = NEVER_MADE[case].format(namespace=event["metadata"]["namespace"])
    assert refusal(event["message"]).partition(" was refused: ")[2] + "." == said


# --- what a test cluster cannot show ---


def node(name: str, **changes: Any) -> dict[str, Any]:
    """A node with two cores and 4 GiB."""
    allocatable = {"cpu": "2", "memory": "4Gi", "pods": "110", **changes.pop("allocatable", {})}
    return {
        "metadata": {"name": name, "labels": changes.pop("labels", {})},
        "spec": changes,
        "status": {"allocatable": allocatable},
    }


def pod(name: str = "fit", *, asks: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod that asks for something."""
    container = {"name": "main", "image": "i", "resources": {"requests": asks or {"cpu": "1"}}}
    return {
        "metadata": {"name": name, "namespace": "kubeflow", "labels": spec.pop("labels", {})},
        "status": spec.pop("status", {"phase": "Pending"}),
        "spec": {"containers": [container], **spec},
    }


def event(reason: str, message: str, kind: str = "Pod", name: str = "fit", at: int = 0) -> Any:
    """An event about the pod, `at` minutes after the first."""
    return {
        "reason": reason,
        "message": message,
        "type": "Warning",
        "involvedObject": {"kind": kind, "name": name},
        "lastTimestamp": f"2026-01-01T00:{at:02}:00Z",
    }


def started(**status: Any) -> dict[str, Any]:
    """A pod on a node, with the status of its container."""
    return pod(
        nodeName="n",
        status={
            "phase": status.pop("phase", "Pending"),
            "containerStatuses": [{"name": "main", "image": "i", **status}],
        },
    )


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            [node("plane", taints=[{"key": CONTROL_PLANE, "effect": "NoSchedule"}]),
             node("cordoned", taints=[{"key": "node.kubernetes.io/unschedulable",
                                       "effect": "NoSchedule"}])],
            "cordoned would do, but is cordoned; `kubectl uncordon NODE` opens it again",
        ),
        (
            [node("c", allocatable={"cpu": "100m"}), node("a", allocatable={"cpu": "500m"}),
             node("b", allocatable={"cpu": "0.5"})],
            "it asks for 1 CPU, more than the 0.5 of a and b; "
            "lower train.resources.cpu or add a larger node",
        ),
        (
            [node("small", allocatable={"cpu": "500m"}),
             node("tainted", taints=[{"key": "spot", "value": "true", "effect": "NoExecute"}])],
            "the taint spot=true:NoExecute of tainted is not tolerated; "
            "add a toleration to train.resources.tolerations",
        ),
        (
            [node("full", allocatable={"pods": "0"})],
            "full holds as many pods as it may; wait, or add a node",
        ),
    ],
)  # fmt: skip
def test_the_node_that_is_nearest_is_named(nodes: list[dict[str, Any]], said: str) -> None:
    assert explain(pod(), nodes) == f"fit waits: {said}."


def test_what_others_take_is_told_in_gibibytes() -> None:
    other = pod("other", asks={"memory": "3Gi"}, nodeName="n", status={"phase": "Running"})
    ended = pod("ended", asks={"memory": "4Gi"}, nodeName="n", status={"phase": "Succeeded"})
    said = explain(pod(asks={"memory": "1536Mi"}), [node("n")], pods=[other, ended])
    assert said == (
        "fit waits: it asks for 1.5 GiB of memory, and of the 4 GiB of n only 1 GiB is free "
        "(kubeflow/other holds the rest); wait until that ends, lower train.resources.memory or "
        "add a node."
    )


def test_requests_are_what_the_scheduler_counts() -> None:
    asks = pod(
        initContainers=[
            {"name": "big", "resources": {"requests": {"cpu": "3"}}},
            {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
        ],
        overhead={"memory": "64Mi"},
    )
    asks["spec"]["containers"][0]["resources"]["limits"] = {"nvidia.com/gpu": "2", "cpu": "8"}
    assert requests(asks) == {"cpu": 3, "nvidia.com/gpu": 2, "memory": 64 * 2**20}


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"operator": "In", "values": ["a", "b"]}, True),
        ({"operator": "NotIn", "values": ["a"]}, False),
        ({"operator": "Exists"}, True),
        ({"operator": "DoesNotExist"}, False),
    ],
)
def test_node_affinity_is_read_as_the_scheduler_does(rule: dict[str, Any], fits: bool) -> None:
    term = {"matchExpressions": [{"key": "zone", **rule}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    asks = pod(affinity={"nodeAffinity": required})
    said = explain(asks, [node("n", labels={"zone": "a"})])
    assert ("asks for nodes with" in said) is not fits


def test_where_a_node_would_do_the_scheduler_is_quoted() -> None:
    asks = pod()
    assert explain(asks, [node("n")]) == (
        "fit waits: no scheduler has looked at it yet; ask again in some seconds."
    )
    told = [
        event("FailedScheduling", "0/1 nodes are available: 1 node(s) had volume zone conflict."),
        event("FailedScheduling", "an older reason", at=-0),
        event("FailedScheduling", "of another pod", name="other", at=9),
    ]
    told[0]["lastTimestamp"] = "2026-01-01T00:05:00Z"
    assert explain(asks, [node("n")], told) == (
        "fit waits: the scheduler says: 0/1 nodes are available: 1 node(s) had volume zone "
        "conflict."
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("failed to resolve reference: not found", "does not exist in its registry"),
        ("pull access denied", "is refused by its registry, which wants credentials"),
        ("dial tcp: lookup x: no such host", "its registry cannot be reached from the node"),
        ("disk quota", "cannot be pulled (disk quota)"),
    ],
)
def test_an_image_that_cannot_be_pulled(message: str, said: str) -> None:
    waiting = {"waiting": {"reason": "ErrImagePull", "message": message}}
    assert said in explain(started(state=waiting))


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (
            {"reason": "OOMKilled", "exitCode": 137},
            "main was killed because it used more than its 1Gi of memory; "
            "raise train.resources.memory",
        ),
        (
            {"reason": "Error", "exitCode": 3, "message": "bad\nrows"},
            "main ended with exit code 3 (bad rows); `kubectl logs fit -c main` says why",
        ),
    ],
)
def test_how_a_container_died(ended: dict[str, Any], said: str) -> None:
    dead = started(phase="Failed", state={"terminated": ended})
    dead["spec"]["containers"][0]["resources"]["limits"] = {"memory": "1Gi"}
    assert explain(dead) == f"fit failed: {said}."
    again = started(
        phase="Running",
        state={"waiting": {"reason": "CrashLoopBackOff"}},
        lastState={"terminated": ended},
    )
    again["spec"] = dead["spec"]
    assert explain(again) == f"fit crashes again and again on n: {said}."


@pytest.mark.parametrize(
    "message",
    [
        "container has runAsNonRoot and image will run as root (pod: ..., container: main)",
        "container has runAsNonRoot and image has non-numeric user (bentoml), cannot verify user "
        "is non-root",
    ],
)
def test_an_image_that_would_run_as_root(message: str) -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": message}
    assert explain(started(state={"waiting": waiting})) == (
        "fit waits on n: its image i would run as root, or does not name its user by number; "
        "rebuild it with `driftmill images build` or set runAsUser."
    )


def test_what_happens_on_the_node() -> None:
    on_node = started(state={"waiting": {"reason": "ContainerCreating"}})
    assert explain(on_node) == "fit starts on n; ask again in some seconds."
    pulls = explain(on_node, events=[event("Pulling", 'Pulling image "i"')])
    assert pulls == "fit waits on n, which pulls its image; ask again in a minute."
    unready = started(phase="Running", ready=False, state={"running": {}})
    probe = event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")
    assert explain(unready, events=[probe]) == (
        "fit runs on n, but main is not ready: Readiness probe failed: HTTP probe failed with "
        "statuscode: 503; `kubectl logs fit` says more."
    )


def test_kueue_is_quoted() -> None:
    gated = pod(schedulingGates=[{"name": KUEUE_GATE}], labels={KUEUE_QUEUE: "q"})
    told = event(
        "Pending", "insufficient unused quota for nvidia.com/gpu, 1 more needed", "Workload",
        "pod-fit-a1b2c",
    )  # fmt: skip
    assert explain(gated, events=[told]) == (
        "fit waits: Kueue has not admitted it from the queue q (insufficient unused quota for "
        "nvidia.com/gpu, 1 more needed); wait for quota, or see `kubectl get localqueue,workload`."
    )


def test_an_older_pod_of_the_same_name_is_left_aside() -> None:
    asks = pod()
    asks["metadata"]["uid"] = "new"
    told = event("FailedScheduling", "an older story")
    told["involvedObject"]["uid"] = "old"
    assert "older story" not in explain(asks, [], [told])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            'pods "fit" is forbidden: failed quota: cpu: must specify limits.cpu for: main',
            "fit was refused: the quota cpu demands that every container states limits.cpu for: "
            "main; state it, or give the namespace a LimitRange with defaults",
        ),
        (
            'pods "fit" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi',
            "fit was refused: a LimitRange of its namespace sets a maximum memory of 1Gi for a "
            "container; ask for what lies within, or change it",
        ),
        (
            'pods is forbidden: User "system:serviceaccount:kubeflow:argo" cannot create resource '
            '"pods" in API group "" in the namespace "kubeflow"',
            "the pod was refused: system:serviceaccount:kubeflow:argo may not create pods there; "
            "bind a Role that allows it",
        ),
        ('pods "fit" is forbidden: by a webhook', "fit was refused: by a webhook"),
    ],
)  # fmt: skip
def test_other_refusals(message: str, said: str) -> None:
    assert refusal(message) == said


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["fit", "--selector", "a=b"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert "name a pod, or give --selector" in capsys.readouterr().err


def test_a_cluster_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(config))
    config.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "away", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "away",
            }
        )
    )
    monkeypatch.delenv("DRIFTMILL_CONTEXT", raising=False)
    assert main(["fit"]) == 2  # not the current context
    assert "no usable context kind-driftmill" in capsys.readouterr().err
    assert main(["fit", "--context", "away"]) == 1
    said = capsys.readouterr().err
    assert "the cluster of context away does not answer" in said
    assert len(said.splitlines()) == 1
