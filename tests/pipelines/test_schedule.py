"""The recurring run of a model: one, always the wanted one, and never two at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import compile as packages
from pipelines import schedule
from tests.pipelines.standin import Refused, StandIn

STORE = "s3://models/store"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def scheduled(kfp: StandIn, contract: Path, *options: str) -> int:
    arguments = [str(contract), "--endpoint", kfp.url]
    return schedule.main(
        [*arguments, *([] if "--remove" in options else ["--store", STORE]), *options]
    )


def test_a_recurring_run_is_made_once(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    assert capsys.readouterr().out == "driftmill-tiny: created (0 3 * * *, UTC)\n"
    (made,) = kfp.awake()
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert made["runtime_config"] == {"parameters": {"trigger": "schedule"}}
    assert (made["max_concurrency"], made["no_catchup"]) == ("1", True)
    assert made["service_account"] == "driftmill-runner"
    before = len(kfp.requests)
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    assert capsys.readouterr().out == "driftmill-tiny: unchanged (0 3 * * *, UTC)\n"
    assert [method for method, _, _ in kfp.requests[before:]] == ["GET"] * 3
    assert kfp.recurring == [made]


@pytest.mark.parametrize(
    "other", [["--cron", "0 4 * * *"], ["--image", "registry/python:2"]], ids=["time", "package"]
)
def test_what_changes_replaces_it_and_never_are_two_awake(
    other: list[str],
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    awake: list[int] = []
    answer = kfp.answer

    def count(method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        found = answer(method, path, query, body)
        awake.append(len(kfp.awake()))
        return found

    monkeypatch.setattr(kfp, "answer", count)
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    (first,) = kfp.recurring
    assert scheduled(kfp, contract, "--cron", "0 3 * * *", *other) == 0
    (second,) = kfp.awake()
    assert kfp.recurring == [second]
    assert second["recurring_run_id"] != first["recurring_run_id"]
    assert "replaced" in capsys.readouterr().out
    assert max(awake) == 1


@pytest.mark.parametrize("lost", range(1, 8))
def test_a_command_that_was_cut_short_is_given_again(
    lost: int, kfp: StandIn, contract: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server fails at the n-th change of a replacement: at no moment are two awake, and the
    same command brings all in order."""
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    answer, left = kfp.answer, [lost]

    def fail(method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        if method != "GET":
            left[0] -= 1
            if left[0] == 0:
                raise Refused(500, "InternalServerError")
        found = answer(method, path, query, body)
        assert len(kfp.awake()) <= 1
        return found

    monkeypatch.setattr(kfp, "answer", fail)
    assert scheduled(kfp, contract, "--cron", "0 4 * * *") == (1 if lost <= 4 else 0)
    assert scheduled(kfp, contract, "--cron", "0 4 * * *") == 0
    (one,) = kfp.recurring
    assert one["status"] == "ENABLED"
    assert one["trigger"] == {"cron_schedule": {"cron": "0 0 4 * * *"}}


def test_a_second_one_of_the_same_name_goes(kfp: StandIn, contract: Path) -> None:
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    kfp.recurring.append({**kfp.recurring[0], "recurring_run_id": "made-twice"})
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    assert len(kfp.recurring) == 1


def test_one_that_was_switched_off_is_switched_on(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    kfp.recurring[0]["status"] = "DISABLED"
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    assert "enabled again" in capsys.readouterr().out
    assert kfp.awake()


def test_the_contract_says_when(kfp: StandIn, contract: Path, tmp_path: Path) -> None:
    contract.write_text(contract.read_text() + "retrain: {schedule: '30 2 * * 1'}\n")
    assert scheduled(kfp, contract) == 0
    assert kfp.recurring[0]["trigger"]["cron_schedule"]["cron"] == "0 30 2 * * 1"


def test_it_is_removed_with_all_of_its_name_and_no_other(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    kfp.recurring.append({"recurring_run_id": "x", "display_name": "driftmill-tiny-2"})
    assert scheduled(kfp, contract, "--remove") == 0
    assert [r["recurring_run_id"] for r in kfp.recurring] == ["x"]
    assert scheduled(kfp, contract, "--remove") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["driftmill-tiny: removed", "driftmill-tiny: there is none"]


def test_without_a_time_nothing_is_made(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(kfp, contract) == 2
    assert "give --cron '0 3 * * *', or set retrain.schedule" in capsys.readouterr().err
    assert kfp.requests == []


CRONS = {
    "0 3 * * *": "0 0 3 * * *",
    "*/30 8-10 1 * *": "0 0,30 8,9,10 1 * *",
    "0 0 * jan sun": "0 0 0 * 1 0",
    "0 0 * * 7": "0 0 0 * * 0",
    "0 0 * * fri-mon": "0 0 0 * * 0,1,5,6",
}


@pytest.mark.parametrize("cron", CRONS)
def test_times_mean_the_same_to_kubeflow(cron: str) -> None:
    assert schedule.six_fields(cron) == CRONS[cron]


@pytest.mark.parametrize("cron", ["daily", "0 3 * *", "0 0 3 * * *", "61 * * * *", "0 0 l * *", ""])
def test_other_times_are_refused(
    cron: str, kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(kfp, contract, "--cron", cron or " ") == 2
    assert "is not a cron expression" in capsys.readouterr().err
    assert kfp.requests == []


def test_a_folder_is_no_store_for_a_cluster(
    kfp: StandIn, contract: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cron", "0 3 * * *", "--store", str(tmp_path)]
    assert scheduled(kfp, contract, *options) == 2
    assert "give --store s3://" in capsys.readouterr().err


def test_a_refusal_is_one_sentence(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.faults[("POST", "/recurringruns")] = [(403, '{"message": "User a may not"}')]
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 1
    said = capsys.readouterr().err
    assert "does not let you: User a may not" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_kfp_itself_sends_the_same(kfp: StandIn, contract: Path, tmp_path: Path) -> None:
    assert scheduled(kfp, contract, "--cron", "0 3 * * *") == 0
    assert packages.main([str(contract), "-o", str(tmp_path / "build"), "--store", STORE]) == 0
    command = [str(Path(sys.executable).with_name("kfp")), "--endpoint", kfp.url]
    command += ["recurring-run", "create", "--experiment-name", "tiny", "--job-name", "by-hand"]
    command += ["--cron-expression", "0 0 3 * * *", "--no-catchup", "--max-concurrency", "1"]
    command += ["--pipeline-package-path", str(tmp_path / "build" / "pipeline.yaml")]
    done = subprocess.run(
        [*command, "trigger=schedule"],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = kfp.sent("POST", "/recurringruns")
    for name in ("pipeline_spec", "runtime_config", "trigger", "no_catchup"):
        assert ours[name] == theirs[name]
