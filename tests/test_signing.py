"""Signatures of bundles, by keys that openssl makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner

from driftmill import bundle, rollout, signing
from driftmill.bundle import BundleError
from driftmill.cli import app
from driftmill.signing import SIGNATURE, SIGNING_KEY, TRUSTED_KEYS, SigningError
from driftmill.store import Store

Make = Callable[..., bundle.Manifest]


def pair() -> tuple[str, str]:
    """A private and its public key, PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A pair that the environment signs by and trusts."""
    private, public = pair()
    monkeypatch.setenv(SIGNING_KEY, private)
    monkeypatch.setenv(TRUSTED_KEYS, public)
    return private, public


@pytest.fixture
def folder(make_bundle: Make, store: Store, tmp_path: Path) -> Path:
    """An unsigned bundle."""
    manifest = make_bundle()
    stored = bundle.locate(store, "tiny", manifest.version)
    return Path(shutil.copytree(stored, tmp_path / "bundle"))


@pytest.mark.usefixtures("keys")
def test_a_signed_bundle_loads(folder: Path) -> None:
    bundle.sign(folder)
    assert bundle.load(folder, "tiny").manifest.model == "tiny"


@pytest.mark.usefixtures("keys")
def test_an_unsigned_bundle_is_refused_where_keys_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="it is not signed, and DRIFTMILL_TRUSTED_KEYS demands"):
        bundle.load(folder)
    assert bundle.load(folder, signed=False)
    monkeypatch.delenv(TRUSTED_KEYS)
    assert bundle.load(folder)


def test_without_a_key_nothing_is_signed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    bundle.sign(folder)
    assert not (folder / SIGNATURE).exists()


@pytest.mark.usefixtures("keys")
def test_a_changed_manifest_is_noticed(folder: Path) -> None:
    """Also one in which a wider range was written into the contract, all digests being right."""
    bundle.sign(folder)
    path = folder / bundle.MANIFEST
    values = json.loads(path.read_bytes())
    values["contract"]["data"]["columns"][0]["max"] = 1e9
    path.write_text(json.dumps(values, indent=1))
    assert bundle.verify(folder, signed=False)
    with pytest.raises(BundleError, match=r"its manifest is not what .* has signed"):
        bundle.verify(folder)


@pytest.mark.usefixtures("keys")
def test_a_signature_by_a_stranger_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, pair()[0])
    bundle.sign(folder)
    with pytest.raises(BundleError, match=r"it is signed by [0-9a-f]{16}, which DRIFTMILL_TRUSTED"):
        bundle.verify(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"key": "a", "signature": "?"}'])
@pytest.mark.usefixtures("keys")
def test_a_damaged_signature_is_refused(folder: Path, content: str) -> None:
    (folder / SIGNATURE).write_text(content)
    with pytest.raises(BundleError, match=r"its manifest.sig is damaged"):
        bundle.verify(folder)


def test_several_keys_are_trusted_while_they_change(
    folder: Path, keys: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of keys, or one file with several."""
    bundle.sign(folder)
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / "old.pem").write_text(keys[1])
    (trusted / "new.pem").write_text(pair()[1])
    both = tmp_path / "both.pem"
    both.write_text(pair()[1] + keys[1])
    for place in (trusted, both):
        monkeypatch.setenv(TRUSTED_KEYS, str(place))
        assert bundle.verify(folder)


def test_what_is_added_later_needs_a_new_signature(folder: Path, keys: tuple[str, str]) -> None:
    bundle.sign(folder)
    bundle.add(folder, "report.html", b"<p>", {"auc": 0.9})
    with pytest.raises(BundleError, match="it is not signed"):
        bundle.verify(folder)
    bundle.sign(folder)
    assert bundle.verify(folder).metrics == {"auc": 0.9}


@pytest.mark.parametrize("variable", [SIGNING_KEY, TRUSTED_KEYS])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("/nowhere/key.pem", "cannot be read"),
        ("-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----", "holds (no|what is no)"),
    ],
)
def test_keys_that_will_not_do_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, content: str, message: str
) -> None:
    monkeypatch.setenv(variable, content)
    with pytest.raises(SigningError, match=f"{variable} {message}"):
        signing.sign(b"") if variable == SIGNING_KEY else signing.check(b"", b"")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_commands_of_the_documentation_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["genpkey", "-algorithm", "ed25519", "-out", "signing.pem"]
    public = ["pkey", "-in", "signing.pem", "-pubout", "-out", "trusted.pem"]
    for arguments in (made, public):
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "signing.pem"))
    monkeypatch.setenv(TRUSTED_KEYS, str(tmp_path / "trusted.pem"))
    bundle.sign(folder)
    assert bundle.verify(folder)


def test_a_version_that_is_there_unsigned_is_said(
    folder: Path, make_bundle: Make, store: Store, keys: tuple[str, str]
) -> None:
    """The store never holds a signature of another manifest than its own."""
    bundle.sign(folder)
    manifest = bundle.verify(folder)
    with pytest.raises(BundleError, match=f"already, unsigned: .* verify tiny {manifest.version}"):
        bundle.put(store, folder, manifest)
    other = Store(folder.parent / "other")
    bundle.put(other, folder, manifest)
    bundle.put(other, folder, manifest)
    assert bundle.fetch(other, "tiny", manifest.version)


def test_the_command_checks_signs_and_explains(
    make_bundle: Make,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test", reason="first")
    monkeypatch.setenv("DRIFTMILL_STORE", store.uri)
    command = ["--home", str(tmp_path / "home"), "verify"]
    plain = CliRunner().invoke(app, [*command, "tiny"], catch_exceptions=False)
    assert "signature    none" in plain.output
    assert "5, answered as in training" in plain.output
    private, public = pair()
    monkeypatch.setenv(SIGNING_KEY, private)
    monkeypatch.setenv(TRUSTED_KEYS, public)
    assert isinstance(CliRunner().invoke(app, [*command, "tiny"]).exception, BundleError)
    signed = CliRunner().invoke(app, [*command, "tiny", version, "--sign"], catch_exceptions=False)
    assert "of the manifest by " in signed.output
    as_json = CliRunner().invoke(
        app, [*command, str(bundle.locate(store, "tiny", version)), "--json"]
    )
    assert json.loads(as_json.stdout)["version"] == version
    packed = [
        CliRunner().invoke(app, [*command, "tiny", "--pack", str(tmp_path / name), "--json"])
        for name in ("a", "b")
    ]
    files = [Path(json.loads(done.stdout)["packed"]) for done in packed]
    assert files[0].name == f"tiny-{version}.tar.gz"
    assert files[0].read_bytes() == files[1].read_bytes()
    with tarfile.open(files[0]) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert bundle.load(tmp_path / "out" / f"tiny-{version}").version == version
