"""The BentoML service of a tabular model.

BentoML brings builds, its own client and its documentation page; requests are answered by the
ASGI handler of `driftmill.serving.server`, mounted before BentoML's routes.

    python -m services.tabular --model payments --port 3000       # one process, fastest
    DRIFTMILL_MODEL=payments bentoml serve services.tabular:Service
    bentoml build -f services/bentofile.yaml .

`DRIFTMILL_MODEL`, `DRIFTMILL_STORE` and `DRIFTMILL_HOME` say what is served from where.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import cache
from typing import Any

# Both send usage statistics unless told not to, and read this when they are imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")
# BentoML shares metrics between processes through files; this service is one process.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import msgspec

from driftmill import home
from driftmill.serving.server import Mount, Server


@cache
def server() -> Server:
    """The server of this process."""
    model = os.environ.get("DRIFTMILL_MODEL")
    if not model:
        raise RuntimeError("no model to serve: set DRIFTMILL_MODEL to the contract's `model`")
    places = home.find()
    return Server(places.store, model, places.spool)


# BentoML's timeout keeps the state of every request for all that time, so it is short; bodies that
# come slowly are refused before.
@bentoml.service(
    name="driftmill-tabular",
    workers=1,
    traffic={"timeout": 15},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Service:
    """A tabular model, for BentoML's client; over HTTP the handler answers the same routes."""

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Predict one record or many."""
        response, _ = await server().predict(msgspec.json.encode({"records": records}))
        return msgspec.json.decode(response.body, type=dict[str, Any])

    @bentoml.api(route="/feedback")  # type: ignore[untyped-decorator]
    async def feedback(self, labels: list[dict[str, Any]]) -> dict[str, Any]:
        """Give labels of earlier predictions, by id."""
        response = server().feedback(msgspec.json.encode({"labels": labels}))
        return msgspec.json.decode(response.body, type=dict[str, Any])


_service: Any = Service
_service.add_asgi_middleware(Mount, make=server)


def main(arguments: list[str] | None = None) -> None:
    """Serve a model until SIGTERM or SIGINT."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m services.tabular", description=__doc__)
    parser.add_argument("--model", required=True, help="name of the model, as in its contract")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--host", default="127.0.0.1")
    given = parser.parse_args(arguments)
    os.environ["DRIFTMILL_MODEL"] = given.model
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    app = _service.to_asgi()
    # BentoML puts its tracing before ours; nothing of it is of use to these requests.
    app.user_middleware.sort(key=lambda layer: layer.cls is not Mount)
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=30,
    )


if __name__ == "__main__":
    main()
