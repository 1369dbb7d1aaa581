"""The OpenAPI document against what the services do, by schemathesis: requests that fit it are
answered, others refused, and each answer is as it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper

from driftmill import bundle, contract, features, rollout
from driftmill.bundle import Manifest
from driftmill.store import Store
from tests.services.test_tabular import service
from tests.serving.pictures import put_bundle

WIDE = contract.parse(
    """
apiVersion: driftmill/v1
model: wide
task: classification
data:
  source: sim:payments
  target: {name: label, labels: ["no", "yes"], aliases: {"y": "yes"}}
  columns:
    - {name: an amount, type: float, min: 0, max: 1000, description: In euros.}
    - {name: open, type: float, nullable: true}
    - {name: age, type: int, min: 18, nullable: true}
    - {name: count, type: int}
    - {name: paid, type: bool}
    - {name: maybe, type: bool, nullable: true}
    - {name: a.free, type: category, nullable: true}
    - {name: word, type: category}
    - {name: strict, type: category, categories: [red, green], unknown: reject,
       aliases: {"Red.": red}}
    - {name: loose, type: category, categories: [one, two], unknown: reject, nullable: true}
serve: {max_body_bytes: 100000, max_records: 50, explain: {rate: 1000, samples: 1, background: 5}}
tracking: none
"""
)


def put_wide(store: Store, folder: Path) -> Manifest:
    """A bundle with a column of each kind in the store; P(yes) = sigmoid(an amount - 500)."""
    rng = np.random.default_rng(0)
    rows = 200
    frame = pd.DataFrame(
        {
            "an amount": rng.uniform(0, 1000, rows),
            "open": np.where(rng.random(rows) < 0.1, np.nan, rng.normal(size=rows)),
            "age": rng.integers(18, 90, rows).astype(float),
            "count": rng.integers(0, 9, rows),
            "paid": rng.random(rows) < 0.5,
            "maybe": rng.integers(0, 2, rows).astype(float),
            "a.free": rng.choice(["x", "y"], rows),
            "word": rng.choice(["u", "v"], rows),
            "strict": rng.choice(["red", "green"], rows),
            "loose": rng.choice(["one", "two"], rows),
            "label": rng.choice(["no", "yes"], rows),
        }
    )
    columns = sum(column.is_numeric for column in WIDE.data.columns)
    weight = np.zeros((columns, 2), np.float32)
    weight[0, 1] = 1.0
    graph = helper.make_graph(
        [
            helper.make_node("IsNaN", ["numeric"], ["absent"]),
            helper.make_node("Where", ["absent", "zero", "numeric"], ["filled"]),
            helper.make_node("MatMul", ["filled", "weight"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "wide",
        [
            helper.make_tensor_value_info("numeric", TensorProto.FLOAT, [None, columns]),
            helper.make_tensor_value_info(
                "categorical", TensorProto.STRING, [None, len(WIDE.data.columns) - columns]
            ),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [columns, 2], weight.ravel()),
            helper.make_tensor("offset", TensorProto.FLOAT, [2], [0.0, -500.0]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "wide.onnx")
    manifest = bundle.write(
        folder / "bundle",
        contract=WIDE,
        signature=features.signature(WIDE, frame),
        model=folder / "wide.onnx",
        reference=frame,
        examples=frame.head(5),
        family="linear",
        params={},
        data={"fingerprint": "0" * 64},
    )
    store.put_folder(folder / "bundle", bundle.key("wide", manifest.version), bundle.MANIFEST)
    return manifest


#: That a request comes too late is a right answer to the tiny timeouts that are sent. What JSON
#: Schema cannot say of a body (`unsaid`) is not expected to be taken: it is checked by the clients
#: of the protocol, and by the documented example of an image.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]

[[operations]]
include-path-regex = "{unsaid}"
[operations.checks.positive_data_acceptance]
enabled = false
"""


def check(url: str, folder: Path, unsaid: str) -> None:
    """Send requests of all kinds and fail where an answer is not as the document says."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG.format(unsaid=unsaid))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("st"),
            *("--config-file", config, "run", f"{url}/docs.json"),
            *("--phases", "examples,coverage,fuzzing"),
            *("--seed", "1", "--max-examples", "10", "--no-color"),
            *("--generation-database", "none"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_service_of_tables_is_as_documented(store: Store, tmp_path: Path) -> None:
    rollout.change(store, "wide", champion=put_wide(store, tmp_path).version, by="test")
    command = [sys.executable, "-m", "services.tabular", "--model", "wide", "--port"]
    with service(store, tmp_path, command, model="wide") as (_, url):
        check(url, tmp_path, unsaid="/infer$")


@pytest.mark.slow
def test_a_service_of_images_is_as_documented(store: Store, tmp_path: Path) -> None:
    rollout.change(store, "shades", champion=put_bundle(store, tmp_path).version, by="test")
    command = [sys.executable, "-m", "services.vision", "--model", "shades", "--port"]
    with service(store, tmp_path, command, model="shades") as (_, url):
        check(url, tmp_path, unsaid="/(infer|predict|explain)$")
