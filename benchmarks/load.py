"""Sends predictions over kept connections and counts what became of each: nothing is tried twice.

One file without dependencies, so that it also runs inside a pod of the service image:

    python -m benchmarks.load http://127.0.0.1:3000 --requests 100000
    kubectl exec -i POD -- python3 - http://SERVICE:3000 --until /tmp/stop < benchmarks/load.py

It prints one JSON object: requests sent and answered with 200, failures by kind, answers by
version, latency in milliseconds, requests a second. Exit code 1 where a request failed. `--tokens`
names a folder with files of tokens, where the service asks for them: `predict`, and `admin`, whose
right `/model` takes. With `--expect` an answer whose score is not that of the version it names has
failed, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: Seconds after which a request has failed.
TIMEOUT = 10.0
#: Scores that differ by no more than this are the same.
TOLERANCE = 1e-6


@dataclass
class Count:
    """What became of the requests."""

    sent: int = 0
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    connections: int = 0
    expected: dict[str, float] = field(default_factory=dict)
    """Score of the first record, by version; empty: not looked at."""

    def answered(self, body: bytes) -> None:
        """Count an answer with status 200."""
        answer = json.loads(body)
        version = answer["version"]
        if self.expected:
            wanted, score = self.expected.get(version), answer["predictions"][0]["score"]
            # Batches of other sizes add up in another order.
            if wanted is None or abs(score - wanted) > TOLERANCE:
                self.failed[f"not the answer of {version}"] += 1
                return
        self.ok += 1
        self.versions[version] += 1

    def report(self, took: float) -> dict[str, Any]:
        """As plain values."""
        ordered = sorted(self.seconds) or [0.0]

        def quantile(share: float) -> float:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

        return {
            "sent": self.sent,
            "ok": self.ok,
            "failed": dict(self.failed),
            "versions": dict(self.versions),
            "connections": self.connections,
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
            "max_ms": quantile(1.0),
            "seconds": round(took, 1),
            "requests_per_s": round(self.ok / max(took, 1e-9)),
        }


async def client(address: tuple[str, int], request: bytes, count: Count, go_on: Any) -> None:
    """Send one request after the other; a new connection only where the server closes the old."""
    while go_on():
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError as error:
            count.sent += 1
            count.failed[f"connect: {type(error).__name__}"] += 1
            await asyncio.sleep(0.05)
            continue
        count.connections += 1
        try:
            while go_on():
                began = time.perf_counter()
                count.sent += 1
                async with asyncio.timeout(TIMEOUT):
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    body = await reader.readexactly(_length(head))
                count.seconds.append(time.perf_counter() - began)
                status = head[9:12].decode()
                if status == "200":
                    count.answered(body)
                else:
                    count.failed[f"status {status}"] += 1
                if b"\r\nconnection: close" in head.lower():
                    break
        except (OSError, asyncio.IncompleteReadError) as error:
            count.failed[type(error).__name__] += 1
        finally:
            writer.close()


def _length(head: bytes) -> int:
    """The content length that an answer's head names."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise OSError("an answer without a length")


async def drive(
    url: str,
    body: bytes,
    requests: int,
    connections: int,
    until: Path | None,
    expected: dict[str, float],
    headers: dict[str, str],
) -> dict[str, Any]:
    """Send at least so many requests and, where `until` names a file, until it is there."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = (
        f"POST {parts.path.rstrip('/')}/predict HTTP/1.1\r\nhost: {host}\r\n{more}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    count = Count(expected=expected)
    stop = False

    def go_on() -> bool:
        return not stop and (until is not None or count.sent < requests)

    async def watch(file: Path) -> None:
        nonlocal stop
        while count.sent < requests or not file.exists():
            await asyncio.sleep(0.1)
        stop = True

    began = time.perf_counter()
    clients = [client((host, port), request, count, go_on) for _ in range(connections)]
    await asyncio.gather(*clients, *([watch(until)] if until is not None else []))
    return count.report(time.perf_counter() - began)


def bearer(tokens: Path | None, right: str) -> dict[str, str]:
    """The header that gives a right; none without tokens."""
    from services import check

    return {} if tokens is None else {"authorization": f"Bearer {check.token(tokens, right)}"}


def record(url: str, tokens: Path | None) -> dict[str, Any]:
    """A record that the service takes, by its own schema."""
    from services import check

    request = urllib.request.Request(f"{url.rstrip('/')}/model", headers=bearer(tokens, "admin"))  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
        made: dict[str, Any] = check.record(json.load(answer)["schema"])
    return made


def main() -> int:
    """Drive, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="Send predictions and count what becomes of them.")
    parser.add_argument("url", help="the service")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="send at least N")
    parser.add_argument("--connections", type=int, default=8, metavar="N", help="clients (8)")
    parser.add_argument("--until", type=Path, metavar="FILE", help="go on until this file is there")
    parser.add_argument("--records", type=int, default=1, metavar="N", help="in a request (1)")
    parser.add_argument(
        "--expect", type=json.loads, default={}, metavar="JSON", help="score of each version"
    )
    parser.add_argument("--tokens", type=Path, metavar="FOLDER", help="files of tokens")
    options = parser.parse_args()
    try:
        import uvloop

        loop = uvloop.new_event_loop
    except ImportError:
        loop = asyncio.new_event_loop
    made = record(options.url, options.tokens)
    body = json.dumps({"records": [made] * options.records}).encode()
    with asyncio.Runner(loop_factory=loop) as runner:
        found = runner.run(
            drive(
                options.url,
                body,
                options.requests,
                options.connections,
                options.until,
                options.expect,
                bearer(options.tokens, "predict"),
            )
        )
    print(json.dumps(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
