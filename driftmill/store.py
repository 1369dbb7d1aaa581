"""Where things lie: one folder or bucket, written atomically.

Every part of Driftmill that keeps state keeps it here, below one root: a folder (`file:`), an S3
bucket (`s3:`), or another object store by fsspec (`gs:`). Three promises carry the rest of the
system:

- a reader never sees half a file (`write` replaces, `create` publishes, both at once);
- `create` succeeds for exactly one of several writers, which is all that the rollout's
  compare-and-swap needs;
- a folder put with `put_folder` either has its marker file, and is then whole, or does not exist.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

#: Files of a folder that travel at once; each may hold a part of 32 MiB in memory.
_AT_ONCE = 4
_TEMPORARY = ".tmp-"


class Store:
    """A root below which keys such as `payments/rollout/00000001.json` are read and written.

    Args:
        uri: a folder (`/path`, `file:///path`) or an object store (`s3://bucket/prefix`,
            `gs://bucket/prefix`).

    A store that cannot be used raises an OSError with a sentence that names it: PermissionError,
    TimeoutError and ConnectionError where that is what it is.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" not in text:
            text = f"file://{Path(text).resolve()}"
        self.uri = text.rstrip("/")
        #: The folder behind a `file:` store, else None.
        self.folder: Path | None = None
        self._files: _Files
        # What speaks to remote stores is imported only here: every step on a laptop would pay.
        if self.uri.startswith("file://"):
            self.folder = Path(self.uri.removeprefix("file://"))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = _Folder(self.folder)
        elif text.startswith("s3://"):
            from driftmill.s3 import Bucket

            self._files = Bucket(self.uri)
        else:
            self._files = _Objects(self.uri)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def read(self, key: str) -> bytes:
        """The content of `key`. Raises FileNotFoundError."""
        return self._files.read(_checked(key))

    def write(self, key: str, content: bytes) -> None:
        """Put `content` at `key`, replacing what was there in one step."""
        self._files.write(_checked(key), content)

    def create(self, key: str, content: bytes) -> None:
        """Put `content` at `key` only if nothing is there. Raises FileExistsError otherwise.

        Where the store stops answering (another OSError), the content may be there or not.
        """
        self._files.create(_checked(key), content)

    def exists(self, key: str) -> bool:
        """Whether there is a file at `key`."""
        return self._files.exists(_checked(key))

    def probe(self) -> None:
        """Ask the store something; raises an OSError where it cannot be used."""
        self.exists("any/rollout")

    def list(self, prefix: str) -> list[str]:
        """Keys of all files below the folder `prefix`, sorted; empty where there is none."""
        return sorted(self._files.list(_checked(prefix)))

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is not there."""
        self._files.delete(_checked(key))

    def get_file(self, key: str, path: Path) -> None:
        """Copy the content of `key` into a local file. Raises FileNotFoundError."""
        self._files.download(_checked(key), path)

    def put_folder(self, folder: Path, key: str, marker: str) -> None:
        """Copy a folder to `key`. Where `key` already holds `marker`, nothing is written.

        Args:
            folder: what to copy.
            key: where to.
            marker: a file of the folder without which the copy counts as absent.
        """
        if self.exists(f"{key}/{marker}"):
            return
        if self.folder is not None:
            _copy_folder(folder, self.folder / key, marker)
            return
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        last = files.pop(marker)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sent = [pool.submit(self._files.upload, f"{key}/{n}", p) for n, p in files.items()]
        for one in sent:
            one.result()
        self._files.upload(f"{key}/{marker}", last)

    def get_folder(self, key: str, into: Path, marker: str) -> Path:
        """A local folder with the files of `key`: the folder itself where the store is one, else a
        copy below `into`, which no other process may use. Raises FileNotFoundError also where
        `marker` is missing."""
        if not self.exists(f"{key}/{marker}"):
            raise FileNotFoundError(f"{self.uri}/{key}")
        if self.folder is not None:
            return self.folder / key
        keys = self.list(key)
        for file in keys:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            got = [pool.submit(self._files.download, file, into / file) for file in keys]
        for one in got:
            one.result()
        return into / key


class _Files(Protocol):
    """What a kind of store has to do; keys have been checked."""

    def read(self, key: str) -> bytes: ...
    def write(self, key: str, content: bytes) -> None: ...
    def create(self, key: str, content: bytes) -> None: ...
    def exists(self, key: str) -> bool: ...
    def list(self, folder: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def upload(self, key: str, path: Path) -> None: ...
    def download(self, key: str, path: Path) -> None: ...


class _Folder:
    """A local folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        write_atomic(self._root / key, content)

    def create(self, key: str, content: bytes) -> None:
        with _temporary(self._root / key, content) as (temporary, path):
            os.link(temporary, path)  # unlike rename, fails where the name is taken

    def exists(self, key: str) -> bool:
        return (self._root / key).is_file()

    def list(self, folder: str) -> list[str]:
        found = []
        for base, folders, names in os.walk(self._root / folder):
            folders[:] = [name for name in folders if not name.startswith(_TEMPORARY)]
            place = os.path.relpath(base, self._root)
            found += [
                f"{place}/{name}".removeprefix("./")
                for name in names
                if not name.startswith(_TEMPORARY)
            ]
        return found

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)

    def upload(self, key: str, path: Path) -> None:
        self.write(key, path.read_bytes())

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self._root / key, path)


class _Objects:
    """An object store by fsspec."""

    def __init__(self, uri: str) -> None:
        import fsspec

        # Without a cache of listings: another process may have written just now.
        found = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        self._fs: Any = found[0]
        self._root: str = found[1]

    def read(self, key: str) -> bytes:
        content: bytes = self._fs.cat_file(f"{self._root}/{key}")
        return content

    def write(self, key: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self._root}/{key}", content)

    def create(self, key: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self._root}/{key}", content, mode="create")

    def exists(self, key: str) -> bool:
        return bool(self._fs.isfile(f"{self._root}/{key}"))

    def list(self, folder: str) -> list[str]:
        cut = len(self._root) + 1
        try:
            return [path[cut:] for path in self._fs.find(f"{self._root}/{folder}")]
        except FileNotFoundError:
            return []

    def delete(self, key: str) -> None:
        if self.exists(key):
            self._fs.rm_file(f"{self._root}/{key}")

    def upload(self, key: str, path: Path) -> None:
        self._fs.put_file(str(path), f"{self._root}/{key}")

    def download(self, key: str, path: Path) -> None:
        self._fs.get_file(f"{self._root}/{key}", str(path))


def _checked(key: str) -> str:
    parts = key.split("/")
    if key.startswith("/") or ".." in parts or "" in parts[:-1]:
        raise ValueError(f"not a key below the store's root: {key!r}")
    return key


def _copy_folder(folder: Path, target: Path, marker: str) -> None:
    """Copy a folder; it appears with all its files at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target.parent) as temporary:
        staged = Path(temporary) / "folder"
        shutil.copytree(folder, staged)
        try:
            os.rename(staged, target)
        except OSError:
            # Somebody else put the same folder first: theirs stands.
            if not (target / marker).exists():
                raise


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a local file in one step; after a crash it holds the old content or the new."""
    with _temporary(path, content) as (temporary, final):
        os.replace(temporary, final)


@contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[tuple[str, Path]]:
    """`content` in a flushed file beside `path`, removed afterwards if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary, path
    finally:
        Path(temporary).unlink(missing_ok=True)
