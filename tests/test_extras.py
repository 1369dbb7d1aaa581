"""What is imported when, and what one is told where a package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from driftmill import extras, runs
from driftmill.store import Store
from tests.pipelines.contracts import IMAGES, write_contract

#: Packages of the extra `vision` that take seconds and hundreds of megabytes to import.
HEAVY = ("torch", "torchvision", "onnxscript")
CHECK = f"import sys; print([m for m in {HEAVY} if m in sys.modules])"
SERVICES = ("services.tabular", "services.vision", "services.monitor", "services.controller")


def imported(script: str, *arguments: str) -> str:
    """Which of the heavy packages a script has imported in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{CHECK}", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", ["driftmill.cli", "driftmill.demo", "pipelines.run", *SERVICES])
def test_nothing_but_training_on_images_imports_pytorch(module: str) -> None:
    assert imported(f"import {module}") == "[]"


@pytest.mark.slow
def test_the_steps_for_a_table_never_import_pytorch(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from driftmill import contract, steps
folder, asked = Path(sys.argv[1]), contract.load(sys.argv[2]).to_json()
run = (asked, str(folder / "store"), "r1")
steps.prepare(*run, folder / "data")
steps.fit(*run, "linear", folder / "data", folder / "fit")
steps.assemble(*run, folder / "data", [folder / "fit"], folder / "bundle")
verdict = steps.judge(
    *run, folder / "data", folder / "bundle", folder / "judged", folder / "report.html"
)
assert verdict.promote, verdict.reason
steps.promote(*run, folder / "judged")
steps.record(*run, "test", "0")
"""
    assert imported(script, str(tmp_path), str(write_contract(tmp_path))) == "[]"


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("pandas", "this needs the package pandas; pip install 'driftmill[laptop]'"),
        ("torch.nn", "this needs the package torch; pip install 'driftmill[laptop,vision]'"),
        ("botocore.session", "this needs the package botocore; pip install 'driftmill[s3]'"),
        ("driftmill.nothing", None),
        ("services.nothing", None),
    ],
)
def test_a_missing_package_comes_with_an_extra(module: str, told: str | None) -> None:
    assert extras.advice(ModuleNotFoundError("", name=module)) == told


def test_without_pytorch_the_fit_of_a_network_says_what_to_install(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["torch"] = None
from driftmill import contract, steps
asked = contract.parse(sys.argv[2]).to_json()
steps.fit(asked, sys.argv[1], "r1", "mlp", sys.argv[1], sys.argv[1])
"""
    (tmp_path / "dataset.json").write_text('{"fingerprint": "of rows"}')
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), IMAGES], capture_output=True, text=True
    )
    assert done.returncode == 1
    outcome = runs.conclude(Store(tmp_path), "small-digits", "r1", trigger="", code_version="")
    assert outcome.reason == (
        "fit-mlp: ModuleNotFoundError: this needs the package torch;"
        " pip install 'driftmill[laptop,vision]'"
    )
