"""The services that are measured, what their requests look like, and where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.serving.model import NAME

Engine = Literal["onnx", "scikit-learn", ""]
Records = Sequence[Mapping[str, Any]]

OURS = "driftmill"
ECHO = "bare ASGI echo"

#: Model and servers, the same in every environment.
_COMMON = (
    "httptools==0.9.0",
    "joblib==1.6.0",
    "numpy==2.4.6",
    "onnxruntime==1.32.0",
    "pandas==2.3.3",
    "scikit-learn==1.9.1",
    "uvicorn==0.54.0",
    "uvloop==0.23.0",
)
#: Environments of the peers, as few as their versions permit: MLServer wants an older FastAPI.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "peers": (
        *_COMMON,
        "bentoml==1.4.39",
        "fastapi==0.165.0",
        "kserve==0.21.0",
        "litserve==0.2.19",
        "mlflow==3.17.2",
        "onnx==1.23.2",
        "ray[serve]==2.60.0",
    ),
    "mlserver": (*_COMMON, "mlserver==1.7.1", "mlserver-sklearn==1.7.1"),
}
#: Nobody is told that a benchmark ran; one thread each, as the client needs the other core.
VARIABLES = {
    "BENTOML_DO_NOT_TRACK": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def _records(records: Records) -> Any:
    return {"records": records}


def _instances(records: Records) -> Any:
    return {"instances": records}


def _split(records: Records) -> Any:
    columns = list(records[0])
    return {
        "dataframe_split": {
            "columns": columns,
            "data": [[record[c] for c in columns] for record in records],
        }
    }


def _named(records: Records) -> Any:
    """The two inputs of the ONNX model, as MLflow takes them."""
    texts = [c for c, value in records[0].items() if isinstance(value, str)]
    numbers = [c for c in records[0] if c not in texts]
    return {
        "inputs": {
            "numeric": [[record[c] for c in numbers] for record in records],
            "categorical": [[record[c] for c in texts] for record in records],
        }
    }


def _two_tensors(records: Records) -> Any:
    """The two inputs of the ONNX model in the Open Inference Protocol."""
    named = _named(records)["inputs"]
    return {
        "inputs": [
            {
                "name": name,
                "shape": [len(rows), len(rows[0])],
                "datatype": "FP32" if name == "numeric" else "BYTES",
                "data": [value for row in rows for value in row],
            }
            for name, rows in named.items()
        ]
    }


def _tensors(records: Records) -> Any:
    """A data frame in the Open Inference Protocol, one tensor a column."""
    inputs = []
    for column, value in records[0].items():
        text = isinstance(value, str)
        tensor = {
            "name": column,
            "shape": [len(records), 1],
            "datatype": "BYTES" if text else "FP32",
            "data": [record[column] for record in records],
        }
        inputs.append(tensor | ({"parameters": {"content_type": "str"}} if text else {}))
    return {
        "parameters": {"content_type": "pd"},
        "inputs": inputs,
        "outputs": [{"name": "predict_proba"}],
    }


def _listed(answer: Any) -> list[float]:
    rows = answer["predictions"] if isinstance(answer, dict) else answer
    return [row["probabilities"][1] for row in rows]


def _ours(answer: Any) -> list[float]:
    return [row["probabilities"]["yes"] for row in answer["predictions"]]


def _rows(answer: Any) -> list[float]:
    return [row[1] for row in answer["predictions"]]


def _by_output(answer: Any) -> list[float]:
    return [row[1] for row in answer["predictions"]["probabilities"]]


def _flat(answer: Any) -> list[float]:
    data: list[float] = answer["outputs"][0]["data"]
    return data[1::2]


@dataclass(frozen=True)
class Service:
    """A server with the model."""

    name: str
    project: str
    """The distribution whose version is reported."""
    engine: Engine
    command: tuple[str, ...]
    """`{bin}` is its environment's, `{port}` a free port, `{port2}` another, `{folder}` the
    model's."""
    environment: str = "peers"
    """One of `ENVIRONMENTS`, or empty for ours."""
    path: str = "/predict"
    body: Callable[[Records], Any] = _records
    """The JSON of a request."""
    read: Callable[[Any], list[float]] | None = _listed
    """The probabilities of the second label in an answer; None where there are none."""
    variables: Mapping[str, str] = field(default_factory=dict)
    prepare: tuple[str, ...] = ()
    """Run once, before it is started."""


_UVICORN = (
    "{bin}/python", "-m", "uvicorn", "--port", "{port}", "--loop", "uvloop",
    "--http", "httptools", "--no-access-log", "--log-level", "warning",
)  # fmt: skip
_PEERS = "benchmarks.serving.peers"


def _bentoml(name: str, engine: Engine) -> Service:
    of = "Inline" if "inline" in name else "Batching" if "batchable" in name else "Service"
    return Service(
        name,
        "bentoml",
        engine,
        ("{bin}/bentoml", "serve", f"{_PEERS}.bentoml_app:{of}",
         "--host", "127.0.0.1", "--port", "{port}"),
        variables={"BENTOML_HOME": "{folder}/bentoml"},
    )  # fmt: skip


