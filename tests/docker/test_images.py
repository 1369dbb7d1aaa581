"""The images as they run on a cluster: no rights, nothing to write to but /tmp."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from driftmill import images, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.images import IMAGES
from driftmill.store import Store
from tests.pipelines.contracts import write_contract

MakeBundle = Callable[..., Manifest]
GetImage = Callable[[str], str]

ROOT = Path(__file__).parents[2]
#: How everything runs here: as a pod of the `restricted` level does, on a read-only file system.
CONFINED = ["--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
CONFINED += ["--security-opt", "no-new-privileges"]
#: Most that an image may take on a disk, in MB.
LIMITS = {"python-tabular": 700, "service-tabular": 300, "service-vision": 330}
#: What each has to import, and what it must not even hold.
IMPORTS = {
    "python-tabular": (
        "driftmill.steps driftmill.tracking driftmill.s3 mlflow.onnx sklearn pandera skl2onnx",
        "torch evidently bentoml sqlalchemy pip setuptools kubernetes",
    ),
    "python-vision": (
        "driftmill.steps driftmill.vision.job driftmill.s3 torchvision",
        "bentoml pip",
    ),
    "service-tabular": (
        "services.tabular driftmill.s3",
        "torch sklearn pandas scipy mlflow kfp evidently PIL pip setuptools",
    ),
    "service-vision": (
        "services.vision driftmill.s3 PIL.Image",
        "torch sklearn pandas scipy mlflow kfp evidently pip setuptools",
    ),
    "monitor": ("services.monitor driftmill.monitor.report driftmill.s3", "torch bentoml kfp pip"),
    "controller": (
        "services.controller pipelines.submit driftmill.s3 psycopg",
        "torch sklearn evidently bentoml pip setuptools",
    ),
}
NAMES = [name for name in IMAGES if name in IMPORTS]


def run(docker: str, *arguments: str) -> str:
    """What a container prints; the test fails with its output if it fails."""
    done = subprocess.run(
        [docker, "run", *CONFINED, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(docker: str, image: str, script: str) -> str:
    """What a Python script prints in an image."""
    return run(docker, "--network", "none", "--entrypoint", "python3", image, "-c", script)


@contextmanager
def serving(docker: str, *arguments: str, port: int, page: str) -> Iterator[str]:
    """A container whose page answers 200, and its URL; removed at the end."""
    name = f"driftmill-test-{uuid.uuid4().hex[:8]}"
    command = [docker, "run", "--detach", "--name", name, "--publish", f"127.0.0.1::{port}"]
    started = subprocess.run([*command, *CONFINED[1:], *arguments], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        published = subprocess.run(
            [docker, "port", name, str(port)], capture_output=True, text=True
        )
        url = f"http://{published.stdout.split()[0]}"
        deadline = time.monotonic() + 180
        while not _is_up(url + page):
            logs = subprocess.run([docker, "logs", name], capture_output=True, text=True)
            assert time.monotonic() < deadline, logs.stdout + logs.stderr
            time.sleep(0.2)
        yield url
    finally:
        subprocess.run([docker, "rm", "--force", name], capture_output=True)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_without_rights_and_holds_what_it_needs(
    docker: str, image: GetImage, name: str
) -> None:
    full = image(name)
    wanted, unwanted = IMPORTS[name]
    script = f"""
import importlib, importlib.util, json, os, pathlib, shutil, tempfile
for module in {wanted.split()!r}:
    importlib.import_module(module)
held = [m for m in {unwanted.split()!r} if importlib.util.find_spec(m) is not None]
tools = [t for t in ("pip", "uv", "gcc", "cc", "apt-get", "strip", "perl") if shutil.which(t)]
places = ("/", "/etc", "/opt/venv", "/opt/driftmill", "/var/tmp")
writable = [p for p in places if os.access(p, os.W_OK)]
caches = [p for p in ("/root/.cache", "/var/cache/apt", "/var/lib/apt") if os.path.exists(p)]
print(json.dumps({{"ids": [os.getuid(), os.getgid()], "held": held, "tools": tools,
    "writable": writable, "caches": caches, "tmp": os.access("/tmp", os.W_OK)}}))
