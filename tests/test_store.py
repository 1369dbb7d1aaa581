"""The store: atomic, exclusive, below its root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from driftmill.store import Store, sha256


def test_write_read_list_delete(any_store: Store) -> None:
    any_store.write("m/a/1.json", b"one")
    any_store.write("m/a/1.json", b"two")
    any_store.write("m/b.json", b"three")
    assert any_store.read("m/a/1.json") == b"two"
    assert any_store.list("m") == ["m/a/1.json", "m/b.json"]
    assert any_store.list("nothing") == []
    assert any_store.exists("m/b.json")
    any_store.delete("m/b.json")
    any_store.delete("m/b.json")
    assert not any_store.exists("m/b.json")
    with pytest.raises(FileNotFoundError):
        any_store.read("m/b.json")


def test_create_takes_only_a_free_key(any_store: Store) -> None:
    any_store.create("m/1", b"first")
    with pytest.raises(FileExistsError):
        any_store.create("m/1", b"second")
    assert any_store.read("m/1") == b"first"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b"])
def test_a_key_stays_below_the_root(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.read(key)


def test_one_of_many_writers_wins(store: Store) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def write(n: int) -> None:
        start.wait()
        try:
            store.create("m/1", str(n).encode())
        except FileExistsError:
            return
        won.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("m/1") == str(won[0]).encode()


def test_folders(any_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "sub" / "x").write_text("x")
    any_store.put_folder(folder, "m/bundles/1", "manifest.json")
    (folder / "sub" / "x").write_text("changed")
    any_store.put_folder(folder, "m/bundles/1", "manifest.json")  # it is there: nothing happens
    got = any_store.get_folder("m/bundles/1", tmp_path / "cache", "manifest.json")
    assert (got / "sub" / "x").read_text() == "x"
    assert (got / "manifest.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError):
        any_store.get_folder("m/bundles/2", tmp_path / "cache", "manifest.json")


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    """A process killed at a random moment of endless rewriting leaves a whole file."""
    store = Store(tmp_path)
    store.write("m/x", b"0" * 100_000)
    code = (
        "import sys; from driftmill.store import Store\n"
        "s = Store(sys.argv[1]); i = 0\n"
        "while True:\n"
        "    i += 1; s.write('m/x', str(i % 10).encode() * 100_000); print(i, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    content = store.read("m/x")
    assert len(content) == 100_000
    assert len(set(content)) == 1
    assert store.list("m") == ["m/x"]


@pytest.mark.parametrize("kind", ["folder", "moto", "server"])
def test_a_killed_writer_leaves_no_folder(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """A folder that was half put counts as absent, and can be put again."""
    uri = str(tmp_path / "s") if kind == "folder" else request.getfixturevalue(f"s3_{kind}")
    folder = tmp_path / "f"
    folder.mkdir()
    for n in range(300):
        (folder / f"a{n:03d}").write_bytes(b"0" * 100_000)
    (folder / "manifest.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from driftmill.store import Store\n"
        "s = Store(sys.argv[1]); print(flush=True)\n"
        "s.put_folder(Path(sys.argv[2]), 'm/b/1', 'manifest.json')\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, uri, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    store = Store(uri)
    while not any(tmp_path.glob("s/m/b/.tmp-*/folder/a*")) and not store.list("m"):
        assert writer.poll() is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not store.exists("m/b/1/manifest.json")
    if kind == "folder":
        assert store.list("m") == []  # the rest of it is nobody's
    with pytest.raises(FileNotFoundError):
        store.get_folder("m/b/1", tmp_path / "none", "manifest.json")

    store.put_folder(folder, "m/b/1", "manifest.json")
    got = store.get_folder("m/b/1", tmp_path / "copy", "manifest.json")
    assert len(list(got.iterdir())) == 301


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")
