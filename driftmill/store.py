"""Where things lie: one folder or bucket, written atomically.

Every part of Driftmill that keeps state keeps it here, below one root (`file:` folder, `s3:` or
`gs:` bucket by fsspec). Three promises carry the rest of the system:

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Store:
    """A root below which keys such as `payments/rollout/00000001.json` are read and written.

    Args:
        uri: a folder (`/path`, `file:///path`) or an object store (`s3://bucket/prefix`).
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" not in text:
            text = f"file://{Path(text).resolve()}"
        self.uri = text.rstrip("/")
        #: The folder behind a `file:` store, else None.
        self.folder: Path | None = None
        if self.uri.startswith("file://"):
            self.folder = Path(self.uri.removeprefix("file://"))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fs: Any = None
            self._root = str(self.folder)
        else:
            # Imported only here: every step and every poll of a laptop would pay for it.
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.uri)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def _path(self, key: str) -> str:
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or "" in parts[:-1]:
            raise ValueError(f"not a key below the store's root: {key!r}")
        return f"{self._root}/{key}"

    def read(self, key: str) -> bytes:
        """The content of `key`. Raises FileNotFoundError."""
        if self.folder is not None:
            return Path(self._path(key)).read_bytes()
        content: bytes = self._fs.cat_file(self._path(key))
        return content

    def write(self, key: str, content: bytes) -> None:
        """Put `content` at `key`, replacing what was there in one step."""
        if self.folder is None:
            self._fs.pipe_file(self._path(key), content)
            return
        with _temporary(Path(self._path(key)), content) as (temporary, path):
            os.replace(temporary, path)

    def create(self, key: str, content: bytes) -> None:
        """Put `content` at `key` only if nothing is there. Raises FileExistsError otherwise."""
        if self.folder is None:
            self._fs.pipe_file(self._path(key), content, mode="create")
            return
        with _temporary(Path(self._path(key)), content) as (temporary, path):
            os.link(temporary, path)  # unlike rename, fails where the name is taken

    def exists(self, key: str) -> bool:
        """Whether something is at `key`."""
        path = self._path(key)
        return os.path.exists(path) if self.folder is not None else bool(self._fs.exists(path))

    def list(self, prefix: str) -> list[str]:
        """Keys of all files below the folder `prefix`, sorted; empty where there is none."""
        if self.folder is not None:
            root = Path(self._path(prefix))
            found = [
                f"{os.path.relpath(base, self.folder)}/{name}".removeprefix("./")
                for base, _, names in os.walk(root)
                for name in names
                if not name.startswith(".tmp-")
            ]
        else:
            self._fs.invalidate_cache()
            cut = len(self._root) + 1
            try:
                found = [path[cut:] for path in self._fs.find(self._path(prefix))]
            except FileNotFoundError:
                found = []
        return sorted(found)

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is not there."""
        if self.folder is not None:
            Path(self._path(key)).unlink(missing_ok=True)
        elif self._fs.exists(self._path(key)):
            self._fs.rm_file(self._path(key))

    def put_folder(self, folder: Path, key: str, marker: str) -> None:
        """Copy a folder to `key`. Where `key` already holds `marker`, nothing is written.

        Args:
            folder: what to copy.
            key: where to.
            marker: a file of the folder without which the copy counts as absent.
        """
        if self.exists(f"{key}/{marker}"):
            return
        if self.folder is None:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            for path in sorted(files, key=lambda p: p.name == marker):  # the marker goes last
                self.write(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
            return
        target = Path(self._path(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as temporary:
            staged = Path(temporary) / "folder"
            shutil.copytree(folder, staged)
            try:
                os.rename(staged, target)
            except OSError:
                # Somebody else put the same folder first: theirs stands.
                if not (target / marker).exists():
                    raise

    def get_folder(self, key: str, into: Path) -> Path:
        """A local folder with the files of `key`: the folder itself where the store is one, else a
        copy below `into`, which no other process may use. Raises FileNotFoundError."""
        if self.folder is not None:
            path = Path(self._path(key))
            if not path.is_dir():
                raise FileNotFoundError(f"{self.uri}/{key}")
            return path
        keys = self.list(key)
        if not keys:
            raise FileNotFoundError(f"{self.uri}/{key}")
        target = into / key
        for file in keys:
            path = into / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(file))
        return target


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
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary, path
    finally:
        Path(temporary).unlink(missing_ok=True)
