"""The Terraform files as data, and a real Terraform for what needs no provider."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest

INFRA = Path(__file__).parents[2] / "infra"
CLOUDS = ("aws", "google", "azure")
MODULES = ("policy", "release")


@functools.cache
def parsed(folder: str) -> dict[str, Any]:
    """All blocks of a folder of `infra/`, by kind; strings without their quotes."""
    found: dict[str, Any] = {}
    for path in sorted((INFRA / folder).glob("*.tf")):
        with path.open() as file:
            for kind, blocks in _plain(hcl2.load(file)).items():
                found.setdefault(kind, []).extend(blocks if isinstance(blocks, list) else [])
    return found


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {_plain(k): _plain(v) for k, v in node.items() if k != "__is_block__"}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return node.strip('"') if isinstance(node, str) else node


def blocks(folder: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and bodies of a folder's blocks of a kind; of resources the last name."""
    for block in parsed(folder).get(kind, []):
        for name, body in block.items():
            if kind in ("resource", "data"):
                yield from body.items()
            else:
                yield name, body


def module(folder: str, name: str) -> dict[str, Any]:
    """A module that a root calls, by its name there."""
    return dict(blocks(folder, "module"))[name]


@functools.cache
def _terraform() -> str:
    found = shutil.which("terraform") or shutil.which("tofu")
    if found is None:
        pytest.skip("terraform is not installed")
    return found


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Terraform in a folder, without settings of this machine's user."""
    environment = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1"}
    return subprocess.run(
        [_terraform(), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a module of `infra/modules` gives for some variables."""
    copy = tmp_path_factory.mktemp("modules")

    def apply(name: str, **variables: Any) -> dict[str, Any]:
        folder = copy / name
        if not folder.exists():
            shutil.copytree(INFRA / "modules" / name, folder, ignore=_ignored)
            done = run("init", "-no-color", folder=folder)
            assert done.returncode == 0, done.stderr
        (folder / "given.tfvars.json").write_text(json.dumps(variables))
        done = run(
            "apply", "-no-color", "-auto-approve", "-var-file=given.tfvars.json", folder=folder
        )
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split()))
        shown = json.loads(run("output", "-json", folder=folder).stdout)
        return {key: output["value"] for key, output in shown.items()}

    return apply


_ignored = shutil.ignore_patterns(".terraform*", "*.tfstate*")
