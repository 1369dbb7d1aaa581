"""Checks a running service as a client would: `python -m services.check URL`.

It predicts a record that the model's own schema makes up, gives feedback, reads metrics, and tries
what must be shut. `helm test` runs it in the cluster; with the addresses of `driftmill status` it
checks a laptop. Where the service asks for tokens it needs those of all four rights, and tries
whether one without is turned away.

The record is marked `driftmill-check` in the inference log. The label that it gives is of a
prediction that nobody has made, so that it is taken, and teaches nothing.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import math
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

#: Seconds between two looks at what is not yet as it must be.
_AGAIN = 0.5
#: Seconds in which a connection that must not come about has to fail.
_PATIENCE = 3.0
#: Name of the record, and the id of a prediction that is never made.
_ID, _NOBODY = "driftmill-check", "0" * 26

_EPILOG = """\
Example: python -m services.check http://127.0.0.1:3000 --monitor http://127.0.0.1:3001
exit codes: 0 all is well, 1 something is not, 2 wrong usage
"""


class Failed(Exception):
    """What is not as it must be."""


class Peer:
    """One connection to one process, whatever stands behind the address: what was counted by one
    must be asked of the same.

    Args:
        url: `http://HOST:PORT`.
        timeout: seconds for an answer.
        tokens: folder with a file of tokens for each right; None: none is sent.
    """

    def __init__(self, url: str, timeout: float, tokens: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise Failed(f"{url} is no http:// address")
        self.url = url.rstrip("/")
        self._base = parts.path.rstrip("/")
        self._tokens = tokens
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        right: str | None = None,
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer. Raises Failed where there is none.

        Args:
            method: of the request.
            path: what is asked.
            body: sent as JSON; None: nothing is.
            headers: further ones.
            right: whose token is sent, where there are tokens.
        """
        content = None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if content else {}
        if self._tokens is not None and right is not None:
            given["Authorization"] = f"Bearer {token(self._tokens, right)}"
        try:
            self._connection.request(method, self._base + path, content, given | (headers or {}))
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Failed(f"{self.url} does not answer: {error}") from None
        return response.status, answer, {k.lower(): v for k, v in response.getheaders()}

    def get(self, path: str, right: str) -> bytes:
        """The body of an answer with status 200."""
        status, body, _ = self.ask("GET", path, right=right)
        if status != 200:
            raise Failed(f"{self.url}{path} answers {status}: {_text(body)}")
        return body


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, say how each went, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m services.check",
        description="Check a running service: predict, give feedback, read metrics.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("service", metavar="URL", help="the service, http://HOST:PORT")
    parser.add_argument(
        "--tokens",
        metavar="FOLDER",
        type=Path,
        help="files of tokens, as the service has them; it must ask for them",
    )
    parser.add_argument("--monitor", metavar="URL", help="the monitor, to be checked, too")
    parser.add_argument("--controller", metavar="URL", help="the controller, to be checked, too")
    parser.add_argument(
        "--closed",
        metavar="HOST:PORT",
        action="append",
        default=[],
        help="what must not be reached from here; may be given again",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for everything (60)"
    )
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.timeout
    checks: list[tuple[str, Callable[[], str]]] = [
        ("service", lambda: _service(options.service, options.tokens, until))
    ]
    if options.monitor:
        checks.append(("monitor", lambda: _monitor(options.monitor, until)))
    if options.controller:
        checks.append(("controller", lambda: _controller(options.controller, until)))
    for address in options.closed:
        checks.append(("closed", lambda address=address: _closed(address, until)))  # type: ignore[misc]
    failed = False
    for name, check in checks:
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Failed as error:
            failed = True
            print(f"FAILED  {name}: {error}", flush=True)
    return int(failed)


