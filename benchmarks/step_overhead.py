"""What KFP's local runner adds to a step: `python -m benchmarks.step_overhead`.

A step that only records itself is run as the pipeline runs it, and as a plain process; the
difference is the runner's. Prints a table and writes `benchmarks/results/step_overhead.json`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.local import leave_out_the_client

leave_out_the_client()
_before = time.perf_counter()
from kfp import dsl, local  # noqa: E402 (its import is measured)

IMPORT_SECONDS = time.perf_counter() - _before

from components.image import component  # noqa: E402

#: Steps of the measured pipeline, and how often all is measured.
STEPS, ROUNDS = 8, 3
#: What the overhead may be, in seconds a step.
GOAL = 0.2
RESULT = Path(__file__).parent / "results" / "step_overhead.json"

WORK = """
from driftmill import runs
from driftmill.store import Store

with runs.step(Store({store!r}), "overhead", "run", "step", {name!r}):
    pass
"""


@component
def empty() -> None:
    """Does nothing."""


@component
def recorded(store: str, name: str) -> None:
    """Records that it ran, as every step does."""
    from driftmill import runs
    from driftmill.store import Store

    with runs.step(Store(store), "overhead", "run", "step", name):
        pass


def in_pipeline(store: str | None) -> float:
    """Seconds for `STEPS` steps in a row; with a store they record themselves."""

    @dsl.pipeline(name="overhead")  # type: ignore[untyped-decorator]
    def pipeline() -> None:
        before: Any = None
        for i in range(STEPS):
            task = empty() if store is None else recorded(store=store, name=f"step-{i}")
            if before is not None:
                task.after(before)
            before = task

    started = time.perf_counter()
    pipeline()
    return time.perf_counter() - started


def in_processes(store: str) -> float:
    """Seconds for the same steps, each in a plain process."""
    started = time.perf_counter()
    for i in range(STEPS):
        script = WORK.format(store=store, name=f"step-{i}")
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, write."""
    found: dict[str, list[float]] = {"empty": [], "recorded": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = None
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=f"{folder}/root")
        with redirect_stdout(nowhere):  # KFP prints every line of every step
            for _ in range(ROUNDS):
                found["empty"].append(in_pipeline(None) / STEPS)
                found["recorded"].append(in_pipeline(f"{folder}/store") / STEPS)
                found["plain"].append(in_processes(f"{folder}/store") / STEPS)
    # The least of the rounds is the one that other processes disturbed least.
    empty_step, in_runner, alone = (min(found[k]) for k in ("empty", "recorded", "plain"))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}",
        "kfp": version("kfp"),
        "steps": STEPS,
        "rounds": ROUNDS,
        "overhead_s": round(in_runner - alone, 3),
        "goal_s": GOAL,
        "recorded_step_s": round(in_runner, 3),
        "plain_process_s": round(alone, 3),
        "empty_step_s": round(empty_step, 3),
        "median_overhead_s": round(
            statistics.median(found["recorded"]) - statistics.median(found["plain"]), 3
        ),
        "kfp_import_s": round(IMPORT_SECONDS, 3),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        ("a step that records itself, in the pipeline", result["recorded_step_s"]),
        ("the same in a plain process", result["plain_process_s"]),
        (f"overhead of the runner (goal: at most {GOAL})", result["overhead_s"]),
        ("a step that does nothing, in the pipeline", result["empty_step_s"]),
        ("import of KFP, once a run", result["kfp_import_s"]),
    ]
    print(f"seconds a step, least of {ROUNDS} rounds of {STEPS} steps; {result['machine']}")
    for name, seconds in rows:
        print(f"  {name:<48} {seconds:6.3f}")


if __name__ == "__main__":
    main()
