"""BentoML: `bentoml serve benchmarks.serving.peers.bentoml_app:Service`, `:Inline`, `:Batching`.

BentoML's documentation says `def` for what computes, and runs that in threads; for a model of some
microseconds `async def`, on the event loop, is faster.
"""

from __future__ import annotations

from typing import Any

import bentoml
from pydantic import BaseModel, create_model

from benchmarks.serving.peers import model

Record: Any = create_model("Record", **model.FIELDS)


class Prediction(BaseModel):
    """Of a row."""

    prediction: str
    probabilities: list[float]


class Response(BaseModel):
    """Of all rows."""

    predictions: list[Prediction]


quick: dict[str, Any] = {"workers": 1, "logging": {"access": {"enabled": False}}}


@bentoml.service(**quick)
class Service:
    """One request at a time."""

    def __init__(self) -> None:
        self.model = model.load()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    def predict(self, records: list[Record]) -> Response:
        """Predict rows."""
        answers = model.answer(self.model([vars(record) for record in records]))
        return Response(predictions=[Prediction(**a) for a in answers])


@bentoml.service(**quick)
class Inline:
    """One request at a time, on the event loop."""

    def __init__(self) -> None:
        self.model = model.load()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, records: list[Record]) -> Response:
        """Predict rows."""
        answers = model.answer(self.model([vars(record) for record in records]))
        return Response(predictions=[Prediction(**a) for a in answers])


@bentoml.service(**quick)
class Batching:
    """Requests that wait are joined."""

    def __init__(self) -> None:
        self.model = model.load()

    @bentoml.api(  # type: ignore[untyped-decorator]
        route="/predict", batchable=True, max_batch_size=512, max_latency_ms=1000
    )
    def predict(self, records: list[Record]) -> list[Prediction]:
        """Predict rows."""
        answers = model.answer(self.model([vars(record) for record in records]))
        return [Prediction(**a) for a in answers]
