"""Runs on Kubeflow Pipelines, on a stand-in of its API."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import pytest

from driftmill import home as homes
from driftmill import runs
from driftmill.contract import Contract
from driftmill.retrain.controller import Controller
from driftmill.retrain.ledger import Ledger, Run
from driftmill.retrain.runner import Mark, RunnerAway, RunnerError
from driftmill.store import Store
from pipelines import kubeflow
from pipelines.kubeflow import ApiError
from pipelines.kubeflow_runner import KubeflowRunner
from tests.conftest import CONTRACT
from tests.pipelines import standin
from tests.pipelines.standin import StandIn, task


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kubeflow.add_options(parser)
    parser.set_defaults(store="s3://models/store", image=None)
    return parser.parse_args(given)


def runner(kfp: StandIn) -> KubeflowRunner:
    """A runner, as after a restart."""
    return KubeflowRunner(options("--endpoint", kfp.url))


def run(run_id: str = "20261125-070000-ab12") -> Run:
    return Run(
        run_id=run_id,
        model="tiny",
        key=run_id,
        trigger="drift",
        note="amount drifted",
        created=datetime.now(UTC),
    )


def test_a_run_is_created_once_whoever_starts_it(kfp: StandIn, tiny: Contract) -> None:
    assert not runner(kfp).begun(run())
    for _ in range(2):
        assert runner(kfp).start(run(), tiny) == Mark()
    (sent,) = kfp.sent("POST", "/runs")
    assert sent["display_name"] == run().run_id
    assert sent["service_account"] == "driftmill-runner"
    assert sent["runtime_config"]["parameters"] == {
        "run_id": run().run_id,
        "trigger": "drift: amount drifted",
    }
    assert runner(kfp).begun(run())
    assert runner(kfp).running(run())


def test_an_answer_that_is_lost_starts_no_second_run(kfp: StandIn, tiny: Contract) -> None:
    first = runner(kfp)
    kfp.faults[("POST", "/runs")] = [(503, "")]
    with pytest.raises(RunnerAway, match="failed \\(503\\)"):
        first.start(run(), tiny)
    first.start(run(), tiny)
    assert len(kfp.runs) == 1


def test_of_two_that_start_at_once_the_first_stays(
    kfp: StandIn, tiny: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked before the first was there."""
    second = runner(kfp)
    find = second._find

    def too_early(wanted: Run) -> None:
        monkeypatch.setattr(second, "_find", find)
        runner(kfp).start(run(), tiny)

    monkeypatch.setattr(second, "_find", too_early)
    second.start(run(), tiny)
    assert len(kfp.sent("POST", "/runs")) == 2
    (left,) = kfp.runs
    assert left["created_at"] == min(r["created_at"] for r in kfp.runs)
    assert second.running(run())
    assert runner(kfp).running(run())


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ("FAILED", {"error": {"message": "no quota"}}, "no quota"),
        ("CANCELED", {}, "the run was cancelled"),
        ("SUCCEEDED", {}, "it left no outcome, though the new model was judged"),
    ],
)
def test_how_a_run_ended_is_said(
    kfp: StandIn, tiny: Contract, state: str, error: dict[str, object], said: str
) -> None:
    runner(kfp).start(run(), tiny)
    kfp.runs[0].update(standin.run(state, task("judge", "SUCCEEDED", 3), **error))
    later = runner(kfp)
    assert not later.running(run())
    assert said in later.failure(run())


def test_a_run_that_was_removed_has_ended(kfp: StandIn, tiny: Contract) -> None:
    first = runner(kfp)
    first.start(run(), tiny)
    kfp.runs.clear()
    assert not first.running(run())
    assert "has no run 20261125-070000-ab12 any more" in first.failure(run())


@pytest.mark.parametrize("status", [500, 401, 403, 429])
def test_an_api_that_is_away_is_asked_again_later(
    kfp: StandIn, tiny: Contract, status: int
) -> None:
    kfp.faults[("GET", "/healthz")] = [(status, "")]
    first = runner(kfp)
    with pytest.raises(RunnerAway):
        first.start(run(), tiny)
    first.start(run(), tiny)
    assert first.running(run())


def test_a_package_that_is_refused_is_not_tried_again(kfp: StandIn, tiny: Contract) -> None:
    kfp.faults[("POST", "/runs")] = [(400, '{"message": "no such parameter"}')]
    with pytest.raises(RunnerError, match="no such parameter"):
        runner(kfp).start(run(), tiny)


def test_what_cannot_work_is_said_at_once(kfp: StandIn) -> None:
    with pytest.raises(ApiError, match="no Kubeflow Pipelines is named"):
        KubeflowRunner(options())
    wrong = options("--endpoint", kfp.url)
    wrong.store = "/srv/store"
    with pytest.raises(ApiError, match="a folder of this machine"):
        KubeflowRunner(wrong)


def test_the_controller_follows_a_run_over_a_restart(kfp: StandIn, tmp_path: Path) -> None:
    home = homes.find(tmp_path / "home")
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT + "retrain: {cooldown: 0, min_fresh_rows: 0}\n")
    store, ledger = Store(home.store_uri), Ledger(home.ledger_url)
    first = Controller(path, store, ledger, runner(kfp))
    run_id = first.trigger("please").run_id
    assert run_id is not None
    first.tick()
    second = Controller(path, store, ledger, runner(kfp))
    second.tick()
    (now,) = ledger.runs("tiny")
    assert (now.state, now.pid) == ("running", None)
    kfp.runs[0].update(standin.run("SUCCEEDED"))
    outcome = runs.conclude(store, "tiny", run_id, trigger="manual", code_version="1", failure="x")
    second.tick()
    (now,) = ledger.runs("tiny")
    assert (now.state, now.reason) == ("failed", outcome.reason)
    assert len(kfp.runs) == 1
    ledger.close()
