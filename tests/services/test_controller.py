"""The controller's service as a real process, over real HTTP, with `kill -9`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from driftmill import home as homes
from driftmill.contract import Retrain
from driftmill.retrain.ledger import Ledger, Run
from driftmill.retrain.policy import Trigger
from driftmill.store import write_atomic
from services import controller
from tests.conftest import CONTRACT
from tests.retrain.test_alerts import payload

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parents[1] / "retrain" / "fake_run.py"
JOB = Path(__file__).parents[1] / "pipelines" / "job.yaml"
EAGER = "retrain: {cooldown: 0, min_fresh_rows: 0, breaker: 9}\n"
TOKEN = "correct-horse-battery"


class Service:
    """The service of one home: started, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.home = homes.find(folder)
        self.contract = folder / "contract.yaml"
        self.token_file = folder / "token"
        self.output = folder / "output.log"
        folder.mkdir()
        self.contract.write_text(CONTRACT + EAGER)
        self.token_file.write_text(TOKEN + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.ledger = Ledger(self.home.ledger_url)

    def write(self, text: str) -> None:
        """Replace the contract in one step: half a file would count as a mistake."""
        write_atomic(self.contract, text.encode())

    def start(self, *run: str, options: tuple[str, ...] = ()) -> None:
        """Start it with a fake run that gets these arguments, and wait until it is ready."""
        command = [sys.executable, str(FAKE), *run]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.controller"),
                    *("--contract", str(self.contract), "--token-file", str(self.token_file)),
                    *("--port", str(self.port), "--poll", "0.2"),
                    *("--runner-command", shlex.join(command), *options),
                ],
                env={**os.environ, **self.home.environment()},
                stdout=output,
                stderr=output,
            )
        self.until(lambda: self.status("/readyz") == 200)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something; the test's time limit ends the wait."""
        while not true():
            if self.process is not None:
                assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def status(self, path: str) -> int | None:
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def post(self, path: str, content: Any, token: str = TOKEN) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.client.post(path, content=body, headers={"Authorization": f"Bearer {token}"})

    def alert(self, fingerprint: str = "f1") -> dict[str, Any]:
        """Deliver a drift alert; the answer to it."""
        answer = self.post("/alerts", drift(fingerprint))
        assert answer.status_code == 202, answer.text
        (decision,) = answer.json()["decisions"]
        found: dict[str, Any] = decision
        return found

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/runs").json()["runs"]
        return found

    def run(self) -> Run:
        (found,) = self.ledger.runs("tiny")
        return found

    def ended(self) -> bool:
        return self.ledger.active("tiny") is None

    def metric(self, line: str) -> float:
        """The value of the metric with this name and labels."""
        for found in self.client.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {line}")

    def stop(self) -> None:
        if self.process is not None:
            self.kill()
        for run in self.ledger.runs("tiny"):
            if run.pid is not None and psutil.pid_exists(run.pid):
                os.killpg(run.pid, signal.SIGKILL)
        self.ledger.close()
        self.client.close()


def drift(fingerprint: str = "f1") -> dict[str, Any]:
    return payload(fingerprint=fingerprint, labels={"alertname": "ModelDrift", "model": "tiny"})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path / "home")
    yield made
    made.stop()


def test_an_alert_delivered_a_hundred_times_at_once_starts_one_run(service: Service) -> None:
    service.start()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: service.alert(), range(100)))
    assert sorted(a["action"] for a in answers) == ["skip"] * 99 + ["start"]
    assert {a["code"] for a in answers} == {"started", "duplicate"}
    service.until(service.ended)
    (run,) = service.runs()
    assert run["state"] == "promoted"
    assert service.home.store.list("tiny/runs") == [
        f"tiny/runs/{run['run_id']}/outcome.json",
        f"tiny/runs/{run['run_id']}/run.json",
    ]
    assert len(list(service.home.logs.iterdir())) == 1

    # After the promotion, too.
    assert service.alert()["reason"].endswith("which is promoted.")
    decisions = service.client.get("/decisions").json()["decisions"]
    assert [(d["code"], d["deliveries"]) for d in decisions] == [("duplicate", 100), ("started", 1)]
    labels = 'action="skip",code="duplicate",model="tiny"'
    assert service.metric(f"retrain_decisions_total{{{labels}}}") == 100
    assert service.metric('retrain_runs_total{model="tiny",state="promoted"}') == 1


