"""How soon the monitor notices what happens to images: `python -m benchmarks.vision_drift`.

Trains the `small-cnn` of the Fashion-MNIST example without one label, and lets the monitor's own
`decide` judge windows of 500 of the test images, which are not in the reference: clean ones, which
should be calm, ones with each corruption at three strengths, and ones into which the label comes
that the model has never seen. Prints a table and writes `benchmarks/results/vision_drift.json`.

    DRIFTMILL_DATA=… python -m benchmarks.vision_drift                  # trains first, a minute
    DRIFTMILL_DATA=… python -m benchmarks.vision_drift --bundle FOLDER  # keeps the model there

The data folder holds `fashion-mnist/` with the four files of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from driftmill import assemble, bundle, contract, features
from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.data import prepare, sources
from driftmill.features import EMBEDDING, IMAGE
from driftmill.home import cores
from driftmill.monitor import drift, embedding
from driftmill.monitor.drift import WindowResult
from driftmill.store import Store
from driftmill.vision import corruptions, fit, images

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion-mnist" / "contract.yaml"
RESULT = Path(__file__).parent / "results" / "vision_drift.json"
#: Rows of the window that the new label makes up.
SHARES = (0.1, 0.25, 0.5)
#: Windows without any change, streams of each change, and windows of such a stream at most.
CLEAN, STREAMS, LONGEST = 100, 20, 4
#: Reference and window rows of comparisons of embeddings without any change, and how many of each.
LEVELS, COMPARISONS = ((200, 100), (2000, 100), (500, 500), (2000, 500)), 1000
#: Images that the model learns from and is tested on; the tests are the reference.
TRAIN_IMAGES = 12_000


def changed(label: str) -> Contract:
    """The example, with a model that never sees one label, and windows of 500."""
    values = json.loads(contract.load(EXAMPLE).to_json())
    data = values["data"]
    data["columns"] = []
    data["time"]["until"] = None
    # Without an onset the label never comes.
    data["simulate"] |= {"onset": None, "corruptions": {}, "new_labels": [label]}
    data["simulate"]["rows"] = TRAIN_IMAGES
    data["split"]["test"] = 0.25
    data["test"] = None
    values["train"]["rows"] = None
    values["monitor"] |= {"window": 500, "persistence": 2}
    return contract.parse(json.dumps(values))


def train(of: Contract, folder: Path) -> None:
    """Prepare, fit and assemble as the pipeline does."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prepare.prepare(of, place / "data")
        fit.fit(of, "small-cnn", place / "data", place / "fit", Store(place / "store"))
        assemble.assemble(of, place / "data", [place / "fit"], folder)


def test_images(of: Contract) -> tuple[list[np.ndarray], np.ndarray]:
    """The 10,000 test images, (28, 28) uint8 each, and their labels."""
    values = json.loads(of.to_json())
    values["data"] |= {"simulate": None, "time": None, "id": None, "columns": []}
    values["data"]["source"]["uri"] = "idx:t10k-images-idx3-ubyte.gz"
    plain = contract.parse(json.dumps(values))
    table = sources.load(plain.data.source, plain)
    target = plain.data.target
    return list(table[IMAGE]), table[target.name].astype(str).replace(target.aliases).to_numpy()


def answered(model: Bundle, arrays: list[np.ndarray]) -> pd.DataFrame:
    """Images as rows of the inference log, without the pixels."""
    spec = model.signature.image
    assert spec is not None
    decoded = [images.from_array(array, spec) for array in arrays]
    sizes = np.array([(d.width, d.height) for d in decoded])
    parts = []
    for start in range(0, len(decoded), bundle.BATCH_IMAGES):
        batch = slice(start, start + bundle.BATCH_IMAGES)
        pixels = np.stack([d.pixels for d in decoded[batch]])
        output, embedded = model.session.embed(pixels)
        columns = images.statistics(pixels, sizes[batch]) | bundle.answers(output, model.signature)
        kept = [row.tobytes() for row in embedded.astype("<f2")]
        parts.append(pd.DataFrame(columns).assign(**{EMBEDDING: kept}))
    return pd.concat(parts, ignore_index=True)


