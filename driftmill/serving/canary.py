"""Whether a challenger does well enough beside the champion: the rules of `serve.canary.abort`.

A challenger that fails, answers NaN or hangs is taken out at once, and needs no rule. This is for
one that answers, but slowly, or something else than the champion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from driftmill.contract import Abort
from driftmill.serving.log import Role


class Watch:
    """Counts what a challenger and its champion did, and judges it every `window` answers.

    Args:
        rules: the champion's.
        slow: seconds beyond which an answer is slow.
    """

    def __init__(self, rules: Abort, slow: float) -> None:
        self._rules = rules
        self._slow_seconds = slow
        self._answered: Counter[Role] = Counter()
        self._slow: Counter[Role] = Counter()
        self._compared = 0
        self._differing = 0

    def answered(self, role: Role, seconds: float) -> None:
        """Count an answer and how long its client waited for it."""
        self._answered[role] += 1
        if seconds > self._slow_seconds:
            self._slow[role] += 1

    def compared(self, champion: Sequence[str | float], challenger: Sequence[str | float]) -> None:
        """Count what both predicted for the same rows."""
        self._compared += len(champion)
        self._differing += sum(map(self._differ, champion, challenger))

    def verdict(self) -> str | None:
        """Why the challenger must go; None while it may stay."""
        rules = self._rules
        if self._answered["challenger"] >= rules.window:
            slow = self._slow["challenger"] / self._answered["challenger"]
            champions = self._slow["champion"] / max(self._answered["champion"], 1)
            self._answered.clear()
            self._slow.clear()
            # Where the champion is slow, too, it is the machine's fault.
            if rules.slow is not None and slow > rules.slow and slow > 2 * champions:
                return (
                    f"was slower than {1000 * self._slow_seconds:g} ms in {slow:.0%} of its "
                    f"answers, the champion in {champions:.0%}"
                )
        if self._compared >= rules.window:
            differing = self._differing / self._compared
            self._compared = self._differing = 0
            if rules.disagreement is not None and differing > rules.disagreement:
                return f"disagreed with the champion on {differing:.0%} of the rows"
        return None

    def _differ(self, one: str | float, other: str | float) -> bool:
        if isinstance(one, float) and isinstance(other, float):
            return abs(one - other) > self._rules.tolerance
        return one != other
