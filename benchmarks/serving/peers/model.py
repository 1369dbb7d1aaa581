"""The model that a peer loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

FOLDER = Path(os.environ["BENCH_FOLDER"])
ENGINE = os.environ["BENCH_ENGINE"]
COLUMNS: dict[str, list[str]] = json.loads((FOLDER / "columns.json").read_text())
NUMERIC, CATEGORICAL, LABELS = COLUMNS["numeric"], COLUMNS["categorical"], COLUMNS["labels"]

#: Types of the fields of a record, for projects that check them.
FIELDS: dict[str, Any] = dict.fromkeys(NUMERIC, (float, ...)) | dict.fromkeys(
    CATEGORICAL, (str, ...)
)

Records = Sequence[Mapping[str, Any]]
Model = Callable[[Records], list[list[float]]]


def load(engine: Literal["scikit-learn", "onnx"] | str = ENGINE) -> Model:
    """A function from records to the probabilities of the labels, (rows, 2)."""
    return _onnx() if engine == "onnx" else _sklearn()


def answer(probabilities: list[list[float]]) -> list[dict[str, Any]]:
    """A label and its probabilities for each row."""
    return [
        {"prediction": LABELS[row.index(max(row))], "probabilities": row} for row in probabilities
    ]


def session() -> Any:
    """One thread that does not spin: fastest for small models; the other core is the client's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        FOLDER / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


def _onnx() -> Model:
    running = session()

    def probabilities(records: Records) -> list[list[float]]:
        numeric = np.array([[r[c] for c in NUMERIC] for r in records], np.float32)
        categorical = np.array([[r[c] for c in CATEGORICAL] for r in records], object)
        inputs = {"numeric": numeric, "categorical": categorical}
        answers: list[list[float]] = running.run(["probabilities"], inputs)[0].tolist()
        return answers

    return probabilities


def _sklearn() -> Model:
    import joblib
    import pandas as pd

    pipeline = joblib.load(FOLDER / "pipeline.joblib")

    def probabilities(records: Records) -> list[list[float]]:
        frame = pd.DataFrame(records, columns=NUMERIC + CATEGORICAL)
        frame[NUMERIC] = frame[NUMERIC].astype(np.float32)
        answers: list[list[float]] = pipeline.predict_proba(frame).tolist()
        return answers

    return probabilities
