"""The compiled package in containers: the same run as with processes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from driftmill import contract as contracts
from driftmill import images, rollout, runs
from driftmill.home import Home, find
from driftmill.runs import Outcome
from pipelines import containers
from tests.pipelines.contracts import write_contract

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture
def use(image: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes an image the one of all steps, unless `DRIFTMILL_IMAGE` names one; gives its name."""

    def use(name: str) -> str:
        named = os.environ.get("DRIFTMILL_IMAGE") or image(name)
        monkeypatch.setenv("DRIFTMILL_IMAGE", named)
        return named

    return use


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Home]:
    """Makes a home of its own the one of all runs that follow."""
    for name in ("DRIFTMILL_STORE", "DRIFTMILL_LEDGER", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def at(name: str) -> Home:
        monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path / name))
        return find()

    return at


@pytest.fixture
def home(at: Callable[[str], Home]) -> Home:
    return at("home")


@pytest.fixture
def tiny(tmp_path: Path, use: Callable[[str], str]) -> Path:
    """The contract `tiny`, and the image that its steps need."""
    use("python-tabular")
    return write_contract(tmp_path)


@pytest.fixture
def docker_client(docker: str) -> Iterator[Any]:
    with containers._docker() as client:
        yield client


def command(contract: Path, run_id: str, *arguments: str, runner: str = "docker") -> list[str]:
    fixed = ["--contract", str(contract), "--run-id", run_id, "--runner", runner]
    return [sys.executable, "-m", "pipelines.run", *fixed, *arguments]


def run(
    home: Home, contract: Path, run_id: str, runner: str = "docker"
) -> tuple[subprocess.CompletedProcess[str], Outcome]:
    """Run to the end: the process, and how the store says that it ended."""
    done = subprocess.run(
        command(contract, run_id, runner=runner), capture_output=True, text=True, timeout=600
    )
    outcome = runs.read(home.store, contracts.load(contract).model, run_id)
    assert outcome is not None, done.stdout + done.stderr
    return done, outcome


def left_behind(client: Any, home: Home) -> list[str]:
    """Names of the containers of a home's runs."""
    found = client.containers.list(all=True, filters={"label": containers.LABEL})
    return [c.name for c in found if c.labels[containers.LABEL].startswith(f"{home.folder}/")]


def findings(home: Home, outcome: Outcome) -> dict[str, Any]:
    """What a run found out, without what goes by the machine's pace and by the model's version,
    which covers the platform."""
    prepared, *_ = runs.steps(home.store, outcome.model, outcome.run_id)
    found: dict[str, Any] = {
        "state": outcome.state,
        "steps": sorted((s.name, s.state) for s in outcome.steps),
        "data": prepared.facts["fingerprint"],
    }
    verdict = json.loads(home.store.read(runs.key(outcome.model, outcome.run_id, "verdict.json")))
    found["checks"] = [(c["name"], c["passed"]) for c in verdict["checks"]]
    for name in ("promote", "metric", "test_rows", "challenger_metrics", "champion_metrics",
                 "challenger_intervals", "comparison", "slices", "calibration_error"):  # fmt: skip
        found[name] = verdict[name]
    return found