def _service(url: str, tokens: Path | None, until: float) -> str:
    peer = _ready(url, until, tokens)
    about = json.loads(peer.get("/model", "admin"))
    versions = {v for v in (about["version"], about["challenger"]) if v}
    signature = about["schema"]
    before = _counted(peer)
    status, body, headers = peer.ask(
        "POST", "/predict", {"records": [record(signature)]}, {"X-Request-Id": _ID}, "predict"
    )
    if status != 200:
        raise Failed(f"/predict answers {status}: {_text(body)}")
    answer = json.loads(body)
    version = answer["version"]
    if version not in versions or headers.get("x-model-version") != version:
        raise Failed(f"/predict is answered by {version}, and {', '.join(sorted(versions))} serves")
    (prediction,) = answer["predictions"]
    value = prediction["prediction"]
    if signature["labels"]:
        if value not in signature["labels"] or not 0 <= prediction["score"] <= 1:
            raise Failed(f"/predict answers {value!r} with the score {prediction['score']}")
    elif not isinstance(value, int | float) or not math.isfinite(value):
        raise Failed(f"/predict answers {value!r}, which is no number")
    label = {"labels": [{"id": _NOBODY, "label": value}]}
    status, body, _ = peer.ask("POST", "/feedback", label, right="feedback")
    if status != 200 or json.loads(body) != {"accepted": 1}:
        raise Failed(f"/feedback answers {status}: {_text(body)}")
    if _counted(peer) <= before:
        raise Failed("/metrics does not count the request (model_requests_total)")
    says = f"{answer['model']} {version} predicts {value!r}, takes feedback, counts it"
    if tokens is None:
        return says
    status, _, _ = peer.ask("POST", "/predict", {})
    if status != 401:
        raise Failed(f"POST /predict without a token answers {status}; 401 is expected")
    return f"{says}, turns away who has no token"


def _counted(peer: Peer) -> float:
    """Predictions that this process has given."""
    return _metric(peer.get("/metrics", "metrics"), "model_requests_total", code="200") or 0.0


def _monitor(url: str, until: float) -> str:
    peer = _ready(url, until)
    name = "model_drift_last_success_timestamp_seconds"
    if not _metric(peer.get("/metrics", "metrics"), name):
        raise Failed(f"/metrics has no {name}: it has not read the log yet")
    return "reads the log"


def _controller(url: str, until: float) -> str:
    peer = _ready(url, until)
    if _metric(peer.get("/metrics", "metrics"), "retrain_run_active") is None:
        raise Failed("/metrics has no retrain_run_active")
    status, _, _ = peer.ask("POST", "/alerts", {})
    if status != 401:
        raise Failed(f"POST /alerts without a token answers {status}; 401 is expected")
    return "is ready, and takes no alert without a token"


def _closed(address: str, until: float) -> str:
    """A policy reaches a new pod only after some moments, so it may be tried again."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4]
    except (OSError, ValueError) as error:
        raise Failed(f"{address} is no address: {error}") from None
    place = str(found[0]), int(found[1])
    while True:
        try:
            socket.create_connection(place, _PATIENCE).close()
        except OSError:
            return f"{address} cannot be reached"
        if time.monotonic() > until:
            raise Failed(
                f"{address} can be reached, and must not be: are network policies applied?"
            )
        time.sleep(_AGAIN)


def _ready(url: str, until: float, tokens: Path | None = None) -> Peer:
    """A connection to what is ready, once it is."""
    peer = Peer(url, 10.0, tokens)
    while True:
        try:
            status, body, _ = peer.ask("GET", "/readyz")
            problem = "" if status == 200 else f"{url} is not ready: {_text(body)}"
        except Failed as error:
            problem = str(error)
        if not problem:
            return peer
        if time.monotonic() > until:
            raise Failed(problem)
        time.sleep(_AGAIN)


def record(signature: dict[str, Any]) -> dict[str, Any]:
    """A valid record, by `schema` of `GET /model`: of each column the first category, or a number
    in the middle of its range."""
    made: dict[str, Any] = {"_id": _ID}
    if signature["image"] is not None:
        height, width = signature["image"]["size"]
        return made | {"image": base64.b64encode(_png(width, height)).decode()}
    for column in signature["columns"]:
        low, high = column["min"], column["max"]
        if column["type"] == "category":
            value: Any = column["categories"][0] if column["categories"] else "check"
        elif column["type"] == "bool":
            value = True
        else:
            known = [bound for bound in (low, high) if bound is not None] or [1.0]
            value = sum(known) / len(known)
            if column["type"] == "int":
                value = math.ceil(value) if low is not None else math.floor(value)
        made[column["name"]] = value
    return made


def _png(width: int, height: int) -> bytes:
    """A grey image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes((x + y) % 256 for x in range(width)) for y in range(height))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _metric(text: bytes, name: str, **labels: str) -> float | None:
    """Sum of a metric's series with these labels; None where there is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else None


def token(tokens: Path, right: str) -> str:
    """A right's token in a folder of tokens; where its file has two, the last, which is newer."""
    path = tokens / right
    try:
        return path.read_text().split()[-1]
    except (OSError, IndexError) as error:
        raise Failed(f"{path} has no token: {error}") from None


def _text(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:300]


if __name__ == "__main__":
    sys.exit(main())
