"""Traces and log lines of requests.

A client's `traceparent` (W3C Trace Context) names the trace that a request belongs to. Log lines
bear its id; and where the user asks for OpenTelemetry, each request is a span in it, with one for
the wait and one for the model below, sent by OTLP over HTTP. Nothing of OpenTelemetry is imported
else.

OpenTelemetry's own environment variables configure it: `OTEL_EXPORTER_OTLP_ENDPOINT` switches it
on, `OTEL_TRACES_SAMPLER` says what is kept (default: what the parent keeps, and all without one).
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from driftmill.serving.batches import Waiting
    from driftmill.serving.versions import Model

#: Variables of which one names where spans go.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
DISABLED = "OTEL_SDK_DISABLED"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
PROTOCOL = "http/protobuf"
#: Seconds in which the last spans must be sent when the service stops.
STOP = 3.0
#: Lines about errors in a second; the others are counted. A service that refuses thousands of
#: requests must not be slowed down further by telling so.
LINES = 10

#: Characters of a client's text that get into a log.
_LONGEST = 256
_PARENT = re.compile(
    rb"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})"
    rb"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)

logger = logging.getLogger(__name__)


class TracingError(RuntimeError):
    """Traces are asked for and cannot be made; the message says what to do."""


def parent(headers: Mapping[bytes, bytes]) -> tuple[str, str, int] | None:
    """Trace id, span id and flags of a request's `traceparent`; None without a valid one, as the
    W3C says: then a new trace begins."""
    value = headers.get(b"traceparent")
    if value is None:
        return None
    match = _PARENT.fullmatch(value.strip())
    # Later versions than 00 may be longer; what is known of them is read.
    if (
        match is None
        or match["version"] == b"ff"
        or (match["version"] == b"00" and match["more"] is not None)
    ):
        return None
    trace, span = match["trace"].decode(), match["span"].decode()
    if not trace.strip("0") or not span.strip("0"):
        return None
    return trace, span, int(match["flags"], 16)


def wanted() -> bool:
    """Whether the environment asks for OpenTelemetry."""
    asked = any(os.environ.get(name) for name in ENDPOINTS)
    return asked and os.environ.get(DISABLED, "").strip().lower() != "true"


class Tracing:
    """Makes spans of requests.

    Args:
        provider: OpenTelemetry's, which sends them somewhere.
    """

    def __init__(self, provider: TracerProvider) -> None:
        # Only who asks for traces needs these.
        from opentelemetry import trace
        from opentelemetry.context import Context

        self._trace = trace
        self._no_context = Context()
        self._provider = provider
        self._tracer = provider.get_tracer("driftmill", version("driftmill"))
        self._is_stopped = False

    def begin(self, scope: MutableMapping[str, Any]) -> Span:
        """The span of a request, a child of the client's where there is one."""
        trace, context = self._trace, self._no_context
        headers = dict(scope["headers"])
        found = parent(headers)
        if found is not None:
            trace_id, span_id, flags = found
            states = [v.decode("latin-1") for k, v in scope["headers"] if k == b"tracestate"]
            there = trace.SpanContext(
                int(trace_id, 16),
                int(span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(flags),
                trace_state=trace.TraceState.from_header(states),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(there), context)
        span = self._tracer.start_span(scope["method"], context, trace.SpanKind.SERVER)
        if span.is_recording():
            # The semantic conventions of HTTP server spans.
            host, _, port = headers.get(b"host", b"").decode("latin-1").rpartition(":")
            optional: dict[str, str | int | None] = {
                "server.address": host or port,
                "server.port": int(port) if host and port.isdigit() else None,
                "client.address": (scope.get("client") or [None])[0],
                "user_agent.original": headers.get(b"user-agent", b"").decode("latin-1"),
            }
            span.set_attributes(
                {
                    "http.request.method": scope["method"],
                    "url.path": scope["path"],
                    "url.scheme": scope.get("scheme", "http"),
                    "network.protocol.version": scope.get("http_version", "1.1"),
                }
                | {name: value for name, value in optional.items() if value}
            )
        return span

    def answered(self, span: Span, waiting: Waiting, model: Model) -> None:
        """Add what is known of a request for predictions: who answered how many rows, how long it
        waited for its batch, and how long the model took."""
        if not span.is_recording():
            return
        rows = len(waiting.records)
        span.set_attributes({"driftmill.role": waiting.role, "driftmill.rows": rows})
        if waiting.ran is None:
            return
        context = self._trace.set_span_in_context(span, self._no_context)
        began, ended, batch = waiting.ran
        # Other clocks than that of the spans: only differences count.
        now, here = time.time_ns(), time.perf_counter()
        came, began, ended = (now - int((here - at) * 1e9) for at in (waiting.since, began, ended))
        wait = self._tracer.start_span("wait for the batch", context, start_time=came)
        wait.end(began)
        ran = self._tracer.start_span("run the model", context, start_time=began)
        ran.set_attributes({"driftmill.version": model.version, "driftmill.batch.rows": batch})
        ran.end(ended)

    def end(
        self, span: Span, route: str, status: int, model: str, version: str, request_id: str
    ) -> tuple[bytes, bytes]:
        """End the span of a request.

        Returns:
            The header `traceresponse`, which tells the client its trace and this span.
        """
        if span.is_recording():
            # The conventions' name of a span is method and route; until here only one was known.
            named: dict[str, str | int] = {
                "http.response.status_code": status,
                "driftmill.model": model,
                "driftmill.version": version,
                "driftmill.request_id": request_id,
            }
            if status != 404:
                span.update_name(f"{span.name} {route}")  # type: ignore[attr-defined]
                span.set_attribute("http.route", route)
            span.set_attributes({name: value for name, value in named.items() if value})
            if status >= 500:
                span.set_attribute("error.type", str(status))
                span.set_status(self._trace.StatusCode.ERROR)
        span.end()
        here = span.get_span_context()
        value = f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"
        return b"traceresponse", value.encode()

    def stop(self) -> None:
        """Send what is left, unless that takes too long."""
        if self._is_stopped:
            return
        self._is_stopped = True
        # It would wait half a minute for a collector that does not answer.
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(STOP)


def check() -> None:
    """Raise TracingError where what the environment asks for cannot be had."""
    for variable in PROTOCOLS:
        if os.environ.get(variable, PROTOCOL) != PROTOCOL:
            raise TracingError(
                f"{variable} is {os.environ[variable]}, and spans are sent by {PROTOCOL} only"
            )
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ModuleNotFoundError as error:
        raise TracingError(
            f"traces need the package {error.name}: pip install 'driftmill[otel]', "
            f"or set {DISABLED}=true"
        ) from None


def start(name: str) -> Tracing:
    """Make spans and send them where the environment says.

    Args:
        name: of the service, unless the environment has another one.

    Raises:
        TracingError: something is missing.
    """
    check()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: name}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Lines:
    """Log lines of requests, with the ids of the request and of its trace.

    Args:
        model: the model's name.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        #: Whether every request gets a line, or only those that the service failed.
        self.every = False
        self._second = 0
        self._written = 0

    def write(
        self,
        scope: MutableMapping[str, Any],
        status: int,
        seconds: float,
        request_id: str,
        version: str,
        why: str,
        span: Span | None,
    ) -> None:
        """Write the line of a request: what failed by a mistake is an error, what was refused for
        now a warning, and what the client did wrong is for `DEBUG`."""
        level = logging.INFO if self.every else logging.DEBUG
        more = ""
        if status >= 500 and scope["method"] == "POST":  # a probe that says no does its work
            level = logging.ERROR if status == 500 else logging.WARNING
            if not self.every:
                second = int(time.monotonic())
                if second == self._second:
                    self._written += 1
                    if self._written > LINES:
                        return
                else:
                    if self._written > LINES:
                        more = f" (and {self._written - LINES} more before)"
                    self._second, self._written = second, 1
        if not logger.isEnabledFor(level):
            return
        headers = dict(scope["headers"])
        # One that was refused early had no name yet but the client's.
        request_id = request_id or _printable(headers.get(b"x-request-id", b"").decode("latin-1"))
        found = parent(headers)
        trace_id = found[0] if found else ""
        if span is not None:
            trace_id = f"{span.get_span_context().trace_id:032x}"
        fields = {
            "model": self.model,
            "version": version,
            "request_id": request_id,
            "trace_id": trace_id,
            "method": scope["method"],
            "path": _printable(scope["path"]),
            "status": status,
            "seconds": round(seconds, 6),
        }
        logger.log(
            level,
            "%s %s %d%s%s",
            fields["method"],
            fields["path"],
            status,
            why and f": {_printable(why)}",
            more,
            extra={name: value for name, value in fields.items() if value != ""},
        )


def _printable(text: str) -> str:
    """A client's text for a log, in which it begins no line: a path may have a line break."""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown}..."
