"""What is refused: values that are unknown or of the wrong type, and combinations that cannot work.
Each message names the value."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.chart import CHART, helm, refused

CONTRACT = "{model: payments, task: classification}"
VISION = "{model: payments, task: image-classification}"
NODES = "{model: payments, task: classification, train: {resources: {nodes: 4}}}"


def payments(**settings: Any) -> dict[str, Any]:
    return {"models": {"payments": settings}}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        # A typo at each level.
        ({"sevice": {}}, ["Additional property sevice is not allowed"]),
        ({"service": {"replica": 2}}, ["service: Additional property replica is not allowed"]),
        (
            {"service": {"probes": {"startup": {"period": 1}}}},
            ["service.probes.startup: Additional property period is not allowed"],
        ),
        (
            {"service": {"resources": {"limit": {"cpu": "1"}}}},
            ["service.resources: Additional property limit is not allowed"],
        ),
        (
            {"service": {"affinity": {"podAfinity": {}}}},
            ["service.affinity: Additional property podAfinity is not allowed"],
        ),
        (
            {"controller": {"ledger": {"pvc": {"sise": "1Gi"}}}},
            ["controller.ledger.pvc: Additional property sise is not allowed"],
        ),
        (payments(contrac="x"), ["models.payments: Additional property contrac is not allowed"]),
        (
            payments(service={"replica": 2}),
            ["models.payments.service: Additional property replica is not allowed"],
        ),
        (
            payments(monitor={"resources": {"limit": {}}}),
            ["models.payments.monitor.resources: Additional property limit is not allowed"],
        ),
        ({"models": {"Payments": {}}}, ["models: Additional property Payments is not allowed"]),
        # A wrong type or value.
        ({"service": {"replicas": "two"}}, ["service.replicas: Invalid type. Expected: integer"]),
        ({"service": {"replicas": -1}}, ["service.replicas: Must be greater than or equal to 0"]),
        ({"service": {"enabled": "yes"}}, ["service.enabled: Invalid type. Expected: boolean"]),
        (payments(contract=1), ["models.payments.contract: Invalid type. Expected: string"]),
        (payments(contract=""), ["models.payments.contract: String length must be greater"]),
        ({"store": {"type": "nfs"}}, ["store.type must be one of", '"s3", "pvc", "image"']),
        ({"store": {"uri": "/models"}}, ["store.uri: Does not match pattern"]),
        ({"controller": {"runner": "local"}}, ["controller.runner must be one of"]),
        (
            {"images": {"monitor": {"digest": "sha256:1"}}},
            ["images.monitor.digest: Does not match pattern"],
        ),
        (
            {"service": {"canary": {"weight": 101}}},
            ["service.canary.weight: Must be less than or equal to 100"],
        ),
        ({"service": {"tolerations": {}}}, ["service.tolerations: Invalid type. Expected: array"]),
        ({"service": {"spoolSize": "1 Gi"}}, ["service.spoolSize: Does not match pattern"]),
    ],
    ids=lambda case: None if isinstance(case, dict) else case[0].replace("/", "_")[:60],
)
def test_the_schema_names_what_is_wrong(values: dict[str, Any], named: list[str]) -> None:
    said = refused(values)
    assert all(text in said for text in named), said
    # One line a mistake: nothing about schemas within schemas.
    assert len([line for line in said.splitlines() if line.startswith("- ")]) == 1, said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"store": {"uri": ""}}, "store.type is s3 and store.uri is empty: set store.uri"),
        (
            {"store": {"type": "pvc"}},
            "store.uri is s3://models/driftmill and store.type is pvc, which does not read it",
        ),
        (
            {"store": {"uri": "", "type": "pvc", "pvc": {"accessModes": ["ReadWriteOncePod"]}}},
            "store.pvc.accessModes has ReadWriteOncePod, and several pods mount the store",
        ),
        (
            {"store": {"uri": "", "type": "pvc"}, "controller": {"runner": "kubeflow"}},
            "store.type is pvc and controller.runner is kubeflow, whose pods do not mount it",
        ),
        (
            {
                "store": {"uri": "", "type": "pvc"},
                "controller": {"enabled": False},
                "training": {"recurring": {"type": "kubeflow"}},
            },
            "store.type is pvc and training.recurring.type is kubeflow, whose pods do not mount it",
        ),
        (
            {"store": {"uri": "", "type": "image"}},
            "store.type is image and store.image.reference is empty",
        ),
        (
            {"store": {"uri": "", "type": "image"}},
            "store.type is image and monitor.enabled is true",
        ),
        (
            {"store": {"uri": "", "type": "image"}},
            "store.type is image and controller.enabled is true",
        ),
        (
            {"route": {"mode": "always"}},
            "route.mode is always and route.parentRefs is empty: name the Gateway",
        ),
        (payments(contract="x: ["), "model payments: contract is not YAML"),
        (
            payments(contract="{model: other, task: classification}"),
            "contract is that of the model other: models.payments must be called as its contract",
        ),
        (payments(contract=VISION), "kind is tabular, and the contract's task is image-"),
        (payments(contract=CONTRACT, kind="vision"), "kind is vision, and the contract's task is"),
        (
            payments(contract=NODES),
            "controller.runner is job and the contract's train.resources.nodes is 4",
        ),
        (
            payments(contract=NODES, controller={"enabled": False})
            | {"training": {"recurring": {"type": "cronjob"}}},
            "training.recurring.type is cronjob and the contract's train.resources.nodes is 4",
        ),
        (
            payments(service={"autoscaling": {"type": "hpa", "minReplicas": 11}}),
            "service.autoscaling.minReplicas is 11 and maxReplicas 10",
        ),
        (
            {"service": {"autoscaling": {"type": "hpa"}, "resources": {"requests": {"cpu": None}}}},
            "service.autoscaling.type is hpa and service.resources.requests.cpu is missing",
        ),
        (
            {"service": {"canary": {"weight": 5}}},
            "service.canary.weight is 5 and service.canary.enabled is false",
        ),
        (
            {"service": {"canary": {"enabled": True, "weight": 5}}},
            "service.canary.weight is 5 and route.mode is never",
        ),
        (
            payments(controller={"replicas": 2}),
            "controller.replicas is 2 and controller.ledger.type is sqlite",
        ),
        (
            {"controller": {"ledger": {"type": "postgres"}}},
            "controller.ledger.type is postgres and controller.ledger.existingSecret is empty",
        ),
        (
            {"training": {"recurring": {"type": "cronjob"}}},
            "training.recurring.type is cronjob and controller.enabled is true: both would train",
        ),
        (
            {"training": {"recurring": {"type": "kubeflow"}}},
            "training.recurring.type is kubeflow and controller.enabled is true",
        ),
        (
            {"monitor": {"webhook": "direct"}, "controller": {"enabled": False}},
            "monitor.webhook is direct and controller.enabled is false",
        ),
        (
            {"controller": {"serviceAccount": {"create": False}}},
            "controller.serviceAccount.create is false and its name is empty",
        ),
    ],
    ids=lambda case: None if isinstance(case, dict) else case[:60].replace("/", "_"),
)
def test_what_cannot_work_is_refused_and_said(values: dict[str, Any], said: str) -> None:
    assert said in refused(values)


@pytest.mark.parametrize(
    ("controller", "said"),
    [
        (
            {"ledger": {"pvc": {"existingClaim": "one"}}},
            "model refunds: controller.ledger.pvc.existingClaim is one, as for payments",
        ),
        (
            {"serviceAccount": {"name": "one"}},
            "model refunds: controller.serviceAccount.name is one, as for payments",
        ),
    ],
)
def test_models_do_not_share_what_belongs_to_one(controller: dict[str, Any], said: str) -> None:
    enabled = {"models": {"refunds": {"controller": {"enabled": True}}}}
    assert said in refused({"controller": controller, **enabled}, "two-models")


def test_all_is_said_at_once() -> None:
    values = {"store": {"uri": ""}, "controller": {"replicas": 2}, "route": {"mode": "always"}}
    assert refused(values).count("\n- ") == 3


def test_an_image_store_asks_for_a_cluster_that_mounts_images() -> None:
    said = refused({}, "image-store", kubernetes="1.32.4")
    assert "store.type is image, and Kubernetes v1.32.4 does not mount images (1.33 does)" in said


def test_an_old_cluster_is_refused() -> None:
    assert "requires kubeVersion: >=1.30.0-0" in refused({}, kubernetes="1.29.9")


def test_without_values_the_chart_says_what_it_needs() -> None:
    done = helm("template", "rel", str(CHART))
    assert done.returncode == 1
    assert "models is empty: `driftmill compile CONTRACT -o build/` writes one" in done.stderr


def test_the_bare_chart_passes_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
