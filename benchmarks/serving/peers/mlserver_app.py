"""MLServer: `mlserver start FOLDER`, with its own runtime for scikit-learn, or this for ONNX.

`python -m benchmarks.serving.peers.mlserver_app` writes `FOLDER`, `BENCH_FOLDER/mlserver-ENGINE`.
"""

from __future__ import annotations

import json

import numpy as np
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import (  # type: ignore[import-not-found]
    InferenceRequest,
    InferenceResponse,
)

from benchmarks.serving.peers import model


class Onnx(MLModel):  # type: ignore[misc]
    """A runtime of our own, as the documentation shows how to write one."""

    async def load(self) -> bool:
        """Get ready."""
        self.session = model.session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Predict rows."""
        given = {tensor.name: tensor for tensor in payload.inputs}
        numeric = NumpyCodec.decode_input(given["numeric"])
        texts = StringCodec.decode_input(given["categorical"])
        categorical = np.array(texts, object).reshape(given["categorical"].shape)
        (probabilities,) = self.session.run(
            ["probabilities"], {"numeric": numeric, "categorical": categorical}
        )
        output = NumpyCodec.encode_output("predict_proba", probabilities)
        return InferenceResponse(model_name=self.name, outputs=[output])


def write() -> None:
    """Write what `mlserver start` reads."""
    folder = model.FOLDER / f"mlserver-{model.ENGINE}"
    folder.mkdir(exist_ok=True)
    own, parameters = (
        "mlserver_sklearn.SKLearnModel",
        {"uri": str(model.FOLDER / "pipeline.joblib")},
    )
    if model.ENGINE == "onnx":
        own, parameters = "benchmarks.serving.peers.mlserver_app.Onnx", {}
    settings = {"name": "bench", "implementation": own, "parameters": parameters}
    (folder / "model-settings.json").write_text(json.dumps(settings))
    # Inference in the server's own process: one worker, and nothing is sent between processes.
    (folder / "settings.json").write_text(
        json.dumps({"parallel_workers": 0, "debug": False, "metrics_endpoint": None})
    )


if __name__ == "__main__":
    write()
