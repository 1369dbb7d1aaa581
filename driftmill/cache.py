"""Fits that were made before: what the `fit` step takes instead of training again.

Kubeflow's own cache goes by a step's arguments. It knows neither the rows behind a source nor the
code inside an image, so it is off, and the result of `fit` is kept in the store: on a laptop and on
a cluster alike.

| in the store | what |
|---|---|
| `<model>/cache/fit/<key>/entry.json` | names and digests of the files; without it, no fit |
| `<model>/cache/fit/<key>/<sha256>` | a file of the fit, named by its content |

Files that are named by their content cannot be mixed up, however many write at once: whoever writes
`entry.json` last has written all that it names. What does not match its digest is not taken, and is
replaced by the next fit. The folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from driftmill.contract import Contract
from driftmill.store import Store
from driftmill.version import code_digest

log = logging.getLogger("driftmill")

ENTRY = "entry.json"
#: Packages whose version may change what a fit comes to.
PACKAGES = (
    "numpy", "scipy", "pandas", "scikit-learn", "onnx", "skl2onnx", "onnxruntime",
    "torch", "torchvision", "onnxscript",
)  # fmt: skip
#: Parts of `train` that do not change what a fit comes to: where it runs, and who else is tried.
_NO_MATTER = {"resources", "candidates", "cache"}
#: Parts of `data` that a fit reads; all others have done their work when the rows are prepared.
_READ = {"columns", "target", "time", "image", "split"}
#: Content of `entry.json`: names of files, with their digests.
_Name = Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$")]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Entry = TypeAdapter(dict[_Name, _Digest])


def key(contract: Contract, family: str, data: Path) -> str:
    """Where the fit of a family lies in the store.

    Args:
        contract: what was asked for.
        family: the candidate.
        data: the folder that `prepare` wrote.
    """
    identity = {
        "data": json.loads((data / "dataset.json").read_bytes())["fingerprint"],
        "code": code_digest(),
        "packages": _packages(),
        "family": family,
        "task": contract.task,
        "metric": contract.metric.name,
        "columns": contract.data.model_dump(mode="json", include=_READ),
        "train": contract.train.model_dump(mode="json", exclude=_NO_MATTER),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{contract.model}/cache/fit/{digest}"


def take(store: Store, place: str, out: Path) -> bool:
    """Write the files of a kept fit into the folder `out`; False where there is none, or it is
    damaged, and then nothing is written.

    Args:
        store: where it is kept.
        place: the `key`.
        out: the folder; it is there.
    """
    try:
        entry = store.read(f"{place}/{ENTRY}")
    except FileNotFoundError:
        return False
    contents: dict[str, bytes] = {}
    try:
        for name, digest in _Entry.validate_json(entry).items():
            contents[name] = store.read(f"{place}/{digest}")
            if hashlib.sha256(contents[name]).hexdigest() != digest:
                raise ValueError(f"{name} does not match its digest")
    except (FileNotFoundError, ValueError) as error:
        log.warning("the kept fit %s is damaged (%s): it is fitted again", place, error)
        return False
    for name, content in contents.items():
        (out / name).write_bytes(content)
    return True


def keep(store: Store, place: str, folder: Path) -> None:
    """Keep the files of a fit.

    Args:
        store: where to.
        place: the `key`.
        folder: the fit, without sub-folders.
    """
    digests: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digests[path.name] = hashlib.sha256(content).hexdigest()
        store.write(f"{place}/{digests[path.name]}", content)
    store.write(f"{place}/{ENTRY}", json.dumps(digests, indent=1).encode())


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # tables need no torch
            found[name] = installed_version(name)
    return found
