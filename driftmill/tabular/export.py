"""From a fitted pipeline to the ONNX file that is served, and the proof that both answer alike.

The exported graph takes the arrays of `driftmill.features` and gives `probabilities` (rows, labels)
or `prediction` (rows,), float32; preprocessing and the target's inverse transform are inside.

**Rows on a split.** A tree compares a float32 value with a float64 threshold, the graph with a
float32 one. A threshold rounded to the nearest float32 may jump over a value; rounded down it
never does: for every float32 `x`, `x <= t` and `x <= down(t)` are the same. So thresholds are
rounded down, and no row changes its leaf.

**Parity.** Sums in float32 differ in their last digits from sums in float64. `parity` allows
`TOLERANCE` for probabilities, and for numbers `TOLERANCE` of the largest prediction. Labels must be
equal, except where the pipeline's two best labels lie closer together than the tolerance: there
either answer is right.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import convert_sklearn, update_registered_converter
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.pipeline import Pipeline

from driftmill import features
from driftmill.contract import Contract
from driftmill.features import Signature
from driftmill.serving.session import Session
from driftmill.tabular import candidates

#: Largest difference between pipeline and exported model, see above.
TOLERANCE = 1e-5
#: Operator sets that every supported onnxruntime knows.
OPSETS = {"": 18, "ai.onnx.ml": 3}
IR_VERSION = 9


class ExportError(ValueError):
    """A model that could not be exported, or whose export answers otherwise."""


def to_onnx(pipeline: Pipeline, contract: Contract, sign: Signature) -> bytes:
    """The ONNX model of a fitted pipeline. The same pipeline gives the same bytes.

    Raises:
        ExportError: a step of the pipeline has no ONNX form.
    """
    columns = [
        ("numeric", FloatTensorType([None, len(sign.numeric)])),
        ("categorical", StringTensorType([None, len(sign.categorical)])),
    ]
    inputs = [(name, kind) for name, kind in columns if kind.shape[1]]
    if len(pipeline.steps) == 1:  # the dummy
        graph = _constant(pipeline, inputs)
    else:
        graph = _converted(pipeline, contract, inputs)
    _finish(graph, pipeline, contract, sign)
    _prune(graph)
    model = helper.make_model(
        graph,
        producer_name="driftmill",
        opset_imports=[helper.make_opsetid(domain, v) for domain, v in OPSETS.items()],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def parity(
    session: Session, pipeline: Pipeline, contract: Contract, sign: Signature, frame: pd.DataFrame
) -> float:
    """The largest difference between the exported model and its pipeline on these rows: in
    probability, or as a part of the largest prediction.

    Raises:
        ExportError: it is above `TOLERANCE`, or a label differs where the pipeline is not torn.
    """
    exported = session.run(*features.arrays(frame, sign)).astype(np.float64)
    inputs = candidates.table(frame, sign)
    trained = candidates.answer(pipeline, contract, sign, inputs)
    name = type(pipeline.steps[-1][1]).__name__
    if exported.shape != trained.shape:
        raise ExportError(f"{name}: the export gives {exported.shape}, not {trained.shape}")
    scale = 1.0 if contract.task != "regression" else float(np.abs(trained).max()) or 1.0
    difference = np.abs(exported - trained) / scale
    largest = float(difference.max())
    if not largest <= TOLERANCE:  # also where it is NaN
        raise ExportError(
            f"{name}: the exported model differs from the trained one by {largest:.3g} (row "
            f"{int(difference.reshape(len(frame), -1).max(axis=1).argmax())}; allowed {TOLERANCE})"
        )
    if contract.task != "regression":
        best = np.sort(trained, axis=1)[:, ::-1]
        torn = best[:, 0] - best[:, 1] <= 2 * TOLERANCE
        other = (exported.argmax(axis=1) != trained.argmax(axis=1)) & ~torn
        if other.any():
            raise ExportError(f"{name}: the exported model gives {other.sum()} rows another label")
    return largest


def _converted(
    pipeline: Pipeline, contract: Contract, inputs: list[tuple[str, Any]]
) -> onnx.GraphProto:
    """What skl2onnx makes of a pipeline."""
    exact = _rounded_down(pipeline)
    model = exact.steps[-1][1]
    try:
        converted = convert_sklearn(
            exact,
            name=contract.model,
            initial_types=inputs,
            target_opset=OPSETS,
            options={id(model): {"zipmap": False}} if contract.task != "regression" else None,
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ExportError(f"{type(model).__name__} has no ONNX form: {error}") from error
    return converted.graph


def _rounded_down(pipeline: Pipeline) -> Pipeline:
    """The pipeline with every threshold of its boosted trees rounded down to a float32.

    skl2onnx does this for forests, but rounds the thresholds of boosted trees to the nearest.
    """
    if not hasattr(pipeline.steps[-1][1], "_predictors"):
        return pipeline
    exact = copy.deepcopy(pipeline)
    for trees in exact.steps[-1][1]._predictors:
        for tree in trees:
            tree.nodes["num_threshold"] = round_down(tree.nodes["num_threshold"])
    return exact


def round_down(values: np.ndarray) -> np.ndarray:
    """The largest float32 at or below each float64."""
    with np.errstate(over="ignore"):
        nearest = np.asarray(values, dtype=np.float32)
        below = np.nextafter(nearest, np.float32(-np.inf))
    return np.where(nearest > values, below, nearest)


def _constant(pipeline: Pipeline, inputs: list[tuple[str, Any]]) -> onnx.GraphProto:
    """A graph that gives every row what a dummy answers."""
    model = pipeline.steps[-1][1]
    value = model.class_prior_ if hasattr(model, "class_prior_") else model.constant_.ravel()
    kinds = {"numeric": TensorProto.FLOAT, "categorical": TensorProto.STRING}
    return helper.make_graph(
        [
            helper.make_node("Shape", [inputs[0][0]], ["rows"], start=0, end=1),
            helper.make_node("Concat", ["rows", "width"], ["shape"], axis=0),
            helper.make_node("Expand", ["value", "shape"], ["raw"]),
        ],
        "dummy",
        [
            helper.make_tensor_value_info(name, kinds[name], [None, kind.shape[1]])
            for name, kind in inputs
        ],
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, [None, len(value)])],
        [
            numpy_helper.from_array(np.asarray(value, dtype=np.float32).reshape(1, -1), "value"),
            numpy_helper.from_array(np.array([len(value)], dtype=np.int64), "width"),
        ],
    )


def _finish(
    graph: onnx.GraphProto, pipeline: Pipeline, contract: Contract, sign: Signature
) -> None:
    """Append, in place, what `candidates.answer` does after the pipeline, and name the output."""
    current = graph.output[-1].name  # the label, where there is one, comes first
    del graph.output[:]

    def append(operator: str, constant: np.ndarray | None = None, **attributes: Any) -> None:
        nonlocal current
        step = f"finish_{len(graph.node)}"
        operands = [current]
        if constant is not None:
            graph.initializer.append(numpy_helper.from_array(constant, f"{step}_constant"))
            operands.append(f"{step}_constant")
        graph.node.append(helper.make_node(operator, operands, [step], name=step, **attributes))
        current = step

    target = contract.data.target
    shape: list[int | None] = [None]
    if contract.task != "regression":
        output = "probabilities"
        shape.append(len(sign.labels))
        known = np.asarray(pipeline.classes_)
        if len(known) < len(sign.labels):
            # A label that no training row had: its column is 0.
            append("MatMul", np.eye(len(sign.labels), dtype=np.float32)[known])
    else:
        output = "prediction"
        append("Reshape", np.array([-1], dtype=np.int64))
        if target.transform == "log1p":
            append("Exp")
            append("Sub", np.array(1, dtype=np.float32))
        if target.max is not None:
            append("Min", np.array(target.max, dtype=np.float32))
        if target.min is not None:
            append("Max", np.array(target.min, dtype=np.float32))
    append("Identity")
    graph.node[-1].output[0] = output
    for node in graph.node:  # a step of skl2onnx may have taken the name
        if node is not graph.node[-1]:
            _replace(node.output, output, f"{output}_raw")
            _replace(node.input, output, f"{output}_raw")
    _replace(graph.node[-1].input, output, f"{output}_raw")
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))


def _replace(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new


def _prune(graph: onnx.GraphProto) -> None:
    """Drop, in place, nodes and constants that the output does not need (the label's)."""
    needed = {graph.output[0].name}
    kept = []
    for node in reversed(graph.node):  # nodes stand in the order of their computation
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    constants = [c for c in graph.initializer if c.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)


def _numbers_shape(operator: Any) -> None:
    step = operator.raw_operator
    width = step.n_features_in_ + len(step.indicated_)
    operator.outputs[0].type = FloatTensorType([None, width])


def _numbers_nodes(scope: Any, operator: Any, container: Any) -> None:
    """`candidates.Numbers` as ONNX: the same steps in the same precision."""
    step = operator.raw_operator

    def node(kind: str, inputs: list[str], **attributes: Any) -> str:
        name: str = scope.get_unique_variable_name(kind.lower())
        container.add_node(kind, inputs, name, name=name, **attributes)
        return name

    def constant(value: np.ndarray, kind: int) -> str:
        name: str = scope.get_unique_variable_name("constant")
        container.add_initializer(name, kind, value.shape, value.tolist())
        return name

    double, integer = TensorProto.DOUBLE, TensorProto.INT64
    given = operator.inputs[0].full_name
    if len(operator.inputs) > 1:
        given = node("Concat", [i.full_name for i in operator.inputs], axis=1)
    values = node("Cast", [given], to=double)
    missing = node("IsNaN", [values])
    filled = node("Where", [missing, constant(step.filling_, double), values])
    if step.scale:
        centred = node("Sub", [filled, constant(step.mean_, double)])
        filled = node("Mul", [centred, constant(step.factor_, double)])
    result = node("Cast", [filled], to=TensorProto.FLOAT)
    if len(step.indicated_):
        flags = node("Gather", [missing, constant(step.indicated_, integer)], axis=1)
        numbers = node("Cast", [flags], to=TensorProto.FLOAT)
        result = node("Concat", [result, numbers], axis=1)
    container.add_node("Identity", [result], operator.outputs[0].full_name)


update_registered_converter(
    candidates.Numbers, "DriftmillNumbers", _numbers_shape, _numbers_nodes, overwrite=True
)
