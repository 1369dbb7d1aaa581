"""The contract: what is accepted, and what a mistake is told."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from driftmill import contract
from tests.conftest import CONTRACT

EXAMPLES = sorted(Path("examples").glob("*/contract.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(contract.ContractError) as caught:
        contract.parse(text)
    return caught.value.problems


def test_defaults_are_filled_in() -> None:
    read = contract.parse(CONTRACT)
    assert read.metric.name == "auc"
    assert read.metric.sign == 1
    assert read.data.source.uri == "sim:payments"
    assert [c.name for c in read.data.numeric] == ["amount", "age"]
    assert [c.name for c in read.data.categorical] == ["channel"]
    assert read.tracking.backend == "none"


def test_json_reads_back_as_the_same_contract() -> None:
    read = contract.parse(CONTRACT)
    assert contract.parse(read.to_json()) == read


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        contract.parse(CONTRACT).model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_examples_are_valid_also_by_the_json_schema(path: Path) -> None:
    contract.load(path)
    schema = contract.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    values = json.loads(json.dumps(yaml.safe_load(path.read_text()), default=str))
    jsonschema.Draft202012Validator(schema).validate(values)
    values["modle"] = values.pop("model")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(values)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "task: classification",
            "task: clasification",
            "contract:4: task: expected 'classification', 'regression' or 'image-classification', "
            "got 'clasification'; "
            "did you mean 'classification'?",
        ),
        ("model: tiny", "modle: tiny", "did you mean 'model'?"),
        ("type: float", "type: flot", "contract:9: data.columns[0].type: expected 'float'"),
        ("min: 0, max: 1000", "min: 5, max: 1", "contract:9: data.columns[0]: `min` 5.0 is above"),
        ("nullable: true", "nulable: true", "data.columns[1].nulable: unknown field; did you mean"),
        ("tracking: none", "tracking: wandb", "contract:12: tracking.backend: expected 'mlflow'"),
        ("sim:payments", "http://x/y.csv", "http: is not encrypted"),
        ("sim:payments", "https://x/y.csv", "an https: source needs the file's sha256"),
        ("model: tiny", "model: Tiny", "contract:3: model: "),
        ("driftmill/v1", "driftmill/v2", "contract:2: apiVersion: expected 'driftmill/v1'"),
        ("name: age", "name: fraud", "the target 'fraud' is also listed as an input"),
        ("name: age", "name: amount", "columns listed twice: amount"),
        ("name: age", "name: _id", "data.columns[1].name"),
        ('["no", "yes"]', '["no"]', "a classification needs two labels or more"),
    ],
)
def test_a_mistake_names_line_field_and_what_was_expected(old: str, new: str, told: str) -> None:
    assert old in CONTRACT
    found = problems(CONTRACT.replace(old, new))
    assert any(told in problem for problem in found), found


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("monitor: {ignore: [amuont]}", "not a column of data.columns; did you mean 'amount'?"),
        ("retrain: {cooldown: 5 parsecs}", "retrain.cooldown: expected a duration such as 30s"),
        ("retrain: {schedule: '* * *'}", "not a cron expression of five fields"),
        ("retrain: {schedule: '61 * * * *'}", "not a cron expression of five fields"),
        ("train: {metric: rmse}", "train.metric rmse is not for classification"),
        ("train: {metric: {name: auc, direction: minimize}}", "auc is a metric to maximize"),
        ("serve: {canary: {steps: [0.5, 0.1]}}", "`steps` must rise"),
        ("gates: {margin: .inf}", "gates.margin"),
        ("gates: {margin: 1}\ngates: {margin: 2}", "gates: this key is given twice"),
    ],
)
def test_a_mistake_in_a_section(added: str, told: str) -> None:
    found = problems(f"{CONTRACT}{added}\n")
    assert any(told in problem for problem in found), found


def test_all_mistakes_are_told_at_once_in_order_of_lines() -> None:
    text = CONTRACT.replace("model: tiny", "model: Tiny").replace("type: int", "type: integer")
    lines = [int(problem.split(":")[1]) for problem in problems(text)]
    assert lines == sorted(lines)
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "contract:1: expected a mapping"),
        ("- a\n- b", "contract:1: expected a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("a: 2011-13-01", "not valid YAML"),
    ],
)
def test_what_is_not_a_contract(text: str, told: str) -> None:
    assert told in problems(text)[0]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(contract.ContractError, match="no such file"):
        contract.load(tmp_path / "none.yaml")


def test_a_relative_file_lies_beside_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT.replace("sim:payments", "file:rows.csv"))
    assert contract.load(path).data.source.uri == f"file://{tmp_path / 'rows.csv'}"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172800)]
)
def test_durations(text: str, seconds: float) -> None:
    value = int(text) if text.isdigit() else f"'{text}'"
    read = contract.parse(f"{CONTRACT}retrain: {{cooldown: {value}}}\n")
    assert read.retrain.cooldown == seconds


IMAGES = """
apiVersion: driftmill/v1
model: pictures
task: image-classification
data:
  source: folder:pictures
  target: label
  image: {size: 32}
