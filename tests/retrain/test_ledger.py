"""The ledger, in SQLite and in a real Postgres: nothing starts twice, and every answer is there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.orm import Session

from driftmill.contract import Retrain
from driftmill.retrain.ledger import SCHEMA, Decision, Ledger, LedgerError, Run, State, to_dict
from driftmill.retrain.policy import Trigger

NOW = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
POLICY = Retrain(cooldown=0, min_fresh_rows=100)


def drift(fingerprint: str = "f1") -> Trigger:
    return Trigger("drift", fingerprint, NOW, note="amount drifted")


def decide(
    ledger: Ledger,
    trigger: Trigger,
    *,
    policy: Retrain = POLICY,
    fresh: int | None = 200,
    after: float = 0,
    model: str = "tiny",
) -> Decision:
    now = NOW + timedelta(seconds=after)
    return ledger.decide(model, policy, trigger, fresh_rows=fresh, now=now)


def finish(ledger: Ledger, decision: Decision, state: State, after: float = 0) -> None:
    assert decision.run_id is not None
    at = NOW + timedelta(seconds=after)
    ledger.started(decision.run_id, 1, 1.0, at)
    assert ledger.end(decision.run_id, state, "as it was told", None, at)


def test_a_decision_and_its_run_are_written_together(ledger: Ledger) -> None:
    decision = decide(ledger, drift())
    assert (decision.action, decision.code, decision.deliveries) == ("start", "started", 1)
    (run,) = ledger.runs("tiny")
    assert run.run_id == decision.run_id
    assert (run.state, run.key, run.trigger, run.note) == (
        "pending",
        drift().key("tiny"),
        "drift",
        "amount drifted",
    )
    assert run.created == NOW
    assert run.created.tzinfo is not None
    (kept,) = ledger.decisions("tiny")
    assert to_dict(kept) == to_dict(decision) | {"facts": kept.facts}
    assert kept.facts["fresh_rows"] == 200
    assert json.dumps(to_dict(kept))
    assert to_dict(kept)["at"] == "2026-05-01T12:00:00.123456Z"


def test_the_same_answer_counts_deliveries_and_another_is_a_new_row(ledger: Ledger) -> None:
    for second in range(3):
        decide(ledger, drift(), fresh=50 + second, after=second)
    (row,) = ledger.decisions("tiny")
    assert (row.code, row.deliveries) == ("fresh_rows", 3)
    assert row.at == NOW
    assert row.last_delivered_at == NOW + timedelta(seconds=2)
    assert row.reason == "52 fresh labelled rows, 100 needed."
    assert row.facts["fresh_rows"] == 52

    # Delivered again with enough rows, it is considered again.
    started = decide(ledger, drift(), fresh=100, after=10)
    assert started.action == "start"
    for second in range(20, 25):
        assert decide(ledger, drift(), after=second).code == "duplicate"
    rows = ledger.decisions("tiny")
    assert [(r.code, r.deliveries) for r in rows] == [
        ("duplicate", 5),
        ("started", 1),
        ("fresh_rows", 3),
    ]
    assert len(ledger.runs("tiny")) == 1


def test_an_incident_never_starts_a_second_run(ledger: Ledger) -> None:
    decision = decide(ledger, drift())
    finish(ledger, decision, "rejected", after=5)
    again = decide(ledger, drift(), after=10)
    assert again.code == "duplicate"
    assert again.reason == (
        f"This incident has already started run {decision.run_id}, which is rejected."
    )


def test_one_run_at_a_time_but_models_do_not_hinder_each_other(ledger: Ledger) -> None:
    assert decide(ledger, drift("f1")).action == "start"
    assert decide(ledger, drift("f2")).code == "running"
    assert decide(ledger, drift("f2"), model="other").action == "start"
    assert len(ledger.runs("tiny")) == len(ledger.runs("other")) == 1


def test_budget_counts_runs_of_the_period_only(ledger: Ledger) -> None:
    policy = Retrain.model_validate(
        {"cooldown": 0, "min_fresh_rows": 0, "budget": {"runs": 2, "period": "1h"}}
    )
    for number, after in enumerate((0, 600)):
        decision = decide(ledger, drift(str(number)), policy=policy, after=after)
        finish(ledger, decision, "promoted", after=after + 1)
    assert decide(ledger, drift("x"), policy=policy, after=700).code == "budget"
    assert ledger.facts("tiny", policy, NOW + timedelta(seconds=700)).used == 2
    assert decide(ledger, drift("x"), policy=policy, after=3600).action == "start"


def test_breaker_opens_and_a_reset_closes_it(ledger: Ledger) -> None:
    for number, state in enumerate(("promoted", "rejected", "stopped", "failed")):
        finish(ledger, decide(ledger, drift(str(number)), after=number), state, after=number)  # type: ignore[arg-type]
    refused = decide(ledger, drift("x"), after=10)
    assert refused.code == "breaker"
    assert refused.facts["failures"] == 3

    reset = ledger.reset("tiny", "data are mended", NOW + timedelta(seconds=11))
    assert (reset.action, reset.facts) == ("reset", {"failures": 3, "note": "data are mended"})
    assert decide(ledger, drift("x"), after=12).action == "start"


def test_a_promotion_closes_the_breaker(ledger: Ledger) -> None:
    for number, state in enumerate(("rejected", "rejected", "promoted", "rejected")):
        finish(ledger, decide(ledger, drift(str(number)), after=number), state, after=number)  # type: ignore[arg-type]
    assert ledger.facts("tiny", POLICY, NOW + timedelta(seconds=9)).failures == 1
    assert ledger.last_success("tiny") == NOW + timedelta(seconds=2)


def test_a_run_that_never_began_does_not_count_as_a_failure(ledger: Ledger) -> None:
    decision = decide(ledger, drift())
    assert decision.run_id is not None
    assert ledger.end(decision.run_id, "stopped", "switched off", None, NOW)
    assert ledger.facts("tiny", POLICY, NOW).failures == 0


def test_only_one_closes_a_run_and_only_one_claims_it(ledger: Ledger) -> None:
    run_id = decide(ledger, drift()).run_id
    assert run_id is not None
    assert ledger.claim(run_id, "here", NOW)
    assert ledger.claim(run_id, "here", NOW)
    assert not ledger.claim(run_id, "there", NOW)
    ledger.started(run_id, 4711, 12.5, NOW)
    assert not ledger.claim(run_id, "here", NOW)
    run = ledger.active("tiny")
    assert run is not None
    assert (run.state, run.pid, run.process_started, run.host) == ("running", 4711, 12.5, "here")
    assert ledger.end(run_id, "promoted", "better", "abc", NOW)
    assert not ledger.end(run_id, "failed", "late", None, NOW)
    (closed,) = ledger.runs("tiny")
    assert (closed.state, closed.reason, closed.version) == ("promoted", "better", "abc")
    assert ledger.active("tiny") is None


def test_the_database_itself_refuses_a_second_active_run_and_a_second_key(url: str) -> None:
    """Whoever goes around the policy is still stopped."""
    ledger = Ledger(url)
    engine = ledger._engine

    def add(run_id: str, key: str, state: str, model: str = "tiny") -> None:
        with Session(engine.execution_options(write=True)) as session, session.begin():
            session.add(
                Run(
                    run_id=run_id,
                    model=model,
                    key=key,
                    trigger="drift",
                    state=state,
                    created=NOW,
                )
            )

    add("r1", "k1", "pending")
    add("r2", "k2", "promoted")
    add("r3", "k3", "running", model="other")
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        add("r4", "k4", "running")
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        add("r5", "k2", "failed")
    ledger.close()


def test_threads_with_ledgers_of_their_own_start_one_run(url: str) -> None:
    """Half of them deliver one incident, half of them deliver one each."""
    barrier = threading.Barrier(16, timeout=30)

    def work(number: int) -> list[str]:
        ledger = Ledger(url)  # all at once: the tables are made once, too
        barrier.wait()
        name = "f1" if number % 2 else f"g{number}"
        codes = [decide(ledger, drift(name)).code for _ in range(4)]
        ledger.close()
        return codes

    with ThreadPoolExecutor(16) as pool:
        codes = [code for found in pool.map(work, range(16)) for code in found]
    assert codes.count("started") == 1
    assert set(codes) <= {"started", "duplicate", "running"}
    ledger = Ledger(url)
    assert len(ledger.runs("tiny")) == 1
    assert sum(row.deliveries for row in ledger.decisions("tiny")) == 64
    ledger.close()


_PROCESS = """
import sys
from datetime import UTC, datetime
from driftmill.contract import Retrain
from driftmill.retrain.ledger import Ledger
from driftmill.retrain.policy import Trigger
url, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
now = datetime(2026, 5, 1, tzinfo=UTC)
policy = Retrain(cooldown=0, min_fresh_rows=0)
for _ in range(10):
    trigger = Trigger("drift", name, now)
    print(Ledger(url).decide("tiny", policy, trigger, fresh_rows=0, now=now).code)
