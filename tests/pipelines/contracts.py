"""Contracts that train in a moment."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.conftest import CONTRACT, tiny_frame

IMAGES = """
apiVersion: driftmill/v1
model: small-digits
task: image-classification
data:
  source: sklearn:digits
  target: {name: label, labels: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]}
  image: {size: 8, channels: 1}
train:
  candidates: [mlp]
  rows: 400
  vision: {epochs: 2, batch: 64, diagnostics: false}
gates: {min_test_rows: 50, resamples: 200, max_latency_ms: null}
tracking: none
"""


def write_contract(folder: Path, rows: int = 600, spoiled: int = 0) -> Path:
    """The `tiny` contract on a CSV file, with one fast family.

    Args:
        folder: where to.
        rows: rows of the file.
        spoiled: so many of them have no number for an amount.
    """
    frame = tiny_frame(rows)
    frame["amount"] = frame["amount"].round(3).astype(object)
    frame.loc[frame.index[:spoiled], "amount"] = "a lot"
    frame.to_csv(folder / "rows.csv", index=False)
    values = yaml.safe_load(CONTRACT)
    values["data"]["source"] = "file:rows.csv"
    values["train"] = {"candidates": ["linear"], "search": {"method": "none"}}
    values["gates"] = {"min_test_rows": 50, "resamples": 200, "max_latency_ms": None}
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
