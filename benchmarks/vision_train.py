"""Seconds and test accuracy of `small-cnn`: `python -m benchmarks.vision_train`.

For each seed: read the files, train, answer the test images once. Wall time is of all three;
train-only is the training with its validation, without the compiler's time. Prints a table and
writes `benchmarks/results/vision_train.json`. Needs `DRIFTMILL_DATA`, but for digits.

    python -m benchmarks.vision_train --data mnist fashion-mnist --seeds 5
    python -m benchmarks.vision_train --data mnist --device cuda
    python -m benchmarks.vision_train --data mnist --ddp   # beside it: two processes
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from driftmill.contract import Image, Vision
from driftmill.home import cores
from driftmill.vision import distributed, nets, trainer
from driftmill.vision.trainer import Rows

RESULT = Path(__file__).parent / "results" / "vision_train.json"
FAMILY = "small-cnn"
#: What `--ddp` trains with.
PROCESSES = 2

#: Settings by data set, on a CPU and, where they differ, on a GPU.
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "epochs": 2,
        "batch": 256,
        "schedule": "triangular",
        "validation": 0.02,
        "augment": {"shift": 0.08},
    },
    "fashion-mnist": {
        "epochs": 15,
        "batch": 256,
        "schedule": "triangular",
        "validation": 0.02,
        "label_smoothing": 0.1,
        "ema": 0.99,
        "augment": {"flip": True, "shift": 0.04},
    },
    "digits": {"epochs": 30, "batch": 64, "validation": 0.1, "augment": {"shift": 0.1}},
}
ON_GPU: dict[str, dict[str, Any]] = {
    "mnist": {"epochs": 8, "batch": 512, "ema": 0.98},
    "fashion-mnist": {"epochs": 30, "batch": 512},
}


def read(name: str) -> tuple[Rows, Rows]:
    """Training and test images of a data set."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        y = digits.target.astype(np.int64)
        test_rows, rows = trainer.split(y, 0.39, 0)  # about 700 to learn from
        return Rows(images, y, rows), Rows(images, y, test_rows)
    root = os.environ.get("DRIFTMILL_DATA")
    if not root:
        raise SystemExit(f"DRIFTMILL_DATA must name the folder that holds {name}")
    folder = Path(root) / name

    def idx(file: str, header: int) -> np.ndarray:
        content = gzip.decompress((folder / file).read_bytes())
        return np.frombuffer(content, np.uint8, offset=header)

    train, test = (
        Rows(
            idx(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28),
            idx(f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64),
        )
        for part in ("train", "t10k")
    )
    return train, test


def measure(name: str, settings: Vision, seed: int, processes: int) -> dict[str, Any]:
    """One training, from the files to the accuracy on the test images."""
    started = time.perf_counter()
    given, test = read(name)
    read_at = time.perf_counter()
    labels = given.y if given.rows is None else given.y[given.rows]
    learn, validate = trainer.split(labels, settings.validation, seed)
    rows = np.arange(len(given.y)) if given.rows is None else given.rows
    image = Image(size=given.images.shape[2:], channels=1)
    net = nets.build(FAMILY, image, int(labels.max()) + 1, seed)
    parts = (Rows(given.images, given.y, rows[learn]), Rows(given.images, given.y, rows[validate]))
    if processes > 1:
        result = distributed.train(net, *parts, settings, seed, processes)
    else:
        result = trainer.train(net, *parts, settings, seed, settings.device)
    trained_at = time.perf_counter()
    probabilities, _ = trainer.predict(net, test, settings.device)
    ended = time.perf_counter()
    truth = test.y if test.rows is None else test.y[test.rows]
    return {
        "seed": seed,
        "accuracy": float((probabilities.argmax(axis=1) == truth).mean()),
        "validation_accuracy": result.validation["accuracy"],
        "wall_seconds": round(ended - started, 2),
        "read_seconds": round(read_at - started, 2),
        "train_seconds": round(result.seconds - result.compile_seconds, 2),
        "compile_seconds": result.compile_seconds,
        "test_seconds": round(ended - trained_at, 2),
        "epochs": result.epochs,
        "device": result.device,
        "precision": result.precision,
    }


def summary(name: str, processes: int, settings: Vision, runs: list[dict[str, Any]]) -> Any:
    """Means over the seeds, and the standard deviation of the accuracy."""
    accuracy = [run["accuracy"] for run in runs]
    return {
        "data": name,
        "family": FAMILY,
        "processes": processes,
        "settings": settings.model_dump(mode="json"),
        "seeds": len(runs),
        "accuracy": statistics.fmean(accuracy),
        "accuracy_std": statistics.stdev(accuracy) if len(runs) > 1 else 0.0,
        **{
            key: round(statistics.fmean(run[key] for run in runs), 2)
            for key in ("wall_seconds", "train_seconds", "compile_seconds")
        },
        "runs": runs,
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", choices=sorted(SETTINGS), default=["mnist"])
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--ddp", action="store_true", help="beside it: two processes")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    given = parser.parse_args()
    device = trainer.choose_device(given.device)

    results: list[dict[str, Any]] = []
    with Console(stderr=True).status("training…") as status:
        for name in given.data:
            values = SETTINGS[name] | (ON_GPU.get(name, {}) if device.type == "cuda" else {})
            settings = Vision.model_validate(
                values | {"device": given.device, "compile": given.compile}
            )
            for processes in (1, PROCESSES) if given.ddp else (1,):
                runs = []
                for seed in range(given.seeds):
                    status.update(f"{name}, seed {seed}, {processes} process(es)…")
                    runs.append(measure(name, settings, seed, processes))
                results.append(summary(name, processes, settings, runs))

    table = Table(title=f"{FAMILY} on {device}: mean over the seeds")
    table.add_column("data")
    for heading in ("processes", "epochs", "seeds", "wall s", "train s", "compile s", "test", "±"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            r["data"], str(r["processes"]), str(r["runs"][0]["epochs"]), str(r["seeds"]),
            f"{r['wall_seconds']:.1f}", f"{r['train_seconds']:.1f}", f"{r['compile_seconds']:.1f}",
            f"{r['accuracy']:.2%}", f"{r['accuracy_std']:.2%}",
        )  # fmt: skip
    Console(width=110).print(table)

    given.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": {
            "cores": cores(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "load_after": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "packages": {p: version(p) for p in ("torch", "torchvision", "numpy")},
        },
        "results": results,
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