def assert_same(one: Any, other: Any) -> None:
    """The same words, and numbers that differ by 1e-6 at most."""
    if isinstance(one, float):
        assert one == pytest.approx(other, rel=0, abs=1e-6, nan_ok=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_same(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_both_branches_are_those_of_processes(
    at: Callable[[str], Home], tiny: Path, docker_client: Any
) -> None:
    found: list[list[dict[str, Any]]] = []
    for runner in ("subprocess", "docker"):
        home = at(runner)
        first, promoted = run(home, tiny, "r1", runner)
        second, rejected = run(home, tiny, "r2", runner)
        assert (first.returncode, promoted.state) == (0, "promoted"), first.stdout
        assert (second.returncode, rejected.state) == (3, "rejected"), second.stdout
        # The same rows and seed make the same model, in containers too.
        assert rejected.version == rejected.champion_before == promoted.version
        now = rollout.read(home.store, "tiny")
        assert now is not None
        assert (now.champion, now.revision) == (promoted.version, 1)
        found.append([findings(home, promoted), findings(home, rejected)])
    assert_same(*found)
    assert not left_behind(docker_client, home)
    assert not list((home.folder / "pipeline-root").iterdir())
    mine = {path.stat().st_uid for path in home.folder.rglob("*")}
    assert mine == {os.getuid()}


@pytest.mark.parametrize(
    ("name", "image_name"), [("payments", "python-tabular"), ("digits", "python-vision")]
)
def test_an_example_comes_to_the_same(
    name: str, image_name: str, at: Callable[[str], Home], use: Callable[[str], str]
) -> None:
    use(image_name)
    contract = Path("examples", name, "contract.yaml")
    found = []
    for runner in ("subprocess", "docker"):
        home = at(runner)
        done, outcome = run(home, contract, "r1", runner)
        assert (done.returncode, outcome.state) == (0, "promoted"), done.stdout
        # The database of the tracking is a file: steps in containers leave it to the machine.
        assert outcome.tracking.startswith("mlflow run ")
        found.append(findings(home, outcome))
    assert_same(*found)


def test_bad_rows_stop_the_run(home: Home, tiny: Path) -> None:
    contract = write_contract(tiny.parent, spoiled=200)
    done, outcome = run(home, contract, "r1")
    assert (done.returncode, outcome.state) == (4, "stopped"), done.stdout
    # A step that stops is no success: nothing runs on its missing outputs.
    assert [s.name for s in outcome.steps] == ["prepare"]
    assert outcome.reason in done.stdout
    assert home.store.exists(runs.key("tiny", "r1", "quarantine.parquet"))
    assert rollout.read(home.store, "tiny") is None


def test_the_exit_handler_records_a_step_that_fails(home: Home, tiny: Path) -> None:
    before = rollout.change(home.store, "tiny", champion="lost", by="test")
    done, outcome = run(home, tiny, "r1")
    assert (done.returncode, outcome.state) == (1, "failed"), done.stdout
    assert outcome.reason.startswith("judge: BundleError: tiny has no version lost")
    assert {r.name: r.state for r in runs.steps(home.store, "tiny", "r1")} == {
        "prepare": "done", "fit-linear": "done", "assemble": "done", "judge": "failed",
        "record": "done",
    }  # fmt: skip
    assert b"Traceback" in home.store.read(runs.key("tiny", "r1", "output.log"))
    assert rollout.read(home.store, "tiny") == before


def start(contract: Path) -> subprocess.Popen[str]:
    """A run whose `prepare` has begun."""
    process = subprocess.Popen(
        command(contract, "r1", "--events"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == "prepare":
            return process
    raise AssertionError("the run ended before its first step")


def the_container(client: Any, home: Home) -> Any:
    (name,) = left_behind(client, home)
    return client.containers.get(name)


def test_a_container_that_is_killed_fails_the_run(
    home: Home, tiny: Path, docker_client: Any
) -> None:
    process = start(tiny)
    container = the_container(docker_client, home)
    settings = container.attrs["HostConfig"]
    container.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert (outcome.state, [s.name for s in outcome.steps]) == ("failed", ["prepare"])
    assert runs.steps(home.store, "tiny", "r1")[-1].name == "record"
    assert not left_behind(docker_client, home)

    from kfp.dsl.constants import WORKSPACE_MOUNT_PATH

    assert settings["ReadonlyRootfs"]
    assert not settings["Privileged"]
    assert settings["CapDrop"] == ["ALL"]
    assert settings["SecurityOpt"] == ["no-new-privileges"]
    assert settings["NetworkMode"] == "none"
    assert container.attrs["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
    writable = {m["Destination"]: m["RW"] for m in container.attrs["Mounts"]}
    del writable[WORKSPACE_MOUNT_PATH]  # KFP's; it lies below the run's folder
    assert writable == {
        str(home.folder / "pipeline-root" / "r1"): True,
        str(home.store.folder): True,
        str(tiny.parent / "rows.csv"): False,
    }


def test_an_interrupted_run_leaves_no_container(home: Home, tiny: Path, docker_client: Any) -> None:
    process = start(tiny)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not left_behind(docker_client, home)
    outcome = runs.read(home.store, "tiny", "r1")
    assert outcome is not None
    assert (outcome.state, outcome.reason) == ("failed", "interrupted")
    assert not list((home.folder / "pipeline-root").iterdir())


@pytest.mark.parametrize("victim", ["watcher", "pipeline", "both"])
def test_a_run_that_is_killed_leaves_no_container(
    victim: str, home: Home, tiny: Path, docker_client: Any
) -> None:
    process = start(tiny)
    (pipeline,) = psutil.Process(process.pid).children()
    folder = home.folder / "pipeline-root"
    containers.sweep(folder)
    assert left_behind(docker_client, home)  # what a run that lives has started is left alone
    if victim == "both":
        pipeline.suspend()  # so that it cannot see the other one go
    if victim in ("watcher", "both"):
        process.kill()
        process.wait()
    if victim in ("pipeline", "both"):
        pipeline.kill()
    output, _ = process.communicate(timeout=60)
    psutil.wait_procs([pipeline], timeout=60)
    if victim == "both":
        assert left_behind(docker_client, home)
        containers.sweep(folder)  # as the next run does
    assert not left_behind(docker_client, home)
    if victim == "pipeline":
        assert process.returncode == 1, output
        outcome = runs.read(home.store, "tiny", "r1")
        assert outcome is not None
        assert outcome.state == "failed"


def test_a_store_on_this_machines_loopback_is_reached(
    s3_moto: str, home: Home, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTMILL_STORE", s3_moto)
    done, outcome = run(find(), tiny, "r1")
    assert (done.returncode, outcome.state) == (0, "promoted"), done.stdout
    assert not (home.folder / "store").exists()


def test_an_image_that_is_missing_is_named(
    home: Home, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIFTMILL_IMAGE")
    monkeypatch.setenv("DRIFTMILL_IMAGE_PREFIX", "nobody.example")
    done = subprocess.run(command(tiny, "r1"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"there is no image {images.reference('python-tabular')} on this machine; build it: "
        "driftmill images build --family python-tabular\n"
    )
    assert not home.folder.exists()


def test_an_image_of_ones_own_is_not_built(
    home: Home, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTMILL_IMAGE", "nobody.example/python:absent")
    done = subprocess.run(command(tiny, "r1"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "docker pull nobody.example/python:absent" in done.stderr


def test_an_exit_code_is_not_lost(
    use: Callable[[str], str], docker_client: Any, home: Home
) -> None:
    quick = [docker_client, use("python-tabular"), ["sh", "-c", "exit 3"], {}]
    labels = {containers.LABEL: f"{home.folder}/pipeline-root/r1"}
    # KFP's own function takes some of these for successes.
    assert {containers._run(*quick, labels=labels) for _ in range(10)} == {3}
    assert not left_behind(docker_client, home)
