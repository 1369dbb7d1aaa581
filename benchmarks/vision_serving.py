"""Images a second and latency of three services: `python -m benchmarks.vision_serving`.

A ResNet-18 on photographs (JPEG, 320x240, seen as 224x224x3) and a small CNN on digits (PNG,
28x28x1), random weights, served by

- `driftmill`: `python -m services.vision` as shipped: inference log with images, and metrics
- `bentoml + torch`: `bentoml serve` with a PyTorch model (`benchmarks/peers/bentoml_torch.py`)
- `fastapi + onnxruntime`: uvicorn and ONNX Runtime (`benchmarks/peers/fastapi_onnx.py`)

Each gets the same forms with one file, from `wrk` where it is installed (Debian: `apt-get install
wrk`) and else from httpx, which is slower than the services. First the answers are compared; then
rounds at 1, 16 and 64 connections are interleaved, and their medians taken. At the end our log must
hold a row for every answer. Prints a table and writes `benchmarks/results/vision_serving.json`.

    python -m benchmarks.vision_serving --rounds 1 --seconds 1      # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import PIL.Image
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks import models, wrk
from benchmarks.rollouts import free_port
from driftmill import bundle, contract, features, rollout
from driftmill.contract import Contract
from driftmill.home import cores
from driftmill.store import Store
from driftmill.vision import export, images, nets

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "vision_serving.json"
OURS = "driftmill"
SERVICES = {
    OURS: ["-m", "services.vision", "--model", "bench", "--port", "{port}"],
    "bentoml + torch": [
        "-m", "bentoml", "serve", "benchmarks.peers.bentoml_torch:Service",
        "--host", "127.0.0.1", "--port", "{port}",
    ],
    "fastapi + onnxruntime": [
        "-m", "uvicorn", "benchmarks.peers.fastapi_onnx:app",
        "--port", "{port}", "--no-access-log", "--log-level", "warning",
    ],
}  # fmt: skip
CONNECTIONS = (1, 16, 64)
#: Different pictures that are sent in turn.
PICTURES = 16
#: The same answer to the same picture: probabilities differ by no more than this.
TOLERANCE = 1e-3
BOUNDARY = "picture"

# One body after the other.
WRK = """
local bodies = {}
for i = 1, %d do
  local file = io.open(string.format("%s/%%d.body", i), "rb")
  bodies[i] = file:read("*a")
  file:close()
end
local turn = 0
wrk.headers["Content-Type"] = "multipart/form-data; boundary=%s"
request = function()
  turn = turn %% #bodies + 1
  return wrk.format("POST", "/predict", nil, bodies[turn])
end
"""


@dataclass(frozen=True)
class Case:
    """A network and the pictures that it is asked about."""

    name: str
    family: str
    image: dict[str, Any]
    size: tuple[int, int]
    """Width and height of the files."""
    format: str
    labels: int


CASES = (
    Case("resnet18", "resnet18", {"size": 224, "channels": 3}, (320, 240), "jpeg", 100),
    Case("small-cnn", "small-cnn", {"size": 28, "channels": 1}, (28, 28), "png", 10),
)


def pictures(case: Case) -> list[bytes]:
    """Files of smooth shapes with some grain, about as large as photographs are."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(PICTURES):
        shapes = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(PIL.Image.fromarray(shapes).resize(case.size, 3), np.float64)
        pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        picture = PIL.Image.fromarray(pixels)
        if case.image["channels"] == 1:
            picture = picture.convert("L")
        buffer = io.BytesIO()
        picture.save(buffer, case.format)
        files.append(buffer.getvalue())
    return files


