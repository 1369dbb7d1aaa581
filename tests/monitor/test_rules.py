"""The alert rules and their tests, run by the real promtool where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill.contract import Contract, load
from driftmill.monitor import rules
from driftmill.retrain.alerts import ALERTS

RUNBOOKS = Path("docs/runbooks")


def changed(contract: Contract, **sections: dict[str, Any]) -> Contract:
    values = json.loads(contract.to_json())
    for name, fields in sections.items():
        values[name] |= fields
    return Contract.model_validate(values)


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; it comes with the package prometheus")
    return found


def run(promtool: str, folder: Path, document: dict[str, Any], tests: dict[str, Any]) -> str:
    """What promtool says against the rules; empty where it is content."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(document))
    (folder / "rules_test.yaml").write_text(yaml.safe_dump(tests))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return done.stdout + done.stderr
    return ""


#: As on a cluster.
SHOP = {"namespace": "shop"}

VARIANTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a floor above which a metric must stay": (
        {},
        {"gates": {"floor": 0.6}, "monitor": {"labels_within": 7200}},
    ),
    "on a cluster, a metric of which less is better": (
        SHOP,
        {
            "gates": {"floor": 0.5},
            "train": {"metric": {"name": "log_loss", "direction": "minimize"}},
            "monitor": {"labels_within": 600},
            "serve": {"log": {"on_error": "serve"}},
        },
    ),
    "on a cluster, other promises, no labels": (
        SHOP,
        {
            "owner": "risk team",
            "serve": {"slo": {"availability": 0.95, "latency_ms": 1000, "latency": 0.95}},
            "monitor": {"labels_within": None},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_alert_fires_when_it_should_and_only_then(
    tiny: Contract, promtool: str, tmp_path: Path, variant: str
) -> None:
    where, sections = VARIANTS[variant]
    parts = {name: fields for name, fields in sections.items() if name != "owner"}
    contract = changed(tiny, **parts).model_copy(update={"owner": sections.get("owner", "")})
    tests = rules.unit_tests(contract, "rules.yaml", where=where)
    assert run(promtool, tmp_path, rules.rules(contract, where=where), tests) == ""


@pytest.mark.slow
def test_the_tests_notice_wrong_rules(tiny: Contract, promtool: str, tmp_path: Path) -> None:
    contract = changed(tiny, gates={"floor": 0.6}, monitor={"labels_within": 600})
    tests = rules.unit_tests(contract, "rules.yaml", where=SHOP)
    document = rules.rules(contract, where=SHOP)
    for rule in alert_rules(document):
        never, always = f"({rule['expr']}) and vector(1) > 2", "vector(1)"
        rule["expr"] = never
        said = run(promtool, tmp_path, document, _only(tests, rule["alert"], "fires"))
        assert "FAILED" in said, f"{rule['alert']} that never fires"
        rule["expr"], hold = always, rule.pop("for", None)
        said = run(promtool, tmp_path, document, _only(tests, rule["alert"], "is calm"))
        assert "FAILED" in said, f"{rule['alert']} that always fires"
        assert hold != ""


@pytest.mark.slow
@pytest.mark.parametrize("where", [{}, SHOP], ids=["another model", "another namespace"])
def test_the_tests_notice_rules_that_take_a_neighbours_series_for_their_own(
    tiny: Contract, promtool: str, tmp_path: Path, where: dict[str, str]
) -> None:
    contract = changed(tiny, gates={"floor": 0.6}, monitor={"labels_within": 600})
    document = rules.rules(contract, where=where)
    ((name, value),) = (where or {"model": contract.model}).items()
    for rule in (rule for group in document["groups"] for rule in group["rules"]):
        rule["expr"] = rule["expr"].replace(f'{name}="{value}"', f'{name}=~".*"')
    said = run(promtool, tmp_path, document, rules.unit_tests(contract, "rules.yaml", where=where))
    noticed = set(re.findall(r"name: (\w+) (?:fires|is calm)", said))
    assert noticed == {rule["alert"] for rule in alert_rules(document)}


def _only(tests: dict[str, Any], alert: str, what: str) -> dict[str, Any]:
    found = [t for t in tests["tests"] if t["name"] == f"{alert} {what}"]
    assert len(found) == 1
    return {**tests, "tests": found}


def alert_rules(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in document["groups"] for rule in group["rules"] if "alert" in rule]


def test_every_selector_and_everything_that_comes_out_says_where(tiny: Contract) -> None:
    where = {"namespace": rules.NAMESPACE, "cluster": "north"}
    contract = changed(tiny, gates={"floor": 0.6}, monitor={"labels_within": 600})
    for group in rules.rules(contract, where=where)["groups"]:
        for rule in group["rules"]:
            selectors = re.findall(r"\{(.*?)\}", rule["expr"])
            mine = f'model="{contract.model}",namespace="{rules.NAMESPACE}",cluster="north"'
            assert selectors
            assert all(selector.startswith(mine) for selector in selectors), rule["expr"]
            assert where.items() <= rule["labels"].items()
            # Nothing that changes when a pod is replaced makes an alert another one.
            assert not {"pod", "instance"} & set(re.findall(r"\w+", rule["expr"]))


def test_each_part_has_its_group_and_is_missed_when_it_is_gone(tiny: Contract) -> None:
    groups = {g["name"]: g["rules"] for g in rules.rules(tiny)["groups"]}
    assert list(groups) == [f"driftmill-tiny-{part}" for part in ("slo", *rules.PARTS)]
    for part, series in (
        ("service", "model_rollout"),
        ("monitor", "model_drift"),
        ("controller", "retrain_run_"),
    ):
        assert any(
            r["expr"].startswith(f"absent({series}") for r in groups[f"driftmill-tiny-{part}"]
        )


def test_a_threshold_is_the_contracts(tiny: Contract) -> None:
    contract = changed(
        tiny,
        gates={"floor": 0.75},
        serve={"slo": {"availability": 0.99, "latency_ms": 25.0, "latency": 0.95}},
        monitor={"poll": 60.0},
    )
    expressions = {a.name: a.expr for a in rules.alerts(contract)}
    assert expressions["ModelQualityBelowFloor"].endswith("< 0.75")
    assert "> 0.144" in expressions["ModelErrorBudgetBurn"]
    assert "> 0.72" in expressions["ModelLatencyBudgetBurn"]
    assert expressions["ModelMonitorStale"].endswith("> 1200")
    recorded = [r["expr"] for r in rules.rules(contract)["groups"][0]["rules"]]
    assert any('le="0.025"' in expr for expr in recorded)


def test_the_controller_knows_the_alerts_that_are_its_business(tiny: Contract) -> None:
    assert set(ALERTS) <= {alert.name for alert in rules.alerts(tiny)}


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    contract = load("examples/payments/contract.yaml")
    names = {alert.name for alert in rules.alerts(contract)}
    assert names == {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}
    for rule in alert_rules(rules.rules(contract)):
        assert rule["annotations"]["runbook_url"].endswith(f"docs/runbooks/{rule['alert']}.md")
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_a_latency_that_is_not_counted_cannot_be_promised(tiny: Contract) -> None:
    with pytest.raises(ValueError, match="latencies are counted up to"):
        changed(tiny, serve={"slo": {"latency_ms": 30}})
