"""Millions of requests to ours, many of them bad: what memory and metrics do."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving import drive
from benchmarks.serving.catalogue import OURS, SERVICES
from benchmarks.serving.model import NAME, Made
from driftmill.serving.log import segments
from driftmill.store import Store

#: Points at which memory is read, and connections.
POINTS, CONNECTIONS = 100, 64
#: One request of so many is bad.
BAD = 20
#: Memory is flat if its last tenth lies no higher above its second tenth than this part of it.
FLAT = 0.05

# Each request has an id of its own. Bad ones are made as clients make them: scans of paths, broken
# JSON, missing fields, unknown categories, other methods, content types and models.
_SOAK = """
local bodies, n, bad, turn = {}, 0, 0, 0
local start, every = "RUN", EVERY
init = function()
  for line in io.lines(%s) do bodies[#bodies + 1] = line end
end
local function send(method, path, id, body, kind)
  return method .. " " .. path .. " HTTP/1.1\\r\\nHost: localhost\\r\\nX-Request-Id: " .. id ..
    "\\r\\nContent-Type: " .. (kind or "application/json") .. "\\r\\nContent-Length: " .. #body ..
    "\\r\\n\\r\\n" .. body
end
local kinds = {
  function(id, body) return send("GET", "/scan/" .. id .. ".php", id, "") end,
  function(id, body) return send("POST", "/predict", id, body:sub(1, -9)) end,
  function(id, body) return send("POST", "/predict", id, '{"records": [{"' .. id .. '": 1}]}') end,
  function(id, body)
    local unknown = body:gsub('"c%%d"', '"' .. id .. '"')
    return send("POST", "/predict", id, unknown)
  end,
  function(id, body) return send("DELETE", "/predict", id, "") end,
  function(id, body) return send("POST", "/predict", id, body, "text/" .. id) end,
  function(id, body) return send("POST", "/v2/models/" .. id .. "/infer", id, body) end,
  function(id, body) return send("POST", "/predict?" .. id .. "=1", id, "[]") end,
}
request = function()
  n = n + 1
  turn = turn %% #bodies + 1
  local id = start .. n
  if n %% every > 0 then return send("POST", "/predict", id, bodies[turn]) end
  bad = bad + 1
  return kinds[bad %% #kinds + 1](id, bodies[turn])
end
"""


def script(run: str) -> str:
    """What wrk runs; ids begin with the name of the run."""
    return _SOAK.replace("RUN", run).replace("EVERY", str(BAD))


def soak(made: Made, envs: Path, requests: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Send at least so many requests; what was seen at `POINTS` points.

    Files that the log has moved to its store are deleted but for the last, as a retention does.
    """
    service = SERVICES[OURS]
    sent = drive.bodies(service, made.records, 1)
    store = Store(made.folder / "store")
    points: list[dict[str, float]] = []
    answers = failed = 0
    with (
        tempfile.TemporaryDirectory() as home,
        drive.serving(service, made, envs, home=Path(home)) as running,
    ):
        # It was asked until it answered: 503 before the model was loaded.
        before = Counter(codes(drive.get(running.port, "/metrics")[1].decode()))
        points.append({"answers": 0, "resident_mb": running.resident_mb()})
        first = drive.closed_loop(running, sent, CONNECTIONS, 2)
        seconds = max(1.0, requests / first.rate / POINTS)
        while answers < requests:
            load = drive.closed_loop(
                running, sent, CONNECTIONS, seconds, script(f"r{len(points)}-")
            )
            answers += load.answers
            failed += load.unanswered  # those of a bad status are told from /metrics
            points.append({"answers": answers, "resident_mb": running.resident_mb()})
            say(f"soak: {answers:,} of {requests:,}, {points[-1]['resident_mb']:.0f} MB")
            for key in segments(store, NAME, "predictions")[:-1]:
                store.delete(key)
        page = drive.get(running.port, "/metrics")[1].decode()
        size = running.resident_mb()
    counted = dict(Counter(codes(page)) - before)
    return {
        "requests": answers,
        "bad_one_in": BAD,
        "unanswered": failed,
        "server_errors": sum(n for code, n in counted.items() if code.startswith("5")),
        "codes": counted,
        "series": len(series(page)),
        "metrics_bytes": len(page),
        "resident_mb": size,
        "growth": growth([point["resident_mb"] for point in points]),
        "points": points,
    }


def series(page: str) -> list[str]:
    """The lines of a page of metrics that are series."""
    return [line for line in page.splitlines() if line and not line.startswith("#")]


def codes(page: str) -> dict[str, int]:
    """Requests by status code, as the service counted them."""
    found: dict[str, int] = {}
    for line in series(page):
        if match := re.match(r'model_requests_total\{.*code="(\d+)".*\} (\S+)', line):
            found[match[1]] = found.get(match[1], 0) + int(float(match[2]))
    return found


def growth(resident: list[float]) -> float:
    """By what part the last tenth lies above the second tenth, by their medians.

    The first tenth is left out: buffers and caches fill in it.
    """
    tenth = max(1, len(resident) // 10)
    before = statistics.median(resident[tenth : 2 * tenth])
    return statistics.median(resident[-tenth:]) / before - 1
