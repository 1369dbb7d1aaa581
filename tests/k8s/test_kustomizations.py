"""What the folders of `k8s/` render to. Those that refer to other projects need a way to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from k8s import manifests
from k8s.manifests import ROOT, Object
from tests import checkov
from tests.k8s.conftest import rendered

FOLDERS = (
    "base",
    "pipelines/crds",
    "pipelines",
    "overlays/kind",
    "overlays/production",
    "components/kueue",
    "components/kueue/queues",
    "components/trainer",
    "components/trainer/runtimes",
)
OVERLAYS = ("overlays/kind", "overlays/production")
KUBERNETES = "1.34"
#: Where the kinds of objects that Kubernetes does not know are defined.
KINDS = {
    "components/kueue/queues": "components/kueue",
    "components/trainer/runtimes": "components/trainer",
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid_and_of_a_known_kind(folder: str) -> None:
    for each in rendered(folder):
        try:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            schema = custom_schema(each, KINDS[folder])
            jsonschema.validate(each, schema)


def custom_schema(each: Object, folder: str) -> dict[str, Any]:
    """The schema of a custom object, made strict: fields that it does not name are refused, as
    the API server does not say that it drops them."""
    group, _, version = each["apiVersion"].rpartition("/")
    for kind in rendered(folder):
        if kind["kind"] != "CustomResourceDefinition":
            continue
        spec = kind["spec"]
        if spec["group"] == group and spec["names"]["kind"] == each["kind"]:
            found = next(v for v in spec["versions"] if v["name"] == version)
            schema: dict[str, Any] = strict(found["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    raise AssertionError(f"no definition of {each['kind']} in k8s/{folder}")


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        made["additionalProperties"] = False
    return made


def test_an_unknown_field_of_a_custom_object_is_refused() -> None:
    wrong = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": "q"},
        "spec": {"clusterqueue": "q"},
    }
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, custom_schema(wrong, "components/kueue"))


@pytest.mark.parametrize("folder", [f for f in FOLDERS if "components" not in f])
def test_every_object_is_in_a_namespace_of_ours(folder: str) -> None:
    everywhere = {"Namespace", "CustomResourceDefinition", "PriorityClass"}
    for each in rendered(folder):
        if each["kind"] not in everywhere:
            assert each["metadata"]["namespace"] in ("kubeflow", "driftmill"), each


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Any]]:
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_pass_the_restricted_level(folder: str) -> None:
    assert {
        n["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for n in rendered(folder)
        if n["kind"] == "Namespace"
    } == {"restricted"}
    for name, spec in pods(rendered(folder)):
        shared = spec["securityContext"]
        assert shared["runAsNonRoot"] is True, name
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert own.get("runAsUser") != 0, name
        kinds = {k for v in spec.get("volumes", []) for k in v if k != "name"}
        assert kinds <= {"configMap", "secret", "projected", "emptyDir", "persistentVolumeClaim"}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_images_are_pinned_and_not_pulled_again(folder: str) -> None:
    for name, spec in pods(rendered(folder)):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            tag = container["image"].rpartition(":")[2]
            assert tag not in ("", "latest", "main", "master"), container["image"]
            assert container.get("imagePullPolicy", "IfNotPresent") == "IfNotPresent", name
    # Those that the servers start others with.
    found = manifests.images(rendered(folder))
    assert "ghcr.io/kubeflow/kfp-driver:2.17.0" in found
    assert "ghcr.io/kubeflow/kfp-launcher:2.17.0" in found
    assert "quay.io/argoproj/argoexec:v4.0.5" in found


@pytest.mark.parametrize("folder", OVERLAYS)
def test_every_server_has_requests_and_a_memory_limit(folder: str) -> None:
    for name, spec in pods(rendered(folder)):
        for container in spec["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name


def test_pipelines_of_v1_and_what_serves_only_them_are_left_out() -> None:
    names = {name for name, _ in pods(rendered("pipelines"))}
    assert names == {
        "metadata-envoy-deployment",
        "metadata-grpc-deployment",
        "ml-pipeline",
        "ml-pipeline-persistenceagent",
        "ml-pipeline-scheduledworkflow",
        "ml-pipeline-ui",
        "mysql",
        "seaweedfs",
        "workflow-controller",
    }
    settings = one(rendered("pipelines"), "ConfigMap", "pipeline-install-config")["data"]
    assert settings["BLOCK_V1_PIPELINES"] == "true"
    assert settings["defaultSecurityContextRunAsNonRoot"] == "true"
    assert settings["defaultSecurityContextRunAsUser"] == "65532"


def test_nothing_signs_certificates_or_reads_all_of_the_cluster() -> None:
    kinds = {o["kind"] for f in ("pipelines", "pipelines/crds", "base") for o in rendered(f)}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_no_account_reads_every_secret(folder: str) -> None:
    for role in rendered(folder):
        if role["kind"] != "Role":
            continue
        for rule in role["rules"]:
            if {"secrets", "*"} & set(rule["resources"]):
                assert rule.get("resourceNames"), role["metadata"]["name"]


def test_the_runner_may_do_what_a_run_does_and_no_more() -> None:
    role = one(rendered("base"), "Role", "driftmill-runner")
    assert {(r["resources"][0], *r["verbs"]) for r in role["rules"]} == {
        ("workflowtaskresults", "create", "patch"),
        ("configmaps", "get"),
        ("secrets", "get"),
    }
    assert [r.get("resourceNames") for r in role["rules"]] == [
        None,
        ["kfp-launcher"],
        ["mlpipeline-minio-artifact"],
    ]


def test_runs_use_that_account() -> None:
    server = one(rendered("pipelines"), "Deployment", "ml-pipeline")
    env = {e["name"]: e.get("value") for e in containers(server)[0]["env"]}
    assert env["DEFAULTPIPELINERUNNERSERVICEACCOUNT"] == "driftmill-runner"
    accounts = {
        o["metadata"]["name"] for o in rendered("pipelines") if o["kind"] == "ServiceAccount"
    }
    assert "pipeline-runner" not in accounts


def test_what_refers_to_something_in_the_overlay_finds_it() -> None:
    objects = rendered("overlays/kind")
    accounts = {o["metadata"]["name"] for o in objects if o["kind"] == "ServiceAccount"}
    settings = {
        (o["kind"], o["metadata"]["name"]) for o in objects if o["kind"] in ("ConfigMap", "Secret")
    }
    for name, spec in pods(objects):
        assert spec.get("serviceAccountName", "default") in {*accounts, "default"}, name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {})
                for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                    if key in source and not source[key].get("optional"):
                        assert (kind, source[key]["name"]) in settings, (name, variable)
    for binding in objects:
        if binding["kind"] == "RoleBinding":
            assert one(objects, "Role", binding["roleRef"]["name"])
            for subject in binding["subjects"]:
                if subject["kind"] == "ServiceAccount":
                    assert subject["name"] in accounts, binding["metadata"]["name"]


@pytest.mark.parametrize("namespace", ["kubeflow", "driftmill"])
def test_all_traffic_is_shut_unless_a_policy_opens_it(namespace: str) -> None:
    policies = [o for o in rendered("base") if o["kind"] == "NetworkPolicy"]
    found = [
        p["spec"]
        for p in policies
        if p["metadata"]["namespace"] == namespace and p["spec"]["podSelector"] == {}
    ]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in found
    for policy in policies:  # the address where a cloud gives out the node's credentials
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer:
                    assert peer["ipBlock"]["except"] == ["169.254.0.0/16"]


def test_production_brings_neither_database_nor_keys() -> None:
    objects = rendered("overlays/production")
    kinds = {o["kind"] for o in objects}
    assert not kinds & {"Secret", "PersistentVolumeClaim"}
    assert not {"mysql", "seaweedfs"} & {o["metadata"]["name"] for o in objects}
    text = manifests.dump(objects)
    assert "seaweedfs" not in text.replace("MINIO_HOST", "")
    assert "minio123" not in text


def test_the_page_is_open_on_the_port_that_kind_leads_to() -> None:
    service = one(rendered("overlays/kind"), "Service", "ml-pipeline-ui")
    assert service["spec"]["type"] == "NodePort"
    kind = yaml.safe_load((ROOT / "kind.yaml").read_text())
    mapped = [m for n in kind["nodes"] for m in n.get("extraPortMappings", [])]
    assert service["spec"]["ports"][0]["nodePort"] in [m["containerPort"] for m in mapped]
    assert {m["listenAddress"] for m in mapped} == {"127.0.0.1"}


def test_the_gpu_node_of_kind_is_labelled_and_tainted() -> None:
    kind = yaml.safe_load((ROOT / "kind.yaml").read_text())
    roles = [n["role"] for n in kind["nodes"]]
    assert roles == ["control-plane", "worker", "worker"]
    node = kind["nodes"][2]
    assert node["labels"]["nvidia.com/gpu.product"]
    (taint,) = yaml.safe_load(node["kubeadmConfigPatches"][0])["nodeRegistration"]["taints"]
    assert (taint["key"], taint["effect"]) == ("nvidia.com/gpu", "NoSchedule")


def test_remote_references_are_pinned_and_have_time() -> None:
    found = []
    for path in ROOT.rglob("kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text()).get("resources", []):
            if "://" in resource:
                found.append(resource)
                assert resource.startswith("https://github.com/")
                assert "timeout=300s" in resource
                ref = resource.partition("?ref=")[2].partition("&")[0]
                assert ref.removeprefix("v").replace(".", "").isdecimal(), resource
    assert len(found) == 5


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["base", *OVERLAYS])
def test_checkov_finds_nothing(folder: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(manifests.dump(rendered(folder)))
    summary = checkov.check(ROOT / "checkov.yaml", tmp_path)
    assert folder == "base" or summary["passed"] > 500


def one(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def containers(deployment: Object) -> list[Any]:
    return list(deployment["spec"]["template"]["spec"]["containers"])
