"""Objects of one's own, and what is put onto all of the chart's."""

from __future__ import annotations

from tests.helm.chart import of, render
from tests.helm.pods import templates


def test_objects_of_ones_own_go_as_they_are_or_as_templates() -> None:
    found = of(render({}, "full"), "ConfigMap")
    assert found["as-it-is"]["data"] == {"model": "payments"}
    assert found["rel-with-templates"]["data"] == {"namespace": "shop"}


def test_common_labels_and_annotations_are_everywhere_and_change_none_of_the_charts() -> None:
    values = {
        "commonLabels": {"team": "risk", "app.kubernetes.io/instance": "mine"},
        "commonAnnotations": {"contact": "risk@example.com"},
    }
    objects = render(values)
    for metadata in [o["metadata"] for o in objects] + [
        t["metadata"] for t in templates(objects).values()
    ]:
        assert metadata["labels"]["team"] == "risk"
        assert metadata["labels"]["app.kubernetes.io/instance"] == "rel"
        assert metadata["annotations"]["contact"] == "risk@example.com"
