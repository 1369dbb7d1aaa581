"""MLflow: `mlflow models serve -m FOLDER`.

`python -m benchmarks.serving.peers.mlflow_model` writes `FOLDER`, `BENCH_FOLDER/mlflow-ENGINE`.
"""

from __future__ import annotations

import joblib
import mlflow
import onnx
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Schema

from benchmarks.serving.peers import model


def write() -> None:
    """Save the model in MLflow's form."""
    folder = model.FOLDER / f"mlflow-{model.ENGINE}"
    if model.ENGINE == "onnx":
        options = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        mlflow.onnx.save_model(
            onnx.load(model.FOLDER / "model.onnx"),
            folder,
            pip_requirements=["onnxruntime"],
            onnx_session_options=options,
        )
    else:
        columns = [ColSpec("float", c) for c in model.NUMERIC]
        columns += [ColSpec("string", c) for c in model.CATEGORICAL]
        mlflow.sklearn.save_model(
            joblib.load(model.FOLDER / "pipeline.joblib"),
            folder,
            serialization_format="cloudpickle",
            pyfunc_predict_fn="predict_proba",
            signature=ModelSignature(inputs=Schema(columns)),
            pip_requirements=["scikit-learn"],
        )


if __name__ == "__main__":
    write()
