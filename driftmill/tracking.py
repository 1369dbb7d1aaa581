"""Runs and models, recorded where people look: in MLflow, or nowhere.

MLflow is a mirror. What serves is decided by the rollout alone, and a run that cannot be recorded
ends as it would have: the outcome says `unavailable: ...` and the next `mirror` catches up with
the aliases. Nothing here imports MLflow before it is needed, for that takes seconds.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from driftmill import rollout, runs
from driftmill.contract import Contract
from driftmill.runs import Outcome
from driftmill.store import Store

#: Tags on runs and model versions; with them everything here can be repeated without doubles.
RUN, VERSION = "driftmill.run_id", "driftmill.version"
#: The registry's aliases, named as in the rollout.
CHAMPION, CHALLENGER = "champion", "challenger"

#: Seconds after which no further request begins.
PATIENCE = 120
#: A tracking server that is down must not hold a run up: few tries, short ones.
_QUICK = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
}


def pending(contract: Contract) -> str:
    """What an outcome says of its record until the tracking server has answered."""
    return "none" if contract.tracking.backend == "none" else runs.UNRECORDED


def uri(contract: Contract, store: Store) -> str | None:
    """Where runs are recorded: the contract's URI, else `$MLFLOW_TRACKING_URI`, else a SQLite file
    beside the store's folder; None where nothing is recorded, or another process does it
    (`MLFLOW_TRACKING_URI=none`)."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if contract.tracking.backend == "none" or given == "none":
        return None
    named = contract.tracking.uri or given
    if named or store.folder is None:
        return named or None
    return f"sqlite:///{store.folder.parent / 'mlflow.db'}"


def record(contract: Contract, store: Store, outcome: Outcome) -> str:
    """Record a run that has ended, and mirror the rollout.

    Returns:
        What to tell people: `mlflow run <id>`, `none`, or `unavailable: <why>`.
    """
    return _attempt(contract, store, lambda client: _record(client, contract, store, outcome))


def mirror(contract: Contract, store: Store) -> str:
    """Set the aliases `champion` and `challenger` as the rollout has them, also after a rollback.

    Returns:
        `mirrored`, `none`, or `unavailable: <why>`.
    """

    def work(client: Any) -> str:
        _mirror(client, contract.model, store)
        return "mirrored"

    return _attempt(contract, store, work)


def _attempt(contract: Contract, store: Store, work: Callable[[Any], str]) -> str:
    """Do the work with a client; a server that fails is an answer, not an error."""
    place = uri(contract, store)
    if place is None:
        return "none"
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    mlflow = importlib.import_module("mlflow")
    exceptions = importlib.import_module("mlflow.exceptions")
    # MLflow tries a database that cannot be opened ten times, for almost two minutes.
    databases: Any = importlib.import_module("mlflow.store.db.utils")
    databases.MAX_RETRY_COUNT = 2
    try:
        return work(_Hasty(mlflow.MlflowClient(place, registry_uri=place)))
    # Connection errors of `requests` are OSErrors; whatever else a server says is MLflow's own.
    except (exceptions.MlflowException, OSError, ImportError, *_let_through()) as error:
        said = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))  # no passwords of URLs
        return f"unavailable: {said[:300]}"


