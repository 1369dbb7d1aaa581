"""Seconds to build the images, and how large they are: `python -m benchmarks.images [NAME …]`.

Each is built from scratch (no layer of an earlier build is used; packages that were downloaded
before are), and once more after a line of the code has changed. The sizes are that on a disk and
that of the compressed layers, which is what travels. Prints a table and writes
`benchmarks/results/images.json`. Needs Docker; the environment says what to build on and by which
network, as for `driftmill images build`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from driftmill import images
from driftmill.home import cores
from driftmill.images import IMAGES

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "images.json"
#: What is measured without names: PyTorch is gigabytes.
USUAL = [name for name in IMAGES if not name.startswith("python-vision")]
#: Seconds that a build may take after one line has changed.
GOAL = 15
BUILD = """
import json, sys
from dataclasses import asdict
from driftmill import images
print(json.dumps(asdict(images.build(sys.argv[1], force=sys.argv[2] == "force"))))
"""


def build(root: Path, name: str, how: str) -> dict[str, Any]:
    """Build an image of the sources at `root`."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, name, how],
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "DRIFTMILL_IMAGE_PREFIX": "driftmill-benchmark"},
        stdout=subprocess.PIPE,
        text=True,
    )
    built: dict[str, Any] = json.loads(done.stdout)
    return built


def compressed(reference: str) -> int:
    """Bytes of an image's layers, compressed as a registry keeps them."""
    total = 0
    with subprocess.Popen([images.client(), "save", reference], stdout=subprocess.PIPE) as saved:
        assert saved.stdout is not None
        press = zlib.compressobj(6)
        while chunk := saved.stdout.read(1 << 20):
            total += len(press.compress(chunk))
        total += len(press.flush())
    return total


def measure(root: Path, name: str) -> dict[str, Any]:
    """Seconds and sizes of one image."""
    first = build(root, name, "force")
    with (root / "driftmill" / "steps.py").open("a") as file:
        file.write(f"# changed for {name}\n")
    second = build(root, name, "")
    found = {
        "name": name,
        "from_scratch_s": round(first["seconds"], 1),
        "after_a_line_s": round(second["seconds"], 1),
        "mb": round(first["bytes"] / 1e6),
        "compressed_mb": round(compressed(first["reference"]) / 1e6),
    }
    for built in (first, second):
        subprocess.run(
            [images.client(), "rmi", built["reference"]], check=True, stdout=subprocess.DEVNULL
        )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(IMAGES))
    names = parser.parse_args().names or USUAL
    if unknown := [name for name in names if name not in IMAGES]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(IMAGES)}")
    found = []
    print(f"{'image':<20}{'from scratch':>14}{'after a line':>14}{'size':>10}{'compressed':>12}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "clone"
        for path in {path for name in names for path in images.files(IMAGES[name], ROOT)}:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, root / path)
        (root / "components").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "components/Dockerfile", root / "components/Dockerfile")
        for name in names:
            row = measure(root, name)
            found.append(row)
            print(
                f"{name:<20}{row['from_scratch_s']:>12.1f} s{row['after_a_line_s']:>12.1f} s"
                f"{row['mb']:>7} MB{row['compressed_mb']:>9} MB",
                flush=True,
            )
            write(found)


def write(found: list[dict[str, Any]]) -> None:
    """Keep what has been measured so far."""
    result = {
        "machine": f"{platform.machine()}, {cores()} cores",
        "base": os.environ.get("DRIFTMILL_BASE_IMAGE") or "as pinned",
        "goal_after_a_line_s": GOAL,
        "images": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
