"""Seconds to compile each example's package, and its size: `python -m benchmarks.compile_time`.

Importing KFP takes longer than compiling and is measured apart. Prints a table and writes
`benchmarks/results/compile_time.json`.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from driftmill.contract import load
from driftmill.home import cores

EXAMPLES = sorted(Path("examples").glob("*/contract.yaml"))
RESULT = Path(__file__).parent / "results" / "compile_time.json"
ROUNDS = 5


def main() -> None:
    """Measure, print and write."""
    began = time.perf_counter()
    from kfp import compiler  # noqa: F401 (what is measured)

    from pipelines import compile as packages
    from pipelines import pods, training, trainjob  # noqa: F401

    imports = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in EXAMPLES:
            contract, seconds = load(path), []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                package = packages.compile_package(contract, Path(folder), store="s3://models/x")
                seconds.append(time.perf_counter() - began)
            rows.append(
                {
                    "contract": path.parent.name,
                    "seconds": round(statistics.median(seconds), 3),
                    "bytes": package.stat().st_size,
                }
            )
    result = {
        "machine": f"{platform.machine()}, {cores()} cores",
        "kfp": version("kfp"),
        "rounds": ROUNDS,
        "import_s": round(imports, 2),
        "packages": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"import {imports:.2f} s")
    for row in rows:
        print(f"{row['contract']:<16} {row['seconds']:6.3f} s  {row['bytes'] / 1000:5.0f} kB")


if __name__ == "__main__":
    main()
