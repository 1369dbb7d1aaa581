"""How a service ends without losing a request.

A pod gets SIGTERM while it still gets requests: the cluster learns some moments later that nothing
more goes there, and clients keep their connections. Uvicorn by itself closes idle connections at
once, and a client that is just sending on one loses its request. So on SIGTERM this server first

- answers `/readyz` with 503, so that nothing new is sent here,
- answers all that comes, each answer with `Connection: close`, so that clients go elsewhere,

and shuts down when no connection is left and none has come for a moment, or when its time is up.
Of several workers each listens until nothing more comes to any. Ctrl-C, or a second signal, ends it
at once.

After the last request the log moves into the store (`driftmill.serving.mount.STOP` says how long
that may take), and threads that still wait for the store then are left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from services.connections import Sweep
from services.workers import LEAVES, LISTENS, QUIET, READY, Worker

#: Seconds without a connection or a request after which nothing more is expected.
QUIET_SECONDS = 1.0
#: Seconds that threads get to end when all else is over.
THREADS = 1.0


class Drainer(uvicorn.Server):
    """Uvicorn's server, which leaves clients time to go, and closes connections that do not get on.

    Args:
        config: uvicorn's.
        seconds: most that clients get; 0 ends at once.
        begin: called when the drain begins.
        is_ready: whether requests can be answered.
        worker: this process, if it is one of several.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        seconds: float,
        begin: Callable[[], None],
        is_ready: Callable[[], bool],
        worker: Worker | None = None,
    ) -> None:
        super().__init__(config)
        self._seconds = seconds
        self._begin = begin
        self._is_ready = is_ready
        self._worker = worker
        self._sweep = Sweep(self.server_state.connections)
        #: When the drain must be over; None before it begins.
        self._until: float | None = None
        self._busy = 0.0
        self._requests = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first SIGTERM; end at any other signal."""
        if sig != signal.SIGTERM or self._until is not None or not self._seconds:
            super().handle_exit(sig, frame)
            return
        now = time.monotonic()
        self._until, self._busy = now + self._seconds, now
        self._begin()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end; the process then ends soon, whatever its threads wait for."""
        await super().serve(sockets)
        end = threading.Timer(THREADS, os._exit, [0])
        end.daemon = True
        end.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; asked ten times a second."""
        if counter % 10 == 0:
            self._sweep(time.monotonic())
        return await super().on_tick(counter) or self._drained()

    def _drained(self) -> bool:
        if self._until is None:
            if self._worker is not None:
                self._worker.show(READY if self._is_ready() else LISTENS)
            return False
        now, state = time.monotonic(), self.server_state
        if state.connections or state.total_requests != self._requests:
            self._busy, self._requests = now, state.total_requests
        is_quiet = now - self._busy >= QUIET_SECONDS
        if self._worker is not None:
            self._worker.show(QUIET if is_quiet else LEAVES)
            is_quiet = self._worker.all_quiet
        return now >= self._until or is_quiet
