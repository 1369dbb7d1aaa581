"""The same input gives the same bytes: packages of contracts, bundles, the wheel, the chart.

Everything is made twice, in processes that differ in all that must not matter: the folder, the
order of sets, the time zone, the language, and the rights that new files get.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from driftmill import bundle
from driftmill.sbom import SBOM

ROOT = Path(__file__).parents[1]
#: What may differ between two machines, and the rights of new files there.
MACHINES = (
    ({"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C"}, 0o022),
    ({"PYTHONHASHSEED": "2", "TZ": "Pacific/Chatham", "LC_ALL": "C.UTF-8"}, 0o077),
)


def twice(commands: list[list[str]], folders: list[Path], **more: str) -> None:
    """Run a command on each of two machines, at the same time."""
    started = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **values, **more},
            umask=umask,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, folder, (values, umask) in zip(commands, folders, MACHINES, strict=True)
    ]
    for process in started:
        output = process.communicate()[0]
        assert process.returncode == 0, output


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders at other depths."""
    both = [tmp_path / "one", tmp_path / "two" / "deeper"]
    for folder in both:
        folder.mkdir(parents=True)
    return both


@pytest.mark.parametrize("example", ["payments", "digits"])
def test_a_contract_is_compiled_to_the_same_bytes(example: str, folders: list[Path]) -> None:
    for folder in folders:
        shutil.copy(ROOT / "examples" / example / "contract.yaml", folder)
    command = [sys.executable, "-m", "driftmill", "compile", "contract.yaml", "-o", "out"]
    twice([[*command, "--store", "s3://models/driftmill"]] * 2, folders)
    first, second = (contents(folder / "out") for folder in folders)
    assert set(first) >= {"pipeline.yaml", "values.yaml", "rules.yaml", "dashboard.json"}
    assert first == second


@pytest.mark.slow
def test_a_training_gives_the_same_bundle(folders: list[Path]) -> None:
    """But for the moment when it was made, and what tells of it."""
    contract = (ROOT / "examples/payments/contract.yaml").read_text()
    for folder in folders:
        # One family, the one with threads.
        (folder / "contract.yaml").write_text(contract.replace("[linear, hist", "[hist"))
    command = [sys.executable, "-m", "driftmill", "--home", "home", "train", "contract.yaml"]
    twice([command] * 2, folders)
    made = []
    for folder in folders:
        (found,) = (folder / "home/store/payments/bundles").iterdir()
        made.append((bundle.read_manifest(found), contents(found)))
    (one, first), (two, second) = made
    assert one.version == two.version
    assert {name: first[name] for name in bundle.CORE} == {n: second[n] for n in bundle.CORE}
    dated = {"created", "files", "data"}
    assert one.model_dump(exclude=dated) == two.model_dump(exclude=dated)
    assert one.data["fingerprint"] == two.data["fingerprint"]
    listed = [
        [c for c in json.loads(files[SBOM])["components"] if c["name"] != "report.html"]
        for files in (first, second)
    ]
    assert listed[0] == listed[1]


@pytest.fixture
def clones(folders: list[Path]) -> list[Path]:
    """Two clones of what a release is made of, with the rights that each machine gives to files."""
    for name in ("git", "make", "tar"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    if "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("packing needs GNU tar")
    origin = folders[0].parent / "origin"
    for name in ("driftmill", "components", "pipelines", "services", "k8s", "helm"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, origin / name, ignore=ignored)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, origin)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *who, *arguments], cwd=origin, check=True)
    twice([["git", "clone", "--quiet", str(origin), "clone"]] * 2, folders)
    return [folder / "clone" for folder in folders]


def test_a_release_has_the_same_bytes(clones: list[Path]) -> None:
    """Also where somebody has built in the folder before, and has files that are not committed."""
    (clones[1] / "driftmill" / "mine.py").write_text("")
    (clones[1] / "build" / "lib" / "driftmill").mkdir(parents=True)
    (clones[1] / "build" / "lib" / "driftmill" / "old.py").write_text("")
    there = Path(sys.prefix)
    # The environment is there; make is not to renew it.
    command = ["make", f"VENV={there}", "-o", f"{there}/.has-dev", "release"]
    twice([command] * 2, clones)
    first, second = (contents(clone / "dist") for clone in clones)
    assert {Path(name).suffix for name in first} == {".whl", ".tgz", ""}
    assert first == second
    (wheel,) = (clones[0] / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"driftmill/sbom.py", "k8s/base/limits.yaml"} <= names
    assert "driftmill/mine.py" not in names
    assert not any(name.startswith("tests/") for name in names)
