"""What is written of the chart's values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from driftmill.values import Values
from k8s import chart


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return chart.schema()


def test_the_chart_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert chart.main(["--check"]) == 0, capsys.readouterr().err


def test_what_is_out_of_date_is_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chart, "CHART", tmp_path)
    begin, end = chart.MARKS
    (tmp_path / "README.md").write_text(f"# chart\n{begin}\na stale table\n{end}\nend\n")
    chart.files.cache_clear()
    try:
        assert chart.main(["--check"]) == 1
        assert f"{tmp_path}/values.yaml is out of date: make chart" in capsys.readouterr().err
        assert not (tmp_path / "values.yaml").exists()
        assert chart.main([]) == 0
        assert chart.main(["--check"]) == 0
    finally:
        chart.files.cache_clear()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# chart\n")
    assert readme.endswith("\nend\n")
    assert "stale" not in readme


def test_the_written_defaults_are_the_defaults(schema: dict[str, Any]) -> None:
    written = yaml.safe_load(chart.values_yaml())
    assert written == Values().model_dump(mode="json", by_alias=True)
    jsonschema.Draft7Validator(schema).validate(written)


def test_every_value_is_explained(schema: dict[str, Any]) -> None:
    silent = [
        f"{path}: {name}"
        for path, node in objects(schema)
        if not path.startswith("/definitions/io.k8s.")
        for name, about in node["properties"].items()
        if not about.get("description") and not _explained(schema, about)
    ]
    assert silent == []
    assert chart.values_yaml().count("# ") > 200


def _explained(schema: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether what a property refers to has the words that the property does not repeat."""
    name = about.get("$ref", "").rpartition("/")[2]
    return bool(schema["definitions"].get(name, {}).get("description"))


def objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "properties" in node and isinstance(node["properties"], dict):
            yield path, node
        for key, value in node.items():
            yield from objects(value, f"{path}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from objects(value, f"{path}/{i}")


def test_the_schema_is_one_and_strict_at_every_level(schema: dict[str, Any]) -> None:
    jsonschema.Draft7Validator.check_schema(schema)
    found = dict(objects(schema))
    assert len(found) > 100
    assert [
        path for path, node in found.items() if node.get("additionalProperties") is not False
    ] == []


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    names = {part.split('"')[0] for part in text.split("#/definitions/")[1:]}
    assert names <= set(schema["definitions"])
    # Nor is anything there that nobody needs.
    assert names == set(schema["definitions"])


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"models": {"a-1": {"contract": "x"}}}, True),
        ({"models": {"A": {"contract": "x"}}}, False),
        ({"service": {"affinity": {"nodeAffinity": {}}}}, True),
        ({"service": {"affinity": {"nodeAfinity": {}}}}, False),
        ({"service": {"extraEnv": [{"name": "A", "value": "1"}]}}, True),
        ({"service": {"extraEnv": [{"name": "A", "value": 1}]}}, False),
        ({"service": {"disruptionBudget": {"maxUnavailable": "30%"}}}, True),
        ({"service": {"disruptionBudget": {"maxUnavailable": "30"}}}, False),
        ({"extraObjects": [{"kind": "x"}, "kind: y"]}, True),
        ({"global": {"anything": 1}}, True),
    ],
)
def test_what_the_schema_takes(schema: dict[str, Any], values: Any, valid: bool) -> None:
    assert jsonschema.Draft7Validator(schema).is_valid(values) == valid


def test_the_table_has_every_value_once() -> None:
    rows = [line.split("`")[1] for line in chart.table().splitlines()[2:]]
    assert len(rows) == len(set(rows))
    assert {"store.uri", "service.probes.startup.periodSeconds", "models.*.contract"} <= set(rows)
    for line in chart.table().splitlines()[2:]:
        assert line.count(" | ") - line.count("\\|") == 2, line
