"""TrainJobs: what Kubeflow Trainer takes, only where several processes train, always the same."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from driftmill import bundle, steps
from driftmill.contract import Contract, parse
from driftmill.store import Store
from pipelines import compile as compiler
from pipelines import trainjob
from tests.pipelines.contracts import IMAGES
from tests.pipelines.test_compile import placed

NAMED = {"type": "string", "minLength": 1, "maxLength": 253}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?[A-Za-z]*$"},
}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def spec(inner: dict[str, Any]) -> dict[str, Any]:
    return closed(["spec"], spec=inner)


#: The fields that we use, as in manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml of
#: https://github.com/kubeflow/trainer, v2.3.0; pod fields as in Kubernetes' core/v1.
POD = closed(
    [],
    nodeSelector={"type": "object", "additionalProperties": {"type": "string"}},
    tolerations={
        "type": "array",
        "items": closed(
            [],
            key=NAMED,
            operator={"enum": ["Exists", "Equal"]},
            value={"type": "string"},
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        ),
    },
    affinity=closed([], nodeAffinity={"type": "object"}),
    volumes={
        "type": "array",
        "items": closed(
            ["name"],
            name=NAMED,
            emptyDir=closed([], medium={"enum": ["Memory"]}, sizeLimit={"type": "string"}),
        ),
    },
    containers={
        "type": "array",
        "items": closed(
            ["name"],
            name=NAMED,
            volumeMounts={
                "type": "array",
                "items": closed(["name", "mountPath"], name=NAMED, mountPath={"type": "string"}),
            },
        ),
    },
)
JOBS = {
    "type": "array",
    "maxItems": 100,
    "items": closed(["name"], name=NAMED, template=spec(closed(["template"], template=spec(POD)))),
}
TRAINJOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=closed(
        ["generateName"],
        generateName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?-$"},
        labels={"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
    ),
    spec=closed(
        ["runtimeRef"],
        runtimeRef=closed(["name"], name=NAMED),
        trainer=closed(
            [],
            image={"type": "string", "maxLength": 500},
            command={
                "type": "array",
                "maxItems": 128,
                "items": {"type": "string", "maxLength": 65536},
            },
            env={"type": "array", "items": closed(["name"], name=NAMED, valueFrom={})},
            numNodes={"type": "integer", "minimum": 1},
            numProcPerNode={"type": "integer", "minimum": 1},
            resourcesPerNode=closed([], requests=QUANTITIES, limits=QUANTITIES),
        ),
        runtimePatches={
            "type": "array",
            "maxItems": 16,
            "items": closed(
                ["manager"],
                manager={"type": "string", "pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"},
                trainingRuntimeSpec=closed(
                    [], template=closed([], spec=closed([], replicatedJobs=JOBS))
                ),
            ),
        },
    ),
)
EVERYTHING = {
    "cpu": "8",
    "memory": "64Gi",
    "gpu": 4,
    "nodes": 2,
    "gpu_products": ["NVIDIA-H100-80GB-HBM3"],
    "node_selector": {"pool": "train"},
    "tolerations": [
        {"key": "team", "operator": "Equal", "value": "a"},
        {"key": "x", "effect": None},
    ],
    "shared_memory": "16Gi",
    "spot": True,
    "queue": "team-a",
}


def jobs(contract: Contract, folder: Path) -> list[dict[str, Any]]:
    """The TrainJobs beside the package."""
    compiler.compile_package(contract, folder, store="s3://bucket/store")
    return list(yaml.safe_load_all((folder / "trainjob.yaml").read_text()))


@pytest.mark.parametrize("resources", [EVERYTHING, {"nodes": 2}, {"gpu": 2}], ids=str)
def test_it_is_what_kubeflow_trainer_takes(resources: dict[str, Any], tmp_path: Path) -> None:
    (job,) = jobs(placed(parse(IMAGES), **resources), tmp_path)
    jsonschema.Draft202012Validator(TRAINJOB).validate(job)
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == resources.get("nodes", 1)
    assert trainer["numProcPerNode"] == max(resources.get("gpu", 0), 1)
    gpus = trainer["resourcesPerNode"]["limits"].get("nvidia.com/gpu", 0)
    assert gpus == resources.get("gpu", 0)
    kind = "vision-cuda" if gpus else "vision"
    assert trainer["image"].startswith(f"driftmill/python-{kind}:")
    # Trainer refuses these: it sets them itself.
    assert not [e for e in trainer["env"] if e["name"].startswith("PET_")]


def test_it_reads_addresses_and_secrets_as_the_steps_do_and_waits_in_their_queue(
    tmp_path: Path,
) -> None:
    (job,) = jobs(placed(parse(IMAGES), **EVERYTHING), tmp_path)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    sources = {e["name"]: e["valueFrom"] for e in job["spec"]["trainer"]["env"]}
    address = {"name": "driftmill", "key": "AWS_ENDPOINT_URL", "optional": True}
    secret = {"name": "driftmill-store", "key": "AWS_SECRET_ACCESS_KEY", "optional": True}
    assert sources["AWS_ENDPOINT_URL"] == {"configMapKeyRef": address}
    assert sources["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": secret}


def test_its_pods_go_where_the_contract_says(tmp_path: Path) -> None:
    (job,) = jobs(placed(parse(IMAGES), **EVERYTHING), tmp_path)
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "train"}
    assert [t["key"] for t in pod["tolerations"]][:3] == ["team", "x", "nvidia.com/gpu"]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert "NVIDIA-H100-80GB-HBM3" in json.dumps(pod["affinity"])


def test_there_is_one_for_each_family_and_the_same_contract_gives_the_same_bytes(
    tmp_path: Path,
) -> None:
    contract = parse(IMAGES.replace("[mlp]", "[mlp, mobilenet-v3-small]") + "owner: a$(b)c\n")
    contract = placed(contract, nodes=2)
    one, two = jobs(contract, tmp_path / "a"), jobs(contract, tmp_path / "b")
    assert one == two
    texts = [(tmp_path / f / "trainjob.yaml").read_bytes() for f in ("a", "b")]
    assert texts[0] == texts[1]
    assert [j["metadata"]["labels"]["driftmill/family"] for j in one] == list(
        contract.train.candidates
    )
    command = one[1]["spec"]["trainer"]["command"]
    # As Kubernetes reads it: $$ is $, and $(NAME) is a variable.
    given = command[command.index("--contract") + 1].replace("$$", "$")
    assert parse(given) == contract
    variables = re.findall(r"(?<!\$)\$\((\w+)\)", " ".join(command))
    assert variables == ["DRIFTMILL_JOB"]
    assert variables == [e["name"] for e in one[1]["spec"]["trainer"]["env"]][:1]


def test_names_fit_into_those_of_pods(tmp_path: Path) -> None:
    long = placed(parse(IMAGES.replace("small-digits", "m" * 40)), nodes=2)
    names = {
        trainjob.build(long, family, store="s3://b", image="i")["metadata"]["generateName"]
        for family in ("mlp", "mobilenet-v3-small", "mobilenet-v3-large")
    }
    assert len(names) == 3
    # <name><5 random>-node-0-<index of two digits>
    assert all(len(name) + 5 + len("-node-0-99") <= 63 for name in names)


def test_where_one_process_trains_there_is_none(tiny: Contract, tmp_path: Path) -> None:
    jobs(placed(parse(IMAGES), nodes=2), tmp_path)
    for contract in (placed(parse(IMAGES), gpu=1), placed(tiny, gpu=2)):
        (tmp_path / "trainjob.yaml").write_text("of an earlier contract")
        compiler.compile_package(contract, tmp_path, store="s3://b")
        assert not (tmp_path / "trainjob.yaml").exists()


@pytest.mark.slow
def test_two_nodes_fit_together_and_the_pipeline_takes_the_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contract = placed(parse(IMAGES), nodes=2)
    store = Store(tmp_path / "store")
    job = trainjob.build(contract, "mlp", store=str(tmp_path / "store"), image="")
    port = free_port()
    nodes = [start(job, rank, tmp_path / f"node-{rank}", port) for rank in range(2)]
    for node in nodes:
        printed, _ = node.communicate(timeout=240)
        assert node.returncode == 0, printed
    assert store.list("small-digits/jobs") == []
    assert store.list("small-digits/checkpoints") == []

    run = (contract.to_json(), str(tmp_path / "store"), "r1")
    steps.prepare(*run, tmp_path / "data")
    steps.fit(*run, "mlp", tmp_path / "data", tmp_path / "fit")
    record = json.loads((tmp_path / "fit" / "fit.json").read_bytes())
    assert record["training"]["processes"] == 2
    steps.assemble(*run, tmp_path / "data", [tmp_path / "fit"], tmp_path / "bundle")
    assert bundle.load(tmp_path / "bundle", "small-digits").manifest.family == "mlp"

    # On other rows it is of no use.
    capfd.readouterr()
    other = placed(parse(IMAGES.replace("rows: 400", "rows: 300")), nodes=2)
    run = (other.to_json(), str(tmp_path / "store"), "r2")
    steps.prepare(*run, tmp_path / "other")
    steps.fit(*run, "mlp", tmp_path / "other", tmp_path / "alone")
    record = json.loads((tmp_path / "alone" / "fit.json").read_bytes())
    assert record["training"]["processes"] == 1
    assert "no TrainJob has fitted mlp on this data" in capfd.readouterr().out


def start(job: dict[str, Any], rank: int, folder: Path, port: int) -> subprocess.Popen[str]:
    """A pod of a TrainJob as a process here: its command, and the variables that Trainer sets."""
    folder.mkdir()
    trainer = job["spec"]["trainer"]
    name = f"{job['metadata']['generateName']}abcde"
    torchrun, *arguments = (
        a.replace("$(DRIFTMILL_JOB)", name).replace("$$", "$") for a in trainer["command"]
    )
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(torchrun)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        },
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
