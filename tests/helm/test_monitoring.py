"""What the Prometheus operator gets: scrapes, rules, and the way of an alarm to the controller."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill import alerting, values
from driftmill.contract import Contract, load
from driftmill.monitor import rules
from driftmill.retrain.alerts import ALERTS
from tests.helm.chart import APIS, NAME, NAMESPACE, Object, of, refused, render

KINDS = {
    "serviceMonitor": "ServiceMonitor",
    "prometheusRule": "PrometheusRule",
    "alertmanagerConfig": "AlertmanagerConfig",
}


@pytest.fixture(scope="module")
def payments() -> Contract:
    return load("examples/payments/contract.yaml")


@pytest.fixture(scope="module")
def compiled(payments: Contract) -> dict[str, Any]:
    """The values that `driftmill compile` writes."""
    return values.for_model(payments, store="s3://models/driftmill", text=payments.to_json())


@pytest.mark.parametrize(
    ("mode", "with_it", "without"),
    [("always", True, True), ("skipIfMissing", True, False), ("never", False, False)],
)
def test_the_mode_decides(mode: str, with_it: bool, without: bool) -> None:
    settings = {"monitoring": {key: {"mode": mode} for key in KINDS}}
    for apis, made in ((APIS, with_it), ((), without)):
        objects = render(settings, "full", apis=apis)
        assert {kind: bool(of(objects, kind)) for kind in KINDS.values()} == dict.fromkeys(
            KINDS.values(), made
        )


@pytest.mark.parametrize("key", KINDS)
def test_each_has_its_own_mode(key: str) -> None:
    objects = render({"monitoring": {key: {"mode": "never"}}}, "full")
    assert [k for k, kind in KINDS.items() if not of(objects, kind)] == [key]


@pytest.mark.parametrize("key", KINDS)
def test_a_missing_kind_that_must_be_there_is_a_mistake(key: str) -> None:
    wanted = {"monitoring": {key: {"mode": "failIfMissing"}}}
    said = refused(wanted, "full", apis=())
    assert f"monitoring.{key}.mode is failIfMissing" in said
    assert KINDS[key] in said
    assert "install the Prometheus operator" in said
    assert of(render(wanted, "full"), KINDS[key])


@pytest.mark.parametrize("key", KINDS)
def test_labels_are_added(key: str) -> None:
    objects = render({"monitoring": {key: {"labels": {"release": "kube"}}}}, "full")
    for thing in of(objects, KINDS[key]).values():
        labels = thing["metadata"]["labels"]
        assert labels["release"] == "kube"
        assert labels["app.kubernetes.io/name"] == "driftmill"


@pytest.mark.parametrize("base", ["two-models", "canary-route", "full"])
def test_every_service_is_read_once_at_a_port_that_it_has(base: str) -> None:
    objects = render({}, base)
    monitors = of(objects, "ServiceMonitor").values()
    services = of(objects, "Service")
    assert services
    for service in services.values():
        labels = service["metadata"]["labels"]
        (monitor,) = (m for m in monitors if _selects(m["spec"]["selector"], labels))
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["interval"] == ("5s" if base == "full" else "15s")
        ports = [port["name"] for port in service["spec"]["ports"]]
        assert ports.count(endpoint["port"]) == 1
    for deployment in of(objects, "Deployment").values():
        pod = deployment["spec"]["template"]["metadata"]["labels"]
        behind = [n for n, s in services.items() if s["spec"]["selector"].items() <= pod.items()]
        assert behind == [deployment["metadata"]["name"]]


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items() and all(
        e["operator"] == "In" and labels[e["key"]] in e["values"]
        for e in selector.get("matchExpressions", ())
    )


def test_a_services_metrics_are_read_with_their_token() -> None:
    values = {
        "models": {
            "payments": {"service": {"access": {"existingSecret": "ours"}}},
            "refunds": {"service": {"access": {"enabled": False}}},
        }
    }
    for given, payments in (({}, f"{NAME}-payments-access"), (values, "ours")):
        objects = render(given, "two-models")
        found = of(objects, "ServiceMonitor")
        endpoints = {name: m["spec"]["endpoints"][0] for name, m in found.items()}
        assert endpoints[f"{NAME}-payments"]["authorization"] == {
            "type": "Bearer",
            "credentials": {"name": payments, "key": "metrics"},
        }
        assert "authorization" not in endpoints[NAME]
        assert ("authorization" in endpoints[f"{NAME}-refunds"]) == (not given)


def test_prometheus_reads_nothing_of_another_release() -> None:
    for monitor in of(render(), "ServiceMonitor").values():
        for service in of(render({}, release="second"), "Service").values():
            assert not _selects(monitor["spec"]["selector"], service["metadata"]["labels"])


@pytest.mark.parametrize("namespace", [NAMESPACE, "123"])
def test_the_rules_are_those_of_the_contract(
    payments: Contract, compiled: dict[str, Any], namespace: str
) -> None:
    objects = render(compiled, namespace=namespace)
    rule = of(objects, "PrometheusRule")[f"{NAME}-payments"]
    wanted = rules.rules(payments, where={"namespace": namespace})["groups"]
    assert rule["spec"]["groups"] == [{**group, "interval": "15s"} for group in wanted]
    assert rules.NAMESPACE not in json.dumps(objects)


def test_nothing_alerts_of_what_the_values_leave_out(compiled: dict[str, Any]) -> None:
    def missing(*off: str) -> set[str]:
        objects = render({**compiled, **{part: {"enabled": False} for part in off}})
        (rule,) = of(objects, "PrometheusRule").values()
        found = [r for group in rule["spec"]["groups"] for r in group["rules"]]
        return {r["alert"] for r in found if r["expr"].startswith("absent(")}

    parts = {
        "service": "ModelServiceAbsent",
        "monitor": "ModelMonitorAbsent",
        "controller": "RetrainingAbsent",
    }
    assert missing() == set(parts.values())
    for part, alert in parts.items():
        assert missing(part) == set(parts.values()) - {alert}


def test_promtool_takes_the_rules(compiled: dict[str, Any], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it comes with the package prometheus")
    spec = of(render(compiled), "PrometheusRule")[f"{NAME}-payments"]["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    command = [promtool, "check", "rules", str(tmp_path / "rules.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {sum(len(g['rules']) for g in spec['groups'])} rules found" in done.stdout


def test_runbooks_lie_where_the_values_say() -> None:
    set_ = yaml.safe_load(Path("helm/driftmill/ci/full-values.yaml").read_text())
    group = set_["models"]["payments"]["rules"][0]
    own = {"alert": "Ours", "expr": "vector(1)", "annotations": {"runbook_url": "https://a/b"}}
    more = {"models": {"payments": {"rules": [{**group, "rules": [*group["rules"], own]}]}}}
    (rule,) = of(render(more, "full"), "PrometheusRule").values()
    found = {
        r["alert"]: r["annotations"] for r in rule["spec"]["groups"][0]["rules"] if "alert" in r
    }
    assert found["ModelDrift"]["runbook_url"] == "https://wiki.example.com/driftmill/ModelDrift.md"
    assert found["Ours"]["runbook_url"] == "https://a/b"
    assert "{{ $labels.version }}" in found["ModelDrift"]["summary"]


def test_a_model_without_rules_or_controller_gets_neither_rules_nor_a_route() -> None:
    objects = render({}, "two-models")
    assert not of(objects, "PrometheusRule")
    assert set(of(objects, "AlertmanagerConfig")) == {f"{NAME}-payments"}


def test_alarms_go_to_the_controller_with_its_token() -> None:
    objects = render({})
    config = of(objects, "AlertmanagerConfig")[f"{NAME}-payments"]["spec"]
    (receiver,) = config["receivers"]
    (hook,) = receiver["webhookConfigs"]
    controller = f"{NAME}-payments-controller"
    assert hook["url"] == f"http://{controller}.{NAMESPACE}.svc:3002/alerts"
    assert of(objects, "Service")[controller]["spec"]["ports"][0]["port"] == 3002
    token = hook["httpConfig"]["authorization"]["credentials"]
    assert token["key"] in of(objects, "Secret")[token["name"]].get("data", {})
    given = render({}, "existing-secrets")
    (config,) = (o["spec"] for o in of(given, "AlertmanagerConfig").values())
    hook = config["receivers"][0]["webhookConfigs"][0]
    assert hook["httpConfig"]["authorization"]["credentials"] == {
        "name": "our-token",
        "key": "bearer",
    }


def test_the_settings_are_the_laptops() -> None:
    (config,) = of(render({}), "AlertmanagerConfig").values()
    route = config["spec"]["route"]
    (alarms,) = (m["value"] for m in route["matchers"] if m["name"] == "alertname")
    assert alarms == "|".join(ALERTS)
    laptop = alerting.alertmanager("http://controller/alerts", Path("token"))["route"]
    assert route["groupBy"] == laptop["group_by"]
    assert [route[k] for k in ("groupWait", "groupInterval", "repeatInterval")] == [
        laptop[k] for k in ("group_wait", "group_interval", "repeat_interval")
    ]


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        *[({"alertname": name}, "controller") for name in ALERTS],
        ({"alertname": "ModelDrift", "model": "refunds"}, "page"),
        ({"alertname": "ModelDrift", "namespace": "elsewhere"}, "page"),
        ({"alertname": "ModelServiceAbsent"}, "page"),
        ({"alertname": "ModelQualityBelowFloor"}, "page"),
    ],
)
def test_alertmanager_tells_the_controller_of_its_alarms_alone(
    labels: dict[str, str], receiver: str, tmp_path: Path
) -> None:
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("amtool is not installed; it comes with the package prometheus-alertmanager")
    (config,) = of(render({}), "AlertmanagerConfig").values()
    file = tmp_path / "alertmanager.yaml"
    file.write_text(yaml.safe_dump(_configuration(config)))
    given = {"namespace": NAMESPACE, "model": "payments", **labels}
    done = subprocess.run(
        [amtool, "config", "routes", "test", f"--config.file={file}"]
        + [f"{name}={value}" for name, value in given.items()],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, receiver), done.stderr


def _configuration(thing: Object) -> dict[str, Any]:
    """Alertmanager's own file, as the operator makes it of an AlertmanagerConfig."""
    spec = thing["spec"]
    route = spec["route"]
    own = {
        "receiver": route["receiver"],
        "group_by": route["groupBy"],
        "matchers": [
            f"{m['name']}{m['matchType']}{json.dumps(m['value'])}" for m in route["matchers"]
        ],
        "group_wait": route["groupWait"],
        "group_interval": route["groupInterval"],
        "repeat_interval": route["repeatInterval"],
    }
    hooks = [
        {"url": hook["url"], "send_resolved": hook["sendResolved"]}
        for hook in spec["receivers"][0]["webhookConfigs"]
    ]
    return {
        "route": {"receiver": "page", "routes": [own]},
        "receivers": [{"name": "page"}, {"name": route["receiver"], "webhook_configs": hooks}],
    }
