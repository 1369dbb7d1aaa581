"""The controller on a real store, ledger and processes; only the clock is ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from driftmill import contract as contracts
from driftmill import home as homes
from driftmill import rollout, runs
from driftmill.bundle import Manifest
from driftmill.contract import Retrain
from driftmill.home import Home
from driftmill.retrain import alerts
from driftmill.retrain.controller import LOST, Controller, Reply
from driftmill.retrain.ledger import Ledger, Run
from driftmill.retrain.runner import LocalRunner
from driftmill.store import Store
from tests.conftest import CONTRACT
from tests.retrain.test_alerts import parse, payload

FAKE = Path(__file__).parent / "fake_run.py"
#: A contract under which nothing but the incident itself holds a run back.
EAGER = "retrain: {cooldown: 0, min_fresh_rows: 0, breaker: 9}\n"


class World:
    """A home with a contract; `controller()` is a new controller on it, as after a restart."""

    def __init__(self, folder: Path) -> None:
        self.home: Home = homes.find(folder)
        self.store = Store(self.home.store_uri)
        self.ledger = Ledger(self.home.ledger_url)
        self.path = folder / "contract.yaml"
        self.offset = timedelta(0)
        self.write()

    def write(self, more: str = EAGER) -> None:
        """Replace the contract."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(CONTRACT + more)

    def add_version(self, version: str) -> None:
        """Put the manifest of a version into the store; the controller reads nothing else of it."""
        manifest = Manifest(
            model="tiny",
            version=version,
            created=datetime.now(UTC),
            files={},
            contract=contracts.parse(CONTRACT),
            family="linear",
            params={},
            data={},
            code_version="0",
            environment={},
        )
        key = f"tiny/bundles/{version}/manifest.json"
        self.store.write(key, manifest.model_dump_json().encode())

    def now(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def controller(self, *arguments: str) -> Controller:
        command = (sys.executable, str(FAKE), *arguments)
        runner = LocalRunner(self.home, command)
        return Controller(self.path, self.store, self.ledger, runner, clock=self.now)

    def run(self) -> Run:
        """The only run."""
        (found,) = self.ledger.runs("tiny")
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "home")
    yield made
    for run in made.ledger.runs("tiny"):
        if run.pid is not None:
            try:
                os.killpg(run.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    made.ledger.close()


def alert(controller: Controller, **change: Any) -> Reply:
    (reply,) = controller.handle(parse(payload(**change)))
    return reply


def drift(fingerprint: str = "f1") -> dict[str, Any]:
    return {"fingerprint": fingerprint, "labels": {"alertname": "ModelDrift", "model": "tiny"}}


def tick_until(controller: Controller, true: Callable[[], bool]) -> None:
    """Tick until something is so; the test's time limit ends the wait."""
    controller.tick()
    while not true():
        time.sleep(0.05)
        controller.tick()


def sample(controller: Controller, name: str, **labels: str) -> float | None:
    return controller.metrics.registry.get_sample_value(name, {"model": "tiny", **labels})


def test_an_alert_becomes_a_run_and_the_run_is_closed_by_its_outcome(world: World) -> None:
    controller = world.controller()
    reply = alert(controller, **drift())
    assert (reply.action, reply.deliveries) == ("start", 1)
    assert world.run().state == "pending"
    tick_until(controller, lambda: world.run().ended is not None)
    run = world.run()
    assert (run.run_id, run.state, run.version) == (reply.run_id, "promoted", "abcdefabcdef")
    assert run.reason == "the fake run says so"
    outcome = runs.read(world.store, "tiny", run.run_id)
    assert outcome is not None
    assert outcome.trigger == "drift: amount drifted"
    assert run.ended == outcome.ended

    again = alert(controller, **drift())
    assert (again.action, again.code) == ("skip", "duplicate")
    assert again.reason.endswith("which is promoted.")
    assert sample(controller, "retrain_decisions_total", action="start", code="started") == 1
    assert sample(controller, "retrain_runs_total", state="promoted") == 1
    assert sample(controller, "retrain_run_active") == 0
    assert sample(controller, "retrain_last_success_timestamp_seconds") == pytest.approx(
        outcome.ended.timestamp()
    )


def test_what_is_not_for_it_is_ignored(world: World) -> None:
    controller = world.controller()
    other = alert(controller, labels={"alertname": "ModelDrift", "model": "other"})
    assert (other.action, other.code) == ("ignore", "other_model")
    name = alert(controller, labels={"alertname": "HighLatency", "model": "tiny"})
    assert (name.action, name.code) == ("ignore", "other_alert")
    resolved = alert(controller, status="resolved", **drift())
    assert (resolved.action, resolved.code) == ("ignore", "resolved")
    assert world.ledger.decisions("tiny") == []


def test_a_late_alert_about_a_model_that_no_longer_serves_is_stale(world: World) -> None:
    controller = world.controller()
    rollout.change(world.store, "tiny", champion="v2", by="me")
    world.add_version("v2")
    reply = alert(controller)  # about v1
    assert (reply.code, reply.reason) == (
        "stale",
        "The alert is about version v1, but v2 serves now.",
    )


def test_a_run_without_an_outcome_has_failed_and_says_so(world: World) -> None:
    controller = world.controller("--silent")
    alert(controller, **drift())
    tick_until(controller, lambda: world.run().ended is not None)
    run = world.run()
    assert run.state == "failed"
    assert f"process {run.pid} ended with exit code 1 and left no outcome" in run.reason
    assert f"run-{run.run_id}.log" in run.reason
    written = runs.read(world.store, "tiny", run.run_id)
    assert written is not None
    assert (written.state, written.reason) == ("failed", run.reason)


def test_a_run_that_was_killed_just_after_it_promoted_has_promoted(
    world: World, tmp_path: Path
) -> None:
    controller = world.controller("--wait", str(tmp_path / "never"))
    alert(controller, **drift())
    tick_until(controller, lambda: world.run().state == "running")
    run = world.run()
    rollout.change(world.store, "tiny", champion="v2", by=run.run_id, reason="it is better")
    world.add_version("v2")
    assert run.pid is not None
    os.kill(run.pid, signal.SIGKILL)
    tick_until(controller, lambda: world.run().ended is not None)
    assert (world.run().state, world.run().reason) == ("promoted", "it is better")


def test_a_decided_run_is_begun_by_the_next_controller_once(world: World) -> None:
    """The first controller is killed between deciding and starting."""
    alert(world.controller(), **drift())
    assert world.run().state == "pending"
    tick_until(world.controller(), lambda: world.run().ended is not None)
    assert world.run().state == "promoted"
    assert len(world.store.list("tiny/runs")) == 2  # run.json and outcome.json of one run


def test_a_started_run_that_was_not_noted_is_adopted(world: World, tmp_path: Path) -> None:
    """The first controller is killed between starting the process and writing that down."""
    alert(world.controller(), **drift())
    go = tmp_path / "go"
    command = (sys.executable, str(FAKE), "--wait", str(go))
    process = LocalRunner(world.home, command).start(world.run(), world.controller().contract)
    assert process is not None
    note = world.home.folder / "runs" / world.run().run_id / "process"
    while not note.read_text():
        time.sleep(0.02)

    second = world.controller()
    second.tick()
    assert (world.run().state, world.run().pid) == ("running", process.pid)
    # Off or not: what runs, runs on.
    world.write("retrain: {enabled: false}\n")
    second.tick()
    assert world.run().state == "running"
    go.touch()
    tick_until(second, lambda: world.run().ended is not None)
    assert world.run().state == "promoted"


def test_a_started_run_that_ended_unnoted_is_not_started_again(world: World) -> None:
    alert(world.controller(), **drift())
    command = (sys.executable, str(FAKE), "--silent")
    process = LocalRunner(world.home, command).start(world.run(), world.controller().contract)
    assert process is not None
    assert process.pid is not None
    os.waitpid(process.pid, 0)
    world.controller().tick()
    assert world.run().state == "failed"
    assert "ended before the controller could note it" in world.run().reason


def test_a_running_run_is_adopted_by_the_next_controller(world: World, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = world.controller("--wait", str(go))
    alert(first, **drift())
    tick_until(first, lambda: world.run().state == "running")
    second = world.controller()
    second.tick()
    assert alert(second, **drift("f2")).code == "running"
    go.touch()
    tick_until(second, lambda: world.run().ended is not None)
    assert world.run().state == "promoted"


def test_the_kill_switch_stops_what_has_not_begun(world: World) -> None:
    controller = world.controller()
    alert(controller, **drift())
    world.write("retrain: {enabled: false}\n")
    controller.tick()
    assert world.run().state == "stopped"
    assert world.run().reason == (
        "It had not begun when retraining was switched off: retrain.enabled is false."
    )
    assert alert(controller, **drift("f2")).code == "disabled"
    world.write()
    assert alert(controller, **drift("f2")).action == "start"


def test_an_invalid_edit_changes_nothing_and_is_counted(world: World) -> None:
    controller = world.controller()
    world.write("retrain: {enabeld: false}\n")
    assert alert(controller, **drift("f1")).action == "start"
    controller.tick()
    world.path.unlink()
    controller.tick()
    world.write(EAGER.replace("retrain", "model: other\nretrain"))
    controller.tick()
    assert sample(controller, "contract_reload_failures_total") == 3
    world.path.write_text((CONTRACT + EAGER).replace("model: tiny", "model: renamed"))
    controller.tick()
    assert sample(controller, "contract_reload_failures_total") == 4
    world.write("retrain: {enabled: false}\n")
    assert alert(controller, **drift("f2")).code == "disabled"
    assert sample(controller, "contract_reload_failures_total") == 4


def test_the_breaker_opens_and_a_reset_closes_it(world: World) -> None:
    world.write("retrain: {cooldown: 0, min_fresh_rows: 0, breaker: 2}\n")
    controller = world.controller("--state", "rejected")
    for number in range(2):
        assert alert(controller, **drift(f"f{number}")).action == "start"
        tick_until(controller, lambda: world.ledger.active("tiny") is None)
    assert alert(controller, **drift("f2")).code == "breaker"
    controller.tick()
    assert sample(controller, "retrain_breaker_open") == 1
    controller.reset("looked at it\n")
    controller.tick()
    assert sample(controller, "retrain_breaker_open") == 0
    assert alert(controller, **drift("f2")).action == "start"


def test_a_run_of_a_machine_that_fell_silent_is_lost_after_a_while(world: World) -> None:
    controller = world.controller()
    alert(controller, **drift())
    run_id = world.run().run_id
    assert world.ledger.claim(run_id, "elsewhere", world.now())
    controller.tick()
    assert world.run().state == "pending"  # the other machine may be about to start it
    world.ledger.started(run_id, os.getpid(), 1.0, world.now())
    controller.tick()
    assert world.run().state == "running"
    world.offset = LOST + timedelta(seconds=5)
    controller.tick()
    assert world.run().state == "failed"
    assert "elsewhere, where it ran, has not been heard of for 1m 5s" in world.run().reason


def test_a_run_that_lives_is_noted_as_seen(world: World, tmp_path: Path) -> None:
    controller = world.controller("--wait", str(tmp_path / "go"))
    alert(controller, **drift())
    controller.tick()
    before = world.run().seen
    world.offset = timedelta(seconds=30)
    controller.tick()
    after = world.run().seen
    assert before is not None
    assert after is not None
    assert after - before > timedelta(seconds=20)
    (tmp_path / "go").touch()


def test_the_schedule_fires_once_for_a_time(world: World) -> None:
    world.write("retrain: {cooldown: 0, min_fresh_rows: 0, schedule: '0 * * * *'}\n")
    half_past = timedelta(minutes=30 - datetime.now(UTC).minute)  # far from any full hour
    world.offset = half_past
    controller = world.controller()
    controller.tick()
    assert world.ledger.decisions("tiny") == []  # a new schedule does not look back

    world.offset = half_past + timedelta(hours=1)
    controller.tick()
    world.controller().tick()
    (decision,) = world.ledger.decisions("tiny")
    assert (decision.trigger, decision.action, decision.deliveries) == ("schedule", "start", 1)
    assert decision.starts_at == world.now().replace(minute=0, second=0, microsecond=0)
    tick_until(controller, lambda: world.run().ended is not None)

    # Down for five hours: one run, not five.
    world.offset = half_past + timedelta(hours=6)
    world.controller().tick()
    assert len(world.ledger.decisions("tiny")) == len(world.ledger.runs("tiny")) == 2
    world.controller().tick()
    assert len(world.ledger.decisions("tiny")) == 2


def test_a_canary_goes_step_by_step(world: World) -> None:
    world.write("serve: {canary: {steps: [0.1, 0.5], hold: 60s}}\n")
    world.add_version("v1")
    world.add_version("v2")
    runs.begin(world.store, "tiny", "r1", "drift")
    rollout.change(world.store, "tiny", champion="v1", by="me")
    rollout.change(world.store, "tiny", challenger="v2", weight=0.1, by="r1")
    controller = world.controller()

    def now() -> tuple[str, str | None, float, str]:
        found = rollout.read(world.store, "tiny")
        assert found is not None
        return found.champion, found.challenger, found.weight, found.by

    controller.tick()
    assert now() == ("v1", "v2", 0.1, "r1")
    world.offset = timedelta(seconds=61)
    controller.tick()
    assert now() == ("v1", "v2", 0.5, "r1")
    world.offset = timedelta(0)
    controller.tick()
    assert now() == ("v1", "v2", 0.5, "r1")
    world.offset = timedelta(seconds=61)
    controller.tick()
    assert now() == ("v2", None, 0.0, "r1")
    controller.tick()
    assert len(rollout.history(world.store, "tiny")) == 4


def test_a_canary_that_a_person_set_stays(world: World) -> None:
    world.write("serve: {canary: {steps: [0.1, 0.5], hold: 60s}}\n")
    world.add_version("v1")
    world.add_version("v2")
    rollout.change(world.store, "tiny", champion="v1", by="me")
    rollout.change(world.store, "tiny", challenger="v2", weight=0.1, by="me")
    world.offset = timedelta(days=1)
    world.controller().tick()
    found = rollout.read(world.store, "tiny")
    assert found is not None
    assert found.revision == 2


def test_a_manual_request_says_who_wants_what(world: World) -> None:
    controller = world.controller()
    reply = controller.trigger("new product line\n\x00")
    assert reply.action == "start"
    assert (world.run().trigger, world.run().note) == ("manual", "new product line")
    tick_until(controller, lambda: world.run().ended is not None)
    outcome = runs.read(world.store, "tiny", world.run().run_id)
    assert outcome is not None
    assert outcome.trigger == "manual: new product line"


def test_the_run_learns_by_the_contract_that_was_decided_on(world: World) -> None:
    """An edit that is not valid, between decision and start, does no harm."""
    controller = world.controller()
    alert(controller, **drift())
    world.path.write_text("nonsense")
    tick_until(controller, lambda: world.run().ended is not None)
    assert world.run().state == "promoted"


def test_a_dead_run_takes_its_children_with_it(world: World, tmp_path: Path) -> None:
    """A step that goes on after its run was killed could promote what nobody waits for."""
    script = tmp_path / "parent.py"
    pid = tmp_path / "pid"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(f'{{child.pid}}\\n')\n"
        "time.sleep(600)\n"
    )
    runner = LocalRunner(world.home, (sys.executable, str(script)))
    controller = Controller(world.path, world.store, world.ledger, runner)
    alert(controller, **drift())
    tick_until(controller, lambda: pid.exists() and pid.read_text().endswith("\n"))
    run = world.run()
    assert run.pid is not None
    os.kill(run.pid, signal.SIGKILL)
    tick_until(controller, lambda: world.run().ended is not None)
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", pid.read_text().strip()], capture_output=True, text=True
    ).stdout
    assert state == "" or state.startswith("Z")


