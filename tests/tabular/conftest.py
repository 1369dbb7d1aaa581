"""Contracts and prepared data of every shape that a model can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from driftmill import contract
from driftmill.contract import Contract
from driftmill.data import prepare

NUMBERS: list[dict[str, Any]] = [
    {"name": "size", "type": "float"},
    {"name": "age", "type": "int", "nullable": True},
    {"name": "empty", "type": "float", "nullable": True},
]
TEXTS: list[dict[str, Any]] = [
    {"name": "colour", "type": "category", "nullable": True},
    {"name": "town", "type": "category"},
]
LABELS = {2: ["no", "yes"], 3: ["high", "low", "mid"]}


def make_contract(
    labels: int = 2,
    columns: list[dict[str, Any]] | None = None,
    target: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    source: str = "file:rows.parquet",
    time: str | None = None,
) -> Contract:
    """A contract of a classification with so many labels, or of a regression for 0."""
    values: dict[str, Any] = {
        "apiVersion": "driftmill/v1",
        "model": "shapes",
        "task": "classification" if labels else "regression",
        "data": {
            "source": source,
            "target": {"name": "y", **(target or {})},
            "columns": NUMBERS + TEXTS if columns is None else columns,
        },
        "train": {"search": {"budget": 2, "folds": 2}, **(train or {})},
        "tracking": "none",
    }
    if labels and "labels" not in values["data"]["target"]:
        values["data"]["target"]["labels"] = LABELS[labels]
    if time:
        values["data"]["time"] = time
    return contract.parse(json.dumps(values))


def rows(labels: int = 2, count: int = 300, seed: int = 0) -> pd.DataFrame:
    """Raw rows: numbers with missing values, a column without any value, few and many
    categories, and a target that depends on all of them."""
    rng = np.random.default_rng(seed)
    size = rng.normal(1000, 10, count).astype(np.float32).astype(float)
    age = np.where(rng.random(count) < 0.2, np.nan, rng.integers(18, 90, count))
    colour = rng.choice(np.array(["red", "green", None], dtype=object), count)
    town = rng.choice([f"town {i}" for i in range(40)], count)
    level = (size - 1000) / 10 + np.nan_to_num(age, nan=90) / 30 + (colour == "red")
    level += rng.normal(0, 0.3, count)
    frame = pd.DataFrame(
        {
            "size": size,
            "age": age,
            "empty": np.nan,
            "colour": colour,
            "town": town,
        }
    )
    if labels:
        edges = np.quantile(level, np.arange(1, labels) / labels)
        frame["y"] = np.array(LABELS[labels], dtype=object)[np.digitize(level, edges)]
    else:
        frame["y"] = np.exp(level / 2)
    return frame


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., tuple[Contract, Path]]:
    """Prepare `rows` from a file: gives the contract and the folder that the steps read."""

    def make(labels: int = 2, **settings: Any) -> tuple[Contract, Path]:
        frame = rows(labels)
        if settings.get("time"):
            start = pd.Timestamp("2026-01-01", tz="UTC")
            frame[settings["time"]] = start + pd.to_timedelta(np.arange(len(frame)), unit="h")
        frame.to_parquet(tmp_path / "rows.parquet")
        made = make_contract(labels, source=f"file:{tmp_path}/rows.parquet", **settings)
        prepare.prepare(made, tmp_path / "data")
        return made, tmp_path / "data"

    return make
