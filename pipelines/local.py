"""The process that runs one pipeline by KFP's local runner: each step as a process, or in the
container that a cluster would run it in.

`pipelines.run` starts it in a session of its own and writes one line of JSON, a `Job`, to its
standard input. That input stays open as long as the parent lives: when it ends, this process ends
too, with every step that it started, so that even a killed parent leaves nothing behind.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from driftmill import runs, tracking
from driftmill.contract import Contract
from driftmill.store import Store
from driftmill.version import code_version


class Job(BaseModel):
    """What to run."""

    contract: str
    """The contract, as JSON."""
    store: str
    run_id: str
    trigger: str
    root: str
    """Folder for what the steps pass to each other."""
    image: str | None = None
    """Image whose containers run the steps of the compiled package; None: processes do."""


def main() -> None:
    """Run the job; how it ended stands in the run's `outcome.json`."""
    orders = _take_standard_input()
    job = Job.model_validate_json(orders.readline())
    threading.Thread(target=_end_with, args=(orders, job), daemon=True).start()
    # Lines leave whole and at once: the parent shows progress from them.
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    leave_out_the_client()

    contract = Contract.model_validate_json(job.contract)
    if job.image is None:
        from kfp import local

        from pipelines import training

        pipeline = training.build(contract, store=job.store, code_version=code_version())
        run(pipeline, local.SubprocessRunner(use_venv=False), job)
        return
    from pipelines import containers

    try:
        _in_containers(contract, job, job.image)
    except containers.DockerError as error:
        sys.exit(str(error))


def run(pipeline: Any, runner: Any, job: Job) -> None:
    """Run a pipeline by one of KFP's local runners."""
    from kfp import local

    # No workspace_root: KFP deletes that folder after each run. No exception on a failed step
    # either: the outcome says it better.
    local.init(runner=runner, pipeline_root=job.root, raise_on_error=False)
    pipeline(run_id=job.run_id, trigger=job.trigger)


def load(package: Path) -> Any:
    """The pipeline of a package that `pipelines.compile` wrote, without the retries: they are for
    nodes that go away, and here the same error would only come half a minute later."""
    from kfp import components

    pipeline = components.load_component_from_file(str(package))
    spec = pipeline.component_spec.implementation.graph
    for component in (spec.root, *spec.components.values()):
        for task in component.dag.tasks.values():
            task.ClearField("retry_policy")
    return pipeline


def _in_containers(contract: Contract, job: Job, image: str) -> None:
    from pipelines import compile as compiler
    from pipelines import containers

    root = Path(job.root)
    held = containers.lock(root)
    containers.sweep(root.parent)
    package = compiler.compile_package(contract, root / "package", store=job.store, image=image)
    store = Store(job.store)
    tracked = tracking.uri(contract, store) or ""
    run(load(package), containers.runner(contract, store.uri, tracked, root), job)
    containers.remove(root)  # one may be left whose start took too long
    # A database that is a file is not mounted into containers: it is written here.
    outcome = runs.read(store, contract.model, job.run_id)
    if tracked and outcome is not None and outcome.tracking == "none":
        said = tracking.record(contract, store, outcome)
        runs.write(store, outcome.model_copy(update={"tracking": said}))
    os.close(held)


def _take_standard_input() -> BinaryIO:
    """Standard input for this process alone: steps that inherit it find nothing there."""
    own = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return open(own, "rb", buffering=0)


def _end_with(orders: BinaryIO, job: Job) -> None:
    """Wait for the parent to go, then end this process and its steps."""
    while orders.read(1):
        pass
    try:
        if job.image is not None:
            from pipelines import containers

            containers.end(Path(job.root))
    finally:
        os.killpg(0, signal.SIGKILL)


def leave_out_the_client() -> None:
    """Let `import kfp` skip the client of a cluster's API server, which a local run has no use
    for: with the Kubernetes client behind it, it is two thirds of the import's time."""
    placeholder = types.ModuleType("kfp.client")
    placeholder.__dict__["Client"] = None
    sys.modules.setdefault("kfp.client", placeholder)


if __name__ == "__main__":
    main()