class Judge:
    """The monitor's decision on streams of windows."""

    def __init__(self, of: Contract, model: Bundle) -> None:
        self.monitor = of.monitor
        self.version = model.version
        self.reference = drift.compile_reference(model.signature, model.reference)
        self.seconds: list[float] = []

    def stream(self, windows: list[pd.DataFrame], until_alarm: bool) -> list[WindowResult]:
        """Judge windows one after the other."""
        results: list[WindowResult] = []
        for i, rows in enumerate(windows):
            at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=i)
            started = time.perf_counter()
            result = drift.decide(
                self.reference,
                self.monitor,
                rows.assign(_at=at),
                index=i,
                version=self.version,
                previous=results[-1] if results else None,
            )
            self.seconds.append(time.perf_counter() - started)
            results.append(result)
            if until_alarm and result.alarm:
                break
        return results

    def change(self, pool: pd.DataFrame, new: pd.DataFrame, share: float) -> dict[str, Any]:
        """Streams in which part of each window comes from `new`, and the rest from `pool`."""
        size = self.monitor.window
        fresh = round(size * share)
        delays: list[int | None] = []
        named: Counter[str] = Counter()
        effects: dict[str, list[float]] = {}
        for seed in range(STREAMS):
            rng = np.random.default_rng([1, seed])
            windows = [
                pd.concat([draw(new, fresh, rng), draw(pool, size - fresh, rng)])
                .sample(frac=1, random_state=int(rng.integers(2**31)))
                .reset_index(drop=True)
                for _ in range(LONGEST)
            ]
            results = self.stream(windows, until_alarm=True)
            delays.append(len(results) if results[-1].alarm else None)
            for column in results[-1].columns:
                effects.setdefault(column.name, []).append(column.effect)
                named[column.name] += column.drifted
        found = [d for d in delays if d is not None]
        return {
            "within_two_windows": sum(d == self.monitor.persistence for d in found) / STREAMS,
            "detected": len(found) / STREAMS,
            "mean_delay_windows": float(np.mean(found)) if found else None,
            "named": {
                name: {"streams": count, "effect": round(float(np.mean(effects[name])), 3)}
                for name, count in sorted(
                    named.items(), key=lambda item: -np.mean(effects[item[0]])
                )
                if count
            },
        }


def levels(pool: pd.DataFrame) -> list[dict[str, Any]]:
    """How often embeddings that are all of one world are told apart, at some levels."""
    _, values = embedding.read(pool[EMBEDDING])
    found = []
    for m, n in LEVELS:
        rng = np.random.default_rng([2, m, n])
        orders = (rng.permutation(len(values))[: m + n] for _ in range(COMPARISONS))
        p = np.array([embedding.separate(values[o[:m]], values[o[m:]]).p_value for o in orders])
        false = {str(level): float((p <= level).mean()) for level in (0.1, 0.05, 0.01, 0.001)}
        found.append({"reference": m, "window": n, "comparisons": COMPARISONS, "false": false})
    return found


