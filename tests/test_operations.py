"""docs/operations.md names tests, targets and commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from driftmill.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def test_every_drill_names_a_test_that_there_is() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 10
    there = [(path, test) for path, test in named if f"def {test}(" in (ROOT / path).read_text()]
    assert there == named


def test_every_command_is_there() -> None:
    commands = set(get_command(app).list_commands(None))  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:^|`|\$ |&& )driftmill (?:--home \S+ )?([a-z]+)\b", PAGE, re.M))
    assert {"backup", "restore", "verify"} <= named <= commands
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGE, re.M)) <= set(targets)
