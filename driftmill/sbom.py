"""What a bundle is made of, as a list that scanners read: CycloneDX 1.6, JSON (ECMA-424).

`sbom.cdx.json` lies in the bundle, so the manifest names its sha256 and a signature of the manifest
covers it. Its subject is the model (a `machine-learning-model` with its card); its components are
the bundle's files with their sha256, the data it learnt from with their fingerprint, Python, and
all libraries that were installed where the bundle was assembled. The same bundle gives the same
bytes: the time is that of the manifest, the serial number comes from the content.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import uuid
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from driftmill.bundle import Manifest

SBOM = "sbom.cdx.json"
PYTHON = "python"
_FINGERPRINT = "driftmill:fingerprint"


class SbomError(ValueError):
    """A list of components that cannot be read."""


def libraries() -> dict[str, str]:
    """Versions of Python and of all libraries of this environment by their names, as PyPI
    normalizes them (PEP 503), sorted."""
    found: dict[str, str] = {}
    for one in distributions():
        # The first one on the path is the one that is imported. What is broken has no name.
        if name := one.metadata["Name"]:
            found.setdefault(normalized(name), one.version)
    return {PYTHON: platform.python_version(), **dict(sorted(found.items()))}


def normalized(name: str) -> str:
    """A library's name as PyPI writes it in addresses."""
    return re.sub(r"[-_.]+", "-", name).lower()


def document(manifest: Manifest, installed: dict[str, str]) -> bytes:
    """The list of a bundle's components.

    Args:
        manifest: the bundle's; its `files` without the list itself.
        installed: versions of Python and of the libraries, by name: `libraries`.
    """
    contract = manifest.contract
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in sorted(manifest.files.items())
    ]
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": contract.data.source.uri,
        "data": [{"type": "dataset", "name": contract.data.source.uri}],
        "properties": _properties({_FINGERPRINT: manifest.data.get("fingerprint", "")}),
    }
    packages = [_package(name, version) for name, version in sorted(installed.items())]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.model,
        "version": manifest.version,
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": contract.task,
                "modelArchitecture": manifest.family,
                "datasets": [{"ref": "data"}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": name, "value": repr(value)}
                    for name, value in sorted(manifest.metrics.items())
                ]
            },
        },
        "properties": _properties(
            {
                "driftmill:params": json.dumps(manifest.params, sort_keys=True),
                "driftmill:contract": contract_digest(manifest),
                "driftmill:code": manifest.code_version,
            }
        ),
    }
    components: list[dict[str, Any]] = [*files, data, *packages]
    content = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created.isoformat(),
            "tools": {
                "components": [
                    {"type": "application", "name": "driftmill", "version": manifest.code_version}
                ]
            },
            "component": model,
        },
        "components": components,
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": [part["bom-ref"] for part in components]}
        ],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    serial = uuid.uuid5(uuid.NAMESPACE_OID, digest)
    return json.dumps({**content, "serialNumber": serial.urn}, indent=1).encode()


def contract_digest(manifest: Manifest) -> str:
    """sha256 of the contract that asked for the model."""
    return hashlib.sha256(manifest.contract.to_json().encode()).hexdigest()


def _package(name: str, version: str) -> dict[str, str]:
    kind, of = ("platform", "generic") if name == PYTHON else ("library", "pypi")
    purl = f"pkg:{of}/{quote(name, safe='')}@{quote(version, safe='')}"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


class _Hash(BaseModel):
    alg: str
    content: str


class _Property(BaseModel):
    name: str
    value: str


class _Component(BaseModel):
    """What is read of a component; the rest is for others."""

    model_config = ConfigDict(frozen=True)

    type: str
    name: str
    version: str = ""
    purl: str = ""
    hashes: list[_Hash] = []
    properties: list[_Property] = []


class _Metadata(BaseModel):
    component: _Component


class _Document(BaseModel):
    format: str = Field(alias="bomFormat", pattern="^CycloneDX$")
    metadata: _Metadata
    components: list[_Component]

    def of(self, kind: str) -> list[_Component]:
        return [component for component in self.components if component.type == kind]


def _read(content: bytes) -> _Document:
    try:
        return _Document.model_validate_json(content)
    except ValidationError as error:
        raise SbomError(f"{SBOM} is damaged: {error.errors()[0]['msg']}") from None


def installed(content: bytes) -> dict[str, str]:
    """Versions of Python and of the libraries that a list names. Raises SbomError."""
    found = _read(content)
    return {c.name: c.version for kind in ("platform", "library") for c in found.of(kind)}


def misfit(content: bytes, manifest: Manifest) -> str | None:
    """How a list contradicts the manifest of its bundle, if it does.

    Args:
        content: the list.
        manifest: the bundle's.

    Raises:
        SbomError: it cannot be read.
    """
    found = _read(content)
    model = found.metadata.component
    if (model.name, model.version) != (manifest.model, manifest.version):
        return f"{SBOM} is of {model.name} {model.version}"
    files = {c.name: [h.content for h in c.hashes if h.alg == "SHA-256"] for c in found.of("file")}
    wanted = {name: [digest] for name, digest in manifest.files.items() if name != SBOM}
    for name in sorted(files.keys() | wanted.keys()):
        if files.get(name) != wanted.get(name):
            return f"{SBOM} has {name} otherwise than the manifest"
    prints = [p.value for c in found.of("data") for p in c.properties if p.name == _FINGERPRINT]
    if prints != [manifest.data.get("fingerprint", "")]:
        return f"{SBOM} names other data than the manifest"
    listed = installed(content)
    for name, version in manifest.environment.items():
        if listed.get(normalized(name)) != version:
            return f"{SBOM} has {name} {listed.get(normalized(name))}, the manifest {version}"
    return None
