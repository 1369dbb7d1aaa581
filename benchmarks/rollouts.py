"""Requests that fail while services are replaced and versions promoted:
`python -m benchmarks.rollouts`.

On this machine, without options, two services stand behind a switch, which is to clients what a
cluster's network is: a new connection goes to a process in its list, and stays there. Clients that
keep their connections and try nothing twice send without pause, while each process is replaced by a
new one (SIGTERM first, and a moment later it leaves the list), a version is promoted, and the
former one is promoted again.

With `--context`, `--namespace` and `--release` it is a release of the chart in a cluster: a pod of
the service's image sends, while the Deployment is rolled, `--promote VERSION` is promoted, and with
`--drain-node` a node with a service is drained. What was changed is changed back.

Prints the counts and writes `benchmarks/results/rollouts.json`. Exit code 1 where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import models
from driftmill.home import cores

RESULT = Path(__file__).parent / "results" / "rollouts.json"
LOAD = Path(__file__).with_name("load.py")
MODEL = "payments"
#: Where a pod has the tokens of a service, as the service's own pods do.
TOKENS = "/etc/driftmill/tokens"
#: Seconds from SIGTERM until the switch knows, and between two operations.
LATE, APART = 0.5, 2.0
#: Seconds that anything may take.
PATIENCE = 300

Operation = tuple[str, Callable[[], None]]


class Switch:
    """Connections from one port to the ports in `to`, in turn, in a thread of its own."""

    def __init__(self) -> None:
        self.to: list[int] = []
        self.port = free_port()
        self._turn = 0
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()

    def _run(self, ready: threading.Event) -> None:
        import uvloop

        async def listen() -> None:
            server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
            ready.set()
            await server.serve_forever()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(listen())

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._turn += 1
        try:
            port = self.to[self._turn % len(self.to)]
            back, forth = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, forth), _copy(back, writer))


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            target.write(data)
    except OSError:
        pass  # the other direction ends, too
    finally:
        target.close()


def send(url: str, *options: str) -> subprocess.Popen[str]:
    """Start to send from this machine: `benchmarks/load.py` with some options."""
    command = [sys.executable, str(LOAD), url, *options]
    environment = os.environ | {"PYTHONPATH": "."}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def bundles(store: Path) -> list[str]:
    """Put a version of each family into a store; their names."""
    from driftmill import bundle
    from driftmill.store import Store

    versions = []
    with tempfile.TemporaryDirectory() as name:
        for family in models.FAMILIES:
            folder = Path(name, family)
            manifest, _ = models.write(family, folder)
            key = bundle.key(manifest.model, manifest.version)
            Store(store).put_folder(folder, key, bundle.MANIFEST)
            versions.append(manifest.version)
    return versions


class Laptop:
    """Services behind a switch on this machine."""

    def __init__(self, folder: Path, drain: float, services: int = 2) -> None:
        from driftmill.store import Store

        self.folder = folder
        self.drain = drain
        self.store = Store(folder / "store")
        self.old, self.new = bundles(folder / "store")
        self.promote(self.old)
        self.switch = Switch()
        self.running: list[tuple[subprocess.Popen[bytes], int]] = []
        for _ in range(services):
            self.running.append(self._start())
            self.switch.to.append(self.running[-1][1])

    def promote(self, version: str) -> None:
        """Let a version serve."""
        from driftmill import rollout

        rollout.change(self.store, MODEL, champion=version, by="benchmark", reason="measured")

    def replace(self) -> None:
        """Replace each process by a new one."""
        for old, port in list(self.running):
            new = self._start()
            self.running.append(new)
            self.switch.to = [*self.switch.to, new[1]]
            time.sleep(LATE)
            old.send_signal(signal.SIGTERM)
            time.sleep(LATE)
            self.switch.to = [p for p in self.switch.to if p != port]
            old.wait(PATIENCE)
            self.running.remove((old, port))

    def operations(self) -> list[Operation]:
        """What happens under load."""
        return [
            ("replacing both processes", self.replace),
            ("promotion", lambda: self.promote(self.new)),
            ("promotion back", lambda: self.promote(self.old)),
        ]

    def load(self, requests: int, connections: int) -> tuple[subprocess.Popen[str], list[str]]:
        """Start to send; the process, and the command that has it stop after the requests."""
        stop = self.folder / "stop"
        options = ["--requests", str(requests), "--connections", str(connections)]
        url = f"http://127.0.0.1:{self.switch.port}"
        return send(url, *options, "--until", str(stop)), ["touch", str(stop)]

    def close(self) -> None:
        """End the processes."""
        for process, _ in self.running:
            process.kill()
            process.wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        command = [sys.executable, "-m", "services.tabular", "--port", str(port)]
        home = {"DRIFTMILL_HOME": str(self.folder / str(port)), "DRIFTMILL_STORE": self.store.uri}
        process = subprocess.Popen(
            [*command, "--drain-seconds", str(self.drain)],
            env=os.environ | home | {"DRIFTMILL_MODEL": MODEL},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
            else:
                return process, port
        process.kill()
        sys.exit("a service did not become ready; run one by hand to see why")


class Cluster:
    """The services of a release."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.kubectl = ["kubectl", "--context", given.context, "--namespace", given.namespace]
        self.selector = (
            f"app.kubernetes.io/instance={given.release},app.kubernetes.io/component=service"
        )
        if given.model:
            self.selector += f",driftmill/model={given.model}"
        self.pods = self._names("pods")
        self.deployment = self._one("deployments")
        self.service = self._one("services")
        self.pod = f"{given.release}-load"
        self.call("delete", "pod", self.pod, "--ignore-not-found")
        self.call("apply", "--filename", "-", given=json.dumps(self._sender()))
        self.call("wait", "--for=condition=Ready", f"pod/{self.pod}", f"--timeout={PATIENCE}s")

    def call(self, *arguments: str, given: str | None = None) -> str:
        """Run kubectl; what it printed."""
        done = subprocess.run(
            [*self.kubectl, *arguments], input=given, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"kubectl {' '.join(arguments)} ended with exit code {done.returncode}")
        return done.stdout

    def roll(self) -> None:
        """Replace all pods, as an upgrade does."""
        self.call("rollout", "restart", f"deployment/{self.deployment}")
        self.call("rollout", "status", f"deployment/{self.deployment}", f"--timeout={PATIENCE}s")

    def promote(self, version: str) -> None:
        """Let a version serve, by the rollout document."""
        code = (
            "import os, sys; from driftmill import home, rollout; rollout.change(home.find().store,"
            " os.environ['DRIFTMILL_MODEL'], champion=sys.argv[1], by='benchmark', reason='load')"
        )
        self.call("exec", f"deployment/{self.deployment}", "--", "python3", "-c", code, version)

    def serving(self) -> str:
        """The version that serves."""
        code = (
            "import os; from driftmill import home, rollout;"
            " print(rollout.read(home.find().store, os.environ['DRIFTMILL_MODEL']).champion)"
        )
        return self.call(
            "exec", f"deployment/{self.deployment}", "--", "python3", "-c", code
        ).strip()

    def drain_node(self) -> None:
        """Drain a node that has a service and not the sender, and give it back."""
        own = self.call("get", "pod", self.pod, "-o", "jsonpath={.spec.nodeName}")
        listed = self.call(
            "get", "pods", "-l", self.selector, "-o", "jsonpath={.items[*].spec.nodeName}"
        )
        nodes = [node for node in listed.split() if node != own]
        if not nodes:
            sys.exit("every service runs beside the sender: add a node, or drain none")
        patience = f"--timeout={PATIENCE}s"
        try:
            self.call("drain", nodes[0], "--ignore-daemonsets", "--delete-emptydir-data", patience)
        finally:
            self.call("uncordon", nodes[0])
        self.call("rollout", "status", f"deployment/{self.deployment}", patience)

    def operations(self) -> list[Operation]:
        """What happens under load."""
        found: list[Operation] = [("rolling all pods", self.roll)]
        if version := self.given.promote:
            before = self.serving()
            found.append((f"promotion of {version}", lambda: self.promote(version)))
            found.append((f"promotion of {before}", lambda: self.promote(before)))
        if self.given.drain_node:
            found.append(("draining a node", self.drain_node))
        return found

    def load(self, requests: int, connections: int) -> tuple[subprocess.Popen[str], list[str]]:
        """Start to send; the process, and the command that has it stop after the requests."""
        port = self.call(
            "get", "service", self.service, "-o", "jsonpath={.spec.ports[?(@.name=='http')].port}"
        )
        inside = [*self.kubectl, "exec", "--stdin", self.pod, "--", "python3", "-"]
        inside += [f"http://{self.service}:{port}", "--requests", str(requests)]
        inside += ["--connections", str(connections), "--until", "/tmp/stop"]  # noqa: S108
        inside += ["--tokens", TOKENS] if self._tokens() else []
        with LOAD.open() as source:
            process = subprocess.Popen(inside, stdin=source, stdout=subprocess.PIPE, text=True)
        return process, [*self.kubectl, "exec", self.pod, "--", "touch", "/tmp/stop"]  # noqa: S108

    def close(self) -> None:
        """Remove the sender."""
        self.call("delete", "pod", self.pod, "--wait=false")

    def _names(self, kind: str) -> list[str]:
        return self.call(
            "get", kind, "-l", self.selector, "-o", "jsonpath={.items[*].metadata.name}"
        ).split()

    def _one(self, kind: str) -> str:
        names = [n for n in self._names(kind) if not n.endswith("-canary")]
        if len(names) != 1:
            sys.exit(
                f"{len(names)} {kind} of services in {self.given.release}: name one by --model"
            )
        return names[0]

    def _tokens(self) -> list[dict[str, Any]]:
        """The volume of a service's pod with its tokens; none where it asks for none."""
        pod = json.loads(self.call("get", "pod", self.pods[0], "-o", "json"))
        return [volume for volume in pod["spec"]["volumes"] if volume["name"] == "tokens"]

    def _sender(self) -> dict[str, Any]:
        """A pod that may reach the service as the one of `helm test` does."""
        tokens = self._tokens()
        pod = json.loads(self.call("get", "pod", self.pods[0], "-o", "json"))
        labels = {k: v for k, v in pod["metadata"]["labels"].items() if "/" in k}
        labels["app.kubernetes.io/component"] = "test"
        container = {
            "name": "load",
            "image": pod["spec"]["containers"][0]["image"],
            "command": ["sleep", "infinity"],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                *({"name": "tokens", "mountPath": TOKENS, "readOnly": True} for _ in tokens),
            ],
        }
        near = {
            "labelSelector": {
                "matchLabels": dict(part.split("=") for part in self.selector.split(","))
            },
            "topologyKey": "kubernetes.io/hostname",
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.pod, "labels": labels},
            "spec": {
                "containers": [container],
                "volumes": [{"name": "tmp", "emptyDir": {}}, *tokens],
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "affinity": {
                    "podAntiAffinity": {
                        "preferredDuringSchedulingIgnoredDuringExecution": [
                            {"weight": 100, "podAffinityTerm": near}
                        ]
                    }
                },
                # A node that only administers is never drained here.
                "tolerations": [
                    {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}
                ],
            },
        }


