"""Where images come from: a URI in, a raw table out, or a `DataError` that says what to do.

| URI | what is read | columns |
|---|---|---|
| `idx:train-images-idx3-ubyte.gz` | a pair of files in MNIST's format, also unpacked | |
| `folder:PATH` | a sub-folder for each label; hidden files are left out | `path` |
| `cifar10:PATH` | the binary version: its folder, its `.tar.gz`, or one `.bin` file | |
| `sklearn:digits` | 1797 digits that come with scikit-learn | |
| `file:`, `https:`, `s3:`, `gs:`, `kaggle:` | a table of paths or bytes | the table's |

A raw table has the image in `_image` (a path, a file's bytes or an array: nothing is decoded yet),
in `_source` where it came from, for people, and the label in the target's column. `data.simulate`
adds `row`, the image's number in the source, and `at`, its time.
"""

from __future__ import annotations

import hashlib
import math
import os
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftmill.contract import Contract, Image, Source, did_you_mean
from driftmill.data import schema
from driftmill.data import sources as tables
from driftmill.data.schema import DataError
from driftmill.features import IMAGE
from driftmill.store import sha256
from driftmill.vision import corruptions, images
from driftmill.vision.images import Decoded, ImageError

#: Column that says where an image came from.
ORIGIN = "_source"

_TABLES = ("file", "https", "s3", "gs", "kaggle")
_SCHEMES = ("idx", "folder", "cifar10", "sklearn", *_TABLES)
#: Numbers that are worked on at once, by a thread; and bytes of images that are kept in memory, of
#: more the system keeps what it can.
_BLOCK, _MEMORY = 2**20, 2**30
_CIFAR_SIDE = 32


@dataclass(frozen=True)
class Corrupted:
    """An image of a changed world, made when it is looked at."""

    content: Any
    """The image before: a path, a file's bytes or an array."""
    corruptions: tuple[tuple[corruptions.Kind, int], ...]
    """Kinds and strengths, in order."""
    seed: tuple[int, int]
    """Seed of the stream, and the image's place in it."""

    def array(self, image: Image) -> np.ndarray:
        """uint8 (height, width) or (height, width, 3). Raises ImageError as `images.decode`."""
        content = self.content
        if not isinstance(content, np.ndarray):
            content = images.decode_whole(_content(content, image), image)
        rng = np.random.default_rng(self.seed)
        for kind, strength in self.corruptions:
            content = corruptions.corrupt(content, kind, strength, rng)
        return np.asarray(content)


def read(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    """The raw table of a source of images, and a sha256: of the file (`idx`: the images' file), or
    of all files of a folder.

    Raises:
        DataError: it cannot be read, is not the expected file, or is empty.
    """
    scheme, _, rest = source.uri.partition(":")
    match scheme:
        case "idx":
            frame, digest = _idx(source, contract)
        case "folder":
            frame, digest = _folder(source, contract)
        case "cifar10":
            frame, digest = _cifar10(source, contract)
        case "sklearn":
            frame, digest = _digits(rest, contract)
        case _ if scheme in _TABLES:
            frame, digest = _table(source, contract)
        case _:
            raise DataError(
                f"{source.uri}: {scheme}: is no source of images"
                f"{did_you_mean(scheme, _SCHEMES)}; they come from "
                "idx:, folder:, cifar10:, sklearn:digits or a file: table"
            )
    if frame.empty:
        raise DataError(f"{source.uri} has no images")
    return _simulated(frame, source, contract), digest


def open_image(content: Any, image: Image) -> Decoded:
    """An image of a raw table as the model sees it. Raises ImageError."""
    if isinstance(content, Corrupted):
        content = content.array(image)
    if isinstance(content, np.ndarray):
        return images.from_array(content, image)
    return images.decode(_content(content, image), image)


def encoded(content: Any, image: Image) -> bytes | None:
    """An image of a raw table as a client would send it: its file, or its pixels as PNG; None where
    there is none."""
    try:
        if isinstance(content, Corrupted):
            content = content.array(image)
        if isinstance(content, np.ndarray):
            return images.array_to_png(content)
        return _content(content, image)
    except ImageError:
        return None


def open_all(
    contents: Sequence[Any], image: Image
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """The images of a raw table as the model sees them, with their statistics.

    Threads decode. Beyond a GiB the pixels lie in a file without a name.

    Returns:
        uint8 pixels (n, channels, height, width); statistics, each float32 (n,); and reasons, an
        object array (n,) of text, empty where an image is taken. What is not taken has NaN for
        statistics and any pixels.
    """
    count, shape = len(contents), (image.channels, *image.size)
    pixels = _room((count, *shape))
    found = {c.name: np.full(count, np.nan, dtype=np.float32) for c in image.statistics}
    reasons = np.full(count, "", dtype=object)

    def work(block: slice) -> None:
        sizes = np.ones((block.stop - block.start, 2))
        for i in range(block.start, block.stop):
            try:
                decoded = open_image(contents[i], image)
            except ImageError as error:
                reasons[i], pixels[i] = str(error), 0
            else:
                pixels[i] = decoded.pixels
                sizes[i - block.start] = decoded.width, decoded.height
        taken = reasons[block] == ""
        for name, values in images.statistics(pixels[block], sizes).items():
            found[name][block] = np.where(taken, values, np.nan)

    size = max(1, min(512, _BLOCK // math.prod(shape)))
    blocks = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, blocks):  # an error in a thread is raised here
            pass
    return pixels, found, reasons


def _room(shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) <= _MEMORY:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, np.uint8, "w+", shape=shape))


def _content(content: Any, image: Image) -> bytes:
    """The bytes of a file; one that is too large is not read."""
    if isinstance(content, bytes):
        return content
    if not isinstance(content, Path):
        raise ImageError("missing" if pd.isna(content) else "neither a path nor bytes")
    try:
        if content.stat().st_size <= image.max_bytes:
            return content.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("no such file") from None
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        raise ImageError("file cannot be read") from None
    raise ImageError("too many bytes")


def _frame(
    contents: Sequence[Any], origins: Sequence[str], labels: Any, contract: Contract
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            IMAGE: images.column(contents, len(contents)),
            ORIGIN: origins,
            contract.data.target.name: labels,
        }
    )


