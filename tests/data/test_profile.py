"""The profile: what it says of columns, and the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from driftmill.contract import Contract, parse
from driftmill.data import profile
from tests.conftest import CONTRACT, tiny_frame


def column(found: dict[str, list[dict[str, object]]], name: str) -> dict[str, object]:
    return next(c for c in found["columns"] if c["name"] == name)


def test_columns_are_described(tiny: Contract) -> None:
    train, test = tiny_frame(1000), tiny_frame(200, seed=1)
    found = profile.describe(tiny, train, test)
    amount, channel = column(found, "amount"), column(found, "channel")
    assert amount["mean"] == pytest.approx(train["amount"].mean())
    assert amount["median"] == pytest.approx(train["amount"].median())
    assert sum(amount["histogram"]["counts"]) == 1000  # type: ignore[index]
    assert amount["correlation"] > 0.7  # type: ignore[operator]
    assert column(found, "age")["missing"] == train["age"].isna().sum()
    assert channel["top"] == train["channel"].value_counts().to_dict()
    assert channel["alone"] < 0.2  # type: ignore[operator]
    assert found["target"]["labels"] == train["fraud"].value_counts().to_dict()
    assert found["suspected_leaks"] == found["constant"] == []


def test_leaks_constants_and_repeats_are_found(tiny: Contract) -> None:
    train = tiny_frame(1000)
    train["channel"] = np.where(train["fraud"] == "yes", "web", "app")
    train["age"] = 40.0
    train = pd.concat([train, train.head(7)], ignore_index=True)
    found = profile.describe(tiny, train, train.head(3))
    assert found["suspected_leaks"] == ["channel"]
    assert found["constant"] == ["age"]
    assert found["duplicates"] == 7
    assert found["test_rows_in_train"] == 3


def test_an_id_like_category_is_no_leak(tiny: Contract) -> None:
    train = tiny_frame(400).assign(channel=[f"c{i}" for i in range(400)])
    assert profile.describe(tiny, train, train)["suspected_leaks"] == []


def test_a_leak_of_a_number_is_found() -> None:
    text = CONTRACT.replace("classification", "regression").replace(
        '{name: fraud, labels: ["no", "yes"]}', "due"
    )
    train = tiny_frame(2000)
    train["due"] = train["amount"] * 3
    found = profile.describe(parse(text), train, train.head(5))
    assert found["suspected_leaks"] == ["amount"]
    assert found["target"]["labels"] is None


def test_columns_without_values_or_with_one_row(tiny: Contract) -> None:
    train = tiny_frame(30).assign(age=np.nan)
    assert column(profile.describe(tiny, train, train), "age")["count"] == 0
    assert profile.describe(tiny, train.head(1), train.head(1))["train_rows"] == 1


class Outside(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_page_stands_alone_and_escapes(tiny: Contract, tmp_path: Path) -> None:
    train = tiny_frame(300)
    train.loc[0, "channel"] = "<script>alert(1)</script>"
    found = profile.write(tmp_path, tiny, train, train.head(9))
    assert json.loads((tmp_path / "profile.json").read_text()) == found
    page = (tmp_path / "profile.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.links == []
    assert "script" not in parser.tags
    assert parser.tags.count("svg") == 4
    assert "&lt;script&gt;" in page
