"""The process that runs one pipeline by KFP's local runner.

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
from typing import BinaryIO

from pydantic import BaseModel

from driftmill.contract import Contract
from pipelines import code_version


class Job(BaseModel):
    """What to run."""

    contract: str
    """The contract, as JSON."""
    store: str
    run_id: str
    trigger: str
    root: str
    """Folder for what the steps pass to each other."""


def main() -> None:
    """Run the job; how it ended stands in the run's `outcome.json`."""
    orders = _take_standard_input()
    job = Job.model_validate_json(orders.readline())
    threading.Thread(target=_end_with, args=(orders,), daemon=True).start()
    # Lines leave whole and at once: the parent shows progress from them.
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    leave_out_the_client()

    from kfp import local

    from pipelines import training

    contract = Contract.model_validate_json(job.contract)
    pipeline = training.build(contract, store=job.store, code_version=code_version())
    # No workspace_root: KFP deletes that folder after each run. No exception on a failed step
    # either: the outcome says it better.
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=job.root,
        raise_on_error=False,
    )
    pipeline(run_id=job.run_id, trigger=job.trigger)


def _take_standard_input() -> BinaryIO:
    """Standard input for this process alone: steps that inherit it find nothing there."""
    own = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return open(own, "rb", buffering=0)


def _end_with(orders: BinaryIO) -> None:
    """Wait for the parent to go, then end this process and its steps."""
    while orders.read(1):
        pass
    os.killpg(0, signal.SIGKILL)


def leave_out_the_client() -> None:
    """Let `import kfp` skip the client of a cluster's API server, which a local run has no use
    for: with the Kubernetes client behind it, it is two thirds of the import's time."""
    placeholder = types.ModuleType("kfp.client")
    placeholder.__dict__["Client"] = None
    sys.modules.setdefault("kfp.client", placeholder)


if __name__ == "__main__":
    main()
