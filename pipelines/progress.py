"""What a person or a program sees of a run while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from driftmill import runs
from driftmill.runs import Outcome
from driftmill.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, Task


class Display(Protocol):
    """Shows a run."""

    def event(self, event: dict[str, Any]) -> None:
        """A step started, got on or ended."""

    def line(self, text: str) -> None:
        """A line for people."""


@dataclass
class Clock:
    """How long a run still takes, from how long the last one took.

    Steps overlap, so the estimate goes by how far into the earlier run the last finished step
    ended, not by the sum of the steps.
    """

    ends: dict[str, float]
    """Seconds from the earlier run's start to the end of each step; empty without such a run."""
    started: float = field(default_factory=time.monotonic)
    done: set[str] = field(default_factory=set)
    _last: tuple[float, float] = (0.0, 0.0)
    """When the last step ended in this run, and in the earlier one."""

    @property
    def total(self) -> float:
        """Seconds that the earlier run took; 0 where there was none."""
        return max(self.ends.values(), default=0.0)

    def finish(self, name: str) -> None:
        """A step has ended."""
        self.done.add(name)
        if self.ends.get(name, 0.0) >= self._last[1]:
            self._last = (self.elapsed(), self.ends.get(name, 0.0))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def remaining(self) -> float | None:
        """Seconds still to go; None where there is nothing to go by."""
        if not self.ends:
            return None
        here, there = self._last
        return max(self.total - there - (self.elapsed() - here), 0.0)


def clock(earlier: list[Outcome]) -> Clock:
    """A clock set by the newest run that was judged."""
    for outcome in reversed(earlier):
        if outcome.state in ("promoted", "rejected"):
            ends = {
                step.name: (step.ended - outcome.started).total_seconds()
                for step in outcome.steps
                if step.ended is not None
            }
            return Clock(ends)
    return Clock({})


@dataclass
class Events:
    """One JSON line for each event, for programs."""

    def event(self, event: dict[str, Any]) -> None:
        """Something happened."""
        print(json.dumps(event), flush=True)

    def line(self, text: str) -> None:
        """Programs read the events."""


@dataclass
class Lines:
    """One plain line for each step that ends, and for each tenth of a long one, for logs and
    pipes."""

    clock: Clock
    starts: dict[str, float] = field(default_factory=dict)

    def event(self, event: dict[str, Any]) -> None:
        """A step started, got on or ended."""
        if event["event"] == "progress":
            done, total = event["done"], event["total"]
            if done * 10 // total > (done - 1) * 10 // total:
                self.line(f"  {_so_far(event)}")
            return
        text = describe(self.clock, self.starts, event)
        if text:
            self.line(text)

    def line(self, text: str) -> None:
        """A line for people."""
        print(text, flush=True)


@dataclass
class Bar:
    """A bar with the steps that run, the time so far and the time left, for terminals."""

    clock: Clock
    progress: Progress
    task: Any
    starts: dict[str, float] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    """The steps that run, by their label, with how far they are."""

    def event(self, event: dict[str, Any]) -> None:
        """A step started, got on or ended."""
        name = label(event)
        if event["event"] == "progress":
            self.running[name] = _so_far(event)
        elif text := describe(self.clock, self.starts, event):  # it has ended
            self.running.pop(name, None)
            self.line(text)
        else:
            self.running[name] = name
        self.progress.update(self.task, description=", ".join(self.running.values()))

    def line(self, text: str) -> None:
        """A line for people."""
        self.progress.console.print(text, markup=False, highlight=False)


@contextmanager
def bar(watch: Clock) -> Iterator[Bar]:
    """A bar on the terminal, removed at the end; the lines above it stay."""
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
    from rich.text import Text

    class Times(ProgressColumn):
        """Time so far and, after a first run, time left."""

        def render(self, task: Task) -> RenderableType:
            left = watch.remaining()
            text = f"{watch.elapsed():.0f} s"
            return Text(text if left is None else f"{text}, about {left:.0f} s left")

    class Filling(BarColumn):
        """Filled by time; it pulses where nothing says how long a run takes."""

        def render(self, task: Task) -> Any:
            left = watch.remaining()
            if left is not None:
                task.total = watch.total
                task.completed = min(watch.total - left, watch.total)
            return super().render(task)

    columns = (SpinnerColumn(), Filling(), Times(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as progress:
        yield Bar(watch, progress, progress.add_task("starting", total=None))


def conclusion(outcome: Outcome, store: Store, log: str | None = None) -> Iterator[str]:
    """How a run has ended, for people, line by line.

    Args:
        outcome: of the run.
        store: where the run's folder is.
        log: file in it with what the steps printed; None: there is none.
    """
    # The gate's reasons begin with the decision, those of failures do not.
    judged = outcome.state in ("promoted", "rejected")
    yield outcome.reason if judged else f"{outcome.state}: {outcome.reason}"
    folder = f"{store.uri}/{runs.key(outcome.model, outcome.run_id)}"
    if outcome.version:
        yield f"  version   {outcome.version}"
    if outcome.verdict:
        yield f"  report    {folder}/report.html"
    if log and not judged:
        yield f"  output    {folder}/{log}"
    yield f"  run       {outcome.run_id}"
    yield f"  tracking  {outcome.tracking}"


def label(event: dict[str, Any]) -> str:
    """What a step is called, e.g. `fit linear`."""
    return f"{event['step']} {event.get('family', '')}".strip()


def _so_far(event: dict[str, Any]) -> str:
    detail = f", {event['detail']}" if event["detail"] else ""
    return f"{label(event)} {event['done']}/{event['total']}{detail}"


def describe(watch: Clock, starts: dict[str, float], event: dict[str, Any]) -> str:
    """The line for a step's event, empty for a start; keeps `starts` and the clock. How long a step
    took is what its end says (`seconds`), else what was seen here."""
    name = label(event)
    if event["state"] == "start":
        starts[name] = watch.elapsed()
        return ""
    seconds = event.get("seconds", watch.elapsed() - starts.get(name, 0.0))
    if event["state"] == "done":
        watch.finish(name.replace(" ", "-", 1))
        return f"  {name:<28} {seconds:6.1f} s"
    return f"  {name:<28} {seconds:6.1f} s  failed: {event.get('reason', '')}"