class _Hasty:
    """A client that begins nothing more when its time is up; each request has its own limit."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._until = time.monotonic() + PATIENCE

    def __getattr__(self, name: str) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError(f"the tracking server is slow: not done after {PATIENCE} seconds")
        return getattr(self._client, name)


def _let_through() -> tuple[type[Exception], ...]:
    """What MLflow passes on as it is: of a database that it opens itself, and of S3 where artifacts
    do not go by way of the server."""
    names = ["sqlalchemy.exc.SQLAlchemyError", "boto3.exceptions.Boto3Error"]
    names += ["botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError"]
    found = []
    for module, _, name in (full.rpartition(".") for full in names):
        with suppress(ImportError):
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def _record(client: Any, contract: Contract, store: Store, outcome: Outcome) -> str:
    experiment = _experiment(client, contract, store)
    found = client.search_runs([experiment], f"tags.`{RUN}` = '{outcome.run_id}'")
    if found:
        run_id = str(found[0].info.run_id)
    else:
        run_id = _log(client, experiment, contract, store, outcome)
    _register(client, contract, store, outcome, run_id)
    _mirror(client, contract.model, store)
    return f"mlflow run {run_id}"


def _experiment(client: Any, contract: Contract, store: Store) -> str:
    """Id of the model's experiment. With SQLite its artifacts lie beside the database, and not in
    whatever folder the process was started from."""
    experiment = client.get_experiment_by_name(contract.model)
    if experiment is not None:
        return str(experiment.experiment_id)
    place = uri(contract, store) or ""
    artifacts = None
    if place.startswith("sqlite:///"):
        folder = Path(place.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
        artifacts = (folder / contract.model).as_uri()
    return str(client.create_experiment(contract.model, artifact_location=artifacts))


def _log(client: Any, experiment: str, contract: Contract, store: Store, outcome: Outcome) -> str:
    entities = importlib.import_module("mlflow.entities")
    records = {r.name: r.facts for r in runs.steps(store, contract.model, outcome.run_id)}
    tags = {
        RUN: outcome.run_id,
        VERSION: outcome.version,
        "driftmill.verdict": outcome.state,
        "driftmill.reason": outcome.reason,
        "driftmill.trigger": outcome.trigger,
        "driftmill.champion_before": outcome.champion_before,
        "driftmill.code_version": outcome.code_version,
        "driftmill.data_fingerprint": records.get("prepare", {}).get("fingerprint"),
    }
    family = records.get("assemble", {}).get("family")
    params = {"family": family} | (records.get(f"fit-{family}", {}).get("params") or {})
    at = int(outcome.started.timestamp() * 1000)
    tags = {k: str(v)[:5000] for k, v in tags.items() if v is not None}
    # Where Kubeflow Pipelines has opened an MLflow run for this one, it also ends it.
    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        for name, value in tags.items():
            client.set_tag(given, name, value)
    run_id = given or str(
        client.create_run(experiment, at, tags=tags, run_name=outcome.run_id).info.run_id
    )
    client.log_batch(
        run_id,
        metrics=[entities.Metric(k, v, at, 0) for k, v in sorted(outcome.metrics.items())],
        params=[entities.Param(k, str(v)[:6000]) for k, v in sorted(params.items()) if v],
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in ("report.html", "verdict.json"):
            key = runs.key(contract.model, outcome.run_id, name)
            if store.exists(key):
                (Path(folder) / name).write_bytes(store.read(key))
        client.log_artifacts(run_id, folder)
    status = "FINISHED" if outcome.state in ("promoted", "rejected") else "FAILED"
    if not given:
        client.set_terminated(run_id, status, int(outcome.ended.timestamp() * 1000))
    return run_id


def _register(client: Any, contract: Contract, store: Store, outcome: Outcome, run_id: str) -> None:
    """Put a promoted model into the registry, once, as an ONNX model that MLflow can load."""
    if outcome.state != "promoted" or outcome.version is None:
        return
    if _registered(client, contract.model, outcome.version) is not None:
        return
    if not client.search_registered_models(f"name = '{contract.model}'"):
        client.create_registered_model(contract.model, description=contract.description)
    from driftmill import bundle

    with tempfile.TemporaryDirectory() as folder:
        place = bundle.key(contract.model, outcome.version)
        source = store.get_folder(place, Path(folder), bundle.MANIFEST)
        saved = Path(folder) / "model"
        _save(source / "model.onnx", saved)
        client.log_artifacts(run_id, str(saved), "model")
    artifacts = client.get_run(run_id).info.artifact_uri
    client.create_model_version(
        contract.model,
        source=f"{artifacts}/model",
        run_id=run_id,
        tags={VERSION: outcome.version},
        description=outcome.reason,
    )


def _save(model: Path, folder: Path) -> None:
    onnx = importlib.import_module("onnx")
    mlflow_onnx = importlib.import_module("mlflow.onnx")
    # Without explicit requirements MLflow runs the model to find out: ten seconds.
    versions = [f"{p}=={_installed(p)}" for p in ("onnxruntime", "numpy")]
    mlflow_onnx.save_model(onnx.load(model), str(folder), pip_requirements=versions)


def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _mirror(client: Any, model: str, store: Store) -> None:
    now = rollout.read(store, model)
    if now is None:
        return
    for alias, version in ((CHAMPION, now.champion), (CHALLENGER, now.challenger)):
        number = _registered(client, model, version) if version else None
        if number is not None:
            client.set_registered_model_alias(model, alias, number)
        elif client.search_registered_models(f"name = '{model}'"):
            # No alias is better than one that names a model which does not serve.
            client.delete_registered_model_alias(model, alias)


def _registered(client: Any, model: str, version: str) -> str | None:
    """The registry's number of a bundle's version, or None."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{VERSION}` = '{version}'")
    return str(found[0].version) if found else None
