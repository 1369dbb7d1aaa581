"""What is in an image, listed and signed by the real programs, in a registry of our own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "service-tabular"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Host and port of an empty registry."""
    command = [program("crane"), "registry", "serve", "--address", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"port (\d+)", process.stderr.readline())
            assert found, "no port was said"
            yield f"localhost:{found[1]}"
        finally:
            process.terminate()


def test_an_image_is_listed_pushed_and_signed_by_a_key(
    image: Callable[[str], str], registry: str, tmp_path: Path
) -> None:
    """`make sbom push sign COSIGN_KEY=…`: the list is signed as well, and names what is there."""
    syft, cosign = program("syft"), program("cosign")
    image(NAME)  # skips where it cannot be built
    environment = {
        **os.environ,
        "COSIGN_PASSWORD": "",
        "DRIFTMILL_IMAGE_PREFIX": f"{registry}/driftmill",
        "FAMILY": NAME,
        "PATH": os.pathsep.join([str(Path(syft).parent), os.environ["PATH"]]),
    }

    def run(*command: str, folder: Path = tmp_path) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(cosign, "generate-key-pair")
    there = Path(sys.prefix)
    make = ["make", f"VENV={there}", "-o", f"{there}/.has-dev"]
    said = run(*make, "push", "sign", f"COSIGN_KEY={tmp_path / 'cosign.key'}", folder=ROOT)
    (digest,) = set(re.findall(rf"{registry}/driftmill/{NAME}@sha256:[0-9a-f]{{64}}", said))

    by = ["--key", "cosign.pub", "--insecure-ignore-tlog=true"]
    assert digest.rpartition("@")[2] in run(cosign, "verify", *by, digest)
    # The envelope of the list is of in-toto, and what it vouches for is this image.
    attested = run(cosign, "verify-attestation", *by, "--type", "cyclonedx", digest)
    assert json.loads(attested.splitlines()[0])["payloadType"] == "application/vnd.in-toto+json"
    listed = json.loads((ROOT / f"build/sbom/{NAME}.cdx.json").read_bytes())
    names = {component["name"] for component in listed["components"]}
    assert {"driftmill", "onnxruntime", "bentoml", "libc6"} <= names
