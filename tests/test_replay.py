"""Tests of sending rows as traffic, against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill import contract, replay
from driftmill.contract import Contract
from driftmill.features import ID, TIME
from tests.conftest import CONTRACT, tiny_frame

TINY = contract.parse(CONTRACT)


class Server(ThreadingHTTPServer):
    """Answers as the service does and remembers what it was asked, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []
        self.tokens: set[tuple[str, str | None]] = set()
        """Paths, and what was sent with requests to them."""
        self.failing: set[int] = set()
        """Numbers of the `/predict` requests that are answered with 503."""
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.tokens.add((self.path, self.headers["authorization"]))
        status = 200
        answer: dict[str, Any] = {}
        if self.path == "/feedback":
            self.server.labels += body["labels"]
            answer = {"accepted": len(body["labels"])}
        else:
            number, self.server.requests = self.server.requests, self.server.requests + 1
            if number in self.server.failing:
                status, answer = 503, {"error": {"message": "the log is full"}}
            else:
                first = len(self.server.asked)
                self.server.asked += body["records"]
                predictions = [
                    {"id": f"p{first + i}", "prediction": "no", "score": 0.25}
                    for i in range(len(body["records"]))
                ]
                answer = {"model": "tiny", "version": "v1", "predictions": predictions}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def send(rows: pd.DataFrame, url: str, **settings: Any) -> replay.ReplayResult:
    settings = {"contract": TINY, "rate": 5000.0, "label_delay": 0.0, **settings}
    return asyncio.run(replay.replay(rows, url, **settings))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, (None, None)),
        ({"token": "a"}, ("Bearer a", "Bearer a")),
        ({"token": "a", "feedback_token": "b"}, ("Bearer a", "Bearer b")),
    ],
)
def test_tokens_are_sent(
    server: Server, given: dict[str, str], sent: tuple[str | None, str | None]
) -> None:
    assert send(tiny_frame(3), server.url, **given).ok
    assert server.tokens == {("/predict", sent[0]), ("/feedback", sent[1])}


@pytest.mark.parametrize("batch", [1, 7, None])
def test_rows_and_labels_arrive_in_order(server: Server, batch: int | None) -> None:
    rows = tiny_frame(100).assign(**{ID: [f"r{i}" for i in range(100)]})
    result = send(rows, server.url, batch=batch)
    assert [r["_id"] for r in server.asked] == list(rows[ID])
    assert [(label["id"], label["label"]) for label in server.labels] == [
        (f"p{i}", label) for i, label in enumerate(rows["fraud"])
    ]
    assert (result.sent, result.failed, result.labelled) == (100, 0, 100)
    assert result.ok
    assert result.versions == {"v1": 100}
    assert [a.row for a in result.answers] == list(range(100))
    assert result.answers[0].label == rows["fraud"][0]
    assert result.answers[0].score == 0.25


def test_labels_that_are_not_yet_due_are_sent_at_the_end(server: Server) -> None:
    result = send(tiny_frame(50), server.url, label_delay=3600.0)
    assert result.labelled == len(server.labels) == 50


def test_no_labels_are_sent_without_a_delay(server: Server) -> None:
    result = send(tiny_frame(20), server.url, label_delay=None)
    assert result.labelled == len(server.labels) == 0


def test_missing_labels_are_not_sent(server: Server) -> None:
    rows = tiny_frame(10)
    rows.loc[[2, 3], "fraud"] = None
    result = send(rows, server.url)
    assert result.labelled == 8
    assert result.answers[2].label is None
    assert send(rows.drop(columns="fraud"), server.url).labelled == 0


def test_a_failed_request_is_counted_and_the_rest_goes_on(server: Server) -> None:
    server.failing = {1, 3}
    result = send(tiny_frame(30), server.url, batch=5)
    assert (result.sent, result.failed, result.labelled) == (20, 10, 20)
    assert not result.ok
    assert list(result.errors.values()) == [2]
    assert "503" in next(iter(result.errors))
    assert "the log is full" in next(iter(result.errors))
    assert [a.row for a in result.answers] == [*range(5), *range(10, 15), *range(20, 30)]


def test_a_service_that_is_not_there_is_counted_and_not_raised() -> None:
    result = send(tiny_frame(3), "http://127.0.0.1:9", batch=1)
    assert (result.sent, result.failed) == (0, 3)
    assert "ConnectError" in next(iter(result.errors))


def test_a_stop_ends_it_and_gives_the_labels_of_what_was_sent(server: Server) -> None:
    async def run() -> replay.ReplayResult:
        stop = asyncio.Event()

        def progress(result: replay.ReplayResult) -> None:
            if result.sent >= 10:
                stop.set()

        return await replay.replay(
            tiny_frame(1000),
            server.url,
            contract=TINY,
            rate=1000.0,
            batch=1,
            label_delay=3600.0,
            on_progress=progress,
            stop_event=stop,
        )

    result = asyncio.run(run())
    assert result.sent == result.labelled == len(server.asked) == 10


@given(
    st.lists(
        st.tuples(
            st.floats(allow_infinity=False, width=32),
            st.one_of(st.none(), st.integers(-(2**24), 2**24)),
            st.one_of(st.none(), st.text()),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_records_are_json_of_the_contracts_types(values: list[tuple[Any, Any, Any]]) -> None:
    rows = pd.DataFrame(
        {
            "amount": np.array([v[0] for v in values], dtype=np.float64),
            "age": np.array([np.nan if v[1] is None else v[1] for v in values], dtype=np.float64),
            "channel": pd.Series([v[2] for v in values], dtype=object),
        }
    )
    for record, (amount, age, channel) in zip(replay.records(rows, TINY), values, strict=True):
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert record["amount"] == (None if np.isnan(amount) else amount)
        assert record["age"] == age
        assert isinstance(record["age"], int | None)
        assert record["channel"] == channel


def test_times_booleans_and_numeric_labels() -> None:
    document = regression()
    rows = pd.DataFrame({"open": [1.0, 0.0], "price": [2.5, np.nan]})
    rows[TIME] = pd.to_datetime(pd.Series(["2011-01-01T05:00:00Z", None]))
    first, second = replay.records(rows, document)
    assert first == {"open": True, "_time": "2011-01-01T05:00:00+00:00"}
    assert second == {"open": False}
    assert replay.label_values(rows, document) == [2.5, None]


def regression() -> Contract:
    return contract.parse(
        """
        apiVersion: driftmill/v1
        model: shop
        task: regression
        data:
          source: sim:payments
          target: price
          columns: [{name: open, type: bool}]
        """
    )