"""


@pytest.mark.slow
def test_processes_start_one_run(url: str) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("f1", "f1", "f2")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    codes: list[str] = []
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        codes += child.communicate(timeout=60)[0].split()
        assert child.returncode == 0
    assert len(codes) == 30
    assert codes.count("started") == 1
    ledger = Ledger(url)
    assert len(ledger.runs("tiny")) == 1
    ledger.close()


def test_schedule_is_remembered_and_a_new_expression_starts_now(ledger: Ledger) -> None:
    later = NOW + timedelta(hours=5)
    assert ledger.schedule_from("tiny", "0 * * * *", NOW) == NOW
    assert ledger.schedule_from("tiny", "0 * * * *", later) == NOW
    ledger.schedule_done("tiny", later)
    ledger.schedule_done("tiny", NOW)  # a slower controller does not turn it back
    assert ledger.schedule_from("tiny", "0 * * * *", later) == later
    assert ledger.schedule_from("tiny", "5 * * * *", NOW) == NOW


def test_limits_and_order(ledger: Ledger) -> None:
    for number in range(5):
        finish(ledger, decide(ledger, drift(str(number)), after=number), "promoted", after=number)
    assert [d.fingerprint for d in ledger.decisions("tiny", 2)] == ["4", "3"]
    assert [r.created for r in ledger.runs("tiny", 2)] == [
        NOW + timedelta(seconds=4),
        NOW + timedelta(seconds=3),
    ]
    assert ledger.decisions("unknown") == []


def test_a_ledger_is_kept(url: str) -> None:
    first = Ledger(url)
    decide(first, drift())
    first.close()
    second = Ledger(url)
    assert decide(second, drift()).code == "duplicate"
    second.close()


def test_a_newer_ledger_is_refused(url: str) -> None:
    ledger = Ledger(url)
    with ledger._engine.execution_options(write=True).begin() as connection:
        connection.execute(sqlalchemy.text(f"UPDATE ledger_schema SET version = {SCHEMA + 1}"))
    ledger.close()
    with pytest.raises(LedgerError, match=r"schema version 2, this Driftmill knows .* up to 1"):
        Ledger(url)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not a usable SQLAlchemy URL"),
        ("postgresql://host:port/x", "not a usable SQLAlchemy URL"),
        ("sqlite:////proc/ledger.db", "cannot be opened"),
        ("sqlite:////proc/folder/ledger.db", "cannot be opened"),
        ("mysql+pymysql://host/x", "not in mysql|needs the package pymysql"),
    ],
)
def test_a_wrong_url_is_explained(text: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        Ledger(text)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(LedgerError, match="cannot be opened: file is not a database"):
        Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
