"""From a contract to what a cluster takes: `driftmill compile CONTRACT -o DIR`.

| file | what |
|---|---|
| `pipeline.yaml` | a KFP package, pipeline spec and platform spec, that runs as it is |
| `trainjob.yaml` | for Kubeflow Trainer, where several GPUs or nodes train one network |
| `contract.json` | the contract with every default filled in |
| `rules.yaml`, `rules_test.yaml` | Prometheus' rules and their unit tests for promtool |
| `dashboard.json`, `dashboard-models.json` | Grafana's page of the model, and of all models |
| `values.yaml` | what the chart `helm/driftmill` is told of the model: contract, rules, images |

The same contract and the same images give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from driftmill.contract import LOCAL_SCHEMES, Contract, ContractError, load
from driftmill.home import find
from driftmill.images import for_steps
from driftmill.store import write_atomic
from driftmill.version import code_version

if TYPE_CHECKING:
    from pipelines.training import Need

#: The API server refuses much larger packages, and etcd their workflows.
MAX_BYTES = 200_000

_EPILOG = """\
Example: driftmill compile contract.yaml -o build/ --store s3://models/driftmill
         kfp run create -e payments -f build/pipeline.yaml
         kfp run create -e payments -f build/pipeline.yaml trigger=drift run_id=2026-11-24-drift
         helm upgrade --install payments helm/driftmill -f build/values.yaml

Scheduled runs and runs after an alarm are the same package with another `trigger`.
exit codes: 0 written, 1 cannot be written, 2 wrong usage or a bad contract
"""


class PackageError(RuntimeError):
    """A package that a cluster would not take; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Compile, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="driftmill compile",
        description="Write the package that a Kubeflow cluster takes, alert rules, dashboards, and "
        "the values of the Helm chart.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contract", metavar="CONTRACT", help="the contract file")
    parser.add_argument(
        "-o",
        "--output",
        default=Path("build"),
        metavar="DIR",
        type=Path,
        help="folder of the package; default: %(default)s",
    )
    add_package_options(parser)
    options = parser.parse_args(arguments)
    try:
        contract = load(options.contract)
    except ContractError as error:
        print(error, file=sys.stderr)
        return 2
    store = options.store or find().store_uri
    if is_folder(store):
        print(
            f"note: the store {store} is a folder of this machine; for a cluster give "
            "--store s3://... or gs://...",
            file=sys.stderr,
        )
    note_local_files(contract)
    try:
        path = compile_package(contract, options.output, store=store, image=options.image)
        for name, text in _around(contract, store, options.image).items():
            write_atomic(options.output / name, text.encode())
    except PackageError as error:
        print(f"driftmill: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"driftmill: cannot write below {options.output}: {error}; name another folder by -o",
            file=sys.stderr,
        )
        return 1
    print(path)
    return 0


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as such, not with escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _around(contract: Contract, store: str, image: str | None) -> dict[str, str]:
    """What serves and watches the model, and the contract itself: texts by file name."""
    # Only here: the controller, which compiles the package for each run, has no need of them.
    from driftmill import values
    from driftmill.monitor import dashboards, rules

    def as_yaml(document: dict[str, Any]) -> str:
        return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=MAX_BYTES)

    text = json.dumps(json.loads(contract.to_json()), indent=1) + "\n"
    return {
        "contract.json": text,
        "rules.yaml": as_yaml(rules.rules(contract)),
        "rules_test.yaml": as_yaml(rules.unit_tests(contract, "rules.yaml")),
        "dashboard.json": dashboards.text(dashboards.model(contract.model)),
        "dashboard-models.json": dashboards.text(dashboards.overview()),
        "values.yaml": as_yaml(values.for_model(contract, store=store, text=text, training=image)),
    }


def add_package_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what goes into a package."""
    parser.add_argument(
        "--image",
        metavar="REF",
        help="image of every step, best by digest; default: the usual ones, by content tag",
    )
    parser.add_argument(
        "--store", metavar="URI", help="store that the steps use; default: $DRIFTMILL_STORE"
    )


def is_folder(store: str) -> bool:
    """Whether a store is a folder of this machine, which a cluster has not got."""
    return "://" not in store or store.startswith("file:")


def note_local_files(contract: Contract) -> None:
    """Say which files of this machine a contract names: a pod finds them only where its image or a
    volume has them."""
    sources = [s.uri for s in (contract.data.source, contract.data.test) if s is not None]
    files = [uri for uri in sources if uri.partition(":")[0] in LOCAL_SCHEMES]
    if contract.is_vision and contract.train.vision.weights is not None:
        files.append(contract.train.vision.weights.file)
    for file in files:
        print(
            f"note: {file} is on this machine; the image must hold it in the same place, or put it "
            "where pods can read it (s3:, gs:, https:)",
            file=sys.stderr,
        )


def compile_package(
    contract: Contract, folder: Path, *, store: str, image: str | None = None
) -> Path:
    """Write `pipeline.yaml` and, for what one pod cannot train, `trainjob.yaml`.

    Args:
        contract: what to compile.
        folder: where to; created.
        store: default of the pipeline's parameter `store`.
        image: image of every step; None: the usual ones for tables, images, and images on GPUs.

    Returns:
        Path of `pipeline.yaml`.

    Raises:
        PackageError: the package is larger than a cluster takes.
    """
    # KFP takes a second or two to import: a bad contract is refused before that.
    from kfp import compiler

    from pipelines import pods, training, trainjob

    images = _images(contract, image)
    configure = partial(pods.configure, contract=contract, images=images)
    pipeline = training.build(
        contract, store=store, code_version=code_version(), configure=configure
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.yaml"
    compiler.Compiler().compile(pipeline, str(path))
    if (size := path.stat().st_size) > MAX_BYTES:
        path.unlink()
        raise PackageError(
            f"the package of {contract.model} has {size} bytes and a cluster takes {MAX_BYTES}: "
            "shorten the contract's lists"
        )
    trainjob.write(contract, folder / "trainjob.yaml", store=store, image=images["training"])
    return path


def _images(contract: Contract, image: str | None) -> dict[Need, str]:
    """The image for each need; the one with CUDA, which is large, only where there is a GPU."""
    if image:
        return dict.fromkeys(("little", "data", "training"), image)
    light = for_steps("vision" if contract.is_vision else "tabular")
    gpu = contract.is_vision and contract.train.resources.gpu
    return {
        "little": light,
        "data": light,
        "training": for_steps("vision-cuda") if gpu else light,
    }


if __name__ == "__main__":
    sys.exit(main())
