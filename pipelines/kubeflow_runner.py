"""Runs on Kubeflow Pipelines: each is the package of the contract, under the run's id as its name.

Everything is looked up by that name in the model's experiment, so that any controller finds what
another has started.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from driftmill.contract import Contract
from driftmill.retrain.ledger import Run
from driftmill.retrain.runner import Mark, RunnerAway, RunnerError, why
from pipelines import compile as packages
from pipelines import kubeflow, submit
from pipelines.kubeflow import ApiError, Kubeflow, Object

logger = logging.getLogger(__name__)


class KubeflowRunner:
    """Runs on Kubeflow Pipelines.

    Args:
        options: endpoint, namespace, experiment, service_account, pipeline_root, image and store,
            as `driftmill submit` takes them.

    Raises:
        ApiError: no endpoint is named, or the store is a folder, which a cluster has not got.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._endpoint = kubeflow.address(options.endpoint)
        self._store = kubeflow.store_uri(options)
        self.host = f"Kubeflow Pipelines at {self._endpoint}"
        self._connected: Kubeflow | None = None
        #: Ids of experiments, by name, and Kubeflow's ids of runs, by ours.
        self._experiments: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def begun(self, run: Run) -> bool:
        """Whether Kubeflow has the run."""
        with _later():
            return self._find(run) is not None

    def start(self, run: Run, contract: Contract) -> Mark:
        """Create the run, unless it is there. One that has ended counts as started, too: `running`
        tells."""
        with _later():
            if self._find(run) is None:
                self._create(run, contract)
        return Mark()

    def running(self, run: Run) -> bool:
        """Whether Kubeflow still works at it."""
        with _later():
            found = self._find(run)
        return found is not None and found.get("state") not in submit.ENDED

    def failure(self, run: Run) -> str:
        """What Kubeflow says of it."""
        with _later():
            found = self._find(run)
        if found is None:
            return f"{self.host} has no run {run.run_id} any more, and it left no outcome"
        namespace = self._options.namespace or "kubeflow"
        account = self._options.service_account
        state, reason = submit.outcome_of(found, run.model, namespace, account)
        return reason if state == "failed" else f"it left no outcome, though {reason}"

    def sweep(self, run: Run) -> None:
        """Nothing: what has ended on Kubeflow has left nothing that runs."""

    def _api(self) -> Kubeflow:
        if self._connected is None:
            self._connected = Kubeflow(self._endpoint, self._options.namespace)
        return self._connected

    def _experiment(self, run: Run) -> str:
        name = self._options.experiment or run.model
        if name not in self._experiments:
            self._experiments[name] = self._api().experiment(name)
        return self._experiments[name]

    def _find(self, run: Run) -> Object | None:
        """The run as it is now; of several of this name the first, as the others make way."""
        if known := self._ids.get(run.run_id):
            try:
                return self._api().run(known)
            except ApiError as error:
                if error.status != 404:
                    raise
                return None
        found = self._api().runs(self._experiment(run), run.run_id)
        if not found:
            return None
        first = min(found, key=lambda r: (str(r["created_at"]), str(r["run_id"])))
        self._ids[run.run_id] = str(first["run_id"])
        return first

    def _create(self, run: Run, contract: Contract) -> None:
        parameters = {"run_id": run.run_id, "trigger": why(run)}
        body = kubeflow.body(contract, self._store, parameters, self._options)
        created = self._api().create_run(
            {**body, "display_name": run.run_id, "experiment_id": self._experiment(run)}
        )
        mine = str(created["run_id"])
        # Another controller may have been at it in the same moment.
        first = self._find(run)
        if first is not None and first["run_id"] != mine:
            self._api().delete_run(mine)
        logger.info("run %s is Kubeflow's %s", run.run_id, self._ids[run.run_id])


@contextmanager
def _later() -> Iterator[None]:
    """Say which errors may pass: those that a person can mend without a new run are among them."""
    try:
        yield
    except packages.PackageError as error:
        raise RunnerError(str(error)) from error
    except ApiError as error:
        if error.status in (400, 413, 422):
            raise RunnerError(str(error)) from error
        raise RunnerAway(str(error)) from error
