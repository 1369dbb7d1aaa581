"""The demo's timeline and memory: medians over several runs, from the `demo.json` each leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def run(example: str) -> dict[str, object]:
    """One demo in a folder of its own; its summary, with the whole time in seconds."""
    with tempfile.TemporaryDirectory(prefix="driftmill-benchmark-") as folder:
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "driftmill", "demo", example],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DRIFTMILL_HOME": folder},
        )
        seconds = time.monotonic() - began
        (summary,) = Path(folder).rglob("demo.json")
        return {**json.loads(summary.read_text()), "whole": seconds}


def main() -> None:
    """Run the demos and print medians with the spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", action="append", help="default: payments and bike-sharing")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default 3)")
    options = parser.parse_args()
    path = RESULTS / "demo.json"
    # Examples that are not run this time keep what was measured before.
    before = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, object] = {
        **before,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for example in options.example or ["payments", "bike-sharing"]:
        runs = [run(example) for _ in range(options.runs)]
        table: dict[str, list[float]] = {"whole": [r["whole"] for r in runs]}  # type: ignore[misc]
        for group, unit in (("seconds", "s"), ("memory_mib", "MiB")):
            names = runs[0][group]
            assert isinstance(names, dict)
            for name in names:
                table[f"{name} [{unit}]"] = [r[group][name] for r in runs]  # type: ignore[index]
        print(f"\n{example}, {options.runs} runs{'':14} median     min     max")
        for name, values in table.items():
            print(
                f"  {name:34}{statistics.median(values):9.1f}{min(values):8.1f}{max(values):8.1f}"
            )
        results[example] = table
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
