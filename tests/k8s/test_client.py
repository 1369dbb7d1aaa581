from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s import client
from k8s.client import Cluster, ClusterError, Deadline
from tests.k8s.conftest import Api, kubeconfig

PODS = "/api/v1/namespaces/kubeflow/pods"
EVENTS = "/api/v1/namespaces/kubeflow/events"
SERVER = "/apis/apps/v1/namespaces/kubeflow/deployments/server"
KINDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def deployment(ready: int = 1, generation: int = 1, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "server", "namespace": "kubeflow", "generation": 1},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "server"}}},
        "status": {
            "observedGeneration": generation,
            "replicas": 1,
            "updatedReplicas": 1,
            "availableReplicas": ready,
            **status,
        },
    }


def pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "server-1", "namespace": "kubeflow", "uid": "u"},
        "spec": {"nodeName": "worker", "containers": [{"name": "main", "image": "a:1"}]},
        "status": {"phase": "Pending", **status},
    }


def waiting(reason: str, message: str = "", restarts: int = 0) -> dict[str, Any]:
    return {
        "name": "main",
        "image": "a:1",
        "ready": False,
        "restartCount": restarts,
        "state": {"waiting": {"reason": reason, "message": message}},
        "lastState": {"terminated": {"exitCode": 3, "reason": "Error"}},
    }


def condition(name: str, value: str = "True") -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": value}]}


def test_a_context_that_is_not_there(api: Api) -> None:
    with pytest.raises(ClusterError, match=r"no usable context production .*; it has test;"):
        Cluster("production")


def test_no_kubeconfig_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="it has none; `driftmill cluster up` makes"):
        Cluster("kind-driftmill")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not know you; log in anew"),
        (403, "you may not read /version of the cluster test; ask its administrator"),
        (404, "has no /version"),
        (418, "answered 418"),
        (503, "is not ready"),
    ],
)
def test_refusals_are_explained(api: Api, status: int, message: str) -> None:
    api.answers["/version"] = status
    with pytest.raises(ClusterError, match=message):
        Cluster("test").get("/version")


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig(tmp_path / "kubeconfig", "http://127.0.0.1:1")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(client.UnreachableError, match="does not answer; see whether it runs"):
        Cluster("test").get("/version")


def test_what_is_not_there_is_none(api: Api) -> None:
    cluster = Cluster("test")
    assert cluster.find("/api/v1/namespaces/a") is None
    assert cluster.items("/apis/unknown/v1/things") == []
    api.answers["/api/v1/nodes"] = {"items": [{"a": 1}]}
    assert cluster.items("/api/v1/nodes", labelSelector="a=b") == [{"a": 1}]
    assert api.asked[-1] == "/api/v1/nodes?labelSelector=a%3Db"


def test_status_is_merged(api: Api) -> None:
    Cluster("test").patch_status("/api/v1/nodes/n", {"capacity": {"nvidia.com/gpu": "1"}})
    assert api.patched == [
        ("/api/v1/nodes/n/status", {"status": {"capacity": {"nvidia.com/gpu": "1"}}})
    ]


def test_waiting_ends_when_all_is_ready(api: Api) -> None:
    answers = iter([deployment(0), deployment(1, generation=0), deployment(1)])
    api.answers[SERVER] = lambda: next(answers, deployment(1))
    api.answers[PODS] = {"items": [pod()]}
    told: list[str] = []
    client.wait_for_deployments(
        Cluster("test"), [("kubeflow", "server")], Deadline(30), told.append
    )
    assert told == ["0 of 1 ready", "1 of 1 ready"]


def wait(seconds: float = 30) -> str:
    with pytest.raises(ClusterError) as caught:
        client.wait_for_deployments(Cluster("test"), [("kubeflow", "server")], Deadline(seconds))
    return str(caught.value)