def first(world: World, *arguments: str) -> Controller:
    """A controller that is to train the first model, as after a restart."""
    runner = LocalRunner(world.home, (sys.executable, str(FAKE), *arguments))
    return Controller(
        world.path, world.store, world.ledger, runner, clock=world.now, train_first=True
    )


def ended(world: World) -> bool:
    return world.ledger.active("tiny") is None


def test_the_first_model_is_trained_once(world: World) -> None:
    """Without rows, alert or request; though the fake run promotes nothing, not again."""
    world.controller().tick()
    assert world.ledger.runs("tiny") == []  # nobody asked for it
    tick_until(first(world), lambda: world.ledger.runs("tiny") != [] and ended(world))
    run = world.run()
    assert (run.trigger, run.state) == ("first", "promoted")
    outcome = runs.read(world.store, "tiny", run.run_id)
    assert outcome is not None
    assert outcome.trigger == "first"
    world.offset = timedelta(days=1)
    first(world).tick()
    assert len(world.ledger.runs("tiny")) == 1


def test_no_first_model_is_trained_where_one_serves(world: World) -> None:
    world.add_version("aaaaaaaaaaaa")
    rollout.change(world.store, "tiny", champion="aaaaaaaaaaaa", by="person", reason="by hand")
    first(world).tick()
    assert world.ledger.runs("tiny") == []


