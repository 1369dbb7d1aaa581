"""A cluster for the tests of this folder, and what they put into it.

With `DRIFTMILL_TEST_CONTEXT`, a context of the kubeconfig, they run there; they patch a node's
status, so name no cluster that others use. Without it they make a kind cluster `driftmill-test`
from `k8s/kind.yaml` and `KIND_NODE_IMAGE`, with a kubeconfig of its own, and delete it at the end.

The object store is `DRIFTMILL_TEST_S3_IN_CLUSTER`, a URL as pods see it, with the account
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`. Without it one is started from
`DRIFTMILL_TEST_S3_IMAGE`, an image of versitygw. Images come from this machine's Docker; others
than the usual ones are named by `DRIFTMILL_IMAGE` (steps) and `DRIFTMILL_TEST_SERVICE_IMAGE`,
`DRIFTMILL_TEST_MONITOR_IMAGE`, `DRIFTMILL_TEST_CONTROLLER_IMAGE`. What needs the Prometheus
operator or the Gateway API is skipped where the named cluster has none.
Network policies are tested too: the cluster's network must know them, as kind's does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from tests.cluster.objects import Cluster, Namespace

NAME = "driftmill-test"
#: Nodes that start on a machine with other work sometimes come too late for kind.
ATTEMPTS = 3
#: Account of the object store that is started here.
KEY = (
    os.environ.get("AWS_ACCESS_KEY_ID", "test"),
    os.environ.get("AWS_SECRET_ACCESS_KEY", "testsecret"),
)
S3_IMAGE = "versity/versitygw:latest"
ENFORCE = "pod-security.kubernetes.io/enforce"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever is in this folder needs a cluster."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with at least one worker; skips where there can be none."""
    context = os.environ.get("DRIFTMILL_TEST_CONTEXT")
    if context:
        kind = context.removeprefix("kind-") if context.startswith("kind-") else None
        yield Cluster(context, kind, _client(context))
        return
    if missing := _missing():
        pytest.skip(f"no cluster to test on: {missing} (or name one: DRIFTMILL_TEST_CONTEXT)")
    folder = tmp_path_factory.mktemp("kind")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        try:
            _create(folder / "kind.yaml")
            yield Cluster(f"kind-{NAME}", NAME, _client(f"kind-{NAME}"))
        finally:
            subprocess.run(["kind", "delete", "cluster", "--name", NAME], capture_output=True)


def _client(context: str) -> client.ApiClient:
    # The file by name: the client reads the variable only once, when it is imported.
    return config.new_client_from_config(os.environ.get("KUBECONFIG"), context)


def _missing() -> str:
    for program in ("docker", "kind"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "Docker does not run"
    return ""


def _create(path: Path) -> None:
    """Make the kind cluster of `k8s/kind.yaml`, without its ports: others may use them."""
    settings = yaml.safe_load(Path("k8s/kind.yaml").read_text())
    for node in settings["nodes"]:
        node.pop("extraPortMappings", None)
    path.write_text(yaml.safe_dump(settings))
    image = os.environ.get("KIND_NODE_IMAGE")
    command = ["kind", "create", "cluster", "--name", NAME, "--config", str(path), "--wait", "180s"]
    for _ in range(ATTEMPTS):
        made = subprocess.run(
            [*command, *(["--image", image] if image else [])], capture_output=True, text=True
        )
        if made.returncode == 0:
            return
        if "already exist" in made.stderr:
            subprocess.run(["kind", "delete", "cluster", "--name", NAME], capture_output=True)
    pytest.fail(f"kind could not make a cluster in {ATTEMPTS} attempts: {made.stderr[-1500:]}")


@pytest.fixture(scope="module")
def new_namespace(
    cluster: Cluster, request: pytest.FixtureRequest
) -> Iterator[Callable[[], Namespace]]:
    """Makes namespaces that take only pods of the `restricted` Pod Security level."""
    module = request.module.__name__.rpartition("test_")[2].replace("_", "-")
    made: list[str] = []

    def make() -> Namespace:
        name = f"driftmill-test-{module}-{uuid.uuid4().hex[:5]}"
        labels = {ENFORCE: "restricted", f"{ENFORCE}-version": "latest"}
        cluster.core.create_namespace({"metadata": {"name": name, "labels": labels}})
        made.append(name)
        return Namespace(cluster, name)

    yield make
    for name in made:
        cluster.core.delete_namespace(name)


@pytest.fixture(scope="module")
def namespace(new_namespace: Callable[[], Namespace]) -> Namespace:
    """The namespace of the module's runs."""
    place = new_namespace()
    launcher = Path(__file__).with_name("launcher.py").read_text()
    place.apply(
        {"kind": "ServiceAccount", "metadata": {"name": "driftmill-runner"}},
        {
            "kind": "ConfigMap",
            "metadata": {"name": "kfp-launcher"},
            "data": {"launcher.py": launcher},
        },
    )
    return place


@pytest.fixture(scope="session")
def loaded(cluster: Cluster) -> Callable[[str], str]:
    """Brings an image into the cluster and gives back its name; skips where it is not built."""

    def load(image: str) -> str:
        if cluster.kind is not None:
            for command in (["image", "inspect"], ["pull"]):
                if not subprocess.run(["docker", *command, image], capture_output=True).returncode:
                    break
            else:
                pytest.skip(f"no image {image}: `driftmill images build` makes what is ours")
            cluster.load(image)
        return image

    return load


@pytest.fixture(scope="module")
def object_store(new_namespace: Callable[[], Namespace], loaded: Callable[[str], str]) -> str:
    """URL of an object store, as pods see it."""
    named = os.environ.get("DRIFTMILL_TEST_S3_IN_CLUSTER")
    if named:
        return named
    image = loaded(os.environ.get("DRIFTMILL_TEST_S3_IMAGE", S3_IMAGE))
    place = new_namespace()
    place.apply(*_object_store(image))
    place.until_ready("app=s3")
    return f"http://s3.{place.name}:7070"


def _object_store(image: str) -> list[dict[str, Any]]:
    """An S3 server on an empty directory."""
    arguments = ["--access", KEY[0], "--secret", KEY[1], "--port", ":7070"]
    folders = [{"name": f, "mountPath": f"/data/{f}"} for f in ("buckets", "meta")]
    container = {
        "name": "s3",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": [*arguments, "posix", "--sidecar", "/data/meta", "/data/buckets"],
        "readinessProbe": {"tcpSocket": {"port": 7070}, "periodSeconds": 2},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": folders,
    }
    spec = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": f["name"], "emptyDir": {}} for f in folders],
    }
    port = {"selector": {"app": "s3"}, "ports": [{"port": 7070}]}
    metadata = {"name": "s3", "labels": {"app": "s3"}}
    return [
        {"kind": "Pod", "metadata": metadata, "spec": spec},
        {"kind": "Service", "metadata": metadata, "spec": port},
    ]


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Any]:
    """Compiles a contract, given as YAML with changes to it, into a `Package`."""
    from driftmill.contract import Contract
    from pipelines.compile import compile_package
    from tests.cluster.kubeflow import Package

    def compile_contract(text: str, store: str = "s3://driftmill/store", **train: Any) -> Package:
        values = yaml.safe_load(text)
        values["train"] = {**values.get("train", {}), **train}
        folder = tmp_path / uuid.uuid4().hex
        return Package(compile_package(Contract.model_validate(values), folder, store=store))

    return compile_contract
