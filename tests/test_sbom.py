"""The list of a bundle's components: by the published schema, the same each time, and true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given
from hypothesis import strategies as st
from packageurl import PackageURL
from typer.testing import CliRunner

from driftmill import bundle, sbom
from driftmill.bundle import BundleError, Manifest
from driftmill.cli import app
from driftmill.sbom import SBOM
from driftmill.store import Store, sha256

Make = Callable[..., Manifest]
INSTALLED = {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.9.0+cpu"}


@pytest.fixture
def folder(make_bundle: Make, store: Store, tmp_path: Path) -> Path:
    """A bundle outside of the store."""
    stored = bundle.locate(store, "tiny", make_bundle().version)
    return Path(shutil.copytree(stored, tmp_path / "bundle"))


def components(content: bytes, kind: str) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in json.loads(content)["components"] if c["type"] == kind}


def test_the_published_schema_holds(folder: Path) -> None:
    """Unknown fields refused."""
    schema = SchemaVersion.V1_6
    bundle.add(folder, "report.html", b"<p>", {"auc": 0.9})
    content = (folder / SBOM).read_text()
    strict = JsonStrictValidator(schema)
    assert strict.validate_str(content) is None
    assert strict.validate_str(content.replace('"model"', '"model", "extra": 1', 1)) is not None


def test_it_names_what_the_bundle_is_made_of(folder: Path) -> None:
    manifest = bundle.add(folder, "report.html", b"<p>", {"auc": 0.9})
    content = (folder / SBOM).read_bytes()
    files = components(content, "file")
    assert set(files) == set(manifest.files) - {SBOM} >= {"report.html", *bundle.CORE}
    for name, file in files.items():
        assert file["hashes"] == [{"alg": "SHA-256", "content": sha256(folder / name)}]
    numpy = components(content, "library")["numpy"]
    assert numpy["purl"] == f"pkg:pypi/numpy@{version('numpy')}"
    model = json.loads(content)["metadata"]["component"]
    assert (model["type"], model["version"]) == ("machine-learning-model", manifest.version)
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics == [{"type": "auc", "value": "0.9"}]
    (data,) = components(content, "data").values()
    assert data["properties"] == [{"name": "driftmill:fingerprint", "value": "0" * 64}]


def test_every_component_is_reached_from_the_model(folder: Path) -> None:
    content = json.loads((folder / SBOM).read_bytes())
    (edges,) = content["dependencies"]
    names = [component["bom-ref"] for component in content["components"]]
    assert edges["ref"] == content["metadata"]["component"]["bom-ref"]
    assert edges["dependsOn"] == names
    assert len(set(names)) == len(names)


def test_the_same_bundle_gives_the_same_list(folder: Path) -> None:
    """In whatever order the libraries were found; another bundle has another serial number."""
    manifest = bundle.read_manifest(folder)
    made = sbom.document(manifest, INSTALLED)
    assert made == sbom.document(manifest, dict(reversed(INSTALLED.items())))
    other = manifest.model_copy(update={"metrics": {"auc": 0.5}})
    serials = {json.loads(sbom.document(m, INSTALLED))["serialNumber"] for m in (manifest, other)}
    assert len(serials) == 2


def test_what_is_added_elsewhere_keeps_the_libraries_of_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sbom.installed((folder / SBOM).read_bytes())
    monkeypatch.setattr(sbom, "libraries", lambda: INSTALLED)
    bundle.add(folder, "report.html", b"<p>", {})
    assert sbom.installed((folder / SBOM).read_bytes()) == before != INSTALLED


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", fullmatch=True),
        st.from_regex(r"([0-9]!)?[0-9](\.[0-9]+)*(rc[0-9])?(\+[a-z0-9.]+)?", fullmatch=True),
        max_size=3,
    )
)
def test_names_and_versions_come_back_from_a_purl(installed: dict[str, str]) -> None:
    for name, number in installed.items():
        made = sbom._package(sbom.normalized(name), number)
        read = PackageURL.from_string(made["purl"])
        assert (read.name, read.version) == (made["name"], number)
        assert read.to_string() == made["purl"]


def change(what: str) -> Callable[[dict[str, Any], Manifest], None]:
    """A lie in the list."""

    def file(content: dict[str, Any], manifest: Manifest) -> None:
        content["components"][0]["hashes"][0]["content"] = "0" * 64

    def missing(content: dict[str, Any], manifest: Manifest) -> None:
        del content["components"][0]

    def library(content: dict[str, Any], manifest: Manifest) -> None:
        (one,) = (c for c in content["components"] if c["name"] == "numpy")
        one["version"] = "1.0"

    def data(content: dict[str, Any], manifest: Manifest) -> None:
        (one,) = (c for c in content["components"] if c["type"] == "data")
        one["properties"][0]["value"] = "1" * 64

    def model(content: dict[str, Any], manifest: Manifest) -> None:
        content["metadata"]["component"]["version"] = "0" * 12

    def kind(content: dict[str, Any], manifest: Manifest) -> None:
        content["bomFormat"] = "SPDX"

    return {f.__name__: f for f in (file, missing, library, data, model, kind)}[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("file", r"has examples\.json otherwise than the manifest"),
        ("missing", r"has examples\.json otherwise than the manifest"),
        ("library", r"has numpy 1\.0, the manifest "),
        ("data", "names other data"),
        ("model", "is of tiny 000000000000"),
        ("kind", "is damaged"),
    ],
)
def test_verify_finds_a_list_that_is_not_true(folder: Path, what: str, message: str) -> None:
    """Also where the manifest names the digest of the false list."""
    manifest = bundle.read_manifest(folder)
    content = json.loads((folder / SBOM).read_bytes())
    change(what)(content, manifest)
    (folder / SBOM).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"sbom\.cdx\.json is not the file that the manifest"):
        bundle.examine(folder)
    forged = manifest.model_copy(update={"files": {**manifest.files, SBOM: sha256(folder / SBOM)}})
    (folder / bundle.MANIFEST).write_text(forged.model_dump_json())
    with pytest.raises(BundleError, match=rf"sbom\.cdx\.json {message}"):
        bundle.examine(folder)


def test_a_bundle_from_before_there_was_a_list_still_serves(folder: Path) -> None:
    """And gets none when something is added: nobody knows what was installed."""
    manifest = bundle.read_manifest(folder)
    (folder / SBOM).unlink()
    files = {name: digest for name, digest in manifest.files.items() if name != SBOM}
    older = manifest.model_copy(update={"files": files, "code_version": "0.1.0"})
    (folder / bundle.MANIFEST).write_text(older.model_dump_json())
    assert bundle.load(folder, "tiny").version == manifest.version
    assert SBOM not in bundle.add(folder, "report.html", b"<p>", {}).files
    done = CliRunner().invoke(app, ["verify", str(folder)], catch_exceptions=False)
    assert "sbom         none: the bundle is older than such lists" in done.output