"""
    found = json.loads(python(docker, full, script).splitlines()[-1])
    assert found == {
        "ids": [65532, 65532],
        "held": [],
        "tools": [],
        "writable": [],
        "caches": [],
        "tmp": True,
    }


def test_the_programs_that_were_left_work(docker: str, image: GetImage) -> None:
    script = "for p in /usr/bin/*; do case $p in */\\[) continue;; esac; "
    script += "timeout 9 $p --version </dev/null >/dev/null 2>/tmp/said; "
    script += 'if grep -q "error while loading" /tmp/said; then cat /tmp/said; fi; done; mktemp -d'
    output = run(docker, "--entrypoint", "sh", image("service-tabular"), "-c", script)
    assert output.startswith("/tmp/")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_says_what_it_is(docker: str, image: GetImage, name: str) -> None:
    found = images.inspect(image(name))
    assert found is not None
    settings = found["Config"]
    labels = {k.rpartition(".")[2]: v for k, v in settings["Labels"].items()}
    assert settings["User"] == "65532:65532"
    assert labels["title"].startswith("Driftmill: ")
    assert labels["licenses"] == "Apache-2.0"
    assert image(name).rpartition(":")[2].startswith(labels["version"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
    assert re.match(r"\d{4}-\d\d-\d\dT", labels["created"])
    variables = dict(v.split("=", 1) for v in settings["Env"])
    assert variables["DO_NOT_TRACK"] == "1"
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert bool(settings.get("Healthcheck")) == (not name.startswith("python-"))


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_an_image_is_small(docker: str, image: GetImage, name: str) -> None:
    found = images.inspect(image(name))
    assert found is not None
    assert found["Size"] / 1e6 <= LIMITS[name]


def test_a_compiled_step_runs_as_it_is(docker: str, image: GetImage, tmp_path: Path) -> None:
    """The very command that the compiler writes, with the arguments that Kubeflow gives it."""
    import yaml

    from driftmill import contract as contracts
    from pipelines.compile import compile_package

    contract = contracts.load(write_contract(tmp_path))
    package = compile_package(contract, tmp_path, store="file:///tmp/store")
    spec = next(yaml.safe_load_all(package.read_text()))
    container = spec["deploymentSpec"]["executors"]["exec-prepare"]["container"]
    parameters = spec["components"]["comp-prepare"]["inputDefinitions"]["parameters"]
    values = dict.fromkeys(parameters, "")
    values |= {"contract": contract.to_json(), "store": "file:///tmp/store", "run_id": "r1"}
    kinds = {"data": "Dataset", "rows": "Metrics"}
    outputs = {
        name: {
            "artifacts": [
                {
                    "name": name,
                    "type": {"schemaTitle": f"system.{kind}"},
                    "uri": f"/tmp/out/{name}",
                    "metadata": {},
                }
            ]
        }
        for name, kind in kinds.items()
    }
    message = {
        "inputs": {"parameterValues": values},
        "outputs": {"artifacts": outputs, "outputFile": "/tmp/out/executor_output.json"},
    }
    arguments = [a.replace("{{$}}", json.dumps(message)) for a in container["args"]]
    command = [*container["command"], *arguments]
    full = image("python-tabular")
    _let_all_read(tmp_path)
    wrapped = ["sh", "-c", '"$@" >&2; cat /tmp/out/executor_output.json', "sh", *command]
    mount = ["--network", "none", "--volume", f"{tmp_path}:{tmp_path}:ro"]
    output = json.loads(run(docker, *mount, full, *wrapped))
    assert output["artifacts"]["rows"]["artifacts"][0]["metadata"]["rows"] == 600


def test_the_serving_image_serves_a_bundle_of_a_mounted_store(
    docker: str, image: GetImage, store: Store, make_bundle: MakeBundle
) -> None:
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test")
    assert store.folder is not None
    _let_all_read(store.folder)
    full = image("service-tabular")
    mount = ["--volume", f"{store.folder}:/store", "--env", "DRIFTMILL_STORE=/store"]
    arguments = [*mount, "--env", "DRIFTMILL_MODEL=tiny", full]
    with serving(docker, *arguments, port=3000, page="/readyz") as url:
        record = {"amount": 700.0, "age": 41, "channel": "web"}
        answer = httpx.post(f"{url}/predict", json={"records": [record]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["prediction"] == "yes"
        assert answer.json()["version"] == version


def test_monitor_and_controller_answer(
    docker: str, image: GetImage, store: Store, tiny: Contract, tmp_path: Path
) -> None:
    contract, token = tmp_path / "contract.json", tmp_path / "token"
    contract.write_text(tiny.to_json())
    token.write_text("secret")
    assert store.folder is not None
    _let_all_read(store.folder)
    for path in (contract, token):
        path.chmod(0o644)
    mounts = [
        *("--volume", f"{store.folder}:/store", "--env", "DRIFTMILL_STORE=/store"),
        *("--volume", f"{contract}:/etc/driftmill/contract.yaml:ro"),
        *("--volume", f"{token}:/etc/driftmill/webhook-token:ro"),
    ]
    with serving(docker, *mounts, image("monitor"), port=3001, page="/livez") as url:
        assert "model_drift_detected" in httpx.get(f"{url}/metrics").text
    with serving(docker, *mounts, image("controller"), port=3002, page="/readyz") as url:
        assert httpx.get(f"{url}/decisions").json() == {"decisions": []}
        assert httpx.post(f"{url}/trigger", json={}).status_code == 401


def _let_all_read(folder: Path) -> None:
    """The user of the images is another than the one who made these files."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    for path in folder.parents:
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o005)


