"""What the controller decided and which runs came of it, in a database.

SQLite by default, Postgres by URL. Three promises, kept by the database and not by the process:

- a decision to start and the run that it starts are written in one transaction;
- an incident starts one run at most (`runs.key` is unique);
- a model has one waiting or running run at most (a partial unique index).

So a controller may be killed at any instant, and several may work on one ledger.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Index,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from driftmill import runs
from driftmill.contract import Retrain
from driftmill.retrain import policy as rules
from driftmill.retrain.policy import Facts, Trigger

#: Version of the tables below. A ledger with a higher one was written by a newer Driftmill.
SCHEMA = 1

State = Literal["pending", "running", "promoted", "rejected", "stopped", "failed"]
ACTIVE: tuple[State, ...] = ("pending", "running")
#: Advisory lock of Postgres under which the tables are made.
_SCHEMA_LOCK = 0x64726966


class LedgerError(RuntimeError):
    """A ledger that cannot be used; the message says why and what to do."""


class _Utc(TypeDecorator[datetime]):
    """A time with a zone. SQLite keeps none, so it holds UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Base(MappedAsDataclass, DeclarativeBase):
    type_annotation_map = {datetime: _Utc, dict[str, Any]: JSON}  # noqa: RUF012


class _Meta(_Base):
    __tablename__ = "ledger_schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Decision(_Base, kw_only=True):
    """An answer to an event. Deliveries of the same event with the same answer share a row, which
    then holds the newest reason and facts."""

    __tablename__ = "decisions"
    __table_args__ = (Index("decisions_by_key", "model", "key"),)

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    model: Mapped[str]
    at: Mapped[datetime]
    """When this answer was first given."""
    trigger: Mapped[str]
    key: Mapped[str]
    fingerprint: Mapped[str]
    starts_at: Mapped[datetime]
    action: Mapped[str]
    """`start`, `skip`, or `reset` for a person's reset of the breaker."""
    code: Mapped[str]
    reason: Mapped[str]
    facts: Mapped[dict[str, Any]]
    run_id: Mapped[str | None] = mapped_column(default=None)
    """The run that it started."""
    deliveries: Mapped[int] = mapped_column(default=1)
    last_delivered_at: Mapped[datetime]


class Run(_Base, kw_only=True):
    """A training run that the controller started."""

    __tablename__ = "runs"
    __table_args__ = (
        Index(
            "runs_one_active",
            "model",
            unique=True,
            sqlite_where=text("state IN ('pending', 'running')"),
            postgresql_where=text("state IN ('pending', 'running')"),
        ),
        Index("runs_by_time", "model", "created"),
    )

    run_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    key: Mapped[str] = mapped_column(unique=True)
    trigger: Mapped[str]
    note: Mapped[str] = mapped_column(default="")
    """What the alert or the person said."""
    state: Mapped[str] = mapped_column(default="pending")
    pid: Mapped[int | None] = mapped_column(default=None)
    process_started: Mapped[float | None] = mapped_column(default=None)
    """Start time of the process, in seconds since 1970: with the pid it names one process. Runs on
    a cluster have neither."""
    host: Mapped[str | None] = mapped_column(default=None)
    """Machine, or namespace of a cluster, that started it, or is about to."""
    created: Mapped[datetime]
    started: Mapped[datetime | None] = mapped_column(default=None)
    seen: Mapped[datetime | None] = mapped_column(default=None)
    """When a controller on `host` last looked after it."""
    ended: Mapped[datetime | None] = mapped_column(default=None)
    reason: Mapped[str] = mapped_column(default="")
    """Why it ended as it did."""
    version: Mapped[str | None] = mapped_column(default=None)
    """The version that it made, where it made one."""


class _Schedule(_Base):
    """Up to when the cron expression of a model has been looked after."""

    __tablename__ = "schedules"

    model: Mapped[str] = mapped_column(primary_key=True)
    expression: Mapped[str]
    last: Mapped[datetime]


