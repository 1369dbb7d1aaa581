"""A model in ONNX Runtime: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

_TABLE = ("numeric", "categorical")


class Session:
    """An ONNX model with the inputs `numeric` and `categorical` (either may be absent), or `image`,
    and the output `probabilities` (rows, labels) or `prediction` (rows,). A model of images has a
    second output, `embedding` (rows, width).

    Args:
        model: path of the `.onnx` file.
        threads: intra-op threads. One is fastest for models of tables, and leaves the other cores
            to other workers; models of images gain from all.
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
        self._run_options = onnxruntime.RunOptions()
        self.inputs = {i.name: i.type for i in self._session.get_inputs()}
        outputs = [o.name for o in self._session.get_outputs()]
        self.output = outputs[0]
        self.embeds = outputs[1:] == ["embedding"]
        known = [*_TABLE] if "image" not in self.inputs else ["image"]
        if (
            not set(self.inputs) <= set(known)
            or self.output not in ("probabilities", "prediction")
            or outputs[1:] not in ([], ["embedding"])
        ):
            raise ValueError(
                f"not a Driftmill model: inputs {sorted(self.inputs)}, outputs {outputs}"
            )
        #: Names of the arrays that `run` takes, in order.
        self.names = tuple(known)

    def run(self, *arrays: np.ndarray) -> np.ndarray:
        """Predict.

        Args:
            arrays: as `features.arrays` makes them: `numeric` (rows, a) float32 and `categorical`
                (rows, b) object array of str, or `image` (rows, channels, height, width) uint8.

        Returns:
            float32: (rows, labels) probabilities, or (rows,) predictions.
        """
        feed = self._feed(arrays)
        result: np.ndarray = self._session.run([self.output], feed, self._run_options)[0]
        return result if self.output == "probabilities" else result.reshape(len(result))

    def embed(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict and embed, for a model that `embeds`.

        Returns:
            (rows, labels) probabilities and (rows, width) embeddings, float32.
        """
        feed, both = self._feed(arrays), [self.output, "embedding"]
        answer, embedding = self._session.run(both, feed, self._run_options)
        return answer, embedding

    def stop(self) -> None:
        """End what runs just now, in any thread, at its next operator; all later runs fail, too."""
        self._run_options.terminate = True

    def _feed(self, arrays: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        named = zip(self.names, arrays, strict=True)
        return {name: array for name, array in named if name in self.inputs}
