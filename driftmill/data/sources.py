"""Where rows come from: a URI in, a raw table out, or a `DataError` that says what to do.

| URI | what is read |
|---|---|
| `file:data.csv` | CSV or Parquet, also with `.gz` |
| `https://…` | the same, kept in the cache folder, its sha256 checked |
| `s3://…`, `gs://…` | the same, by fsspec (extras `s3`, `gs`) |
| `sklearn:iris` | a data set that comes with scikit-learn |
| `openml:1590` | an OpenML data set by id or name |
| `kaggle:OWNER/DATASET/FILE` | by Kaggle's own client (extra `kaggle`) |
| `sim:payments?rows=…` | a simulated stream |
| `idx:`, `folder:`, `cifar10:`, … | images: see `driftmill.vision.sources` |

The cache folder is `$DRIFTMILL_CACHE`, else `~/.cache/driftmill`. A source with a `dataset` is
read from `$DRIFTMILL_DATA/<dataset>/<file>` where that file exists.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pandas as pd

from driftmill.contract import Contract, Csv, Source, did_you_mean
from driftmill.data import schema, simulate
from driftmill.data.schema import DataError
from driftmill.store import Store, sha256

__all__ = ["DataError", "load", "read", "stream"]

SCHEMES = ("file", "https", "s3", "gs", "sklearn", "openml", "kaggle", "sim")
SKLEARN = ("breast_cancer", "california_housing", "diabetes", "iris", "wine")

#: Seconds after which a download shows its progress.
_PATIENCE = 1.0


def load(source: Source, contract: Contract) -> pd.DataFrame:
    """The raw rows of a source, with all its columns.

    Args:
        source: where to read.
        contract: names the columns that must be there.

    Returns:
        Rows as they are in the source; a CSV gives text, stripped, with None where missing.

    Raises:
        DataError: it cannot be read, is not the expected file, is empty, or lacks a column.
    """
    return read(source, contract)[0]


def read(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    """As `load`, and the sha256 of the file (of the table, where the source is not a file)."""
    if contract.is_vision:
        from driftmill.vision import sources as images  # built on this module

        frame, digest = images.read(source, contract)
        needed = []
    else:
        frame, digest = _read_table(source)
        needed = [c.name for c in contract.data.columns]
    if frame.empty:
        raise DataError(f"{source.uri} has no rows")
    data = contract.data
    needed += [data.target.name] + ([data.id] if data.id else [])
    needed += data.time.columns if data.time else ()
    check_columns(frame, source, needed)
    return frame.reset_index(drop=True), digest


def _read_table(source: Source) -> tuple[pd.DataFrame, str]:
    path = find(source)
    if path is not None:
        return table(path, source), sha256(path)
    scheme, _, rest = source.uri.partition(":")
    frame = _data_set(scheme, rest)
    values = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return frame, hashlib.sha256(values.tobytes()).hexdigest()


def stream(contract: Contract) -> pd.DataFrame:
    """The rows that `driftmill replay` sends: a prepared table.

    They are the valid rows at or after `data.time.until`; without that the rows of `data.test`,
    and without that all rows. Of images each has in `_original` the bytes that a client would send:
    its file, or its pixels as PNG. Raises DataError where there is no row.
    """
    data = contract.data
    until = data.time.until if data.time else None
    source = data.test if until is None and data.test is not None else data.source
    raw = load(source, contract)
    if until is not None:
        raw = raw[schema.times(raw, contract) >= until]
    origin = "test" if source is data.test else "source"
    valid = schema.validate(raw, contract, origin=origin, originals=contract.is_vision).valid
    if valid.empty:
        since = f" at or after data.time.until {until.isoformat()}" if until else ""
        raise DataError(f"{source.uri} has no valid rows{since}")
    return valid


def cache_folder() -> Path:
    """Where downloads are kept."""
    named = os.environ.get("DRIFTMILL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "driftmill"


def local_copy(source: Source) -> Path | None:
    """The copy of a data set below `$DRIFTMILL_DATA`, where there is one."""
    root = os.environ.get("DRIFTMILL_DATA")
    if not root or source.dataset is None:
        return None
    name = PurePosixPath(source.uri.partition("?")[0].partition(":")[2]).name
    path = Path(root) / source.dataset / name
    return path if path.exists() else None


def find(source: Source) -> Path | None:
    """The local file behind a URI, downloaded where need be and its digest checked; None for what
    is not a file."""
    scheme, _, rest = source.uri.partition(":")
    path = local_copy(source)
    if path is not None:
        check_digest(path, source, str(path))
        return path
    match scheme:
        case "file":
            path = Path(rest[2:] if rest.startswith("//") else rest)
            if not path.is_file():
                raise DataError(
                    f"{path.resolve()} does not exist or is not a file; "
                    "check data.source.uri (a relative path starts at the contract's folder)"
                )
            check_digest(path, source, str(path))
            return path
        case "https":
            return _download(source)
        case "s3" | "gs":
            return _object(source, scheme)
        case "kaggle":
            path = _kaggle(rest)
            check_digest(path, source, source.uri)
            return path
        case "sklearn" | "openml" | "sim":
            return None
        case "idx" | "folder" | "cifar10":
            raise DataError(
                f"{source.uri} holds images; did you mean task: image-classification (with "
                "data.image)?"
            )
    raise DataError(
        f"{source.uri}: unknown scheme {scheme!r}{did_you_mean(scheme, SCHEMES)}; "
        f"a source begins with one of {', '.join(s + ':' for s in SCHEMES)}"
    )


def _data_set(scheme: str, rest: str) -> pd.DataFrame:
    if scheme == "sim":
        return simulate.generate(f"sim:{rest}")
    return _sklearn(rest) if scheme == "sklearn" else _openml(rest)


def check_digest(path: Path, source: Source, name: str) -> str:
    """The sha256 of a file; raises DataError where the source expects another one."""
    found = sha256(path)
    expect_digest(found, source, name)
    return found


def expect_digest(found: str, source: Source, name: str) -> None:
    """Raise DataError where the source expects another sha256."""
    if source.sha256 not in (None, found):
        raise DataError(
            f"{name} is not the expected file: its sha256 is {found}, the contract says "
            f"{source.sha256}; look at what changed before you change the contract"
        )


def _download(source: Source) -> Path:
    """The file of an `https:` source in the cache; only a file with the right digest gets there."""
    assert source.sha256 is not None  # the contract sees to it
    path = cache_folder() / source.sha256 / PurePosixPath(urlsplit(source.uri).path).name
    if path.is_file() and sha256(path) == source.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        _fetch(source.uri, temporary)
        check_digest(temporary, source, f"the download of {source.uri}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path) -> None:
    """Stream a URL into a file; on a terminal a bar shows after a second."""
    import httpx
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("downloading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started, shown = time.monotonic(), False
    try:
        with (
            httpx.stream("GET", url, follow_redirects=True, timeout=30.0) as response,
            path.open("wb") as file,
        ):
            if response.url.scheme != "https":
                raise DataError(f"{url} leads to {response.url}, which is not encrypted")
            response.raise_for_status()
            length = int(response.headers.get("content-length", 0)) or None
            task = bar.add_task(PurePosixPath(response.url.path).name, total=length)
            for chunk in response.iter_bytes(1 << 16):
                file.write(chunk)
                bar.update(task, completed=response.num_bytes_downloaded)
                if not shown and console.is_terminal and time.monotonic() - started > _PATIENCE:
                    bar.start()
                    shown = True
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise DataError(f"{url} answers {status}; check data.source.uri") from None
    except httpx.HTTPError as error:
        raise DataError(
            f"{url} cannot be downloaded: {error or type(error).__name__}; check the network, or "
            "put the file below $DRIFTMILL_DATA and name its folder in data.source.dataset"
        ) from None
    finally:
        if shown:
            bar.stop()


def _object(source: Source, scheme: str) -> Path:
    """A copy of an object of a bucket. Without a digest it is fetched anew each time."""
    place, _, name = source.uri.rpartition("/")
    key = source.sha256 or hashlib.sha256(source.uri.encode()).hexdigest()
    path = cache_folder() / key / PurePosixPath(source.uri).name
    if source.sha256 and path.is_file() and sha256(path) == source.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        try:
            Store(place).get_file(name, temporary)
        except ImportError:
            raise DataError(
                f"{source.uri} needs the extra {scheme!r}: pip install 'driftmill[{scheme}]'"
            ) from None
        except FileNotFoundError:
            raise DataError(f"{source.uri} does not exist; check data.source.uri") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{source.uri} cannot be read: {error}") from None
        check_digest(temporary, source, source.uri)
        temporary.replace(path)
    return path


def _kaggle(rest: str) -> Path:
    parts = rest.split("/")
    if len(parts) < 3:
        raise DataError(f"kaggle:{rest} is not kaggle:OWNER/DATASET/FILE")
    owner, name, file = parts[0], parts[1], "/".join(parts[2:])
    path = cache_folder() / "kaggle" / owner / name / Path(file).name
    if path.is_file():
        return path
    try:
        # The client looks for credentials as it is imported, and leaves the process without them.
        import kaggle
    except ImportError:
        raise DataError(
            f"kaggle:{rest} needs Kaggle's client: pip install 'driftmill[kaggle]'"
        ) from None
    except (SystemExit, OSError, ValueError) as error:
        raise DataError(
            f"kaggle:{rest}: the client found no credentials ({error}); put an API token into "
            "~/.kaggle/kaggle.json"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        kaggle.api.dataset_download_file(f"{owner}/{name}", file, path=folder, quiet=True)
        found = next(Path(folder).iterdir(), None)
        if found is None:
            raise DataError(f"kaggle:{rest}: the download brought no file; check the names")
        if found.suffix == ".zip" and path.suffix != ".zip":
            with zipfile.ZipFile(found) as archive:
                found = Path(archive.extract(path.name, folder))
        found.replace(path)
    return path


def _sklearn(name: str) -> pd.DataFrame:
    """A data set of scikit-learn; classes by name, units left out of column names."""
    if name not in SKLEARN:
        raise DataError(
            f"sklearn:{name}: no such data set{did_you_mean(name, SKLEARN)}; "
            f"there are {', '.join(SKLEARN)}"
        )
    from sklearn import datasets

    if name == "california_housing":
        try:
            bunch = datasets.fetch_california_housing(
                data_home=cache_folder() / "sklearn", as_frame=True
            )
        except OSError as error:
            raise DataError(f"sklearn:{name} cannot be downloaded: {error}") from None
    else:
        bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    frame: pd.DataFrame = bunch.frame.rename(columns=_column_name)
    if "target_names" in bunch:
        frame["target"] = frame["target"].map(dict(enumerate(map(str, bunch.target_names))))
    return frame


def _openml(name: str) -> pd.DataFrame:
    from sklearn.datasets import fetch_openml

    which = {"data_id": int(name)} if name.isdecimal() else {"name": name}
    try:
        bunch = fetch_openml(
            **which, as_frame=True, parser="auto", data_home=cache_folder() / "openml"
        )
    except (OSError, ValueError) as error:  # no network; no such data set
        raise DataError(f"openml:{name} cannot be read: {error}") from None
    frame: pd.DataFrame = bunch.frame
    return frame.rename(columns=_column_name)


def _column_name(name: str) -> str:
    """A name that a contract may use: `sepal length (cm)` is `sepal length`."""
    return re.sub(r"[^A-Za-z0-9_.\- ]+", "_", re.sub(r"\s*\([^)]*\)", "", name)).strip("_ ")


def table(path: Path, source: Source) -> pd.DataFrame:
    """Read a CSV or Parquet file, unpacked first where it ends in `.gz`."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    name = path.name.lower().removesuffix(".gz")
    kind = source.format
    if kind == "auto":
        kind = "parquet" if name.endswith((".parquet", ".pq")) else "csv"
    content = unpack(path)
    if kind == "parquet":
        try:
            return pd.read_parquet(io.BytesIO(content))
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    return _csv(path, content, source.csv)


