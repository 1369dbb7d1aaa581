"""The steps: how a judged model comes to serve, and what stops it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from driftmill import bundle, rollout, runs, steps
from driftmill.bundle import Manifest
from driftmill.contract import Contract, load
from driftmill.store import Store
from tests.pipelines.contracts import write_contract
from tests.test_runs import verdict


def changed(contract: Contract, **sections: object) -> Contract:
    """The contract with some sections replaced."""
    return Contract.model_validate({**json.loads(contract.to_json()), **sections})


def judged_against(store: Store, run_id: str, manifest: Manifest, revision: int) -> None:
    """A run whose model was found better than what served at `revision`."""
    with runs.step(store, "tiny", run_id, "judge") as step:
        step.facts.update(version=manifest.version, champion=None, revision=revision)
    text = json.dumps(verdict(promote=True))
    store.write(runs.key("tiny", run_id, "verdict.json"), text.encode())


Promote = Callable[..., rollout.Rollout | None]


@pytest.fixture
def promote(
    tiny: Contract, store: Store, make_bundle: Callable[..., Manifest], tmp_path: Path
) -> Promote:
    """Promote the bundle of a slope in a run; the rollout afterwards."""

    def run(
        run_id: str, slope: float, revision: int, contract: Contract = tiny
    ) -> rollout.Rollout | None:
        manifest = make_bundle(slope)
        judged_against(store, run_id, manifest, revision)
        steps.promote(contract.to_json(), store.uri, run_id, tmp_path / f"bundle-{slope}")
        return rollout.read(store, "tiny")

    return run


def test_the_first_model_serves_at_once(promote: Promote, store: Store, tiny: Contract) -> None:
    canary = changed(tiny, serve={"canary": {"steps": [0.1, 0.5]}})
    now = promote("r1", 0.02, 0, canary)
    assert now is not None
    assert (now.challenger, now.by, now.reason) == (None, "r1", "auc is better by 0.1")
    assert bundle.fetch(store, "tiny", now.champion).version == now.champion


def test_a_canary_begins_at_its_first_step(promote: Promote, tiny: Contract) -> None:
    canary = changed(tiny, serve={"canary": {"steps": [0.1, 0.5]}})
    first = promote("r1", 0.02, 0, canary)
    second = promote("r2", 0.03, 1, canary)
    assert first is not None
    assert second is not None
    assert second.champion == first.champion
    assert (second.weight, second.by) == (0.1, "r2")
    assert second.challenger not in (None, first.champion)


def test_repeating_a_promotion_changes_nothing(promote: Promote) -> None:
    assert promote("r1", 0.02, 0) == promote("r1", 0.02, 0)


def test_a_rollout_that_changed_meanwhile_is_not_overwritten(
    promote: Promote, store: Store
) -> None:
    first = promote("r1", 0.02, 0)
    assert first is not None
    # r2 was judged before there was a champion.
    assert promote("r2", 0.03, 0) == first
    outcome = runs.conclude(store, "tiny", "r2", trigger="test", code_version="1")
    assert outcome.state == "rejected"
    assert "the rollout changed" in outcome.reason


def test_a_bundle_that_was_tampered_with_is_not_promoted(
    store: Store, tiny: Contract, make_bundle: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_bundle(0.02)
    judged_against(store, "r1", manifest, 0)
    (tmp_path / "bundle-0.02" / "schema.json").write_text("{}")
    with pytest.raises(bundle.BundleError):
        steps.promote(tiny.to_json(), store.uri, "r1", tmp_path / "bundle-0.02")
    assert rollout.read(store, "tiny") is None
    outcome = runs.conclude(store, "tiny", "r1", trigger="test", code_version="1")
    assert outcome.state == "failed"
    assert outcome.reason.startswith("promote: BundleError: ")


def test_too_many_bad_rows_stop_the_run_and_are_kept(store: Store, tmp_path: Path) -> None:
    contract = load(write_contract(tmp_path, spoiled=200))
    with pytest.raises(runs.StoppedByData):
        steps.prepare(contract.to_json(), store.uri, "r1", tmp_path / "data")
    assert store.exists(runs.key("tiny", "r1", "quarantine.parquet"))
    outcome = steps.record(contract.to_json(), store.uri, "r1", "test", "1")
    assert outcome.state == "stopped"
    assert "amount" in outcome.reason
    assert outcome.tracking == "none"
    assert runs.read(store, "tiny", "r1") == outcome


def test_a_source_that_is_not_there_stops_the_run(store: Store, tmp_path: Path) -> None:
    contract = load(write_contract(tmp_path))
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(runs.StoppedByData):
        steps.prepare(contract.to_json(), store.uri, "r1", tmp_path / "data")
    outcome = steps.record(contract.to_json(), store.uri, "r1", "test", "1")
    assert outcome.state == "stopped"
    assert "rows.csv" in outcome.reason


def test_a_store_that_does_not_answer_yet_is_waited_for(
    tiny: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod whose network comes some moments after it."""
    store, looks = Store(tmp_path / "bucket"), itertools.count()

    class Remote(Store):
        def __init__(self, uri: str) -> None:
            super().__init__(store.uri)
            self.folder = None

        def exists(self, key: str) -> bool:
            if next(looks) < 2:
                raise ConnectionError("the store s3://bucket cannot be reached")
            return super().exists(key)

    monkeypatch.setattr(steps, "Store", Remote)
    outcome = steps.record(tiny.to_json(), "s3://bucket", "r1", "test", "1")
    assert next(looks) > 2
    assert runs.read(store, "tiny", "r1") == outcome
    monkeypatch.setattr(steps, "PATIENCE", 0.0)
    looks = itertools.count(-100)
    with pytest.raises(ConnectionError):
        steps.record(tiny.to_json(), "s3://bucket", "r1", "test", "1")


@pytest.mark.slow
def test_the_steps_in_a_row_make_a_champion(store: Store, tmp_path: Path) -> None:
    contract = load(write_contract(tmp_path))
    text, data, fitted = contract.to_json(), tmp_path / "data", tmp_path / "fit"
    counts = steps.prepare(text, store.uri, "r1", data)
    assert counts["rows"] == counts["train rows"] + counts["test rows"]
    steps.fit(text, store.uri, "r1", "linear", data, fitted)
    steps.assemble(text, store.uri, "r1", data, [fitted], tmp_path / "candidate")
    places = (data, tmp_path / "candidate", tmp_path / "judged", tmp_path / "report.html")
    verdict = steps.judge(text, store.uri, "r1", *places)
    assert verdict.promote
    # A second attempt finds the first one's folder and makes the same of it.
    assert steps.judge(text, store.uri, "r1", *places).promote
    manifest = bundle.verify(tmp_path / "judged")
    assert manifest.metrics == verdict.challenger_metrics
    assert "report.html" in manifest.files
    steps.promote(text, store.uri, "r1", tmp_path / "judged")
    outcome = steps.record(text, store.uri, "r1", "test", "1")
    assert (outcome.state, outcome.version) == ("promoted", manifest.version)
    assert [s.name for s in outcome.steps] == [
        "prepare", "fit-linear", "assemble", "judge", "promote",
    ]  # fmt: skip
    assert store.exists(runs.key("tiny", "r1", "report.html"))