def test_killed_between_deciding_and_starting_it_recovers_once(service: Service) -> None:
    """What a killed controller leaves: a pending run that nobody has started."""
    trigger = Trigger("drift", "f1", datetime.now(UTC))
    service.ledger.decide(
        "tiny", Retrain(min_fresh_rows=0), trigger, fresh_rows=None, now=datetime.now(UTC)
    )
    assert service.run().state == "pending"
    service.start()
    service.until(service.ended)
    assert service.run().state == "promoted"
    service.kill()
    service.start()
    assert len(service.runs()) == 1
    assert len(service.home.store.list("tiny/runs")) == 2


def killed_while_a_run_goes_on(service: Service, go: Path) -> int:
    """Kill the controller beside a run that waits for the file `go`; the run's process id."""
    service.start("--wait", str(go))
    service.alert()
    service.until(lambda: service.run().state == "running")
    pid = service.run().pid
    assert pid is not None
    service.kill()
    return pid


def test_killed_while_a_run_goes_on_it_adopts_the_run(service: Service, tmp_path: Path) -> None:
    go = tmp_path / "go"
    pid = killed_while_a_run_goes_on(service, go)
    assert psutil.pid_exists(pid)

    service.start()
    assert service.alert("f2")["code"] == "running"
    assert service.metric('retrain_run_active{model="tiny"}') == 1
    go.touch()
    service.until(service.ended)
    run = service.run()
    assert (run.pid, run.state) == (pid, "promoted")


def test_killed_while_a_run_goes_on_that_ends_unseen(service: Service, tmp_path: Path) -> None:
    go = tmp_path / "go"
    pid = killed_while_a_run_goes_on(service, go)
    go.touch()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    service.start()
    service.until(service.ended)
    assert service.run().state == "promoted"


def test_a_polite_end_leaves_the_run_and_exits_0(service: Service, tmp_path: Path) -> None:
    service.start("--wait", str(tmp_path / "go"))
    service.alert()
    service.until(lambda: service.run().state == "running")
    process, service.process = service.process, None
    assert process is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    pid = service.run().pid
    assert pid is not None
    assert psutil.pid_exists(pid)
    assert service.run().state == "running"


def test_the_kill_switch_needs_no_restart(service: Service) -> None:
    service.start()
    service.write(CONTRACT + "retrain: {enabled: false}\n")
    assert service.alert("f1")["code"] == "disabled"
    service.write(CONTRACT + "retrain: {enabled: maybe}\n")
    assert service.alert("f2")["code"] == "disabled"
    assert service.metric('contract_reload_failures_total{model="tiny"}') == 1
    service.write(CONTRACT + EAGER)
    assert service.alert("f1")["action"] == "start"


def test_the_breaker_opens_and_reset_closes_it(service: Service) -> None:
    service.write(CONTRACT + EAGER.replace("9", "2"))
    service.start("--state", "rejected")
    for name in ("f1", "f2"):
        assert service.alert(name)["action"] == "start"
        service.until(service.ended)
    assert service.alert("f3")["code"] == "breaker"
    service.until(lambda: service.metric('retrain_breaker_open{model="tiny"}') == 1)
    assert service.post("/reset", {"reason": "looked at it"}, token="wrong").status_code == 401
    answer = service.post("/reset", {"reason": "looked at it"})
    assert (answer.status_code, answer.json()["action"]) == (200, "reset")
    assert service.alert("f3")["action"] == "start"
    service.until(lambda: service.metric('retrain_breaker_open{model="tiny"}') == 0)


def test_who_may_post(service: Service) -> None:
    service.start()
    for path in ("/alerts", "/trigger", "/reset"):
        assert service.client.post(path, json=drift()).status_code == 401
        for token in ("wrong", "-", TOKEN + "x", TOKEN.upper(), "ä"):
            headers = {b"Authorization": f"Bearer {token}".encode()}
            answer = service.client.post(path, json=drift(), headers=headers)
            assert answer.status_code == 401, token
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        basic = {"Authorization": f"Basic {TOKEN}"}
        assert service.client.post(path, json=drift(), headers=basic).status_code == 401
    assert service.ledger.decisions("tiny") == []

    service.token_file.write_text("a-new-token")
    assert service.post("/alerts", drift()).status_code == 401
    assert service.post("/alerts", drift(), token="a-new-token").status_code == 202
    service.token_file.write_text("\n")
    assert service.post("/alerts", drift(), token="-").status_code == 503
    service.token_file.unlink()
    assert service.post("/alerts", drift(), token="a-new-token").status_code == 503


