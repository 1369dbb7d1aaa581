"""Access to real processes: tokens and certificates, and their rotation."""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from driftmill.store import Store
from services import access
from tests.services.test_tabular import (
    MODULE,
    RECORD,
    MakeBundle,
    bentoml_command,
    promote,
    service,
)

BODY = {"records": [RECORD]}
PREDICT, ADMIN = "predict-0123456789", "admin-0123456789"


def command(*more: str | Path) -> list[str]:
    return [*MODULE[:-1], *map(str, more), MODULE[-1]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_tokens_and_their_rotation(store: Store, make_bundle: MakeBundle, tmp_path: Path) -> None:
    promote(store, make_bundle())
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "predict").write_text(PREDICT)
    (tokens / "admin").write_text(ADMIN)
    with (
        service(store, tmp_path, command("--tokens", tokens)) as (_, url),
        httpx.Client(base_url=url) as client,
    ):

        def status(path: str, token: str, **more: Any) -> int:
            return client.post(path, headers=bearer(token), **more).status_code

        assert client.post("/predict", json=BODY).status_code == 401
        assert status("/predict", "wrong-0123456789", json=BODY) == 401
        assert status("/predict", ADMIN, json=BODY) == 403
        assert status("/predict", PREDICT, json=BODY) == 200
        assert client.get("/model", headers=bearer(PREDICT)).status_code == 403
        assert client.get("/model", headers=bearer(ADMIN)).status_code == 200
        # BentoML's own pages are behind it, too.
        assert client.get("/schema.json").status_code == 401
        assert client.get("/schema.json", headers=bearer(ADMIN)).status_code == 200
        # Nobody has a token for these.
        assert status("/feedback", PREDICT, json={"labels": []}) == 403
        assert client.get("/metrics", headers=bearer(ADMIN)).status_code == 403

        new = "predict-of-today-0123456789"
        (tokens / "predict").write_text(f"{PREDICT}\n{new}\n")
        until(lambda: status("/predict", new, json=BODY) == 200)
        assert status("/predict", PREDICT, json=BODY) == 200
        (tokens / "predict").write_text(new)
        until(lambda: status("/predict", PREDICT, json=BODY) == 401)
        assert status("/predict", new, json=BODY) == 200
    output = (tmp_path / "service.log").read_text()
    assert "has no token of feedback: nobody gets it" in output
    assert not any(token in output for token in (PREDICT, ADMIN, new))


@pytest.mark.slow
def test_bentoml_serve_asks_for_tokens_too(
    store: Store, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bentoml

    manifest = make_bundle()
    promote(store, manifest)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for right in ("predict", "admin"):
        (tokens / right).write_text(PREDICT)
    monkeypatch.setenv("DRIFTMILL_TOKENS", str(tokens))
    serve = [bentoml_command(), "serve", "services.tabular:Service", "--host", "127.0.0.1"]
    with service(store, tmp_path, [*serve, "--port"]) as (_, url):
        assert httpx.post(f"{url}/predict", json=BODY).status_code == 401
        # It reads what the service takes from /schema.json, which is an admin's.
        with bentoml.SyncHTTPClient(url, token=PREDICT) as client:
            assert client.predict(records=[RECORD])["version"] == manifest.version


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """What the command line says, taken as a start does."""
    for name in ("TOKENS", "RATE", "TLS_CERT", "TLS_KEY", "CLIENT_CA"):
        monkeypatch.setenv(f"DRIFTMILL_{name}", "")
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3000)
    access.add_arguments(parser)
    access.access.cache_clear()
    try:
        access.check_arguments(parser, parser.parse_args(arguments))
    finally:
        access.access.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "{folder}/none"], "is no folder"),
        (["--tokens", "{folder}"], "has no token"),
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "many"], "--rate is many"),
        (["--tls-cert", "{folder}/cert.pem"], "belong together"),
        (["--client-ca", "{folder}/cert.pem"], "needs both"),
        (["--tls-cert", "{folder}/key.pem", "--tls-key", "{folder}/key.pem"], "no certificate"),
        (["--tls-cert", "{folder}/none", "--tls-key", "{folder}/key.pem"], "No such file"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "key.pem").write_text("nothing")
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, *(argument.format(folder=tmp_path) for argument in arguments))
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_address_that_others_reach_without_access_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    start(monkeypatch, "--host", host, "--rate", "5")
    assert (f"everybody who reaches {host}:3000" in caplog.text) == warned


