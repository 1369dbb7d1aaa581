"""What steps in containers may see and do, and what is said where there are no containers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driftmill import contract as contracts
from driftmill.contract import Contract
from pipelines import containers
from tests.conftest import CONTRACT
from tests.pipelines.contracts import IMAGES, write_contract


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith((*containers._PASSED_ON, "DRIFTMILL_")):
            monkeypatch.delenv(name)


def settings(contract: Contract, store: str = "file:///store", tracking: str = "") -> Any:
    return containers.settings(contract, store, tracking, rootless=False)


def mounts(found: Any) -> dict[str, bool]:
    """Folders and files of this machine, and whether they may be written."""
    assert all(m["Source"] == m["Target"] and m["Type"] == "bind" for m in found["mounts"])
    return {m["Target"]: not m["ReadOnly"] for m in found["mounts"]}


def with_source(uri: str, text: str = CONTRACT) -> Contract:
    place = "sklearn:digits" if text == IMAGES else "sim:payments"
    return contracts.parse(text.replace(f"source: {place}", f"source: {uri}"))


def test_a_step_has_no_powers(tiny: Contract) -> None:
    found = settings(tiny)
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges"]
    assert found["read_only"]
    assert found["tmpfs"].keys() == {"/tmp"}
    assert found["network_mode"] == "none"
    assert found["user"] == f"{os.getuid()}:{os.getgid()}"


def test_a_step_computes_as_a_process_does(tiny: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("DRIFTMILL_CORES", "5")
    given = settings(tiny)["environment"]
    assert (given["OMP_NUM_THREADS"], given["OPENBLAS_CORETYPE"]) == ("3", "Haswell")
    assert given["DRIFTMILL_CORES"] == "5"


def test_rootless_docker_maps_the_user_to_root(tiny: Contract) -> None:
    found = containers.settings(tiny, "file:///store", "", rootless=True)
    assert (found["user"], found["group_add"]) == ("0:0", [])


def test_a_step_sees_the_store_and_the_contracts_file(tmp_path: Path) -> None:
    found = settings(contracts.load(write_contract(tmp_path)))
    assert mounts(found) == {"/store": True, str(tmp_path / "rows.csv"): False}


def test_a_file_that_is_not_there_is_not_mounted(tmp_path: Path) -> None:
    assert mounts(settings(with_source(f"file://{tmp_path}/rows.csv"))) == {"/store": True}


def test_of_the_data_sets_only_the_contracts_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "rows.csv"
    file.touch()
    uri = "{uri: https://example.org/rows.csv, dataset: mine, sha256: " + "ab" * 32 + "}"
    monkeypatch.setenv("DRIFTMILL_DATA", str(tmp_path))
    found = settings(with_source(uri))
    assert mounts(found) == {"/store": True, str(file): False}
    assert found["network_mode"] == "none"
    assert found["environment"]["DRIFTMILL_DATA"] == str(tmp_path)


def test_images_in_a_format_of_several_files(tmp_path: Path) -> None:
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "rows.parquet", "a.png")
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.touch()
    pair = settings(with_source(f"idx://{paths[0]}", IMAGES))
    assert mounts(pair) == {"/store": True, str(paths[0]): False, str(paths[1]): False}
    table = settings(with_source(f"file://{paths[2]}", IMAGES))
    assert mounts(table) == {"/store": True, str(tmp_path): False}
    folder = settings(with_source(f"folder://{tmp_path}", IMAGES))
    assert mounts(folder) == {"/store": True, str(tmp_path): False}


def test_a_download_has_a_network_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTMILL_CACHE", str(tmp_path / "cache"))
    found = settings(with_source("openml:1590"))
    assert found["network_mode"] == "bridge"
    assert mounts(found) == {"/store": True, str(tmp_path / "cache"): True}


@pytest.mark.parametrize(
    ("endpoint", "network"),
    [
        ("http://127.0.0.1:9000", "host"),
        ("http://localhost:9000", "host"),
        ("http://[::1]:9000", "host"),
        ("https://s3.example.org", "bridge"),
    ],
)
def test_a_store_in_a_bucket(
    tiny: Contract, endpoint: str, network: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authorities = tmp_path / "ca.pem"
    authorities.touch()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authorities))
    monkeypatch.setenv("SOME_TOKEN", "secret")
    found = settings(tiny, "s3://bucket/prefix")
    assert found["network_mode"] == network
    assert found["environment"]["AWS_ENDPOINT_URL"] == endpoint
    assert mounts(found) == {str(authorities): False}
    assert "SOME_TOKEN" not in found["environment"]
    # Without a network nothing of it is passed on.
    assert "AWS_ENDPOINT_URL" not in settings(tiny)["environment"]


@pytest.mark.parametrize(
    ("tracking", "network", "given"),
    [
        ("", "none", "none"),
        ("sqlite:////home/me/.driftmill/mlflow.db", "none", "none"),
        ("http://127.0.0.1:5000", "host", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org", "bridge", "https://mlflow.example.org"),
    ],
)
def test_tracking(tiny: Contract, tracking: str, network: str, given: str) -> None:
    found = settings(tiny, tracking=tracking)
    assert found["network_mode"] == network
    assert found["environment"]["MLFLOW_TRACKING_URI"] == given


def test_lines_come_whole() -> None:
    def pieces() -> Iterator[bytes]:
        yield from (b"one\ntw", "o \u00e9".encode()[:-1], "\u00e9".encode()[-1:] + b"\n", b"three")

    assert list(containers._lines(pieces())) == ["one\n", "two \u00e9\n", "three\n"]


def test_the_lock_lasts_as_long_as_the_run(tmp_path: Path) -> None:
    assert not containers._is_locked(tmp_path / containers.LOCK)
    held = containers.lock(tmp_path)
    assert containers._is_locked(tmp_path / containers.LOCK)
    os.close(held)
    assert not containers._is_locked(tmp_path / containers.LOCK)


def refused(contract: Path, code: str) -> str:
    """What `pipelines.run --runner docker` says when it does not start."""
    done = subprocess.run(
        [sys.executable, "-c", code, "--contract", str(contract), "--runner", "docker"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


RUN = "import sys; from pipelines import run; sys.exit(run.main())"


def test_no_docker_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere.sock")
    monkeypatch.setenv("DRIFTMILL_HOME", str(tmp_path / "home"))
    said = refused(write_contract(tmp_path), RUN)
    assert said == (
        "no Docker daemon answers; start Docker, or name its socket by DOCKER_HOST "
        "(docker context ls shows it)\n"
    )
    assert not (tmp_path / "home").exists()


def test_no_docker_package(tmp_path: Path) -> None:
    said = refused(write_contract(tmp_path), "import sys; sys.modules['docker'] = None; " + RUN)
    assert said == "this needs the package docker; pip install 'driftmill[cluster]'\n"
