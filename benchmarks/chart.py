"""Seconds and requests of the chart on a cluster: `python -m benchmarks.chart`.

Runs `tests/cluster/test_chart.py` on the cluster that `DRIFTMILL_TEST_CONTEXT` names (one with the
Prometheus operator, the Gateway API's kinds and an S3 store; `tests/cluster/conftest.py` says more)
and keeps what it prints: from `helm install` to the first prediction; from the first drifted row to
the alarm, the webhook, the new model; requests through upgrade and rollback, a promotion, and a
node drain, by clients that try nothing twice. Writes `benchmarks/results/chart.json`.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from driftmill.home import cores

TESTS = "tests/cluster/test_chart.py"
RESULT = Path(__file__).parent / "results" / "chart.json"
_SECONDS = re.compile(r"(?P<what>from helm install .*|until all pods .*): (?P<seconds>[\d.]+) s")
_MARK = re.compile(r" *(?P<seconds>[\d.]+) s  (?P<what>.+)")
_LOAD = re.compile(r"(?P<what>[a-z ]+): \d+ requests, .* failed, (?P<report>\{.*\})")


def main() -> int:
    """Measure, print and write; the exit code of the tests."""
    if not os.environ.get("DRIFTMILL_TEST_CONTEXT"):
        sys.exit("DRIFTMILL_TEST_CONTEXT names no cluster")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "cluster", TESTS]
    found: dict[str, Any] = {"install_s": {}, "drift_s": {}, "load": {}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            _take(line.rstrip(), found)
    if process.returncode == 0:
        machine = {"machine": f"{platform.machine()}, {cores()} cores"}
        RESULT.write_text(json.dumps(machine | found, indent=1) + "\n")
    return process.returncode


def _take(line: str, found: dict[str, Any]) -> None:
    """Keep a line that tells a figure."""
    if match := _SECONDS.fullmatch(line):
        found["install_s"][match["what"]] = float(match["seconds"])
    elif match := _MARK.fullmatch(line):
        found["drift_s"][match["what"]] = float(match["seconds"])
    elif match := _LOAD.fullmatch(line):
        found["load"][match["what"]] = ast.literal_eval(match["report"])


if __name__ == "__main__":
    raise SystemExit(main())
