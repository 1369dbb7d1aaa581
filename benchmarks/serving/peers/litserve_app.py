"""LitServe: `python -m benchmarks.serving.peers.litserve_app PORT`, batching where it helps."""

import sys
from typing import Any

import litserve  # type: ignore[import-not-found]

from benchmarks.serving.peers import model


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Requests that wait are joined."""

    def setup(self, device: str) -> None:
        """Get ready."""
        self.model = model.load()

    def decode_request(self, request: dict[str, Any]) -> Any:
        """The rows of a request."""
        return request["records"]

    def batch(self, inputs: list[Any]) -> tuple[list[Any], list[int]]:
        """The rows of several requests."""
        return [record for rows in inputs for record in rows], [len(rows) for rows in inputs]

    def predict(self, x: tuple[list[Any], list[int]]) -> tuple[list[Any], list[int]]:
        """Predict rows."""
        records, lengths = x
        return model.answer(self.model(records)), lengths

    def unbatch(self, output: tuple[list[Any], list[int]]) -> list[Any]:
        """The answers of each request."""
        answers, lengths = output
        taken = iter(answers)
        return [[next(taken) for _ in range(length)] for length in lengths]

    def encode_response(self, output: list[Any]) -> dict[str, Any]:
        """The answer of a request."""
        return {"predictions": output}


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(max_batch_size=64, batch_timeout=0.0),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
