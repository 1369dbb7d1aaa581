"""What a service tells of itself: the command line's part of logs and traces."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from driftmill.serving import tracing
from driftmill.serving.server import Server

FORMATS = ("text", "json")
_FORMAT, _ACCESS_LOG = "DRIFTMILL_LOG_FORMAT", "DRIFTMILL_ACCESS_LOG"
#: What every record has, and what the message of a request's line says already.
_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"))
_SAID = frozenset(("model", "method", "path", "status"))


class Text(logging.Formatter):
    """Lines for people; what else is known of a request stands at the end as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line without a traceback."""
        more = (f" {name}={value}" for name, value in _more(record).items() if name not in _SAID)
        return super().formatMessage(record) + "".join(more)


class Json(logging.Formatter):
    """A JSON object a line: `time` (RFC 3339), `level`, `logger`, `message`, a traceback as
    `exception`, and what else is known, such as `model`, `version`, `request_id`, `trace_id`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_more(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("logs and traces")
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        default=os.environ.get(_FORMAT) or FORMATS[0],
        help=f"default: ${_FORMAT}, or %(default)s",
    )
    group.add_argument(
        "--access-log",
        action="store_true",
        default=os.environ.get(_ACCESS_LOG, "").lower() == "true",
        help="a line for every request, not only for those that failed; "
        f"default: true where ${_ACCESS_LOG} is",
    )
    group.add_argument(
        "--otlp",
        metavar="URL",
        help="send a span of every request there by OTLP, e.g. http://localhost:4318; "
        f"default: ${tracing.ENDPOINTS[0]}, or none are made",
    )


def check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Set logging up, put the rest where `watch` reads it, in this process and those that it
    starts, and end the process with exit code 2 if it is not valid."""
    if given.log_format not in FORMATS:  # of the environment
        parser.error(f"{_FORMAT} is {given.log_format!r}; choose from {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if given.log_format == "json" else Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    os.environ[_ACCESS_LOG] = str(given.access_log).lower()
    if given.otlp:
        os.environ[tracing.ENDPOINTS[0]] = given.otlp
        # This module's importer sets it for BentoML, where nobody asks for traces.
        os.environ.pop(tracing.DISABLED, None)
    if tracing.wanted():
        try:
            tracing.check()
        except tracing.TracingError as error:
            parser.error(str(error))


def watch(servers: Iterable[Server]) -> None:
    """Let servers write the lines and make the spans that were asked for."""
    servers = list(servers)
    found = tracing.start("driftmill") if tracing.wanted() else None
    for server in servers:
        server.lines.every = os.environ.get(_ACCESS_LOG, "").lower() == "true"
        if found is not None:
            server.trace(found)


def _more(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller has added to a record."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
