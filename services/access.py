"""Who may call a service: the command line's part, and uvicorn's."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from driftmill.serving.access import RIGHTS, Access, Certificates
from services.corked import Protocol

logger = logging.getLogger(__name__)

#: Addresses that only this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: Variable, how its value is called, and what it says. Flags have their names in small letters.
_SETTINGS = (
    (
        "TOKENS",
        "FOLDER",
        f"folder with a file of tokens, one a line, for each of {', '.join(RIGHTS)}",
    ),
    (
        "RATE",
        "N",
        "requests a second that one client may send to this process; default: any number",
    ),
    ("TLS_CERT", "FILE", "certificate of the service, PEM, with those between it and its CA"),
    ("TLS_KEY", "FILE", "its key, PEM"),
    ("CLIENT_CA", "FILE", "CAs, PEM, of which a client must have a certificate; health needs none"),
)


class Certified(Protocol):
    """Uvicorn's protocol; `scope["state"]["certified"]` says whether the client has shown a
    certificate. One that is not valid has ended the handshake."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note what the handshake has found."""
        super().connection_made(transport)
        certified = bool(transport.get_extra_info("peercert"))
        self.app_state = {**self.app_state, "certified": certified}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, each with its variable as its default."""
    group = parser.add_argument_group(
        "access", "Each may stand in the environment: DRIFTMILL_TOKENS for --tokens, and so on."
    )
    for name, value, text in _SETTINGS:
        flag = f"--{name.lower().replace('_', '-')}"
        group.add_argument(flag, metavar=value, default=os.environ.get(_variable(name)), help=text)


def check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Put what was given where `access` reads it, in this process and those that it starts, and end
    the process with exit code 2 if it is not valid. Says so where everybody may call."""
    for name, _, _ in _SETTINGS:
        os.environ[_variable(name)] = getattr(given, name.lower()) or ""
    try:
        made = access()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    closed = made is not None and (given.tokens or given.client_ca)
    if given.host not in LOOPBACK and not closed:
        logger.warning(
            "everybody who reaches %s:%d may call it; --tokens or --client-ca changes that",
            given.host,
            given.port,
        )


@cache
def access() -> Access | None:
    """Who may call this process; None: everybody.

    Raises:
        OSError: a file cannot be read.
        ValueError: a setting or a file is not valid.
    """
    tokens, rate, chain, key, client_ca = (
        os.environ.get(_variable(name)) or None for name, _, _ in _SETTINGS
    )
    if bool(chain) != bool(key) or (client_ca and not chain):
        raise ValueError("--tls-cert and --tls-key belong together, and --client-ca needs both")
    certificates = None
    if chain and key:
        certificates = Certificates(Path(chain), Path(key), Path(client_ca) if client_ca else None)
    if not (tokens or rate or certificates):
        return None
    return Access(Path(tokens) if tokens else None, _positive(rate or "inf"), certificates)


def options() -> dict[str, Any]:
    """What uvicorn's configuration takes of it."""
    made = access()
    if made is None or made.certificates is None:
        return {}
    context = made.certificates.context
    protocol = {"http": Certified} if made.certificates.clients else {}
    return {"ssl_context_factory": lambda config, default: context, **protocol}


def _variable(name: str) -> str:
    return f"DRIFTMILL_{name}"


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ValueError(f"--rate is {text}; give requests a second, more than 0")
    return number
