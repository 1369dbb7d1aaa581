"""Traces and logs of service processes: spans reach a collector, and each line is what it says."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from driftmill.bundle import Manifest
from driftmill.store import Store
from services import telemetry
from tests.services.test_tabular import MODULE, RECORD, ROOT, promote, service

MakeBundle = Callable[..., Manifest]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "my-request"}
BODY = {"records": [RECORD]}


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A receiver of OTLP over HTTP: its URL, and the (resource, span) pairs that have come."""
    message = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            sent = message.ExportTraceServiceRequest.FromString(body)
            for resource in sent.resource_spans:
                named = attributes(resource.resource)
                for scope in resource.scope_spans:
                    spans.extend((named, span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(of: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}


def command(*flags: str) -> list[str]:
    return [*MODULE[:-1], *flags, MODULE[-1]]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    # OpenTelemetry alone would wait for half a minute for a collector that does not answer.
    process.wait(20)


@pytest.mark.slow
def test_spans_reach_the_collector(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> None:
    manifest = make_bundle()
    promote(store, manifest)
    with (
        collector() as (url, spans),
        service(store, tmp_path, command("--otlp", url)) as (process, address),
    ):
        response = httpx.post(f"{address}/predict", json=BODY, headers=HEADERS)
        assert response.status_code == 200
        httpx.post(f"{address}/predict", json={}, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
        assert httpx.post(f"{address}/explain", json=BODY).status_code == 200
        httpx.get(f"{address}/metrics")
        stop(process)
        found = {span.name: span for _, span in spans}
        assert sorted(found) == [
            "POST /explain",
            "POST /predict",
            "run the model",
            "wait for the batch",
        ]
        assert len(spans) == 4
        assert {resource["service.name"] for resource, _ in spans} == {"driftmill"}
        span = found["POST /predict"]
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
        assert response.headers["traceresponse"] == f"00-{TRACE}-{span.span_id.hex()}-01"
        assert attributes(span)["driftmill.version"] == manifest.version
        assert attributes(span)["driftmill.request_id"] == "my-request"
        assert found["run the model"].parent_span_id == span.span_id


@pytest.mark.slow
def test_a_collector_that_does_not_answer_harms_nobody(
    store: Store, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    promote(store, make_bundle())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with service(store, tmp_path) as (process, address):
            for _ in range(20):
                response = httpx.post(f"{address}/predict", json=BODY, headers=HEADERS)
                assert response.status_code == 200
            stop(process)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_each_line_is_json(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> None:
    manifest = make_bundle()
    promote(store, manifest)
    flags = command("--log-format", "json", "--access-log")
    with service(store, tmp_path, flags) as (process, address):
        assert httpx.post(f"{address}/predict", json=BODY, headers=HEADERS).status_code == 200
        assert httpx.post(f"{address}/predict", json={}).status_code == 422
        stop(process)
    lines = [json.loads(line) for line in (tmp_path / "service.log").read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    good, bad = (line for line in lines if line.get("path") == "/predict")
    assert (
        good.items()
        >= {
            "level": "INFO",
            "message": "POST /predict 200",
            "model": "tiny",
            "version": manifest.version,
            "request_id": "my-request",
            "trace_id": TRACE,
            "status": 200,
        }.items()
    )
    assert good["time"].endswith("Z")
    assert "trace_id" not in bad
    assert bad["message"] == "POST /predict 422: The field 'records' is needed"


@pytest.mark.slow
def test_by_default_the_log_is_text_without_requests(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    with service(store, tmp_path) as (process, address):
        assert httpx.post(f"{address}/predict", json=BODY).status_code == 200
        httpx.post(f"{address}/predict", json={})
        stop(process)
    text = (tmp_path / "service.log").read_text()
    assert "INFO tiny serves" in text
    assert "/predict" not in text


def refused(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int | str | None:
    """The exit code of a command line that must not be taken."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    parser = argparse.ArgumentParser()
    telemetry.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        telemetry.check_arguments(parser, parser.parse_args(flags))
    return ended.value.code


def test_what_cannot_be_done_is_said_before_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, "--log-format", "xml") == 2
    assert "invalid choice: 'xml'" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert refused(monkeypatch, "--otlp", "http://127.0.0.1:9") == 2
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is grpc" in capsys.readouterr().err
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    assert refused(monkeypatch, "--otlp", "http://127.0.0.1:9") == 2
    assert "pip install 'driftmill[otel]'" in capsys.readouterr().err
    monkeypatch.setenv("DRIFTMILL_LOG_FORMAT", "xml")
    assert refused(monkeypatch) == 2
    assert "DRIFTMILL_LOG_FORMAT is 'xml'" in capsys.readouterr().err


def test_an_error_keeps_its_traceback_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "it %s", ("broke",), sys.exc_info())
    record.request_id = "my-request"
    text = telemetry.Json().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["request_id"]) == ("it broke", "my-request")
    assert "ValueError: two\nlines" in line["exception"]
    first, *_ = telemetry.Text().format(record).splitlines()
    assert first.endswith("ERROR it broke request_id=my-request")


def test_traces_that_nobody_asked_for_import_nothing() -> None:
    code = (
        "import sys, services.tabular\n"
        "from services.bento import servers\n"
        "servers()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    environment = os.environ | {"DRIFTMILL_MODEL": "x", "DRIFTMILL_STORE": "memory://x"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
