"""A model's controller: its runner, rights, ledger and token."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.helm.chart import NAME, NAMESPACE, of, render
from tests.helm.pods import container, environment, mounts

CONTROLLER = f"{NAME}-payments-controller"
TOKEN = f"{NAME}-payments-token"
POSTGRES = {"type": "postgres", "existingSecret": "ledger", "key": "uri"}


def deployment(controller: dict[str, Any] | None = None) -> Any:
    return of(render({"controller": controller or {}}), "Deployment")[CONTROLLER]


def template(controller: dict[str, Any] | None = None) -> Any:
    return deployment(controller)["spec"]["template"]


def test_jobs_are_made_from_a_template() -> None:
    found = template()
    assert container(found)["args"] == [
        "--contract=/etc/driftmill/contract.yaml",
        "--token-file=/etc/driftmill/webhook-token",
        "--runner=job",
        "--job-template=/etc/driftmill/job.yaml",
        "--train-first",
    ]
    assert environment(found)["DRIFTMILL_OWNER"] == CONTROLLER
    assert mounts(found)["/etc/driftmill"]["projected"]["sources"] == [
        {"configMap": {"name": f"{NAME}-payments-contract"}},
        {"secret": {"name": TOKEN, "items": [{"key": "token", "path": "webhook-token"}]}},
        {"configMap": {"name": f"{NAME}-payments-training"}},
    ]


def test_its_rights_are_those_that_jobs_take() -> None:
    found = render()
    (role,) = of(found, "Role").values()
    assert [(r["resources"], r["verbs"], r.get("resourceNames")) for r in role["rules"]] == [
        (["jobs"], ["create", "get", "delete"], None),
        (["pods"], ["list"], None),
        (["deployments"], ["get"], [CONTROLLER]),
    ]
    (binding,) = of(found, "RoleBinding").values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": CONTROLLER, "namespace": NAMESPACE}
    assert template()["spec"]["serviceAccountName"] == CONTROLLER
    assert CONTROLLER in of(found, "ServiceAccount")


def test_kubeflow_needs_no_rights_in_kubernetes() -> None:
    kubeflow = {"endpoint": "http://kfp:8888", "existingSecret": "kfp", "key": "bearer"}
    settings = {"runner": "kubeflow", "trainFirst": False, "kubeflow": kubeflow}
    found = template(settings)
    assert container(found)["args"][2:] == ["--runner=kubeflow"]
    variables = environment(found)
    assert variables["KF_PIPELINES_ENDPOINT"] == "http://kfp:8888"
    assert variables["KF_PIPELINES_TOKEN"] == {"secretKeyRef": {"name": "kfp", "key": "bearer"}}
    assert "DRIFTMILL_OWNER" not in variables
    objects = render({"controller": settings})
    assert not of(objects, "Role")
    assert not of(objects, "RoleBinding")
    assert f"{NAME}-payments-training" not in of(objects, "ConfigMap")


def test_it_trains_in_the_image_of_the_models_kind() -> None:
    found = render({"images": {"trainingTabular": {"tag": "7"}}})
    variables = environment(of(found, "Deployment")[CONTROLLER]["spec"]["template"])
    assert variables["DRIFTMILL_IMAGE"] == "driftmill/python-tabular:7"


def test_a_ledger_in_a_file_has_one_writer() -> None:
    spec = deployment()["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    volume = mounts(spec["template"])["/var/lib/driftmill"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert claim == f"{NAME}-payments-ledger"
    found = of(render(), "PersistentVolumeClaim")[claim]
    assert found["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    }
    assert "annotations" not in found["metadata"]
    assert "DRIFTMILL_LEDGER" not in environment(spec["template"])


def test_a_ledger_in_postgres_may_have_several() -> None:
    settings = {"replicas": 2, "ledger": POSTGRES}
    spec = deployment(settings)["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (2, "RollingUpdate")
    assert environment(spec["template"])["DRIFTMILL_LEDGER"] == {
        "secretKeyRef": {"name": "ledger", "key": "uri"}
    }
    assert mounts(spec["template"])["/var/lib/driftmill"]["emptyDir"] == {}
    assert not of(render({"controller": settings}), "PersistentVolumeClaim")


@pytest.mark.parametrize(
    ("claim", "made"),
    [
        ({"existingClaim": "mine"}, None),
        ({"keep": True}, {"helm.sh/resource-policy": "keep"}),
    ],
)
def test_the_claim_may_be_there_already_or_stay(claim: dict[str, Any], made: Any) -> None:
    found = of(render({"controller": {"ledger": {"pvc": claim}}}), "PersistentVolumeClaim")
    assert [c["metadata"]["annotations"] for c in found.values()] == ([made] if made else [])
    volume = mounts(template({"ledger": {"pvc": claim}}))["/var/lib/driftmill"]
    name = claim.get("existingClaim", f"{NAME}-payments-ledger")
    assert volume["persistentVolumeClaim"]["claimName"] == name


def test_a_token_of_ones_own_is_used_and_none_is_made() -> None:
    objects = render({}, "existing-secrets")
    assert not of(objects, "Secret")
    sources = mounts(of(objects, "Deployment")[CONTROLLER]["spec"]["template"])["/etc/driftmill"]
    assert {
        "secret": {"name": "our-token", "items": [{"key": "bearer", "path": "webhook-token"}]}
    } in sources["projected"]["sources"]


def test_a_token_is_long_and_of_one_release() -> None:
    tokens = {
        of(render(release=name), "Secret")[f"{name}-driftmill-payments-token"]["data"]["token"]
        for name in ("one", "two")
    }
    assert len(tokens) == 2
    assert all(len(base64.b64decode(token)) == 40 for token in tokens)


def test_it_can_be_left_out() -> None:
    objects = render({"controller": {"enabled": False}})
    assert not [
        o
        for o in objects
        if o["metadata"]["name"].endswith("-controller") and o["kind"] != "NetworkPolicy"
    ]
    assert set(of(objects, "Secret")) == {f"{NAME}-payments-access"}
    assert not of(objects, "PersistentVolumeClaim")
    assert f"{NAME}-payments-training" not in of(objects, "ConfigMap")
