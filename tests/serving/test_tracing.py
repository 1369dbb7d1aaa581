"""The client's trace: which headers are valid, which spans follow, and what the log says."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.serving import tracing
from driftmill.serving.server import Server
from driftmill.serving.tracing import LINES, Lines, Tracing, TracingError, parent
from driftmill.store import Store
from tests.serving.test_explain import with_explain
from tests.serving.test_server import RECORD, go, predict, promote, running

MakeBundle = Callable[..., Manifest]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"

digits = st.text("0123456789abcdef", min_size=2, max_size=2)
traces = st.integers(1, 2**128 - 1).map(lambda n: f"{n:032x}")
spans = st.integers(1, 2**64 - 1).map(lambda n: f"{n:016x}")


@given(traces, spans, st.integers(0, 255))
def test_a_valid_parent_is_read(trace: str, span: str, flags: int) -> None:
    value = f"00-{trace}-{span}-{flags:02x}".encode()
    assert parent({b"traceparent": value}) == (trace, span, flags)
    assert parent({b"traceparent": b" " + value + b"\t"}) == (trace, span, flags)


@given(traces, spans, digits.filter(lambda v: v not in ("00", "ff")), st.text("-a", max_size=5))
def test_of_later_versions_what_is_known_is_read(
    trace: str, span: str, version: str, more: str
) -> None:
    value = f"{version}-{trace}-{span}-01"
    assert parent({b"traceparent": value.encode()}) == (trace, span, 1)
    assert parent({b"traceparent": f"{value}-{more}".encode()}) == (trace, span, 1)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}0",
        f"{PARENT}-00",
        f"ff{PARENT[2:]}",
        f"01{PARENT[2:]}.00",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        PARENT.replace("-", "_"),
    ],
)
def test_an_invalid_parent_is_none(value: str) -> None:
    assert parent({b"traceparent": value.encode()}) is None


@given(st.binary(max_size=80))
def test_no_header_raises(value: bytes) -> None:
    found = parent({b"traceparent": value})
    assert found is None or re.fullmatch("[0-9a-f]{32}", found[0])


@pytest.fixture
def kept() -> Iterator[tuple[Tracing, Any]]:
    """Spans that stay in memory."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    made = Tracing(provider)
    yield made, exporter
    made.stop()


def test_a_request_is_a_span_of_the_clients_trace(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    kept: tuple[Tracing, Any],
) -> None:
    manifest = make_bundle(of=with_explain(tiny, rate=1000))
    promote(store, manifest)
    made, exporter = kept

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            server.trace(made)
            headers = {"traceparent": PARENT, "tracestate": "a=1", "x-request-id": "my-request"}
            body = {"records": [RECORD, RECORD]}
            response = await client.post("/predict", json=body, headers=headers)
            wait, run, span = exporter.get_finished_spans()
            assert (wait.name, run.name) == ("wait for the batch", "run the model")
            assert span.name == "POST /predict"
            assert span.kind.name == "SERVER"
            assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == f"{TRACE}-{SPAN}"
            assert span.parent.is_remote
            assert span.context.trace_state.get("a") == "1"
            for child in (wait, run):
                assert child.parent.span_id == span.context.span_id
                assert child.context.trace_id == span.context.trace_id
                assert span.start_time <= child.end_time <= span.end_time
            assert wait.start_time <= wait.end_time == run.start_time <= run.end_time
            assert dict(span.attributes) == {
                "http.request.method": "POST",
                "http.route": "/predict",
                "http.response.status_code": 200,
                "url.path": "/predict",
                "url.scheme": "http",
                "network.protocol.version": "1.1",
                "server.address": "test",
                "client.address": "127.0.0.1",
                "user_agent.original": span.attributes["user_agent.original"],
                "driftmill.model": "tiny",
                "driftmill.version": manifest.version,
                "driftmill.role": "champion",
                "driftmill.rows": 2,
                "driftmill.request_id": "my-request",
            }
            assert dict(run.attributes) == {
                "driftmill.version": manifest.version,
                "driftmill.batch.rows": 2,
            }
            here = f"{span.context.span_id:016x}"
            assert response.headers["traceresponse"] == f"00-{TRACE}-{here}-01"

    go(check())


