"""The `fit` step of an image task: train one family, keep the best of its runs, export it.

A part of the training rows is kept out to rank families and runs, and to stop early: the newest
where rows have a time. The test rows play no part.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import save

from driftmill import features, runs
from driftmill.assemble import MODEL, RECORD, WEIGHTS
from driftmill.contract import Contract
from driftmill.data import prepare, split
from driftmill.evaluate import metrics
from driftmill.serving.session import Session
from driftmill.store import Store, write_atomic
from driftmill.version import code_digest
from driftmill.vision import diagnose, distributed, export, nets, trainer
from driftmill.vision.checkpoints import Checkpoints
from driftmill.vision.nets import Net
from driftmill.vision.trainer import Result, Rows, TrainingError

log = logging.getLogger("driftmill")

#: Validation images on which the export is compared with the network.
PARITY_ROWS = 256


def fit(contract: Contract, family: str, data: Path, out: Path, store: Store) -> dict[str, Any]:
    """Train a family.

    Args:
        contract: what to learn; `train.vision` says how.
        family: one of `nets.FAMILIES`.
        data: the folder that `prepare` wrote.
        out: gets `model.onnx`, `weights.safetensors` and `fit.json`; created.
        store: keeps checkpoints, so that a run that was killed goes on.

    Returns:
        The content of `fit.json`. `score` is the contract's metric on the validation rows, the mean
        over all seeds, and `score_std` their standard deviation.

    Raises:
        NetError: the family cannot be built, or `train.vision.weights` do not fit it.
        TrainingError: it cannot be trained, or the validation rows do not allow a score.
        ExportError: the exported model does not answer as the trained one.
    """
    started = time.perf_counter()
    settings, metric = contract.train.vision, contract.metric
    prepared = prepare.read(data)
    labels = features.signature(contract, prepared.train).labels
    y = metrics.encode(labels, prepared.train[contract.data.target.name])
    images = np.load(data / "train-images.npy", mmap_mode="r")
    held_out = split.held_out(prepared.train, contract, settings.validation)
    learn = Rows(images, y, np.flatnonzero(~held_out))
    validate = Rows(images, y, np.flatnonzero(held_out))

    every: list[dict[str, Any]] = []
    best: tuple[Net, Result, int] | None = None
    for seed in range(contract.train.seed, contract.train.seed + settings.seeds):
        net, result = _train(
            contract, family, labels, learn, validate, seed, prepared.info.fingerprint, store
        )
        output, _ = trainer.predict(net, validate, settings.device)
        score = metrics.score(metric.name, y[held_out], output)
        if not math.isfinite(score):
            raise TrainingError(
                f"{metric.name} cannot be measured on {len(validate)} validation rows with labels "
                f"of {len(np.unique(y[held_out]))} kinds; raise train.vision.validation"
            )
        if best is None or metric.sign * score > max(metric.sign * e["score"] for e in every):
            best = net, result, seed
        every.append(
            {
                "seed": seed,
                "score": score,
                "loss": result.validation["loss"],
                "epochs": result.epochs,
                "seconds": result.seconds,
            }
        )
    assert best is not None
    net, result, seed = best

    out.mkdir(parents=True, exist_ok=True)
    export.to_onnx(net, out / MODEL)
    write_atomic(out / WEIGHTS, save(net.state_dict()))
    tried = [validate.read(slice(0, PARITY_ROWS)), export.extremes(net.image)]
    difference = export.parity(Session(out / MODEL), net, np.concatenate(tried))
    diagnostics = (
        diagnose.run(net, learn, settings, seed, settings.device, result)
        if settings.diagnostics
        else None
    )

    scores = [e["score"] for e in every]
    shown = ("epochs", "batch", "optimizer", "schedule", "weight_decay", "label_smoothing", "ema")
    record = {
        "family": family,
        "params": {
            **settings.model_dump(mode="json", include=set(shown)),
            "learning_rate": trainer.learning_rate(settings, family),
            "seed": seed,
        },
        "score": float(np.mean(scores)),
        "score_std": float(np.std(scores)),
        "tried": len(every),
        "rows": len(y),
        "seconds": round(time.perf_counter() - started, 3),
        "parity": difference,
        "training": {
            **result.to_dict(),
            "parameters": sum(p.numel() for p in net.parameters()),
            "learn_rows": len(learn),
            "validation_rows": len(validate),
            "metric": metric.name,
            "score": float(np.mean(scores)),
            "score_std": float(np.std(scores)),
            "seeds": every,
            "diagnostics": diagnostics,
        },
    }
    (out / RECORD).write_text(json.dumps(record, indent=1))
    spread = f" ± {record['score_std']:.4f}" if len(every) > 1 else ""
    log.info(
        "%s: %s %.4f%s in %.1f s", family, metric.name, record["score"], spread, record["seconds"]
    )
    return record


def _train(
    contract: Contract,
    family: str,
    labels: tuple[str, ...],
    learn: Rows,
    validate: Rows,
    seed: int,
    fingerprint: str,
    store: Store,
) -> tuple[Net, Result]:
    """One run: a network trained from this seed."""
    assert contract.data.image is not None
    settings = contract.train.vision
    net = nets.build(family, contract.data.image, len(labels), seed)
    if settings.weights is not None:
        left_out = nets.load_weights(net, settings.weights)
        left = f", without {', '.join(left_out)}" if left_out else ""
        log.info("%s starts from %s%s", family, settings.weights.file, left)
    checkpoints = Checkpoints(
        store,
        contract.model,
        {
            "data": fingerprint,
            "family": family,
            "image": contract.data.image.model_dump(mode="json"),
            "labels": labels,
            "settings": settings.model_dump(mode="json", exclude={"seeds", "diagnostics"}),
            "seed": seed,
            "code": code_digest(),
        },
    )

    def on_epoch(epoch: dict[str, float]) -> None:
        detail = (
            f"loss {epoch['train_loss']:.4f}, validation {epoch['validation_loss']:.4f}, "
            f"accuracy {epoch['validation_accuracy']:.4f}, {epoch['seconds']:.1f} s"
        )
        log.info("%s: seed %d, epoch %d: %s", family, seed, epoch["epoch"], detail)
        done = (seed - contract.train.seed) * settings.epochs + int(epoch["epoch"])
        runs.progress("fit", family, done, settings.epochs * settings.seeds, detail)

    # Within a job of many nodes all processes are here already.
    alone = not (dist.is_available() and dist.is_initialized())
    count = distributed.processes(contract.train.resources.gpu, settings.device) if alone else 1
    if count > 1:
        result = distributed.train(net, learn, validate, settings, seed, count, checkpoints)
    else:
        result = trainer.train(
            net, learn, validate, settings, seed, settings.device, checkpoints, on_epoch
        )
    return net, result
