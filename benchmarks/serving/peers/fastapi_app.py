"""FastAPI: `uvicorn benchmarks.serving.peers.fastapi_app:app`.

`BENCH_INLINE` makes the handler `async`, so that the model runs on the event loop. FastAPI's
documentation says `def` for what blocks; for a model of some microseconds inline is faster.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, create_model

from benchmarks.serving.peers import model

Record: Any = create_model("Record", **model.FIELDS)


class Request(BaseModel):
    """Rows to predict."""

    records: list[Record]


class Prediction(BaseModel):
    """Of a row."""

    prediction: str
    probabilities: list[float]


class Response(BaseModel):
    """Of all rows."""

    predictions: list[Prediction]


predict = model.load()
app = FastAPI()


def _response(request: Request) -> Response:
    answers = model.answer(predict([vars(record) for record in request.records]))
    return Response(predictions=[Prediction(**a) for a in answers])


if os.environ.get("BENCH_INLINE"):

    @app.post("/predict")
    async def inline(request: Request) -> Response:
        """On the event loop."""
        return _response(request)

else:

    @app.post("/predict")
    def in_threads(request: Request) -> Response:
        """In FastAPI's pool of threads."""
        return _response(request)
