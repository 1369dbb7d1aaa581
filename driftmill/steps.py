"""What each step of the pipeline does.

The components in `components/` are thin wrappers around these functions: here is the order of the
calls, what is recorded, and what happens when something goes wrong. Each function takes the
contract as JSON, the store as a URI and folders as paths, for that is what a pipeline can pass on.

Heavy imports stand inside the functions: each step is a process of its own and pays only for what
it uses.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from driftmill import rollout, runs
from driftmill.contract import Contract
from driftmill.rollout import Rollout, RolloutConflict
from driftmill.store import Store

if TYPE_CHECKING:
    from driftmill.evaluate.gates import Verdict
    from driftmill.runs import Outcome

#: Seconds that a step waits for a store that does not answer.
PATIENCE = 120.0


def prepare(contract: str, store: str, run_id: str, out: str | Path) -> dict[str, float]:
    """Read, check and split the rows.

    Args:
        contract: the contract, as JSON.
        store: URI of the store.
        run_id: which run this is.
        out: folder for the prepared table.

    Returns:
        Row counts, to show.

    Raises:
        StoppedByData: the source cannot be read, or too many rows are bad.
    """
    asked, place, folder = _read(contract), _reach(store), _folder(out)
    with runs.step(place, asked.model, run_id, "prepare") as step:
        from driftmill.data.prepare import prepare as prepare_data
        from driftmill.data.sources import DataError

        try:
            info = prepare_data(asked, folder, place)
        except DataError as error:
            raise runs.StoppedByData(str(error)) from error
        finally:
            _keep(place, asked.model, run_id, folder / "quarantine.parquet")
        step.facts.update(info.model_dump(mode="json"))
    return {
        "rows": info.rows,
        "train rows": info.train_rows,
        "test rows": info.test_rows,
        "quarantined": info.quarantined,
    }


def fit(
    contract: str, store: str, run_id: str, family: str, data: str | Path, out: str | Path
) -> dict[str, float]:
    """Search, train and export one candidate family, unless the store has the same fit already.

    Args:
        contract: the contract, as JSON.
        store: URI of the store.
        run_id: which run this is.
        family: the candidate.
        data: folder of the prepared table.
        out: folder for the fit.

    Returns:
        Its score and the seconds that the training took, to show.
    """
    asked, place, folder = _read(contract), _reach(store), _folder(out)
    with runs.step(place, asked.model, run_id, "fit", family) as step:
        from driftmill import cache
        from driftmill.assemble import RECORD

        kept = cache.key(asked, family, Path(data))
        # What a TrainJob has fitted lies in the same place.
        together = asked.is_vision and asked.train.resources.distributed
        cached = (asked.train.cache or together) and cache.take(place, kept, folder)
        if not cached:
            if together:
                print(f"no TrainJob has fitted {family} on this data: it is fitted here")
            _fit(asked, family, Path(data), folder, place)
            if asked.train.cache:
                cache.keep(place, kept, folder)
        result = json.loads((folder / RECORD).read_bytes())
        step.facts.update({k: result[k] for k in ("score", "score_std", "seconds", "params")})
        step.facts["cached"] = cached
    return {"score": float(result["score"]), "seconds": float(result["seconds"])}


def _fit(contract: Contract, family: str, data: Path, out: Path, store: Store) -> None:
    if contract.is_vision:
        from driftmill.vision.fit import fit as fit_network

        fit_network(contract, family, data, out, store)
    else:
        from driftmill.tabular.fit import fit as fit_family

        fit_family(contract, family, data, out)


def assemble(
    contract: str,
    store: str,
    run_id: str,
    data: str | Path,
    fits: Sequence[str | Path],
    out: str | Path,
) -> None:
    """Pick the best candidate and write it as a bundle into `out`."""
    asked, place, folder = _read(contract), _reach(store), _folder(out)
    with runs.step(place, asked.model, run_id, "assemble") as step:
        from driftmill.assemble import assemble as assemble_bundle

        manifest = assemble_bundle(asked, Path(data), [Path(f) for f in fits], folder)
        step.facts.update(version=manifest.version, family=manifest.family)


def judge(
    contract: str,
    store: str,
    run_id: str,
    data: str | Path,
    candidate: str | Path,
    out: str | Path,
    report: str | Path,
) -> Verdict:
    """Judge the new model against the champion on the same test rows.

    Args:
        contract: the contract, as JSON.
        store: URI of the store.
        run_id: which run this is.
        data: folder of the prepared table.
        candidate: folder of the new bundle.
        out: folder for the bundle with its report and metrics.
        report: path for the report.

    Returns:
        The verdict. It and the report also go into the run's folder.
    """
    asked, place = _read(contract), _reach(store)
    with runs.step(place, asked.model, run_id, "judge") as step:
        from driftmill import bundle
        from driftmill.data.prepare import read
        from driftmill.evaluate import gates
        from driftmill.evaluate import report as reports

        shutil.rmtree(out, ignore_errors=True)  # what an interrupted attempt left
        folder = Path(shutil.copytree(candidate, out))
        challenger = bundle.load(folder, asked.model, signed=False)
        now = rollout.read(place, asked.model)
        step.facts.update(
            version=challenger.version,
            champion=now.champion if now else None,
            revision=now.revision if now else 0,
        )
        champion = bundle.fetch(place, asked.model, now.champion) if now else None
        prepared = read(Path(data))
        verdict = gates.judge(asked, prepared, challenger, champion)
        reports.write(Path(report), asked, prepared, challenger, champion, verdict)
        page = Path(report).read_bytes()
        bundle.add(folder, "report.html", page, verdict.challenger_metrics)
        place.write(runs.key(asked.model, run_id, "report.html"), page)
        text = verdict.model_dump_json(indent=1)
        place.write(runs.key(asked.model, run_id, "verdict.json"), text.encode())
    return verdict


def promote(contract: str, store: str, run_id: str, folder: str | Path) -> None:
    """Sign the bundle where there is a key, put it into the store and let it serve, unless the
    rollout has changed since the model was judged. Doing it again changes nothing."""
    asked, place = _read(contract), _reach(store)
    with runs.step(place, asked.model, run_id, "promote") as step:
        from driftmill import bundle

        manifest = bundle.verify(Path(folder), signed=False)
        bundle.sign(Path(folder))
        bundle.put(place, Path(folder), manifest)
        judged = {r.name: r for r in runs.steps(place, asked.model, run_id)}["judge"].facts
        verdict = json.loads(place.read(runs.key(asked.model, run_id, "verdict.json")))
        try:
            new = _roll_out(
                asked,
                place,
                run_id,
                version=manifest.version,
                revision=int(judged["revision"]),
                reason=verdict["reason"],
            )
            step.facts.update(revision=new.revision, weight=new.weight)
        except RolloutConflict as error:
            step.facts["refused"] = (
                f"not promoted: the rollout changed while the model was judged ({error}); "
                "train again to be judged against what serves now"
            )


def _roll_out(
    contract: Contract, store: Store, run_id: str, *, version: str, revision: int, reason: str
) -> Rollout:
    """The rollout's next revision: at once, or a canary's first step where the contract says so
    and there is a champion to fall back on."""
    earlier = [r for r in rollout.history(store, contract.model) if r.by == run_id]
    if earlier:
        return earlier[-1]  # a retry of a step that had already done its work
    change = partial(rollout.change, store, contract.model, by=run_id, expected=revision)
    canary = contract.serve.canary.steps
    if canary and revision > 0:
        reason = f"{reason}; canary at {canary[0]:.0%}"
        return change(challenger=version, weight=canary[0], reason=reason)
    return change(champion=version, reason=reason)


def record(
    contract: str, store: str, run_id: str, trigger: str, code_version: str, failure: str = ""
) -> Outcome:
    """The exit handler: write the outcome, whatever happened, then tell the tracking server.

    Args:
        contract: the contract, as JSON.
        store: URI of the store.
        run_id: which run this is.
        trigger: why it was started.
        code_version: which Driftmill compiled the pipeline.
        failure: what the pipeline says went wrong, if anything.
    """
    asked, place = _read(contract), _reach(store)
    with runs.step(place, asked.model, run_id, "record") as step:
        from driftmill import tracking

        outcome = runs.conclude(
            place,
            asked.model,
            run_id,
            trigger=trigger,
            code_version=code_version,
            failure=failure,
            tracking=tracking.pending(asked),
        )
        said = tracking.record(asked, place, outcome)
        step.facts["tracking"] = said
        outcome = outcome.model_copy(update={"tracking": said})
        runs.write(place, outcome)
    return outcome


def _read(contract: str) -> Contract:
    # Not `parse`: reading it as YAML, which a person's file is, would take fifty times as long.
    return Contract.model_validate_json(contract)


def _reach(uri: str) -> Store:
    """The store, once it answers. On a cluster a pod may run some seconds before its network does,
    and a step that fails by itself is not tried again there."""
    store = Store(uri)
    if store.folder is not None:
        return store
    until = time.monotonic() + PATIENCE
    while True:
        try:
            store.probe()
        except (ConnectionError, TimeoutError):
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return store


def _folder(path: str | Path) -> Path:
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _keep(store: Store, model: str, run_id: str, file: Path) -> None:
    """Copy a file into the run's folder, if it was written."""
    if file.exists():
        store.write(runs.key(model, run_id, file.name), file.read_bytes())
