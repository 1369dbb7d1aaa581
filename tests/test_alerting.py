"""Prometheus and Alertmanager as the laptop stack sets them up, checked by their own tools."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from driftmill import alerting, home, stack
from driftmill.contract import Contract
from driftmill.retrain.alerts import ALERTS
from tests.test_stack import ANY

PORTS = {"service": 1, "monitor": 2, "controller": 3, "alertmanager": 4, "prometheus": 5}


def test_the_tools_accept_the_configuration(tiny: Contract, tmp_path: Path) -> None:
    place = home.find(tmp_path)
    tools = {"promtool": ["check", "config"], "amtool": ["check-config"]}
    if any(shutil.which(tool) is None for tool in tools):
        pytest.skip("promtool and amtool are not installed (prometheus, prometheus-alertmanager)")
    place.token_file.write_text("secret\n")
    for name in alerting.PROGRAMS:
        alerting.command(name, tiny, place, stack.HOST, PORTS)
    files = {"promtool": "prometheus/prometheus.yml", "amtool": "alertmanager/alertmanager.yml"}
    for tool, arguments in tools.items():
        done = subprocess.run(
            [tool, *arguments, str(tmp_path / files[tool])], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "secret" not in (tmp_path / files["amtool"]).read_text()


def test_only_alerts_that_lead_to_a_run_go_to_the_controller(tmp_path: Path) -> None:
    document = alerting.alertmanager("http://127.0.0.1:3/alerts", tmp_path / "token")
    (route,) = document["route"]["routes"]
    assert route["receiver"] == "controller"
    assert route["matchers"] == [f'alertname=~"{"|".join(ALERTS)}"']
    assert document["route"]["receiver"] == "page"


def test_prometheus_reads_every_service_and_not_itself(tiny: Contract) -> None:
    targets = {"service": "h:1", "monitor": "h:2"}
    document = alerting.prometheus(targets, "h:4", tiny.model)
    assert [j["job_name"] for j in document["scrape_configs"]] == [
        "driftmill-service",
        "driftmill-monitor",
    ]


def test_without_the_programs_one_sentence_says_how_to_get_them(
    tmp_path: Path, tiny: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(tiny.to_json())))
    monkeypatch.setenv("PATH", str(tmp_path))
    place = home.find(tmp_path / "home")
    with pytest.raises(stack.StackError, match="prometheus is not installed: apt-get install"):
        stack.up(path, place, ports=ANY, prometheus=True)
    with pytest.raises(stack.StackError, match="needs both monitor and controller"):
        stack.up(path, place, ports=ANY, prometheus=True, monitor=False)
    assert stack.services(place) == {}