def test_a_build_sees_no_data_no_secrets_and_no_history(docker: str, tmp_path: Path) -> None:
    """An image of everything that `docker build .` sends holds what the images are made of, and
    nothing that somebody has left lying about."""
    clone = tmp_path / "clone"
    wanted = {path for image in IMAGES.values() for path in images.files(image, ROOT)}
    for path in [".dockerignore", "README.md", "Makefile", "tests/conftest.py", *wanted]:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, clone / path)
    planted = """.env .git/config .git/HEAD .venv/bin/python .driftmill/store/x data/rows.csv id_rsa
        secrets.yaml driftmill/.env driftmill/data/rows.csv driftmill/data/key.pem driftmill/id_rsa
        driftmill/secrets.yaml driftmill/__pycache__/cli.cpython-311.pyc services/token
        services/secrets.yaml components/.netrc examples/payments/rows.parquet build/pipeline.yaml
        pipelines/service-account.json k8s/kubeconfig"""
    for path in planted.split():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_text("SECRET")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    name = f"driftmill-test-context:{uuid.uuid4().hex[:8]}"
    command = [*images._builder(), "--quiet", "--tag", name]
    try:
        subprocess.run(
            [*command, "--file", str(tmp_path / "Dockerfile"), str(clone)],
            check=True,
            env={"DOCKER_BUILDKIT": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        saved = subprocess.run([docker, "save", name], check=True, capture_output=True).stdout
    finally:
        subprocess.run([docker, "rmi", "--force", name], capture_output=True)
    sent = _files_of_layers(saved)
    assert sent == {path for path in wanted if not path.endswith("Dockerfile")}


def _files_of_layers(saved: bytes) -> set[str]:
    """Files in all layers of an image as `docker save` gives it, in the old form or OCI's."""
    found: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(saved)) as archive:
        manifest: Any = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        for layer in manifest[0]["Layers"]:
            content = archive.extractfile(layer)
            assert content is not None
            with tarfile.open(fileobj=io.BytesIO(content.read())) as files:
                found |= {m.name for m in files.getmembers() if m.isfile()}
    return found