def test_an_image_that_is_not_there_ends_the_wait(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PULL_PATIENCE", 0.1)
    api.answers[SERVER] = deployment(0)
    back_off = waiting("ImagePullBackOff", "Back-off pulling image: not found")
    api.answers[PODS] = {"items": [pod(containerStatuses=[back_off])]}
    api.answers[EVENTS] = {
        "items": [
            {
                "reason": "Failed",
                "message": "no such\nhost",
                "lastTimestamp": "2026-01-01T02:00:00Z",
            },
            {"reason": "Pulling", "message": "image a:1", "lastTimestamp": "2026-01-01T01:00:00Z"},
        ]
    }
    assert wait().splitlines() == [
        "the Deployment kubeflow/server: server-1 waits on worker: ImagePullBackOff, the image a:1"
        " cannot be had (Back-off pulling image: not found); `docker pull a:1` here and start"
        " again, which loads it, or name a mirror with --image-prefix",
        "its last events:",
        "  Pulling: image a:1",
        "  Failed: no such host",
    ]


def test_pods_that_could_not_pull_are_made_anew(api: Api) -> None:
    api.answers[SERVER] = deployment(0)
    stuck = pod(initContainerStatuses=[waiting("ImagePullBackOff")], containerStatuses=None)
    starting = pod(containerStatuses=[waiting("PodInitializing")])
    starting["metadata"] = {**starting["metadata"], "name": "server-2"}
    api.answers[PODS] = {"items": [stuck, starting]}
    client.retry_pulls(Cluster("test"), [("kubeflow", "server"), ("kubeflow", "other")])
    assert api.deleted == [f"{PODS}/server-1"]


def test_an_image_may_stumble(api: Api) -> None:
    api.answers[SERVER] = deployment(0)
    once = iter([waiting("ErrImagePull")])
    api.answers[PODS] = lambda: {"items": [pod(containerStatuses=list(once))]}
    failing: dict[str, float] = {}
    cluster, server = Cluster("test"), [("kubeflow", "server")]
    assert client.final_trouble(cluster, server, failing) is None
    assert list(failing) == ["u/main"]


def test_a_pod_that_is_refused_ends_the_wait(api: Api) -> None:
    message = (
        'pods "server-1" is forbidden: violates PodSecurity "restricted:latest":'
        " runAsNonRoot != true"
    )
    refused = {"type": "ReplicaFailure", "status": "True", "message": message}
    api.answers[SERVER] = deployment(0, conditions=[refused])
    assert wait().startswith("the Deployment kubeflow/server: server-1 was refused: its namespace")


def test_a_container_that_crashes_again_and_again_ends_the_wait(api: Api) -> None:
    api.answers[SERVER] = deployment(0)
    crashed = waiting("CrashLoopBackOff", restarts=client.RESTARTS)
    api.answers[PODS] = {"items": [pod(containerStatuses=[crashed])]}
    assert "server-1 crashes again and again on worker: main ended with exit code 3" in wait()


def test_the_deadline_names_what_is_not_ready(api: Api) -> None:
    api.answers[SERVER] = deployment(0)
    api.answers[PODS] = {"items": [pod()]}
    began = time.monotonic()
    told = wait(1.5)
    assert 1.4 < time.monotonic() - began < 10
    assert told.startswith("after 2 s these are not ready: kubeflow/server. server-1 starts on")


def test_kinds_and_nodes_are_waited_for(api: Api) -> None:
    new = {"metadata": {"name": "a.b"}, "status": {"conditions": None}}  # as the API says it
    kinds: Iterator[dict[str, Any]] = iter([{"items": []}, {"items": [new]}])
    established = {"metadata": {"name": "a.b"}, "status": condition("Established")}
    api.answers[KINDS] = lambda: next(kinds, {"items": [established]})
    client.wait_for_kinds(Cluster("test"), ["a.b"], Deadline(20))
    with pytest.raises(ClusterError, match=r"not Established: c\.d; `kubectl describe crd`"):
        client.wait_for_kinds(Cluster("test"), ["a.b", "c.d"], Deadline(0))
    api.answers["/api/v1/nodes"] = {
        "items": [
            {"metadata": {"name": "n1"}, "status": condition("Ready")},
            {"metadata": {"name": "n2"}, "status": condition("Ready", "False")},
        ]
    }
    client.wait_for_nodes(Cluster("test"), 1, Deadline(5))
    with pytest.raises(ClusterError, match="1 of 2 nodes are ready; waiting for n2"):
        client.wait_for_nodes(Cluster("test"), 2, Deadline(0))


def test_deadlines() -> None:
    assert Deadline(0).passed()
    assert Deadline(0).left() == 1.0
    assert not Deadline(60).passed()
    assert 59 < Deadline(60).left() <= 60
