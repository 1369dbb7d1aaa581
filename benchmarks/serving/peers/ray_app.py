"""Ray Serve: `python -m benchmarks.serving.peers.ray_app PORT`, one replica that joins requests."""

from __future__ import annotations

import sys
from typing import Any

import ray  # type: ignore[import-not-found]
from ray import serve
from starlette.requests import Request

from benchmarks.serving.peers import model


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
class Service:
    """Requests that wait are joined."""

    def __init__(self) -> None:
        self.model = model.load()

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=64, batch_wait_timeout_s=0.0
    )
    async def predict(self, requests: list[list[Any]]) -> list[list[Any]]:
        """Predict the rows of several requests."""
        answers = iter(model.answer(self.model([row for rows in requests for row in rows])))
        return [[next(answers) for _ in rows] for rows in requests]

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer a request."""
        rows = (await request.json())["records"]
        return {"predictions": await self.predict(rows)}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Service.bind(), blocking=True)  # type: ignore[attr-defined]
