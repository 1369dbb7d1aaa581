"""The account of services, monitors and training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.chart import NAME, of, render
from tests.helm.pods import templates


@pytest.mark.parametrize(
    ("account", "name", "made"),
    [
        ({}, NAME, True),
        ({"name": "models"}, "models", True),
        ({"create": False, "name": "models"}, "models", False),
        ({"create": False}, "default", False),
    ],
)
def test_pods_run_as_it(account: dict[str, Any], name: str, made: bool) -> None:
    objects = render({"serviceAccount": account, "controller": {"enabled": False}})
    assert (name in of(objects, "ServiceAccount")) == made
    assert {t["spec"]["serviceAccountName"] for t in templates(objects).values()} == {name}


def test_it_may_be_known_to_a_cloud() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/store"}
    objects = render({"serviceAccount": {"annotations": role}})
    assert of(objects, "ServiceAccount")[NAME]["metadata"]["annotations"] == role


def test_jobs_of_a_controller_run_as_it_and_the_controller_does_not() -> None:
    found = {name: t["spec"]["serviceAccountName"] for name, t in templates(render()).items()}
    assert found[f"ConfigMap {NAME}-payments-training"] == NAME
    assert found[f"Deployment {NAME}-payments-controller"] == f"{NAME}-payments-controller"
