"""What stands in the Terraform files, read without Terraform."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from driftmill import images
from driftmill.contract import Resources
from driftmill.values import NetworkPolicy
from pipelines import pods
from tests.infra.conftest import CLOUDS, INFRA, MODULES, blocks, module, parsed

FOLDERS = [*CLOUDS, *(f"modules/{name}" for name in MODULES)]
PINNED = re.compile(r"^git::https://github\.com/[\w./-]+\.git(//[\w/-]+)?\?ref=[0-9a-f]{40}$")
TOLERANT = Resources(gpu=1, gpu_products=("Tesla-T4",), spot=True)


def policy_local(name: str) -> Any:
    (body,) = [block[name] for block in parsed("modules/policy")["locals"] if name in block]
    return body


def tolerated(pool: dict[str, Any], resources: Resources) -> bool:
    """Whether a training step may run on the machines of a pool, as Kubernetes would decide."""
    keys = {t.key for t in pods.tolerations(resources) if t.effect == "NoSchedule"}
    return all(taint["key"] in keys for taint in pool["taints"])


def test_taints_and_labels_are_what_the_pipeline_compiler_writes() -> None:
    assert policy_local("gpu_product") == pods.GPU_PRODUCT
    assert policy_local("gpu_taint") == pods.GPU_TAINT
    spot = re.findall(r'key\s*=\s*"?([\w./-]+)', str(policy_local("spot_taint")))
    assert len(spot) == 3
    assert set(spot) <= set(pods.SPOT_TAINTS)
    # And each root hands them on as they are.
    aws, google = module("aws", "eks"), module("google", "gke")
    azure = module("azure", "aks")
    groups = str(aws["eks_managed_node_groups"])
    assert "pool.labels" in groups
    assert "for taint in pool.taints : taint.key => {key" in groups.replace('"', "")
    assert "=> pool.labels" in str(google["node_pools_labels"])
    assert "for taint in pool.taints : {key" in str(google["node_pools_taints"]).replace('"', "")
    assert "pool.labels" in str(azure["agent_pools"])
    assert "${taint.key}=${taint.value}:${taint.effect}" in str(azure["agent_pools"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_compiled_step_finds_its_pool(cloud: str, outputs: Callable[..., dict[str, Any]]) -> None:
    platform = yaml.safe_load((INFRA / "sizes/small.yaml").read_text())
    pools = outputs("policy", cloud=cloud, platform=platform, given=platform)["gpu_pools"]
    (wanted,) = pods.gpu_products(TOLERANT)
    assert [p["labels"][wanted["key"]] in wanted["values"] for p in pools.values()] == [True, True]
    # What may be interrupted runs on both; what may not, on demand; what needs no GPU, on neither.
    spot, on_demand = pools["smallsp"], pools["smallod"]
    assert tolerated(spot, TOLERANT)
    assert tolerated(on_demand, TOLERANT)
    patient = TOLERANT.model_copy(update={"spot": False})
    assert not tolerated(spot, patient)
    assert tolerated(on_demand, patient)
    assert not tolerated(on_demand, Resources(spot=True))


@pytest.mark.parametrize("folder", FOLDERS)
def test_variables_and_outputs_are_described(folder: str) -> None:
    variables = dict(blocks(folder, "variable"))
    assert variables
    for name, body in variables.items():
        assert len(body.get("description", "")) > 10, name
        assert "type" in body, name
    for name, body in blocks(folder, "output"):
        assert len(body.get("description", "")) > 5, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_versions_are_pinned(folder: str) -> None:
    (terraform,) = [b for b in parsed(folder)["terraform"] if "required_version" in b]
    assert re.fullmatch(r">= 1\.\d+(\.\d+)?", terraform["required_version"])
    for providers in terraform.get("required_providers", []):
        for name, provider in providers.items():
            assert re.fullmatch(r"~> \d+\.\d+", provider["version"]), name
    for name, body in blocks(folder, "module"):
        source = body["source"]
        assert source.startswith("../modules/") or PINNED.match(source), name


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_pin_says_which_version_it_is(cloud: str) -> None:
    text = (INFRA / cloud / "main.tf").read_text()
    pins = re.findall(r'"git::https://\S+/(\S+)\.git\S*\?ref=(\w+)"(?: # (v[\d.]+)$)?', text, re.M)
    assert pins
    versions: dict[str, set[tuple[str, str]]] = {}
    for repository, commit, version in pins:
        assert version, f"{repository} is pinned without its version"
        versions.setdefault(repository, set()).add((commit, version))
    assert all(len(found) == 1 for found in versions.values()), "one version of each"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_right_is_unbounded(cloud: str) -> None:
    text = "\n".join(path.read_text() for path in (INFRA / cloud).glob("*.tf"))
    assert not re.search(r'"[\w-]*:?\*"', text), "an action or a resource that is everything"
    assert not re.search(r'role\w*\s*=\s*"(roles/)?(owner|editor)"', text, re.IGNORECASE)
    assert "access_key" not in text.replace("shared_access_key_enabled", "")


def test_nothing_is_public_by_default() -> None:
    for cloud in CLOUDS:
        assert dict(blocks(cloud, "variable"))["admin_cidrs"]["default"] == []
        assert dict(blocks(cloud, "variable"))["deletion_protection"]["default"] is True
    eks, databases = module("aws", "eks"), module("aws", "databases")
    assert eks["endpoint_public_access"] == "${length(var.admin_cidrs) > 0}"
    assert databases["publicly_accessible"] is False
    assert module("aws", "vpc")["map_public_ip_on_launch"] is False
    gke = module("google", "gke")
    assert gke["enable_private_endpoint"] == "${length(var.admin_cidrs) == 0}"
    assert gke["enable_private_nodes"] is True
    assert gke["dns_allow_external_traffic"] is False
    for name in ("postgres", "mysql"):
        assert module("google", name)["ip_configuration"]["ipv4_enabled"] is False
    assert module("google", "buckets")["public_access_prevention"] == "enforced"
    private = "${length(var.admin_cidrs) == 0}"
    assert module("azure", "aks")["api_server_access_profile"]["enable_private_cluster"] == private
    for name in ("blobs", "postgres"):
        assert module("azure", name)["public_network_access_enabled"] is False
    assert module("azure", "registry")["admin_enabled"] is False


def test_stores_keep_what_was_replaced_for_a_while() -> None:
    s3 = module("aws", "buckets")
    assert s3["versioning"] == {"enabled": True}
    assert "retention.versions" in str(s3["lifecycle_rule"])
    gcs = module("google", "buckets")
    assert gcs["versioning"] is True
    assert "retention.versions" in str(gcs["lifecycle_rules"])
    blobs = module("azure", "blobs")
    assert blobs["blob_properties"]["versioning_enabled"] is True
    assert "retention.versions" in str(blobs["storage_management_policy_rule"])


def test_names_are_those_of_the_rest_of_the_project() -> None:
    given = dict(blocks("modules/policy", "output"))
    assert set(given["images"]["value"]) == set(images.IMAGES)
    runner = next(iter(yaml.safe_load_all((INFRA.parent / "k8s/base/runner.yaml").read_text())))
    account = f"{runner['metadata']['namespace']}:{runner['metadata']['name']}"
    assert given["accounts"]["value"]["runner"] == [account]


def test_the_chart_still_opens_what_it_opens_by_default(
    outputs: Callable[..., dict[str, Any]],
) -> None:
    given = yaml.safe_load(outputs("release", **RELEASE, metadata_server=True)["helm_values"])
    assert given["networkPolicy"]["egress"][:-1] == list(NetworkPolicy().egress)


RELEASE: dict[str, Any] = {
    "folder": "infra/somewhere",
    "connect": "connect",
    "login": "login",
    "registry": "registry.example/driftmill",
    "store": {"uri": "s3://models/driftmill"},
    "ledger": {"host": "db.example", "user": "driftmill", "password": "print"},
}
