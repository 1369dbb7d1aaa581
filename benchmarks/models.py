"""Bundles of the payments example, without a search, for what is measured beside them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet

from driftmill.contract import Contract, load

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.pipeline import Pipeline

    from driftmill.bundle import Manifest
    from driftmill.features import Signature
    from driftmill.store import Store

FAMILIES = ("linear", "hist-gradient-boosting")


@cache
def payments() -> tuple[Contract, pd.DataFrame, Signature]:
    """The contract, its rows, and the signature of a model that learns from them."""
    from driftmill import features
    from driftmill.data import sources

    contract = load("examples/payments/contract.yaml")
    frame = sources.stream(contract)
    return contract, frame, features.signature(contract, frame)


def write(family: str, folder: Path) -> tuple[Manifest, Pipeline]:
    """Fit a family with its defaults and write its bundle.

    Args:
        family: one of `FAMILIES`.
        folder: of the bundle; made.

    Returns:
        Its manifest, and the pipeline that was exported.
    """
    from driftmill import bundle
    from driftmill.tabular import candidates, export

    contract, frame, sign = payments()
    pipeline = candidates.build(family, contract, sign, {})
    inputs, truth = candidates.table(frame, sign), candidates.truth(frame, sign)
    candidates.learn(pipeline, contract, inputs, truth)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = folder.parent / f"{folder.name}.onnx"
    model.write_bytes(export.to_onnx(pipeline, contract, sign))
    manifest = bundle.write(
        folder,
        contract=contract,
        signature=sign,
        model=model,
        reference=frame,
        examples=frame.head(5),
        family=family,
        params={},
        data={},
    )
    return manifest, pipeline


def logged(store: Store, model: str) -> int:
    """Rows in a model's inference log, those of shadows included."""
    from driftmill.serving.log import segments

    return sum(
        pyarrow.parquet.read_metadata(io.BytesIO(store.read(key))).num_rows
        for key in segments(store, model, "predictions")
    )
