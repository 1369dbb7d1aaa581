"""checkov on a folder, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def check(config: Path, folder: Path) -> dict[str, Any]:
    """The summary of what checkov finds, with a project's exceptions; fails where it finds
    something, skips where it is not installed."""
    program = shutil.which("checkov")
    if program is None:
        pytest.skip("checkov is not installed; `uv tool install checkov` brings it")
    done = subprocess.run(
        [program, "--config-file", config, "-d", folder, "-o", "json"],
        capture_output=True,
        text=True,
    )
    answer = json.loads(done.stdout)
    failed = [
        f"{f['check_id']} {f['check_name']}: {f['resource']}"
        for f in answer.get("results", {}).get("failed_checks", [])
    ]
    assert failed == []
    assert done.returncode == 0, done.stderr
    # A folder in which nothing applies has no summary of its own.
    summary: dict[str, Any] = answer.get("summary", answer)
    return summary
