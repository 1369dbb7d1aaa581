"""Seconds to make a cluster and to run a contract on it: `python -m benchmarks.cluster`.

Makes a kind cluster of its own by `driftmill cluster up`, whose phases it reads, runs the pipeline
of an example by `driftmill submit` with the object store of Kubeflow Pipelines, and removes the
cluster. Options after `--` go to `driftmill cluster up`. The environment is that of these commands.
Writes `benchmarks/results/cluster.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from driftmill.home import cores

NAME = "driftmill-benchmark"
CONTRACT = Path("examples/payments/contract.yaml")
RESULT = Path(__file__).parent / "results" / "cluster.json"
#: Kubeflow Pipelines' own object store, as its pods see it.
STORE = "s3://mlpipeline/driftmill"
_PHASE = re.compile(r"^(\w+) +(\d+\.\d) s  ")
_STEP = re.compile(r"^  (\w+(?: [\w-]+)?) +(\d+\.\d) s")


def run(*command: str) -> tuple[float, str]:
    """Run a command of Driftmill; seconds and what it printed."""
    began = time.perf_counter()
    arguments = [sys.executable, "-m", "driftmill", *command]
    done = subprocess.run(arguments, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode not in (0, 3):  # 3: judged and not promoted
        sys.exit(f"driftmill {' '.join(command)} ended with exit code {done.returncode}")
    return time.perf_counter() - began, done.stdout


@contextmanager
def forwarded() -> Iterator[str]:
    """The endpoint of the cluster's Kubeflow Pipelines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["kubectl", "--context", f"kind-{NAME}", "-n", "kubeflow", "port-forward"]
    forward = subprocess.Popen(
        [*command, "svc/ml-pipeline", f"{port}:8888"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert forward.stdout is not None
        forward.stdout.readline()  # it says that it listens
        yield f"http://127.0.0.1:{port}"
    finally:
        forward.terminate()
        forward.wait()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of the pipeline (2)")
    parser.add_argument("options", nargs="*", help="of driftmill cluster up")
    given = parser.parse_args()
    result: dict[str, object] = {"machine": f"{platform.machine()}, {cores()} cores"}
    try:
        seconds, said = run("cluster", "up", "--name", NAME, *given.options)
        result["up_s"] = round(seconds, 1)
        result["phases_s"] = {m[1]: float(m[2]) for m in map(_PHASE.match, said.splitlines()) if m}
        again, _ = run("cluster", "up", "--name", NAME, *given.options)
        result["up_again_s"] = round(again, 1)
        runs = []
        with forwarded() as endpoint:
            for _ in range(given.rounds):
                seconds, said = run(
                    "submit", str(CONTRACT), "--endpoint", endpoint, "--store", STORE
                )
                steps = {m[1]: float(m[2]) for m in map(_STEP.match, said.splitlines()) if m}
                runs.append({"seconds": round(seconds, 1), "steps_s": steps})
        result["runs"] = runs
    finally:
        run("cluster", "down", "--name", NAME)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
