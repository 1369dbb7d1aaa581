"""Sources: real files, a real HTTPS server on this machine, and what each mistake says."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from driftmill.contract import Contract, Source
from driftmill.data import sources
from driftmill.data.sources import DataError, load
from tests.conftest import tiny_frame

CSV = "amount,age,channel,fraud\n1.5, 40 , web ,no\n2,?,app,yes\n"
HEADER = "amount,age,channel,fraud\n"


def source(uri: str, **more: object) -> Source:
    return Source.model_validate({"uri": uri, **more})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and no local copies."""
    monkeypatch.setenv("DRIFTMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DRIFTMILL_DATA", raising=False)


def test_a_csv_is_text_stripped_with_none_for_missing(tiny: Contract, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    frame = load(source(f"file:{tmp_path}/a.csv"), tiny)
    assert frame.to_dict("list") == {
        "amount": ["1.5", "2"],
        "age": ["40", None],
        "channel": ["web", "app"],
        "fraud": ["no", "yes"],
    }


@pytest.mark.parametrize("prefix", ["file:", "file://"])
def test_absolute_and_relative_paths(
    tiny: Contract, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b.csv").write_text(CSV)
    assert len(load(source(f"{prefix}{tmp_path}/a b.csv"), tiny)) == 2
    monkeypatch.chdir(tmp_path)
    assert len(load(source(f"{prefix}a b.csv"), tiny)) == 2


def test_parquet_gzip_and_a_named_format(tiny: Contract, tmp_path: Path) -> None:
    rows = tiny_frame(20)
    rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    shutil.copy(tmp_path / "a.parquet", tmp_path / "c.data")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    for name in ("a.parquet", "b.parquet.gz"):
        pd.testing.assert_frame_equal(load(source(f"file:{tmp_path}/{name}"), tiny), rows)
    found = load(source(f"file:{tmp_path}/c.data", format="parquet"), tiny)
    pd.testing.assert_frame_equal(found, rows)
    assert len(load(source(f"file:{tmp_path}/d.csv.gz"), tiny)) == 2


def test_how_a_csv_is_written(tiny: Contract, tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(
        b'\xef\xbb\xbf# a remark\n1.5;40;"web";no\n2;n/a;a#pp;yes\n\n'
    )
    names = ["amount", "age", "channel", "fraud"]
    csv = {"separator": ";", "header": False, "names": names, "comment": "#", "missing": ["n/a"]}
    with pytest.raises(DataError, match="lacks the column"):
        load(source(f"file:{tmp_path}/a.data"), tiny)
    frame = load(source(f"file:{tmp_path}/a.data", csv=csv), tiny)
    assert frame["age"].tolist() == ["40", None]
    assert frame["channel"].tolist() == ["web", "a"]


def test_a_digest_is_checked(tiny: Contract, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    right, wrong = digest(CSV.encode()), "0" * 64
    assert sources.read(source(f"file:{tmp_path}/a.csv", sha256=right), tiny)[1] == right
    with pytest.raises(DataError, match=f"sha256 is {right}, the contract says {wrong}"):
        load(source(f"file:{tmp_path}/a.csv", sha256=wrong), tiny)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.csv", HEADER.encode(), "has no rows"),
        ("a.csv", HEADER.encode() + b"1,2,web,no,more\n", "not a readable CSV.*csv"),
        ("a.csv", HEADER.encode() + b"1,2,web,no\n1,2,web,no,more\n", "not a readable CSV.*line 3"),
        ("a.csv", HEADER.encode() + b'1,2,"web,no\n', "not a readable CSV"),
        ("a.csv", HEADER.encode() + b"1,2,\xff\xfe,no\n", "not UTF-8"),
        ("a.csv", b"amonut,age,channel\n1,2,web\n", "'amount'; did you mean 'amonut'.*'fraud'"),
        ("a.parquet", b"PAR1 or so", "not a readable Parquet"),
        ("a.csv.gz", b"plain", "not a whole gzip"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-12], "not a whole gzip"),
    ],
)
def test_unusable_files_are_explained(
    tiny: Contract, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(source(f"file:{tmp_path}/{name}"), tiny)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:nowhere.csv", "nowhere.csv does not exist"),
        ("file:/", "not a file"),
        ("htps://x/y.csv", "unknown scheme 'htps'; did you mean 'https'"),
        ("rows.csv", "unknown scheme"),
        ("sklearn:irsi", "did you mean 'iris'"),
        ("sim:paiments", "did you mean 'payments'"),
        ("kaggle:owner/data", "is not kaggle:OWNER/DATASET/FILE"),
    ],
)
def test_unusable_uris_are_explained(tiny: Contract, uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(source(uri), tiny)


@pytest.mark.parametrize(
    ("uri", "module", "extra"),
    [
        ("kaggle:owner/data/file.csv", "kaggle", "kaggle"),
        ("s3://bucket/a.csv", "botocore", "s3"),
        ("gs://bucket/a.csv", "gcsfs", "gs"),
    ],
)
def test_a_missing_extra_is_named(tiny: Contract, uri: str, module: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(DataError, match=rf"pip install 'driftmill\[{extra}\]'"):
            load(source(uri), tiny)
    else:
        pytest.skip(f"{module} is installed")


def test_a_local_copy_comes_first(
    tiny: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "shop").mkdir(parents=True)
    (tmp_path / "data" / "shop" / "rows.csv").write_text(CSV)
    monkeypatch.setenv("DRIFTMILL_DATA", str(tmp_path / "data"))
    uri, right = "https://127.0.0.1:1/x/rows.csv?raw=1", digest(CSV.encode())
    assert len(load(source(uri, sha256=right, dataset="shop"), tiny)) == 2
    assert len(load(source("file:/gone/rows.csv", dataset="shop"), tiny)) == 2
    with pytest.raises(DataError, match="not the expected file"):
        load(source(uri, sha256="0" * 64, dataset="shop"), tiny)
    with pytest.raises(DataError, match="cannot be downloaded"):
        load(source(uri, sha256=right, dataset="other"), tiny)


@dataclass
class Site:
    """An HTTPS server of this test, what it serves, and which paths were asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            if self.path in found.redirects:
                self.send_response(302)
                self.send_header("Location", found.redirects[self.path])
                self.end_headers()
                return
            content = found.files.get(self.path)
            self.send_response(200 if content is not None else 404)
            length = len(content or b"")
            # A path that ends early promises more than it gives.
            self.send_header("Content-Length", str(length + 10 * self.path.endswith("early.csv")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found = Site(f"https://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def cached() -> list[Path]:
    return [p for p in sources.cache_folder().rglob("*") if p.is_file()]


def test_a_download_is_kept(tiny: Contract, site: Site) -> None:
    content = CSV.encode()
    site.files["/x/rows.csv"] = content
    site.redirects["/moved"] = "/x/rows.csv"
    wanted = source(f"{site.url}/x/rows.csv", sha256=digest(content))
    for _ in range(2):
        assert len(load(wanted, tiny)) == 2
    assert site.asked == ["/x/rows.csv"]
    (kept,) = cached()
    kept.write_text("damaged")
    assert len(load(wanted, tiny)) == 2
    assert site.asked == ["/x/rows.csv"] * 2
    assert len(load(source(f"{site.url}/moved", sha256=digest(content), format="csv"), tiny)) == 2


def test_a_bad_download_is_not_kept(tiny: Contract, site: Site) -> None:
    site.files |= {"/rows.csv": CSV.encode(), "/early.csv": CSV.encode()}
    for path, message in (
        ("/rows.csv", f"sha256 is {digest(CSV.encode())}, the contract says {'0' * 64}"),
        ("/early.csv", "cannot be downloaded"),
        ("/none.csv", "answers 404"),
    ):
        with pytest.raises(DataError, match=message):
            load(source(site.url + path, sha256="0" * 64), tiny)
    assert cached() == []


def test_a_redirect_to_http_is_refused(tiny: Contract, site: Site) -> None:
    plain = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=plain.serve_forever, args=(0.05,))
    thread.start()
    site.redirects["/rows.csv"] = f"http://127.0.0.1:{plain.server_port}/rows.csv"
    with pytest.raises(DataError, match="not encrypted"):
        load(source(f"{site.url}/rows.csv", sha256="0" * 64), tiny)
    plain.shutdown()
    thread.join()
    plain.server_close()


def test_an_untrusted_certificate_is_refused(
    tiny: Contract, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DataError, match="cannot be downloaded"):
        load(source(f"{site.url}/rows.csv", sha256="0" * 64), tiny)
    assert site.asked == []


def like(tiny: Contract, numbers: list[str], target: str) -> Contract:
    """The tiny contract with other columns."""
    column = tiny.data.columns[0]
    columns = tuple(column.model_copy(update={"name": n}) for n in numbers)
    aim = tiny.data.target.model_copy(update={"name": target, "labels": ()})
    return tiny.model_copy(
        update={"data": tiny.data.model_copy(update={"columns": columns, "target": aim})}
    )


def test_data_sets_of_scikit_learn(tiny: Contract) -> None:
    iris = load(source("sklearn:iris"), like(tiny, ["sepal length", "petal width"], "target"))
    assert iris["target"].value_counts().to_dict() == {
        "setosa": 50,
        "versicolor": 50,
        "virginica": 50,
    }
    wine = load(
        source("sklearn:wine"), like(tiny, ["alcohol", "od280_od315_of_diluted_wines"], "target")
    )
    cancer = load(source("sklearn:breast_cancer"), like(tiny, ["mean radius"], "target"))
    diabetes = load(source("sklearn:diabetes"), like(tiny, ["bmi"], "target"))
    assert (len(wine), len(cancer), len(diabetes)) == (178, 569, 442)
    assert set(cancer["target"]) == {"malignant", "benign"}


def test_a_table_has_a_digest_too(tiny: Contract) -> None:
    of = like(tiny, ["amount"], "fraud")
    one, again, other = (
        sources.read(source(f"sim:payments?rows=50&seed={seed}"), of)[1] for seed in (1, 1, 2)
    )
    assert one == again != other


def test_without_until_all_rows_are_the_stream(tiny: Contract, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "3,4,web,perhaps\n")
    data = tiny.data.model_copy(update={"source": source(f"file:{tmp_path}/a.csv")})
    stream = sources.stream(tiny.model_copy(update={"data": data}))
    assert stream["fraud"].tolist() == ["no", "yes"]
