"""The local runner with real processes: every way that a run can end, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from driftmill import rollout, runs
from driftmill.contract import load
from driftmill.home import Home, find
from driftmill.store import Store
from pipelines.compile import compile_package
from pipelines.local import Job
from tests.conftest import CONTRACT
from tests.pipelines.contracts import IMAGES, write_contract


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of its own for the processes of a test."""
    for name in ("DRIFTMILL_STORE", "DRIFTMILL_LEDGER", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path / "home"))
    return find()


def command(contract: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.run", "--contract", str(contract), *arguments]


def run(contract: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(contract, *arguments), capture_output=True, text=True, timeout=280
    )


def processes_of(home: Home) -> Iterator[psutil.Process]:
    """Processes other than this one that were given the home."""
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("DRIFTMILL_HOME") == str(home.folder)
            if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue  # it has gone, or is somebody else's


@pytest.mark.slow
def test_a_better_model_is_promoted_and_the_same_again_is_not(home: Home, tmp_path: Path) -> None:
    contract = write_contract(tmp_path)
    first = run(contract, "--run-id", "r1", "--trigger", "test")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Promoted: auc is better" in first.stdout
    one = runs.read(home.store, "tiny", "r1")
    now = rollout.read(home.store, "tiny")
    assert one is not None
    assert now is not None
    assert (one.state, one.trigger, one.version) == ("promoted", "test", now.champion)
    assert one.verdict is not None
    assert one.verdict.against == "dummy"
    assert [s.name for s in one.steps] == ["prepare", "fit-linear", "assemble", "judge", "promote"]
    assert all(s.state == "done" for s in one.steps)
    folder = runs.key("tiny", "r1")
    assert {k.removeprefix(f"{folder}/") for k in home.store.list(folder)} >= {
        "run.json", "verdict.json", "report.html", "outcome.json", "output.log",
    }  # fmt: skip

    second = run(contract, "--events")
    assert second.returncode == 3, second.stdout + second.stderr
    events = [json.loads(line) for line in second.stdout.splitlines()]
    assert events[0]["event"] == "run"
    steps = [(e["step"], e["state"]) for e in events if e["event"] == "step"]
    assert steps[:4] == [
        ("prepare", "start"), ("prepare", "done"), ("fit", "start"), ("fit", "done"),
    ]  # fmt: skip
    assert ("promote", "start") not in steps
    two = runs.Outcome.model_validate({k: v for k, v in events[-1].items() if k != "event"})
    # The same contract, rows and seed make the same model: there is nothing to promote.
    assert (two.state, two.version) == ("rejected", one.version)
    assert two.champion_before == one.version
    assert rollout.read(home.store, "tiny") == now
    assert two == runs.read(home.store, "tiny", events[0]["run_id"])

    assert run(contract, "--run-id", "r1").returncode == 2
    assert not list((home.folder / "pipeline-root").iterdir())
    assert not list(processes_of(home))


#: Runs a package: its path and the job, as JSON.
PACKAGE = """
import sys
from pathlib import Path
from kfp import local as kfp_local
from pipelines import local
runner = kfp_local.SubprocessRunner(use_venv=False)
local.run(local.load(Path(sys.argv[1])), runner, local.Job.model_validate_json(sys.argv[2]))
"""


@pytest.mark.slow
def test_the_compiled_package_comes_to_the_same(home: Home, tmp_path: Path) -> None:
    path = write_contract(tmp_path)
    assert run(path, "--run-id", "r1").returncode == 0
    contract, other = load(path), Store(tmp_path / "other")
    package = compile_package(contract, tmp_path / "build", store=other.uri)
    job = Job(
        contract=contract.to_json(),
        store=other.uri,
        run_id="r1",
        trigger="test",
        root=str(tmp_path / "root"),
    )
    arguments = [sys.executable, "-c", PACKAGE, str(package), job.model_dump_json()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    in_memory = runs.read(home.store, "tiny", "r1")
    compiled = runs.read(other, "tiny", "r1")
    assert in_memory is not None
    assert compiled is not None, done.stdout + done.stderr
    # The version is a digest over the model and all that it was made from.
    for name in ("state", "reason", "version", "metrics", "verdict"):
        assert getattr(compiled, name) == getattr(in_memory, name)
    assert [s.name for s in compiled.steps] == [s.name for s in in_memory.steps]
    assert rollout.read(other, "tiny") is not None


@pytest.mark.slow
def test_bad_rows_stop_the_run(home: Home, tmp_path: Path) -> None:
    done = run(write_contract(tmp_path, spoiled=200), "--run-id", "r1")
    assert done.returncode == 4, done.stdout + done.stderr
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert outcome.state == "stopped"
    assert [s.name for s in outcome.steps] == ["prepare"]
    assert outcome.reason in done.stdout
    assert home.store.exists(runs.key("tiny", "r1", "quarantine.parquet"))
    assert rollout.read(home.store, "tiny") is None


@pytest.mark.slow
def test_a_step_that_fails_is_named(home: Home, tmp_path: Path) -> None:
    before = rollout.change(home.store, "tiny", champion="lost", by="test")
    done = run(write_contract(tmp_path), "--run-id", "r1")
    assert done.returncode == 1, done.stdout + done.stderr
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert outcome.state == "failed"
    assert outcome.reason.startswith("judge: BundleError: tiny has no version lost")
    assert outcome.reason in done.stdout
    assert b"Traceback" in home.store.read(runs.key("tiny", "r1", "output.log"))
    assert rollout.read(home.store, "tiny") == before


def test_a_bad_contract_is_refused_before_anything_is_written(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT.replace("task: classification", "task: clasification"))
    done = run(path)
    assert done.returncode == 2
    assert "did you mean 'classification'" in done.stderr
    assert not home.folder.exists()
    assert run(write_contract(tmp_path), "--run-id", "../x").returncode == 2
    assert run(write_contract(tmp_path), "--no-such-option").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "during"),
    [(signal.SIGTERM, "prepare"), (signal.SIGINT, "fit"), (signal.SIGKILL, "fit")],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_an_interrupted_run_leaves_no_process(
    home: Home, tmp_path: Path, number: signal.Signals, during: str
) -> None:
    contract = write_contract(tmp_path, rows=20_000)
    process = subprocess.Popen(
        command(contract, "--run-id", "r1", "--events"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if json.loads(line).get("step") == during:
                break
        started = list(processes_of(home))
        assert len(started) >= 3  # the runner, KFP's process, the step
        process.send_signal(number)
        process.stdout.read()
    code = process.wait(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    assert not list(processes_of(home))
    if number == signal.SIGKILL:
        return  # nobody was left to write the outcome
    assert code == 130
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert (outcome.state, outcome.reason) == ("failed", "interrupted")
    assert not list((home.folder / "pipeline-root").iterdir())


@pytest.mark.slow
def test_a_network_that_was_killed_goes_on_from_its_checkpoint(home: Home, tmp_path: Path) -> None:
    contract = tmp_path / "contract.yaml"
    contract.write_text(IMAGES.replace("epochs: 2", "epochs: 60"))

    def epochs(process: subprocess.Popen[str]) -> Iterator[int]:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                assert (event["step"], event["family"], event["total"]) == ("fit", "mlp", 60)
                yield event["done"]

    arguments = command(contract, "--events")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert 5 in epochs(process)
        started = list(processes_of(home))
        process.kill()
    psutil.wait_procs(started, timeout=30)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        seen = list(epochs(process))
    assert process.returncode == 0
    assert seen[0] > 3  # the checkpoint of the last epoch may not have been whole
    assert seen == list(range(seen[0], 61))
    assert home.store.list("small-digits/checkpoints") == []


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_and_says_its_end_again(
    home: Home, tmp_path: Path
) -> None:
    """As on a cluster whose node goes away: the first pod is told to end, the next one goes on."""
    contract = write_contract(tmp_path)
    again = ("--run-id", "r1", "--trigger", "test", "--resume")
    first = subprocess.Popen(
        command(contract, *again, "--events"), stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if '"step": "fit"' in line and '"done"' in line:
            break
    first.terminate()
    assert first.wait(60) == 130
    first.stdout.close()
    assert runs.read(home.store, "tiny", "r1") is None
    assert runs.steps(home.store, "tiny", "r1")[0].state == "done"
    assert not list(processes_of(home))

    second = run(contract, *again)
    assert second.returncode == 0, second.stdout + second.stderr
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert all(s.state == "done" for s in outcome.steps)
    third = run(contract, *again)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "Promoted: " in third.stdout
    assert runs.read(home.store, "tiny", "r1") == outcome

    # Killed between promoting and saying so: it has promoted, and is not judged against itself.
    (Path(home.store_uri) / runs.key("tiny", "r1", "outcome.json")).unlink()
    fourth = run(contract, *again)
    assert fourth.returncode == 0, fourth.stdout + fourth.stderr
    assert len(rollout.history(home.store, "tiny")) == 1


def test_what_is_to_go_on_must_be_named(tmp_path: Path) -> None:
    done = run(write_contract(tmp_path), "--resume")
    assert (done.returncode, done.stdout) == (2, "")
    assert "name it by --run-id" in done.stderr
