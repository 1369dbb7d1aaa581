"""Names of objects: long ones, and those of two releases side by side."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.chart import CHART, CI, Object, helm, of, refused, render

#: The longest that Helm and the schema take.
RELEASE, MODEL = "r" * 53, "m" * 40
CRON: dict[str, Any] = {
    "controller": {"enabled": False},
    "training": {"recurring": {"type": "cronjob"}},
}
EVERYTHING: dict[str, Any] = {
    "service": {
        "canary": {"enabled": True, "weight": 5},
        "autoscaling": {"type": "hpa"},
    },
    "route": {"mode": "always", "parentRefs": [{"name": "public"}]},
    "monitoring": {"prometheusRule": {"mode": "always"}},
}


def model(name: str) -> dict[str, Any]:
    text = f"{{model: {name}, task: classification}}"
    rules = [{"name": "g", "rules": [{"alert": "A", "expr": "1"}]}]
    return {"contract": text, "rules": rules}


def names(objects: tuple[Object, ...]) -> set[tuple[str, str]]:
    return {(o["kind"], o["metadata"]["name"]) for o in objects}


@pytest.mark.parametrize("more", [EVERYTHING, CRON], ids=["everything", "cronjob"])
def test_no_name_is_longer_than_kubernetes_takes(more: dict[str, Any]) -> None:
    long = f"{MODEL[:-1]}n"
    values = {**more, "models": {MODEL: model(MODEL), long: model(long)}}
    objects = render(values, release=RELEASE)
    for kind, name in names(objects):
        assert len(name) <= {"CronJob": 52, "ConfigMap": 253}.get(kind, 63), (kind, name)
        assert not name.endswith("-")
    assert len(names(objects)) == len(objects)
    deployments = of(objects, "Deployment")
    assert sum(name.endswith("-monitor") for name in deployments) == 3


def test_two_releases_share_nothing() -> None:
    one, other = render(EVERYTHING, release="one"), render(EVERYTHING, release="two")
    assert names(one).isdisjoint(names(other))
    for deployment in of(one, "Deployment").values():
        selector = deployment["spec"]["selector"]["matchLabels"].items()
        for stranger in of(other, "Deployment").values():
            assert not selector <= stranger["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("values", "release", "expected"),
    [
        ({}, "rel", "rel-driftmill"),
        ({}, "driftmill", "driftmill"),
        ({}, "my-driftmill-2", "my-driftmill-2"),
        ({"nameOverride": "mill"}, "rel", "rel-mill"),
        ({"fullnameOverride": "mill"}, "rel", "mill"),
        ({"fullnameOverride": "r"}, "123", "r"),
    ],
)
def test_names_come_from_release_and_chart(
    values: dict[str, Any], release: str, expected: str
) -> None:
    assert set(of(render(values, release=release), "Service")) == {
        f"{expected}-payments",
        f"{expected}-payments-monitor",
        f"{expected}-payments-controller",
    }


def test_names_begin_with_a_letter() -> None:
    done = helm("template", "123", str(CHART), "-f", str(CI["minimal"]))
    assert "the release is called 123, and names of Services begin with a letter" in done.stderr
    assert "fullnameOverride: Does not match pattern" in refused({"fullnameOverride": "1"})


def test_a_model_that_is_called_like_a_part_of_another_is_refused() -> None:
    said = refused({"models": {"payments-monitor": model("payments-monitor")}})
    assert "model payments: models has payments-monitor, too" in said
