"""What each `serve.log.fsync` keeps, by real service processes: killed, traced, their disk cut off.

A loss of power is real here as far as one machine can show it: the spool lies on a file system in a
file, whose writes reach that file only when the kernel sends them to the disk. A copy of the file
is what a machine finds that starts again.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from driftmill import bundle, contract
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.serving.log import Log
from driftmill.store import Store
from tests.conftest import MOTO_KEY, place_on_s3
from tests.services.test_tabular import MODULE, RECORD, Traffic, logged, promote, service
from tests.serving.test_log import POLICIES, spool_files, wait_for

pytestmark = pytest.mark.slow

MakeBundle = Callable[..., Manifest]
BODY = {"records": [RECORD, RECORD]}


def logging_by(tiny: Contract, **settings: object) -> Contract:
    """The tiny contract with a log of its own."""
    values = json.loads(tiny.to_json())
    values["serve"]["log"] |= settings
    return contract.parse(json.dumps(values))


@pytest.mark.parametrize("fsync", POLICIES)
def test_kill_9_under_load_loses_and_doubles_nothing(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path, fsync: str
) -> None:
    # Files become full, are closed and moved all the while: it dies in the middle of any of it.
    of = logging_by(tiny, fsync=fsync, fsync_interval=0.05, rotate=0.1, rotate_rows=40)
    promote(store, make_bundle(of=of))
    when = random.Random(fsync)
    ids: list[str] = []
    cut = 0
    for _ in range(2):
        with service(store, tmp_path) as (process, url), Traffic(url) as traffic:
            traffic.wait(when.randrange(50, 400))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        ids += traffic.ids
        cut += traffic.cut
        assert traffic.failures == []
    Log(tmp_path / "spool", store, "tiny").close()
    found = logged(store)
    assert len(found) == len(set(found))
    assert set(ids) <= set(found)
    assert len(found) <= len(ids) + 2 * cut  # written, but killed before the answer was sent
    assert spool_files(tmp_path / "spool") == []


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """A file system in a file."""
    at.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-o", "loop", image, at], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a file system in a file cannot be mounted here: {mount.stderr}")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def found_after_power_loss(image: Path, tmp_path: Path) -> set[str]:
    """The predictions that a machine finds if it loses power now and starts again."""
    copy = tmp_path / "copy.img"
    shutil.copyfile(image, copy)
    recovered = Store(tmp_path / "recovered")
    with mounted(copy, tmp_path / "copy") as disk:
        Log(disk / "spool", recovered, "tiny").close()
        assert spool_files(disk / "spool") == []
    found = set(logged(recovered)) if recovered.list("tiny") else set()
    shutil.rmtree(tmp_path / "recovered")
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="makes a file system")
@pytest.mark.parametrize("fsync", POLICIES)
def test_what_a_loss_of_power_costs(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path, fsync: str
) -> None:
    # Nothing moves into the store, which is on another disk.
    of = logging_by(tiny, fsync=fsync, fsync_interval=0.2, rotate=3600)
    promote(store, make_bundle(of=of))
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with (
        mounted(image, tmp_path / "disk") as home,
        service(store, home) as (process, url),
        Traffic(url) as traffic,
    ):
        traffic.wait(100)
        process.send_signal(signal.SIGSTOP)
        try:
            answered = set(traffic.ids)
            found = found_after_power_loss(image, tmp_path)
        finally:
            process.send_signal(signal.SIGCONT)
        match fsync:
            case "batch":
                assert answered <= found
            case "interval":  # a moment later it has them, though nobody waited for that
                wait_for(
                    lambda: answered <= found_after_power_loss(image, tmp_path), "the disk has them"
                )
            case "none":  # all of it, until the operating system sees fit
                assert not answered & found
        # Only the machine loses anything: the service goes on.
        traffic.wait(50)
    assert traffic.failures == []
    assert set(traffic.ids) <= set(logged(store))


@dataclass
class Call:
    """A system call that succeeded, as strace saw it."""

    began: float
    ended: float
    name: str
    arguments: str

    @property
    def path(self) -> str:
        """What is behind the number that is the first argument."""
        return self.arguments.split(",", 1)[0].partition("<")[2].removesuffix(">")


# 4711 1764064800.123456 write(7, "...", 42) = 42 <0.000021>
_WHOLE = re.compile(r"(\d+) +(\d+\.\d+) (\w+)\((.*)\) += (\d+) ?.* <(\d+\.\d+)>")
_BEGUN = re.compile(r"(\d+) +(\d+\.\d+) (\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +\d+\.\d+ <\.\.\. \w+ resumed>(.*)")

_CALLS = "write,writev,sendto,sendmsg,fdatasync,fsync,rename,unlink"


def strace(output: Path, *more: str) -> list[str]:
    """A command in front of another, which writes what the other asks of the kernel."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("no process may be traced here")
    options = ["-f", "-ttt", "-T", "-y", "-s", "1000000", "-e", f"trace={_CALLS}"]
    return ["strace", *options, *more, "-o", str(output)]


