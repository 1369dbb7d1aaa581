"""The package for a cluster: complete, placed as the contract says, and always the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill.contract import Contract, load, parse
from pipelines import compile as compiler

EXAMPLES = sorted(Path("examples").glob("*/contract.yaml"))
PLACED = {
    "cpu": "2",
    "memory": "4Gi",
    "gpu": 1,
    "node_selector": {"pool": "train"},
    "tolerations": [{"key": "gpu"}],
    "spot": True,
}


def compiled(contract: Contract, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The YAML documents of the package."""
    path = compiler.compile_package(contract, folder, store="s3://bucket/store", **options)
    return list(yaml.safe_load_all(path.read_text()))


def placed(contract: Contract) -> Contract:
    values = json.loads(contract.to_json())
    values["train"]["resources"] = PLACED
    return Contract.model_validate(values)


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
    spec, platform = compiled(placed(tiny), tmp_path)
    executors = spec["deploymentSpec"]["executors"]
    resources = {name: e["container"]["resources"] for name, e in executors.items()}
    fit = resources["exec-fit"]
    assert fit["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert (fit["resourceCpuRequest"], fit["resourceMemoryLimit"]) == ("2", "4Gi")
    assert "accelerator" not in resources["exec-judge"]
    assert resources["exec-promote"]["resourceCpuRequest"] == "100m"
    (kubernetes,) = platform["platforms"].values()
    settings = kubernetes["deploymentSpec"]["executors"]
    assert set(settings) == {"exec-fit"}
    assert settings["exec-fit"]["nodeSelector"] == {"labels": {"pool": "train"}}
    keys = [t["key"] for t in settings["exec-fit"]["tolerations"]]
    assert keys == ["gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"]


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