class Ledger:
    """The ledger at a SQLAlchemy URL; its tables are made where they are missing.

    Args:
        url: e.g. `sqlite:////var/lib/driftmill/ledger.db` or `postgresql://user@host/driftmill`.

    Raises:
        LedgerError: the URL cannot be used, or a newer Driftmill wrote the ledger.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        try:
            self._prepare()
        except DBAPIError as error:
            raise LedgerError(f"the ledger cannot be opened: {error.orig}") from error

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def _prepare(self) -> None:
        with self._engine.execution_options(write=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            if inspect(connection).has_table(_Meta.__tablename__):
                found = connection.execute(select(func.max(_Meta.version))).scalar_one() or 0
                if found > SCHEMA:
                    raise LedgerError(
                        f"the ledger has schema version {found}, this Driftmill knows versions up "
                        f"to {SCHEMA}; upgrade Driftmill, or point DRIFTMILL_LEDGER elsewhere"
                    )
                return
            _Base.metadata.create_all(connection)
            connection.execute(_Meta.__table__.insert().values(version=SCHEMA))  # type: ignore[attr-defined]

    def decisions(self, model: str, limit: int = 100) -> list[Decision]:
        """The newest decisions, newest first."""
        with self._read() as session:
            found = select(Decision).where(Decision.model == model).order_by(Decision.id.desc())
            return list(session.scalars(found.limit(limit)))

    def runs(self, model: str, limit: int = 100) -> list[Run]:
        """The newest runs, newest first."""
        with self._read() as session:
            found = select(Run).where(Run.model == model)
            ordered = found.order_by(Run.created.desc(), Run.run_id.desc())
            return list(session.scalars(ordered.limit(limit)))

    def active(self, model: str) -> Run | None:
        """The run that is waiting or running."""
        with self._read() as session:
            return _active(session, model)

    def last_run(self, model: str, trigger: str) -> Run | None:
        """The newest run of a kind of trigger."""
        with self._read() as session:
            found = select(Run).where(Run.model == model, Run.trigger == trigger)
            return session.scalar(found.order_by(Run.created.desc()).limit(1))

    def last_success(self, model: str) -> datetime | None:
        """When the last promoted run ended."""
        with self._read() as session:
            found = select(func.max(Run.ended)).where(Run.model == model, Run.state == "promoted")
            return session.scalar(found)

    def facts(
        self, model: str, policy: Retrain, now: datetime, fresh_rows: int | None = None
    ) -> Facts:
        """What a decision at `now` would rest on, apart from the event itself."""
        with self._read() as session:
            return _facts(session, model, policy, now, key=None, fresh_rows=fresh_rows, serving=())

    def decide(
        self,
        model: str,
        policy: Retrain,
        trigger: Trigger,
        *,
        fresh_rows: int | None,
        serving: tuple[str, ...] = (),
        now: datetime,
    ) -> Decision:
        """Answer an event and write the answer; a yes also writes the run, as `pending`.

        All of it is one transaction that no other decision about the model can overlap. The
        decision given back is as it stands in the ledger: `deliveries` above 1 says that this
        event has had this answer before.
        """
        key = trigger.key(model)
        with self._write(model) as session:
            facts = _facts(
                session, model, policy, now, key=key, fresh_rows=fresh_rows, serving=serving
            )
            answer = rules.decide(policy, trigger, facts, now)
            last = session.scalar(
                select(Decision)
                .where(Decision.model == model, Decision.key == key)
                .order_by(Decision.id.desc())
                .limit(1)
            )
            if last is not None and last.code == answer.code:
                last.deliveries += 1
                last.last_delivered_at = now
                last.reason = answer.reason
                last.facts = _plain(facts, trigger)
                return last
            run_id = None
            if answer.start:
                run_id = runs.new_id()
                session.add(
                    Run(
                        run_id=run_id,
                        model=model,
                        key=key,
                        trigger=trigger.kind,
                        note=trigger.note,
                        created=now,
                    )
                )
            decision = Decision(
                model=model,
                at=now,
                trigger=trigger.kind,
                key=key,
                fingerprint=trigger.fingerprint,
                starts_at=trigger.starts_at,
                action="start" if answer.start else "skip",
                code=answer.code,
                reason=answer.reason,
                facts=_plain(facts, trigger),
                run_id=run_id,
                last_delivered_at=now,
            )
            session.add(decision)
            session.flush()  # gives the decision its id before it leaves the session
            return decision

    def reset(self, model: str, note: str, now: datetime) -> Decision:
        """Close the breaker: runs that ended before now no longer count against it."""
        with self._write(model) as session:
            failures = _failures(session, model)
            decision = Decision(
                model=model,
                at=now,
                trigger="manual",
                key=f"reset-{uuid.uuid4().hex}",
                fingerprint="reset",
                starts_at=now,
                action="reset",
                code="reset",
                reason=f"A person reset the breaker after {failures} runs without a promotion.",
                facts={"failures": failures, "note": note},
                last_delivered_at=now,
            )
            session.add(decision)
            session.flush()
            return decision

    def claim(self, run_id: str, host: str, now: datetime) -> bool:
        """Take a pending run for a host, so that no other starts it."""
        with self._engine.execution_options(write=True).begin() as connection:
            taken = connection.execute(
                update(Run)
                .where(Run.run_id == run_id, Run.state == "pending")
                .where((Run.host.is_(None)) | (Run.host == host))
                .values(host=host, seen=now)
            )
            return taken.rowcount == 1

    def started(
        self, run_id: str, pid: int | None, process_started: float | None, now: datetime
    ) -> None:
        """Note that a claimed run was started, with its process if it is one of the host."""
        self._change(
            run_id, state="running", pid=pid, process_started=process_started, started=now, seen=now
        )

    def seen(self, run_id: str, now: datetime) -> None:
        """Note that a run is still looked after."""
        self._change(run_id, seen=now)

    def end(
        self, run_id: str, state: State, reason: str, version: str | None, now: datetime
    ) -> bool:
        """Close an active run. False where it was closed already."""
        return self._change(run_id, state=state, reason=reason, version=version, ended=now)

    def _change(self, run_id: str, **values: Any) -> bool:
        with self._engine.execution_options(write=True).begin() as connection:
            changed = connection.execute(
                update(Run).where(Run.run_id == run_id, Run.state.in_(ACTIVE)).values(**values)
            )
            return changed.rowcount == 1

    def schedule_from(self, model: str, expression: str, now: datetime) -> datetime:
        """Up to when the cron expression has been looked after; a new expression starts now."""
        with self._write(model) as session:
            known = session.get(_Schedule, model)
            if known is None or known.expression != expression:
                known = session.merge(_Schedule(model=model, expression=expression, last=now))
            return known.last

    def schedule_done(self, model: str, last: datetime) -> None:
        """Note that the schedule has been looked after up to `last`."""
        with self._engine.execution_options(write=True).begin() as connection:
            connection.execute(
                update(_Schedule)
                .where(_Schedule.model == model, _Schedule.last < last)
                .values(last=last)
            )

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _write(self, model: str) -> Iterator[Session]:
        """A transaction that no other of the same model overlaps."""
        engine = self._engine.execution_options(write=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            if engine.dialect.name == "postgresql":
                # SQLite has one writer at a time; here the model's name is the lock.
                session.execute(select(func.pg_advisory_xact_lock(func.hashtext(model))))
            yield session


def to_dict(row: Decision | Run) -> dict[str, Any]:
    """Plain values for JSON: times as RFC 3339 texts."""
    return {
        name: value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
        for name, value in asdict(row).items()
    }


def _active(session: Session, model: str) -> Run | None:
    return session.scalar(select(Run).where(Run.model == model, Run.state.in_(ACTIVE)))


def _failures(session: Session, model: str) -> int:
    """Runs in a row, newest first, that began and were not promoted, since the last reset."""
    since = session.scalar(
        select(func.max(Decision.at)).where(Decision.model == model, Decision.action == "reset")
    )
    ended = select(Run.state).where(Run.model == model, Run.ended.is_not(None))
    if since is not None:
        ended = ended.where(Run.ended > since)
    # A run that the kill switch stopped before it began says nothing about the model.
    ended = ended.where((Run.state != "stopped") | Run.started.is_not(None))
    failures = 0
    for state in session.scalars(ended.order_by(Run.ended.desc())):
        if state == "promoted":
            break
        failures += 1
    return failures


def _facts(
    session: Session,
    model: str,
    policy: Retrain,
    now: datetime,
    *,
    key: str | None,
    fresh_rows: int | None,
    serving: tuple[str, ...],
) -> Facts:
    same = session.scalar(select(Run).where(Run.key == key)) if key is not None else None
    active = _active(session, model)
    mine = select(func.count()).select_from(Run).where(Run.model == model)
    used = session.scalar(mine.where(Run.created > rules.period_start(policy, now)))
    return Facts(
        fresh_rows=fresh_rows,
        serving=serving,
        same=(same.run_id, same.state) if same is not None else None,
        active=(active.run_id, active.state) if active is not None else None,
        last_end=session.scalar(select(func.max(Run.ended)).where(Run.model == model)),
        used=used or 0,
        failures=_failures(session, model),
    )


def _plain(facts: Facts, trigger: Trigger) -> dict[str, Any]:
    values = asdict(facts) | {"version": trigger.version, "note": trigger.note}
    if facts.last_end is not None:
        values["last_end"] = facts.last_end.isoformat()
    return values


def _engine(url: str) -> Engine:
    for scheme in ("postgres://", "postgresql://"):
        if url.startswith(scheme):
            url = "postgresql+psycopg://" + url.removeprefix(scheme)
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            _write_ahead(Path(parsed.database))
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"the ledger needs the package {error.name}; for Postgres, install driftmill[postgres]"
        ) from error
    except (ArgumentError, ValueError) as error:
        raise LedgerError(f"DRIFTMILL_LEDGER is not a usable SQLAlchemy URL: {error}") from error
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"the ledger cannot be opened: {error}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
    elif engine.dialect.name != "postgresql":
        raise LedgerError(f"a ledger lies in SQLite or Postgres, not in {engine.dialect.name}")
    return engine


def _write_ahead(path: Path) -> None:
    """Put a SQLite file into write-ahead mode, in which it then stays.

    One process at a time, as SQLite does not wait for others when it changes the mode, but fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with closing(sqlite3.connect(path, timeout=30)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    finally:
        os.close(folder)


def _sqlite_connect(connection: Any, _record: object) -> None:
    # The driver must not begin transactions by itself: `_sqlite_begin` does.
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA synchronous = FULL")


def _sqlite_begin(connection: Connection) -> None:
    # A writer takes its lock at once: one that reads first and writes later could not.
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
