"""A real Prometheus and a real Alertmanager for the laptop, set up as on a cluster.

Prometheus reads the services' metrics and evaluates the contract's rules
(`driftmill.monitor.rules`); Alertmanager takes what fires and posts it to the controller, with its
bearer token from a file. Both are found on the machine, by these names:

| program | names | comes with |
|---|---|---|
| Prometheus | `prometheus` | Debian's package `prometheus`, or prometheus.io |
| Alertmanager | `alertmanager`, `prometheus-alertmanager` | Debian's `prometheus-alertmanager` |

Scraping and evaluating every few seconds costs little for three processes and makes an alarm quick.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from driftmill.contract import Contract
from driftmill.home import Home
from driftmill.monitor import rules
from driftmill.retrain.alerts import ALERTS
from driftmill.store import write_atomic

#: The two programs and the names that they go by.
PROGRAMS = {
    "prometheus": ("prometheus",),
    "alertmanager": ("alertmanager", "prometheus-alertmanager"),
}
#: Seconds between two scrapes, and two evaluations.
INTERVAL = 5
#: Alertmanager's timing: before the first word of an alarm, before news of it, and before it is
#: told again. The chart has the same defaults; docs/monitoring.md says what they trade.
GROUP_WAIT, GROUP_INTERVAL, REPEAT_INTERVAL = "1s", "10s", "1m"
#: How long Prometheus keeps what it has read.
RETENTION = "15d"


class MissingProgram(RuntimeError):
    """Prometheus or Alertmanager is not installed; the message says how to get it."""


def program(name: str) -> str:
    """Path of `prometheus` or `alertmanager`. Raises MissingProgram."""
    for candidate in PROGRAMS[name]:
        if (path := shutil.which(candidate)) is not None:
            return path
    raise MissingProgram(
        f"{name} is not installed: apt-get install prometheus prometheus-alertmanager,"
        " or put the programs of prometheus.io on the PATH"
    )


def command(
    name: str, contract: Contract, home: Home, host: str, ports: Mapping[str, int]
) -> list[str]:
    """Write the configuration of one of the programs and give the command that runs it.

    Args:
        name: `prometheus` or `alertmanager`.
        contract: whose rules are evaluated.
        home: configuration and data go into a folder of that name below it.
        host: address that everything listens on.
        ports: port of each service by name, those of the two programs included.
    """
    folder = home.folder / name
    address = f"{host}:{ports[name]}"
    if name == "alertmanager":
        to = f"http://{host}:{ports['controller']}/alerts"
        _write(folder / "alertmanager.yml", alertmanager(to, home.token_file))
        return [
            program(name),
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--cluster.listen-address=",  # one of its kind
        ]
    targets = {n: f"{host}:{p}" for n, p in ports.items() if n not in PROGRAMS}
    _write(folder / "rules.yml", rules.rules(contract))
    _write(
        folder / "prometheus.yml",
        prometheus(targets, f"{host}:{ports['alertmanager']}", contract.model),
    )
    return [
        program(name),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION}",
        f"--web.listen-address={address}",
    ]


def prometheus(targets: Mapping[str, str], alertmanager: str, model: str) -> dict[str, Any]:
    """Prometheus' configuration.

    Args:
        targets: address of each process by its name.
        alertmanager: address of Alertmanager.
        model: what the processes are about; also on series that do not say it themselves.
    """
    return {
        "global": {"scrape_interval": f"{INTERVAL}s", "evaluation_interval": f"{INTERVAL}s"},
        "rule_files": ["rules.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {
                "job_name": f"driftmill-{name}",
                "static_configs": [{"targets": [address], "labels": {"model": model}}],
                "honor_labels": True,
            }
            for name, address in targets.items()
        ],
    }


def alertmanager(webhook: str, token_file: Path) -> dict[str, Any]:
    """Alertmanager's configuration: what may lead to a retraining goes to the controller at once,
    and again every minute for as long as it lasts; other alerts wait to be looked at.

    Args:
        webhook: where the controller takes alerts.
        token_file: file with its bearer token, read for every post.
    """
    authorization = {"type": "Bearer", "credentials_file": str(token_file)}
    hook = {"url": webhook, "http_config": {"authorization": authorization}}
    return {
        "route": {
            "receiver": "page",
            "group_by": ["alertname", "model"],
            "group_wait": GROUP_WAIT,
            "group_interval": GROUP_INTERVAL,
            "repeat_interval": REPEAT_INTERVAL,
            "routes": [
                {
                    "matchers": [f'alertname=~"{"|".join(ALERTS)}"'],
                    "receiver": "controller",
                }
            ],
        },
        "receivers": [{"name": "page"}, {"name": "controller", "webhook_configs": [hook]}],
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, yaml.safe_dump(document, sort_keys=False, width=1_000).encode())
