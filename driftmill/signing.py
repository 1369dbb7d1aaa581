"""Signatures of bundles: who trained what is served.

A bundle's manifest names the sha256 of every file; `manifest.sig` is an Ed25519 signature
(RFC 8032) of the manifest's bytes, so it covers all of them. Training signs what it promotes where
it has a key; whatever loads a bundle demands a signature where keys are named that it trusts.

| variable | what |
|---|---|
| `DRIFTMILL_SIGNING_KEY` | private key, PEM: the text itself or the path of a file |
| `DRIFTMILL_TRUSTED_KEYS` | public keys, PEM: the text itself, the path of a file or a folder |

    openssl genpkey -algorithm ed25519 -out signing.pem
    openssl pkey -in signing.pem -pubout -out trusted.pem
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

SIGNATURE = "manifest.sig"
SIGNING_KEY, TRUSTED_KEYS = "DRIFTMILL_SIGNING_KEY", "DRIFTMILL_TRUSTED_KEYS"
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----", re.DOTALL)


class SigningError(ValueError):
    """A key or a signature that will not do; the message says why."""


class Signature(BaseModel):
    """The content of `manifest.sig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str = "ed25519"
    key: str
    """Which key: 16 hexadecimal digits of the sha256 of its 32 raw bytes."""
    signature: str
    """64 bytes, base64."""


def sign(manifest: bytes) -> bytes | None:
    """The signature of a manifest by the key of the environment; None where there is none.

    Raises:
        SigningError: the key cannot be read, or is no Ed25519 key.
    """
    given = os.environ.get(SIGNING_KEY)
    if not given:
        return None
    # Only where signatures are used: it takes a while to import.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_text(given, SIGNING_KEY).encode(), None)
    except (ValueError, TypeError) as error:  # a password is a TypeError
        raise SigningError(f"{SIGNING_KEY} holds no private key in PEM: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{SIGNING_KEY} is no Ed25519 key: openssl genpkey -algorithm ed25519")
    made = Signature(
        key=_name(key.public_key().public_bytes_raw()),
        signature=base64.b64encode(key.sign(manifest)).decode(),
    )
    return made.model_dump_json(indent=1).encode()


def check(manifest: bytes, signature: bytes | None) -> str | None:
    """Check a manifest's signature by the trusted keys of the environment.

    Args:
        manifest: what was signed.
        signature: the content of `manifest.sig`, None where there is none.

    Returns:
        Which key has signed it; None where no keys are named, and nothing is demanded.

    Raises:
        SigningError: a signature is demanded, and there is none, none that is valid, or none by a
            trusted key; or the keys cannot be read.
    """
    given = os.environ.get(TRUSTED_KEYS)
    if not given:
        return None
    trusted = _trusted(given)
    if signature is None:
        raise SigningError(f"it is not signed, and {TRUSTED_KEYS} demands it")
    try:
        found = Signature.model_validate_json(signature)
        content = base64.b64decode(found.signature, validate=True)
    except (ValidationError, binascii.Error):
        raise SigningError(f"its {SIGNATURE} is damaged") from None
    key = trusted.get(found.key)
    if key is None:
        raise SigningError(f"it is signed by {found.key}, which {TRUSTED_KEYS} does not name")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(content, manifest)
    except InvalidSignature:
        raise SigningError(
            f"its manifest is not what {found.key} has signed: it was changed"
        ) from None
    return found.key


def _trusted(given: str) -> dict[str, bytes]:
    """Trusted public keys, 32 raw bytes each, by their names."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = {}
    for text in _PEM.findall(_text(given, TRUSTED_KEYS)):
        try:
            key = load_pem_public_key(text.encode())
        except ValueError as error:
            raise SigningError(f"{TRUSTED_KEYS} holds what is no public key: {error}") from None
        if not isinstance(key, Ed25519PublicKey):
            raise SigningError(f"{TRUSTED_KEYS} holds a key that is no Ed25519 key")
        raw = key.public_bytes_raw()
        keys[_name(raw)] = raw
    if not keys:
        raise SigningError(f"{TRUSTED_KEYS} names no public key in PEM")
    return keys


def _text(given: str, variable: str) -> str:
    """PEM, given as such or by its path."""
    if "-----BEGIN" in given:
        return given
    path = Path(given)
    try:
        files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
        return "\n".join(file.read_text() for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise SigningError(f"{variable} cannot be read: {error}") from None


def _name(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()[:16]
