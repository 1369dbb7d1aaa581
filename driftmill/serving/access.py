"""Who may ask a service for what, and how often.

Rights are apart: a token of one right gives no other.

| right | paths |
|---|---|
| `predict` | `/predict`, `/explain`, and `/v2` but for its health |
| `feedback` | `/feedback` |
| `metrics` | `/metrics` |
| `admin` | all others |

`/livez`, `/readyz` and `/v2/health/…` are open: who asks them has no token, and learns nothing.

A folder holds the tokens, as a mounted Secret does: those of a right, one a line, in a file of its
name, and in others that begin with it and `-`, such as `predict-old`. While an old and a new one
are there, both are good. It is read again each second. A right without a token is given to nobody.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from hmac import compare_digest
from pathlib import Path
from typing import Any, Literal

from driftmill.serving.codec import CLOSE, RequestError
from driftmill.serving.rate import Rate
from driftmill.serving.server import Scope, Send, is_v2, refusal

logger = logging.getLogger(__name__)

Right = Literal["predict", "feedback", "metrics", "admin"]
RIGHTS: tuple[Right, ...] = ("predict", "feedback", "metrics", "admin")
#: Characters that a token has at least: a shorter one can be guessed.
LEAST = 16
#: Seconds between two looks at the files.
PERIOD = 1.0

_OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
_RIGHTS: dict[str, Right | None] = {
    "/predict": "predict",
    "/explain": "predict",
    "/feedback": "feedback",
    "/metrics": "metrics",
    **dict.fromkeys(_OPEN),
}
_LIMITED = ("predict", "feedback")
_UNAUTHORIZED = RequestError(
    401,
    "unauthorized",
    "Send Authorization: Bearer TOKEN with a valid token",
    headers=((b"www-authenticate", b"Bearer"), CLOSE),
)
_NO_CERTIFICATE = RequestError(
    403, "no_certificate", "Present a client certificate", headers=(CLOSE,)
)
_FORBIDDEN = {
    right: RequestError(403, "forbidden", f"This token does not give {right}", headers=(CLOSE,))
    for right in RIGHTS
}

Tokens = dict[Right, tuple[bytes, ...]]


class Access:
    """Lets requests in, or says why not.

    Args:
        tokens: folder with files of tokens; None: no tokens are asked for.
        rate: requests a second for predictions and with labels, of one client and in this process;
            a client may be ahead by those of a second.
        certificates: those of the server, to be renewed; where they name a client CA, a client must
            have shown a certificate.

    Raises:
        OSError: the folder or a file cannot be read.
        ValueError: there is no token, or a bad one.
    """

    def __init__(
        self,
        tokens: Path | None = None,
        rate: float = math.inf,
        certificates: Certificates | None = None,
    ) -> None:
        self.certificates = certificates
        self._folder = tokens
        self._tokens: Tokens | None = None
        self._rate = Rate(rate) if rate < math.inf else None
        self._watching: asyncio.Task[None] | None = None
        #: What was last logged about files that cannot be taken.
        self._problem = ""
        if tokens is not None:
            found = _read(tokens)
            if not any(found.values()):
                names = ", ".join(RIGHTS)
                raise ValueError(f"{tokens} has no token: put one into a file {names}")
            self._take(found)

    def check(self, scope: Scope) -> RequestError | None:
        """Why a request is refused; None lets it in.

        Args:
            scope: ASGI's, of a request or a websocket. `scope["state"]["certified"]` says whether
                the client has shown a certificate, where it must.
        """
        right = right_of(scope["path"])
        if right is None:
            return None
        if (
            self.certificates is not None
            and self.certificates.clients
            and not scope.get("state", {}).get("certified")
        ):
            return _NO_CERTIFICATE
        if self._tokens is None:
            client = scope["client"]
            who: Any = client[0] if client else None
        else:
            who = _bearer(scope["headers"])
            for token in self._tokens[right]:
                if compare_digest(who, token):
                    break
            else:
                known = [token for tokens in self._tokens.values() for token in tokens]
                if any(compare_digest(who, token) for token in known):
                    return _FORBIDDEN[right]
                return _UNAUTHORIZED
        if self._rate is not None and right in _LIMITED:
            wait = self._rate.wait(who, time.monotonic())
            if wait:
                seconds = str(math.ceil(wait)).encode()
                return RequestError(
                    429, "rate_limited", "Too many requests", headers=((b"retry-after", seconds),)
                )
        return None

    async def start(self) -> None:
        """Begin to watch the files."""
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End watching them."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            await self.renew()

    async def renew(self) -> None:
        """Take tokens and certificates whose files have changed. What cannot be read or is not
        valid changes nothing, and is logged."""
        try:
            if self._folder is not None:
                found = await asyncio.to_thread(_read, self._folder)
                if found != self._tokens:
                    self._take(found)
            if self.certificates is not None:
                await asyncio.to_thread(self.certificates.renew)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no thread is to be had
            if str(error) != self._problem:
                logger.error("what was valid stays: %s", error)
            self._problem = str(error)
        else:
            self._problem = ""

    def _take(self, found: Tokens) -> None:
        self._tokens = found
        valid = ", ".join(f"{len(tokens)} of {right}" for right, tokens in found.items() if tokens)
        logger.info("tokens are asked for; valid are %s", valid or "none")
        for right in (right for right, tokens in found.items() if not tokens):
            logger.warning("%s has no token of %s: nobody gets it", self._folder, right)


class Certificates:
    """The certificate of a server, and the CA of its clients; connections made after the files have
    changed get what is in them then.

    Args:
        chain: PEM file of the certificate and those between it and its CA.
        key: PEM file of its key.
        client_ca: PEM file of the CAs whose clients are let in; None: all are.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not valid, or certificate and key do not fit.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None = None) -> None:
        self._chain = chain
        self._key = key
        self._client_ca = client_ca
        self._seen = self._contents()
        self._newest = self._load()
        #: What listens.
        self.context = self._load()
        # Called for each connection, with or without a name; a context that listens can't be
        # replaced otherwise, and to change one would keep old CAs.
        self.context.sni_callback = self._choose

    @property
    def clients(self) -> bool:
        """Whether clients need a certificate."""
        return self._client_ca is not None

    def renew(self) -> None:
        """Read the files again if they have changed. Raises as the constructor; nothing changes
        then."""
        contents = self._contents()
        if contents != self._seen:
            self._newest = self._load()
            self._seen = contents
            logger.info("the certificate was read again")

    def _choose(self, connection: ssl.SSLObject, name: str, listening: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _contents(self) -> list[bytes]:
        paths = (self._chain, self._key, self._client_ca)
        return [path.read_bytes() for path in paths if path is not None]

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # With no password OpenSSL would ask on the terminal for that of an encrypted key.
            context.load_cert_chain(self._chain, self._key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"{self._chain} and {self._key} are no certificate and its key, in PEM and "
                f"without a password: {error}"
            ) from None
        if self._client_ca is not None:
            # Optional here, since probes have none; `Access` refuses the rest. Nothing is resumed,
            # which would pass by a CA that is not trusted any more.
            context.verify_mode = ssl.CERT_OPTIONAL
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"{self._client_ca} has no CA in PEM: {error}") from None
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return context


