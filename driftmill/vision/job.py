"""One candidate, fitted by many processes on many nodes; how a TrainJob and a pipeline meet.

    torchrun … -m driftmill.vision.job --contract JSON --store URI --family FAMILY --job NAME

Every process of a TrainJob runs this, under torchrun. The first one prepares the data and puts it
into the store, so that all nodes learn from the same rows; then all do the very same fit, each on
its part of every batch, and the first puts what comes out into the store. There the pipeline's fit
step takes it, if its own data is the same. Neither waits for the other, and neither needs a right
in the cluster.

| in the store | what |
|---|---|
| `<model>/jobs/<job>/data/` | the prepared data, while the job runs |
| `<model>/cache/fit/<key>/` | the fit, under a key of all that its result depends on |
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from driftmill import cache
from driftmill.contract import Contract
from driftmill.data import prepare
from driftmill.store import Store
from driftmill.vision.fit import fit

#: The file without which a folder of prepared data is not whole.
DATASET = "dataset.json"
#: While the first process prepares the data or writes checkpoints, the others wait.
PATIENCE = timedelta(days=1)


def main(arguments: list[str] | None = None) -> None:
    """Fit as one of the processes that torchrun has started."""
    parser = argparse.ArgumentParser(prog="driftmill.vision.job", description=__doc__)
    parser.add_argument("--contract", required=True, metavar="JSON")
    parser.add_argument("--store", required=True, metavar="URI")
    parser.add_argument("--family", required=True)
    parser.add_argument("--job", required=True, metavar="NAME", help="the same in all processes")
    given = parser.parse_args(arguments)
    contract = Contract.model_validate_json(given.contract)
    backend = "gloo"
    if contract.train.vision.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        _fit(contract, given.family, Store(given.store), given.job)
    finally:
        dist.destroy_process_group()


def _fit(contract: Contract, family: str, store: Store, job: str) -> None:
    first = dist.get_rank() == 0
    shared = f"{contract.model}/jobs/{job}/data"
    if first and not store.exists(f"{shared}/{DATASET}"):
        _prepare(contract, store, shared)
    dist.barrier()
    # One copy a node, for all its processes.
    node = Path(tempfile.gettempdir()) / f"driftmill-{job}"
    if os.environ["LOCAL_RANK"] == "0":
        store.get_folder(shared, node, DATASET)
    dist.barrier()
    data = store.folder / shared if store.folder is not None else node / shared
    with tempfile.TemporaryDirectory() as folder:
        fit(contract, family, data, Path(folder), store)
        if first:
            cache.keep(store, cache.key(contract, family, data), Path(folder))
    dist.barrier()
    if first:
        for file in store.list(shared):
            store.delete(file)


def _prepare(contract: Contract, store: Store, shared: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare.prepare(contract, Path(folder), store)
        store.put_folder(Path(folder), shared, DATASET)


if __name__ == "__main__":
    main()
