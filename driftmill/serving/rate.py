"""How often a client may ask."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

#: Clients whose rate is kept in mind at once; others count as new.
CLIENTS = 10_000


class Rate:
    """A limit for each client; a client that has paused may be ahead by a second's requests.

    Source: the virtual scheduling algorithm of ITU-T I.371, which needs one number a client.

    Args:
        rate: requests a second.
    """

    def __init__(self, rate: float) -> None:
        self.change(rate)
        #: When a client's next request is due, in the order of their last ones.
        self._due: OrderedDict[Any, float] = OrderedDict()

    def change(self, rate: float) -> None:
        """Let in so many requests a second from now on."""
        self._gap = 1 / rate
        self._ahead = max(0.0, 1.0 - self._gap) + 1e-9

    def wait(self, client: Any, now: float) -> float:
        """Seconds until a client's request would be let in; 0: it is, and counts.

        Args:
            client: who it is.
            now: seconds of a clock that never goes back.
        """
        due = max(self._due.get(client, now), now)
        wait = due - now - self._ahead
        if wait > 0:
            return wait
        self._due[client] = due + self._gap
        self._due.move_to_end(client)
        if len(self._due) > CLIENTS:
            self._due.popitem(last=False)
        return 0.0