def unpack(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends in `.gz`."""
    content = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from None


def _csv(path: Path, content: bytes, csv: Csv) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            # Pandas warns where it would drop fields that have no column.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.BytesIO(content),
                sep=csv.separator,
                header=0 if csv.header else None,
                names=list(csv.names) or None,
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                comment=csv.comment,
                encoding="utf-8-sig",
            )
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is not a readable CSV file: {reason}; check data.source.csv (separator, "
            "header, names, comment)"
        ) from None
    frame.columns = frame.columns.map(lambda name: str(name).strip())
    missing = set(csv.missing) | {""}
    for name in frame.columns:
        text = frame[name].str.strip()
        frame[name] = text.where(text.notna() & ~text.isin(missing), None)
    return frame


def check_columns(frame: pd.DataFrame, source: Source, needed: Iterable[str]) -> None:
    """Raise DataError where a column is missing or there are two of it."""
    needed = list(dict.fromkeys(needed))
    present = [str(name) for name in frame.columns]
    if missing := [name for name in needed if name not in present]:
        hints = [f"{name!r}{did_you_mean(name, present)}" for name in missing]
        shown = ", ".join(present[:20]) + (", …" if len(present) > 20 else "")
        raise DataError(f"{source.uri} lacks the column {', '.join(hints)}; it has {shown}")
    if twice := sorted({name for name in needed if present.count(name) > 1}):
        raise DataError(f"{source.uri} has the column {', '.join(twice)} twice")
