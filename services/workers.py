"""Several processes at one port.

A supervisor forks workers, which share nothing but the port: each polls the rollout, batches and
writes its part of the log. Each listens for itself (SO_REUSEPORT): the kernel spreads connections
over all that do, while of processes that share one listening socket the one that wakes up first
takes most of them.

- A worker that ends is started again, at once or after a pause that doubles each time.
- SIGTERM and SIGINT are passed on. Workers that drain leave together, so that no connection comes
  to one that has just gone.
- The supervisor holds one end of a pipe. When that is closed, however the supervisor ended, the
  workers end, too.

What workers know of each other is a byte each in memory that they share, and a mailbox each to ask
for metrics. Nothing of it is on disk, so that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from driftmill.home import cores
from driftmill.serving.exposition import merge

logger = logging.getLogger(__name__)

#: Seconds that a worker gets to tell its metrics.
ASKED = 1.0
#: Seconds until a worker that has ended starts again, the first time and at most.
PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: A worker that has lived for so many seconds has not failed to start.
LIVED = 10.0

#: What a worker is doing: it does not listen (yet, or any more); listens without a model; is ready;
#: drains; drains and nothing more comes.
GONE, LISTENS, READY, LEAVES, QUIET = range(5)

_END = b"# EOF\n"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Worker:
    """One of several processes, as it sees itself and its siblings.

    Args:
        number: its own, from 0.
        board: what each is doing.
        mailboxes: of each: where it reads, and where others write.
    """

    def __init__(
        self,
        number: int,
        board: mmap.mmap,
        mailboxes: list[tuple[socket.socket, socket.socket]],
    ) -> None:
        self.number = number
        self._board = board
        self._mailboxes = mailboxes
        self._metrics: Callable[[], str] = str
        self._telling: set[asyncio.Task[None]] = set()

    # For the port

    async def may_listen(self, is_ready: Callable[[], bool]) -> None:
        """Wait until this worker is ready, or no other one is: who listens gets requests."""
        while not is_ready() and READY in self._others():
            await asyncio.sleep(0.05)

    def show(self, doing: int) -> None:
        """Tell the others what it is doing."""
        self._board[self.number] = doing

    @property
    def others_ready(self) -> bool:
        """Whether no other one gets requests that it cannot answer."""
        return LISTENS not in self._others()

    @property
    def all_quiet(self) -> bool:
        """Whether nothing more comes to any of those that drain."""
        return set(self._board[:]) <= {GONE, QUIET}

    def _others(self) -> list[int]:
        return [doing for i, doing in enumerate(self._board[:]) if i != self.number]

    # Metrics

    def answer(self, metrics: Callable[[], str]) -> None:
        """Answer the others from now on.

        Args:
            metrics: gives this worker's in Prometheus' format.
        """
        self._metrics = metrics
        asyncio.get_running_loop().add_reader(self._mailboxes[self.number][0], self._asked)

    async def all_metrics(self) -> str:
        """The metrics of all workers that answer, each series with the label `worker`."""
        numbers = range(len(self._board))
        texts = await asyncio.gather(*(self._of(number) for number in numbers))
        up = "# HELP service_worker_up 1 for each worker that has told its metrics.\n"
        up += "# TYPE service_worker_up gauge\n"
        for number, text in enumerate(texts):
            up += f'service_worker_up{{worker="{number}"}} {int(text is not None)}\n'
        parts = [(f'worker="{i}"', text) for i, text in enumerate(texts) if text is not None]
        return merge([*parts, ("", up)])

    async def _of(self, number: int) -> str | None:
        """The metrics of a worker; None where it does not tell."""
        if number == self.number:
            return self._metrics()
        if self._board[number] == GONE:
            return None
        mine, its = socket.socketpair()
        try:
            with its:
                socket.send_fds(self._mailboxes[number][1], [b"?"], [its.fileno()])
        except OSError:  # its mailbox is full
            mine.close()
            return None
        reader, writer = await asyncio.open_unix_connection(sock=mine)
        try:
            async with asyncio.timeout(ASKED):
                content = await reader.read(-1)
        except (TimeoutError, OSError):
            return None
        finally:
            writer.close()
        return content.removesuffix(_END).decode() if content.endswith(_END) else None

    def _asked(self) -> None:
        with suppress(BlockingIOError):
            _, fds, _, _ = socket.recv_fds(self._mailboxes[self.number][0], 1, 1)
            for fd in fds:
                task = asyncio.create_task(self._tell(socket.socket(fileno=fd)))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _tell(self, who: socket.socket) -> None:
        _, writer = await asyncio.open_unix_connection(sock=who)
        with suppress(OSError):  # it waits no longer
            writer.write(self._metrics().encode() + _END)
            await writer.drain()
        writer.close()


@dataclass
class _Slot:
    """One worker, as the supervisor sees it."""

    number: int
    pid: int = 0
    """0: it does not run."""
    since: float = 0.0
    pause: float = 0.0
    due: float = 0.0
    """When it starts."""


class Supervisor:
    """Keeps workers running.

    Args:
        count: how many.
        serve: what each does until it is told to end.
        limit: seconds that they get to end.
    """

    def __init__(self, count: int, serve: Callable[[Worker], None], limit: float) -> None:
        self._serve = serve
        self._limit = limit
        self._slots = [_Slot(number) for number in range(count)]
        self._board = mmap.mmap(-1, count)
        self._mailboxes = [socket.socketpair(type=socket.SOCK_DGRAM) for _ in self._slots]
        for pair in self._mailboxes:
            for end in pair:
                end.setblocking(False)
        self._lifeline = os.pipe()
        self._wake = os.pipe()
        for fd in self._wake:
            os.set_blocking(fd, False)
        self._signals: list[int] = []
        #: Whether any worker has ever listened.
        self._worked = False
        #: When those that still run are killed; None while they shall run.
        self._deadline: float | None = None
        self._code = 0

    def run(self) -> int:
        """Run the workers until SIGTERM or SIGINT.

        Returns:
            0; 1 where a worker had to be killed; where none could start, what the first one ended
            with.
        """
        signal.set_wakeup_fd(self._wake[1])
        for handled in _SIGNALS:
            signal.signal(handled, lambda number, _: self._signals.append(number))
        # What is in memory now is shared with the workers for as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        while True:
            now = time.monotonic()
            self._pass_on(now)
            self._reap(now)
            if self._deadline is not None and not any(slot.pid for slot in self._slots):
                return self._code
            if self._deadline is None:
                for slot in self._slots:
                    if not slot.pid and slot.due <= now:
                        self._start(slot, now)
            elif now >= self._deadline:
                self._kill(now)
            self._wait()

    def _wait(self) -> None:
        """Until a signal comes, or there is something to do."""
        due = [slot.due for slot in self._slots if not slot.pid]
        if self._deadline is not None:
            due = [self._deadline]
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        select.select([self._wake[0]], [], [], timeout)
        with suppress(BlockingIOError):
            os.read(self._wake[0], 4096)

    def _pass_on(self, now: float) -> None:
        """Tell the workers what signals have told the supervisor."""
        while self._signals:
            number = self._signals.pop(0)
            if number != signal.SIGCHLD:
                self._stop(number, now)

    def _stop(self, number: int, now: float) -> None:
        if self._deadline is None:
            self._deadline = now + self._limit
        for slot in self._slots:
            if slot.pid:
                os.kill(slot.pid, number)

    def _kill(self, now: float) -> None:
        for slot in self._slots:
            if slot.pid:
                logger.error("worker %d does not end and is killed", slot.number)
                os.kill(slot.pid, signal.SIGKILL)
        self._code = self._code or 1
        self._deadline = now + self._limit

    def _reap(self, now: float) -> None:
        """See which workers have ended, and plan to start them again."""
        self._worked = self._worked or any(self._board[:])
        for slot in self._slots:
            if not slot.pid:
                continue
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
            if not pid:
                continue
            slot.pid = 0
            self._board[slot.number] = GONE
            if self._deadline is not None:
                continue
            code = os.waitstatus_to_exitcode(status)
            if not self._worked:
                logger.error("worker %d cannot start", slot.number)
                self._code = code if code > 0 else 1
                self._stop(signal.SIGTERM, now)
                continue
            lived = now - slot.since
            slot.pause = 0.0 if lived >= LIVED else min(2 * slot.pause or PAUSE, LONGEST_PAUSE)
            slot.due = now + slot.pause
            logger.error(
                "worker %d ended %s and starts again%s",
                slot.number,
                f"by signal {-code}" if code < 0 else f"with {code}",
                f" in {slot.pause:g} s" if slot.pause else "",
            )

    def _start(self, slot: _Slot, now: float) -> None:
        # A signal that comes before the worker can handle it must end it, not be noted here.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if not pid:
            self._become(slot.number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        slot.pid, slot.since = pid, now

    def _become(self, number: int) -> NoReturn:
        """Be a worker, and nothing after that."""
        code = 1
        try:
            # Ctrl-C reaches the supervisor alone, which passes it on: a second one means more.
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for handled in _SIGNALS:
                signal.signal(handled, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for fd in (self._lifeline[1], *self._wake):
                os.close(fd)
            threading.Thread(target=self._end_with_supervisor, daemon=True).start()
            os.environ.setdefault("DRIFTMILL_CORES", str(max(1, cores() // len(self._slots))))
            self._serve(Worker(number, self._board, self._mailboxes))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:  # whatever it is, it must not go on as a second supervisor
            logger.exception("worker %d failed", number)
        finally:
            logging.shutdown()
            sys.stdout.flush()
            # Without waiting for threads that wait for a store.
            os._exit(code)

    def _end_with_supervisor(self) -> None:
        """End the process when the supervisor is gone; in a thread, as the event loop may hang."""
        os.read(self._lifeline[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._limit)
        os._exit(1)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets to listen with at all addresses of a host, beside those of other workers. Raises
    OSError."""
    return [_bound(info, socket.SO_REUSEPORT) for info in _addresses(host, port)]


def reserve(host: str, port: int) -> list[socket.socket]:
    """Sockets that keep others from a port at which workers will listen.

    Raises:
        OSError: another process listens there.
    """
    held = []
    for info in _addresses(host, port):
        _bound(info, socket.SO_REUSEADDR).close()
        held.append(_bound(info, socket.SO_REUSEPORT))
    return held


def _addresses(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


def _bound(address: tuple[int, tuple[object, ...]], option: int) -> socket.socket:
    family, where = address
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(where)
    except OSError:
        made.close()
        raise
    return made
