"""From a contract to what a cluster takes.

`python -m pipelines.compile --contract FILE --output DIR` writes `pipeline.yaml`, a KFP package
(pipeline spec and, where the contract places steps on certain nodes, platform spec) that
`kfp run create -e EXPERIMENT -f pipeline.yaml` runs as it is; where several GPUs or nodes train one
network, also `trainjob.yaml`, for Kubeflow Trainer. The same contract gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from driftmill.contract import Contract, ContractError, load
from driftmill.home import find
from pipelines import code_version

#: The API server refuses much larger packages, and etcd their workflows.
MAX_BYTES = 200_000


def main(arguments: list[str] | None = None) -> int:
    """Compile; 0 or, for a bad contract, 2."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    parser.add_argument("--contract", required=True, metavar="FILE", help="the contract")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the package")
    parser.add_argument("--image", help="image of every step; it holds the driftmill package")
    parser.add_argument("--store", help="store that the steps use; default: $DRIFTMILL_STORE")
    options = parser.parse_args(arguments)
    try:
        contract = load(options.contract)
    except ContractError as error:
        print(error, file=sys.stderr)
        return 2
    store = options.store or find().store_uri
    if "://" not in store or store.startswith("file:"):
        print(
            f"note: the store {store} is a folder of this machine; for a cluster give "
            "--store s3://... or gs://...",
            file=sys.stderr,
        )
    print(compile_package(contract, Path(options.output), store=store, image=options.image))
    return 0


def compile_package(
    contract: Contract, folder: Path, *, store: str, image: str | None = None
) -> Path:
    """Write `pipeline.yaml` and, for what one pod cannot train, `trainjob.yaml`.

    Args:
        contract: what to compile.
        folder: where to; created.
        store: default of the pipeline's parameter `store`.
        image: image of every step; None: the usual one for tables or for images.

    Returns:
        Path of `pipeline.yaml`.

    Raises:
        ValueError: the package is larger than a cluster takes.
    """
    # KFP takes a second or two to import: a bad contract is refused before that.
    from kfp import compiler

    from components.image import image as usual_image
    from pipelines import pods, training, trainjob

    image = image or usual_image("vision" if contract.is_vision else "tabular")
    configure = partial(pods.configure, resources=contract.train.resources, image=image)
    pipeline = training.build(
        contract, store=store, code_version=code_version(), configure=configure
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.yaml"
    compiler.Compiler().compile(pipeline, str(path))
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; a cluster takes {MAX_BYTES}: shorten the lists")
    trainjob.write(contract, folder / "trainjob.yaml", store=store, image=image)
    return path


if __name__ == "__main__":
    sys.exit(main())
