"""Writes what a service would write into the inference log."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftmill import bundle, features
from driftmill.serving.log import Label, Log, Prediction, Role, Schema
from driftmill.store import Store
from driftmill.vision import images


def answer(
    store: Store,
    model: str,
    version: str,
    frame: pd.DataFrame,
    spool: Path,
    *,
    role: Role = "champion",
    at: datetime | None = None,
) -> list[str]:
    """Have a version answer rows and put them into the log as one segment.

    Returns the prediction ids. `at` is the time of the last row; the rows are a millisecond apart.
    """
    loaded = bundle.fetch(store, model, version)
    signature = loaded.signature
    arrays = features.arrays(frame, signature)
    if signature.image is None:
        output, embedding = loaded.session.run(*arrays), None
    else:
        output, embedding = loaded.session.embed(*arrays)
    given = bundle.answers(output, signature)
    end = at or datetime.now(UTC)
    names = [c.name for c in signature.columns]
    records: list[dict[str, Any]] = [
        {str(k): None if pd.isna(v) else v for k, v in row.items()}
        for row in frame[names].to_dict("records")
    ]
    if embedding is not None:
        for record, pixels, row in zip(records, arrays[0], embedding, strict=True):
            # Bytes are written as base64.
            record[features.IMAGE] = images.to_png(pixels)
            record[features.EMBEDDING] = row.astype("<f2").tobytes()
    ids = [uuid.uuid4().hex for _ in records]
    rows = [
        Prediction(
            prediction_id=ids[i],
            request_id=ids[i],
            at=_us(end - timedelta(milliseconds=len(records) - 1 - i)),
            version=version,
            role=role,
            prediction=given[bundle.PREDICTION][i],
            score=float(given[bundle.SCORE][i]) if bundle.SCORE in given else None,
            record=record,
        )
        for i, record in enumerate(records)
    ]
    _append(store, model, spool, Schema.predictions(signature), rows)
    return ids


def label(
    store: Store, model: str, version: str, ids: list[str], labels: list[Any], spool: Path
) -> None:
    """Put labels into the log."""
    signature = bundle.fetch(store, model, version).signature
    now = _us(datetime.now(UTC))
    rows = [Label(i, now, value) for i, value in zip(ids, labels, strict=True)]
    _append(store, model, spool, Schema.labels(signature), rows)


def normal_frame(
    rows: int, columns: int, seed: int, shifted: int = 0, shift: float = 0.0
) -> pd.DataFrame:
    """Standard normal columns `x0`, `x1`, …; the first `shifted` of them are moved."""
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    values[:, :shifted] += shift
    return pd.DataFrame(values, columns=[f"x{i}" for i in range(columns)])


def _append(store: Store, model: str, spool: Path, schema: Schema, rows: list[Any]) -> None:
    log = Log(spool, store, model)
    log.append(schema, rows)
    log.close()


def _us(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)