def publish(case: Case, folder: Path, files: list[bytes]) -> Contract:
    """Make the network, its bundle in `folder/store`, and what the peers need."""
    labels = [f"label-{i}" for i in range(case.labels)]
    values = {
        "apiVersion": "driftmill/v1",
        "model": "bench",
        "task": "image-classification",
        "data": {
            "source": "file:none.parquet",
            "target": {"name": "label", "labels": labels},
            "image": case.image,
        },
        "train": {"candidates": [case.family]},
        "tracking": "none",
    }
    of = contract.parse(json.dumps(values))
    spec = of.data.image
    assert spec is not None
    net = nets.build(case.family, spec, case.labels)
    net.eval()
    export.to_onnx(net, folder / "model.onnx")
    save_file(net.state_dict(), folder / "weights.safetensors")
    (folder / "contract.json").write_text(of.to_json())

    decoded = [images.decode(file, spec) for file in files]
    pixels = np.stack([d.pixels for d in decoded])
    sizes = np.array([(d.width, d.height) for d in decoded])
    rows = pd.DataFrame(
        {**images.statistics(pixels, sizes), "label": labels[0]}
        | {features.IMAGE: images.column(pixels, len(pixels))}
    )
    manifest = bundle.write(
        folder / "bundle",
        contract=of,
        signature=features.signature(of, rows),
        model=folder / "model.onnx",
        reference=rows,
        examples=rows.head(4),
        family=case.family,
        params={},
        data={"fingerprint": "0" * 64},
    )
    store = Store(folder / "store")
    store.put_folder(folder / "bundle", bundle.key("bench", manifest.version), bundle.MANIFEST)
    rollout.change(store, "bench", champion=manifest.version, by="benchmark")
    return of


