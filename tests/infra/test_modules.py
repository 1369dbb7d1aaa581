"""The provider-free modules, by a real Terraform."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from driftmill.values import Values
from tests import checkov
from tests.infra.conftest import CLOUDS, INFRA, MODULES, run
from tests.infra.test_roots import RELEASE
from tests.k8s.conftest import REMOTES, reachable

Outputs = Callable[..., dict[str, Any]]
ANNOTATIONS = {"store": {"role": "a"}, "runner": {"role": "b"}, "pipelines": {"role": "c"}}
PIPELINES = {
    "mysql": "mysql.example",
    "user": "driftmill",
    "password": "print",
    "host": "s3.eu-central-1.amazonaws.com",
    "region": "eu-central-1",
    "bucket": "pipes",
    "keys": False,
}


def test_files_are_formatted() -> None:
    done = run("fmt", "-check", "-diff", "-recursive", "-no-color", folder=INFRA)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_terraform_tests(name: str, tmp_path: Path) -> None:
    shutil.copytree(INFRA / "sizes", tmp_path / "sizes")
    folder = tmp_path / "modules" / name
    ignored = shutil.ignore_patterns(".terraform*", "*.tfstate*")
    shutil.copytree(INFRA / "modules" / name, folder, ignore=ignored)
    for arguments in (["init"], ["validate"], ["test"]):
        done = run(*arguments, "-no-color", folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_size_can_be_had_on_every_cloud(size: str, cloud: str, outputs: Outputs) -> None:
    platform = yaml.safe_load((INFRA / f"sizes/{size}.yaml").read_text())
    given = outputs("policy", cloud=cloud, platform=platform, given=platform)
    most = sum(pool["max"] for pool in platform["gpus"].values())
    assert sum(pool["max"] for pool in given["gpu_pools"].values()) == most
    assert {pool["min"] for pool in given["gpu_pools"].values()} == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gpus": {"a": {"product": "NVIDIA-H100-NVL", "max": 1}}},
            "gpus asks for 1 NVIDIA-H100-NVL; google has machines with 1 NVIDIA-A100-SXM4-40GB,",
        ),
        ({"budjet": 3}, "the description has unknown keys: budjet."),
        ({"retention": {"backup": 9}}, "the description has unknown keys: retention.backup."),
        ({"zones": 1}, "zones is 1; it may be 2 or 3"),
        ({"regions": {"aws": "eu-central-1"}}, "regions has no region for google."),
    ],
)
def test_a_refusal_says_what_may_be(change: dict[str, Any], message: str, outputs: Outputs) -> None:
    platform = yaml.safe_load((INFRA / "sizes/small.yaml").read_text()) | change
    with pytest.raises(RuntimeError) as refusal:
        outputs("policy", cloud="google", platform=platform, given=platform)
    assert message in str(refusal.value).replace(" │ ", " ")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"annotations": ANNOTATIONS},
        {"metadata_server": True},
        {
            "store": {"storage_class": "files"},
            "extra_objects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}],
        },
    ],
)
def test_values_fit_the_chart(more: dict[str, Any], outputs: Outputs) -> None:
    values = yaml.safe_load(outputs("release", **(RELEASE | more))["helm_values"])
    schema = json.loads((INFRA.parent / "helm/driftmill/values.schema.json").read_text())
    jsonschema.validate(values, schema)
    made = Values.model_validate(values)
    assert made.controller.ledger.type == "postgres"
    assert made.service_account.name == "driftmill"


def test_the_overlay_renders(outputs: Outputs, tmp_path: Path) -> None:
    for remote in ("pipelines", "argo"):
        if not reachable(REMOTES[remote]):
            pytest.skip(f"git does not reach {REMOTES[remote]}")
    given = outputs("release", **RELEASE, annotations=ANNOTATIONS, pipelines=PIPELINES)
    shutil.copytree(INFRA.parent / "k8s", tmp_path / "k8s")
    mine = tmp_path / "k8s/overlays/mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(given["overlay"])
    done = subprocess.run(["kubectl", "kustomize", mine], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(done.stdout)}
    assert "example" not in done.stdout.replace("mysql.example", "")
    server = objects["Deployment", "ml-pipeline"]["spec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry for entry in server["env"]}
    key = environment["OBJECTSTORECONFIG_ACCESSKEY"]
    assert key == {"name": "OBJECTSTORECONFIG_ACCESSKEY", "value": ""}
    for account, role in {
        "driftmill-runner": "b",
        "ml-pipeline": "c",
        "ml-pipeline-ui": "c",
    }.items():
        assert objects["ServiceAccount", account]["metadata"]["annotations"] == {"role": role}


@pytest.mark.slow
def test_checkov_finds_nothing() -> None:
    summary = checkov.check(INFRA / "checkov.yaml", INFRA)
    assert summary["passed"] > 50
    assert summary["parsing_errors"] == 0
