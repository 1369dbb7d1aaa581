"""How a service ends without losing a request.

A pod gets SIGTERM while it still gets requests: the cluster learns some moments later that nothing
more goes there, and clients keep their connections. Uvicorn by itself closes idle connections at
once, and a client that is just sending on one loses its request. So on SIGTERM this server first

- answers `/readyz` with 503, so that nothing new is sent here,
- answers all that comes, each answer with `Connection: close`, so that clients go elsewhere,

and shuts down when no connection is left and none has come for a moment, or when its time is up.
Ctrl-C, or a second signal, ends it at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

#: Seconds without a connection or a request after which nothing more is expected.
QUIET = 1.0


class Drainer(uvicorn.Server):
    """Uvicorn's server, which leaves clients time to go.

    Args:
        config: uvicorn's.
        seconds: most that they get; 0 ends at once.
        begin: called when the drain begins.
    """

    def __init__(self, config: uvicorn.Config, seconds: float, begin: Callable[[], None]) -> None:
        super().__init__(config)
        self._seconds = seconds
        self._begin = begin
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

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; asked ten times a second."""
        return await super().on_tick(counter) or self._drained()

    def _drained(self) -> bool:
        if self._until is None:
            return False
        now, state = time.monotonic(), self.server_state
        if state.connections or state.total_requests != self._requests:
            self._busy, self._requests = now, state.total_requests
        return now >= self._until or now - self._busy >= QUIET