def test_a_first_model_that_is_not_good_enough_is_a_persons_turn(world: World) -> None:
    controller = first(world, "--state", "rejected")
    tick_until(controller, lambda: world.ledger.runs("tiny") != [] and ended(world))
    world.offset = timedelta(days=1)
    first(world).tick()
    assert len(world.ledger.runs("tiny")) == 1


def test_a_first_run_that_failed_is_tried_again_until_the_breaker_opens(world: World) -> None:
    world.write("retrain: {cooldown: 1h, breaker: 2}\n")
    controller = first(world, "--silent")
    tick_until(controller, lambda: world.ledger.runs("tiny") != [] and ended(world))
    assert world.run().state == "failed"
    world.offset = timedelta(minutes=59)
    controller.tick()
    assert world.ledger.decisions("tiny", 1)[0].code == "cooldown"
    assert len(world.ledger.runs("tiny")) == 1
    world.offset = timedelta(minutes=62)
    tick_until(controller, lambda: len(world.ledger.runs("tiny")) == 2 and ended(world))
    world.offset = timedelta(hours=3)
    controller.tick()
    newest = world.ledger.decisions("tiny", 1)[0]
    assert (newest.trigger, newest.code) == ("first", "breaker")
    controller.tick()  # asked once a minute, and not at every tick
    assert world.ledger.decisions("tiny", 1)[0].deliveries == 1
    assert len(world.ledger.runs("tiny")) == 2


def test_a_first_run_that_never_began_is_wanted_again(world: World) -> None:
    controller = first(world)
    world.write("retrain: {dry_run: true, cooldown: 0}\n")
    trigger = alerts.first(None)
    policy = Retrain()
    world.ledger.decide("tiny", policy, trigger, fresh_rows=None, now=world.now())
    controller.tick()
    assert world.run().state == "stopped"
    world.write("retrain: {cooldown: 0}\n")
    world.offset = timedelta(minutes=2)
    controller.tick()
    assert [r.state for r in world.ledger.runs("tiny")] == ["running", "stopped"]


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("enabled: false", "disabled"),
        ("dry_run: true", "dry_run"),
        ("budget: {runs: 0}", "budget"),
        ("triggers: []", "started"),
    ],
)
def test_the_first_model_obeys_the_policy(world: World, setting: str, code: str) -> None:
    world.write(f"retrain: {{{setting}}}\n")
    first(world).tick()
    assert world.ledger.decisions("tiny", 1)[0].code == code
    assert len(world.ledger.runs("tiny")) == (code == "started")
