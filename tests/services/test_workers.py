"""Several processes at one port: ready together, drained together, restarted, never orphaned."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from driftmill.store import Store
from services import workers
from services.workers import GONE, LEAVES, LISTENS, QUIET, READY, Worker
from tests.services.test_drain import Clients
from tests.services.test_tabular import (
    MODULE,
    ROOT,
    MakeBundle,
    logged,
    promote,
    service,
)


def command(*more: str) -> list[str]:
    return [*MODULE[:-1], *more, MODULE[-1]]


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def values(url: str, name: str) -> dict[str, float]:
    """The values of a metric by worker, summed; each connection is another worker's, maybe."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                worker = sample.labels["worker"]
                found[worker] = found.get(worker, 0.0) + sample.value
    return found


def all_up(url: str, count: int) -> bool:
    return sum(values(url, "service_worker_up").values()) == count


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Not yet waited for by whoever has inherited it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_workers_share_a_port_restart_show_all_metrics_and_drain(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    with service(store, tmp_path, command("--workers", "2", "--drain-seconds", "10")) as (
        process,
        url,
    ):
        until(lambda: all_up(url, 2))
        # One that is killed comes back, and one that hangs is left out.
        first, second = children(process.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in children(process.pid) and len(children(process.pid)) == 2)
        until(lambda: all_up(url, 2))
        os.kill(second, signal.SIGSTOP)
        text = ""
        while not text:
            # Connections to the one that hangs wait; the kernel gives others to the other one.
            with suppress(httpx.TimeoutException):
                text = httpx.get(f"{url}/metrics", timeout=5).text
        assert sorted(re.findall(r"service_worker_up\{.*\} (\d)", text)) == ["0", "1"]
        os.kill(second, signal.SIGCONT)
        with Clients(int(url.rpartition(":")[2])) as clients:
            until(lambda: clients.ok > 100)
            # Whoever is asked tells what both have done, and nothing ever goes back.
            before: dict[str, float] = {}
            for _ in range(20):
                after = values(url, "model_predictions_total")
                assert all(after[worker] >= count for worker, count in before.items())
                before = after
            assert set(before) == {"0", "1"}
            process.terminate()
            time.sleep(0.3)  # requests come for a moment, until the network knows
        assert clients.failed == []
        assert process.wait(30) == 0
    ids = logged(store)
    assert len(ids) == len(set(ids)) == clients.ok
    assert list((tmp_path / "spool").rglob("*.jsonl")) == []


def supervised(work: str, count: int = 2, limit: float = 20.0) -> subprocess.Popen[str]:
    """A supervisor of workers that do some work; `said` is what it and they write."""
    code = (
        "import logging, os, signal, sys, time\n"
        "from services.workers import READY, Supervisor\n"
        "logging.basicConfig(stream=sys.stderr, format='%(message)s')\n"
        f"def serve(worker):\n{textwrap.indent(work, '    ')}\n"
        f"sys.exit(Supervisor({count}, serve, {limit}).run())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str], text: str) -> None:
    """Wait until a supervisor has said something."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"it ended with {process.wait()} and did not say {text!r}")


WORKS = "worker.show(READY)\nprint('works', file=sys.stderr, flush=True)\nsignal.pause()"


def test_a_supervisor_whose_workers_cannot_start_ends_with_their_exit_code() -> None:
    process = supervised("sys.exit(7)")
    said(process, "cannot start")
    assert process.wait(20) == 7


def test_a_worker_that_ends_again_and_again_is_started_after_longer_and_longer_pauses() -> None:
    work = "worker.show(READY)\nif worker.number: sys.exit(3)\nsignal.pause()"
    process = supervised(work)
    for pause in ("0.5", "1", "2"):
        said(process, f"worker 1 ended with 3 and starts again in {pause} s")
    process.terminate()
    assert process.wait(20) == 0


def test_a_worker_that_does_not_end_is_killed() -> None:
    work = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WORKS}"
    process = supervised(work, count=1, limit=0.2)
    said(process, "works")
    process.terminate()
    said(process, "is killed")
    assert process.wait(20) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_worker(number: signal.Signals) -> None:
    process = supervised(WORKS)
    said(process, "works")
    said(process, "works")
    pids = children(process.pid)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert [is_gone(pid) for pid in pids] == [True, True]


def test_no_worker_outlives_its_supervisor() -> None:
    """Not even one that takes no signal, as one whose event loop hangs."""
    work = f"if worker.number: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WORKS}"
    process = supervised(work, limit=0.2)
    said(process, "works")
    said(process, "works")
    pids = children(process.pid)
    assert len(pids) == 2
    process.kill()
    process.wait()
    until(lambda: all(is_gone(pid) for pid in pids), 20)


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = subprocess.run(
            [*command("--workers", "2"), str(taken.getsockname()[1])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"DRIFTMILL_HOME": str(tmp_path)},
        )
    assert run.returncode == 1
    assert "cannot be listened at (Address already in use)" in run.stderr
    assert "Traceback" not in run.stderr


def test_readiness_speaks_for_all_that_listen_and_a_worker_alone_waits_for_nobody() -> None:
    board = mmap.mmap(-1, 2)
    first, second = (Worker(number, board, []) for number in range(2))

    async def is_waiting(worker: Worker, ready: bool) -> bool:
        task = asyncio.create_task(worker.may_listen(lambda: ready))
        await asyncio.sleep(0)
        task.cancel()
        return not task.done()

    # At the start nobody is worse off for one that listens without a model.
    assert not asyncio.run(is_waiting(first, ready=False))
    first.show(LISTENS)
    assert not second.others_ready
    first.show(READY)
    assert second.others_ready
    # One that was started again would take requests from those that can answer them.
    assert asyncio.run(is_waiting(second, ready=False))
    assert not asyncio.run(is_waiting(second, ready=True))
    for leaving in (LEAVES, QUIET, GONE):
        first.show(leaving)
        assert not asyncio.run(is_waiting(second, ready=False))
    second.show(LEAVES)
    assert not second.all_quiet
    second.show(QUIET)
    assert second.all_quiet


def test_metrics_of_all_leave_out_who_does_not_tell_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "ASKED", 0.05)
    board = mmap.mmap(-1, 4)
    mailboxes = [socket.socketpair(type=socket.SOCK_DGRAM) for _ in range(4)]
    for end in (end for pair in mailboxes for end in pair):
        end.setblocking(False)
    # The last one is gone.
    asked, told, hangs = (Worker(number, board, mailboxes) for number in range(3))
    for worker in (asked, told, hangs):
        worker.show(READY)

    async def check() -> str:
        # Longer than a socket's buffer.
        head = f"# HELP much {'x' * 1_000_000}\n# TYPE much gauge\nmuch"
        asked.answer(lambda: f"{head} 0.0\n")
        told.answer(lambda: f"{head} 1.0\n")
        return await asked.all_metrics()

    lines = [line for line in asyncio.run(check()).splitlines() if not line.startswith("#")]
    assert lines == [
        'much{worker="0"} 0.0',
        'much{worker="1"} 1.0',
        *(f'service_worker_up{{worker="{n}"}} {up}' for n, up in enumerate((1, 1, 0, 0))),
    ]
