"""Tests of the command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from driftmill import bundle, cli, docs, rollout, runs
from driftmill.serving import log
from driftmill.store import Store
from driftmill.version import code_version
from tests.conftest import CONTRACT, tiny_frame

MAIN = [sys.executable, "-c", "from driftmill.cli import main; main()"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: exit code, stdout, stderr, of it and its children."""
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path))
    monkeypatch.delenv("DRIFTMILL_STORE", raising=False)
    monkeypatch.delenv("DRIFTMILL_LEDGER", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["driftmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, errors = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out, errors

    return call


@pytest.fixture
def contract_file(tmp_path: Path) -> Path:
    """The tiny contract, with its rows in a file."""
    tiny_frame(300).round(2).to_csv(tmp_path / "rows.csv", index=False)
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT.replace("sim:payments", "file:rows.csv"))
    return path


@pytest.fixture
def versions(store: Store, make_bundle: Callable[..., bundle.Manifest]) -> tuple[str, str]:
    """Two versions; the second is the champion, after the first."""
    first, second = make_bundle(0.02).version, make_bundle(0.03).version
    rollout.change(store, "tiny", champion=first, by="test", reason="the first")
    rollout.change(store, "tiny", champion=second, by="test", reason="it is better")
    return first, second


def _commands() -> list[list[str]]:
    group = typer.main.get_command(cli.app)
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, sub] for sub in inner] if inner else [[name]]
    return found


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_and_is_in_the_docs(
    run: Run, command: list[str]
) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Example: driftmill {' '.join(command)}" in out
    reference = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    assert f"driftmill {' '.join(command)}" in reference


def test_help_names_the_exit_codes(run: Run) -> None:
    _, out, _ = run("--help")
    assert "4 stopped by the data" in " ".join(out.split())


def test_help_imports_nothing_heavy() -> None:
    heavy = {"pandas", "numpy", "pydantic", "sqlalchemy", "kfp", "bentoml", "httpx"}
    script = (
        "import sys\nfrom driftmill import cli\nsys.argv = ['driftmill', '--help']\n"
        f"try:\n cli.main()\nfinally:\n print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['pandas'] = None\nfrom driftmill.cli import main\n"
        "sys.argv = ['driftmill', 'init', 'rows.csv']\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs the package pandas; pip install 'driftmill[laptop]'")


def test_the_reference_of_the_contract_is_up_to_date() -> None:
    path = Path(__file__).parent.parent / "docs" / "contract.md"
    assert path.read_text() == docs.markdown(), "driftmill schema --markdown > docs/contract.md"


