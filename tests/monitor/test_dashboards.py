"""The dashboards: well formed, nothing on top of anything, every query about one model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from itertools import combinations
from typing import Any, get_args, get_type_hints

import pytest

from driftmill.monitor import dashboards, rules

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
    assert variable(page, "model")["current"]["value"] == "payments"
    assert "current" not in variable(dashboards.model(), "model")


def test_every_query_says_which_namespaces(page: dict[str, Any]) -> None:
    everything = variable(page, "namespace")
    assert everything["multi"]
    assert everything["allValue"] == ".*"
    for query in dashboards.queries(page, "payments", namespace="shop|bank"):
        asked = re.findall(r"(?:model|retrain|evidently|ALERTS)[\w:]*\{(.*?)\}", query)
        assert asked
        assert all('namespace=~"shop|bank"' in selectors for selectors in asked), query


def variable(page: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [v for v in page["templating"]["list"] if v["name"] == name]
    return dict(found)


def test_links_lead_to_pages_that_there_are() -> None:
    made = json.dumps(list(PAGES.values()))
    pages = {page["uid"] for page in PAGES.values()}
    linked = re.findall(r'"url": "([^"]*)"', made)
    assert {u.removeprefix("/d/").partition("?")[0] for u in linked if u.startswith("/d/")} == pages
    runbooks = [u for u in linked if u.startswith(rules.RUNBOOKS)]
    assert f"{rules.RUNBOOKS}/${{__value.raw}}.md" in runbooks
    # The chart makes an uid for each release of what all of them begin with.
    assert all(uid.startswith("driftmill-model") for uid in pages)


def test_the_files_are_the_two_pages_for_any_model() -> None:
    found = {name: json.loads(text) for name, text in dashboards.files().items()}
    assert found == {
        "dashboard.json": dashboards.model(),
        "dashboard-models.json": dashboards.overview(),
    }


def test_grafanas_own_types_know_every_key_and_value(page: dict[str, Any]) -> None:
    """Read and written again by Grafana's Foundation SDK, a misspelt option is gone."""
    assert list(unknown(page)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("colorMode", "colourMode"),
        ("fillOpacity", "opacity"),
        ("schemaVersion", "schema"),
        ('"showValue": "never"', '"showValue": "nevr"'),
    ],
)
def test_the_types_notice_what_is_misspelt(old: str, new: str) -> None:
    text = json.dumps(PAGES["model"])
    assert old in text
    assert list(unknown(json.loads(text.replace(old, new)))) != []


def unknown(page: dict[str, Any]) -> Iterator[str]:
    """Where a page has a key or a value that Grafana's types have not."""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    read = pytest.importorskip("grafana_foundation_sdk.models.dashboard").Dashboard.from_json
    plugins.register_default_plugins()
    # Of a mark these belong to the data source, not to the dashboard.
    marks = [
        {k: v for k, v in mark.items() if k not in ("step", "titleFormat")}
        for mark in page["annotations"]["list"]
    ]
    page = {**page, "annotations": {"list": marks}}
    known = read(page)
    yield from _lost(page, json.loads(json.dumps(known, cls=encoder)), "")
    yield from _no_member(known, "")


def _lost(given: Any, kept: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from _lost(value, kept.get(key), f"{where}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, value in enumerate(given):
            yield from _lost(value, kept[i], f"{where}[{i}]")
    elif given != kept:
        yield f"{where}: {given!r}, kept {kept!r}"


def _no_member(read: Any, where: str) -> Iterator[str]:
    """The SDK takes any value for an enumeration's."""
    if isinstance(read, list):
        for i, value in enumerate(read):
            yield from _no_member(value, f"{where}[{i}]")
    if not hasattr(read, "from_json"):
        return
    for name, hint in get_type_hints(type(read)).items():
        value = getattr(read, name)
        for kind in (hint, *get_args(hint)):
            members = set(kind) if isinstance(kind, type) and issubclass(kind, Enum) else None
            if members and value is not None and value not in {m.value for m in members}:
                yield f"{where}.{name}: {value!r}"
        yield from _no_member(value, f"{where}.{name}")
