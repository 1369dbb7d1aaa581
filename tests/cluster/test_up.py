"""`driftmill cluster up`, `status` and `down` on a real kind cluster, and what its policies let
through. Without the pipelines: their images come from registries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import tools
from k8s.manifests import ROOT

NAME = "driftmill-up"
CONTEXT = f"kind-{NAME}"
#: Any image with Python; for pods that stand in for servers and their callers.
IMAGE = os.environ.get("DRIFTMILL_TEST_IMAGE", "python:3.11-slim")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A kind configuration without ports, and a kubeconfig of its own; no cluster yet."""
    for program in ("docker", "kind", "kubectl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("Docker does not answer")
    folder = tmp_path_factory.mktemp("up")
    document = yaml.safe_load((ROOT / "kind.yaml").read_text())
    for node in document["nodes"]:
        node.pop("extraPortMappings", None)
    path = folder / "kind.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        yield path
        tools.delete(NAME)


def driftmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "k8s.cluster", *arguments]
    return subprocess.run(program, capture_output=True, text=True)


def up(config: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--name", NAME, "--config", str(config), "--without", "pipelines"]
    return driftmill("up", *arguments, "--timeout", "10m")


@pytest.fixture(scope="module")
def made(config: Path) -> str:
    """What `up` printed."""
    done = up(config)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return done.stdout


def test_up_makes_a_cluster_with_a_gpu_node(made: str) -> None:
    assert "3 nodes made" in made
    done = driftmill("status", "--name", NAME, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0
    assert facts["ready"]
    assert [n["gpus"] for n in facts["nodes"]] == [0, 0, 2]
    assert facts["installed"] == {
        "base": True, "pipelines": False, "kueue": False, "trainer": False,
    }  # fmt: skip
    taints = kubectl("get", "node", f"{NAME}-worker2", "-o", "jsonpath={.spec.taints[*].key}")
    assert "nvidia.com/gpu" in taints.split()


def test_up_again_finds_all_there(made: str, config: Path) -> None:
    before = kubectl(
        "get", "networkpolicies", "-A", "-o", "jsonpath={.items[*].metadata.resourceVersion}"
    )
    done = up(config)
    assert done.returncode == 0, done.stderr
    assert "there already" in done.stdout
    after = kubectl(
        "get", "networkpolicies", "-A", "-o", "jsonpath={.items[*].metadata.resourceVersion}"
    )
    assert after == before


#: Pods that stand in for servers and callers: namespace, labels, ports.
RUN = {"workflows.argoproj.io/workflow": "run"}
OURS = {"app.kubernetes.io/part-of": "driftmill"}
PODS: dict[str, tuple[str, Mapping[str, str], Sequence[int]]] = {
    "mysql": ("kubeflow", {"app": "mysql"}, [3306]),
    "metadata-grpc": ("kubeflow", {"component": "metadata-grpc-server"}, [8080]),
    "metadata-envoy": ("kubeflow", {"component": "metadata-envoy"}, [9090]),
    "ml-pipeline": ("kubeflow", {"app": "ml-pipeline"}, [8888, 8887]),
    "agent": ("kubeflow", {"app": "ml-pipeline-persistenceagent"}, []),
    "page": ("kubeflow", {"app": "ml-pipeline-ui"}, [3000]),
    "store": ("kubeflow", {"app": "seaweedfs"}, [8333]),
    "argo": ("kubeflow", {"app": "workflow-controller"}, []),
    "run": ("kubeflow", RUN, [5000]),
    "rank-0": ("kubeflow", OURS, [29500]),
    "rank-1": ("kubeflow", OURS, []),
    "service": ("driftmill", OURS, [3000]),
    "controller": ("driftmill", OURS, [3002]),
    "stranger": ("driftmill", {}, []),
    "outside": ("default", {}, [7070]),
    "gateway": ("gateway", {}, []),
}
API = ("kubernetes.default", 443)
#: Who calls whom, and whether it gets through.
CALLS: list[tuple[str, tuple[str, int], bool]] = [
    ("ml-pipeline", ("mysql", 3306), True),
    ("metadata-grpc", ("mysql", 3306), True),
    ("run", ("mysql", 3306), False),
    ("page", ("mysql", 3306), False),
    ("run", ("metadata-grpc", 8080), True),
    ("metadata-envoy", ("metadata-grpc", 8080), True),
    ("ml-pipeline", ("metadata-grpc", 8080), True),
    ("page", ("metadata-envoy", 9090), True),
    ("run", ("metadata-envoy", 9090), False),
    ("run", ("ml-pipeline", 8887), True),
    ("agent", ("ml-pipeline", 8888), True),
    ("page", ("ml-pipeline", 8888), True),
    ("controller", ("ml-pipeline", 8888), True),
    ("stranger", ("ml-pipeline", 8888), False),
    ("outside", ("ml-pipeline", 8888), False),
    ("outside", ("page", 3000), False),
    ("ml-pipeline", ("store", 8333), True),
    ("page", ("store", 8333), True),
    ("run", ("store", 8333), True),
    ("rank-0", ("store", 8333), True),
    ("service", ("store", 8333), True),
    ("outside", ("store", 8333), False),
    ("ml-pipeline", ("run", 5000), False),
    ("rank-1", ("rank-0", 29500), True),
    ("run", ("rank-0", 29500), False),
    ("run", ("outside", 7070), True),
    ("service", ("outside", 7070), True),
    ("ml-pipeline", ("outside", 7070), False),
    ("run", ("service", 3000), False),
    ("controller", ("service", 3000), True),
    ("gateway", ("service", 3000), True),
    ("outside", ("service", 3000), False),
    ("ml-pipeline", API, True),
    ("agent", API, True),
    ("argo", API, True),
    ("run", API, True),
    ("mysql", API, False),
    ("store", API, False),
    ("stranger", API, False),
]

SERVER = """
import socket, sys, time
sockets = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
time.sleep(3600)
"""
CALLER = """
import json, socket, sys
for host, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((host, port), timeout=3).close()
        print(1)
    except OSError:
        print(0)
"""


@pytest.fixture(scope="module")
def addresses(made: str) -> dict[str, str]:
    """Addresses of the pods, by name."""
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode:
        pytest.skip(f"the image {IMAGE} is not in Docker; DRIFTMILL_TEST_IMAGE names another")
    tools.load(NAME, [IMAGE], timeout=300)
    gateway = {"metadata": {"name": "gateway", "labels": {"driftmill/may-call": "true"}}}
    objects = [{"apiVersion": "v1", "kind": "Namespace", **gateway}]
    objects += [pod(name, *about) for name, about in PODS.items()]
    tools.apply(CONTEXT, yaml.safe_dump_all(objects), timeout=120)
    found = {}
    for name, (namespace, _, _) in PODS.items():
        kubectl("-n", namespace, "wait", f"pod/{name}", "--for=condition=Ready", "--timeout=180s")
        found[name] = kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}")
    return found


def pod(name: str, namespace: str, labels: Mapping[str, str], ports: Sequence[int]) -> Any:
    # What Kubeflow Pipelines puts on all its own pods.
    upstream = {} if labels in (RUN, OURS, {}) else {"application-crd-id": "kubeflow-pipelines"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {**labels, **upstream}},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-c", SERVER, *map(str, ports)],
                    "resources": {"requests": {"cpu": "1m", "memory": "16Mi"}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }


def test_policies_let_through_what_is_needed_and_nothing_else(addresses: dict[str, str]) -> None:
    # They are applied some seconds after the pods have come.
    end = time.monotonic() + 120
    while wrong := disagreeing(addresses):
        assert time.monotonic() < end, "\n".join(wrong)


def disagreeing(addresses: dict[str, str]) -> list[str]:
    wrong = []
    for caller in dict.fromkeys(who for who, _, _ in CALLS):
        calls = [(whom, allowed) for who, whom, allowed in CALLS if who == caller]
        targets = [[addresses.get(name, name), port] for (name, port), _ in calls]
        arguments = ["python3", "-c", CALLER, json.dumps(targets)]
        answers = kubectl("-n", PODS[caller][0], "exec", caller, "--", *arguments).split()
        for ((name, port), allowed), answer in zip(calls, answers, strict=True):
            if (answer == "1") != allowed:
                outcome = "gets through" if answer == "1" else "is stopped"
                wrong.append(f"{caller} -> {name}:{port} {outcome}")
    return wrong


def test_down_removes_it_and_then_has_nothing_to_do(made: str) -> None:
    done = driftmill("down", "--name", NAME)
    assert done.returncode == 0
    assert f"removed the kind cluster {NAME}" in done.stdout
    assert tools.nodes(NAME) == []
    assert "there is no kind cluster" in driftmill("down", "--name", NAME).stdout


def kubectl(*arguments: str) -> str:
    done = tools.run(["kubectl", "--context", CONTEXT, *arguments], timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout
