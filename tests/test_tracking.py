"""Tracking against MLflow on SQLite, against nothing, and against a server that is not there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftmill import rollout, runs, tracking
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.runs import Outcome
from driftmill.store import Store
from tests.test_runs import judged


def tracked(contract: Contract, uri: str | None) -> Contract:
    values = json.loads(contract.to_json())
    return Contract.model_validate({**values, "tracking": {"backend": "mlflow", "uri": uri}})


def ended(store: Store, run_id: str, manifest: Manifest | None) -> Outcome:
    """A run that promoted a version, or none."""
    judged(store, run_id, promote=manifest is not None)
    store.write(runs.key("tiny", run_id, "report.html"), b"<html></html>")
    if manifest is not None:
        rollout.change(store, "tiny", champion=manifest.version, by=run_id, reason="better")
    outcome = runs.conclude(store, "tiny", run_id, trigger="test", code_version="1")
    return outcome.model_copy(update={"version": manifest.version if manifest else "lost"})


def aliases(uri: str) -> dict[str, str]:
    """The registry's aliases, as versions of bundles."""
    from mlflow import MlflowClient

    client: Any = MlflowClient(uri, registry_uri=uri)
    found = client.get_registered_model("tiny").aliases
    return {
        alias: client.get_model_version("tiny", number).tags[tracking.VERSION]
        for alias, number in found.items()
    }


@pytest.mark.slow
def test_runs_and_models_are_recorded_and_mirrored(
    tiny: Contract,
    store: Store,
    make_bundle: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    contract = tracked(tiny, uri)
    first, second = make_bundle(0.02), make_bundle(0.03)
    outcome = ended(store, "r1", first)

    said = tracking.record(contract, store, outcome)
    assert said.startswith("mlflow run ")
    assert aliases(uri) == {"champion": first.version}

    from mlflow import MlflowClient

    client: Any = MlflowClient(uri, registry_uri=uri)
    run = client.get_run(said.removeprefix("mlflow run "))
    assert run.data.metrics == {"auc": 0.9}
    assert run.data.tags["driftmill.verdict"] == "promoted"
    assert run.data.tags[tracking.VERSION] == first.version
    listed = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "verdict.json", "model"} <= listed

    import mlflow.onnx

    mlflow.set_tracking_uri(uri)
    assert mlflow.onnx.load_model("models:/tiny@champion").graph.name == "logistic"

    # Once more changes nothing; a rejected run registers nothing.
    assert tracking.record(contract, store, outcome) == said
    tracking.record(contract, store, ended(store, "r2", None))
    assert len(client.search_model_versions("name = 'tiny'")) == 1

    # A run that Kubeflow Pipelines opened is used, and left open.
    opened = client.create_run(run.info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    assert (
        tracking.record(contract, store, ended(store, "kubeflow", None)) == f"mlflow run {opened}"
    )
    assert client.get_run(opened).data.tags[tracking.RUN] == "kubeflow"
    assert client.get_run(opened).info.status == "RUNNING"
    monkeypatch.delenv("MLFLOW_RUN_ID")

    # A canary, its promotion and its rollback are mirrored, each as often as one likes.
    tracking.record(contract, store, ended(store, "r3", second))
    assert aliases(uri) == {"champion": second.version}
    rollout.rollback(store, "tiny", by="me")
    assert tracking.mirror(contract, store) == tracking.mirror(contract, store) == "mirrored"
    assert aliases(uri) == {"champion": first.version}
    rollout.change(store, "tiny", challenger=second.version, weight=0.1, by="me")
    tracking.mirror(contract, store)
    assert aliases(uri) == {"champion": first.version, "challenger": second.version}
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
def test_a_server_that_is_down_is_said_and_nothing_more(tiny: Contract, store: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        contract = tracked(tiny, f"http://127.0.0.1:{taken.getsockname()[1]}")
        rollout.change(store, "tiny", champion="lost", by="me")
        said = tracking.record(contract, store, ended(store, "r1", None))
        assert said.startswith("unavailable: ")
        assert tracking.mirror(contract, store).startswith("unavailable: ")


def test_where_runs_are_recorded(
    tiny: Contract, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store.folder is not None
    assert tracking.uri(tiny, store) is None
    assert tracking.uri(tracked(tiny, "http://h"), store) == "http://h"
    beside = f"sqlite:///{store.folder.parent}/mlflow.db"
    assert tracking.uri(tracked(tiny, None), store) == beside
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert tracking.uri(tracked(tiny, None), store) == "http://env"


def test_no_tracking_needs_no_mlflow(tiny: Contract, tmp_path: Path) -> None:
    script = """
import sys
from driftmill import tracking
from driftmill.contract import Contract
from driftmill.store import Store
contract, store = Contract.model_validate_json(sys.argv[1]), Store(sys.argv[2])
assert tracking.mirror(contract, store) == "none"
assert "mlflow" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", script, tiny.to_json(), str(tmp_path)], check=True, timeout=60
    )
