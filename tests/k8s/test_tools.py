from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from k8s import tools
from k8s.manifests import ROOT
from k8s.tools import ToolError

Program = Callable[[str, str], None]


def test_the_configuration_is_marked_as_ours() -> None:
    config = tools.read_config(ROOT / "kind.yaml")
    assert config.node_count == 3
    assert config.ports == [("127.0.0.1", 8080), ("127.0.0.1", 8090)]
    for node in config.document["nodes"]:
        assert node["extraMounts"] == [
            {"hostPath": "/dev/null", "containerPath": tools.MARK, "readOnly": True}
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; name a kind configuration by --config"),
        ("kind: Pod", "is not a kind configuration"),
        ("- a", "is not a kind configuration"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_configurations(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "kind.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ToolError, match=message) as caught:
        tools.read_config(path)
    assert "\n" not in str(caught.value)


def test_a_configuration_without_nodes_has_one(tmp_path: Path) -> None:
    path = tmp_path / "kind.yaml"
    path.write_text("kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\n")
    assert tools.read_config(path).node_count == 1


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("ERROR: failed to create cluster: Cannot connect to the Docker daemon", "does not answer"),
        ("dial unix /var/run/docker.sock: connect: permission denied", "join the group docker"),
        ("write /x.tar: no space left on device", "the disk is full: make room with"),
        ("Bind for 127.0.0.1:8080 failed: port is already allocated", "other host ports"),
        ("ERROR: failed to pull image kindest/node:v9", "KIND_NODE_IMAGE"),
        ("inotify: too many open files", "max_user_instances"),
        ('deployments.apps is forbidden: User "a" cannot create resource', "may not do that"),
        ("first\nERROR: what went wrong\nStack:", "what went wrong"),
        ("ERROR: failed\ndocker: Error response from daemon: Conflict.\nx", "Conflict."),
        ("", "it said nothing"),
    ],
)
def test_what_programs_say_is_explained(said: str, means: str) -> None:
    assert means in tools.why(said)


@pytest.mark.parametrize("name", ["docker", "kind", "kubectl"])
def test_a_missing_program_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=f"{name} is not installed: see https://"):
        tools.run([name, "version"])


def test_a_program_that_takes_too_long(program: Program) -> None:
    program("kind", "exec sleep 30")
    with pytest.raises(ToolError, match=r"`kind load docker-image` did not end in time"):
        tools.load("c", ["a:1"], timeout=0.5)


def test_nodes_are_ours_by_their_mount(program: Program) -> None:
    nodes = [
        {
            "Name": "/c-worker",
            "State": {"Running": False},
            "Mounts": [{"Destination": "/var"}, {"Destination": tools.MARK}],
        },
        {"Name": "/c-control-plane", "State": {"Running": True}, "Mounts": []},
    ]
    program("docker", f"case $1 in ps) echo a b;; inspect) echo '{json.dumps(nodes)}';; esac")
    assert tools.nodes("c") == [
        tools.Node("c-control-plane", running=True, ours=False),
        tools.Node("c-worker", running=False, ours=True),
    ]


def test_no_nodes_no_cluster(program: Program) -> None:
    program("docker", "exit 0")
    assert tools.nodes("c") == []


def test_local_images_have_full_names(program: Program) -> None:
    program("docker", "echo mysql:8.4; echo ghcr.io/a/b:1; echo lost:'<none>'")
    assert tools.local_images() == {"docker.io/library/mysql:8.4", "ghcr.io/a/b:1"}


def test_a_new_cluster_leaves_the_current_context_alone(program: Program, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program("kind", f'echo "kind $@" >> {log}; cat > {tmp_path}/config')
    program("kubectl", f'echo "kubectl $@" >> {log}; echo mine')
    tools.create("c", tools.read_config(ROOT / "kind.yaml"), "node:1", timeout=10)
    assert log.read_text().splitlines() == [
        "kubectl config current-context",
        "kind create cluster --name c --config - --image node:1",
        "kubectl config use-context mine",
    ]
    given = yaml.safe_load((tmp_path / "config").read_text())
    assert given["nodes"][0]["extraMounts"][0]["containerPath"] == tools.MARK


def test_a_node_that_starts_too_slowly(program: Program) -> None:
    program("kubectl", "exit 1")
    program("kind", "echo 'ERROR: could not find a log line that matches X' >&2; exit 1")
    with pytest.raises(tools.SlowStartError, match="too busy; start again"):
        tools.create("c", tools.read_config(ROOT / "kind.yaml"), None, timeout=10)


def test_objects_that_the_cluster_refuses(program: Program) -> None:
    program("kubectl", "cat >/dev/null; echo 'error: the server is on fire' >&2; exit 1")
    with pytest.raises(ToolError, match="the cluster kind-c refused: error: the server is on fire"):
        tools.apply("kind-c", "kind: Pod", timeout=10)