def test_every_field_is_described() -> None:
    rows = [line for line in docs.markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert not [row for row in rows if row.split(" | ")[-1].strip(" |") == ""]


def test_schema(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["title"] == "Driftmill contract"
    assert run("schema", "--markdown")[1] == docs.markdown()


def test_version(run: Run) -> None:
    assert run("version")[1].strip() == code_version()


def test_init_writes_a_contract_once(run: Run, tmp_path: Path, contract_file: Path) -> None:
    output = tmp_path / "drafted.yaml"
    arguments = ["init", tmp_path / "rows.csv", "--target", "fraud", "-o", output]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "classification of fraud" in out
    assert run("validate", output, "--data")[0] == 0
    content = output.read_text()
    code, _, errors = run(*arguments)
    assert code == 2
    assert "--force" in errors
    assert output.read_text() == content
    assert run(*arguments, "--force")[0] == 0
    code, _, errors = run("init", tmp_path / "none.csv", "-o", tmp_path / "other.yaml")
    assert (code, "no such file" in errors) == (2, True)
    assert not (tmp_path / "other.yaml").exists()


def test_validate(run: Run, contract_file: Path) -> None:
    code, out, _ = run("validate", contract_file)
    assert code == 0
    assert "tiny, classification of fraud from 3 columns" in out
    code, out, _ = run("validate", contract_file, "--data", "--json")
    assert code == 0
    assert json.loads(out)["data"] == {
        "rows": 300,
        "quarantined": 0,
        "fraction": 0.0,
        "reasons": {},
    }


def test_a_bad_contract_names_the_line_and_is_no_traceback(run: Run, contract_file: Path) -> None:
    contract_file.write_text(contract_file.read_text().replace("task:", "tsk:"))
    for command in (["validate"], ["train"], ["compile"], ["up"], ["replay"]):
        code, _, errors = run(*command, contract_file)
        assert code == 2
        assert "did you mean 'task'" in errors
        assert "Traceback" not in errors
    assert run("validate", "nowhere.yaml")[0] == 2


def test_validate_stops_at_bad_data(run: Run, contract_file: Path, tmp_path: Path) -> None:
    tiny_frame(100).assign(amount=-1).to_csv(tmp_path / "rows.csv", index=False)
    code, out, errors = run("validate", contract_file, "--data")
    assert code == 4
    assert "100  amount: below min 0" in out
    assert "max_fraction" in errors
    (tmp_path / "rows.csv").unlink()
    code, _, errors = run("validate", contract_file, "--data")
    assert (code, "does not exist" in errors) == (4, True)


def test_rollout(run: Run, versions: tuple[str, str]) -> None:
    first, second = versions
    assert json.loads(run("rollout", "show", "tiny", "--json")[1])["champion"] == second
    code, out, _ = run("rollout", "set", "--challenger", first, "--weight", "0.1", "--json")
    assert code == 0
    assert json.loads(out) | {"at": "", "by": ""} == {
        "revision": 3,
        "champion": second,
        "challenger": first,
        "weight": 0.1,
        "shadow": False,
        "at": "",
        "by": "",
        "reason": "",
    }
    assert run("rollout", "rollback", "tiny", "--reason", "it errs")[0] == 0
    assert run("rollout", "rollback", "tiny")[0] == 0
    history = json.loads(run("rollout", "history", "tiny", "--json")[1])
    assert [(r["champion"], r["challenger"]) for r in history] == [
        (first, None),
        (second, None),
        (second, first),
        (second, None),
        (first, None),
    ]
    code, _, errors = run("rollout", "rollback", "tiny")
    assert (code, "never had another champion" in errors) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["set", "tiny", "--challenger", "0" * 12], 1, "has no version"),
        (["set", "tiny", "--weight", "0.5"], 2, "needs a challenger"),
        (["set", "tiny", "--weight", "1.5"], 2, "--weight"),
        (["show", "tinny"], 2, "did you mean 'tiny'"),
    ],
)
def test_a_rollout_that_makes_no_sense(
    run: Run,
    versions: tuple[str, str],
    store: Store,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    found, _, errors = run("rollout", *arguments)
    assert found == code
    assert message in errors
    assert len(rollout.history(store, "tiny")) == 2


def test_predict_offline(
    run: Run, versions: tuple[str, str], contract_file: Path, tmp_path: Path
) -> None:
    rows = tiny_frame(20)
    rows.to_csv(tmp_path / "some.csv", index=False)
    code, out, _ = run(
        "predict", contract_file, "--file", tmp_path / "some.csv", "--offline", "--json"
    )
    assert code == 0
    answer = json.loads(out)
    assert answer["version"] == versions[1]
    assert [p["prediction"] for p in answer["predictions"]] == [
        "yes" if amount > 500 else "no" for amount in rows["amount"]
    ]
    record = '{"amount": 900, "age": null, "channel": "web"}'
    code, out, _ = run("predict", "tiny", "--record", record, "--offline")
    assert code == 0
    assert "yes" in out
    code, _, errors = run("predict", "tiny", "--record", '{"amount": "x"}', "--offline")
    assert code == 2
    assert "$.records[0]" in errors


def test_predict_asked_wrongly(run: Run, versions: tuple[str, str], tmp_path: Path) -> None:
    assert run("predict", "tiny")[0] == 2
    assert run("predict", "tiny", "--record", "{")[0] == 2
    assert run("predict", "tiny", "--record", "[1]")[0] == 2
    assert run("predict", "tiny", "--file", tmp_path / "none.csv")[0] == 2
    (tmp_path / "short.csv").write_text("amount\n1\n")
    code, _, errors = run("predict", "tiny", "--file", tmp_path / "short.csv")
    assert (code, "lacks the column age, channel" in errors) == (2, True)


def test_without_a_stack(run: Run, versions: tuple[str, str], contract_file: Path) -> None:
    record = ["--record", '{"amount": 1}']
    for command in (["predict", contract_file, *record], ["replay", contract_file], ["trigger"]):
        code, _, errors = run(*command)
        assert code == 5
        assert "driftmill up" in errors
    code, out, _ = run("status", "--json")
    assert code == 5
    assert [s["state"] for s in json.loads(out)["services"]] == ["not started"] * 3
    assert run("down")[:2] == (0, "nothing was running\n")
    assert run("logs")[0] == 5


def test_a_service_that_does_not_answer(run: Run, contract_file: Path) -> None:
    record = ["--record", '{"amount": 1}', "--url", "http://127.0.0.1:9"]
    code, _, errors = run("predict", contract_file, *record)
    assert (code, "does not answer" in errors) == (5, True)
    code, out, errors = run(
        "replay", contract_file, "--url", "http://127.0.0.1:9", "--rows", 20, "--json"
    )
    assert code == 1
    assert json.loads(out)["failed"] == 20
    assert "ConnectError" in errors
    assert run("replay", contract_file, "--url", "http://x", "--label-delay", "soon")[0] == 2
    assert run("replay", contract_file, "--url", "http://x", "--from", "1000")[0] == 2


def test_which_model_is_asked(run: Run, store: Store) -> None:
    code, _, errors = run("runs")
    assert (code, "the store is empty" in errors) == (2, True)
    store.write("one/runs/a/run.json", b"{}")
    store.write("two/runs/a/run.json", b"{}")
    code, _, errors = run("runs")
    assert (code, "there are one, two" in errors) == (2, True)


def test_runs_and_report(run: Run, store: Store) -> None:
    runs.begin(store, "tiny", "run-1", "a test")
    runs.conclude(store, "tiny", "run-1", trigger="a test", code_version="1", failure="it broke")
    runs.begin(store, "tiny", "run-2", "another")
    found: list[dict[str, Any]] = json.loads(run("runs", "tiny", "--json")[1])
    assert [(r["run_id"], r["state"]) for r in found] == [
        ("run-2", "unfinished"),
        ("run-1", "failed"),
    ]
    assert "it broke" in run("runs")[1]
    assert run("report", "run-1")[0] == 2
    store.write("tiny/runs/run-1/report.html", b"<html>")
    for name in ("run-1", "last"):
        code, out, _ = run("report", name)
        assert (code, Path(out.strip()).read_bytes()) == (0, b"<html>")
    assert run("decisions", "tiny", "--json")[1] == "[]\n"


def test_logs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "service.log").write_text("one\ntwo\nthree\n")
    (tmp_path / "logs" / "run-a.log").write_text("step\n")
    assert run("logs", "-n", "2")[1] == "two\nthree\n"
    assert run("logs", "a")[1] == "step\n"
    code, _, errors = run("logs", "nothing")
    assert (code, "there are run-a, service" in errors) == (2, True)