def test_an_address_that_others_reach_with_tokens_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "predict").write_text(PREDICT)
    start(monkeypatch, "--host", "0.0.0.0", "--tokens", str(tmp_path))
    assert "everybody" not in caplog.text


class Authority:
    """A CA that gives certificates for this machine."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        self.certificate = self._sign(self._name, self._key, ca=True)
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def give(self, name: str) -> tuple[Path, Path]:
        """Files of a new certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, ca=False)
        files = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return files

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        public = key.public_key()
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        usage = x509.KeyUsage(*([not ca] + [False] * 4 + [ca, ca, False, False]))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(usage, critical=True)
            .add_extension(here, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def trusting(authority: Authority, files: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """What a client takes that trusts a CA, and has a certificate or none."""
    context = ssl.create_default_context(cafile=authority.file)
    if files is not None:
        context.load_cert_chain(*files)
    return context


def shown(url: str, context: ssl.SSLContext) -> bytes:
    """The certificate of a service, DER."""
    with httpx.Client(verify=context) as client, client.stream("GET", f"{url}/livez") as response:
        found = response.extensions["network_stream"].get_extra_info("ssl_object")
        certificate: bytes = found.getpeercert(True)  # binary
        return certificate


def status(url: str, context: ssl.SSLContext) -> int:
    """What a prediction over a new connection is answered with; 0 where there is none."""
    try:
        return httpx.post(f"{url}/predict", json=BODY, verify=context).status_code
    except httpx.TransportError:
        return 0


@contextmanager
def guarded(
    store: Store, folder: Path, server: tuple[Path, Path], *more: str | Path, tls: ssl.SSLContext
) -> Iterator[str]:
    flags = command("--tls-cert", server[0], "--tls-key", server[1], *more)
    with service(store, folder, flags, tls=tls) as (_, url):
        yield url


def test_clients_need_a_certificate_of_their_ca_and_all_are_rotated(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    ours, clients, others = (Authority(tmp_path, name) for name in ("ours", "clients", "others"))
    server = ours.give("server")
    nobody = trusting(ours)
    client = trusting(ours, clients.give("client"))
    stranger = trusting(ours, others.give("stranger"))
    client_ca = tmp_path / "client-ca.pem"
    client_ca.write_bytes(clients.file.read_bytes())
    with guarded(store, tmp_path, server, "--client-ca", client_ca, tls=nobody) as url:
        assert status(url, client) == 200
        assert status(url, nobody) == 403
        assert status(url, stranger) == 0
        for path, expected in (("/livez", 200), ("/v2/health/ready", 200), ("/metrics", 403)):
            assert httpx.get(f"{url}{path}", verify=nobody).status_code == expected

        first = shown(url, nobody)
        with httpx.Client(verify=client) as kept:
            kept.get(f"{url}/livez")
            server[0].write_text("not yet whole")
            ours.give("server")
            until(lambda: shown(url, nobody) != first)
            assert kept.get(f"{url}/livez").status_code == 200
        assert ssl.DER_cert_to_PEM_cert(shown(url, nobody)) == server[0].read_text()

        client_ca.write_bytes(others.file.read_bytes())
        until(lambda: status(url, stranger) == 200)
        assert status(url, client) == 0


@pytest.mark.slow
def test_over_tls_tokens_are_asked_for_beside_the_certificate(
    store: Store, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    promote(store, make_bundle())
    ours = Authority(tmp_path, "ours")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "predict").write_text(PREDICT)
    flags = ("--client-ca", ours.file, "--tokens", tokens)
    client = trusting(ours, ours.give("client"))
    with guarded(store, tmp_path, ours.give("server"), *flags, tls=trusting(ours)) as url:
        assert status(url, client) == 401
        answered = [
            httpx.post(f"{url}/predict", json=BODY, headers=bearer(PREDICT), verify=context)
            for context in (client, trusting(ours))
        ]
    assert [response.status_code for response in answered] == [200, 403]
