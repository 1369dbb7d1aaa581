"""The loop with real processes: a better model comes to serve, a worse one does not, and an
interrupted demo leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from driftmill import alerting, rollout, runs, stack
from driftmill import home as homes
from driftmill.contract import load
from driftmill.data import sources
from driftmill.home import Home
from driftmill.monitor import dashboards
from driftmill.replay import records
from driftmill.retrain.ledger import Ledger

pytestmark = pytest.mark.slow

EXAMPLE = "examples/payments/contract.yaml"

#: The demo's data without its change: nothing a new model could be better at.
CONTRACT = """
apiVersion: driftmill/v1
model: steady
task: classification
data:
  source: "sim:payments?rows=6000&seed=11&onset=none"
  target: {name: fraud, labels: ["no", "yes"]}
  id: payment_id
  time: {columns: at, until: 2026-01-03T00:00:00Z}
  columns: COLUMNS
train:
  candidates: [CANDIDATE]
  search: {method: none}
retrain: {min_fresh_rows: 100, cooldown: 0s}
tracking: none
"""


def contract_text(candidate: str) -> str:
    columns = [c.model_dump(mode="json", exclude_defaults=True) for c in load(EXAMPLE).data.columns]
    payments = load(EXAMPLE)
    assert payments.data.time is not None
    assert payments.data.time.until is not None
    until = payments.data.time.until.isoformat()
    return (
        CONTRACT.replace("COLUMNS", json.dumps(columns))
        .replace("CANDIDATE", candidate)
        .replace("2026-01-03T00:00:00Z", until)
    )


def processes_of(home: Path) -> list[str]:
    """Command lines of living processes whose environment names this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DRIFTMILL_HOME", "").startswith(str(home)):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    place = homes.find(tmp_path / "home")
    yield place
    stack.down(place)
    assert processes_of(place.folder) == []


def test_drift_one_run_promotion_and_not_one_failed_request(tmp_path: Path) -> None:
    """The demo: it exits 0 only if every stage happened, and it says which."""
    command = [sys.executable, "-m", "driftmill", "demo", "digits"]
    environment = {**os.environ, "DRIFTMILL_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    check_demo(tmp_path, "digits")


def test_the_same_by_a_real_prometheus_and_alertmanager(tmp_path: Path) -> None:
    """Where they are installed: alarms come from them, and every query of the dashboards finds
    something."""
    installed = all(map(shutil.which, ("prometheus", "promtool"))) and any(
        map(shutil.which, alerting.PROGRAMS["alertmanager"])
    )
    option = ["--with-prometheus"] if installed else []
    command = [sys.executable, "-m", "driftmill", "demo", "payments", *option]
    environment = {**os.environ, "DRIFTMILL_HOME": str(tmp_path)}
    log = tmp_path / "demo.log"
    pages = (dashboards.model("payments"), dashboards.overview())
    unanswered = {q for page in pages for q in dashboards.queries(page, "payments")}
    with log.open("w") as output:
        demo = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        place = homes.find(tmp_path / "demo-payments")
        while demo.poll() is None:
            if installed and (url := stack.address(place, "prometheus")) is not None:
                unanswered -= {q for q in unanswered if answer(url, q)}
            time.sleep(1.0)
    assert demo.returncode == 0, log.read_text()
    check_demo(tmp_path, "payments")
    if not installed:
        pytest.skip("the demo passed, without prometheus and prometheus-alertmanager")
    assert unanswered == set()


def answer(url: str, query: str) -> list[dict[str, object]]:
    """What Prometheus says to a query; nothing while it starts or ends."""
    try:
        said = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10.0)
    except httpx.TransportError:
        return []
    if said.status_code == 503:
        return []
    assert said.status_code == 200, f"{query}: {said.text}"
    found: list[dict[str, object]] = said.json()["data"]["result"]
    return found


def check_demo(home: Path, example: str) -> None:
    """What a demo that went well leaves behind."""
    folder = home / f"demo-{example}"
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["failed"] == 0
    assert len(summary["versions"]) == 2
    assert [c["name"] for c in summary["checks"] if not c["passed"]] == []
    page = (folder / "demo.html").read_text()
    assert page.count("<svg") == 3
    assert "http-equiv" not in page
    assert 'src="http' not in page
    assert processes_of(home) == []
    # What it leaves is a store that the next command accepts.
    store = homes.find(folder).store
    assert [r.champion for r in rollout.history(store, example)] == summary["versions"]
    outcomes = runs.outcomes(store, example)
    assert [o.state for o in outcomes] == ["promoted", "promoted"]


def test_a_worse_challenger_changes_nothing_and_the_ledger_says_why(
    tmp_path: Path, home: Home
) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(contract_text("hist-gradient-boosting"))
    train = [sys.executable, "-m", "pipelines.run", "--contract", str(path)]
    environment = {**os.environ, **home.environment()}
    subprocess.run(train, env=environment, check=True, timeout=120)
    before = rollout.history(home.store, "steady")

    running = stack.up(path, home, ports=dict.fromkeys(stack.PORTS, 0))
    document = load(path)
    rows = sources.stream(document).head(400)
    service = running.services["service"].url
    answered = httpx.post(f"{service}/predict", json={"records": list(records(rows, document))})
    answered.raise_for_status()
    labels = [
        {"id": p["id"], "label": label}
        for p, label in zip(answered.json()["predictions"], rows["fraud"], strict=True)
    ]
    httpx.post(f"{service}/feedback", json={"labels": labels}).raise_for_status()

    # From now on only a weaker family may be tried: its model cannot be surely better.
    path.write_text(contract_text("linear"))
    controller = running.services["controller"].url
    token = running.token_file.read_text().strip()
    deadline = time.monotonic() + 120
    ledger = Ledger(home.ledger_url)
    while not ledger.runs("steady"):
        httpx.post(
            f"{controller}/trigger",
            json={"reason": "a test of the gate"},
            headers={"Authorization": f"Bearer {token}"},
        ).raise_for_status()
        assert time.monotonic() < deadline, ledger.decisions("steady")
        time.sleep(0.5)  # labels reach the store when the log rotates
    while ledger.runs("steady")[0].state in ("pending", "running"):
        assert time.monotonic() < deadline, "the run did not end"
        assert httpx.get(f"{service}/readyz").status_code == 200
        time.sleep(0.2)

    (run,) = ledger.runs("steady")
    assert run.state == "rejected", run.reason
    assert "not surely above the margin" in (run.reason or "")
    assert rollout.history(home.store, "steady") == before
    assert httpx.get(f"{service}/model").json()["version"] == before[-1].champion
    started = [d for d in ledger.decisions("steady") if d.action == "start"]
    assert [d.run_id for d in started] == [run.run_id]
    ledger.close()


@pytest.mark.parametrize("line", ["training the first model", "first champion", "onset"])
def test_ctrl_c_leaves_no_process_and_a_good_store(tmp_path: Path, line: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "driftmill", "demo", "payments"],
        env={**os.environ, "DRIFTMILL_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for text in process.stdout:
        if line in text:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest
    assert processes_of(tmp_path) == []
    place = homes.find(tmp_path / "demo-payments")
    rollout.history(place.store, "payments")
    for command, code in (("status", 5), (f"runs {EXAMPLE}", 0), (f"decisions {EXAMPLE}", 0)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "driftmill",
                "--home",
                str(place.folder),
                *command.split(),
                "--json",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
