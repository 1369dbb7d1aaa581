"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import settings
from onnx import TensorProto, helper

from driftmill import bundle, contract, features
from driftmill.store import Store
from tests.postgres import server as postgres_server

# How long an example takes is no property of the code: machines are busy at times.
settings.register_profile("driftmill", deadline=None)
settings.load_profile("driftmill")

CONTRACT = """
apiVersion: driftmill/v1
model: tiny
task: classification
data:
  source: sim:payments
  target: {name: fraud, labels: ["no", "yes"]}
  columns:
    - {name: amount, type: float, min: 0, max: 1000}
    - {name: age, type: int, nullable: true}
    - {name: channel, type: category, categories: [web, app]}
tracking: none
"""


@pytest.fixture
def tiny() -> contract.Contract:
    """A small contract of a classification with a number, a nullable number and a category."""
    return contract.parse(CONTRACT)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a Postgres server of our own, without a database name."""
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Endpoint of an S3 server written in Python."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


#: The key of moto, which takes any; recognisable, should it turn up where it must not.
MOTO_KEY = ("KEYOFTHETESTS", "secret-of-the-tests")


def place_on_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch, key: tuple[str, str]) -> str:
    """URI of an empty place at an S3 server, which the environment then names."""
    from driftmill import s3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", os.environ.get("AWS_REGION", "us-east-1"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key[1])
    s3._client.cache_clear()
    client = s3.connect()
    if all(b["Name"] != "driftmill-test" for b in client.list_buckets()["Buckets"]):
        client.create_bucket(Bucket="driftmill-test")
    return f"s3://driftmill-test/{uuid.uuid4().hex}"


@pytest.fixture
def s3_moto(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty place in moto."""
    from driftmill import s3

    yield place_on_s3(moto, monkeypatch, MOTO_KEY)
    s3._client.cache_clear()


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty place at the S3 server that `DRIFTMILL_TEST_S3` names."""
    endpoint = os.environ.get("DRIFTMILL_TEST_S3")
    if not endpoint:
        pytest.skip("DRIFTMILL_TEST_S3 names no S3 server")
    key = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    from driftmill import s3

    uri = place_on_s3(endpoint, monkeypatch, key)
    yield uri
    store = Store(uri)
    for name in store.list(""):
        store.delete(name)
    s3._client.cache_clear()


@pytest.fixture(params=["moto", "server"])
def s3_uri(request: pytest.FixtureRequest) -> str:
    """URI of an empty place on S3, once in moto and once at a server of the user's."""
    uri: str = request.getfixturevalue(f"s3_{request.param}")
    return uri


@pytest.fixture(params=["folder", "memory", "moto", "server"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once of each kind."""
    if request.param == "folder":
        return Store(tmp_path / "any")
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    return Store(request.getfixturevalue(f"s3_{request.param}"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets, where there is one."""
    folder = os.environ.get("DRIFTMILL_DATA")
    if not folder:
        pytest.skip("DRIFTMILL_DATA is not set")
    return Path(folder)


def tiny_frame(rows: int, seed: int = 0, shift: float = 0.0) -> pd.DataFrame:
    """Rows for the `tiny` contract; `shift` moves the amounts by that many standard deviations."""
    rng = np.random.default_rng(seed)
    amount = rng.normal(500 + 100 * shift, 100, rows).clip(0, 1000)
    return pd.DataFrame(
        {
            "amount": amount,
            "age": np.where(rng.random(rows) < 0.1, np.nan, rng.integers(18, 90, rows)),
            "channel": rng.choice(["web", "app"], rows),
            "fraud": np.where(amount + rng.normal(0, 30, rows) > 500, "yes", "no"),
        }
    )


def logistic_onnx(path: Path, slope: float = 0.02, centre: float = 500.0) -> Path:
    """A model of the `tiny` contract: P(yes) = sigmoid(slope * (amount - centre))."""
    weight = np.array([[0.0, slope], [0.0, 0.0]], dtype=np.float32)
    offset = np.array([0.0, -slope * centre], dtype=np.float32)
    nodes = [
        helper.make_node("IsNaN", ["numeric"], ["absent"]),
        helper.make_node("Where", ["absent", "zero", "numeric"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "logistic",
        [
            helper.make_tensor_value_info("numeric", TensorProto.FLOAT, [None, 2]),
            helper.make_tensor_value_info("categorical", TensorProto.STRING, [None, 1]),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [2, 2], weight.ravel()),
            helper.make_tensor("offset", TensorProto.FLOAT, [2], offset),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def hanging_onnx(path: Path, hangs_above: float = 850.0) -> Path:
    """The logistic model, which counts to 2**40 first where an amount lies above a limit."""
    model = onnx.load(logistic_onnx(path))
    scalar: list[int] = []
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"]),
            helper.make_node("Add", ["v_in", "one"], ["v_out"]),
        ],
        "count",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, scalar),
            helper.make_tensor_value_info("cond_in", TensorProto.BOOL, scalar),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, scalar),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, scalar),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, scalar),
        ],
    )
    graph = model.graph
    graph.initializer.extend(
        [
            helper.make_tensor("limit", TensorProto.FLOAT, scalar, [hangs_above]),
            helper.make_tensor("many", TensorProto.INT64, scalar, [2**40]),
            helper.make_tensor("once", TensorProto.INT64, scalar, [1]),
            helper.make_tensor("true", TensorProto.BOOL, scalar, [True]),
            helper.make_tensor("one", TensorProto.FLOAT, scalar, [1.0]),
        ]
    )
    graph.node[-1].output[0] = "plain"
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["filled"], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "limit"], ["hangs"]),
            helper.make_node("Where", ["hangs", "many", "once"], ["turns"]),
            helper.make_node("Loop", ["turns", "true", "zero"], ["counted"], body=body),
            helper.make_node("Mul", ["counted", "zero"], ["nothing"]),
            helper.make_node("Add", ["plain", "nothing"], ["probabilities"]),
        ]
    )
    onnx.save(model, path)
    return path


@pytest.fixture
def make_bundle(
    tiny: contract.Contract, store: Store, tmp_path: Path
) -> Callable[..., bundle.Manifest]:
    """Make a bundle of the `tiny` contract and put it into the store; each slope is a version, and
    one that hangs is another."""

    def make(
        slope: float = 0.02,
        of: contract.Contract = tiny,
        rows: int = 1000,
        hangs: bool = False,
    ) -> bundle.Manifest:
        frame = tiny_frame(rows)
        name = "hangs" if hangs else str(slope)
        model = tmp_path / f"model-{name}.onnx"
        folder = tmp_path / f"bundle-{name}"
        manifest = bundle.write(
            folder,
            contract=of,
            signature=features.signature(of, frame),
            model=hanging_onnx(model) if hangs else logistic_onnx(model, slope),
            reference=frame,
            examples=frame.head(5),
            family="linear",
            params={"slope": slope},
            data={"fingerprint": "0" * 64},
        )
        store.put_folder(folder, bundle.key(of.model, manifest.version), bundle.MANIFEST)
        return manifest

    return make
