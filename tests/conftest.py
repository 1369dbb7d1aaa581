"""Fixtures that several test modules use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper

from driftmill import bundle, contract, features
from driftmill.store import Store

CONTRACT = """
apiVersion: driftmill/v1
model: tiny
task: classification
data:
  source: sim:payments
  target: {name: fraud, labels: ["no", "yes"]}
  columns:
    - {name: amount, type: float, min: 0, max: 1000}
    - {name: age, type: int, nullable: true}
    - {name: channel, type: category, categories: [web, app]}
tracking: none
"""


@pytest.fixture
def tiny() -> contract.Contract:
    """A small contract of a classification with a number, a nullable number and a category."""
    return contract.parse(CONTRACT)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return Store(tmp_path / "store")


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets, where there is one."""
    folder = os.environ.get("DRIFTMILL_DATA")
    if not folder:
        pytest.skip("DRIFTMILL_DATA is not set")
    return Path(folder)


def tiny_frame(rows: int, seed: int = 0, shift: float = 0.0) -> pd.DataFrame:
    """Rows for the `tiny` contract; `shift` moves the amounts by that many standard deviations."""
    rng = np.random.default_rng(seed)
    amount = rng.normal(500 + 100 * shift, 100, rows).clip(0, 1000)
    return pd.DataFrame(
        {
            "amount": amount,
            "age": np.where(rng.random(rows) < 0.1, np.nan, rng.integers(18, 90, rows)),
            "channel": rng.choice(["web", "app"], rows),
            "fraud": np.where(amount + rng.normal(0, 30, rows) > 500, "yes", "no"),
        }
    )


def logistic_onnx(path: Path, slope: float = 0.02, centre: float = 500.0) -> Path:
    """A model of the `tiny` contract: P(yes) = sigmoid(slope * (amount - centre))."""
    weight = np.array([[0.0, slope], [0.0, 0.0]], dtype=np.float32)
    offset = np.array([0.0, -slope * centre], dtype=np.float32)
    nodes = [
        helper.make_node("IsNaN", ["numeric"], ["absent"]),
        helper.make_node("Where", ["absent", "zero", "numeric"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "logistic",
        [
            helper.make_tensor_value_info("numeric", TensorProto.FLOAT, [None, 2]),
            helper.make_tensor_value_info("categorical", TensorProto.STRING, [None, 1]),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [2, 2], weight.ravel()),
            helper.make_tensor("offset", TensorProto.FLOAT, [2], offset),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def make_bundle(
    tiny: contract.Contract, store: Store, tmp_path: Path
) -> Callable[..., bundle.Manifest]:
    """Make a bundle of the `tiny` contract and put it into the store; each slope is a version."""

    def make(
        slope: float = 0.02, of: contract.Contract = tiny, rows: int = 1000
    ) -> bundle.Manifest:
        frame = tiny_frame(rows)
        folder = tmp_path / f"bundle-{slope}"
        manifest = bundle.write(
            folder,
            contract=of,
            signature=features.signature(of, frame),
            model=logistic_onnx(tmp_path / f"model-{slope}.onnx", slope),
            reference=frame,
            examples=frame.head(5),
            family="linear",
            params={"slope": slope},
            data={"fingerprint": "0" * 64},
        )
        store.put_folder(folder, bundle.key(of.model, manifest.version), bundle.MANIFEST)
        return manifest

    return make