def test_bad_requests_get_their_status_and_leave_no_trace(service: Service) -> None:
    service.start()
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        assert service.post("/alerts", body).status_code == 400
    for body in (b"[]", b"{}", json.dumps(drift() | {"version": "3"}).encode()):
        answer = service.post("/alerts", body)
        assert answer.status_code == 422
        assert answer.json()["problems"]
    assert service.post("/alerts", b" " * 1_100_000).status_code == 413
    chunks = (b" " * 65_536 for _ in range(40))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert service.client.post("/alerts", content=chunks, headers=headers).status_code == 413
    assert service.post("/trigger", {"reasom": "x"}).status_code == 422
    assert service.post("/trigger", {"reason": "x" * 301}).status_code == 422
    assert service.post("/trigger", b"{").status_code == 400
    for limit in ("0", "-1", "x", "1001", "9" * 5000):
        assert service.client.get("/runs", params={"limit": limit}).status_code == 422
    assert service.client.get("/alerts").status_code == 405
    assert service.client.get("/nothing").status_code == 404
    assert service.ledger.decisions("tiny") == []
    assert service.status("/livez") == 200


def test_alerts_that_are_not_for_it_are_answered_and_forgotten(service: Service) -> None:
    service.start()
    several = drift()
    several["alerts"].append(
        several["alerts"][0] | {"labels": {"alertname": "ModelDrift", "model": "other"}}
    )
    several["alerts"].append(several["alerts"][0] | {"status": "resolved"})
    answer = service.post("/alerts", several)
    assert answer.status_code == 202
    assert [d["code"] for d in answer.json()["decisions"]] == ["started", "other_model", "resolved"]
    assert len(service.ledger.decisions("tiny")) == 1


def test_a_manual_request(service: Service) -> None:
    service.start()
    answer = service.post("/trigger", {"reason": "new product line"})
    assert answer.status_code == 202
    (decision,) = answer.json()["decisions"]
    assert decision["action"] == "start"
    service.until(service.ended)
    (run,) = service.runs()
    assert (run["trigger"], run["note"], run["state"]) == ("manual", "new product line", "promoted")
    assert service.post("/trigger", b"").status_code == 202


def test_a_store_that_cannot_be_read_is_asked_for_later(service: Service) -> None:
    service.start()
    rollouts = Path(service.home.store_uri) / "tiny" / "rollout"
    rollouts.mkdir(parents=True)
    (rollouts / "00000001.json").write_text("{damaged")
    assert service.post("/alerts", drift()).status_code == 503
    service.until(lambda: service.status("/readyz") == 503)
    assert service.status("/livez") == 200
    (rollouts / "00000001.json").unlink()
    service.until(lambda: service.status("/readyz") == 200)
    assert service.alert()["action"] == "start"
    assert service.metric('retrain_tick_failures_total{model="tiny"}') >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contract": "no-such-file.yaml"}, "no-such-file.yaml: no such file"),
        ({"token": "no-such-token"}, "no-such-token"),
        ({"ledger": "nonsense"}, "not a usable SQLAlchemy URL"),
    ],
)
def test_it_says_why_it_does_not_start(
    service: Service, arguments: dict[str, str], message: str
) -> None:
    environment = {**os.environ, **service.home.environment()}
    environment["DRIFTMILL_LEDGER"] = arguments.get("ledger", service.home.ledger_url)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "services.controller", "--port", str(service.port)),
            *("--contract", arguments.get("contract", str(service.contract))),
            *("--token-file", arguments.get("token", str(service.token_file))),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode in (1, 2)
    assert ended.stderr.startswith("controller: ")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        (["job"], "the runner job needs --job-template FILE"),
        (["job", "--job-template", "/nonexistent"], "the template of Jobs cannot be read"),
        (["job", "--job-template", str(JOB)], "this is no pod; choose --runner local"),
        (["job", "--start-within", "soon"], "--start-within: "),
        (["kubeflow"], "no Kubeflow Pipelines is named"),
        (["kubeflow", "--endpoint", "http://127.0.0.1:9"], "a folder of this machine"),
    ],
)
def test_a_runner_that_cannot_be_had_is_said_at_once(
    tmp_path: Path,
    runner: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    contract, token = tmp_path / "contract.yaml", tmp_path / "token"
    contract.write_text(CONTRACT)
    token.write_text(TOKEN)
    for name in ("KUBERNETES_SERVICE_HOST", "KF_PIPELINES_ENDPOINT", "DRIFTMILL_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path))
    given = ["--contract", str(contract), "--token-file", str(token), "--runner", *runner]
    monkeypatch.setattr(sys, "argv", ["controller", *given])
    try:
        code = controller.main()
    except SystemExit as wrong:  # as argparse ends
        code = int(str(wrong.code))
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_service_can_be_asked_to_train_the_first_model(service: Service) -> None:
    service.start("--state", "rejected", options=("--train-first",))
    service.until(lambda: bool(service.runs()) and service.ended())
    assert (service.run().trigger, service.run().state) == ("first", "rejected")
