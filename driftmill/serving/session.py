"""A model in ONNX Runtime: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime


class Session:
    """An ONNX model with the inputs `numeric` and `categorical` (either may be absent) and one
    output, `probabilities` (rows, labels) or `prediction` (rows,).

    Args:
        model: path of the `.onnx` file.
        threads: intra-op threads. One is fastest for small models, and leaves the other cores to
            other workers.
    """

    def __init__(self, model: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A spinning thread keeps a core busy between requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {i.name: i.type for i in self._session.get_inputs()}
        self.output = self._session.get_outputs()[0].name
        if not set(self.inputs) <= {"numeric", "categorical"} or self.output not in (
            "probabilities",
            "prediction",
        ):
            raise ValueError(
                f"not a Driftmill model: inputs {sorted(self.inputs)}, output {self.output!r}"
            )

    def run(self, numeric: np.ndarray, categorical: np.ndarray) -> np.ndarray:
        """Predict.

        Args:
            numeric: (rows, a) float32.
            categorical: (rows, b) object array of str.

        Returns:
            float32: (rows, labels) probabilities, or (rows,) predictions.
        """
        feed = {}
        if "numeric" in self.inputs:
            feed["numeric"] = numeric
        if "categorical" in self.inputs:
            feed["categorical"] = categorical
        result: np.ndarray = self._session.run([self.output], feed)[0]
        return result if self.output == "probabilities" else result.reshape(len(result))
