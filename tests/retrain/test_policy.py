"""The policy: order of the checks, reasons, and what can never happen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill.contract import Budget, Retrain
from driftmill.retrain import policy
from driftmill.retrain.policy import Facts, Trigger, decide, span

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
DRIFT = Trigger("drift", "f1", NOW - timedelta(minutes=5), version="v1")
READY = Facts(fresh_rows=800, serving=("v1",))

#: Each check with facts and settings on which it alone objects, in the order of the checks.
CHECKS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("disabled", {"enabled": False}, {}),
    ("trigger_disabled", {"triggers": ("manual",)}, {}),
    ("duplicate", {}, {"same": ("r1", "running")}),
    ("stale", {}, {"serving": ("v2", "v3")}),
    ("running", {}, {"active": ("r2", "pending")}),
    ("breaker", {}, {"failures": 3}),
    ("cooldown", {}, {"last_end": NOW - timedelta(minutes=12)}),
    ("budget", {}, {"used": 10}),
    ("fresh_rows", {}, {"fresh_rows": 312}),
    ("dry_run", {"dry_run": True}, {}),
]


def test_starts_when_nothing_objects() -> None:
    answer = decide(Retrain(), DRIFT, READY, NOW)
    assert answer.start
    assert answer.code == "started"
    assert answer.reason == (
        "800 fresh labelled rows (500 needed), 0 of 10 runs used in the last 1d: a run starts."
    )


@pytest.mark.parametrize("index", range(len(CHECKS)))
def test_the_first_check_that_objects_answers(index: int) -> None:
    """With this check and all later ones objecting, this one gives the answer."""
    settings: dict[str, Any] = {}
    facts: dict[str, Any] = {"fresh_rows": 800, "serving": ("v1",)}
    for _, more_settings, more_facts in CHECKS[index:]:
        settings |= more_settings
        facts |= more_facts
    answer = decide(Retrain(**settings), DRIFT, Facts(**facts), NOW)
    assert (answer.start, answer.code) == (False, CHECKS[index][0])


@pytest.mark.parametrize(("code", "settings", "facts"), CHECKS)
def test_each_check_objects_alone(
    code: str, settings: dict[str, Any], facts: dict[str, Any]
) -> None:
    known: dict[str, Any] = {"fresh_rows": 800, "serving": ("v1",)} | facts
    answer = decide(Retrain(**settings), DRIFT, Facts(**known), NOW)
    assert (answer.start, answer.code) == (False, code)
    assert answer.reason[0].isupper() or answer.reason[0].isdigit()
    assert answer.reason.endswith(".")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(fresh_rows=312), "312 fresh labelled rows, 500 needed."),
        (Facts(fresh_rows=1), "1 fresh labelled row, 500 needed."),
        (
            Facts(fresh_rows=800, last_end=NOW - timedelta(minutes=12, seconds=5)),
            "The last run ended 12m 5s ago, and the cooldown is 1h.",
        ),
        (
            Facts(fresh_rows=800, failures=4),
            "4 runs in a row ended without a promotion, and 3 open the breaker; a person must "
            "reset it.",
        ),
        (
            Facts(fresh_rows=800, used=10),
            "10 runs began in the last 1d, and the budget is 10.",
        ),
        (
            Facts(fresh_rows=800, serving=("v2",)),
            "The alert is about version v1, but v2 serves now.",
        ),
    ],
)
def test_reasons_say_the_numbers(facts: Facts, reason: str) -> None:
    assert decide(Retrain(), DRIFT, facts, NOW).reason == reason


def test_everything_is_fresh_where_nothing_serves() -> None:
    assert decide(Retrain(), DRIFT, Facts(fresh_rows=None), NOW).start


def test_limits_are_met_exactly() -> None:
    facts = Facts(fresh_rows=500, used=9, failures=2, last_end=NOW - timedelta(hours=1))
    assert decide(Retrain(), DRIFT, facts, NOW).start


def test_an_end_in_the_future_counts_as_now() -> None:
    """The clock was set back: the cooldown begins anew, and the reason stays readable."""
    facts = Facts(fresh_rows=800, last_end=NOW + timedelta(hours=3))
    assert decide(Retrain(), DRIFT, facts, NOW).reason.startswith("The last run ended 0s ago")


def test_key_names_the_incident() -> None:
    key = DRIFT.key("tiny")
    elsewhere = DRIFT.starts_at.astimezone(datetime.now().astimezone().tzinfo)
    assert Trigger("quality", "f1", elsewhere, note="other words").key("tiny") == key
    assert DRIFT.key("other") != key
    assert Trigger("drift", "f2", DRIFT.starts_at).key("tiny") != key
    assert Trigger("drift", "f1", NOW).key("tiny") != key


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (2.5, "2.5s"), (42, "42s"), (185, "3m 5s"), (3600, "1h"), (187_200, "2d 4h")],
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


_POLICIES = st.builds(
    Retrain,
    enabled=st.booleans(),
    dry_run=st.booleans(),
    triggers=st.sets(st.sampled_from(["drift", "quality", "schedule", "manual"])).map(tuple),
    min_fresh_rows=st.integers(0, 3),
    cooldown=st.sampled_from([0.0, 5.0, 60.0]),
    budget=st.builds(Budget, runs=st.integers(0, 3), period=st.sampled_from([10.0, 100.0])),
    breaker=st.integers(1, 3),
)
#: Seconds since the event before, kind, incident, fresh rows, and whether the active run ends now
#: (and how) before the event comes.
_EVENTS = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.sampled_from(["drift", "quality", "schedule", "manual"]),
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([None, "promoted", "rejected", "failed"]),
    ),
    max_size=40,
)


@given(policy_=_POLICIES, events=_EVENTS)
def test_no_sequence_of_events_breaks_a_promise(
    policy_: Retrain, events: list[tuple[int, Any, int, int, str | None]]
) -> None:
    now = NOW
    incidents: dict[str, tuple[str, str]] = {}
    starts: list[datetime] = []
    active: tuple[str, str] | None = None
    last_end: datetime | None = None
    failures = 0
    for passed, kind, incident, fresh, ends in events:
        now += timedelta(seconds=passed)
        if active is not None and ends is not None:
            active, last_end = None, now
            failures = 0 if ends == "promoted" else failures + 1
        trigger = Trigger(kind, str(incident), NOW)
        period = policy.period_start(policy_, now)
        facts = Facts(
            fresh_rows=fresh,
            same=incidents.get(trigger.key("m")),
            active=active,
            last_end=last_end,
            used=sum(start > period for start in starts),
            failures=failures,
        )
        answer = decide(policy_, trigger, facts, now)
        assert answer.start == (answer.code == "started")
        assert answer.code in policy.CODES
        if not answer.start:
            continue
        assert policy_.enabled
        assert not policy_.dry_run
        assert kind in policy_.triggers
        assert active is None
        assert trigger.key("m") not in incidents
        assert fresh >= policy_.min_fresh_rows
        assert failures < policy_.breaker
        assert last_end is None or (now - last_end).total_seconds() >= policy_.cooldown
        active = (str(len(starts)), "running")
        incidents[trigger.key("m")] = active
        starts.append(now)
        # No period of this length, wherever it begins, holds more runs than the budget.
        length = timedelta(seconds=policy_.budget.period)
        assert sum(start > now - length for start in starts) <= policy_.budget.runs
