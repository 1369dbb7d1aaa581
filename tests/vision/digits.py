"""The digits that come with scikit-learn, as a contract and prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from driftmill import contract
from driftmill.contract import Contract
from driftmill.data import prepare

#: Labels of the contract; the last one stands in no row.
LABELS = (*"0123456789", "none")


def make_contract(
    vision: dict[str, Any] | None = None, metric: str = "accuracy", **sections: dict[str, Any]
) -> Contract:
    """A contract that trains for seconds; `vision` and further sections are merged into it."""
    settings = {"epochs": 3, "batch": 32, "precision": "float32", "diagnostics": False}
    content: dict[str, Any] = {
        "apiVersion": "driftmill/v1",
        "model": "digits",
        "task": "image-classification",
        "data": {
            "source": {"uri": "sklearn:digits"},
            "target": {"name": "label", "labels": LABELS},
            "image": {"size": 8, "channels": 1},
        },
        "train": {
            "candidates": ["small-cnn"],
            "rows": 800,
            "metric": metric,
            "vision": {**settings, **(vision or {})},
        },
        "tracking": {"backend": "none"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return contract.Contract.model_validate(content)


def prepared(folder: Path) -> Path:
    """The prepared data of these contracts: 640 rows to learn from and 160 to test."""
    prepare.prepare(make_contract(), folder)
    return folder