def _simulated(frame: pd.DataFrame, source: Source, contract: Contract) -> pd.DataFrame:
    """The stream that `data.simulate` asks for. The images of `data.test` get its columns, too, and
    are left as they are."""
    simulate = contract.data.simulate
    if simulate is None:
        return frame
    if taken := [name for name in ("row", "at") if name in frame]:
        raise DataError(
            f"{source.uri} has a column {taken[0]!r}, which data.simulate would make; "
            "leave data.simulate out, or rename the column"
        )
    rows = [str(i) for i in range(len(frame))]
    if source is contract.data.test:
        frame = frame.assign(row=[f"test-{row}" for row in rows])
    else:
        rng = np.random.default_rng(simulate.seed)
        frame = frame.assign(row=rows).iloc[rng.permutation(len(frame))]
        onset = len(frame) if simulate.onset is None else simulate.onset
        if simulate.new_labels:
            frame = _new_labels_later(frame, onset, source, contract)
        frame = frame.head(simulate.rows or len(frame)).reset_index(drop=True)
        kinds = tuple(simulate.corruptions.items())
        if kinds:
            changed = [
                content if i < onset else Corrupted(content, kinds, (simulate.seed, i))
                for i, content in enumerate(frame[IMAGE])
            ]
            frame[IMAGE] = images.column(changed, len(changed))
    times = pd.Timestamp(simulate.start) + pd.to_timedelta(
        np.arange(len(frame)) * simulate.step, unit="s"
    )
    return frame.assign(at=times)


def _new_labels_later(
    frame: pd.DataFrame, onset: int, source: Source, contract: Contract
) -> pd.DataFrame:
    """Fill the rows before the onset with other labels. What is left out there stays out: put in
    later, it would make a stretch of nothing else."""
    simulate = contract.data.simulate
    assert simulate is not None
    labels = schema.labels(frame, contract)
    present = sorted(set(labels.dropna()))
    for name in simulate.new_labels:
        if name not in present:
            raise DataError(
                f"data.simulate.new_labels: {source.uri} has no label {name!r}"
                + did_you_mean(name, present)
            )
    is_old = ~labels.isin(simulate.new_labels).to_numpy()
    # An old row is early as long as no more than `onset` old ones have come.
    early = np.cumsum(is_old) <= onset
    return frame[is_old | ~early]


# The formats


def _path(source: Source, what: str) -> Path:
    """The file or folder of a URI, or of the data set below `$DRIFTMILL_DATA`."""
    copy = tables.local_copy(source)
    if copy is not None:
        return copy
    rest = source.uri.partition(":")[2]
    path = Path(rest[2:] if rest.startswith("//") else rest)
    if path.exists():
        return path
    if source.dataset is not None:
        raise DataError(
            f"neither {path.resolve()} nor $DRIFTMILL_DATA/{source.dataset}/{path.name} exists; "
            f"put {what} there and set DRIFTMILL_DATA, or name their path in the contract"
        )
    raise DataError(
        f"{path.resolve()} does not exist; check data.source.uri (a relative path starts at the "
        "contract's folder)"
    )


