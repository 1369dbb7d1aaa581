"""Tests of drafting a contract from a data file."""

from __future__ import annotations

import gzip
import string
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftmill import contract, init
from driftmill.contract import Contract
from driftmill.data import schema, sources
from driftmill.vision import images
from tests.vision.pictures import PICTURES, write_folder


def check(path: Path, **settings: Any) -> Contract:
    """Draft a contract, read it back from a file, and let every row of the data pass it."""
    draft = init.draft(path, folder=path.parent, **settings)
    written = path.parent / "contract.yaml"
    written.write_text(draft.text, encoding="utf-8")
    document = contract.load(written)
    raw = sources.load(document.data.source, document)
    checked = schema.validate(raw, document)
    missing_label = raw[document.data.target.name].isna().sum()
    assert len(checked.quarantine) == missing_label, schema.count_reasons([checked.quarantine])
    return document


def write(path: Path, frame: pd.DataFrame, **settings: Any) -> Path:
    frame.to_csv(path, index=False, **settings)
    return path


def column(document: Contract, name: str) -> contract.Column:
    return next(c for c in document.data.columns if c.name == name)


def mixed(rows: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "customer_id": [f"c-{i}" for i in range(rows)],
            "when": pd.date_range("2024-01-01", periods=rows, freq="h").astype(str),
            "amount": rng.normal(100, 20, rows).round(2),
            "age": np.where(
                rng.random(rows) < 0.1, np.array(None), rng.integers(18, 90, rows).astype(str)
            ),
            "city": rng.choice(["Zürich", "São Paulo", "北京", "a: b", "x, y", "no"], rows),
            "vip": rng.choice(["True", "False"], rows),
            "constant": "same",
            "note": [f"free text number {i}, all different" for i in range(rows)],
            "prix €": rng.random(rows),
            "churned": rng.integers(0, 2, rows),
        }
    )


def test_a_mixed_table(tmp_path: Path) -> None:
    path = write(tmp_path / "My Customers.csv", mixed())
    document = check(path, target="churned")
    assert document.model == "my-customers"
    assert document.task == "classification"
    assert document.data.target.labels == ("0", "1")
    assert document.data.id == "customer_id"
    assert document.data.time is not None
    assert document.data.time.columns == ("when",)
    assert {c.name: c.type for c in document.data.columns} == {
        "amount": "float",
        "age": "int",
        "city": "category",
        "vip": "bool",
    }
    assert column(document, "age").nullable
    assert not column(document, "amount").nullable
    assert set(column(document, "city").categories) == set(mixed()["city"])
    text = (tmp_path / "contract.yaml").read_text(encoding="utf-8")
    assert "# - constant: it is always same" in text
    assert "# - note: free text" in text
    assert "# - prix €: its name cannot be used" in text


def test_a_regression_with_a_skewed_target(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"size": rng.random(300), "price": rng.lognormal(10, 1, 300)})
    document = check(write(tmp_path / "houses.csv", frame))
    assert document.task == "regression"
    assert document.data.target.name == "price"
    assert document.metric.name == "rmse"
    assert "transform: log1p" in (tmp_path / "contract.yaml").read_text()


def test_rows_without_a_label_are_noted(tmp_path: Path) -> None:
    frame = mixed()
    frame["churned"] = frame["churned"].astype(object)
    frame.loc[:4, "churned"] = None
    path = write(tmp_path / "rows.csv", frame)
    check(path, target="churned")
    assert any("5 rows have no churned" in note for note in init.draft(path).notes)


def test_yes_is_the_second_label_and_words_of_yaml_stay_texts(tmp_path: Path) -> None:
    frame = mixed().assign(churned=np.where(np.arange(200) % 3, "yes", "no"))
    document = check(write(tmp_path / "rows.csv", frame), target="churned")
    assert document.data.target.labels == ("no", "yes")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators(tmp_path: Path, separator: str) -> None:
    document = check(write(tmp_path / "rows.csv", mixed(), sep=separator), target="churned")
    assert document.data.source.csv.separator == separator