def _fastapi(name: str, engine: Engine, **variables: str) -> Service:
    return Service(
        name, "fastapi", engine, (*_UVICORN, f"{_PEERS}.fastapi_app:app"), variables=variables
    )


def _kserve(name: str, engine: Engine) -> Service:
    return Service(
        name,
        "kserve",
        engine,
        ("{bin}/python", "-m", f"{_PEERS}.kserve_app", "--http_port", "{port}",
         "--enable_grpc", "false", "--enable_latency_logging", "false", "--event-loop", "uvloop",
         "--log_config_file", "benchmarks/serving/peers/kserve_quiet.json"),
        path=f"/v1/models/{NAME}:predict",
        body=_instances,
    )  # fmt: skip


def _litserve(name: str, engine: Engine) -> Service:
    return Service(
        name, "litserve", engine, ("{bin}/python", "-m", f"{_PEERS}.litserve_app", "{port}")
    )


def _mlserver(name: str, engine: Engine) -> Service:
    return Service(
        name,
        "mlserver",
        engine,
        ("{bin}/mlserver", "start", f"{{folder}}/mlserver-{engine}"),
        environment="mlserver",
        path=f"/v2/models/{NAME}/infer",
        body=_two_tensors if engine == "onnx" else _tensors,
        read=_flat,
        variables={"MLSERVER_HTTP_PORT": "{port}", "MLSERVER_GRPC_PORT": "{port2}"},
        prepare=("{bin}/python", "-m", f"{_PEERS}.mlserver_app"),
    )


def _ray(name: str, engine: Engine) -> Service:
    return Service(
        name,
        "ray",
        engine,
        ("{bin}/python", "-m", f"{_PEERS}.ray_app", "{port}"),
        # HAProxy, which comes with Ray, takes requests straight to the replica.
        variables={"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
    )


def _mlflow(name: str, engine: Engine) -> Service:
    return Service(
        name,
        "mlflow",
        engine,
        ("{bin}/mlflow", "models", "serve", "-m", f"{{folder}}/mlflow-{engine}",
         "--env-manager", "local", "--workers", "1", "--port", "{port}"),
        path="/invocations",
        body=_named if engine == "onnx" else _split,
        read=_by_output if engine == "onnx" else _rows,
        prepare=("{bin}/python", "-m", f"{_PEERS}.mlflow_model"),
    )  # fmt: skip


SERVICES: dict[str, Service] = {
    service.name: service
    for service in (
        Service(
            ECHO, "uvicorn", "", (*_UVICORN, "--lifespan", "off", "benchmarks.serving.echo:app"),
            environment="", read=None,
        ),
        Service(
            OURS, "driftmill", "onnx",
            ("{bin}/python", "-m", "services.tabular", "--model", NAME, "--port", "{port}"),
            environment="", read=_ours,
        ),
        _fastapi("fastapi inline, onnx", "onnx", BENCH_INLINE="1"),
        _fastapi("fastapi, onnx", "onnx"),
        _kserve("kserve, onnx", "onnx"),
        _bentoml("bentoml inline, onnx", "onnx"),
        _bentoml("bentoml, onnx", "onnx"),
        _bentoml("bentoml batchable, onnx", "onnx"),
        _litserve("litserve, onnx", "onnx"),
        _mlserver("mlserver, onnx", "onnx"),
        _ray("ray serve, onnx", "onnx"),
        _mlflow("mlflow, onnx", "onnx"),
        _fastapi("fastapi, scikit-learn", "scikit-learn"),
        _kserve("kserve, scikit-learn", "scikit-learn"),
        _bentoml("bentoml, scikit-learn", "scikit-learn"),
        _bentoml("bentoml batchable, scikit-learn", "scikit-learn"),
        _litserve("litserve, scikit-learn", "scikit-learn"),
        _mlserver("mlserver, scikit-learn", "scikit-learn"),
        _ray("ray serve, scikit-learn", "scikit-learn"),
        _mlflow("mlflow, scikit-learn", "scikit-learn"),
    )
}  # fmt: skip


def default_environments() -> Path:
    """Where environments are kept unless told otherwise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "driftmill-benchmarks"


def programs(service: Service, environments: Path) -> Path:
    """The folder of the programs of a service's environment."""
    if not service.environment:
        return Path(sys.executable).parent
    return environments / service.environment / "bin"


def build(name: str, environments: Path) -> None:
    """Make an environment, unless it is there with these versions.

    Raises:
        subprocess.CalledProcessError: it could not be made; what uv said is its `stderr`.
    """
    wanted = "\n".join(ENVIRONMENTS[name]) + "\n"
    folder = environments / name
    listed = folder / "requirements.txt"
    if listed.exists() and listed.read_text() == wanted:
        return
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv"
    python = folder / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *ENVIRONMENTS[name]],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)
    listed.write_text(wanted)
