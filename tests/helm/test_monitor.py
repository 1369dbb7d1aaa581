"""A model's monitor."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.helm.chart import APIS, CI, NAME, of, render
from tests.helm.pods import container, environment, mounts

MONITOR = f"{NAME}-payments-monitor"
URL = f"http://{NAME}-payments-controller.shop.svc:3002/alerts"
CONTRACT = yaml.safe_load(CI["minimal"].read_text())["models"]["payments"]["contract"]


def deployment(values: dict[str, Any] | None = None, apis: tuple[str, ...] = APIS) -> Any:
    return of(render(values, apis=apis), "Deployment")[MONITOR]


def test_there_is_never_more_than_one() -> None:
    spec = deployment()["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize(
    ("webhook", "apis", "controller", "posts"),
    [
        ("auto", APIS, True, False),
        ("auto", (), True, True),
        ("auto", (), False, False),
        ("direct", APIS, True, True),
        ("none", (), True, False),
    ],
)
def test_who_tells_the_controller(
    webhook: str, apis: tuple[str, ...], controller: bool, posts: bool
) -> None:
    values = {"monitor": {"webhook": webhook}, "controller": {"enabled": controller}}
    template = deployment(values, apis)["spec"]["template"]
    args = ["--contract=/etc/driftmill/contract.yaml"]
    if posts:
        args += [f"--webhook={URL}", "--token-file=/etc/driftmill/webhook-token"]
    assert container(template)["args"] == args
    sources = mounts(template)["/etc/driftmill"]["projected"]["sources"]
    secret = {
        "name": f"{NAME}-payments-token",
        "items": [{"key": "token", "path": "webhook-token"}],
    }
    assert sources[1:] == ([{"secret": secret}] if posts else [])


def test_it_reads_the_contract_as_it_was_written() -> None:
    odd = '# \'quotes\' "more" \\ \t {{ .Values }} {{ "x" }} ü 漢 😀 12345678901234567890 1e3  \n'
    text = f"{odd}{CONTRACT}"
    objects = render({"models": {"payments": {"contract": text}}})
    found = of(objects, "ConfigMap")[f"{NAME}-payments-contract"]
    assert found["data"] == {"contract.yaml": text}
    source = mounts(deployment()["spec"]["template"])["/etc/driftmill"]["projected"]["sources"][0]
    assert source == {"configMap": {"name": found["metadata"]["name"]}}


def test_a_changed_contract_makes_a_new_pod_of_the_monitor_and_of_nothing_else() -> None:
    changed = {"models": {"payments": {"contract": f"{CONTRACT}description: new\n"}}}
    before, after = of(render(), "Deployment"), of(render(changed), "Deployment")
    differing = {n for n in before if before[n]["spec"]["template"] != after[n]["spec"]["template"]}
    assert differing == {MONITOR}


def test_it_records_nothing_in_mlflow_and_has_no_keys_of_it() -> None:
    template = deployment({"tracking": {"uri": "https://mlflow"}})["spec"]["template"]
    assert not [name for name in environment(template) if "MLFLOW" in name]


def test_it_can_be_left_out() -> None:
    found = render({"monitor": {"enabled": False}})
    assert MONITOR not in of(found, "Deployment")
    assert MONITOR not in of(found, "Service")