def right_of(path: str) -> Right | None:
    """What a path takes, that of one of several models without its name; None: it is open."""
    if path in _RIGHTS:
        return _RIGHTS[path]
    return "predict" if is_v2(path) else "admin"


async def refuse(scope: Scope, send: Send, why: RequestError) -> None:
    """Answer a request that is not let in, in the shape that its protocol has."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    for message in refusal(scope["path"], why).messages():
        await send(message)


def _bearer(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The token that a request has; empty: none."""
    for name, value in headers:
        if name == b"authorization":
            return value[7:].strip() if value[:7].lower() == b"bearer " else b""
    return b""


def _read(folder: Path) -> Tokens:
    """The tokens in a folder. Raises OSError and ValueError."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder with files of tokens")
    files = sorted(folder.iterdir())
    return {
        right: tuple(
            token
            for path in files
            if path.name == right or path.name.startswith(f"{right}-")
            for token in _lines(path)
        )
        for right in RIGHTS
    }


def _lines(path: Path) -> tuple[bytes, ...]:
    content = path.read_bytes()
    tokens = tuple(line.strip() for line in content.splitlines() if line.strip())
    for number, token in enumerate(tokens, 1):
        if len(token) < LEAST or not all(0x21 <= byte <= 0x7E for byte in token):
            raise ValueError(
                f"token {number} of {path} must have {LEAST} visible ASCII characters or more"
            )
    return tokens
