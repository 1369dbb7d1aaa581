"""The package for a cluster: complete, placed as the contract says, and always the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill.contract import Contract, load, parse
from pipelines import compile as compiler
from tests.pipelines.contracts import IMAGES


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
SPOT = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def compiled(contract: Contract, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The YAML documents of the package."""
    path = compiler.compile_package(contract, folder, store="s3://bucket/store", **options)
    return list(yaml.safe_load_all(path.read_text()))


def placed(contract: Contract, **resources: Any) -> Contract:
    values = json.loads(contract.to_json())
    values["train"]["resources"] = resources or PLACED
    return Contract.model_validate(values)


def fit_settings(contract: Contract, folder: Path) -> dict[str, Any]:
    """What the platform spec says of the pods of the fit steps; of others it says nothing."""
    _, platform = compiled(contract, folder)
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(settings) == {"exec-fit"}
    fit: dict[str, Any] = settings["exec-fit"]
    return fit


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_an_example_compiles_to_what_kfp_reads(path: Path, tmp_path: Path) -> None:
    from kfp import components

    assert (
        compiler.main(["--contract", str(path), "--output", str(tmp_path), "--store", "s3://b/s"])
        == 0
    )
    package = tmp_path / "pipeline.yaml"
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
    (spec,) = compiled(tiny, tmp_path)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert all("defaultValue" in p for p in parameters.values())
    assert parse(parameters["contract"]["defaultValue"]) == tiny
    assert parameters["store"]["defaultValue"] == "s3://bucket/store"


def test_families_are_the_contracts(tiny: Contract, tmp_path: Path) -> None:
    text = compiler.compile_package(tiny, tmp_path, store="s3://b").read_text()
    assert json.dumps(list(tiny.train.candidates)) in text


def test_training_goes_where_the_contract_says(tiny: Contract, tmp_path: Path) -> None:
    spec, _ = compiled(placed(tiny), tmp_path)
    executors = spec["deploymentSpec"]["executors"]
    resources = {name: e["container"]["resources"] for name, e in executors.items()}
    fit = resources["exec-fit"]
    assert fit["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert (fit["resourceCpuRequest"], fit["resourceMemoryLimit"]) == ("2", "4Gi")
    assert "accelerator" not in resources["exec-judge"]
    assert resources["exec-promote"]["resourceCpuRequest"] == "100m"
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
    assert len(compiled(images, tmp_path)) == 1


def test_the_image_goes_by_the_task(
    tiny: Contract, images: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(contract: Contract) -> set[str]:
        executors = compiled(contract, tmp_path)[0]["deploymentSpec"]["executors"]
        return {e["container"]["image"].partition(":")[0] for e in executors.values()}

    monkeypatch.delenv("DRIFTMILL_IMAGE", raising=False)
    assert used(tiny) == {"driftmill/python-tabular"}
    assert used(images) == {"driftmill/python-vision"}
    monkeypatch.setenv("DRIFTMILL_IMAGE", "registry/python:1")
    assert used(images) == {"registry/python"}


def test_every_step_is_retried_and_none_is_cached(tiny: Contract, tmp_path: Path) -> None:
    (spec,) = compiled(tiny, tmp_path, image="registry/driftmill-python@sha256:0")
    found = 0
    for component in [*spec["components"].values(), spec["root"]]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                found += 1
                assert task["retryPolicy"]["maxRetryCount"] == 2
                assert not task["cachingOptions"].get("enableCache", False)
    assert found == 6
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry/driftmill-python@sha256:0"}


def test_a_bad_contract_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: x")
    arguments = ["--contract", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    assert compiler.main(arguments) == 2
    assert "task: this field is needed" in capsys.readouterr().err


def test_a_folder_is_no_store_for_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIFTMILL_STORE", raising=False)
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path))
    assert compiler.main(["--contract", str(EXAMPLES[0]), "--output", str(tmp_path)]) == 0
    assert "--store s3://" in capsys.readouterr().err
    assert load(EXAMPLES[0]).model
