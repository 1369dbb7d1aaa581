"""Clients that others have made, against the service as a real process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from driftmill import rollout
from driftmill.serving.log import read, segments
from driftmill.store import Store
from tests.services.test_schemathesis import put_wide
from tests.services.test_tabular import service

COMMAND = [sys.executable, "-m", "services.tabular", "--model", "wide", "--port"]
ROWS = {
    "an amount": ("FP64", np.array([700.0, 10.0])),
    "open": ("FP32", np.array([np.nan, 1.5], np.float32)),
    "age": ("INT64", np.array([41, 20])),
    "count": ("INT32", np.array([1, 2], np.int32)),
    "paid": ("BOOL", np.array([True, False])),
    "word": ("BYTES", np.array(["ü", "v"], object)),
    "strict": ("BYTES", np.array(["red", "Red."], object)),
}


@pytest.mark.slow
def test_tritons_client_in_json_and_binary(store: Store, tmp_path: Path) -> None:
    from tritonclient import http

    manifest = put_wide(store, tmp_path)
    rollout.change(store, "wide", champion=manifest.version, by="test")
    with service(store, tmp_path, COMMAND, model="wide") as (_, url):
        client = http.InferenceServerClient(url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("wide")
        assert client.is_model_ready("wide", manifest.version)
        assert not client.is_model_ready("other")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("wide")["versions"] == [manifest.version]
        for binary in (False, True):
            inputs = []
            for name, (datatype, values) in ROWS.items():
                if not (binary or name != "open"):
                    continue  # JSON has no NaN, and this client sends it all the same
                inputs.append(http.InferInput(name, [2], datatype))
                inputs[-1].set_data_from_numpy(values, binary_data=binary)
            names = ("prediction", "probabilities", "prediction_id")
            wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in names]
            answer = client.infer("wide", inputs, outputs=wanted, request_id="mine")
            predictions = answer.as_numpy("prediction").tolist()
            assert predictions == ([b"yes", b"no"] if binary else ["yes", "no"])
            np.testing.assert_allclose(answer.as_numpy("probabilities"), [[0, 1], [1, 0]])
            assert len(answer.as_numpy("prediction_id")) == 2
            assert answer.get_response()["id"] == "mine"
        # What is not asked for in detail comes in binary.
        assert client.infer("wide", inputs).as_numpy("score").tolist() == [1.0, 0.0]
        with pytest.raises(http.InferenceServerException, match="takes BOOL"):
            client.infer(
                "wide", [http.InferInput("paid", [2], "BYTES").set_data_from_numpy(ROWS["word"][1])]
            )
    logged = read(store, segments(store, "wide", "predictions"))
    assert logged["word"].tolist() == ["ü", "v"] * 3
    assert logged["strict"].tolist() == ["red"] * 6
    assert logged["open"].isna().tolist() == [True, True, True, False, True, False]


@pytest.mark.slow
def test_bentomls_client_without_bentomls_server(store: Store, tmp_path: Path) -> None:
    import bentoml

    rollout.change(store, "wide", champion=put_wide(store, tmp_path).version, by="test")
    record = {"an amount": 700.0, "count": 1, "paid": True, "word": "u", "strict": "red"}
    with (
        service(store, tmp_path, COMMAND, model="wide") as (_, url),
        bentoml.SyncHTTPClient(url) as client,
    ):
        prediction = client.predict(records=[record])["predictions"][0]
        assert prediction["prediction"] == "yes"
        given = {"id": prediction["id"], "label": "no"}
        assert client.feedback(labels=[given]) == {"accepted": 1}
