"""`driftmill cluster explain` on pods that really cannot run.

With `DRIFTMILL_TEST_RECORD=tests/k8s/recorded` what the API says of them is kept there for
`tests/k8s/test_explain.py`, which also holds the sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from k8s.explain import main
from tests.cluster.objects import Namespace, record
from tests.cluster.test_gpu import PAUSE
from tests.k8s.test_explain import NEVER_MADE, sentence

SAFE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod(name: str, container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod that does nothing, with changes to its container and its spec."""
    main = {"name": "main", "image": PAUSE, "securityContext": SAFE, **(container or {})}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"case": name, **spec.pop("labels", {})}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [main],
            **spec,
        },
    }


def variable(kind: str, name: str, key: str) -> dict[str, Any]:
    """A container with one variable by reference."""
    return {"env": [{"name": "X", "valueFrom": {f"{kind}KeyRef": {"name": name, "key": key}}}]}


def volume(source: dict[str, Any]) -> dict[str, Any]:
    """What makes a pod mount a volume."""
    return {
        "container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]},
        "volumes": [{"name": "v", **source}],
    }


PODS = {
    "image-absent": pod("image-absent", {"image": "registry.invalid/python-tabular:1"}),
    "image-never": pod("image-never", {"image": "driftmill/none:1", "imagePullPolicy": "Never"}),
    "secret-absent": pod("secret-absent", variable("secret", "driftmill-store", "KEY")),
    "key-absent": pod("key-absent", variable("configMap", "kfp-launcher", "KEY")),
    "mount-absent": pod("mount-absent", **volume({"configMap": {"name": "none"}})),
    "claim-absent": pod("claim-absent", **volume({"persistentVolumeClaim": {"claimName": "none"}})),
    "claim-unbound": pod(
        "claim-unbound", **volume({"persistentVolumeClaim": {"claimName": "unbound"}})
    ),
    "command-absent": pod("command-absent", {"command": ["/none"]}),
    "deadline": pod("deadline", activeDeadlineSeconds=1),
    "gated": pod(
        "gated",
        schedulingGates=[{"name": "kueue.x-k8s.io/admission"}],
        labels={"kueue.x-k8s.io/queue-name": "gpu-queue"},
    ),
    "scheduler-absent": pod("scheduler-absent", schedulerName="none"),
    "runs": pod("runs"),
}


def waits_for_image(pod: dict[str, Any]) -> bool:
    return waiting(pod) in ("ErrImagePull", "ImagePullBackOff")


def waiting(pod: dict[str, Any]) -> str:
    """Why its container waits."""
    (container,) = pod["status"].get("containerStatuses") or [{}]
    return str(container.get("state", {}).get("waiting", {}).get("reason", ""))


def unscheduled(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in conditions)


REACHED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "image-absent": waits_for_image,
    "image-never": lambda p: waiting(p) == "ErrImageNeverPull",
    "secret-absent": lambda p: waiting(p) == "CreateContainerConfigError",
    "key-absent": lambda p: waiting(p) == "CreateContainerConfigError",
    "mount-absent": lambda p: bool(p["spec"].get("nodeName")),
    "claim-absent": unscheduled,
    "claim-unbound": unscheduled,
    "command-absent": lambda p: bool(p["status"]["phase"] == "Failed"),
    "deadline": lambda p: bool(p["status"]["phase"] == "Failed"),
    "gated": unscheduled,
    "scheduler-absent": lambda p: True,
    "runs": lambda p: bool(p["status"]["phase"] == "Running"),
}


@pytest.mark.parametrize("case", PODS)
def test_a_pod_that_cannot_run_says_why(
    namespace: Namespace, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    if case == "claim-unbound":
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        namespace.apply(
            {
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "unbound"},
                "spec": {**claim, "storageClassName": "none"},
            }
        )
        namespace.event("ProvisioningFailed", "unbound")
    namespace.apply(PODS[case])
    namespace.until(case, REACHED[case])
    if case == "mount-absent":
        namespace.event("FailedMount", case)
    said = sentence(case, namespace.surroundings(case))
    assert namespace.explain(case, case) == said
    arguments = ["--selector", f"case={case}", "-n", namespace.name]
    assert main([*arguments, "--context", namespace.cluster.context]) == 0
    assert capsys.readouterr().out == said + "\n"


def deployment(case: str) -> dict[str, Any]:
    """A Deployment whose pods are refused."""
    body = pod(case)
    spec = {**body["spec"], "restartPolicy": "Always"}
    match case:
        case "level":
            spec["securityContext"] = {}
        case "quota":
            limits = {"nvidia.com/gpu": "1"}
            spec["containers"][0] |= {"resources": {"limits": limits}}
        case "account":
            spec["serviceAccountName"] = "none"
    template = {"metadata": body["metadata"], "spec": spec}
    selector = {"matchLabels": body["metadata"]["labels"]}
    return {
        "kind": "Deployment",
        "metadata": {"name": case},
        "spec": {"replicas": 1, "selector": selector, "template": template},
    }


@pytest.mark.parametrize("case", NEVER_MADE)
def test_a_pod_that_was_never_made_says_why(
    namespace: Namespace, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    if case == "quota":
        namespace.apply(
            {
                "kind": "ResourceQuota",
                "metadata": {"name": "no-gpus"},
                "spec": {"hard": {"requests.nvidia.com/gpu": "0"}},
            }
        )
        namespace.until_quota("no-gpus")
    namespace.apply(deployment(case))
    namespace.event("FailedCreate", case)
    events = namespace.cluster.json(namespace.cluster.core.list_namespaced_event(namespace.name))
    told = [e for e in events if e["involvedObject"]["name"].startswith(f"{case}-")]
    record(case, {"events": told[:1]})
    arguments = ["--selector", f"case={case}", "-n", namespace.name]
    assert main([*arguments, "--context", namespace.cluster.context]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    pattern = NEVER_MADE[case].format(namespace=namespace.name)
    assert said.startswith(f"{case}-")
    assert said.partition(" was refused: ")[2] == pattern


def test_a_pod_that_is_not_there(namespace: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nobody", "-n", namespace.name, "--context", namespace.cluster.context]) == 1
    assert capsys.readouterr().err.startswith(
        f"there is no pod nobody in the namespace {namespace.name}"
    )


def test_a_context_that_is_not_there(
    namespace: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["x", "--context", "nowhere"]) == 2
    assert "no usable context nowhere" in capsys.readouterr().err