def test_spans_of_other_requests(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    kept: tuple[Tracing, Any],
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=1000)))
    made, exporter = kept

    def names() -> list[tuple[str, int, str]]:
        found = [
            (s.name, s.attributes["http.response.status_code"], s.status.status_code.name)
            for s in exporter.get_finished_spans()
            if s.kind.name == "SERVER"
        ]
        exporter.clear()
        return found

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            server.trace(made)
            await client.get("/livez")  # probes are no traces
            assert names() == []
            await client.post("/explain", json={"records": [RECORD]})
            await client.post("/feedback", json={"labels": []})
            await client.post("/v2/models/tiny/infer", json={"inputs": []})
            await client.post("/v2/models/tiny/versions/9/infer", json={"inputs": []})
            await client.post("/v2/models/other/infer", json={"inputs": []})
            assert names() == [
                ("POST /explain", 200, "UNSET"),
                ("POST /feedback", 422, "UNSET"),
                ("POST /v2/models/{model}/infer", 422, "UNSET"),
                ("POST /v2/models/{model}/versions/{version}/infer", 422, "UNSET"),
                ("POST", 404, "UNSET"),
            ]
            server.versions.serving = None
            response = await predict(client)
            assert response.status_code == 503
            assert names() == [("POST /predict", 503, "ERROR")]
            # What its client does not sample is not kept, and goes on under the same trace.
            headers = {"traceparent": PARENT[:-1] + "0"}
            response = await client.post("/predict", json={}, headers=headers)
            assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", response.headers["traceresponse"])
            assert names() == []
            # Without a valid parent a trace begins.
            response = await client.post("/predict", json={}, headers={"traceparent": "00-"})
            assert re.fullmatch(
                "00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", response.headers["traceresponse"]
            )
            (span,) = exporter.get_finished_spans()
            assert span.parent is None

    go(check())


def test_without_tracing_nothing_is_answered_about_it(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=1000)))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            body = {"records": [RECORD]}
            response = await client.post("/predict", json=body, headers={"traceparent": PARENT})
            assert response.status_code == 200
            assert "traceresponse" not in response.headers

    go(check())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "TRUE"}, False),
    ],
)
def test_who_asks_for_traces(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*tracing.ENDPOINTS, tracing.DISABLED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.wanted() is expected


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(TracingError, match="OTEL_EXPORTER_OTLP_PROTOCOL is grpc"):
        tracing.start("x")


def test_a_line_names_request_and_trace(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = make_bundle(of=with_explain(tiny, rate=1000))
    promote(store, manifest)
    caplog.set_level(logging.INFO, tracing.__name__)
    headers = {"traceparent": PARENT, "x-request-id": "my-request"}

    def lines() -> list[Any]:
        found = [r for r in caplog.records if r.name == tracing.__name__]
        caplog.clear()
        return found

    async def send(client: Any, path: str = "/predict", **more: Any) -> int:
        response = await client.post(path, headers=headers, **more)
        status: int = response.status_code
        return status

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            assert await send(client, json={"records": [RECORD]}) == 200
            assert await send(client, json={}) == 422
            assert lines() == []  # nothing that the service is to blame for
            server.lines.every = True
            assert await send(client, json={"records": [RECORD]}) == 200
            (line,) = lines()
            assert line.getMessage() == "POST /predict 200"
            assert (line.model, line.version) == ("tiny", manifest.version)
            assert (line.request_id, line.trace_id) == ("my-request", TRACE)
            assert (line.method, line.path, line.status) == ("POST", "/predict", 200)
            assert line.seconds > 0
            assert await send(client, "/v2/models/a%0AERROR b/infer", json={}) == 404
            (line,) = lines()
            assert "\n" not in line.getMessage()
            assert line.path == "/v2/models/a\\u000aERROR b/infer"
            server.lines.every = False
            server.versions.serving = None
            assert (await client.get("/readyz")).status_code == 503
            assert lines() == []  # a probe that does its work
            assert await send(client, json={"records": [RECORD]}) == 503
            (line,) = lines()
            assert line.levelno == logging.WARNING
            assert line.getMessage() == "POST /predict 503: No version of tiny is loaded yet"
            assert (line.request_id, line.trace_id) == ("my-request", TRACE)

    go(check())


def test_a_flood_of_errors_is_counted_not_written(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr("driftmill.serving.tracing.time.monotonic", lambda: now)
    lines = Lines("tiny")
    scope: dict[str, Any] = {"method": "POST", "path": "/predict", "headers": []}

    def refuse(times: int) -> list[str]:
        caplog.clear()
        for _ in range(times):
            lines.write(scope, 503, 0.1, "", "", "Too many requests wait", None)
        return [r.getMessage() for r in caplog.records]

    line = "POST /predict 503: Too many requests wait"
    assert refuse(LINES + 90) == [line] * LINES
    now = 6.0
    assert refuse(2) == [f"{line} (and 90 more before)", line]
    lines.every = True
    assert len(refuse(100)) == 100


def test_a_server_sends_what_is_left_when_it_stops(
    store: Store, tmp_path: Path, kept: tuple[Tracing, Any]
) -> None:
    made, exporter = kept

    async def check() -> None:
        server = Server(store, "tiny", tmp_path / "spool")
        server.trace(made)
        await server.start()
        await server.stop()

    go(check())
    assert exporter._stopped
