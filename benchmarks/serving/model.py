"""The model that every service gets: gradient boosting on 24 numbers and 6 categories.

It is trained through `driftmill.tabular`. Ours gets it as a bundle in a store, the others as the
very same ONNX file, or as a scikit-learn pipeline of the same fitted model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

from driftmill import bundle, contract, features, rollout
from driftmill.contract import Contract
from driftmill.store import Store
from driftmill.tabular import candidates, export

NAME = "bench"
FAMILY = "hist-gradient-boosting"
NUMBERS, CATEGORIES, VALUES = 24, 6, 8
ROWS = 20_000
#: Rows that services are asked about.
ASKED = 512


@dataclass(frozen=True)
class Made:
    """What services and their clients need."""

    folder: Path
    """With `store/`, `model.onnx`, `pipeline.joblib` and `columns.json`."""
    records: list[dict[str, Any]]
    """`ASKED` different rows."""
    expected: np.ndarray
    """(rows,) probability of the second label, by the pipeline that was trained."""


def make(folder: Path) -> Made:
    """Train the model and write every form of it into a folder."""
    of, frame = _contract(), _rows()
    sign = features.signature(of, frame)
    inputs = candidates.table(frame, sign)
    trained = candidates.build(FAMILY, of, sign, {})
    candidates.learn(trained, of, inputs, candidates.truth(frame, sign))

    (folder / "model.onnx").write_bytes(export.to_onnx(trained, of, sign))
    manifest = bundle.write(
        folder / "bundle",
        contract=of,
        signature=sign,
        model=folder / "model.onnx",
        reference=frame.head(5000),
        examples=frame.head(5),
        family=FAMILY,
        params={},
        data={},
    )
    store = Store(folder / "store")
    store.put_folder(folder / "bundle", bundle.key(NAME, manifest.version), bundle.MANIFEST)
    rollout.change(store, NAME, champion=manifest.version, by="benchmark")

    numeric, categorical = list(sign.numeric), list(sign.categorical)
    joblib.dump(_plain(trained, inputs, categorical), folder / "pipeline.joblib")
    columns = {"numeric": numeric, "categorical": categorical, "labels": list(sign.labels)}
    (folder / "columns.json").write_text(json.dumps(columns))

    asked = frame.head(ASKED)
    return Made(
        folder,
        [
            {str(k): v for k, v in r.items()}
            for r in asked[numeric + categorical].to_dict("records")
        ],
        trained.predict_proba(inputs.head(ASKED))[:, 1],
    )


def _contract() -> Contract:
    columns: list[dict[str, Any]] = [
        {"name": f"x{i:02d}", "type": "float"} for i in range(NUMBERS)
    ] + [
        {"name": f"k{i}", "type": "category", "categories": [f"c{j}" for j in range(VALUES)]}
        for i in range(CATEGORIES)
    ]
    values = {
        "apiVersion": "driftmill/v1",
        "model": NAME,
        "task": "classification",
        "data": {
            "source": "file:none.parquet",
            "target": {"name": "label", "labels": ["no", "yes"]},
            "columns": columns,
        },
        "train": {"candidates": [FAMILY]},
        "tracking": "none",
    }
    return contract.parse(json.dumps(values))


def _rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({f"x{i:02d}": rng.normal(size=ROWS).round(4) for i in range(NUMBERS)})
    for i in range(CATEGORIES):
        frame[f"k{i}"] = rng.choice([f"c{j}" for j in range(VALUES)], ROWS)
    score = frame.x00 + frame.x01 * frame.x02 + 2 * (frame.k0 == "c1") - 1
    frame["label"] = np.where(score + rng.normal(size=ROWS) / 2 > 0, "yes", "no")
    return frame


def _plain(trained: Pipeline, inputs: pd.DataFrame, categorical: list[str]) -> Pipeline:
    """The same fitted model behind steps of scikit-learn alone, which loads without Driftmill."""
    columns = ColumnTransformer(
        [
            ("numeric", "passthrough", [c for c in inputs if c not in categorical]),
            ("one-hot", OneHotEncoder(handle_unknown="ignore", dtype=np.float32), categorical),
        ],
        sparse_threshold=0,
    )
    columns.fit(inputs)
    return Pipeline([("columns", columns), ("model", trained["model"])])
