"""The training step of one candidate family: search, refit on all training rows, export, prove.

Writes `model.onnx` and `fit.json`:

| key | what |
|---|---|
| `family`, `params` | what was trained |
| `score`, `score_std` | the metric in cross-validation: mean and deviation over the folds |
| `tried` | number of settings |
| `search` | method, folds, metric, and all trials with their scores |
| `rows`, `seconds` | training rows, and time for everything |
| `parity` | largest difference between trained and exported model (see `export`) |
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from driftmill import features
from driftmill.assemble import MODEL, RECORD
from driftmill.contract import Contract
from driftmill.data import prepare
from driftmill.home import cores
from driftmill.serving.session import Session
from driftmill.tabular import candidates, export
from driftmill.tabular.search import search

log = logging.getLogger("driftmill")

#: The refit uses one core for every so many rows: below that, threads cost more than they bring.
ROWS_PER_CORE = 50_000
#: Rows with missing values and unknown categories on which the export is tried as well.
STRESS_ROWS = 500


def fit(contract: Contract, family: str, data: Path, out: Path) -> dict[str, Any]:
    """Train a family.

    Args:
        contract: what to learn and how to search.
        family: one of `candidates.FAMILIES`.
        data: the folder that `prepare` wrote.
        out: gets `model.onnx` and `fit.json`; created.

    Returns:
        The content of `fit.json`.

    Raises:
        SearchError: the training rows do not allow a score.
        ExportError: the exported model does not answer as the trained one.
    """
    started = time.perf_counter()
    prepared = prepare.read(data)
    sign = features.signature(contract, prepared.train)
    inputs = candidates.table(prepared.train, sign)
    y = candidates.truth(prepared.train, sign)

    trials = search(contract, sign, family, inputs, y)
    best = trials[0]
    threads = min(cores(), 1 + len(y) // ROWS_PER_CORE)
    pipeline = candidates.build(family, contract, sign, best.params, threads=cores())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        candidates.learn(pipeline, contract, inputs, y, threads)

    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL).write_bytes(export.to_onnx(pipeline, contract, sign))
    session = Session(out / MODEL)
    tests = [prepared.test, stressed(prepared.train, contract)]
    difference = max(
        export.parity(session, pipeline, contract, sign, rows) for rows in tests if len(rows)
    )
    seconds = time.perf_counter() - started
    record = {
        "family": family,
        "params": best.params,
        "score": best.score,
        "score_std": best.std,
        "tried": len(trials),
        "search": {
            "method": contract.train.search.method,
            "folds": contract.train.search.folds,
            "metric": contract.metric.name,
            "trials": [vars(trial) for trial in trials],
        },
        "rows": len(y),
        "seconds": round(seconds, 3),
        "parity": difference,
    }
    (out / RECORD).write_text(json.dumps(record, indent=1))
    log.info(
        "%s: %s %.4f ± %.4f in %.1f s", family, contract.metric.name, best.score, best.std, seconds
    )
    return record


def stressed(train: pd.DataFrame, contract: Contract) -> pd.DataFrame:
    """Training rows in which every value that may be missing or unknown is so in a fifth of them;
    what is served must agree with what was trained there too."""
    rng = np.random.default_rng(contract.train.seed)
    rows = train.head(STRESS_ROWS).copy()
    for column in contract.data.columns:
        if column.nullable:
            hit = rng.random(len(rows)) < 0.2
            rows[column.name] = rows[column.name].mask(hit, np.nan if column.is_numeric else None)
        if not column.is_numeric and column.unknown == "allow":
            hit = rng.random(len(rows)) < 0.2
            rows[column.name] = rows[column.name].mask(hit, "never seen in training")
    return rows
