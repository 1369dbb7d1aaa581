from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from k8s import cluster, tools
from k8s.client import Cluster, Deadline
from k8s.manifests import ROOT
from tests.k8s.conftest import Api

Program = Callable[[str, str], None]

#: Docker with one node of a cluster `c`, which is ours or not.
DOCKER = """case $1 in
ps) echo abc;;
inspect) echo '[{{"Name": "/c-control-plane", "State": {{"Running": {running}}},
  "Mounts": [{{"Destination": "{mount}"}}]}}]';;
*) exit 0;;
esac"""


def no_cluster(program: Program) -> None:
    program("docker", "exit 0")


def ours(program: Program, *, running: bool = True) -> None:
    program("docker", DOCKER.format(running=json.dumps(running), mount=tools.MARK))


def foreign(program: Program) -> None:
    program("docker", DOCKER.format(running="true", mount="/var"))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600)])
def test_times(text: str, seconds: float) -> None:
    assert cluster._seconds(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["up", "--timeout", "soon"], "'soon' is no time"),
        (["up", "--timeout", "0s"], "is no time"),
        (["up", "--name", "A b"], "is no name of a cluster"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cluster.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "spark"], "--with spark is none of kueue, trainer"),
        (["--overlay", "mars"], "--overlay mars is neither one of kind, production nor a folder"),
    ],
)
def test_names_that_are_not_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.main(["up", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "status", "down", "explain"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cluster.main([command, "--help"])
    assert left.value.code == 0
    assert f"Example: driftmill cluster {command}" in " ".join(capsys.readouterr().out.split())


def test_all_that_is_missing_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster.main(["up"]) == 1
    said = capsys.readouterr().err
    for name in ("docker", "kind", "kubectl", "git"):
        assert f"-> install {name}: see https://" in said
    assert said.splitlines()[-1].startswith("driftmill cluster: this machine lacks")
    assert "Traceback" not in said


def test_a_cluster_that_is_not_ours_is_left_alone(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(program)
    program("kind", "exit 77")  # never called
    assert cluster.main(["down", "--name", "c"]) == 1
    said = capsys.readouterr().err
    assert "the kind cluster c was not made by `driftmill cluster up`" in said
    config = tools.read_config(ROOT / "kind.yaml")
    with pytest.raises(tools.ToolError, match="is left alone; choose another --name"):
        cluster.ensure("c", config, Deadline(10), print)


def test_down_without_a_cluster(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    no_cluster(program)
    assert cluster.main(["down", "--name", "c"]) == 0
    assert "there is no kind cluster c" in capsys.readouterr().out


def test_status_without_a_cluster(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DRIFTMILL_CONTEXT", raising=False)
    no_cluster(program)
    assert cluster.main(["status", "--name", "c"]) == 1
    assert "`driftmill cluster up` makes it" in capsys.readouterr().err


def test_status_of_a_context_that_is_not_there(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.main(["status", "--context", "production"]) == 1
    said = capsys.readouterr().err
    assert "no usable context production" in said
    assert said.count("\n") == 1


def test_making_is_tried_again_where_a_node_starts_too_slowly(
    program: Program, tmp_path: Path
) -> None:
    no_cluster(program)
    program("kubectl", "exit 1")
    count = tmp_path / "count"
    program(
        "kind",
        f"echo x >> {count}; [ $(wc -l < {count}) -ge 3 ] ||"
        " { echo 'could not find a log line that matches X' >&2; exit 1; }",
    )
    config = tools.read_config(ROOT / "kind.yaml")
    told: list[str] = []
    assert cluster.ensure("c", config, Deadline(60), told.append) == "3 nodes made"
    assert told == ["making 3 nodes", "making 3 nodes, try 2", "making 3 nodes, try 3"]


def test_a_cluster_that_is_half_made_is_made_anew(
    program: Program, api: Api, tmp_path: Path
) -> None:
    ours(program)
    program("kubectl", "exit 1")
    log = tmp_path / "log"
    # No admin's kubeconfig yet: `kind export` fails.
    program("kind", f'echo "$1" >> {log}; [ "$1" != export ]')
    config = tools.read_config(ROOT / "kind.yaml")
    done = cluster.ensure("c", config, Deadline(60), print)
    assert done == "3 nodes made anew, an earlier start was cut short"
    assert log.read_text().split() == ["export", "delete", "create"]


def test_stopped_nodes_are_started(
    program: Program, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours(program, running=False)
    program("kubectl", "exit 1")
    program("kind", "exit 0")
    monkeypatch.setattr(cluster, "_is_whole", lambda name, count, patience: patience > 60)
    config = tools.read_config(ROOT / "kind.yaml")
    assert cluster.ensure("c", config, Deadline(60), print) == "started again"


def test_nodes_that_stand_for_gpu_nodes_get_gpus(api: Api) -> None:
    api.answers["/api/v1/nodes"] = {
        "items": [
            node("plain"),
            node("gpu", {"nvidia.com/gpu.product": "H100", "nvidia.com/gpu.count": "2"}),
            node("has", {"nvidia.com/gpu.product": "H100"}, gpus="8"),
        ]
    }
    cluster.add_gpus(Cluster("test"))
    two = {"nvidia.com/gpu": "2"}
    assert api.patched == [
        ("/api/v1/nodes/gpu/status", {"status": {"capacity": two, "allocatable": two}})
    ]


def node(name: str, labels: dict[str, str] | None = None, gpus: str | None = None) -> Any:
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "status": {
            "allocatable": {"cpu": "2", **({"nvidia.com/gpu": gpus} if gpus else {})},
            "nodeInfo": {"kubeletVersion": "v1.34.4"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def test_only_images_that_docker_has_are_loaded(program: Program, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program("docker", "echo mysql:8.4; echo other:1")
    program("kind", f'echo "$@" >> {log}')
    pods = {"spec": {"containers": [{"image": "mysql:8.4"}, {"image": "ghcr.io/a/b:1"}]}}
    objects = [{"kind": "Deployment", "spec": {"template": pods}}]
    assert cluster.load("c", objects, Deadline(10)) == "0 of ours and 1 others on all nodes"
    assert log.read_text().split() == ["load", "docker-image", "mysql:8.4", "--name", "c"]
    program("docker", "exit 0")
    assert "nodes pull what they need" in cluster.load("c", objects, Deadline(10))


def test_settings_are_kept_unless_given_anew(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    there = Cluster("test")
    assert cluster._settings(there, None, pipelines=True) == {
        "AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000"
    }
    api.answers["/api/v1/namespaces/kubeflow/configmaps/driftmill"] = {
        "data": {"AWS_ENDPOINT_URL": "http://s3.storage:7070", "AWS_REGION": "eu-west-1"}
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/me/mlflow.db")
    assert cluster._settings(there, "http://127.0.0.1:9000", pipelines=True) == {
        "AWS_ENDPOINT_URL": "http://s3.storage:7070",
        "AWS_REGION": "eu-west-1",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert cluster._settings(there, "https://s3.example.com", pipelines=False) == {
        "AWS_ENDPOINT_URL": "https://s3.example.com",
        "AWS_REGION": "eu-west-1",
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
    }


def test_settings_go_into_our_map_only() -> None:
    objects = [
        {"kind": "ConfigMap", "metadata": {"name": "driftmill"}, "data": {"AWS_REGION": "a"}},
        {"kind": "ConfigMap", "metadata": {"name": "other"}, "data": {}},
    ]
    changed = cluster.configured(objects, {"AWS_REGION": "b", "X": "y"})
    assert changed[0]["data"] == {"AWS_REGION": "b", "X": "y"}
    assert changed[1] == objects[1]


def test_the_key_of_the_store(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"accesskey": "minio", "secretkey": "of pipelines"}
    objects = [
        {"kind": "Secret", "metadata": {"name": "mlpipeline-minio-artifact"}, "stringData": key}
    ]
    there = Cluster("test")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert cluster._secrets(there, []) == []
    made = cluster._secrets(there, objects)
    assert [s["metadata"]["namespace"] for s in made] == ["kubeflow", "driftmill"]
    assert made[0]["stringData"]["AWS_SECRET_ACCESS_KEY"] == "of pipelines"
    api.answers["/api/v1/namespaces/kubeflow/secrets/driftmill-store"] = {}
    made = cluster._secrets(there, objects)  # one that is there stays
    assert [s["metadata"]["namespace"] for s in made] == ["driftmill"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "my own")
    made = cluster._secrets(there, objects)
    assert [s["stringData"]["AWS_ACCESS_KEY_ID"] for s in made] == ["mine", "mine"]


def test_status_says_what_is_not_ready(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    space = "/api/v1/namespaces/kubeflow"
    api.answers |= {
        "/api/v1/nodes": {"items": [node("n1", gpus="2")]},
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions": {"items": []},
        space: {},
        "/api/v1/namespaces/driftmill": {},
        "/apis/apps/v1/namespaces/kubeflow/deployments": {
            "items": [
                {
                    "metadata": {"name": "ml-pipeline", "generation": 1},
                    "spec": {"replicas": 1},
                    "status": {},
                }
            ]
        },
        f"{space}/pods": {
            "items": [
                {
                    "metadata": {"name": "ml-pipeline-1", "namespace": "kubeflow", "uid": "u"},
                    "spec": {"nodeName": "n1", "containers": []},
                    "status": {"phase": "Pending"},
                }
            ]
        },
    }
    assert cluster.main(["status", "--context", "test", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["nodes"] == [{"name": "n1", "ready": True, "version": "v1.34.4", "gpus": 2}]
    assert facts["installed"]["pipelines"] is True
    assert facts["not_ready"] == ["ml-pipeline-1 starts on n1; ask again in some seconds."]
    assert cluster.main(["status", "--context", "test"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("test: not ready\n")
    assert "deployments: 0 of 1 ready" in shown


def test_a_plan_without_pipelines_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    made = cluster.plan(ROOT / "overlays/kind", pipelines=False)
    assert not made.kinds
    assert {o["metadata"].get("namespace", "") for o in made.base} == {"", "kubeflow", "driftmill"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_runs_just_now(
    program: Program, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pid = tmp_path / "pid"
    no_cluster(program)
    program("kind", f"echo $$ > {pid}.part; mv {pid}.part {pid}; exec sleep 60")
    script = (
        "import sys\nfrom pathlib import Path\nfrom k8s import cluster, preflight\n"
        "preflight.check = lambda *a, **k: []\n"
        "sys.exit(cluster.main(['up', '--name', 'c', '--without', 'pipelines']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    end = time.monotonic() + 60
    while not pid.exists():
        assert time.monotonic() < end
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.05)
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == code
    assert "Traceback" not in said
    # Killed; whoever inherits it may take a moment to bury it.
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(timeout=10)
    if number == signal.SIGINT:
        assert "interrupted; the same command goes on from here" in said


def test_preflight_asks_less_of_a_cluster_that_is_there(program: Program) -> None:
    ours(program)
    config = tools.read_config(ROOT / "kind.yaml")
    checks = cluster._preflight("c", config, pipelines=False, remote=False)
    assert not [c for c in checks if c.name.startswith("port")]
    no_cluster(program)
    checks = cluster._preflight("c", config, pipelines=False, remote=False)
    assert [c.name for c in checks if c.name.startswith("port")] == ["port 8080", "port 8090"]


def test_what_to_do_next() -> None:
    config = tools.read_config(ROOT / "kind.yaml")
    page, run = cluster.next_steps("kind-driftmill", config, has_page=True)
    assert page.endswith("http://127.0.0.1:8080")
    assert "driftmill submit CONTRACT --endpoint http://127.0.0.1:8080" in run
    assert cluster.next_steps("kind-driftmill", config, has_page=False) == []
    bare = tools.Config({"nodes": [{"role": "control-plane"}]})
    (forward,) = cluster.next_steps("kind-a", bare, has_page=True)
    assert "kubectl --context kind-a -n kubeflow port-forward svc/ml-pipeline-ui" in forward
