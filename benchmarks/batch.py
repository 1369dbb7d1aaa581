"""Rows a second of `driftmill batch`, beside pandas: `python -m benchmarks.batch`.

A million rows of payments as Parquet. Both read the file, predict and write labels and scores as
Parquet; the peer is what one would write by hand: pandas, and the scikit-learn pipeline of which
the bundle's model was exported, without any check of the rows. Rounds are interleaved, the median
counts. Prints a table and writes `benchmarks/results/batch.json`.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import models

ROWS, ROUNDS = 1_000_000, 3
RESULT = Path(__file__).parent / "results" / "batch.json"


def main() -> None:
    """Measure, print and write."""
    if len(sys.argv) > 1:  # one measured process
        print(json.dumps(_measure(*sys.argv[1:])))
        return
    from driftmill.home import cores

    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        for _ in range(ROUNDS):
            for family in models.FAMILIES:
                for who in ("driftmill", "pandas"):
                    found = _process(who, family, folder)
                    measured.setdefault(family, {}).setdefault(who, []).append(found)
    table = [_row(family, by) for family, by in measured.items()]
    result = {
        "machine": f"{platform.machine()}, {cores()} cores",
        "rows": ROWS,
        "rounds": ROUNDS,
        **{name: version(name) for name in ("onnxruntime", "pyarrow", "pandas", "scikit-learn")},
        "families": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in table:
        ours = f"{row['rows_per_s']:>10,} rows/s, {row['peak_mb']} MB"
        peer = f"{row['peer_rows_per_s']:>10,} rows/s, {row['peer_peak_mb']} MB"
        print(f"{row['family']:<24} {ours}  pandas {peer}  ratio {row['ratio']:.2f}")


def _row(family: str, by: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    ours, peer = (
        ROWS / statistics.median(m["seconds"] for m in by[who]) for who in ("driftmill", "pandas")
    )
    return {
        "family": family,
        "rows_per_s": round(ours),
        "peer_rows_per_s": round(peer),
        "ratio": round(ours / peer, 2),
        "peak_mb": round(max(m["peak_mb"] for m in by["driftmill"])),
        "peer_peak_mb": round(max(m["peak_mb"] for m in by["pandas"])),
        "seconds": {who: [round(m["seconds"], 2) for m in found] for who, found in by.items()},
    }


def _process(who: str, family: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.batch", who, family, folder]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return found


def _prepare(folder: Path) -> None:
    """The rows, and for each family a bundle and the pipeline that it was exported from."""
    import joblib
    import pandas as pd

    from driftmill.tabular import candidates

    _, frame, sign = models.payments()
    inputs = candidates.table(frame, sign)
    rows = pd.concat([inputs] * -(-ROWS // len(inputs)), ignore_index=True).head(ROWS)
    rows.to_parquet(folder / "rows.parquet", index=False, row_group_size=100_000)
    for family in models.FAMILIES:
        _, pipeline = models.write(family, folder / family)
        joblib.dump(pipeline, folder / f"{family}.joblib")


def _measure(who: str, family: str, folder: str) -> dict[str, float]:
    """Seconds and peak memory of one scoring; imports do not count."""
    source = f"{folder}/rows.parquet"
    if who == "driftmill":
        from driftmill import batch, bundle
        from driftmill.store import Store

        loaded = bundle.load(Path(folder, family))
        with tempfile.TemporaryDirectory() as into:
            began = time.perf_counter()
            batch.score(loaded, source, Store(into))
            seconds = time.perf_counter() - began
    else:
        import joblib
        import pandas as pd

        pipeline = joblib.load(f"{folder}/{family}.joblib")
        with tempfile.TemporaryDirectory() as into:
            began = time.perf_counter()
            rows = pd.read_parquet(source)
            scores = pipeline.predict_proba(rows)[:, 1]
            answers = pd.DataFrame({"prediction": scores > 0.5, "score": scores})
            answers.to_parquet(f"{into}/scores.parquet", index=False)
            seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak}


if __name__ == "__main__":
    main()