def calls(output: Path) -> list[Call]:
    """What strace saw, in the order in which the calls ended."""
    found: list[Call] = []
    begun: dict[str, str] = {}
    for line in output.read_text(errors="replace").splitlines():
        whole = line
        if match := _BEGUN.fullmatch(line):
            begun[match[1]] = line.removesuffix(" <unfinished ...>")
        elif match := _RESUMED.fullmatch(line):
            whole = begun.pop(match[1], "") + match[2]
        if match := _WHOLE.fullmatch(whole):
            start = float(match[2])
            found.append(Call(start, start + float(match[6]), match[3], match[4]))
    return sorted(found, key=lambda call: call.ended)


# In a row of the log and in an answer.
_ID = re.compile(r'\\"(?:_prediction_)?id\\":\\"([0-9a-f]+)\\"')


def test_batch_has_the_disk_take_a_row_before_its_answer_and_a_segment_before_its_file_goes(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=logging_by(tiny, fsync="batch", rotate=0.1, rotate_rows=40)))
    output = tmp_path / "calls"
    with service(store, tmp_path, [*strace(output), *MODULE]) as (_, url), Traffic(url) as traffic:
        traffic.wait(100)
    assert traffic.failures == []
    seen = calls(output)

    written: dict[str, Call] = {}
    begun: dict[str, Call] = {}
    for call in seen:
        if call.name == "write" and "/spool/" in call.path:
            written |= dict.fromkeys(_ID.findall(call.arguments), call)
            begun.setdefault(call.path, call)

    def taken(name: str, file: str, after: Call, before: Call) -> bool:
        """Whether the disk was asked and has said that it has a file, or a folder's names."""
        return any(
            call.name == name
            and call.path == file
            and after.ended <= call.began
            and call.ended <= before.began
            for call in seen
        )

    answered = set()
    for call in seen:
        if call.name in ("write", "writev", "sendto", "sendmsg") and "socket:" in call.path:
            for i in _ID.findall(call.arguments):
                answered.add(i)
                file = written[i].path
                folder = str(Path(file).parent)
                assert taken("fdatasync", file, written[i], call), f"{i} was answered before"
                assert taken("fsync", folder, begun[file], call), f"{file} was answered before"
    assert set(traffic.ids) <= answered

    # rename (the segment has its name), fsync of its folder, unlink of the spool file.
    renamed, gone = "", 0
    folders: set[str] = set()
    for call in seen:
        if call.name == "rename":
            renamed, folders = call.arguments.split('"')[3], set()
        elif call.name == "fsync":
            folders.add(call.path)
        elif call.name == "unlink" and ".jsonl" in call.arguments:
            gone += 1
            assert renamed.endswith(".parquet")
            assert str(Path(renamed).parent) in folders
    assert gone > 1


# Which calls of each thread fail. Under `interval` the log's own thread meets the first failure,
# and requests the others.
@pytest.mark.parametrize(("fsync", "failing"), [("batch", "5..8"), ("interval", "1..4")])
def test_a_disk_that_fails_is_not_believed_and_heals(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path, fsync: str, failing: str
) -> None:
    of = logging_by(tiny, fsync=fsync, fsync_interval=0.05, rotate=3600)
    promote(store, make_bundle(of=of))
    inject = ["-e", f"inject=fdatasync:error=EIO:when={failing}"]
    command = [*strace(tmp_path / "calls", *inject), *MODULE]
    ids: list[str] = []
    codes: list[int] = []
    with service(store, tmp_path, command) as (_, url), httpx.Client(base_url=url) as client:
        deadline = time.monotonic() + 60
        while codes[-1:] != [200] or 503 not in codes:
            assert time.monotonic() < deadline, codes
            response = client.post("/predict", json=BODY)
            codes.append(response.status_code)
            if response.status_code == 200:
                ids += [p["id"] for p in response.json()["predictions"]]
            else:
                assert "Input/output error" in response.json()["error"]["message"]
                failing_now = 'model_inference_log_failing{model="tiny"} 1.0'
                assert failing_now in client.get("/metrics").text
    assert set(codes) == {200, 503}
    # What was refused is not there either.
    assert sorted(logged(store)) == sorted(ids)


def test_a_store_that_hangs_holds_up_no_answer(
    make_bundle: MakeBundle, tiny: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_bundle(of=logging_by(tiny, rotate=0.1, rotate_rows=40))
    with s3_server(tmp_path) as (server, endpoint):
        store = Store(place_on_s3(endpoint, monkeypatch, MOTO_KEY))
        key = bundle.key("tiny", manifest.version)
        store.put_folder(tmp_path / "bundle-0.02", key, bundle.MANIFEST)
        promote(store, manifest)
        # One client: each request waits for the one before.
        with service(store, tmp_path) as (_, url), Traffic(url, clients=1) as traffic:
            wait_for(lambda: bool(store.list("tiny/log")), "a segment in the store")
            server.send_signal(signal.SIGSTOP)
            try:
                traffic.wait(300)  # 600 rows: fifteen files become full, and stay
                assert len(spool_files(tmp_path / "spool")) > 10
            finally:
                server.send_signal(signal.SIGCONT)
            wait_for(lambda: len(spool_files(tmp_path / "spool")) < 3, "the store has them")
        assert (traffic.failures, traffic.cut) == ([], 0)
        assert sorted(logged(store)) == sorted(traffic.ids)


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An S3 server as a process of its own, and its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "s3.log").open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=out,
        )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(endpoint), "the S3 server answers")
        yield server, endpoint
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    """Whether somebody answers there."""
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.TransportError:
        return False
