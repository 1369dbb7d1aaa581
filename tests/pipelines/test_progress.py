"""The clock of the progress display."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from driftmill.runs import Outcome, State, StepTime
from pipelines import progress

START = datetime(2026, 1, 1, tzinfo=UTC)


def outcome(state: State, **ends: float) -> Outcome:
    return Outcome(
        run_id="r",
        model="m",
        state=state,
        reason="",
        trigger="",
        started=START,
        ended=START + timedelta(seconds=60),
        steps=tuple(
            StepTime(
                name=name.replace("_", "-"),
                started=START,
                ended=START + timedelta(seconds=end),
                state="done",
            )
            for name, end in ends.items()
        ),
    )


def test_without_an_earlier_run_there_is_no_estimate() -> None:
    assert progress.clock([]).remaining() is None
    assert progress.clock([outcome("failed", prepare=3)]).remaining() is None


def test_the_newest_judged_run_counts() -> None:
    earlier = [outcome("rejected", prepare=3, judge=9), outcome("promoted", prepare=2, judge=8)]
    clock = progress.clock([*earlier, outcome("failed", prepare=1)])
    assert clock.total == 8


def test_overlapping_steps_do_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = progress.clock([outcome("promoted", prepare=2, fit_a=10, fit_b=6, judge=14)])
    now = 0.0
    monkeypatch.setattr(clock, "elapsed", lambda: now)
    assert clock.remaining() == 14
    now = 4.0  # twice as slow so far
    clock.finish("prepare")
    assert clock.remaining() == 12
    now = 14.0
    clock.finish("fit-a")
    assert clock.remaining() == 4
    now = 15.0
    clock.finish("fit-b")  # ended before fit-a last time: no step back
    assert clock.remaining() == 3
    now = 99.0
    assert clock.remaining() == 0


def test_a_line_for_each_step_that_ended(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.Lines(progress.Clock({}))
    lines.event({"event": "step", "step": "fit", "family": "linear", "state": "start"})
    lines.event({"event": "step", "step": "fit", "family": "linear", "state": "done"})
    lines.event({"event": "step", "step": "judge", "state": "start"})
    lines.event({"event": "step", "step": "judge", "state": "failed", "reason": "no memory"})
    fit, judge = capsys.readouterr().out.splitlines()
    assert fit.split()[:2] == ["fit", "linear"]
    assert judge.endswith("failed: no memory")


def epoch(done: int, total: int) -> dict[str, Any]:
    """What `runs.progress` prints."""
    event = {"event": "progress", "step": "fit", "family": "mlp", "done": done, "total": total}
    return {**event, "detail": "validation accuracy 0.91"}


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (4, 4), (10, 10), (11, 10), (300, 10)])
def test_a_long_step_says_how_far_it_is_ten_times_at_most(
    capsys: pytest.CaptureFixture[str], total: int, lines: int
) -> None:
    shown = progress.Lines(progress.Clock({}))
    for done in range(1, total + 1):
        shown.event(epoch(done, total))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert printed[-1].strip() == f"fit mlp {total}/{total}, validation accuracy 0.91"


def test_the_bar_keeps_the_lines_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(progress.clock([outcome("promoted", prepare=2, judge=8)])) as bar:
        bar.event({"event": "step", "step": "prepare", "state": "start"})
        assert list(bar.running) == ["prepare"]
        bar.event({"event": "step", "step": "prepare", "state": "done"})
        bar.event({"event": "step", "step": "fit", "family": "mlp", "state": "start"})
        bar.event(epoch(3, 10))
        assert bar.running == {"fit mlp": "fit mlp 3/10, validation accuracy 0.91"}
        bar.event({"event": "step", "step": "fit", "family": "mlp", "state": "done"})
        assert bar.running == {}
        bar.line("[not] markup")
    assert "prepare" in (printed := capsys.readouterr().out)
    assert "[not] markup" in printed