"""


def test_an_image_contract_has_the_statistics_as_its_columns() -> None:
    read = contract.parse(IMAGES)
    names = [c.name for c in read.data.columns]
    assert names == [*contract.STATISTICS, *contract.COLOUR_STATISTICS]
    grey = contract.parse(IMAGES.replace("size: 32", "size: [8, 16], channels: 1"))
    assert [c.name for c in grey.data.columns] == list(contract.STATISTICS)
    assert grey.data.image is not None
    assert grey.data.image.size == (8, 16)
    assert (read.metric.name, read.train.candidates) == ("accuracy", ("small-cnn",))
    assert read.serve.max_body_bytes == 32 * 2**20
    assert contract.parse(f"{IMAGES}serve: {{max_body_bytes: 4096}}\n").serve.max_body_bytes == 4096
    assert contract.parse(read.to_json()) == read


def test_what_is_for_statistics_may_name_them() -> None:
    added = "monitor: {ignore: [embedding, width], weights: {noise: 2}}\n"
    added += "gates: {slices: {columns: [brightness]}}\n"
    assert contract.parse(IMAGES + added).monitor.ignore == ("embedding", "width")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  image: {size: 32}", "", "`columns` must list one input at least (or give `image`)"),
        ("size: 32", "size: [32]", "data.image.size"),
        ("size: 32", "size: 2", "data.image.size"),
        ("size: 32", "size: 32, chanels: 1", "did you mean 'channels'?"),
        ("size: 32", "size: 32, formats: []", "data.image.formats"),
        (
            "  target: label",
            "  target: label\n  columns: [{name: age, type: int}]",
            "`columns` cannot be given beside `image`",
        ),
        ("task: image-classification", "task: classification", "data.image is for image tasks"),
        (
            "  target: label",
            "  target: label\n  simulate: {corruptions: {blurr: 1}}",
            "did you mean 'blur'?",
        ),
    ],
)
def test_a_mistake_in_an_image_contract(old: str, new: str, told: str) -> None:
    assert old in IMAGES
    found = problems(IMAGES.replace(old, new))
    assert any(told in problem for problem in found), found


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("train: {candidates: [linear]}", "train.candidates: linear is not for image-class"),
        ("train: {metric: rmse}", "train.metric rmse is not for image-classification"),
        ("train: {vision: {weights: {file: a.safetensors}}}", "train.vision.weights.sha256"),
        ("gates: {slices: {columns: [embedding]}}", "not a column of data.columns"),
        (
            "train: {resources: {gpu: 2}, vision: {device: cpu}}",
            "train.resources.gpu asks for 2 and train.vision.device is cpu",
        ),
    ],
)
def test_a_mistake_in_a_section_for_images(added: str, told: str) -> None:
    found = problems(f"{IMAGES}{added}\n")
    assert any(told in problem for problem in found), found


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("train: {candidates: [resnet18]}", "train.candidates: resnet18 is not for classification"),
        ("serve: {precision: int8}", "serve.precision is for image tasks"),
        ("train: {resources: {nodes: 2}}", "train.resources.nodes is for image tasks"),
    ],
)
def test_what_is_for_images_is_refused_for_a_table(added: str, told: str) -> None:
    found = problems(f"{CONTRACT}{added}\n")
    assert any(told in problem for problem in found), found


def test_paths_of_images_and_of_weights_start_at_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    weights = f"{{file: net.safetensors, sha256: {'a' * 64}}}"
    path.write_text(f"{IMAGES}train: {{vision: {{weights: {weights}}}}}\n")
    read = contract.load(path)
    assert read.data.source.uri == f"folder://{tmp_path / 'pictures'}"
    assert read.train.vision.weights is not None
    assert read.train.vision.weights.file == str(tmp_path / "net.safetensors")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_never_a_crash(text: str) -> None:
    with pytest.raises(contract.ContractError):
        contract.parse(text)


def test_every_field_has_a_description() -> None:
    def undescribed(schema: dict[str, object], where: str) -> list[str]:
        properties = schema.get("properties", {})
        assert isinstance(properties, dict)
        return [
            f"{where}.{name}"
            for name, field in properties.items()
            # A field that says just what its section says is not repeated.
            if not (field.get("description") or "$ref" in field)
        ]

    schema = contract.json_schema()
    missing = undescribed(schema, "contract")
    for name, part in schema["$defs"].items():
        missing += undescribed(part, name)
    assert missing == []