def draw(rows: pd.DataFrame, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Some rows, none of them twice."""
    return rows.iloc[rng.permutation(len(rows))[:count]]


def main() -> None:
    """Train if need be, and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, help="folder of the model; trained if not there")
    parser.add_argument("--label", default="boot", help="which one training leaves out")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    given = parser.parse_args()
    if not os.environ.get("DRIFTMILL_DATA"):
        print("skipped: DRIFTMILL_DATA is not set; it names the folder that holds fashion-mnist/")
        return
    of = changed(given.label)
    console = Console(width=130)
    status = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch, status.status("training…") as shown:
        folder = given.bundle or Path(scratch) / "bundle"
        if not folder.exists():
            train(of, folder)
        model = bundle.load(folder, of.model)
        shown.update("answering…")
        arrays, labels = test_images(of)
        known = [a for a, label in zip(arrays, labels, strict=True) if label != given.label]
        unknown = [a for a, label in zip(arrays, labels, strict=True) if label == given.label]
        pool = answered(model, known)
        truth = labels[labels != given.label]
        accuracy = float((pool[bundle.PREDICTION].to_numpy() == truth).mean())

        judge = Judge(of, model)
        rng = np.random.default_rng(0)
        size = of.monitor.window
        calm = judge.stream([draw(pool, size, rng) for _ in range(CLEAN)], until_alarm=False)
        shown.update("comparing what is alike…")
        level = levels(pool)
        results: list[dict[str, Any]] = []
        for kind in corruptions.KINDS:
            for strength in (1, 2, 3):
                shown.update(f"{kind} {strength}…")
                rng = np.random.default_rng(strength)
                bad = answered(model, [corruptions.corrupt(a, kind, strength, rng) for a in known])
                drop = accuracy - float((bad[bundle.PREDICTION].to_numpy() == truth).mean())
                change = judge.change(pool, bad, 1.0)
                results.append(
                    {"kind": kind, "strength": strength, "accuracy_lost": round(drop, 4)} | change
                )
        new = answered(model, unknown)
        for strength, share in enumerate(SHARES, start=1):
            shown.update(f"new class, {share:.0%}…")
            change = judge.change(pool, new, share)
            results.append(
                {"kind": "new-class", "strength": strength, "share": share,
                 "accuracy_lost": round(accuracy * share, 4)} | change
            )  # fmt: skip

    table = Table(title=f"windows of {size}, alarm after {of.monitor.persistence} in a row")
    for heading in ("change", "strength"):
        table.add_column(heading)
    for heading in ("accuracy lost", "within 2 windows", "detected", "mean delay"):
        table.add_column(heading, justify="right")
    table.add_column("named (part of the streams, effect)")
    for r in results:
        most = list(r["named"].items())[:4]
        table.add_row(
            r["kind"], f"{r['share']:.0%}" if "share" in r else str(r["strength"]),
            f"{r['accuracy_lost']:.3f}", f"{r['within_two_windows']:.0%}", f"{r['detected']:.0%}",
            "" if r["mean_delay_windows"] is None else f"{r['mean_delay_windows']:.1f}",
            ", ".join(f"{n} {v['streams'] / STREAMS:.0%} {v['effect']:.2f}" for n, v in most),
        )  # fmt: skip
    console.print(table)
    wrong = Counter(c.name for w in calm for c in w.columns if c.drifted)
    false = {
        "windows": CLEAN,
        "drifted": sum(w.drifted for w in calm),
        "alarms": sum(w.alarm for w in calm),
        "named": dict(wrong),
    }
    milliseconds = 1e3 * float(np.median(judge.seconds))
    print(f"clean windows: {false}; accuracy {accuracy:.4f}, {milliseconds:.0f} ms a window")
    for found in level:
        print(
            f"embeddings of one world, {found['reference']} and {found['window']} rows: "
            f"part with p below a level: {found['false']}"
        )

    given.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": {
            "cores": cores(),
            "python": platform.python_version(),
            "packages": {p: version(p) for p in ("scikit-learn", "scipy", "onnxruntime", "torch")},
        },
        "model": {
            "family": model.manifest.family,
            "accuracy": round(accuracy, 4),
            "left_out": given.label,
            "reference_rows": len(model.reference),
            "embedding_width": len(model.reference[features.EMBEDDING].iloc[0]) // 2,
        },
        "window": size,
        "persistence": of.monitor.persistence,
        "streams": STREAMS,
        "milliseconds_a_window": round(milliseconds, 1),
        "clean": false,
        "embedding_level": level,
        "results": results,
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
