"""Run the benchmarks: `python -m benchmarks [NAME …]`; without a name, all of them.

Each prints a table and writes `benchmarks/results/<name>.json` with the machine's cores and the
versions that were measured. Times are of this machine; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

BENCHMARKS = {
    "step_overhead": "what KFP's local runner adds to a step",
    "train_time": "seconds to search and fit each family",
    "batch": "rows a second of `driftmill batch`, beside pandas with scikit-learn",
    "serving": "requests a second of a table's service, beside seven other projects",
    "hot_path": "where the time of a prediction goes, in the process",
    "inference_log": "what the inference log costs, by `serve.log.fsync`",
    "swaps": "200 promotions while a million requests are answered",
    "vision_drift": "how soon the monitor notices what happens to images",
    "vision_serving": "images a second, beside BentoML with torch and FastAPI with ONNX Runtime",
    "vision_train": "seconds and accuracy of a network, over seeds",
    "compile_time": "seconds to compile a package, and its size",
    "chart": "the chart on a cluster: install, drift to new model, requests through changes",
    "cluster": "seconds to make a kind cluster and to run a contract on it",
    "images": "seconds to build the images, and their sizes",
    "rollouts": "requests that fail while services are replaced and versions promoted",
    "demo": "the demo's timeline and the memory of its processes",
}


def main() -> int:
    """Run the named benchmarks one after the other; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        print(f"\n{name}: {BENCHMARKS[name]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
