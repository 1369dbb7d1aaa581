"""Keys and passwords are in the environment of a process, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from driftmill import bundle, contract, rollout, runs
from driftmill.data import sources
from driftmill.data.schema import DataError
from driftmill.store import Store
from tests.conftest import MOTO_KEY, tiny_frame
from tests.pipelines.contracts import write_contract

PASSWORD = "password-of-the-tests"
SECRETS = (*MOTO_KEY, PASSWORD)


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "source", f"s3://me:{PASSWORD}@bucket/a.csv"),
        ("tracking", "uri", f"https://me:{PASSWORD}@mlflow.example.org"),
    ],
)
def test_a_contract_holds_none(tiny: contract.Contract, section: str, key: str, value: str) -> None:
    values = json.loads(tiny.to_json())
    values[section] = {**values[section], key: value}
    with pytest.raises(contract.ContractError, match="put them into the environment") as caught:
        contract.parse(json.dumps(values))
    assert not leaks(str(caught.value))


@pytest.mark.slow
def test_a_run_on_s3_keeps_them_out_of_package_logs_and_store(s3_moto: str, tmp_path: Path) -> None:
    """Train, judge and promote with all state on S3, in the processes that a user would start."""
    written = write_contract(tmp_path)
    place = tmp_path / "home"
    environment = {
        **os.environ,
        "DRIFTMILL_HOME": str(place),
        "DRIFTMILL_STORE": s3_moto,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    }

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert not leaks(done.stdout + done.stderr)

    package = str(tmp_path / "build")
    run("pipelines.compile", str(written), "-o", package, "--store", s3_moto)
    run("pipelines.run", "--contract", str(written), "--run-id", "r1", "--verbose", "--keep")

    store = Store(s3_moto)
    outcome = runs.read(store, "tiny", "r1")
    assert outcome is not None
    assert outcome.state == "promoted"
    now = rollout.read(store, "tiny")
    assert now is not None
    assert bundle.fetch(store, "tiny", now.champion, tmp_path / "cache").version == outcome.version
    files = [p for folder in (place, Path(package)) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 5
    for file in files:
        assert not leaks(file.read_bytes().decode(errors="replace")), file
    for key in store.list(""):
        assert not leaks(store.read(key).decode(errors="replace")), key


def test_a_table_comes_from_s3(
    s3_uri: str, tiny: contract.Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTMILL_CACHE", str(tmp_path))
    Store(s3_uri).write("in/rows.csv", tiny_frame(20).to_csv(index=False).encode())
    source = contract.Source(uri=f"{s3_uri}/in/rows.csv")
    assert len(sources.load(source, tiny)) == 20
    with pytest.raises(DataError, match=r"other\.csv does not exist"):
        sources.load(contract.Source(uri=f"{s3_uri}/in/other.csv"), tiny)
    with pytest.raises(DataError, match="there is no bucket no-such-bucket"):
        sources.load(contract.Source(uri="s3://no-such-bucket/rows.csv"), tiny)
