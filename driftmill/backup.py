"""Backup and restore of an installation: store, ledger, tracking, and what the log has not moved.

One tar file, written while everything runs. What makes it consistent is the order:

- the ledger and MLflow's database by SQLite's own online backup;
- the spool of the inference log before the store: a segment that moves meanwhile is in both, and
  bears the same name;
- the rollouts before the bundles that they name, since a bundle never changes and is there before a
  rollout names it. `restore` writes them last, so that no service sees a version before its bundle.

`backup.json`, the last member, names the sha256 of every other one: a file that was cut off has
none. The bearer token of the webhook is not in it, and neither is `<model>/cache`, which training
makes anew. A ledger or a tracking server elsewhere (Postgres, MLflow's own) is backed up there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from driftmill.home import Home
from driftmill.serving.log import segment
from driftmill.store import sha256, write_atomic
from driftmill.version import code_version

MANIFEST = "backup.json"
#: Of what is written here; `restore` refuses others.
FORMAT = 1
_SQLITE = "sqlite:///"


class BackupError(RuntimeError):
    """A backup that cannot be made or restored; the message says why and what to do."""


@dataclass(frozen=True)
class Summary:
    """What a backup holds."""

    created: datetime
    files: int
    bytes: int
    elsewhere: tuple[str, ...]
    """What is not in it, because it lies in a database or on a server elsewhere."""


def backup(home: Home, path: Path, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Write a backup; it appears as a whole.

    Args:
        home: what to back up.
        path: a new file, `.tar` or `.tar.gz`.
        say: called with what is being read.

    Raises:
        BackupError: the file is there already, or there is nothing to back up.
        OSError: something cannot be read or written.
    """
    if path.exists():
        raise BackupError(f"{path} is there already; name a new file")
    if not home.folder.is_dir():
        raise BackupError(f"there is nothing at {home.folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            summary = _write(home, file, path.name.endswith(".gz"), say)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails where another was faster
    except FileExistsError:
        raise BackupError(f"{path} is there already; name a new file") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return summary


def _write(home: Home, file: IO[bytes], packed: bool, say: Callable[[str], None]) -> Summary:
    digests: dict[str, str] = {}
    total = 0
    with tarfile.open(fileobj=file, mode="w|gz" if packed else "w|") as archive:
        for name, content in _members(home, say):
            _add(archive, name, content)
            digests[name] = hashlib.sha256(content).hexdigest()
            total += len(content)
        created = datetime.now(UTC)
        elsewhere = tuple(
            what
            for what, url in (("ledger", home.ledger_url), ("tracking", home.tracking_uri))
            if not url.startswith(_SQLITE)
        )
        manifest = {
            "format": FORMAT,
            "created": created.isoformat(),
            "code_version": code_version(),
            "elsewhere": elsewhere,
            "files": digests,
        }
        _add(archive, MANIFEST, json.dumps(manifest, indent=1).encode())
    return Summary(created, len(digests), total, elsewhere)


def _members(home: Home, say: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    """Names and contents, in the order that the module's docstring gives."""
    for name, url in (("ledger.db", home.ledger_url), ("mlflow.db", home.tracking_uri)):
        database = Path(url.removeprefix(_SQLITE))
        if url.startswith(_SQLITE) and database.exists():
            say(str(database))
            yield name, _database(database)
    for folder in (home.spool, home.folder / "mlflow-artifacts"):
        say(str(folder))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                # One that is gone has moved into the store, which comes next.
                with suppress(FileNotFoundError):
                    yield path.relative_to(home.folder).as_posix(), path.read_bytes()
    say(home.store_uri)
    store = home.store
    for rollouts in (True, False):
        for key in store.list(""):
            if _is_rollout(key) is rollouts and key.split("/")[1:2] != ["cache"]:
                with suppress(FileNotFoundError):  # removed since it was listed
                    yield f"store/{key}", store.read(key)


def _is_rollout(key: str) -> bool:
    return key.split("/")[1:2] == ["rollout"]


def _database(path: Path) -> bytes:
    """A SQLite database as it is at one moment, whoever writes to it meanwhile."""
    with (
        tempfile.NamedTemporaryFile(suffix=".db") as copy,
        closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(copy.name)) as target,
    ):
        source.backup(target)
        target.close()
        return Path(copy.name).read_bytes()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o600
    archive.addfile(member, io.BytesIO(content))


def restore(home: Home, path: Path, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Bring back what a backup holds, into an installation that holds nothing.

    The whole file is checked before the first byte is written. Where it is interrupted, the same
    call does the rest.

    Args:
        home: where to.
        path: the backup.
        say: called with what is being done.

    Raises:
        BackupError: the file is damaged or of another format; or there is something else already.
        OSError: something cannot be read or written.
    """
    say(f"checking {path}")
    manifest = _verify(path)
    files: dict[str, str] = manifest["files"]
    store = home.store
    known = set(store.list(""))
    places = _places(home, files)
    # What an interrupted call has written is what it was to write.
    other = [
        f"{store.uri}/{key}"
        for key in sorted(known)
        if files.get(f"store/{key}") != hashlib.sha256(store.read(key)).hexdigest()
    ] + [str(p) for name, p in places.items() if p.exists() and sha256(p) != files[name]]
    if other:
        raise BackupError(
            f"there is something already, such as {other[0]}; restore into an empty --home and "
            "DRIFTMILL_STORE"
        )
    say(f"writing {home.folder} and {store.uri}")
    late: dict[str, bytes] = {}
    total = 0
    for name, content in _read(path):
        total += len(content) if name != MANIFEST else 0
        if name in places:
            write_atomic(places[name], content)
        elif name.startswith("store/"):
            key = name.removeprefix("store/")
            if _is_rollout(key):
                late[key] = content
            else:
                store.write(key, content)
    for key in sorted(late):
        store.write(key, late[key])
    return Summary(
        datetime.fromisoformat(manifest["created"]),
        len(files),
        total,
        tuple(manifest["elsewhere"]),
    )


def _places(home: Home, files: dict[str, str]) -> dict[str, Path]:
    """Where the files beside the store go."""
    databases = {"ledger.db": home.ledger_url, "mlflow.db": home.tracking_uri}
    places = {}
    for name in files:
        if name.startswith("spool/") and f"store/{segment(Path(name))}" in files:
            continue  # it moved while it was backed up, and may have grown before
        if name in databases:
            if not databases[name].startswith(_SQLITE):
                raise BackupError(
                    f"the backup holds {name}, and this installation has its own elsewhere; unset "
                    "DRIFTMILL_LEDGER and MLFLOW_TRACKING_URI, or restore there by hand"
                )
            places[name] = Path(databases[name].removeprefix(_SQLITE))
        elif not name.startswith("store/"):
            places[name] = home.folder / name
    return places


def _verify(path: Path) -> dict[str, Any]:
    """The manifest of a backup in which every file is as it was."""
    digests: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    for name, content in _read(path):
        parts = Path(name).parts
        if name.startswith("/") or ".." in parts:
            raise BackupError(f"{path} is not a backup: it names {name!r}")
        if name == MANIFEST:
            manifest = json.loads(content)
        else:
            digests[name] = hashlib.sha256(content).hexdigest()
    if manifest is None:
        raise BackupError(f"{path} is not a backup, or it was cut off: it has no {MANIFEST}")
    if manifest["format"] != FORMAT:
        raise BackupError(
            f"{path} has format {manifest['format']}; this Driftmill reads format {FORMAT}"
        )
    for name in manifest["files"].keys() | digests.keys():
        if manifest["files"].get(name) != digests.get(name):
            raise BackupError(f"{path} is damaged: {name} is not what was backed up (sha256)")
    return manifest


def _read(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, one after the other."""
    try:
        with tarfile.open(path, mode="r|*") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None:
                    raise BackupError(f"{path} is not a backup: {member.name!r} is not a file")
                yield member.name, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise BackupError(f"{path} is not a backup, or it was cut off: {error}") from None
