"""What `driftmill compile` writes of the examples, the chart takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from driftmill import contract, values
from tests.helm.chart import CHART, NAME, check, helm, of

EXAMPLES = sorted(Path("examples").glob("*/contract.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_values_of_an_example_render_to_valid_objects(path: Path) -> None:
    given = contract.load(path)
    made = values.for_model(given, store="s3://models/driftmill", text=given.to_json())
    values.Values.model_validate(made)
    done = helm("template", "rel", str(CHART), "--namespace=shop", "-f", "-", text=json.dumps(made))
    assert done.returncode == 0, done.stderr
    objects = tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))
    for thing in objects:
        check(json.dumps(thing))
    config = of(objects, "ConfigMap")[f"{NAME}-{given.model}-contract"]
    assert contract.parse(config["data"]["contract.yaml"]) == given