def test_the_home_option_comes_before_the_variable(run: Run, tmp_path: Path) -> None:
    Store(tmp_path / "elsewhere" / "store").write("other/runs/a/run.json", b"{}")
    code, _, errors = run("--home", tmp_path / "elsewhere", "rollout", "show")
    assert (code, "other has no rollout yet" in errors) == (1, True)


def test_an_unknown_command_and_option(run: Run) -> None:
    assert run("trian")[0] == 2
    assert run("status", "--jsn")[0] == 2


@pytest.mark.slow
def test_train_passes_on_that_the_data_stopped_it(
    run: Run, contract_file: Path, tmp_path: Path, store: Store
) -> None:
    tiny_frame(100).assign(amount=-1).to_csv(tmp_path / "rows.csv", index=False)
    code, _, _ = run("train", contract_file, "--run-id", "bad-data")
    assert code == 4
    outcome = runs.read(store, "tiny", "bad-data")
    assert outcome is not None
    assert outcome.state == "stopped"


@pytest.mark.slow
def test_an_interrupt_ends_the_training(contract_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "DRIFTMILL_HOME": str(tmp_path)}
    child = subprocess.Popen(
        [*MAIN, "train", str(contract_file), "--run-id", "cut"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "store" / "tiny" / "runs" / "cut" / "run.json").exists():
        assert child.poll() is None
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=10)[1] == []
    outcome = runs.read(Store(tmp_path / "store"), "tiny", "cut")
    assert outcome is not None
    assert outcome.state == "failed"


@pytest.mark.slow
def test_traffic_through_a_running_stack(
    run: Run, versions: tuple[str, str], contract_file: Path, tmp_path: Path, store: Store
) -> None:
    code, out, _ = run("up", contract_file, "--port", 0, "--no-monitor", "--no-controller")
    try:
        assert code == 0
        assert "service" in out
        status = json.loads(run("status", "--json")[1])
        assert status["rollout"]["champion"] == versions[1]
        assert [s["state"] for s in status["services"]] == ["ready", "not started", "not started"]

        record = ["--record", '{"amount": 900, "age": null, "channel": "web"}', "--json"]
        code, out, _ = run("predict", contract_file, *record)
        assert code == 0
        assert json.loads(out)["predictions"][0]["prediction"] == "yes"
        code, _, errors = run("predict", "tiny", "--record", '{"amount": 900}')
        assert (code, "422" in errors) == (2, True)

        code, out, _ = run("replay", contract_file, "--rate", 2000, "--rows", 250, "--json")
        assert code == 0
        sent = json.loads(out)
        assert (sent["sent"], sent["failed"], sent["labelled"]) == (250, 0, 250)
        assert sent["versions"] == {versions[1]: 250}

        command = [*MAIN, "replay", str(contract_file), "--rate", "10", "--label-delay", "1h"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # One row was asked for above, and 250 were sent.
        while len(log.read(store, log.segments(store, "tiny", "predictions"))) <= 251:
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=30)
        assert child.returncode == 130
        assert "Traceback" not in errors
        rows = int(out.split()[0])
        assert 0 < rows < 300
        assert f"{rows} labels accepted, 0 failed" in out
    finally:
        code, out, _ = run("down")
    assert (code, out) == (0, "service stopped\n")


@pytest.mark.slow
def test_compile(run: Run, contract_file: Path, tmp_path: Path) -> None:
    code, _, _ = run("compile", contract_file, "-o", tmp_path / "build")
    assert code == 0
    assert (tmp_path / "build" / "pipeline.yaml").is_file()
    assert json.loads((tmp_path / "build" / "contract.json").read_text())["model"] == "tiny"
    for name in (
        "rules.yaml",
        "rules_test.yaml",
        "dashboard.json",
        "dashboard-models.json",
        "values.yaml",
    ):
        assert (tmp_path / "build" / name).stat().st_size > 1000
