"""The package for a cluster: complete, placed as the contract says, and always the same.

The packages in `golden/` are what two contracts compile to. Where a change of them is meant:

    DRIFTMILL_GOLDEN=write python -m pytest tests/pipelines/test_compile.py -k golden

and look at `git diff tests/pipelines/golden`.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill import home
from driftmill.contract import Contract, load, parse
from driftmill.monitor import rules
from driftmill.values import Values
from pipelines import compile as compiler
from tests.conftest import CONTRACT
from tests.pipelines.contracts import IMAGES, write_contract


@pytest.fixture
def images() -> Contract:
    return parse(IMAGES)


EXAMPLES = sorted(Path("examples").glob("*/contract.yaml"))
PLACED = {
    "cpu": "2",
    "memory": "4Gi",
    "gpu": 1,
    "node_selector": {"pool": "train"},
    "tolerations": [{"key": "gpu"}],
    "spot": True,
}
STEPS = ("prepare", "fit", "assemble", "judge", "promote", "record")
SPOT = ("driftmill/spot", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def compiled(contract: Contract, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The YAML documents of the package."""
    path = compiler.compile_package(contract, folder, store="s3://bucket/store", **options)
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def placed(contract: Contract, **resources: Any) -> Contract:
    values = json.loads(contract.to_json())
    values["train"]["resources"] = resources or PLACED
    return Contract.model_validate(values)


def pod_settings(contract: Contract, folder: Path) -> dict[str, dict[str, Any]]:
    """What the platform spec says of the pods of each step."""
    _, platform = compiled(contract, folder)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): settings for name, settings in executors.items()}


def containers(contract: Contract, folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """What the pipeline spec says of the container of each step."""
    spec, _ = compiled(contract, folder, **options)
    executors = spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): e["container"] for name, e in executors.items()}


def fit_settings(contract: Contract, folder: Path) -> dict[str, Any]:
    """What the platform spec says of where the fit steps may run; of others it says nothing."""
    settings = pod_settings(contract, folder)
    everywhere = set(settings["judge"])
    assert all(set(settings[name]) == everywhere for name in STEPS if name != "fit")
    return {k: v for k, v in settings["fit"].items() if k not in everywhere}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_an_example_compiles_to_what_kfp_reads(path: Path, tmp_path: Path) -> None:
    from kfp import components

    assert compiler.main([str(path), "-o", str(tmp_path), "--store", "s3://b/s"]) == 0
    package = tmp_path / "pipeline.yaml"
    assert parse((tmp_path / "contract.json").read_text()) == load(path)
    assert package.stat().st_size <= compiler.MAX_BYTES
    loaded = components.load_component_from_file(str(package))
    assert set(loaded.component_spec.inputs) == {
        "contract", "store", "run_id", "trigger", "code_version",
    }  # fmt: skip