def _idx(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    path = _path(source, "the images and their labels")
    if not path.is_file():
        raise DataError(f"{path} is a folder; idx: takes the images' file itself")
    digest = tables.check_digest(path, source, str(path))
    beside = _labels_file(path)
    pictures, labels = _idx_array(path, 3), _idx_array(beside, 1)
    if len(pictures) != len(labels):
        raise DataError(f"{path} has {len(pictures)} images and {beside} has {len(labels)} labels")
    origins = [f"{path.name}, image {i}" for i in range(len(pictures))]
    return _frame(list(pictures), origins, labels, contract), digest


def _labels_file(path: Path) -> Path:
    """The labels' file beside an images' file: `train-images-idx3-ubyte.gz` has
    `train-labels-idx1-ubyte.gz`; either may be packed."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    if name == path.name:
        raise DataError(
            f"{path}: the name of an images' file has 'images' in it, as in "
            "train-images-idx3-ubyte.gz; that of its labels' file is made from it"
        )
    plain = name.removesuffix(".gz")
    for candidate in (path.with_name(name), path.with_name(plain), path.with_name(plain + ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{path.with_name(name)} is missing: it should hold the labels of {path.name}")


def _idx_array(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a file in MNIST's format
    (http://yann.lecun.com/exdb/mnist, "the IDX file format")."""
    content = tables.unpack(path)
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise DataError(
            f"{path} is not an idx{dimensions} file of bytes: it begins with {content[:4].hex()}, "
            f"expected {bytes((0, 0, 8, dimensions)).hex()}"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} is cut off or damaged: it says {' x '.join(map(str, shape))} and holds "
            f"{len(content) - start} bytes"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _folder(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    root = _path(source, "the folders")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; folder: takes one with a sub-folder per label")
    paths = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    )
    names = [path.relative_to(root).as_posix() for path in paths]
    labels = [name.partition("/")[0] if "/" in name else None for name in names]
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        digest.update(f"{name}\0{sha256(path)}\n".encode())
    tables.expect_digest(digest.hexdigest(), source, str(root))
    frame = _frame(paths, names, labels, contract)
    if "path" not in frame:
        frame["path"] = names
    return frame, digest.hexdigest()


def _cifar10(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    """The binary version of https://www.cs.toronto.edu/~kriz/cifar.html: records of a label and
    three planes of 32 x 32."""
    path = _path(source, "the files of CIFAR-10's binary version")
    is_test = source is contract.data.test
    wanted = ["test_batch.bin"] if is_test else [f"data_batch_{i}.bin" for i in range(1, 6)]
    if path.suffix == ".bin":
        wanted, files = [path.name], _cifar10_folder(path.parent)
    elif path.is_dir():
        files = _cifar10_folder(path)
    else:
        files = _cifar10_archive(path)
    if missing := [name for name in wanted if name not in files]:
        raise DataError(f"{path} lacks {', '.join(missing)}; is it the binary version of CIFAR-10?")
    names = files.get("batches.meta.txt", b"").decode().split()
    digest, contents, origins = hashlib.sha256(), [], []
    labels: list[str] = []
    for name in wanted:
        digest.update(hashlib.sha256(files[name]).digest())
        size = 1 + 3 * _CIFAR_SIDE**2
        if not files[name] or len(files[name]) % size:
            raise DataError(f"{path}: {name} is cut off: it is not whole records of {size} bytes")
        records = np.frombuffer(files[name], np.uint8).reshape(-1, size)
        planes = records[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
        contents += list(np.moveaxis(planes, 1, -1))
        labels += [names[n] if n < len(names) else str(n) for n in records[:, 0]]
        origins += [f"{name}, image {i}" for i in range(len(records))]
    if path.is_file():
        found = tables.check_digest(path, source, str(path))
    else:
        found = digest.hexdigest()
        tables.expect_digest(found, source, str(path))
    return _frame(contents, origins, labels, contract), found


def _cifar10_folder(folder: Path) -> dict[str, bytes]:
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    kept = [p for p in folder.iterdir() if p.suffix == ".bin" or p.name == "batches.meta.txt"]
    return {path.name: path.read_bytes() for path in kept}


def _cifar10_archive(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None and member.name.endswith((".bin", "batches.meta.txt")):
                    files[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole tar archive: {error}") from None
    return files


def _digits(name: str, contract: Contract) -> tuple[pd.DataFrame, str]:
    if name != "digits":
        raise DataError(f"sklearn:{name} has no images; sklearn:digits has")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Counts of black pixels in blocks of 4 by 4, 0 to 16.
    pictures = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    origins = [f"digits, image {i}" for i in range(len(pictures))]
    digest = hashlib.sha256(pictures.tobytes() + bunch.target.astype(np.uint8).tobytes())
    return _frame(list(pictures), origins, bunch.target, contract), digest.hexdigest()


def _table(source: Source, contract: Contract) -> tuple[pd.DataFrame, str]:
    """A table of paths or of bytes, in the column `data.image.column`."""
    assert contract.data.image is not None
    path = tables.find(source)
    assert path is not None  # each scheme of `_TABLES` names a file
    frame, digest = tables.table(path, source), sha256(path)
    name = contract.data.image.column
    tables.check_columns(frame, source, [name])
    contents: list[Any] = []
    origins = []
    for i, given in enumerate(frame.pop(name)):
        # Data sets of Hugging Face hold an image as a struct.
        value = given.get("bytes") or given.get("path") if isinstance(given, dict) else given
        if isinstance(value, str):
            contents.append(path.parent / value)
            origins.append(value)
        else:
            contents.append(value)
            origins.append(f"{path.name}, row {i}")
    frame[IMAGE] = images.column(contents, len(contents))
    frame[ORIGIN] = origins
    return frame, digest
