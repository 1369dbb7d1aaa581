"""Grafana's pages: what the chart passes on is what `driftmill.monitor.dashboards` makes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from driftmill.monitor import dashboards
from tests.helm.chart import NAME, NAMESPACE, RELEASE, Object, of, render


def pages(release: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, dict[str, Any]]:
    """The pages by the names of their files."""
    found: dict[str, dict[str, Any]] = {}
    for config in _maps(render(release=release, namespace=namespace)):
        for name, text in config["data"].items():
            assert name == f"{config['metadata']['name']}.json"
            found[name] = json.loads(text)
    return found


def _maps(objects: tuple[Object, ...]) -> list[Object]:
    maps = of(objects, "ConfigMap").values()
    return [m for m in maps if "grafana_dashboard" in m["metadata"]["labels"]]


def test_every_page_is_there_and_unchanged_but_for_uid_and_title() -> None:
    made = {f"{NAMESPACE}-{NAME}-{n}": json.loads(t) for n, t in dashboards.files().items()}
    assert made
    found = pages()
    assert set(found) == set(made)
    for name, page in found.items():
        uid = page["uid"]
        assert uid.endswith(made[name]["uid"].removeprefix("driftmill-"))
        own = json.dumps(page).replace(uid.rpartition("-")[0], "driftmill")
        own = own.replace(f" ({NAMESPACE}/{NAME})", "")
        assert json.loads(own) == made[name]


@pytest.mark.parametrize("other", [{"release": "second"}, {"namespace": "elsewhere"}])
def test_two_releases_share_a_grafana(other: dict[str, str]) -> None:
    ours, theirs = pages(), pages(**other)
    assert not ours.keys() & theirs.keys()
    for key in ("uid", "title"):
        values = [page[key] for page in (*ours.values(), *theirs.values())]
        assert len(set(values)) == len(values)


def test_uids_are_as_short_as_grafana_asks() -> None:
    assert all(len(page["uid"]) <= 40 for page in pages(release="r" * 53).values())


def test_pages_link_to_pages_of_the_same_release() -> None:
    found = pages()
    uids = {page["uid"] for page in found.values()}
    text = json.dumps(found)
    links = {part.partition('"')[0].partition("?")[0] for part in text.split("/d/")[1:]}
    assert links
    assert {link.partition("/")[0] for link in links} <= uids


def test_pages_link_to_the_runbooks_of_the_alerts() -> None:
    settings = {"prometheusRule": {"runbooks": "https://wiki.example.com/driftmill/"}}
    for config in _maps(render({"monitoring": settings})):
        for page in config["data"].values():
            urls = [link["url"] for link in json.loads(page)["links"]]
            assert "https://wiki.example.com/driftmill/README.md" in urls


def test_labels_annotations_and_place_are_the_values() -> None:
    settings = {
        "namespace": "grafana",
        "labels": {"grafana_dashboard": None, "team": "risk"},
        "annotations": {"grafana_folder": "Models"},
    }
    objects = render({"monitoring": {"dashboards": settings}})
    maps = [m for m in of(objects, "ConfigMap").values() if "dashboard" in m["metadata"]["name"]]
    assert len(maps) == len(dashboards.files())
    for config in maps:
        assert config["metadata"]["namespace"] == "grafana"
        assert config["metadata"]["labels"]["team"] == "risk"
        assert "grafana_dashboard" not in config["metadata"]["labels"]
        assert config["metadata"]["annotations"] == {"grafana_folder": "Models"}


def test_they_can_be_left_out() -> None:
    assert not _maps(render({"monitoring": {"dashboards": {"enabled": False}}}))
