"""Small ONNX models with known faults, and the data that they are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper

from driftmill import bundle, contract, features
from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.data.prepare import DatasetInfo, Prepared
from tests.conftest import tiny_frame

NUMBERS = """
apiVersion: driftmill/v1
model: numbers
task: regression
data:
  source: sim:numbers
  target: y
  columns:
    - {name: x, type: float}
    - {name: kind, type: category, categories: [a, b]}
tracking: none
"""


def changed(of: Contract, **sections: Any) -> Contract:
    """The contract with some settings replaced, e.g. `gates={"floor": 0.5}`."""
    values = of.model_dump(mode="json")
    for section, settings in sections.items():
        values[section] = {**values[section], **settings}
    return Contract.model_validate(values)


def numbers_frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """y = 3 x + 10 + noise; `kind` says nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 5, rows).astype(np.float32).astype(np.float64)
    y = 3 * x + 10 + rng.normal(0, 2, rows)
    return pd.DataFrame({"x": x, "kind": rng.choice(["a", "b"], rows), "y": y})


def prepared(train: pd.DataFrame, test: pd.DataFrame, **info: Any) -> Prepared:
    """Both parts of a data set, with what is said of it."""
    known: dict[str, Any] = {
        "fingerprint": "a" * 64,
        "test_fingerprint": "b" * 64,
        "source_sha256": "c" * 64,
        "rows": len(train) + len(test),
        "train_rows": len(train),
        "test_rows": len(test),
        "quarantined": 2,
        "reasons": {"amount above 1000": 2},
        "history_rows": len(train) + len(test),
        "logged_rows": 0,
        "read_rows": len(train) + len(test) + 2,
        "replaced_rows": 0,
        "held_out_rows": 0,
        "older_rows": 0,
        "from_time": None,
        "to_time": None,
        "test_from_time": None,
        "log_until": None,
    }
    return Prepared(train, test, DatasetInfo(**{**known, **info}))


def tiny_prepared(rows: int = 800, **info: Any) -> Prepared:
    """Rows of the `tiny` contract."""
    return prepared(tiny_frame(1000, seed=1), tiny_frame(rows, seed=2), **info)


def classifier(
    folder: Path,
    of: Contract,
    slope: float = 0.03,
    noise: float = 0.0,
    app: float = 1.0,
    nan_above: float = 1e9,
    labels: Sequence[str] = ("no", "yes"),
    data: dict[str, Any] | None = None,
    frame: pd.DataFrame | None = None,
) -> Bundle:
    """A bundle of the `tiny` contract: log odds of the second label = (slope * (amount - 500) +
    noise * age), times `app` where the channel is app; NaN above an amount."""
    nodes = [
        helper.make_node("IsNaN", ["numeric"], ["absent"]),
        helper.make_node("Where", ["absent", "zero", "numeric"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["odds"]),
        helper.make_node(
            "LabelEncoder",
            ["categorical"],
            ["factor"],
            domain="ai.onnx.ml",
            keys_strings=["app"],
            values_floats=[app],
            default_float=1.0,
        ),
        helper.make_node("Mul", ["odds", "factor"], ["scaled"]),
        # The root of a negative number is NaN, and stays so times zero.
        helper.make_node("MatMul", ["filled", "first"], ["amount"]),
        helper.make_node("Sub", ["limit", "amount"], ["room"]),
        helper.make_node("Sqrt", ["room"], ["root"]),
        helper.make_node("Mul", ["root", "zero"], ["nothing"]),
        helper.make_node("Add", ["scaled", "nothing"], ["result"]),
        helper.make_node("Sigmoid", ["result"], ["yes"]),
        helper.make_node("Sub", ["one", "yes"], ["no"]),
        helper.make_node("Concat", ["no", "yes"], ["probabilities"], axis=1),
    ]
    constants = {
        "weight": np.array([[slope], [noise]]),
        "offset": np.array([-slope * 500]),
        "first": np.array([[1.0], [0.0]]),
        "limit": np.array([nan_above]),
        "zero": np.array(0.0),
        "one": np.array(1.0),
    }
    model = _save(folder, nodes, constants, "probabilities", 2, numeric=2)
    reference = tiny_frame(500, seed=3) if frame is None else frame
    return _bundle(folder, of, model, reference, data, labels)


def regressor(
    folder: Path, of: Contract, slope: float = 3.0, data: dict[str, Any] | None = None
) -> Bundle:
    """A bundle of the contract `NUMBERS`: prediction = slope * x + 10."""
    nodes = [
        helper.make_node("MatMul", ["numeric", "weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["prediction"]),
    ]
    constants = {"weight": np.array([[slope]]), "offset": np.array([10.0])}
    model = _save(folder, nodes, constants, "prediction", 1, numeric=1)
    return _bundle(folder, of, model, numbers_frame(500, seed=3), data)


def sizes() -> Contract:
    """A contract of three labels: small, middle and large x."""
    return contract.parse(
        NUMBERS.replace("regression", "classification").replace(
            "target: y", "target: {name: y, labels: [small, middle, large]}"
        )
    )


def sizes_frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """Rows of the contract `sizes`."""
    frame = numbers_frame(rows, seed)
    return frame.assign(y=np.array(["small", "middle", "large"])[np.digitize(frame["y"], [3, 17])])


def three_labels(folder: Path, of: Contract) -> Bundle:
    """A bundle of the contract `sizes`."""
    nodes = [
        helper.make_node("MatMul", ["numeric", "weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {"weight": np.array([[-1.0, 0.0, 1.0]]), "offset": np.array([0.0, 2.0, 0.0])}
    model = _save(folder, nodes, constants, "probabilities", 3, numeric=1)
    return _bundle(folder, of, model, sizes_frame(500, seed=3), None)


def numbers() -> Contract:
    """The contract `NUMBERS`."""
    return contract.parse(NUMBERS)


def _save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    output: str,
    width: int,
    numeric: int,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "model",
        [
            helper.make_tensor_value_info("numeric", TensorProto.FLOAT, [None, numeric]),
            helper.make_tensor_value_info("categorical", TensorProto.STRING, [None, 1]),
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, width])],
        [
            helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.ravel())
            for name, value in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def _bundle(
    folder: Path,
    of: Contract,
    model: Path,
    frame: pd.DataFrame,
    data: dict[str, Any] | None,
    labels: Sequence[str] = (),
) -> Bundle:
    sign = features.signature(of, frame)
    if labels:
        sign = sign.model_copy(update={"labels": tuple(labels)})
    amounts = frame.sort_values("amount") if "amount" in frame else frame
    bundle.write(
        folder / "bundle",
        contract=of,
        signature=sign,
        model=model,
        reference=frame,
        examples=amounts.head(5),
        family="linear",
        params={"made": "by hand"},
        data=data or {},
    )
    return bundle.load(folder / "bundle")
