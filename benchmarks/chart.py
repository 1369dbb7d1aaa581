"""Seconds and requests of the chart on a cluster: `python -m benchmarks.chart`.

Runs `tests/cluster/test_chart.py` on the cluster that `DRIFTMILL_TEST_CONTEXT` names (one with the
Prometheus operator, the Gateway API's kinds and an S3 store; `tests/cluster/conftest.py` says more)
and keeps what it prints: from `helm install` to the first prediction; from the first drifted row to
the alarm, the webhook, the new model; requests through upgrade and rollback, a promotion, and a
node drain, by clients that try nothing twice. Without a cluster it makes one with kind, installs
the chart, and tells how long all of it took to the first prediction; images are there, but not in
the cluster. Writes `benchmarks/results/chart.json`.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from driftmill.home import cores

TESTS = "tests/cluster/test_chart.py"
RESULT = Path(__file__).parent / "results" / "chart.json"
_FIRST = "from helm install to the first prediction"
_SECONDS = re.compile(r"(?P<what>from helm install .*|until all pods .*): (?P<seconds>[\d.]+) s")
_MARK = re.compile(r" *(?P<seconds>[\d.]+) s  (?P<what>.+)")
_LOAD = re.compile(r"(?P<what>[a-z ]+): \d+ requests, .* failed, (?P<report>\{.*\})")


def main() -> int:
    """Measure, print and write; the exit code of the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "cluster", TESTS]
    fresh = not os.environ.get("DRIFTMILL_TEST_CONTEXT")
    if fresh:
        command += ["-k", "all_pods_are_ready"]
    found: dict[str, Any] = {"install_s": {}, "drift_s": {}, "load": {}}
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            _take(line.rstrip(), found)
            if fresh and line.startswith(_FIRST):
                found["fresh_cluster_s"] = round(time.monotonic() - began, 1)
                print(f"from nothing to the first prediction: {found['fresh_cluster_s']} s")
    if process.returncode == 0:
        _write(found)
    return process.returncode


def _write(found: dict[str, Any]) -> None:
    """Put figures beside those of the other mode."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known["machine"] = f"{platform.machine()}, {cores()} cores"
    if "fresh_cluster_s" in found:
        known["fresh_cluster_s"] = found["fresh_cluster_s"]
    else:
        known |= found
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


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
