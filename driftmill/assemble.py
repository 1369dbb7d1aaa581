"""From the fits of all families to one bundle: the best by cross-validation is taken.

The test rows play no part in the choice: they stay fresh for the gate.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftmill import bundle, features
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.data import prepare, split
from driftmill.data.prepare import Prepared
from driftmill.evaluate import metrics
from driftmill.features import Signature

log = logging.getLogger("driftmill")

#: What a fit leaves in its folder: the exported model, how it was found, and a network's weights.
MODEL, RECORD, WEIGHTS = "model.onnx", "fit.json", "weights.safetensors"
#: Most rows that the monitor compares with.
REFERENCE_ROWS = 10_000
#: Rows that are replayed at every load.
EXAMPLES = 8


def assemble(contract: Contract, data: Path, fits: list[Path], out: Path) -> Manifest:
    """Write the bundle of the best fit.

    Args:
        contract: metric and direction are taken from it.
        data: the folder that `prepare` wrote.
        fits: the folders that `fit` wrote, one for each family.
        out: where the bundle goes; created, must be empty.

    Raises:
        ValueError: there is no fit with a score.
    """
    prepared = prepare.read(data)
    records = [(folder, json.loads((folder / RECORD).read_text())) for folder in fits]
    folder, best = choose(contract, records)
    sign = features.signature(contract, prepared.train)
    columns = [c.name for c in contract.data.columns] + [contract.data.target.name]
    columns += [features.IMAGE] if contract.is_vision else []
    about = prepared.info.model_dump(mode="json") | {
        "candidates": {
            record["family"]: {k: record[k] for k in ("score", "score_std", "tried", "seconds")}
            for _, record in records
        }
    }
    weights = folder / WEIGHTS
    with tempfile.TemporaryDirectory() as scratch:
        model = folder / MODEL
        if contract.serve.precision != "float32":
            model, about["precision"] = _smaller(contract, sign, prepared, model, Path(scratch))
        manifest = bundle.write(
            out,
            contract=contract,
            signature=sign,
            model=model,
            reference=reference(contract, prepared.test)[columns],
            examples=examples(contract, prepared.train)[columns],
            family=best["family"],
            params=best["params"],
            data=about,
            weights=weights if weights.exists() else None,
            training=best.get("training"),
        )
    log.info("version %s is %s", manifest.version, best["family"])
    return manifest


def _smaller(
    contract: Contract, sign: Signature, prepared: Prepared, model: Path, scratch: Path
) -> tuple[Path, dict[str, Any]]:
    """The model in the contract's precision if it is good enough, and what was found; the rows that
    `fit` kept out decide."""
    from driftmill.vision import precision

    train = prepared.train
    held_out = split.held_out(train, contract, contract.train.vision.validation)
    learnt, unseen = train[~held_out], train[held_out]
    some = np.random.default_rng(contract.train.seed).permutation(len(learnt))
    (calibration,) = features.arrays(learnt.iloc[some[: precision.CALIBRATION]], sign)
    (images,) = features.arrays(unseen, sign)
    y = metrics.encode(sign.labels, unseen[sign.target])
    return precision.choose(contract, model, calibration, images, y, scratch)


def choose(
    contract: Contract, records: list[tuple[Path, dict[str, Any]]]
) -> tuple[Path, dict[str, Any]]:
    """The fit with the best score; of equals the one given first."""
    scored = [(folder, record) for folder, record in records if math.isfinite(record["score"])]
    if not scored:
        raise ValueError("there is no fit to choose from; run `fit` for one family at least")
    return max(scored, key=lambda item: contract.metric.sign * item[1]["score"])


def reference(contract: Contract, test: pd.DataFrame) -> pd.DataFrame:
    """The rows that the monitor compares with: up to 10,000 of the test rows, in their order.

    Test rows, as the model has not learnt from them: what it says about them is what it will say
    about rows like them. Where there is a time they are also the newest, and the stream goes on
    from there: after a retraining on old and new rows they are the new world, not the mixture.
    """
    if len(test) <= REFERENCE_ROWS:
        return test
    if contract.data.time is not None:
        return test.tail(REFERENCE_ROWS)
    chosen = np.random.default_rng(contract.train.seed).permutation(len(test))[:REFERENCE_ROWS]
    return test.iloc[np.sort(chosen)]


def examples(contract: Contract, train: pd.DataFrame) -> pd.DataFrame:
    """Eight varied training rows: in turn, the row that brings most values not seen yet, where a
    number counts by its quarter of the range and a missing value is a value too."""
    rows = train.iloc[
        np.sort(np.random.default_rng(contract.train.seed).permutation(len(train))[:2000])
    ]
    codes = []
    for column in contract.data.columns:
        values = rows[column.name]
        if column.is_numeric:
            codes.append(values.rank(pct=True).mul(4).fillna(-1).astype(int).to_numpy())
        else:
            codes.append(pd.factorize(values)[0])
    table = np.column_stack(codes)
    seen: list[set[int]] = [set() for _ in codes]
    chosen: list[int] = []
    while len(chosen) < min(EXAMPLES, len(rows)):
        fresh = np.column_stack(
            [~np.isin(table[:, i], list(codes)) for i, codes in enumerate(seen)]
        ).sum(axis=1)
        fresh[chosen] = -1
        best = int(fresh.argmax())
        chosen.append(best)
        for i, code in enumerate(table[best]):
            seen[i].add(int(code))
    return rows.iloc[chosen]
