"""Training with many processes of this machine: one for each GPU, started by torchrun.

`train` is `trainer.train` in so many processes. What they need lies in a folder; each runs

    torchrun … -m driftmill.vision.distributed FOLDER

and the first leaves `weights.safetensors` and `result.json` there. Many machines: see `job`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file

from driftmill.contract import Image, Vision
from driftmill.home import cores
from driftmill.store import Store, write_atomic
from driftmill.vision import nets, trainer
from driftmill.vision.checkpoints import Checkpoints
from driftmill.vision.nets import Net
from driftmill.vision.trainer import Result, Rows, TrainingError

log = logging.getLogger("driftmill")

JOB, START, FINAL, RESULT, ERROR = (
    "job.json",
    "start.safetensors",
    "weights.safetensors",
    "result.json",
    "error.txt",
)


def processes(gpus: int, device: str) -> int:
    """How many processes train on this machine where the contract asks for `gpus`: one for each
    that is there; one where there is none, or `device` is cpu."""
    if device == "cpu" or not torch.cuda.is_available():
        return 1
    return max(1, min(gpus, int(torch.cuda.device_count())))


def train(
    net: Net,
    learn: Rows,
    validate: Rows,
    settings: Vision,
    seed: int,
    count: int,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Train a network in place with `count` processes; for the rest see `trainer.train`.

    Raises:
        TrainingError: a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="driftmill-train-") as name:
        folder = Path(name)
        write_job(folder, net, learn, validate, settings, seed, checkpoints)
        run = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(count), "-m", "driftmill.vision.distributed", str(folder),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // count))},
            stdout=sys.stderr,  # theirs is not an answer of this process
            check=False,
        )  # fmt: skip
        if (folder / ERROR).exists():
            raise TrainingError((folder / ERROR).read_text())
        if run.returncode or not (folder / RESULT).exists():
            raise TrainingError(
                f"training with {count} processes ended with code {run.returncode}; "
                "what they wrote above says why"
            )
        net.load_state_dict(load_file(folder / FINAL))
        net.eval()
        return Result(**json.loads((folder / RESULT).read_text()))


def write_job(
    folder: Path,
    net: Net,
    learn: Rows,
    validate: Rows,
    settings: Vision,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Write what each process needs into a folder. Images of a file that `np.load` has mapped into
    memory are not copied."""
    save_file(net.state_dict(), folder / START)
    images: dict[int, str] = {}

    def rows(name: str, of: Rows) -> dict[str, str | None]:
        if id(of.images) not in images:
            mapped = isinstance(of.images, np.memmap) and not isinstance(of.images.base, np.ndarray)
            path = of.images.filename if mapped else folder / f"{name}-images.npy"  # type: ignore[attr-defined]
            if not mapped:
                np.save(folder / f"{name}-images.npy", of.images)
            images[id(of.images)] = str(path)
        np.save(folder / f"{name}-y.npy", of.y)
        if of.rows is not None:
            np.save(folder / f"{name}-rows.npy", of.rows)
        return {
            "images": images[id(of.images)],
            "y": f"{name}-y.npy",
            "rows": None if of.rows is None else f"{name}-rows.npy",
        }

    job = {
        "family": net.family,
        "image": net.image.model_dump(mode="json"),
        "labels": net.labels,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "learn": rows("learn", learn),
        "validate": rows("validate", validate),
        "checkpoints": None
        if checkpoints is None
        else {"store": checkpoints.store.uri, "folder": checkpoints.folder},
    }
    write_atomic(folder / JOB, json.dumps(job).encode())


def _read_rows(folder: Path, of: dict[str, str | None]) -> Rows:
    assert of["images"] is not None
    assert of["y"] is not None
    return Rows(
        images=np.load(folder / of["images"], mmap_mode="r"),
        y=np.load(folder / of["y"]),
        rows=None if of["rows"] is None else np.load(folder / of["rows"]),
    )


def work(folder: Path) -> None:
    """What one process does, between joining the others and leaving them."""
    job: dict[str, Any] = json.loads((folder / JOB).read_text())
    settings = Vision.model_validate(job["settings"])
    device = trainer.choose_device(settings.device)
    log.info("process %s of %s on %s", os.environ["RANK"], os.environ["WORLD_SIZE"], device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = dist.get_rank() == 0
    try:
        net = nets.build(job["family"], Image.model_validate(job["image"]), job["labels"])
        net.load_state_dict(load_file(folder / START))
        place = job["checkpoints"]
        result = trainer.train(
            net,
            _read_rows(folder, job["learn"]),
            _read_rows(folder, job["validate"]),
            settings,
            job["seed"],
            device,
            Checkpoints.at(Store(place["store"]), place["folder"]) if place else None,
            _show,
        )
        if first:
            values = {k: v for k, v in result.to_dict().items() if k not in ("epochs", "gap")}
            write_atomic(folder / FINAL, save(net.state_dict()))
            write_atomic(folder / RESULT, json.dumps(values).encode())
    except TrainingError as error:
        if first:
            write_atomic(folder / ERROR, str(error).encode())
        raise
    finally:
        dist.destroy_process_group()


def _show(epoch: dict[str, float]) -> None:
    log.info(
        "epoch %d: loss %.4f, validation %.4f, accuracy %.4f, %.1f s",
        epoch["epoch"],
        epoch["train_loss"],
        epoch["validation_loss"],
        epoch["validation_accuracy"],
        epoch["seconds"],
    )


def main() -> None:
    """The entry point of each process."""
    parser = argparse.ArgumentParser(prog="torchrun -m driftmill.vision.distributed")
    parser.add_argument("folder", type=Path, help="what `write_job` wrote")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work(parser.parse_args().folder)


if __name__ == "__main__":
    main()
