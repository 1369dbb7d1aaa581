"""The controller: turns alerts, the schedule and requests into runs, and looks after them.

`handle` and `trigger` only decide; what they decide is in the ledger when they return. `tick`
does everything else, and all of it from the ledger, the store and the runner, so that a tick
after a crash is a tick like any other:

- a run that no longer goes on is closed by the outcome that it wrote, or as failed;
- a run that was decided but not begun is started;
- where no model serves yet, the first is trained, if that is asked for;
- the schedule is looked at;
- a canary that has held long enough goes one step further.

Any number of threads may call `handle` and `trigger`; `tick` is for one at a time.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from croniter import croniter
from pydantic import ValidationError

from driftmill import contract as contracts
from driftmill import rollout, runs
from driftmill.contract import Contract, ContractError
from driftmill.retrain import alerts
from driftmill.retrain.fresh import FreshRows
from driftmill.retrain.ledger import Decision, Ledger, Run, State
from driftmill.retrain.metrics import Metrics
from driftmill.retrain.policy import Trigger, span
from driftmill.retrain.runner import BeingStarted, Runner, RunnerError
from driftmill.rollout import Rollout, RolloutConflict
from driftmill.store import Store
from driftmill.version import code_version

logger = logging.getLogger(__name__)

#: A run of another machine that nobody there has looked after for this long is lost.
LOST = timedelta(seconds=60)
#: How often a first run that may not start is asked for again.
_FIRST = timedelta(seconds=60)
#: How often a run is noted as looked after.
_SEEN = timedelta(seconds=10)
#: How often the gauges that read the store are brought up to date without being asked.
_GAUGES = timedelta(seconds=5)


@dataclass(frozen=True)
class Reply:
    """What became of one alert or request."""

    fingerprint: str
    action: str
    """`start`, `skip`, or `ignore`: nothing that the ledger needs to know."""
    code: str
    reason: str
    run_id: str | None = None
    deliveries: int = 0


class Controller:
    """Decides about the retraining of one model, and carries it out.

    Args:
        contract_path: the contract file; it is read again when it changes.
        store: where rollout, bundles, log and outcomes lie.
        ledger: where decisions and runs are written.
        runner: starts the runs.
        train_first: whether to train the first model where none serves yet.
        clock: the present time, with a time zone.

    Raises:
        ContractError: the contract is not valid.
    """

    def __init__(
        self,
        contract_path: Path,
        store: Store,
        ledger: Ledger,
        runner: Runner,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        train_first: bool = False,
    ) -> None:
        self._path = contract_path
        self._stamp = _stamp(contract_path)
        self._contract = contracts.load(contract_path)
        self._contract_lock = threading.Lock()
        self.model = self._contract.model
        self._store = store
        self._ledger = ledger
        self._runner = runner
        #: What it counts.
        self.metrics = Metrics(self.model)
        self._clock = clock
        self._train_first = train_first
        self._first_asked: datetime | None = None
        self._fresh = FreshRows(store, self.model)
        self._rollout: Rollout | None = None
        self._gauges_at: datetime | None = None

    @property
    def contract(self) -> Contract:
        """The contract as the file has it now; after a change that is not valid, as it was."""
        with self._contract_lock:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._contract

    def _reload(self) -> None:
        try:
            new = contracts.load(self._path)
            if new.model != self.model:
                raise ContractError(
                    [f"{self._path}: the model is now {new.model}; start a controller for it"]
                )
        except ContractError as error:
            self.metrics.contract_reload_failures.labels(self.model).inc()
            logger.error("the changed contract is not used, the old one stays: %s", error)
            return
        self._contract = new
        logger.info("the contract has changed and is used from now on")

    def handle(self, payload: alerts.Payload) -> list[Reply]:
        """Decide about every alert of a delivery.

        Raises:
            OSError, ValueError: store or log cannot be read; deliver again later.
            sqlalchemy.exc.SQLAlchemyError: the ledger cannot be written; deliver again later.
        """
        return [self._alert(alert) for alert in payload.alerts]

    def _alert(self, alert: alerts.Alert) -> Reply:
        model = alert.labels.get("model", "")
        name = alert.labels.get("alertname", "")
        trigger = alerts.trigger(alert)
        if model != self.model:
            code = "other_model"
            reason = (
                f"The alert is for the model {model!r}; this is the controller of {self.model}."
            )
        elif trigger is None:
            code = "other_alert"
            known = " and ".join(alerts.ALERTS)
            reason = f"The alert {name!r} does not ask for a run; {known} do."
        elif alert.status == "resolved":
            code, reason = "resolved", "The alert is over; a run that it started goes on."
        else:
            return _reply(self._decide(trigger))
        self.metrics.decisions.labels(self.model, "ignore", code).inc()
        return Reply(alert.fingerprint, "ignore", code, reason)

    def trigger(self, note: str) -> Reply:
        """Decide about a person's request. Raises as `handle` does."""
        return _reply(self._decide(alerts.manual(note, self._clock())))

    def reset(self, note: str) -> Decision:
        """Close the breaker."""
        decision = self._ledger.reset(self.model, alerts.clean(note), self._clock())
        self.metrics.decisions.labels(self.model, decision.action, decision.code).inc()
        self._gauges_at = None
        logger.info("%s", decision.reason)
        return decision

    def decisions(self, limit: int) -> list[Decision]:
        """The newest decisions, newest first."""
        return self._ledger.decisions(self.model, limit)

    def runs(self, limit: int) -> list[Run]:
        """The newest runs, newest first."""
        return self._ledger.runs(self.model, limit)

    def _decide(self, trigger: Trigger) -> Decision:
        policy = self.contract.retrain
        serving = self._serving()
        decision = self._ledger.decide(
            self.model,
            policy,
            trigger,
            fresh_rows=self._fresh_rows(serving),
            serving=_versions(serving),
            now=self._clock(),
        )
        self.metrics.decisions.labels(self.model, decision.action, decision.code).inc()
        if decision.deliveries == 1:
            self._gauges_at = None
            logger.info("%s: %s: %s", trigger.kind, decision.action, decision.reason)
        return decision

    def _serving(self) -> Rollout | None:
        """The newest revision of the rollout; one look-up where it has not changed."""
        known = self._rollout
        new = rollout.read(self._store, self.model, after=known.revision if known else 0)
        if new is not None:
            self._rollout = known = new
        return known

    def _fresh_rows(self, serving: Rollout | None) -> int | None:
        return self._fresh.count(serving) if serving is not None else None

    def tick(self) -> None:
        """Do what there is to do now.

        Raises:
            OSError, ValueError: store, log or runner cannot be asked.
            sqlalchemy.exc.SQLAlchemyError: the ledger cannot be used.
        """
        contract = self.contract
        run = self._ledger.active(self.model)
        if run is not None:
            self._look_after(run, contract)
        self._look_at_schedule(contract)
        if self._train_first:
            self._look_for_first()
        run = self._ledger.active(self.model)
        if run is not None and run.state == "pending":
            self._look_after(run, contract)
        self._advance_canary(contract)
        self._update_gauges(contract)

    def _look_after(self, run: Run, contract: Contract) -> None:
        now = self._clock()
        here = run.host == self._runner.host
        if here and run.state == "running" and self._runner.running(run):
            if run.seen is None or now - run.seen >= _SEEN:
                self._ledger.seen(run.run_id, now)
            return
        # Only now: an outcome that was written before the run ended is there to be read.
        if self._close_by_outcome(run):
            return
        if run.host is not None and not here:
            quiet = now - (run.seen or run.created)
            if quiet > LOST:
                self._conclude(
                    run,
                    f"{run.host}, where it ran, has not been heard of for "
                    f"{span(quiet.total_seconds())}",
                )
        elif run.state == "pending":
            self._start(run, contract)
        else:
            failure = self._runner.failure(run)
            self._runner.sweep(run)
            self._conclude(run, failure)

    def _conclude(self, run: Run, failure: str) -> None:
        """Write the outcome that a run could not write: one that was killed just after it promoted
        has promoted."""
        outcome = runs.conclude(
            self._store,
            self.model,
            run.run_id,
            trigger=run.trigger,
            code_version=code_version(),
            failure=failure,
        )
        self._end(run, outcome.state, outcome.reason, outcome.version, outcome.ended)

    def _close_by_outcome(self, run: Run) -> bool:
        try:
            outcome = runs.read(self._store, self.model, run.run_id)
        except ValidationError as error:
            self._end(run, "failed", f"Its outcome is damaged: {error.errors()[0]['msg']}.")
            return True
        if outcome is None:
            return False
        self._end(run, outcome.state, outcome.reason, outcome.version, outcome.ended)
        return True

    def _start(self, run: Run, contract: Contract) -> None:
        policy = contract.retrain
        off = not policy.enabled or policy.dry_run
        if off and not self._runner.begun(run):
            setting = "retrain.dry_run is true" if policy.enabled else "retrain.enabled is false"
            self._end(
                run, "stopped", f"It had not begun when retraining was switched off: {setting}."
            )
            return
        if not self._ledger.claim(run.run_id, self._runner.host, self._clock()):
            return
        try:
            mark = self._runner.start(run, contract)
        except BeingStarted as error:
            logger.info("%s", error)
            return
        except RunnerError as error:
            self._end(run, "failed", f"{error}.")
            return
        if mark is None:
            self._conclude(run, self._runner.failure(run))
            return
        self._ledger.started(run.run_id, mark.pid, mark.process_started, self._clock())
        logger.info("run %s has been started: %s", run.run_id, self._runner.host)

    def _end(
        self,
        run: Run,
        state: State,
        reason: str,
        version: str | None = None,
        ended: datetime | None = None,
    ) -> None:
        at = ended or self._clock()
        if not self._ledger.end(run.run_id, state, reason, version, at):
            return  # another controller was faster
        self._gauges_at = None
        self.metrics.runs.labels(self.model, state).inc()
        if run.started is not None:
            self.metrics.run_duration.labels(self.model).observe(
                max(0.0, (at - run.started).total_seconds())
            )
        logger.info("run %s: %s: %s", run.run_id, state, reason)

    def _look_at_schedule(self, contract: Contract) -> None:
        expression = contract.retrain.schedule
        if expression is None:
            return
        now = self._clock().astimezone(UTC)
        done = self._ledger.schedule_from(self.model, expression, now)
        due: datetime = croniter(expression, now).get_prev(datetime)
        if due <= done:
            return
        # Of several times that passed while nobody looked only the last is made up for.
        self._decide(alerts.scheduled(due))
        self._ledger.schedule_done(self.model, due)

    def _look_for_first(self) -> None:
        """Ask for the first model. A first run that failed, or was stopped before it began, is
        asked for again, under the policy's cooldown, budget and breaker; one whose model was not
        good enough, or whose data stopped it, would come to the same: it is a person's turn."""
        now = self._clock()
        asked = self._first_asked
        if (asked is not None and now - asked < _FIRST) or self._serving() is not None:
            return
        last = self._ledger.last_run(self.model, "first")
        if last is None:
            trigger = alerts.first(None)
        elif last.ended is not None and (last.state == "failed" or last.started is None):
            trigger = alerts.first(last.ended)
        else:
            return
        self._first_asked = now
        self._decide(trigger)

    def _advance_canary(self, contract: Contract) -> None:
        now = self._serving()
        if now is None or now.challenger is None:
            return
        canary = contract.serve.canary
        if self._clock() - now.at < timedelta(seconds=canary.hold) or not self._by_run(now):
            return
        following = next((step for step in canary.steps if step > now.weight), None)
        try:
            if following is not None:
                new = rollout.change(
                    self._store,
                    self.model,
                    challenger=now.challenger,
                    weight=following,
                    shadow=now.shadow,
                    by=now.by,
                    reason=f"the canary held for {span(canary.hold)} at {now.weight:.0%}",
                    expected=now.revision,
                )
            else:
                new = rollout.change(
                    self._store,
                    self.model,
                    champion=now.challenger,
                    by=now.by,
                    reason=f"the canary held for {span(canary.hold)} at its last step, "
                    f"{now.weight:.0%}",
                    expected=now.revision,
                )
        except RolloutConflict as error:
            logger.info("the canary stays where it is: %s", error)
            return
        logger.info(
            "rollout %d: %s at %.0f%%",
            new.revision,
            new.challenger or new.champion,
            100 * (new.weight if new.challenger else 1),
        )

    def _by_run(self, now: Rollout) -> bool:
        """Whether a run made this revision. What a person sets stays as it is."""
        return runs.is_id(now.by) and bool(self._store.list(runs.key(self.model, now.by)))

    def _update_gauges(self, contract: Contract) -> None:
        now = self._clock()
        metrics = self.metrics
        active = self._ledger.active(self.model)
        metrics.run_active.labels(self.model).set(active is not None)
        if self._gauges_at is not None and now - self._gauges_at < _GAUGES:
            return
        self._gauges_at = now
        policy = contract.retrain
        facts = self._ledger.facts(self.model, policy, now)
        metrics.breaker_open.labels(self.model).set(facts.failures >= policy.breaker)
        metrics.budget_remaining.labels(self.model).set(max(0, policy.budget.runs - facts.used))
        last = self._ledger.last_success(self.model)
        if last is not None:
            metrics.last_success.labels(self.model).set(last.timestamp())
        fresh = self._fresh_rows(self._serving())
        if fresh is not None:
            metrics.fresh_rows.labels(self.model).set(fresh)


def _reply(decision: Decision) -> Reply:
    return Reply(
        fingerprint=decision.fingerprint,
        action=decision.action,
        code=decision.code,
        reason=decision.reason,
        run_id=decision.run_id,
        deliveries=decision.deliveries,
    )


def _versions(serving: Rollout | None) -> tuple[str, ...]:
    if serving is None:
        return ()
    return tuple(v for v in (serving.champion, serving.challenger) if v is not None)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is edited or replaced; None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
