"""The pods of `helm test`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.chart import NAME, of, render
from tests.helm.pods import container, mounts


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({}, ["--monitor", "--closed"]),
        ({"monitor": {"enabled": False}}, ["--closed"]),
        ({"controller": {"enabled": False}}, ["--monitor"]),
        ({"networkPolicy": {"enabled": False}}, ["--monitor"]),
    ],
)
def test_it_tries_what_there_is(values: dict[str, Any], arguments: list[str]) -> None:
    (pod,) = of(render(values), "Pod").values()
    command = container(pod)["command"]
    assert command[:4] == ["python3", "-m", "services.check", f"http://{NAME}-payments:3000"]
    given = dict(argument.split("=") for argument in command[4:])
    assert given.pop("--timeout") == "60"
    assert given.pop("--tokens") == "/etc/driftmill/tokens"
    wanted = {
        "--monitor": f"http://{NAME}-payments-monitor:3001",
        "--closed": f"{NAME}-payments-controller:3002",
    }
    assert given == {name: wanted[name] for name in arguments}


def test_a_failed_pod_stays_until_the_next_test_and_one_that_passed_goes() -> None:
    (pod,) = of(render(), "Pod").values()
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["metadata"]["annotations"] == {
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
    }


def test_it_has_neither_keys_nor_contract_but_the_services_tokens() -> None:
    objects = render()
    (pod,) = of(objects, "Pod").values()
    assert "env" not in container(pod)
    service = of(objects, "Deployment")[f"{NAME}-payments"]["spec"]["template"]
    tokens = "/etc/driftmill/tokens"
    assert mounts(pod) == {"/tmp": {"name": "tmp", "emptyDir": {}}, tokens: mounts(service)[tokens]}
    (pod,) = of(render({"service": {"access": {"enabled": False}}}), "Pod").values()
    assert set(mounts(pod)) == {"/tmp"}
    assert not any("--tokens" in argument for argument in container(pod)["command"])


def test_each_model_is_tried() -> None:
    assert set(of(render({}, "two-models"), "Pod")) == {
        f"{NAME}-payments-test",
        f"{NAME}-refunds-test",
    }
    assert not of(render({"test": {"enabled": False}}), "Pod")