def test_the_same_contract_gives_the_same_bytes(tiny: Contract, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        compiler.compile_package(placed(tiny), tmp_path / folder, store="s3://b")
    one, two = ((tmp_path / f / "pipeline.yaml").read_bytes() for f in ("a", "b"))
    assert one == two


def test_defaults_let_the_package_run_as_it_is(tiny: Contract, tmp_path: Path) -> None:
    spec, _ = compiled(tiny, tmp_path)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert all("defaultValue" in p for p in parameters.values())
    assert parse(parameters["contract"]["defaultValue"]) == tiny
    assert parameters["store"]["defaultValue"] == "s3://bucket/store"


def test_families_are_the_contracts(tiny: Contract, tmp_path: Path) -> None:
    text = compiler.compile_package(tiny, tmp_path, store="s3://b").read_text()
    assert json.dumps(list(tiny.train.candidates)) in text


def test_training_goes_where_the_contract_says(tiny: Contract, tmp_path: Path) -> None:
    found = containers(placed(tiny), tmp_path)
    resources = {name: container["resources"] for name, container in found.items()}
    fit = resources["fit"]
    assert fit["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert (fit["resourceCpuRequest"], fit["resourceMemoryLimit"]) == ("2", "4Gi")
    assert "accelerator" not in resources["judge"]
    assert resources["promote"]["resourceCpuRequest"] == "100m"
    settings = fit_settings(placed(tiny), tmp_path)
    assert settings["nodeSelector"] == {"labels": {"pool": "train"}}
    keys = [t["key"] for t in settings["tolerations"]]
    assert keys == ["gpu", "nvidia.com/gpu", *SPOT]


def test_a_gpu_brings_its_toleration_and_shared_memory(images: Contract, tmp_path: Path) -> None:
    settings = fit_settings(placed(images, gpu=1, shared_memory="8Gi"), tmp_path)
    tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert settings["tolerations"] == [tolerated]
    (volume,) = settings["emptyDirMounts"]
    assert (volume["mountPath"], volume["medium"]) == ("/dev/shm", "Memory")
    assert volume["sizeLimit"] == "8Gi"
    assert "nodeAffinity" not in settings


def test_a_toleration_of_the_contract_takes_the_place_of_the_usual_one(
    images: Contract, tmp_path: Path
) -> None:
    own = {"key": "nvidia.com/gpu", "operator": "Equal", "value": "team-a", "effect": "NoExecute"}
    assert fit_settings(placed(images, gpu=1, tolerations=[own]), tmp_path)["tolerations"] == [own]


def test_only_the_gpus_that_will_do(images: Contract, tmp_path: Path) -> None:
    products = ["NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-SXM4-80GB"]
    settings = fit_settings(placed(images, gpu=1, gpu_products=products), tmp_path)
    (affinity,) = settings["nodeAffinity"]
    assert affinity == {
        "matchExpressions": [
            {"key": "nvidia.com/gpu.product", "operator": "In", "values": products}
        ]
    }


def test_without_a_gpu_nothing_is_said_of_gpus(images: Contract, tmp_path: Path) -> None:
    asked = placed(images, gpu_products=["NVIDIA-L4"], shared_memory="8Gi", spot=True)
    settings = fit_settings(asked, tmp_path)
    assert set(settings) == {"tolerations"}
    assert [t["key"] for t in settings["tolerations"]] == list(SPOT)
    assert fit_settings(images, tmp_path) == {}


def test_the_image_goes_by_the_task(
    tiny: Contract, images: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(contract: Contract) -> dict[str, str]:
        found = containers(contract, tmp_path)
        return {name: c["image"].partition(":")[0] for name, c in found.items()}

    monkeypatch.delenv("DRIFTMILL_IMAGE", raising=False)
    monkeypatch.delenv("DRIFTMILL_IMAGE_PREFIX", raising=False)
    assert used(tiny) == dict.fromkeys(STEPS, "driftmill/python-tabular")
    assert used(placed(tiny, gpu=1)) == dict.fromkeys(STEPS, "driftmill/python-tabular")
    light = dict.fromkeys(STEPS, "driftmill/python-vision")
    assert used(images) == light
    # CUDA takes gigabytes: only where it is used.
    assert used(placed(images, gpu=1)) == {**light, "fit": "driftmill/python-vision-cuda"}
    monkeypatch.setenv("DRIFTMILL_IMAGE", "registry/python:1")
    assert used(placed(images, gpu=1)) == dict.fromkeys(STEPS, "registry/python")


def test_every_step_is_retried_and_none_is_cached(tiny: Contract, tmp_path: Path) -> None:
    image = "registry/driftmill-python@sha256:0"
    spec, _ = compiled(tiny, tmp_path, image=image)
    found = 0
    for component in [*spec["components"].values(), spec["root"]]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                found += 1
                assert task["retryPolicy"] == {
                    "maxRetryCount": 2,
                    "backoffDuration": "10s",
                    "backoffFactor": 2.0,
                    "backoffMaxDuration": "3600s",
                }
                assert not task["cachingOptions"].get("enableCache", False)
    assert found == len(STEPS)
    used = {c["image"] for c in containers(tiny, tmp_path, image=image).values()}
    assert used == {image}


def test_every_pod_is_labelled_and_has_no_more_rights_than_it_needs(
    images: Contract, tmp_path: Path
) -> None:
    settings = pod_settings(placed(images), tmp_path)
    assert set(settings) == set(STEPS)
    for step, pod in settings.items():
        assert pod["podMetadata"]["labels"] == {
            "app.kubernetes.io/part-of": "driftmill",
            "app.kubernetes.io/component": step,
            "driftmill/model": "small-digits",
        }
        # Texts: the platform spec writes 64-bit numbers so.
        user = {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}
        assert pod["securityContext"] == user
        assert pod["imagePullPolicy"] == "IfNotPresent"


def test_secrets_and_addresses_are_named_and_may_be_missing(tiny: Contract, tmp_path: Path) -> None:
    expected = {
        "driftmill": {
            "AWS_ENDPOINT_URL",
            "AWS_REGION",
            "DRIFTMILL_TRUSTED_KEYS",
            "MLFLOW_TRACKING_URI",
        },
        "driftmill-store": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "driftmill-tracking": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    }
    for step, pod in pod_settings(tiny, tmp_path).items():
        found = {}
        for reference in pod["secretAsEnv"]:
            assert all(k["secretKey"] == k["envVar"] for k in reference["keyToEnv"])
            found[reference["secretName"]] = {k["envVar"] for k in reference["keyToEnv"]}
        for reference in pod["configMapAsEnv"]:
            assert all(k["configMapKey"] == k["envVar"] for k in reference["keyToEnv"])
            found[reference["configMapName"]] = {k["envVar"] for k in reference["keyToEnv"]}
        signs = {"driftmill-signing": {"DRIFTMILL_SIGNING_KEY"}} if step == "promote" else {}
        assert found == expected | signs
        assert all(r["optional"] for r in [*pod["secretAsEnv"], *pod["configMapAsEnv"]])


def test_no_attempt_runs_for_ever(tiny: Contract, tmp_path: Path) -> None:
    def deadlines(contract: Contract) -> dict[str, int]:
        settings = pod_settings(contract, tmp_path)
        return {step: int(pod["activeDeadlineSeconds"]) for step, pod in settings.items()}

    day, hour = 86_400, 3600
    little = {"promote": hour, "record": hour}
    assert deadlines(tiny) == {**dict.fromkeys(STEPS, day), **little}
    assert deadlines(placed(tiny, timeout="90m")) == {**dict.fromkeys(STEPS, 5400), **little}
    assert deadlines(placed(tiny, timeout="10m")) == dict.fromkeys(STEPS, 600)


def test_what_takes_room_waits_in_the_queue(tiny: Contract, tmp_path: Path) -> None:
    def queued(contract: Contract) -> set[str]:
        settings = pod_settings(contract, tmp_path)
        labels = {step: pod["podMetadata"]["labels"] for step, pod in settings.items()}
        return {s for s in labels if labels[s].get("kueue.x-k8s.io/queue-name") == "team-a"}

    assert queued(tiny) == set()
    assert queued(placed(tiny, queue="team-a")) == {"prepare", "fit", "assemble", "judge"}


@pytest.mark.parametrize(
    ("cpu", "cores"), [("4", "4"), ("500m", "1"), ("2500m", "3"), ("1.5", "2")]
)
def test_a_step_has_no_more_threads_than_it_asks_for(
    cpu: str, cores: str, tiny: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = containers(placed(tiny, cpu=cpu), tmp_path)
    variables = {v["name"]: v["value"] for v in found["fit"]["env"]}
    assert variables == {"DRIFTMILL_CORES": cores, "OMP_NUM_THREADS": cores}
    assert "env" not in found["promote"]
    monkeypatch.setenv("DRIFTMILL_CORES", cores)
    assert home.cores() == int(cores)


def golden(name: str) -> Contract:
    """The contract of a golden package."""
    if name == "tabular":
        return parse(CONTRACT)
    values = yaml.safe_load(IMAGES)
    values["train"]["resources"] = {
        "cpu": "8", "memory": "32Gi", "gpu": 1, "gpu_products": ["NVIDIA-L4"], "spot": True,
        "shared_memory": "8Gi", "timeout": "6h", "queue": "team-a",
        "node_selector": {"pool": "train"},
        "tolerations": [{"key": "team", "operator": "Equal", "value": "a"}],
    }  # fmt: skip
    return parse(yaml.safe_dump(values))


@pytest.mark.parametrize("name", ["tabular", "vision-gpu"])
def test_packages_are_the_golden_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "code_version", lambda: "0.0.0")
    image = f"registry.example.com/driftmill/python-{name}@sha256:{64 * '0'}"
    path = compiler.compile_package(golden(name), tmp_path, store="s3://models/store", image=image)
    assert path.stat().st_size <= 200_000
    kept = Path(__file__).parent / "golden" / f"{name}.yaml"
    text = path.read_text()
    if os.environ.get("DRIFTMILL_GOLDEN") == "write":
        kept.write_text(text)
    difference = difflib.unified_diff(
        kept.read_text().splitlines(), text.splitlines(), "golden", "compiled", lineterm=""
    )
    found = "\n".join(line if len(line) < 200 else f"{line[:200]}…" for line in difference)
    assert not found, f"{kept.name} is another package; see the top of this file\n{found}"


def test_the_charts_values_hold_contract_and_rules(tmp_path: Path) -> None:
    contract = write_contract(tmp_path)
    for name in ("one", "two"):
        store = ["--store", "s3://models/shop"]
        assert compiler.main([str(contract), "-o", str(tmp_path / name), *store]) == 0
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    found = yaml.safe_load(one["values.yaml"])
    model = found["models"]["tiny"]
    # To the last byte: Helm would make other numbers of numbers.
    assert model["contract"].encode() == one["contract.json"]
    assert found["store"] == {"type": "s3", "uri": "s3://models/shop"}
    where = {"namespace": rules.NAMESPACE}
    assert model["rules"] == rules.rules(load(contract), where=where)["groups"]
    Values.model_validate(found)
    # Nothing is in it that the chart has as its default anyway.
    assert set(found) == {"models", "images", "store"}


def test_a_bad_contract_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: x")
    arguments = [str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    assert compiler.main(arguments) == 2
    assert "task: this field is needed" in capsys.readouterr().err


def test_a_folder_is_no_store_for_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIFTMILL_STORE", raising=False)
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path))
    assert compiler.main([str(EXAMPLES[0]), "--output", str(tmp_path)]) == 0
    assert "--store s3://" in capsys.readouterr().err
    assert load(EXAMPLES[0]).model


def test_files_of_this_machine_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_contract(tmp_path, rows=100)
    assert compiler.main([str(path), "-o", str(tmp_path / "build"), "--store", "s3://b"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"note: file://{tmp_path}/rows.csv is on this machine")
    assert said.count("\n") == 1


def test_a_package_that_is_too_large_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_BYTES", 10_000)
    assert compiler.main([str(EXAMPLES[0]), "-o", str(tmp_path), "--store", "s3://b"]) == 1
    assert "a cluster takes 10000: shorten the contract's lists" in capsys.readouterr().err
    assert not (tmp_path / "pipeline.yaml").exists()


def test_where_nothing_can_be_written_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "build"
    assert compiler.main([str(EXAMPLES[0]), "-o", str(folder), "--store", "s3://b"]) == 1
    assert f"cannot write below {folder}" in capsys.readouterr().err
