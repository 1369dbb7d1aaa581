"""Sources of images: real files of each layout, what each mistake says, and simulated streams."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from driftmill import contract
from driftmill.contract import Contract
from driftmill.data import sources
from driftmill.data.schema import DataError
from driftmill.features import IMAGE, ORIGINAL
from driftmill.vision import images
from driftmill.vision import sources as vision_sources
from driftmill.vision.sources import ORIGIN, Corrupted, encoded, open_all, open_image
from tests.vision.pictures import LABELS, PICTURES, build, write_folder

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIFTMILL_DATA", raising=False)


def load(of: Contract) -> pd.DataFrame:
    return sources.load(of.data.source, of)


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, packed: bool = False, labels: np.ndarray = LABELS) -> Path:
    folder.mkdir(exist_ok=True)
    suffix, pack = (".gz", gzip.compress) if packed else ("", bytes)
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(PICTURES)))
    return path


# idx


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    path = write_idx(tmp_path, packed)
    frame = load(build(tmp_path, f"idx:{path.name}"))
    np.testing.assert_array_equal(np.stack(frame[IMAGE].to_list()), PICTURES)
    assert frame["label"].tolist() == LABELS.tolist()
    assert frame[ORIGIN][3] == f"{path.name}, image 3"


def test_idx_labels_may_be_packed_otherwise_and_the_digest_is_the_images(tmp_path: Path) -> None:
    path = write_idx(tmp_path, packed=True)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    of = build(tmp_path, {"uri": f"idx:{path.name}", "sha256": digest})
    assert sources.read(of.data.source, of)[1] == digest
    with pytest.raises(DataError, match="not the expected file"):
        load(build(tmp_path, {"uri": f"idx:{path.name}", "sha256": "0" * 64}))


def test_idx_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = build(tmp_path, {"uri": "idx:train-images-idx3-ubyte", "dataset": "clothes"})
    with pytest.raises(DataError, match=r"nor \$DRIFTMILL_DATA/clothes/train-images.* exists; put"):
        load(of)
    write_idx(tmp_path / "clothes")
    monkeypatch.setenv("DRIFTMILL_DATA", str(tmp_path))
    assert len(load(of)) == 30


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _floats(path: Path) -> None:
    path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:])


def _swap(path: Path) -> None:
    path.write_bytes(idx(LABELS))


def _short(path: Path) -> None:
    write_idx(path.parent, labels=LABELS[:-1])


def _rename(path: Path) -> None:
    path.with_name("train-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"cut off or damaged: it says 30 x 9 x 7 and holds 1889 bytes"),
        (_floats, "is not an idx3 file of bytes: it begins with 00000d03"),
        (_swap, "is not an idx3 file of bytes"),
        (_short, "has 30 images and .* has 29 labels"),
        (_rename, "train-labels-idx1-ubyte is missing: it should hold the labels"),
    ],
)
def test_idx_mistakes(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_idx(tmp_path))
    with pytest.raises(DataError, match=message):
        load(build(tmp_path, "idx:train-images-idx3-ubyte"))


def test_idx_file_that_is_not_whole_or_not_there(tmp_path: Path) -> None:
    path = write_idx(tmp_path, packed=True)
    _cut(path)
    with pytest.raises(DataError, match="is not a whole gzip file"):
        load(build(tmp_path, f"idx:{path.name}"))
    with pytest.raises(DataError, match=r"does not exist; check data\.source\.uri"):
        load(build(tmp_path, "idx:other"))
    with pytest.raises(DataError, match="is a folder"):
        load(build(tmp_path, "idx:."))
    path.rename(tmp_path / "pictures")
    with pytest.raises(DataError, match="has 'images' in it"):
        load(build(tmp_path, "idx:pictures"))


# folder


def test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "all")
    (tmp_path / "all" / ".hidden").mkdir()
    (tmp_path / "all" / ".hidden" / "x.png").write_bytes(b"x")
    (tmp_path / "all" / "class 0" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "all" / "class 0" / "notes.txt").write_text("kept: it is for the quarantine")
    (tmp_path / "all" / "README").write_text("without a label")
    of = build(tmp_path, "folder:all", id="path")
    frame = load(of).set_index("path")
    assert len(frame) == 32
    assert frame["label"]["class 1/deeper/01.png"] == "class 1"
    assert frame["label"].isna().sum() == 1
    assert frame[ORIGIN]["class 0/notes.txt"] == "class 0/notes.txt"
    assert isinstance(frame[IMAGE].iloc[0], Path)
    assert of.data.image is not None
    decoded = open_image(frame[IMAGE]["class 1/deeper/01.png"], of.data.image)
    np.testing.assert_array_equal(decoded.pixels[0], PICTURES[1])


def test_folder_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    write_folder(tmp_path / "all")
    of = build(tmp_path, "folder:all")
    first = sources.read(of.data.source, of)[1]
    assert sources.read(of.data.source, of)[1] == first
    (tmp_path / "all" / "class 0" / "00.png").rename(tmp_path / "all" / "class 0" / "0.png")
    assert sources.read(of.data.source, of)[1] != first
    with pytest.raises(DataError, match="is not the expected file"):
        load(build(tmp_path, {"uri": "folder:all", "sha256": first}))


def test_folder_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load(build(tmp_path, "folder:empty"))
    with pytest.raises(DataError, match="is not a folder"):
        load(build(tmp_path, "folder:contract.yaml"))


# CIFAR-10


def cifar_batch(first: int) -> bytes:
    """Ten records; all of the red plane of record i is `first + i`, green 1, blue 2."""
    plane = np.ones((10, 1024), dtype=np.uint8)
    red = plane * (first + np.arange(10, dtype=np.uint8))[:, None]
    labels = np.arange(10, dtype=np.uint8)[:, None]
    return np.hstack([labels, red, plane, 2 * plane]).tobytes()


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_batch(10 * i))
    (folder / "test_batch.bin").write_bytes(cifar_batch(100))
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (folder / "batches.meta.txt").write_text(names.replace(" ", "\n") + "\n\n")


def test_cifar10(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c" / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "c" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    for where in ("c", "c/cifar-10-batches-bin", "c.tar.gz"):
        of = build(tmp_path, f"cifar10:{where}", test=f"cifar10:{where}")
        frame = load(of)
        assert len(frame) == 50
        assert frame["label"].tolist()[:3] == ["airplane", "automobile", "bird"]
        assert frame[IMAGE][11].shape == (32, 32, 3)
        assert frame[IMAGE][11][5, 6].tolist() == [21, 1, 2]
        assert of.data.test is not None
        test = sources.load(of.data.test, of)
        assert test[IMAGE][0][0, 0, 0] == 100
        assert test[ORIGIN][9] == "test_batch.bin, image 9"
    one = load(build(tmp_path, "cifar10:c/cifar-10-batches-bin/data_batch_2.bin"))
    assert one[IMAGE][0][0, 0, 0] == 20


def test_cifar10_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cifar(folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        load(build(tmp_path, "cifar10:c"))
    (folder / "data_batch_3.bin").write_bytes(cifar_batch(1)[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin is cut off"):
        load(build(tmp_path, "cifar10:c"))
    (tmp_path / "c.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a whole tar archive"):
        load(build(tmp_path, "cifar10:c.tar.gz"))


# Tables, and what comes with scikit-learn


def test_a_csv_of_paths(tmp_path: Path) -> None:
    write_folder(tmp_path / "t" / "all")
    lines = ["photo,label,shop", "all/class 0/00.png,a,1", "gone.png,b,2", ",a,3", "all,a,4"]
    (tmp_path / "t" / "rows.csv").write_text("\n".join(lines))
    image = {"size": [9, 7], "channels": 1, "column": "photo"}
    of = build(tmp_path, "file:t/rows.csv", image=image)
    frame = load(of)
    assert "photo" not in frame
    assert frame["shop"].tolist() == ["1", "2", "3", "4"]
    assert frame[ORIGIN].tolist() == ["all/class 0/00.png", "gone.png", "rows.csv, row 2", "all"]
    assert of.data.image is not None
    pixels, found, reasons = open_all(frame[IMAGE].to_list(), of.data.image)
    assert reasons.tolist() == ["", "no such file", "missing", "file cannot be read"]
    np.testing.assert_array_equal(pixels[0, 0], PICTURES[0])
    assert np.isnan(found["brightness"]).tolist() == [False, True, True, True]
    with pytest.raises(DataError, match="lacks the column 'image'"):
        load(build(tmp_path, "file:t/rows.csv"))


def test_a_parquet_of_bytes(tmp_path: Path) -> None:
    content = [images.array_to_png(p) for p in PICTURES[:3]]
    table = pd.DataFrame({"image": content, "label": ["a", "b", "a"]})
    table.to_parquet(tmp_path / "rows.parquet")
    frame = load(build(tmp_path, "file:rows.parquet"))
    assert frame[IMAGE].tolist() == content
    assert frame[ORIGIN][2] == "rows.parquet, row 2"
    # As data sets of Hugging Face hold them.
    structs = pd.Series([{"bytes": c, "path": None} for c in content])
    table.assign(image=structs).to_parquet(tmp_path / "rows.parquet")
    assert load(build(tmp_path, "file:rows.parquet"))[IMAGE].tolist() == content


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    of = build(tmp_path, "sklearn:digits")
    assert of.data.image is not None
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(images.ImageError, match="too many bytes"):
        open_image(tmp_path / "huge.png", of.data.image)
    assert encoded(tmp_path / "huge.png", of.data.image) is None


def test_digits(tmp_path: Path) -> None:
    frame = load(build(tmp_path, "sklearn:digits"))
    assert len(frame) == 1797
    pixels = np.stack(frame[IMAGE].to_list())
    assert pixels.shape == (1797, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert sorted(frame["label"].unique()) == list(range(10))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sklearn:iris", "sklearn:iris has no images; sklearn:digits has"),
        ("sim:payments", "sim: is no source of images"),
        ("fodler:x", "fodler: is no source of images; did you mean 'folder'"),
        ("openml:1590", "openml: is no source of images"),
    ],
)
def test_sources_that_hold_no_images(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(build(tmp_path, source))


@pytest.mark.parametrize("source", ["idx:x", "folder:x", "cifar10:x"])
def test_sources_of_images_are_not_for_tables(tiny: Contract, source: str) -> None:
    with pytest.raises(DataError, match="holds images; did you mean task: image-classification"):
        sources.load(contract.Source(uri=source), tiny)


# Simulated streams


def simulated(folder: Path, **simulate: Any) -> pd.DataFrame:
    return load(build(folder, "sklearn:digits", simulate=simulate))


def pixels_of(frame: pd.DataFrame) -> list[np.ndarray]:
    digits = contract.Image(size=(8, 8), channels=1)
    return [open_image(content, digits).pixels[0] for content in frame[IMAGE]]


def test_a_stream_has_a_fixed_random_order_and_times(tmp_path: Path) -> None:
    one = simulated(tmp_path, seed=1, step="90s", start="2026-02-01T00:00:00Z")
    plain = load(build(tmp_path, "sklearn:digits"))
    assert sorted(one["row"], key=int) == [str(i) for i in range(1797)]
    assert one["row"].tolist() != [str(i) for i in range(1797)]
    assert one["at"][2] == pd.Timestamp("2026-02-01T00:03:00Z")
    for i in (0, 7, 1796):  # the row names the image in the source
        np.testing.assert_array_equal(one[IMAGE][i], plain[IMAGE][int(one["row"][i])])
        assert one["label"][i] == plain["label"][int(one["row"][i])]
    pd.testing.assert_series_equal(one["row"], simulated(tmp_path, seed=1)["row"])
    assert one["row"].tolist() != simulated(tmp_path, seed=2)["row"].tolist()


def test_the_world_changes_at_the_onset(tmp_path: Path) -> None:
    before = simulated(tmp_path, rows=60)
    kinds = {"noise": 2, "rotation": 1}
    after = simulated(tmp_path, rows=60, onset=40, corruptions=kinds)
    pd.testing.assert_frame_equal(before.drop(columns=IMAGE), after.drop(columns=IMAGE))
    old, new = pixels_of(before), pixels_of(after)
    for i in range(60):
        assert (old[i] == new[i]).all() == (i < 40)
    # A row's noise is its own, whatever is read with it.
    assert len({content.seed for content in after[IMAGE][40:]}) == 20
    again = pixels_of(simulated(tmp_path, rows=50, onset=40, corruptions=kinds))
    np.testing.assert_array_equal(np.stack(again), np.stack(new[:50]))


def test_corrupted_files_are_corrupted_at_their_own_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "all")
    of = build(tmp_path, "folder:all", simulate={"onset": 0, "corruptions": {"contrast": 2}})
    image = contract.Image(size=(4, 4), channels=1)
    content = load(of)[IMAGE][0]
    assert isinstance(content, Corrupted)
    assert content.array(image).shape == (9, 7)
    decoded = open_image(content, image)
    assert (decoded.width, decoded.height) == (7, 9)
    sent = encoded(content, image)
    assert sent is not None
    np.testing.assert_array_equal(images.decode(sent, image).pixels, decoded.pixels)
    (tmp_path / "all" / "class 0" / "00.png").write_bytes(b"broken")
    broken = load(of)
    _, _, reasons = open_all(broken[IMAGE].to_list(), image)
    assert reasons[broken[ORIGIN] == "class 0/00.png"].tolist() == ["not an image"]


def test_new_labels_come_after_the_onset(tmp_path: Path) -> None:
    frame = simulated(tmp_path, onset=900, new_labels=["3", "8"])
    assert not frame["label"][:900].isin([3, 8]).any()
    # From there on they are as frequent as in the whole set, also right after the onset.
    new = frame["label"][900:].isin([3, 8])
    assert 0.15 < new.mean() < 0.25
    assert 0.1 < new[:200].mean() < 0.3
    never = simulated(tmp_path, new_labels=["3"])
    assert 3 not in set(never["label"])
    assert len(never) == 1797 - 183
    with pytest.raises(DataError, match="has no label 'three'"):
        simulated(tmp_path, new_labels=["three"])


def test_simulate_leaves_the_test_set_as_it_is(tmp_path: Path) -> None:
    write_idx(tmp_path)
    source = "idx:train-images-idx3-ubyte"
    simulate = {"onset": 0, "rows": 5, "corruptions": {"blur": 3}}
    of = build(tmp_path, source, test=source, simulate=simulate, id="row", time="at")
    assert of.data.test is not None
    assert len(load(of)) == 5
    test = sources.load(of.data.test, of)
    np.testing.assert_array_equal(np.stack(test[IMAGE].to_list()), PICTURES)
    assert test["row"].tolist()[:2] == ["test-0", "test-1"]


def test_simulate_does_not_replace_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,label,at\na.png,x,2026-01-01\n")
    with pytest.raises(DataError, match=r"has a column 'at', which data\.simulate"):
        load(build(tmp_path, "file:rows.csv", simulate={}))


def test_a_stream_carries_what_a_client_would_send(tmp_path: Path) -> None:
    simulate = {"rows": 100, "onset": 60, "corruptions": {"blur": 2}}
    until = "2026-01-01T00:30:00Z"
    of = build(
        tmp_path,
        "sklearn:digits",
        image={"size": 8, "channels": 1},
        simulate=simulate,
        id="row",
        time={"columns": "at", "until": until},
    )
    rows = sources.stream(of)
    assert len(rows) == 70
    assert of.data.image is not None
    for sent, canonical in zip(rows[ORIGINAL], rows[IMAGE], strict=True):
        np.testing.assert_array_equal(images.decode(sent, of.data.image).pixels, canonical)
    write_folder(tmp_path / "all")
    files = sources.stream(build(tmp_path, "folder:all", id="path"))
    assert files[ORIGINAL][0] == (tmp_path / "all" / files["_id"][0]).read_bytes()


@pytest.mark.parametrize("memory", [0, 2**30])
def test_open_all_is_open_image_of_each(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than a block, of many shapes, one of them broken; in memory and in a file."""
    monkeypatch.setattr(vision_sources, "_MEMORY", memory)
    image = contract.Image(size=(160, 160), channels=3)
    contents: list[Any] = [
        RNG.integers(0, 256, (int(h), int(w)), dtype=np.uint8)
        for h, w in RNG.integers(8, 40, (40, 2))
    ]
    contents[17] = b"\x89PNG\r\n\x1a\n" + b"\0" * 30
    pixels, found, reasons = open_all(contents, image)
    assert isinstance(pixels.base, np.memmap) == (memory == 0)
    assert [i for i, r in enumerate(reasons) if r] == [17]
    for i in (0, 16, 18, 39):
        decoded = open_image(contents[i], image)
        np.testing.assert_array_equal(pixels[i], decoded.pixels)
        assert (found["width"][i], found["height"][i]) == (decoded.width, decoded.height)
    assert all(np.isnan(values[17]) for values in found.values())


def test_open_all_of_nothing() -> None:
    pixels, found, reasons = open_all([], contract.Image(size=(8, 8)))
    assert pixels.shape == (0, 3, 8, 8)
    assert len(found["blue"]) == len(reasons) == 0


def test_an_archive_may_hold_other_members(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "c", "c")
        member = tarfile.TarInfo("../readme.html")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert len(load(build(tmp_path, "cifar10:c.tar.gz"))) == 50
