"""What runs in the client's pod, with the image of pipeline steps: it asks services as their users
do. `python3 -c CODE NAME JSON` calls a function below with the JSON's values and prints what it
returns."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Seconds to wait for what must come, and between two looks.
PATIENCE, AGAIN = 300.0, 0.2


def bucket(name: str) -> str:
    """Make a bucket in the store."""
    import botocore.session

    botocore.session.get_session().create_client("s3").create_bucket(Bucket=name)
    return name


def ask(url: str, token: str, body: Any = None) -> Any:
    """The JSON that a URL answers to whoever has a token."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, content, headers)
    return json.load(urllib.request.urlopen(request, timeout=10))


def until(holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `holds` returns, as soon as it is true; connections that fail count as false."""
    end = time.monotonic() + seconds
    problem = "it never was true"
    while time.monotonic() < end:
        try:
            if found := holds():
                return found
        except (OSError, urllib.error.URLError) as error:
            problem = str(error)
        time.sleep(AGAIN)
    raise SystemExit(f"after {seconds:.0f} s: {problem}")


def predicted(url: str, token: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first answer to these records, and when it came."""
    answer = until(lambda: ask(f"{url}/predict", token, {"records": list(records)}))
    return {"at": time.time(), "answer": answer}


def serving(addresses: Sequence[str], token: str, version: str) -> float:
    """When all of these services serve a version."""
    until(lambda: all(ask(f"{a}/model", token)["version"] == version for a in addresses))
    return time.time()


def reachable(host: str, port: int) -> bool:
    """Wait until a connection is let through."""

    def connects() -> bool:
        socket.create_connection((host, port), timeout=3).close()
        return True

    return bool(until(connects, 60))


def replayed(
    url: str, tokens: dict[str, str], contract: str, rate: float, batch: int, first: int = 0
) -> dict[str, Any]:
    """Send a contract's stream from a row on, with labels, until the input ends."""
    from driftmill import contract as contracts
    from driftmill.data import sources
    from driftmill.replay import ReplayResult, replay

    path = Path("/tmp/contract.yaml")
    path.write_text(contract)
    document = contracts.load(path)
    rows = sources.stream(document).iloc[first:]

    async def send() -> ReplayResult:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        ended = loop.run_in_executor(None, sys.stdin.read)
        ended.add_done_callback(lambda _: stop.set())
        began = False

        def progress(result: ReplayResult) -> None:
            nonlocal began
            if not began and result.sent:
                began = True
                print("began", flush=True)

        found = await replay(
            rows,
            url,
            contract=document,
            rate=rate,
            batch=batch,
            label_delay=0.5,
            on_progress=progress,
            stop_event=stop,
            token=tokens["predict"],
            feedback_token=tokens["feedback"],
        )
        if not stop.is_set():
            raise SystemExit("the stream ended before it was told to")
        return found

    found = asyncio.run(send())
    return {
        "sent": found.sent,
        "failed": found.failed,
        "labelled": found.labelled,
        "labels_failed": found.labels_failed,
        "errors": dict(found.errors),
        "versions": dict(found.versions),
        "answers": [[answer.at, first + answer.row] for answer in found.answers[:: max(1, batch)]],
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
