"""KServe: a model of our own on its server, `python -m benchmarks.serving.peers.kserve_app`."""

from __future__ import annotations

from typing import Any

import kserve  # type: ignore[import-not-found]

from benchmarks.serving.peers import model


class Model(kserve.Model):  # type: ignore[misc]
    """Answers protocol v1."""

    def load(self) -> bool:
        """Get ready."""
        self.model = model.load()
        self.ready = True
        return True

    def predict(self, payload: dict[str, Any], headers: Any = None) -> dict[str, Any]:
        """Predict rows."""
        return {"predictions": model.answer(self.model(payload["instances"]))}


if __name__ == "__main__":
    served = Model("bench")
    served.load()
    kserve.ModelServer().start([served])