def test_a_file_without_a_header_and_gzip(tmp_path: Path) -> None:
    lines = [f"{i}, {i / 7:.3f}, {'left' if i % 2 else 'right'}\n" for i in range(100)]
    path = tmp_path / "plain.data.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))
    document = check(path)
    assert document.data.source.csv.names == ("column1", "column2", "column3")
    assert document.data.id == "column1"
    assert document.data.target.name == "column3"


def test_a_header_with_a_number_is_still_a_header(tmp_path: Path) -> None:
    frame = pd.DataFrame({"2019": range(100, 160), "size": np.linspace(0, 1, 60)})
    document = check(write(tmp_path / "years.csv", frame), target="2019")
    assert document.data.source.csv.header


@pytest.mark.parametrize(
    ("times", "pattern"),
    [
        (["31.01.2024", "01.02.2024", "02.02.2024"], "%d.%m.%Y"),
        (["2024/01/31 10:00", "2024/02/01 11:30", "2024/02/02 12:00"], "%Y/%m/%d %H:%M"),
        (["2024-01-31T10:00:00Z", "2024-02-01T11:30:00Z", "2024-02-02T12:00:00Z"], None),
    ],
)
def test_dates(tmp_path: Path, times: list[str], pattern: str | None) -> None:
    frame = pd.DataFrame({"day": times * 20, "x": np.arange(60) / 7, "y": np.arange(60) % 2})
    document = check(write(tmp_path / "dates.csv", frame), target="y")
    assert document.data.time is not None
    assert document.data.time.columns == ("day",)
    assert document.data.time.format == pattern


def test_parquet_with_its_own_types(tmp_path: Path) -> None:
    frame = mixed().assign(when=pd.date_range("2024-01-01", periods=200, freq="h"))
    frame["age"] = pd.to_numeric(frame["age"])
    frame["vip"] = frame["vip"] == "True"
    path = tmp_path / "rows.parquet"
    frame.to_parquet(path)
    document = check(path, target="churned")
    assert {c.name: c.type for c in document.data.columns}["vip"] == "bool"
    assert document.data.time is not None


def test_a_small_file_gets_a_gate_that_can_be_passed(tmp_path: Path) -> None:
    document = check(write(tmp_path / "small.csv", mixed(100)), target="churned")
    assert document.gates.min_test_rows <= 20


