"""Promotions under load: `python -m benchmarks.swaps`.

One service as shipped, its rollout in a folder. First some requests without a change; then, while
a million requests are sent, two versions replace each other 200 times, by the same change of the
rollout that a promotion makes. Each answer is compared with what the version that it names
predicts. Prints and writes `benchmarks/results/swaps.json`; exit code 1 where a request failed.

    python -m benchmarks.swaps --requests 50000 --swaps 10      # a quick look
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import load, rollouts
from driftmill import bundle
from driftmill.contract import Serve
from driftmill.home import cores
from driftmill.serving.versions import Model

RESULT = Path(__file__).parent / "results" / "swaps.json"


def expected(store: Path, version: str, record: dict[str, Any]) -> float:
    """What a version gives as the record's score."""
    from driftmill.store import Store

    with tempfile.TemporaryDirectory() as cache:
        model = Model(bundle.fetch(Store(store), rollouts.MODEL, version, Path(cache)))
        records = model.codec.records(json.dumps({"records": [record]}).encode())
        output, _ = model.run(model.codec.decode(records))
        score = model.codec.answers(["0"], output)[0].score
    assert score is not None
    return score


def counts(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What became of what was sent."""
    output, _ = process.communicate()
    found: dict[str, Any] = json.loads(output)
    return found


def measure(place: rollouts.Laptop, requests: int, swaps: int, connections: int) -> dict[str, Any]:
    """Send without a change, then with many."""
    url = f"http://127.0.0.1:{place.running[0][1]}"
    record = load.record(url, None)
    versions = (place.old, place.new)
    scores = {v: expected(place.folder / "store", v, record) for v in versions}
    apart = abs(scores[place.old] - scores[place.new])
    assert apart > 100 * load.TOLERANCE, "the two versions cannot be told apart"
    common = ["--connections", str(connections), "--expect", json.dumps(scores)]
    steady = counts(rollouts.send(url, "--requests", str(requests // 10), *common))
    if steady["failed"]:
        sys.exit(f"without a swap already: {steady['failed']}")
    stop = place.folder / "stop"
    sending = rollouts.send(url, "--requests", str(requests), "--until", str(stop), *common)
    began = time.monotonic()
    # The rollout is polled: changes that come faster would be taken together.
    pace = max(requests / steady["requests_per_s"] / swaps, 1.2 * Serve().poll)
    try:
        for turn in range(swaps):
            place.promote(versions[(turn + 1) % 2])
            time.sleep(max(0.0, began + (turn + 1) * pace - time.monotonic()))
        stop.touch()
        swapped = counts(sending)
    finally:
        sending.kill()
    return {
        "swaps": swaps,
        "steady": steady,
        "swapped": swapped,
        "p99_ratio": round(swapped["p99_ms"] / steady["p99_ms"], 2),
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swaps", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="with swaps (1000000)")
    parser.add_argument("--swaps", type=int, default=200, help="promotions (200)")
    parser.add_argument("--connections", type=int, default=16, help="clients (16)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = rollouts.Laptop(Path(folder), drain=0.0, services=1)
        try:
            found = measure(place, given.requests, given.swaps, given.connections)
        finally:
            place.close()
    found = {"machine": f"{platform.machine()}, {cores()} cores", **found}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if found["steady"]["failed"] or found["swapped"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
