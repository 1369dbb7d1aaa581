"""Images on their way through validation, split, fingerprint, prepare and profile."""

from __future__ import annotations

import base64
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftmill import contract, features
from driftmill.contract import Contract
from driftmill.data import prepare, profile, schema, sources, split
from driftmill.data.schema import QuarantineError
from driftmill.features import EMBEDDING, ID, IMAGE, TIME
from driftmill.store import Store
from driftmill.vision import images
from tests.data.test_prepare import accounted
from tests.vision.pictures import LABELS, PICTURES, build, write_folder

LABEL_NAMES = [f"class {n}" for n in range(3)]
EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = [
    "dataset.json",
    "profile.html",
    "profile.json",
    "quarantine.parquet",
    "test-images.npy",
    "test.parquet",
    "train-images.npy",
    "train.parquet",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of thirty images in three classes."""
    write_folder(tmp_path / "all")
    return tmp_path


def with_bad_files(folder: Path) -> Contract:
    root = folder / "all" / "class 1"
    (root / "text.png").write_text("no image")
    (root / "nothing.png").write_bytes(b"")
    whole = (root / "01.png") if (root / "01.png").exists() else root / "deeper" / "01.png"
    (root / "half.png").write_bytes(whole.read_bytes()[:-30])
    frames = [PIL.Image.fromarray(p) for p in PICTURES[:2]]
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:])
    PIL.Image.new("CMYK", (7, 9)).save(root / "print.jpg")
    (folder / "all" / "class 9").mkdir()
    (folder / "all" / "class 9" / "x.png").write_bytes(images.array_to_png(PICTURES[0]))
    return build(
        folder,
        "folder:all",
        id="path",
        target={"name": "label", "labels": LABEL_NAMES},
        quarantine={"max_fraction": 0.5},
    )


REASONS = {
    "image: not an image": 1,
    "image: empty": 1,
    "image: cannot be decoded": 1,
    "image: animated": 1,
    "image: cmyk": 1,
    "label: not one of the labels": 1,
}


def test_good_images_are_measured_and_bad_ones_quarantined(folder: Path) -> None:
    of = with_bad_files(folder)
    raw = sources.load(of.data.source, of)
    found = schema.validate(raw, of, origin="source")
    assert schema.count_reasons([found.quarantine]) == REASONS
    assert set(found.quarantine) == {"_source", "label", "path", "_reason"}
    assert "class 1/half.png" in set(found.quarantine["_source"])

    valid = found.valid
    assert list(valid) == [*(c.name for c in of.data.columns), "label", IMAGE, ID]
    assert len(valid) == 30
    pixels = np.stack(valid[IMAGE].to_list())
    assert pixels.shape == (30, 1, 9, 7)
    order = [int(Path(i).stem) for i in valid[ID]]
    np.testing.assert_array_equal(pixels[:, 0], PICTURES[order])
    measured = images.statistics(pixels, np.tile([7, 9], (30, 1)))
    for name, values in measured.items():
        assert valid[name].dtype == np.float64
        np.testing.assert_array_equal(valid[name].astype(np.float32), values)


def test_a_table_may_have_columns_named_as_statistics(folder: Path) -> None:
    (folder / "rows.csv").write_text("image,label,width\nall/class 0/00.png,a,12\ngone.png,b,13\n")
    of = build(folder, "file:rows.csv")
    found = schema.validate(sources.load(of.data.source, of), of)
    assert found.valid["width"].tolist() == [7]
    assert found.quarantine["width"].tolist() == ["13"]


def logged(n: int, **more: Any) -> pd.DataFrame:
    """Rows as the inference log has them, of images that came as 70 by 90."""
    pixels = PICTURES[:n, None]
    measured = images.statistics(pixels, np.tile([70, 90], (n, 1)))
    return pd.DataFrame(
        {name: values.astype(np.float64) for name, values in measured.items()}
        | {"label": [LABEL_NAMES[k] for k in LABELS[:n]], ID: [f"l{i}" for i in range(n)]}
        | {IMAGE: [images.to_png(p) for p in pixels]}
        | more
    )


def test_rows_of_the_log_keep_the_size_that_they_came_in(folder: Path) -> None:
    # The file's limits are not for what the model has seen already.
    of = build(folder, "folder:all", image={"size": [9, 7], "channels": 1, "formats": ["jpeg"]})
    rows = logged(5)
    found = schema.validate(rows, of, logged=True)
    assert found.quarantine.empty
    np.testing.assert_array_equal(np.stack(found.valid[IMAGE].to_list())[:, 0], PICTURES[:5])
    for column in of.data.columns:
        np.testing.assert_allclose(found.valid[column.name], rows[column.name], rtol=1e-6)
    assert found.valid["width"].tolist() == [70.0] * 5

    damaged = rows.assign(**{IMAGE: [b"x", *rows[IMAGE][1:]]})
    found = schema.validate(damaged, of, logged=True)
    assert found.quarantine["_reason"].tolist() == ["image: not an image"]
    assert IMAGE not in found.quarantine

    # The contract has changed since: the model sees larger images now.
    larger = build(folder, "folder:all", image={"size": 12, "channels": 3})
    names = [c.name for c in larger.data.columns]
    found = schema.validate(rows.reindex(columns=[*names, "label", ID, IMAGE]), larger, logged=True)
    assert found.valid[IMAGE][0].shape == (3, 12, 12)
    assert found.valid["saturation"].tolist() == [0.0] * 5
    assert found.valid["height"].tolist() == [90.0] * 5


def test_the_fingerprint_sees_pixels_and_no_order(folder: Path) -> None:
    of = build(folder, "folder:all")
    valid = schema.validate(sources.load(of.data.source, of), of).valid
    print_ = split.fingerprint(valid)
    assert split.fingerprint(valid.sample(frac=1, random_state=1)) == print_
    changed = valid.copy()
    # Two pixels change places: brightness and the like stay as they are.
    changed.at[3, IMAGE] = valid[IMAGE][3][:, ::-1].copy()
    assert split.fingerprint(changed) != print_
    assert split.fingerprint(valid) == print_


def test_prepare_and_read(folder: Path) -> None:
    of = with_bad_files(folder)
    info = prepare.prepare(of, folder / "out")
    assert sorted(p.name for p in (folder / "out").iterdir()) == FILES
    assert (info.read_rows, info.rows, info.quarantined) == (36, 30, 6)
    assert info.reasons == REASONS
    assert accounted(info)
    found = prepare.read(folder / "out")
    assert found.info == info
    for name, part in (("train", found.train), ("test", found.test)):
        table = pq.read_table(folder / "out" / f"{name}.parquet")
        assert IMAGE not in table.column_names
        order = [int(Path(i).stem) for i in part[ID]]
        sign = features.signature(of, found.train)
        np.testing.assert_array_equal(features.arrays(part, sign)[0][:, 0], PICTURES[order])
        stored = np.load(folder / "out" / f"{name}-images.npy", mmap_mode="r")
        np.testing.assert_array_equal(stored[:, 0], PICTURES[order])
    assert split.fingerprint(found.test) == info.test_fingerprint
    # Images are not in memory before they are looked at.
    base = found.train[IMAGE][0]
    while not isinstance(base, np.memmap):
        base = base.base
    assert not base.flags.writeable


def test_the_quarantine_never_holds_an_image(tmp_path: Path) -> None:
    secret = b"secret pixels"
    table = pd.DataFrame(
        {
            "image": [secret, *(images.array_to_png(p) for p in PICTURES[:29])],
            "thumb": [secret] * 30,
            "label": [None if i == 7 else f"l{i % 2}" for i in range(30)],
        }
    )
    table.to_parquet(tmp_path / "rows.parquet")
    of = build(tmp_path, "file:rows.parquet", quarantine={"max_fraction": 0.1})
    info = prepare.prepare(of, tmp_path / "out")
    assert info.reasons == {"image: not an image": 1, "label: missing label": 1}
    path = tmp_path / "out" / "quarantine.parquet"
    assert secret not in path.read_bytes()
    rows = pd.read_parquet(path)
    assert rows["_source"].tolist() == ["rows.parquet, row 0", "rows.parquet, row 7"]
    assert rows["thumb"].tolist() == ["13 bytes"] * 2
    assert "image" not in rows


def test_too_many_bad_images_stop_the_run(folder: Path) -> None:
    with_bad_files(folder)
    of = build(folder, "folder:all", id="path", quarantine={"max_fraction": 0.1})
    with pytest.raises(QuarantineError, match="image: animated") as error:
        prepare.prepare(of, folder / "out")
    assert sum(error.value.reasons.values()) == 5
    assert len(pd.read_parquet(folder / "out" / "quarantine.parquet")) == 5
    assert not (folder / "out" / "dataset.json").exists()


def write_log(store: Store, rows: pd.DataFrame) -> None:
    """A segment of predictions and one of their labels."""
    n, at = len(rows), datetime(2026, 2, 1, tzinfo=UTC)
    ids = [f"p{i}" for i in range(n)]
    predictions = rows.drop(columns="label").assign(
        _prediction_id=ids,
        _at=[pd.Timestamp(at) + pd.Timedelta(seconds=i) for i in range(n)],
        _time=pd.Series([None] * n, dtype="datetime64[us, UTC]"),
        _role="champion",
        **{EMBEDDING: [b"\0\0"] * n},
    )
    labels = pd.DataFrame({"_prediction_id": ids, "_at": pd.Timestamp(at), "_label": rows["label"]})
    for kind, table in (("predictions", predictions), ("labels", labels)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), sink)
        key = f"tiny/log/{kind}/{at:%Y%m%d}/{at:%H%M%S%f}-w-1.parquet"
        store.write(key, sink.getvalue().to_pybytes())


def test_labelled_images_of_the_log_are_learnt_from(folder: Path, store: Store) -> None:
    rows = logged(8)
    rows.loc[2:3, IMAGE] = None
    write_log(store, rows)
    of = build(folder, "folder:all", id="path")
    info = prepare.prepare(of, folder / "out", store)
    assert (info.history_rows, info.logged_rows, info.imageless_rows) == (30, 6, 2)
    assert info.read_rows == info.rows + 2
    assert accounted(info)
    found = prepare.read(folder / "out")
    both = pd.concat([found.train, found.test]).set_index(ID)
    np.testing.assert_array_equal(both[IMAGE]["l5"][0], PICTURES[5])
    assert both["width"]["l5"] == 70
    assert "l2" not in both.index


def test_a_log_without_images_leaves_the_history(folder: Path, store: Store) -> None:
    write_log(store, logged(8).assign(**{IMAGE: None}))
    info = prepare.prepare(build(folder, "folder:all"), folder / "out", store)
    assert (info.rows, info.logged_rows, info.imageless_rows) == (30, 0, 8)
    assert accounted(info)


def test_the_profile_shows_images_and_finds_repeated_ones(folder: Path) -> None:
    of = build(folder, "folder:all", id="path")
    for i in range(20):  # the same image again and again
        (folder / "all" / "class 0" / f"again-{i}.png").write_bytes(
            images.array_to_png(PICTURES[0])
        )
    prepare.prepare(of, folder / "out")
    train = prepare.read(folder / "out").train
    page = (folder / "out" / "profile.html").read_text()
    strips = page.split("data:image/png;base64,")[1:]
    assert len(strips) == 3
    for label, strip in zip(LABEL_NAMES, strips, strict=True):
        content = base64.b64decode(strip.partition('"')[0])
        shown = np.asarray(PIL.Image.open(io.BytesIO(content)))
        of_label = train[train["label"] == label][IMAGE]
        assert shown.shape == (9, 7 * min(12, len(of_label)))
        np.testing.assert_array_equal(shown[:, :7], of_label.iloc[0][0])
    found = profile.describe(of, train, prepare.read(folder / "out").test)
    same = sum((i == PICTURES[0]).all() for i in train[IMAGE])
    assert found["duplicates"] == same - 1
    assert found["test_rows_in_train"] == 21 - same


def test_the_digits_example(tmp_path: Path) -> None:
    of = contract.load(EXAMPLES / "digits" / "contract.yaml")
    info = prepare.prepare(of, tmp_path / "out")
    assert (info.read_rows, info.quarantined) == (500, 0)
    assert prepare.read(tmp_path / "out").train[IMAGE][0].shape == (1, 8, 8)
    stream = sources.stream(of)
    assert len(stream) == 1297
    assert stream[TIME].is_monotonic_increasing


def test_the_fashion_mnist_example(data_folder: Path, tmp_path: Path) -> None:
    if not (data_folder / "fashion-mnist").is_dir():
        pytest.skip("DRIFTMILL_DATA has no fashion-mnist")
    of = contract.load(EXAMPLES / "fashion-mnist" / "contract.yaml")
    info = prepare.prepare(of, tmp_path / "out")
    assert (info.read_rows, info.quarantined) == (6000, 0)
    found = prepare.read(tmp_path / "out")
    assert "boot" not in set(found.train["label"])
    assert found.train["label"].nunique() == 9
