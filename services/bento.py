"""What the BentoML services have in common: how BentoML is set up, and how a process serves.

BentoML brings builds, its own client and its documentation page; requests are answered by the
ASGI handler of `driftmill.serving.server`, mounted before BentoML's routes.

`DRIFTMILL_MODEL`, `DRIFTMILL_STORE` and `DRIFTMILL_HOME` say what is served from where.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress
from functools import cache, partial
from typing import Any

# Both send usage statistics unless told not to, and read this when they are imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")
# BentoML shares metrics between processes through files; these services are one process each.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import msgspec

from driftmill import home
from driftmill.serving.codec import JSON
from driftmill.serving.mount import Mount
from driftmill.serving.server import Request, Response, Server

#: Addresses that only this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: Makes an API of a method. Services take both from here, so that BentoML is set up before.
api: Any = bentoml.api
#: Makes a service of a class. BentoML's timeout keeps the state of every request for all that time,
#: so it is short; bodies that come slowly are refused before.
service: Any = partial(
    bentoml.service,
    workers=1,
    traffic={"timeout": 15},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)


@cache
def server() -> Server:
    """The server of this process."""
    model = os.environ.get("DRIFTMILL_MODEL")
    if not model:
        raise RuntimeError("no model to serve: set DRIFTMILL_MODEL to the contract's `model`")
    places = home.find()
    return Server(places.store, model, places.spool)


def mount(of: Any) -> None:
    """Put the server's handler before the routes of a service."""
    of.add_asgi_middleware(Mount, make=server)


async def predict(body: bytes, kind: str = JSON) -> dict[str, Any]:
    """The answer to a body of `POST /predict`."""
    response, _ = await server().predict(Request(body, server().new_id(), kind=kind))
    return content(response)


def content(response: Response) -> dict[str, Any]:
    """An answer as BentoML gives it on."""
    return msgspec.json.decode(response.body, type=dict[str, Any])


def main(of: Any, module: str, description: str, arguments: list[str] | None = None) -> None:
    """Serve a model until SIGTERM or SIGINT.

    Args:
        of: the service.
        module: how it is called: `python -m MODULE`.
        description: what `--help` says.
        arguments: of the command line; None takes the process's.
    """
    import uvicorn

    from services.drain import Drainer

    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("DRIFTMILL_MODEL"),
        required="DRIFTMILL_MODEL" not in os.environ,
        help="name of the model, as in its contract; default: $DRIFTMILL_MODEL",
    )
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        help="most that clients get to leave after SIGTERM; default: 20, and 0 on a loopback",
    )
    given = parser.parse_args(arguments)
    if given.drain_seconds is None:
        given.drain_seconds = 0.0 if given.host in LOOPBACK else 20.0
    os.environ["DRIFTMILL_MODEL"] = given.model
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    app = of.to_asgi()
    # First of all, before BentoML's layers: nothing of them is of use to these requests.
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls is not Mount]
    app = Mount(app, server)
    config = uvicorn.Config(
        app,
        host=given.host,
        port=given.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than clients and load balancers keep an idle connection: they close it, and never
        # send on one that is just being closed here.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    running = Drainer(config, given.drain_seconds, server().drain)
    with suppress(KeyboardInterrupt):
        running.run()
    if not running.started:
        sys.exit(1)
