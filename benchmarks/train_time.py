"""Seconds to search and fit each candidate family: `python -m benchmarks.train_time`.

Prepares the data of each contract once, then searches, refits, exports and checks every family
after the other, and assembles the bundle. Prints a table and writes
`benchmarks/results/train_time.json`.

    python -m benchmarks.train_time                                   # the payments example
    python -m benchmarks.train_time examples/adult/contract.yaml      # one of your contracts
    python -m benchmarks.train_time --sim-rows 4000 20000 100000      # how time grows with rows
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from driftmill import assemble, bundle, contract
from driftmill.assemble import MODEL
from driftmill.contract import Contract
from driftmill.data import prepare
from driftmill.evaluate import metrics
from driftmill.home import cores
from driftmill.tabular import candidates, fit

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULT = Path(__file__).parent / "results" / "train_time.json"
#: The simulated stream of `--sim-rows`, all of it from before its onset.
STREAM = "sim:payments?rows={rows}&seed=7&onset={rows}&start=2026-01-01T00:00:00Z&step=60"


def measure(name: str, of: Contract, folder: Path) -> list[dict[str, Any]]:
    """One result for each family of a contract, `dummy` included."""
    started = time.perf_counter()
    prepare.prepare(of, folder / "data")
    preparing = time.perf_counter() - started
    prepared = prepare.read(folder / "data")
    results = []
    for family in ("dummy", *of.train.candidates):
        record = fit.fit(of, family, folder / "data", folder / family)
        assemble.assemble(of, folder / "data", [folder / family], folder / f"{family}-bundle")
        loaded = bundle.load(folder / f"{family}-bundle")
        y = candidates.truth(prepared.test, loaded.signature)
        results.append(
            {
                "contract": name,
                "family": family,
                "rows": record["rows"],
                "columns": len(of.data.columns),
                "tried": record["tried"],
                "folds": of.train.search.folds,
                "seconds": record["seconds"],
                "prepare_seconds": round(preparing, 3),
                "metric": of.metric.name,
                "cv_score": record["score"],
                "cv_std": record["score_std"],
                "test_score": metrics.score(of.metric.name, y, loaded.predict(prepared.test)),
                "parity": record["parity"],
                "model_mb": round((folder / family / MODEL).stat().st_size / 1e6, 3),
            }
        )
    return results


def simulated(rows: int) -> Contract:
    """The payments example, learning from so many rows."""
    values = json.loads(contract.load(EXAMPLES / "payments" / "contract.yaml").to_json())
    values["data"]["source"]["uri"] = STREAM.format(rows=rows)
    values["data"]["time"]["until"] = None
    values["train"]["rows"] = None
    return contract.parse(json.dumps(values))


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contracts", nargs="*", type=Path, help="contract files")
    parser.add_argument(
        "--sim-rows", nargs="+", type=int, default=[], metavar="N", help="simulated payments"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    given = parser.parse_args()
    if not given.contracts and not given.sim_rows:
        given.contracts = [EXAMPLES / "payments" / "contract.yaml"]
    chosen = [(path.resolve().parent.name, contract.load(path)) for path in given.contracts]
    chosen += [(f"payments, {rows} rows", simulated(rows)) for rows in given.sim_rows]

    results: list[dict[str, Any]] = []
    with Console(stderr=True).status("training…") as status:
        for name, of in chosen:
            status.update(f"training {name}…")
            with tempfile.TemporaryDirectory() as folder:
                results += measure(name, of, Path(folder))

    table = Table(title="search, refit, export and parity check")
    for heading in ("contract", "family"):
        table.add_column(heading)
    for heading in ("rows", "tried", "seconds", "metric", "CV", "test", "MB"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            r["contract"], r["family"], str(r["rows"]), f"{r['tried']} x {r['folds']}",
            f"{r['seconds']:.1f}", r["metric"], f"{r['cv_score']:.4f}", f"{r['test_score']:.4f}",
            f"{r['model_mb']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)

    given.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": {
            "cores": cores(),
            "load_after": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "packages": {p: version(p) for p in ("scikit-learn", "skl2onnx", "onnxruntime")},
        },
        "results": results,
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
