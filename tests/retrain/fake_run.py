"""A training run that trains nothing: takes a run's arguments, notes that it began, waits for a
file where it is told to, and writes the outcome that it is told to.

`python fake_run.py [--state STATE | --silent] [--wait FILE] --contract F --run-id ID --trigger T`
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from driftmill import contract, home, runs


def main() -> int:
    """Exit 0, or 1 for `--silent`: a run that dies without an outcome."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", default="promoted")
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--wait", type=Path)
    parser.add_argument("--contract", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--trigger", required=True)
    arguments = parser.parse_args()
    store = home.find().store
    model = contract.load(arguments.contract).model
    start = runs.begin(store, model, arguments.run_id, arguments.trigger)
    print("nice", os.nice(0), flush=True)
    while arguments.wait is not None and not arguments.wait.exists():
        time.sleep(0.05)
    if arguments.silent:
        return 1
    runs.write(
        store,
        runs.Outcome(
            run_id=arguments.run_id,
            model=model,
            state=arguments.state,
            reason="the fake run says so",
            trigger=arguments.trigger,
            version="abcdefabcdef",
            started=start.started,
            ended=datetime.now(UTC),
        ),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