@contextmanager
def serving(name: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A service that is ready; its URL and its process."""
    port = free_port()
    output = folder / f"{name}.log"
    environment = os.environ | {
        "BENCH_FOLDER": str(folder),
        "DRIFTMILL_HOME": str(folder),
        "DRIFTMILL_STORE": (folder / "store").as_uri(),
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "DO_NOT_TRACK": "1",
    }
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *(part.format(port=port) for part in SERVICES[name])],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{name} does not start:\n{output.read_text()}")
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def form(file: bytes) -> bytes:
    """A form with one file."""
    head = 'Content-Disposition: form-data; name="image"; filename="picture"'
    return b"--%b\r\n%b\r\n\r\n%b\r\n--%b--\r\n" % (
        BOUNDARY.encode(), head.encode(), file, BOUNDARY.encode(),
    )  # fmt: skip


HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def compare(urls: dict[str, str], files: list[bytes]) -> float:
    """The largest difference between the probabilities that the services answer."""
    answers: dict[str, Any] = {}
    for name, url in urls.items():
        found = []
        for file in files:
            response = httpx.post(
                f"{url}/predict", content=form(file), headers=HEADERS, timeout=60
            ).raise_for_status()
            body = response.json()
            prediction = body["predictions"][0] if name == OURS else body
            found.append(list(prediction["probabilities"].values()))
        answers[name] = np.array(found)
    largest = max(float(np.abs(a - answers[OURS]).max()) for a in answers.values())
    if largest > TOLERANCE:
        raise SystemExit(f"the services answer differently: {largest:.2g} > {TOLERANCE}")
    return largest


@dataclass
class Load:
    """What one round measured."""

    answers: int
    seconds: float
    p50: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""
    failed: int
    cpu: float = 0.0
    """Milliseconds of processor time that the service took for an answer."""


def processor_seconds(process: psutil.Process) -> float:
    """What a service has used, its children included."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def by_httpx(url: str, bodies: list[bytes], connections: int, seconds: float) -> Load:
    """A round with httpx, where there is no wrk."""
    took: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds
    started = time.perf_counter()
    limits = httpx.Limits(max_connections=connections)

    async def client_loop(client: httpx.AsyncClient, turn: int) -> None:
        nonlocal failed
        while (start := time.perf_counter()) < end:
            turn += 1
            response = await client.post(
                "/predict", content=bodies[turn % len(bodies)], headers=HEADERS
            )
            took.append((time.perf_counter() - start) * 1e3)
            failed += response.status_code != 200

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
        await asyncio.gather(*(client_loop(client, i) for i in range(connections)))
    p50, p99 = np.percentile(took, (50, 99))
    return Load(len(took), time.perf_counter() - started, float(p50), float(p99), failed)


def measure(case: Case, rounds: int, seconds: float, say: Any) -> dict[str, Any]:
    """All rounds of one network."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        files = pictures(case)
        say(f"{case.name}: export")
        publish(case, folder, files)
        bodies = [form(file) for file in files]
        for i, body in enumerate(bodies, start=1):
            (folder / f"{i}.body").write_bytes(body)
        (folder / "load.lua").write_text(WRK % (len(bodies), folder, BOUNDARY) + wrk.DONE)
        program = shutil.which("wrk")

        def one(name: str, connections: int, length: float) -> Load:
            url, process = running[name]
            before = processor_seconds(process)
            if program is not None:
                found = wrk.run(program, folder / "load.lua", url, connections, length)
                load = Load(*(found[n] for n in ("answers", "seconds", "p50", "p99", "failed")))
            else:
                load = asyncio.run(by_httpx(url, bodies, connections, length))
            load.cpu = (processor_seconds(process) - before) * 1e3 / max(load.answers, 1)
            return load

        say(f"{case.name}: the services start")
        running = {name: stack.enter_context(serving(name, folder)) for name in SERVICES}
        difference = compare({name: url for name, (url, _) in running.items()}, files)
        answered = len(files)
        for name in SERVICES:
            warm = one(name, 4, 1)
            answered += warm.answers if name == OURS else 0
        found: dict[tuple[str, int], list[Load]] = {}
        for number in range(rounds):
            for connections in CONNECTIONS:
                for name in SERVICES:
                    say(f"{case.name}: round {number + 1}, {connections} connections, {name}")
                    load = one(name, connections, seconds)
                    found.setdefault((name, connections), []).append(load)
                    answered += load.answers - load.failed if name == OURS else 0
        stack.close()
        logged = models.logged(Store(folder / "store"), "bench")
        if logged < answered:
            raise SystemExit(f"{answered} answers and {logged} rows in the log")
    return {
        "network": case.name,
        "image": case.image,
        "files": f"{case.size[0]}x{case.size[1]} {case.format}",
        "bytes": round(statistics.mean(map(len, files))),
        "driver": "httpx" if program is None else "wrk",
        "largest_difference": difference,
        "log_rows": logged,
        "cells": [_cell(name, c, loads) for (name, c), loads in found.items()],
    }


def _cell(name: str, connections: int, loads: list[Load]) -> dict[str, Any]:
    return {
        "service": name,
        "connections": connections,
        "images_per_second": statistics.median(x.answers / x.seconds for x in loads),
        "p50_ms": statistics.median(x.p50 for x in loads),
        "p99_ms": statistics.median(x.p99 for x in loads),
        "cpu_ms": statistics.median(x.cpu for x in loads),
        "failed": sum(x.failed for x in loads),
        "rounds": [asdict(x) for x in loads],
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        title="images/s · p50 ms · p99 ms · ms of processor time an image; "
        f"driven by {results[0]['driver']}"
    )
    table.add_column("network")
    table.add_column("connections", justify="right")
    for name in SERVICES:
        table.add_column(name, justify="right")
        if name != OURS:
            table.add_column("ours is", justify="right")
    for result in results:
        cells = {(c["service"], c["connections"]): c for c in result["cells"]}
        for connections in CONNECTIONS:
            ours = cells[OURS, connections]["images_per_second"]
            row = [result["network"], str(connections)]
            for name in SERVICES:
                cell = cells[name, connections]
                speed = cell["images_per_second"]
                times = (cell["p50_ms"], cell["p99_ms"], cell["cpu_ms"])
                text = " · ".join([f"{speed:.0f}", *(f"{value:.1f}" for value in times)])
                row.append(text + (f" ({cell['failed']} failed)" if cell["failed"] else ""))
                if name != OURS:
                    row.append(f"{ours / speed:.1f} x" if speed else "-")
            table.add_row(*row)
    Console(width=130).print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each round (5)")
    parser.add_argument("--network", choices=[c.name for c in CASES], help="only this one")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    given = parser.parse_args()
    chosen = [c for c in CASES if given.network in (None, c.name)]
    with Console(stderr=True).status("…") as status:
        results = [measure(case, given.rounds, given.seconds, status.update) for case in chosen]
    show(results)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    packages = ("bentoml", "fastapi", "onnxruntime", "pillow", "torch", "uvicorn")
    report = {
        "machine": {
            "cores": cores(),
            "load_after": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "packages": {p: version(p) for p in packages},
        },
        "rounds": given.rounds,
        "seconds": given.seconds,
        "results": results,
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
