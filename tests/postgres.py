"""A real Postgres server for tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy


def _postgres_program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@contextmanager
def server() -> Iterator[str]:
    """URL of a Postgres server of our own, without a database name; skips where there is none."""
    pytest.importorskip("psycopg")
    initdb, server = _postgres_program("initdb"), _postgres_program("postgres")
    if initdb is None or server is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="driftmill-pg-"))
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # Postgres does not run as root
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = str(folder / "data")
    subprocess.run(
        [initdb, "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True,
        capture_output=True,
        cwd=folder,
        **account,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["-c", f"port={port}", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [server, "-D", data, "-c", "listen_addresses=127.0.0.1", *options],
            stdout=log,
            stderr=log,
            cwd=folder,
            **account,
        )
    base = f"postgresql://postgres@127.0.0.1:{port}"
    try:
        _await_postgres(base, process)
        yield base
    finally:
        process.send_signal(signal.SIGINT)  # without waiting for clients to leave
        process.wait(timeout=30)
        shutil.rmtree(folder)


def _await_postgres(base: str, process: subprocess.Popen[bytes]) -> None:
    engine = sqlalchemy.create_engine(
        base.replace("postgresql", "postgresql+psycopg") + "/postgres"
    )
    while True:
        assert process.poll() is None, "Postgres did not start"
        try:
            engine.connect().close()
        except sqlalchemy.exc.OperationalError:
            continue
        break
    engine.dispose()


def database(base: str, prefix: str) -> str:
    """URL of a new, empty database of a server."""
    name = f"{prefix}_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(
        base.replace("postgresql", "postgresql+psycopg") + "/postgres",
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{base}/{name}"
