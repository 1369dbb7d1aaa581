"""The bundle: a trained model as a folder that everything after training reads.

| file | what |
|---|---|
| `manifest.json` | version, sha256 of every other file, contract, data, code, packages, metrics |
| `model.onnx` | the model, with its preprocessing inside |
| `schema.json` | its `Signature` |
| `reference.parquet` | rows that the monitor compares with, and the model's output on them |
| `examples.json` | inputs with expected outputs: loading replays them |
| `report.html` | how it was judged (added by the gate) |
| `weights.safetensors` | a network's weights: to explain it, and to go on training from |
| `training.json` | how a network learnt: its history, the other runs, diagnostics |
| `sbom.cdx.json` | its files, data and libraries, for scanners: `driftmill.sbom` |
| `manifest.sig` | a signature of the manifest, where training has a key: `driftmill.signing` |

The version is the digest of model, schema, reference and examples: the same training gives the
same version. Nothing in a bundle is executed when it is loaded.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from driftmill import features, sbom, signing
from driftmill.contract import Contract
from driftmill.features import EMBEDDING, IMAGE, Signature
from driftmill.home import cores
from driftmill.sbom import SBOM
from driftmill.serving.session import Session
from driftmill.signing import SIGNATURE, TRUSTED_KEYS
from driftmill.store import Store, sha256, write_atomic
from driftmill.version import code_digest, code_version

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
#: Of what is written here; other formats are refused.
FORMAT = 1
#: Of the libraries those that a model's numbers depend on.
_DECISIVE = (
    sbom.PYTHON,
    "scikit-learn",
    "skl2onnx",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "numpy",
)
#: The files that make the version.
CORE = ("model.onnx", "schema.json", "reference.parquet", "examples.json")
#: Columns of `reference.parquet` beside inputs and target: the model's answer (label or number),
#: and for a classification its confidence.
PREDICTION, SCORE = "_prediction", "_score"
#: Outputs of the same model on another machine may differ by this much, by the numbers that it
#: computes with: where these are coarse, one rounding the other way is a step that one can see.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "int8": 5e-2}
#: Images that go through a model at a time, and reference rows that keep theirs, for people to see.
BATCH_IMAGES, REFERENCE_IMAGES = 256, 200


class BundleError(ValueError):
    """A bundle that must not be used; the message says why."""


class Manifest(BaseModel):
    """What a bundle says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: str
    version: str
    """12 hexadecimal digits, from the content."""
    created: datetime
    files: dict[str, str]
    """sha256 of every file but this one."""
    contract: Contract
    family: str
    """Which candidate it is."""
    params: dict[str, Any]
    """Its hyper-parameters."""
    data: dict[str, Any]
    """Fingerprint, row counts and time range of what it learnt from (`DatasetInfo`)."""
    metrics: dict[str, float] = {}
    """Metrics on the test rows."""
    code_version: str
    """The version of Driftmill that assembled it, `+` and the start of `code_digest`: between two
    releases only that tells which code it was."""
    environment: dict[str, str]
    """Versions of Python and of the libraries that the numbers depend on; `sbom.cdx.json` has the
    others, too."""

    @property
    def precision(self) -> str:
        """Numbers that the model computes with; see `serve.precision`."""
        served: str = self.data.get("precision", {}).get("served", "float32")
        return served


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been verified and loaded."""

    folder: Path
    manifest: Manifest
    signature: Signature
    session: Session

    @property
    def version(self) -> str:
        """The version, 12 hexadecimal digits."""
        return self.manifest.version

    @cached_property
    def reference(self) -> pd.DataFrame:
        """The rows that the monitor compares with."""
        import pandas as pd

        return pd.read_parquet(self.folder / "reference.parquet")

    @cached_property
    def training(self) -> dict[str, Any] | None:
        """How a network learnt: `training` of a fit's record. None for other models."""
        path = self.folder / "training.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Predict a table: (rows, labels) probabilities or (rows,) numbers."""
        if self.signature.image is None:
            return self.session.run(*features.arrays(frame, self.signature))
        # The gate and its report ask the same table, for which a large network takes minutes.
        asked, output = self._last
        if asked is not frame:
            parts = [
                self.session.run(*features.arrays(part, self.signature)) for part in _batches(frame)
            ]
            empty = np.empty((0, len(self.signature.labels)), dtype=np.float32)
            output = np.concatenate([empty, *parts])
            output.flags.writeable = False
            self._last[:] = [frame, output]
        result: np.ndarray = output
        return result

    @cached_property
    def _last(self) -> list[Any]:
        """The last table of images, and what was predicted of it."""
        return [None, None]