def measure(place: Laptop | Cluster, requests: int, connections: int) -> dict[str, Any]:
    """Send, and have all operations happen meanwhile."""
    operations = place.operations()
    process, stop = place.load(requests, connections)
    took = {}
    try:
        time.sleep(APART)
        for name, operation in operations:
            began = time.monotonic()
            operation()
            took[name] = round(time.monotonic() - began, 1)
            print(f"{name}: {took[name]} s", flush=True)
            time.sleep(APART)
        subprocess.run(stop, check=True)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    counts: dict[str, Any] = json.loads(output)
    return counts | {"operations_s": took}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="at least so many (100000)")
    parser.add_argument("--connections", type=int, default=16, help="clients (16)")
    parser.add_argument("--drain-seconds", type=float, default=20.0, help="of the services (20)")
    parser.add_argument("--context", help="of kubectl; without it, on this machine")
    parser.add_argument("--namespace", default="default", help="of the release")
    parser.add_argument("--release", help="of the chart")
    parser.add_argument("--model", help="which one, where the release has several")
    parser.add_argument("--promote", metavar="VERSION", help="a version to promote under load")
    parser.add_argument("--drain-node", action="store_true", help="also drain a node")
    given = parser.parse_args()
    if given.context and not given.release:
        parser.error("--context needs --release")
    with tempfile.TemporaryDirectory() as folder:
        place = Cluster(given) if given.context else Laptop(Path(folder), given.drain_seconds)
        try:
            counts = measure(place, given.requests, given.connections)
        finally:
            place.close()
    where = "cluster" if given.context else "laptop"
    counts = {"machine": f"{platform.machine()}, {cores()} cores", **counts}
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(results | {where: counts}, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    print(f"{counts['sent']:,} requests, {sum(counts['failed'].values()):,} failed")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
