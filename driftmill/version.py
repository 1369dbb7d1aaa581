"""Which Driftmill runs: its version, for people, and the digest of its code, for keys of kept
results."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path


@functools.cache
def code_version() -> str:
    """The version of the package."""
    return version("driftmill")


@functools.cache
def code_digest() -> str:
    """sha256 over the names and contents of the package's Python files, in hex.

    Between two releases the code changes and the version does not; a result that is kept under
    this digest is never taken for that of other code. It takes some milliseconds, once a process.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
