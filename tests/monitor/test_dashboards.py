"""The dashboards: well formed, nothing on top of anything, every query about one model."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from driftmill.monitor import dashboards

PAGES = {"overview": dashboards.overview(), "model": dashboards.model("payments")}


@pytest.fixture(params=sorted(PAGES))
def page(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PAGES[request.param]


def test_it_is_json_and_the_same_each_time(page: dict[str, Any]) -> None:
    again = {p["uid"]: p for p in (dashboards.overview(), dashboards.model("payments"))}
    assert json.loads(json.dumps(page, allow_nan=False)) == again[page["uid"]]


def test_panels_have_a_place_of_their_own(page: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in page["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        for g in (panel["gridPos"] for panel in page["panels"])
    ]
    assert all(not a & b for a, b in combinations(cells, 2))
    assert all(x < 24 for cell in cells for x, _ in cell)


def test_every_panel_asks_something_and_names_its_source(page: dict[str, Any]) -> None:
    for panel in page["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        references = [t["refId"] for t in panel["targets"]]
        assert len(set(references)) == len(references)
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}


def test_the_page_of_a_model_asks_about_no_other() -> None:
    page = dashboards.model("payments")
    for query in dashboards.queries(page, "payments"):
        assert 'model="payments"' in query
        assert "$" not in query
    (variable,) = [v for v in page["templating"]["list"] if v["name"] == "model"]
    assert variable["current"]["value"] == "payments"
    assert "current" not in dashboards.model()["templating"]["list"][1]
