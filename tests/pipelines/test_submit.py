"""Submitting to Kubeflow Pipelines: what is sent, what is shown, and what each end is called."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from driftmill import runs
from driftmill.store import Store
from pipelines import compile as packages
from pipelines import kubeflow, submit
from tests.pipelines.standin import Refused, StandIn, run, task

STORE = "s3://models/store"
DONE = [task("prepare", "SUCCEEDED", 1), task("fit", "SUCCEEDED", 2), task("judge", "SUCCEEDED", 3)]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "DRIFTMILL_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit, "POLL", 0.01)
    # What is shown comes from Kubeflow alone, unless a test says otherwise.
    monkeypatch.setattr(submit, "_readable", lambda uri: None)


def submitted(kfp: StandIn, contract: Path, *options: str) -> int:
    return submit.main([str(contract), "--endpoint", kfp.url, "--store", STORE, *options])


def test_a_run_is_submitted_with_its_package_and_followed_to_its_end(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.script = [
        run("PENDING"),
        run("RUNNING", task("prepare-driver", "SUCCEEDED"), task("prepare", "RUNNING", 1)),
        run("RUNNING", *DONE[:1], task("fit", "RUNNING", 2), task("iteration", "RUNNING", 2)),
        run("RUNNING", *DONE, task("promote", "RUNNING", 4)),
        run("SUCCEEDED", *DONE, task("promote", "SUCCEEDED", 4), task("record", "SUCCEEDED", 5)),
    ]
    assert submitted(kfp, contract, "--run-id", "r1") == 0
    (sent,) = kfp.sent("POST", "/runs")
    assert (sent["display_name"], sent["service_account"]) == ("r1", "driftmill-runner")
    assert sent["runtime_config"] == {"parameters": {"run_id": "r1", "trigger": "driftmill submit"}}
    assert set(sent["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    (experiment,) = kfp.experiments
    assert experiment["display_name"] == "tiny"
    shown = capsys.readouterr().out
    steps = re.findall(r"^  (\w+(?: \d)?) +([\d.]+) s$", shown, re.MULTILINE)
    assert [name for name, _ in steps] == ["prepare", "fit 1", "judge", "promote", "record"]
    assert {seconds for _, seconds in steps} == {"7.0"}  # each its own, not since the run began
    assert "promoted: " in shown


def test_settings_of_the_run_reach_kubeflow(kfp: StandIn, contract: Path) -> None:
    kfp.script = [run("SUCCEEDED", *DONE)]
    options = ["--service-account", "", "--pipeline-root", "s3://models/root"]
    options += ["--experiment", "nightly", "--trigger", "drift", "--image", "registry/python:1"]
    assert submitted(kfp, contract, *options) == 3
    (sent,) = kfp.sent("POST", "/runs")
    assert "service_account" not in sent
    assert sent["runtime_config"]["pipeline_root"] == "s3://models/root"
    assert sent["runtime_config"]["parameters"]["trigger"] == "drift"
    assert "registry/python:1" in str(sent["pipeline_spec"])
    assert kfp.experiments[0]["display_name"] == "nightly"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (run("SUCCEEDED", *DONE), 3, "rejected: the new model was judged and not promoted"),
        (run("SUCCEEDED", task("promote", "SUCCEEDED")), 0, "promoted: "),
        (
            run("FAILED", task("prepare", "FAILED")),
            1,
            "failed: prepare: see `kubectl logs -n kubeflow -c main -l driftmill/model=tiny,"
            "app.kubernetes.io/component=prepare`",
        ),
        (
            run("FAILED", task("root-driver(2)", "FAILED")),
            1,
            "failed: it ended before its first step began: is there a service account "
            "driftmill-runner? `kubectl describe workflows -n kubeflow -l pipeline/runid=",
        ),
        (run("FAILED", error={"message": "no quota"}), 1, "failed: no quota"),
        (run("CANCELED", task("prepare", "SUCCEEDED")), 1, "failed: the run was cancelled"),
    ],
)
def test_without_the_store_kubeflow_says_how_it_ended(
    end: dict[str, Any],
    code: int,
    said: str,
    kfp: StandIn,
    contract: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kfp.script = [run("PENDING"), end]
    assert submitted(kfp, contract) == code
    assert said in capsys.readouterr().out


def test_a_failed_step_is_shown_with_its_reason(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = task("fit", "FAILED", 2, error={"message": "OOMKilled"})
    kfp.script = [run("FAILED", *DONE[:1], failed)]
    assert submitted(kfp, contract) == 1
    assert re.search(r"fit 1 .* failed: OOMKilled", capsys.readouterr().out)


def test_of_a_step_that_was_tried_again_the_newest_attempt_counts(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = task("prepare", "FAILED", 1)
    kfp.script = [
        run("RUNNING", failed),
        *[run("RUNNING", task("prepare", "RUNNING", 2), failed)] * 3,
        run("SUCCEEDED", task("prepare", "SUCCEEDED", 2), failed),
    ]
    assert submitted(kfp, contract) == 3
    shown = [line.split()[0::3] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert shown == [["prepare", "failed:", "log"], ["prepare"]]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not-recorded"])
@pytest.mark.parametrize("promote", [True, False], ids=["promoted", "stopped"])
def test_where_the_store_can_be_read_it_says_more(
    promote: bool,
    recorded: bool,
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "as-the-cluster-sees-it")
    monkeypatch.setattr(submit, "_readable", lambda uri: store)

    def fitted() -> dict[str, Any]:
        with runs.step(store, "tiny", "r1", "fit", "linear"):
            pass
        return run("RUNNING")

    def ended() -> dict[str, Any]:
        if promote:
            from driftmill import rollout

            rollout.change(store, "tiny", champion="v1", reason="better by 1", by="r1")
        else:
            with pytest.raises(runs.StoppedByData), runs.step(store, "tiny", "r1", "judge"):
                raise runs.StoppedByData("too many bad rows")
        if recorded:
            runs.conclude(store, "tiny", "r1", trigger="", code_version="")
        return run("SUCCEEDED" if promote else "FAILED")

    kfp.script = [run("PENDING"), fitted, ended]
    assert submitted(kfp, contract, "--run-id", "r1") == (0 if promote else 4)
    shown = capsys.readouterr().out
    assert "fit linear" in shown
    assert ("better by 1" if promote else "stopped: too many bad rows") in shown
    assert "  run       r1" in shown
    outcome = runs.read(store, "tiny", "r1")
    assert outcome is not None
    assert outcome.trigger == ("" if recorded else "driftmill submit")


def test_a_store_that_cannot_be_read_from_here_is_no_reason_to_stop(
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(submit, "POLL", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    kfp.script = [run("SUCCEEDED", *DONE)]
    assert submitted(kfp, contract) == 3
    assert f"note: {STORE} cannot be read from here" in capsys.readouterr().err


def test_a_run_that_is_not_waited_for_can_be_followed(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(kfp, contract, "--no-wait", "--run-id", "r1") == 0
    again = f"driftmill submit {contract} --follow r1 --endpoint {kfp.url} --store {STORE}"
    assert f"follow it: {again}" in capsys.readouterr().out
    kfp.script = [run("SUCCEEDED", task("promote", "SUCCEEDED"))]
    assert submitted(kfp, contract, "--follow", "r1") == 0
    assert submitted(kfp, contract, "--follow", kfp.runs[0]["run_id"]) == 0
    assert len(kfp.runs) == 1
    assert submitted(kfp, contract, "--follow", "r2") == 2
    assert "has no run r2 in this experiment" in capsys.readouterr().err


def test_an_id_is_given_to_one_run_only(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(kfp, contract, "--no-wait", "--run-id", "r1") == 0
    assert submitted(kfp, contract, "--no-wait", "--run-id", "r1") == 2
    assert "tiny has a run r1 already" in capsys.readouterr().err
    assert submitted(kfp, contract, "--no-wait", "--run-id", "not an id") == 2
    assert len(kfp.runs) == 1


def test_what_takes_too_long_is_left_alone(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.script = [run("RUNNING")]
    assert submitted(kfp, contract, "--timeout", "0.1s") == 1
    said = capsys.readouterr().err
    assert "still running after 0 s; the run goes on, follow it again: driftmill submit" in said


def test_a_server_that_is_away_for_a_while_is_waited_for(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.script = [run("SUCCEEDED", *DONE)]
    kfp.faults[("GET", "/runs/*")] = [(503, "no healthy upstream")] * 3
    assert submitted(kfp, contract) == 3
    shown = capsys.readouterr().out
    assert shown.count("failed (503): Service Unavailable; look at its log") == 1
    assert "trying again" in shown


def test_a_server_that_stays_away_is_not_waited_for_without_end(
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(submit, "PATIENCE", 0.05)
    kfp.faults[("GET", "/runs/*")] = [(503, "")] * 1000
    assert submitted(kfp, contract) == 1
    said = capsys.readouterr().err
    assert "failed (503)" in said
    assert "follow it again: driftmill submit" in said


REFUSALS = {
    "no token": (401, '{"message": "Unauthenticated"}', "set KF_PIPELINES_TOKEN to a bearer token"),
    "login": (302, "<html>", "set KF_PIPELINES_TOKEN to a bearer token"),
    "no right": (403, '{"message": "User a is not authorized"}', "not authorized"),
    "elsewhere": (404, "<html>", "is not the API of Kubeflow Pipelines 2"),
    "a page": (200, "<html>sign in</html>", "is not the API of Kubeflow Pipelines: what answers"),
    "broken": (500, '{"message": "InternalServerError: no database"}', "no database; look at its"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_sentence_with_a_next_step(
    case: str, kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, body, expected = REFUSALS[case]
    kfp.faults[("GET", "/healthz")] = [(status, body)]
    assert submitted(kfp, contract) == 1
    said = capsys.readouterr()
    assert expected in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert kfp.runs == []


def test_what_the_server_refuses_is_said(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "Failed to create a run: Service account not allowed"
    kfp.faults[("POST", "/runs")] = [(400, f'{{"code": 3, "message": "{message}"}}')]
    assert submitted(kfp, contract) == 1
    assert f"refused POST /runs (400): {message}" in capsys.readouterr().err


def test_a_token_comes_from_the_environment_and_is_never_shown(
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kfp.token = "a-secret"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "another")
    assert submitted(kfp, contract) == 1
    assert "the token in KF_PIPELINES_TOKEN is refused" in capsys.readouterr().err
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "a-secret")
    assert submitted(kfp, contract, "--no-wait") == 0
    said = capsys.readouterr()
    assert "a-secret" not in said.out + said.err


def test_no_endpoint_no_guess(
    contract: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")
    assert submit.main([str(contract), "--store", STORE]) == 2
    said = capsys.readouterr().err
    assert "kubectl port-forward -n kubeflow svc/ml-pipeline 8888:8888" in said
    assert said.count("\n") == 1
    for endpoint in ("localhost:8888", "https://user:secret@host"):
        assert submit.main([str(contract), "--store", STORE, "--endpoint", endpoint]) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert submit.main([str(contract), "--store", STORE, "--endpoint", url]) == 1
    assert f"nothing answers at {url}" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kubeflow, "ANSWER", 0.3)
    kfp.faults[("GET", "/healthz")] = [(0, "")]
    assert submitted(kfp, contract) == 1
    assert "did not answer GET /healthz in time" in capsys.readouterr().err


def test_a_run_whose_answer_got_lost_is_not_started_twice(
    kfp: StandIn, contract: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = kfp.answer

    def lose(method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        found = answer(method, path, query, body)
        if (method, path) == ("POST", "/runs"):
            raise Refused(504, "upstream request timeout")
        return found

    monkeypatch.setattr(kfp, "answer", lose)
    kfp.script = [run("SUCCEEDED", *DONE)]
    assert submitted(kfp, contract, "--run-id", "r1") == 3
    assert len(kfp.runs) == 1


def test_where_there_are_many_users_a_namespace_is_needed(
    kfp: StandIn, contract: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.many_users = True
    assert submitted(kfp, contract) == 2
    assert "name your namespace by --namespace" in capsys.readouterr().err
    assert submitted(kfp, contract, "--no-wait", "--namespace", "team-a") == 0
    assert kfp.experiments[0]["namespace"] == "team-a"
    # A server for one user takes none.
    kfp.many_users, kfp.experiments[:] = False, []
    assert submitted(kfp, contract, "--no-wait", "--namespace", "team-a") == 0
    assert "namespace" not in kfp.experiments[0]


def test_a_folder_is_no_store_for_a_cluster(
    kfp: StandIn, contract: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(contract), "--endpoint", kfp.url, "--store", str(tmp_path)]
    assert submit.main(arguments) == 2
    assert "give --store s3://" in capsys.readouterr().err
    assert kfp.requests == []


def test_why_a_step_waits_is_said_once(
    kfp: StandIn,
    contract: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(submit, "WAITING", 0.05)
    below = {"child_tasks": [{"pod_name": "p"}]}
    tasks = [task("fit", "RUNNING", 2, **below), task("executor", "RUNNING", 2, **below)]
    waiting = run("RUNNING", *tasks, task("executor(0)", "PENDING", 2))
    kfp.script = [waiting] * 20 + [run("SUCCEEDED", *DONE)]
    assert submitted(kfp, contract) == 3
    hint = "kubectl get pods -n kubeflow -l pipeline/runid="
    assert capsys.readouterr().out.count(hint) == 1
    monkeypatch.setattr("k8s.client.Cluster", lambda context: context)
    monkeypatch.setattr("k8s.explain.sentences", lambda *where, selector: ["no node has a GPU"])
    kfp.script = [waiting] * 20 + [run("SUCCEEDED", *DONE)]
    assert submitted(kfp, contract, "--context", "kind-x") == 3
    assert capsys.readouterr().out.count("  waiting: no node has a GPU") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_the_run_goes_on_when_it_is_no_longer_followed(
    number: signal.Signals, kfp: StandIn, contract: Path, tmp_path: Path
) -> None:
    kfp.script = [run("RUNNING", task("prepare", "RUNNING"))]
    command = [sys.executable, "-m", "pipelines.submit", str(contract), "--run-id", "r1"]
    # No credentials for a store that is not there: it gives up at once.
    secrets = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    process = subprocess.Popen(
        [*command, "--endpoint", kfp.url, "--store", "memory://nothing"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **secrets},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tiny: run r1, Kubeflow's ")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the run goes on; follow it again: driftmill submit" in said
    assert "Traceback" not in said
    assert [path for _, path, _ in kfp.requests if path.endswith(("terminate", "archive"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["create", "submit"])
def test_kfp_itself_takes_the_package_as_it_is(
    alias: str, kfp: StandIn, contract: Path, tmp_path: Path
) -> None:
    """`kfp run submit` is an old name of `kfp run create`."""
    assert packages.main([str(contract), "-o", str(tmp_path / "build"), "--store", STORE]) == 0
    file = tmp_path / "build" / "pipeline.yaml"
    command = [str(Path(sys.executable).with_name("kfp")), "--endpoint", kfp.url, "run", alias]
    command += ["-e", "tiny", "-r", "by-hand", "-f", str(file)]
    done = subprocess.run(
        [*command, "run_id=2026-11-24-drift", "trigger=an alarm = drift"],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (theirs,) = kfp.sent("POST", "/runs")
    given = {"run_id": "2026-11-24-drift", "trigger": "an alarm = drift"}
    assert theirs["runtime_config"]["parameters"] == given
    # What `driftmill submit` sends is the same package.
    assert submitted(kfp, contract, "--no-wait") == 0
    ours = kfp.sent("POST", "/runs")[1]
    assert ours["pipeline_spec"] == theirs["pipeline_spec"]
    assert set(ours) - set(theirs) == {"service_account"}