@pytest.mark.parametrize(
    ("content", "target", "message"),
    [
        ("", None, "empty"),
        ("a,b\n", None, "0 rows"),
        ("a\n1\n2\n", None, "1 columns"),
        ("a,b\n1,2\n3,4\n", "c", "no column 'c'"),
        ("a,b\n1,x\n3,x\n", "b", "one value only"),
        ("a,a\n1,2\n2,3\n", "zz", "no column"),
    ],
)
def test_what_cannot_be_drafted_from(
    tmp_path: Path, content: str, target: str | None, message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(init.InitError, match=message):
        init.draft(path, target=target)


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(init.InitError, match="no such file"):
        init.draft(tmp_path / "nothing.csv")
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00a,b\n")
    with pytest.raises(init.InitError, match="not UTF-8"):
        init.draft(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(init.InitError, match="cannot be read as Parquet"):
        init.draft(tmp_path / "rows.parquet")


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_a_widened_range_holds_what_was_seen_and_keeps_its_sign(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    lower, upper = init.widen(low, high)
    assert lower <= low <= high <= upper
    assert lower >= 0 or low < 0
    assert upper <= 0 or high > 0


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12
).filter(lambda t: t.strip() == t and t.strip("\"'") == t)
cells = st.one_of(
    st.just(""),
    st.integers(-1000, 1000).map(str),
    st.floats(-1e6, 1e6, allow_nan=False).map(repr),
    st.sampled_from(["yes", "no", "NA", "x, y", "a: b", "# c", "- d", "{e}", "ü", "2024-05-01"]),
    st.text(string.printable.strip() + " éß中", max_size=6).map(str.strip),
)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_drafted_validates(tmp_path_factory: Any, data: st.DataObject) -> None:
    heads = data.draw(st.lists(names, min_size=2, max_size=5, unique_by=lambda n: n.strip()))
    rows = data.draw(
        st.lists(st.lists(cells, min_size=len(heads), max_size=len(heads)), min_size=5, max_size=15)
    )
    path = tmp_path_factory.mktemp("draft") / "rows.csv"
    pd.DataFrame(rows, columns=heads).to_csv(path, index=False)
    try:
        draft = init.draft(path, folder=path.parent)
    except init.InitError:
        return  # nothing to predict, or nothing to predict from
    assert contract.parse(draft.text) == draft.contract
    assert yaml.safe_load(draft.text)["model"] == "rows"


@pytest.mark.parametrize(
    ("file", "target", "task"),
    [
        ("penguins/penguins.csv", "species", "classification"),
        ("california-housing/housing.csv", "median_house_value", "regression"),
        ("bike-sharing/hour.csv", "cnt", "regression"),
        ("adult/adult.data", "column15", "classification"),
        ("credit-default/UCI_Credit_Card.csv", "Default", "classification"),
    ],
)
def test_real_data_sets(
    data_folder: Path, tmp_path: Path, file: str, target: str, task: str
) -> None:
    path = tmp_path / Path(file).name
    path.symlink_to(data_folder / file)
    document = check(path, target=target)
    assert document.task == task
    assert document.data.target.name == target


# Images


def test_a_folder_of_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "My Photos")
    document = check(tmp_path / "My Photos")
    assert document.model == "my-photos"
    assert document.task == "image-classification"
    assert document.data.target.labels == ("class 0", "class 1", "class 2")
    assert document.data.image is not None
    assert (document.data.image.size, document.data.image.channels) == ((9, 7), 1)
    assert document.data.id == "path"
    assert document.gates.min_test_rows == 10


def test_images_of_many_sizes_in_colour(tmp_path: Path) -> None:
    for i, side in enumerate((40, 60, 300)):
        folder = tmp_path / "all" / f"c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.effect_mandelbrot((side, side + i), (-2, -1, 1, 1), 50).convert("RGB")
        picture.putpixel((0, 0), (255, 0, 0))
        picture.save(folder / f"{i}.{'gif' if i == 0 else 'jpg'}")
    draft = init.draft(tmp_path / "all", target="kind", folder=tmp_path)
    image = draft.contract.data.image
    assert image is not None
    assert image.size == (60, 60)
    assert image.channels == 3
    assert "gif" in image.formats
    assert draft.contract.data.target.name == "kind"
    assert "# seen 40 to 302 pixels a side" in draft.text


def test_what_a_person_should_know_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "all")
    (tmp_path / "all" / "loose.png").write_bytes(images.array_to_png(PICTURES[0]))
    (tmp_path / "all" / "class 1" / "notes.txt").write_text("no image")
    (tmp_path / "all" / "class 1" / "empty.png").touch()
    (tmp_path / "all" / ".git").mkdir()
    (tmp_path / "all" / ".git" / "x").touch()
    notes = init.draft(tmp_path / "all", folder=tmp_path).notes
    assert "1 files lie in no sub-folder and have no label" in notes
    assert any("2 of 33 files" in n and "not an image (1), empty (1)" in n for n in notes)
    assert "3 labels; the rarest is class 0 with 10 files" in notes


def test_folders_that_no_contract_can_be_drafted_from(tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "a" / "x.png").write_bytes(images.array_to_png(PICTURES[0]))
    with pytest.raises(init.InitError, match="files in 1 sub-folders; a contract needs two"):
        init.draft(tmp_path / "one")
    for label in "ab":
        (tmp_path / "text" / label).mkdir(parents=True)
        (tmp_path / "text" / label / "x.txt").write_text("x")
    with pytest.raises(init.InitError, match=r"none of 2 files can be used: not an image \(2\)"):
        init.draft(tmp_path / "text")
