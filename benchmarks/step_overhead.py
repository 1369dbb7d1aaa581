"""What KFP's local runner adds to a step: `python -m benchmarks.step_overhead`.

A step that only records itself is run as the pipeline runs it, and as a plain process; the
difference is the runner's. Where Docker and the image of steps for tables are there, it is also run
in a container, as `--runner docker` does. Prints a table and writes
`benchmarks/results/step_overhead.json`.
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

from driftmill.contract import parse
from pipelines import containers
from pipelines.local import leave_out_the_client

leave_out_the_client()
_before = time.perf_counter()
from kfp import dsl, local  # noqa: E402 (its import is measured)

IMPORT_SECONDS = time.perf_counter() - _before

from components.image import component  # noqa: E402
from driftmill.store import Store  # noqa: E402

#: Steps of the measured pipeline, and how often all is measured.
STEPS, ROUNDS = 8, 3
#: What the overhead may be, in seconds a step.
GOAL = 0.2
RESULT = Path(__file__).parent / "results" / "step_overhead.json"

#: What a container sees goes by a contract: the store and no file.
CONTRACT = """
apiVersion: driftmill/v1
model: overhead
task: classification
data:
  source: sim:payments
  target: {name: fraud, labels: ["no", "yes"]}
  columns: [{name: amount, type: float}]
"""

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


def in_pipeline(runner: Any, root: Path, store: str | None) -> float:
    """Seconds for `STEPS` steps in a row; with a store they record themselves."""

    @dsl.pipeline(name="overhead")  # type: ignore[untyped-decorator]
    def pipeline() -> None:
        before: Any = None
        for i in range(STEPS):
            task = empty() if store is None else recorded(store=store, name=f"step-{i}")
            if before is not None:
                task.after(before)
            before = task

    local.init(runner, pipeline_root=str(root))  # anew: KFP removes its workspace after each run
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


def docker_runner(store: str, root: Path) -> Any:
    """KFP's DockerRunner as a run has it; None, with a word about why, where there is no image."""
    try:
        containers.check(containers.image(parse(CONTRACT)))
        return containers.runner(parse(CONTRACT), store, "", root)
    except containers.DockerError as error:
        print(f"not in containers: {error}", file=sys.stderr)
        return None


def main() -> None:
    """Measure, print, write."""
    found: dict[str, list[float]] = {"empty": [], "recorded": [], "plain": [], "docker": []}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = None
        root, store = Path(folder) / "root", Store(Path(folder) / "store").uri
        root.mkdir()
        process, container = local.SubprocessRunner(use_venv=False), docker_runner(store, root)
        with redirect_stdout(nowhere):  # KFP prints every line of every step
            for _ in range(ROUNDS):
                found["empty"].append(in_pipeline(process, root, None) / STEPS)
                found["recorded"].append(in_pipeline(process, root, store) / STEPS)
                found["plain"].append(in_processes(store) / STEPS)
                if container is not None:
                    found["docker"].append(in_pipeline(container, root, store) / STEPS)
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
    rows = [
        ("a step that records itself, in the pipeline", result["recorded_step_s"]),
        ("the same in a plain process", result["plain_process_s"]),
        (f"overhead of the runner (goal: at most {GOAL})", result["overhead_s"]),
        ("a step that does nothing, in the pipeline", result["empty_step_s"]),
        ("import of KFP, once a run", result["kfp_import_s"]),
    ]
    if found["docker"]:
        in_container = min(found["docker"])
        result |= {
            "docker_step_s": round(in_container, 3),
            "docker_overhead_s": round(in_container - alone, 3),
            "docker_to_subprocess": round(in_container / in_runner, 1),
            "docker_to_subprocess_rounds": [
                round(a / b, 1) for a, b in zip(found["docker"], found["recorded"], strict=True)
            ],
        }
        rows += [
            ("a step that records itself, in a container", result["docker_step_s"]),
            ("overhead of runner and container", result["docker_overhead_s"]),
        ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"seconds a step, least of {ROUNDS} rounds of {STEPS} steps; {result['machine']}")
    for name, seconds in rows:
        print(f"  {name:<48} {seconds:6.3f}")
    if found["docker"]:
        print(f"  a container takes {result['docker_to_subprocess']} times as long as a process")


if __name__ == "__main__":
    main()