def key(model: str, version: str) -> str:
    """Where a bundle lies in the store."""
    return f"{model}/bundles/{version}"


def write(
    folder: Path,
    *,
    contract: Contract,
    signature: Signature,
    model: Path,
    reference: pd.DataFrame,
    examples: pd.DataFrame,
    family: str,
    params: dict[str, Any],
    data: dict[str, Any],
    weights: Path | None = None,
    training: dict[str, Any] | None = None,
) -> Manifest:
    """Write a bundle into an empty folder.

    Args:
        folder: where to; created.
        contract: what asked for the model.
        signature: what the model takes and gives.
        model: the `.onnx` file.
        reference: rows (inputs and target) for the monitor; the model's output on them is added,
            and of images their embeddings (float16, as bytes); some keep the image itself (PNG).
        examples: a few rows whose outputs are replayed at every load.
        family: which candidate it is.
        params: its hyper-parameters.
        data: what it learnt from.
        weights: a network's `.safetensors` file, if there is one.
        training: how a network learnt, for the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.read_bytes())
    session = Session(folder / "model.onnx")
    (folder / "schema.json").write_text(signature.model_dump_json(indent=1))

    answered = _answered(session, signature, reference)
    answered.to_parquet(folder / "reference.parquet", index=False)
    if weights is not None:
        (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    if training is not None:
        (folder / "training.json").write_text(json.dumps(training))

    arrays = features.arrays(examples, signature)
    replay: dict[str, Any]
    if signature.image is not None:
        replay = {"image": [base64.b64encode(image.tobytes()).decode() for image in arrays[0]]}
    else:
        numeric, categorical = arrays
        replay = {
            "numeric": [[None if np.isnan(v) else float(v) for v in row] for row in numeric],
            "categorical": categorical.tolist(),
        }
    replay["output"] = session.run(*arrays).tolist()
    (folder / "examples.json").write_text(json.dumps(replay))
    installed = sbom.libraries()
    return _write_manifest(
        folder,
        installed,
        model=contract.model,
        created=datetime.now(UTC),
        contract=contract,
        family=family,
        params=params,
        data=data,
        code_version=f"{code_version()}+{code_digest()[:12]}",
        environment={name: installed[name] for name in _DECISIVE if name in installed},
    )


def add(folder: Path, name: str, content: bytes, metrics: dict[str, float]) -> Manifest:
    """Add a file and metrics to a bundle; the version stays, as its core files do. A signature is
    of what was there before, and goes."""
    manifest = read_manifest(folder)
    (folder / SIGNATURE).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    listed = folder / SBOM
    # What made the model, wherever this runs; bundles from before there was a list get none.
    installed = sbom.installed(listed.read_bytes()) if listed.exists() else None
    values = {**dict(manifest), "metrics": {**manifest.metrics, **metrics}}
    return _write_manifest(folder, installed, **values)


def put(store: Store, folder: Path, manifest: Manifest) -> None:
    """Put a bundle into the store, where it is not there yet.

    Raises:
        BundleError: it is there, but unsigned, and this one is signed.
    """
    place = key(manifest.model, manifest.version)
    store.put_folder(folder, place, MANIFEST)
    if (folder / SIGNATURE).exists() and not store.exists(f"{place}/{SIGNATURE}"):
        raise BundleError(
            f"{store.uri} holds {manifest.model} {manifest.version} already, unsigned: sign it with"
            f" `driftmill verify {manifest.model} {manifest.version} --sign`"
        )


def answers(output: np.ndarray, signature: Signature) -> dict[str, np.ndarray]:
    """A model's output as the columns `_prediction` and, for a classification, `_score`: the
    probability of the last label where there are two, of the chosen one where there are more."""
    if signature.task == "regression":
        return {PREDICTION: output.astype(np.float64)}
    chosen = output.argmax(axis=1)
    score = output[:, 1] if output.shape[1] == 2 else output[np.arange(len(output)), chosen]
    return {
        PREDICTION: np.asarray(signature.labels, dtype=object)[chosen],
        SCORE: score.astype(np.float64),
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, unverified. Raises BundleError."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            # The contract in it is of a Driftmill whose contracts can say more.
            raise BundleError(
                f"{folder / MANIFEST} has {'.'.join(map(str, first['loc']))}, which this Driftmill "
                "does not know: a newer one wrote it; upgrade this one, or roll back to a version "
                "that it can read"
            ) from None
        raise BundleError(f"{folder / MANIFEST} is damaged: {first['msg']}") from None


def sign(folder: Path) -> None:
    """Sign a bundle, where the environment names a key (`driftmill.signing`), for what has been
    added since changes its manifest. Raises SigningError."""
    signature = signing.sign((folder / MANIFEST).read_bytes())
    if signature is not None:
        write_atomic(folder / SIGNATURE, signature)


def verify(folder: Path, *, signed: bool = True) -> Manifest:
    """Check that a bundle is complete and unchanged, and signed where that is demanded.

    Args:
        folder: the bundle.
        signed: False before it is signed: no signature is looked for.

    Raises:
        BundleError: with the reason.
    """
    manifest = read_manifest(folder)
    if manifest.format != FORMAT:
        raise BundleError(
            f"{folder} has format {manifest.format}; this Driftmill reads format {FORMAT}"
        )
    if missing := [name for name in CORE if name not in manifest.files]:
        raise BundleError(f"{folder}: the manifest does not name {', '.join(missing)}")
    for name, digest in manifest.files.items():
        path = folder / name
        if Path(name).name != name or name in ("", ".."):
            raise BundleError(f"{folder}: {name!r} is not a plain file name")
        if path.is_symlink():
            raise BundleError(f"{folder}: {name} is a link; a bundle holds its files itself")
        if not path.is_file():
            raise BundleError(f"{folder}: {name} is missing")
        if sha256(path) != digest:
            raise BundleError(f"{folder}: {name} is not the file that the manifest names (sha256)")
    extra = {p.name for p in folder.iterdir()} - set(manifest.files) - {MANIFEST, SIGNATURE}
    if extra:
        raise BundleError(f"{folder}: {', '.join(sorted(extra))} is not in the manifest")
    if _version(manifest.files) != manifest.version:
        raise BundleError(f"{folder}: the version {manifest.version} does not fit the files")
    if signed:
        path = folder / SIGNATURE
        try:
            signing.check(
                (folder / MANIFEST).read_bytes(), path.read_bytes() if path.exists() else None
            )
        except signing.SigningError as error:
            raise BundleError(f"{folder}: {error}") from None
    return manifest


def load(folder: Path, model: str | None = None, *, signed: bool = True) -> Bundle:
    """Verify a bundle, load its model and replay its examples.

    Args:
        folder: the bundle.
        model: whose it must be; None takes any.
        signed: as for `verify`.

    Raises:
        BundleError: it is damaged, foreign, cannot be loaded, or answers its examples otherwise.
    """
    manifest = verify(folder, signed=signed)
    if model is not None and manifest.model != model:
        raise BundleError(f"{folder} is a bundle of {manifest.model!r}, not of {model!r}")
    try:
        signature = Signature.model_validate_json((folder / "schema.json").read_bytes())
        session = Session(folder / "model.onnx", 1 if signature.image is None else cores())
        replay = json.loads((folder / "examples.json").read_bytes())
        output = session.run(*_examples(replay, signature))
    # ONNX Runtime raises classes of its own that derive from RuntimeError or from Exception only.
    except Exception as error:
        raise BundleError(f"{folder} cannot be loaded: {error}") from error
    if misfit := _misfit(manifest, signature, session, output):
        raise BundleError(f"{folder}: {misfit}")
    expected = np.array(replay["output"], dtype=np.float32)
    most = TOLERANCE.get(manifest.precision, TOLERANCE["float32"])
    if output.shape != expected.shape or not np.allclose(output, expected, rtol=most, atol=most):
        raise BundleError(f"{folder}: the model does not answer its examples as it did in training")
    return Bundle(folder, manifest, signature, session)


def pack(folder: Path, into: Path) -> Path:
    """Write a verified bundle as `<model>-<version>.tar.gz`; the same one gives the same bytes.

    Args:
        folder: the bundle.
        into: folder of the archive; made.
    """
    manifest = read_manifest(folder)
    name = f"{manifest.model}-{manifest.version}"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(f"{name}/{path.name}")
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    target = into / f"{name}.tar.gz"
    write_atomic(target, gzip.compress(content.getvalue(), mtime=0))
    return target


def examine(folder: Path, *, signed: bool = True) -> dict[str, Any]:
    """Check all that can be checked of a bundle, and tell what was found and where it comes from.

    Args:
        folder: the bundle.
        signed: as for `verify`.

    Returns:
        `model` and `version`; `checked`, a sentence for each thing that was looked at; and
        `provenance`, what the manifest says, which only a signature vouches for.

    Raises:
        BundleError: as `load`, or the list of components contradicts the manifest.
    """
    loaded = load(folder, signed=signed)
    manifest, path = loaded.manifest, folder / SIGNATURE
    signature = f"none, and {TRUSTED_KEYS} demands none"
    if path.exists():
        key = signing.check((folder / MANIFEST).read_bytes(), path.read_bytes()) if signed else None
        signature = (
            f"of the manifest by {key}, which {TRUSTED_KEYS} names"
            if key
            else "there is one; no key to check it by"
        )
    elif not signed:
        signature = "none"
    examples = len(json.loads((folder / "examples.json").read_bytes())["output"])
    most = TOLERANCE.get(manifest.precision, TOLERANCE["float32"])
    return {
        "model": manifest.model,
        "version": manifest.version,
        "checked": {
            "files": f"{len(manifest.files)}, each with the sha256 in the manifest, and no others",
            "version": f"the digest of {', '.join(CORE)}",
            "model": "loads, without running code of the bundle; fits its schema and contract",
            "examples": f"{examples}, answered as in training (to {most:g})",
            "sbom": _listed(folder, manifest),
            "signature": signature,
        },
        "provenance": {
            "created": f"{manifest.created:%F %T} UTC",
            "family": manifest.family,
            "data": manifest.data.get("fingerprint", "unknown"),
            "contract": sbom.contract_digest(manifest),
            "code": manifest.code_version,
            "environment": ", ".join(f"{n} {v}" for n, v in manifest.environment.items()),
        },
    }


def _listed(folder: Path, manifest: Manifest) -> str:
    """What the list of components says, in words. Raises BundleError."""
    if SBOM not in manifest.files:
        return "none: the bundle is older than such lists"
    content = (folder / SBOM).read_bytes()
    try:
        if problem := sbom.misfit(content, manifest):
            raise BundleError(f"{folder}: {problem}")
        libraries = len(sbom.installed(content)) - 1  # without Python
    except sbom.SbomError as error:
        raise BundleError(f"{folder}: {error}") from None
    return f"{libraries} libraries; model, files, data and versions are those of the manifest"


def fetch(store: Store, model: str, version: str, cache: Path | None = None) -> Bundle:
    """Load a version from the store; arguments and errors are those of `locate` and `load`."""
    folder = locate(store, model, version, cache)
    bundle = load(folder, model)
    if bundle.version != version:
        raise BundleError(f"{folder} holds version {bundle.version}, not {version}")
    return bundle


def locate(store: Store, model: str, version: str, cache: Path | None = None) -> Path:
    """A local folder with a version, unverified.

    Args:
        store: where it lies.
        model: whose it is.
        version: which one.
        cache: folder for the copy from a remote store, of this process alone; default: one that
            goes when the process ends.

    Raises:
        BundleError: it is not there.
    """
    try:
        return store.get_folder(key(model, version), cache or Path(_cache().name), MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{model} has no version {version} in {store.uri}") from None


@functools.cache
def _cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="driftmill-bundles-")


def _batches(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """A table of images in parts that fit into memory."""
    for start in range(0, len(frame), BATCH_IMAGES):
        yield frame.iloc[start : start + BATCH_IMAGES]


def _answered(session: Session, signature: Signature, reference: pd.DataFrame) -> pd.DataFrame:
    """The reference rows as they are kept."""
    if signature.image is None:
        output = session.run(*features.arrays(reference, signature))
        return reference.assign(**answers(output, signature))
    from driftmill.vision import images

    pairs = [session.embed(*features.arrays(part, signature)) for part in _batches(reference)]
    outputs, embeddings = (np.concatenate(side) for side in zip(*pairs, strict=True))
    # Spread over all rows; for people to look at, so some will do.
    kept = set(np.linspace(0, len(reference) - 1, REFERENCE_IMAGES).astype(int).tolist())
    pictures = [
        images.to_png(image) if place in kept else None
        for place, image in enumerate(reference[IMAGE])
    ]
    return reference.assign(
        **answers(outputs, signature),
        **{EMBEDDING: [row.tobytes() for row in embeddings.astype("<f2")], IMAGE: pictures},
    )


def _examples(replay: dict[str, Any], signature: Signature) -> tuple[np.ndarray, ...]:
    """The inputs of `examples.json`. Raises ValueError where the schema has other columns."""
    rows = len(replay["output"])
    if not rows:
        raise ValueError("it has no examples to replay")
    if signature.image is not None:
        content = b"".join(map(base64.b64decode, replay["image"]))
        shape = (rows, signature.image.channels, *signature.image.size)
        return (np.frombuffer(content, dtype=np.uint8).reshape(shape),)
    numeric = np.array(replay["numeric"], dtype=np.float32)
    categorical = np.array(replay["categorical"], dtype=object)
    for given, names in ((numeric, signature.numeric), (categorical, signature.categorical)):
        if given.shape != (rows, len(names)):
            raise ValueError(
                f"its examples {given.shape} do not fit the schema {(rows, len(names))}"
            )
    return numeric, categorical


def _misfit(
    manifest: Manifest, signature: Signature, session: Session, output: np.ndarray
) -> str | None:
    """How contract, schema and model contradict each other, if they do."""
    data = manifest.contract.data
    asked = (manifest.contract.task, data.target.name, tuple(c.name for c in data.columns))
    if asked != (signature.task, signature.target, tuple(c.name for c in signature.columns)):
        return "the schema is not that of the contract"
    if (session.output == "probabilities") != (signature.task != "regression"):
        return f"the model gives {session.output}, which is not for {signature.task}"
    if session.embeds != (signature.image is not None):
        return "a model of images gives embeddings, and no other does"
    if session.output == "probabilities" and output.shape[1] != len(signature.labels):
        return f"the model gives {output.shape[1]} probabilities for {len(signature.labels)} labels"
    return None


def _version(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(files[name] for name in CORE).encode()).hexdigest()[:12]


def _write_manifest(folder: Path, installed: dict[str, str] | None, **values: Any) -> Manifest:
    """Write the manifest, and the list of components where it is known what was `installed`."""
    own = (MANIFEST, SIGNATURE, SBOM)
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name not in own}
    manifest = Manifest(**{**values, "files": files, "version": _version(files)})
    if installed is not None:
        listed = sbom.document(manifest, installed)
        (folder / SBOM).write_bytes(listed)
        manifest = manifest.model_copy(
            update={"files": {**files, SBOM: hashlib.sha256(listed).hexdigest()}}
        )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
