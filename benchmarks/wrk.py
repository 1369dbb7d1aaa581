"""Runs wrk, and reads what it has measured."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

#: The end of a script: what was measured, as one line of JSON; times in milliseconds. Answers other
#: than 2xx and 3xx are `wrong`, what had no answer is `unanswered`.
DONE = """
done = function(summary, latency)
  local e = summary.errors
  print(string.format(
    '{"answers": %d, "seconds": %f, "p50": %f, "p99": %f, "p999": %f, "longest": %f, ' ..
    '"wrong": %d, "unanswered": %d}', summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency:percentile(99.9) / 1e3,
    latency.max / 1e3, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


class WrkError(RuntimeError):
    """It did not measure; the message is what it printed."""


def run(program: str, script: Path, url: str, connections: int, seconds: float) -> dict[str, Any]:
    """A round: each connection sends when it was answered.

    Args:
        program: wrk.
        script: in Lua, ending in `DONE`.
        url: asked.
        connections: kept open.
        seconds: how long.

    Returns:
        What `DONE` prints; `failed` are all that were not answered well.

    Raises:
        WrkError: it failed.
    """
    done = subprocess.run(
        [program, "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "--timeout", "30s",
         "-s", str(script), url],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise WrkError(done.stderr or done.stdout)
    measured: dict[str, Any] = json.loads(found[0])
    return measured | {"failed": measured["wrong"] + measured["unanswered"]}
