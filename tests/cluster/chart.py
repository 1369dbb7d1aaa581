"""A release of the chart in a test cluster, its client, and the Prometheus that watches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, watch

from tests.cluster.objects import Namespace, ready
from tests.helm.chart import CHART, helm

CODE = Path(__file__).with_name("client.py").read_text()
LOAD = Path("benchmarks/load.py").read_text()
#: Seconds for an install or an upgrade until all pods are ready, and for what follows at once.
PATIENCE, SOON = 300, 60
#: Seconds between two looks at what cannot be watched.
AGAIN = 0.5
#: Writes files into a folder, by name.
WRITE = """
import os
os.mkdir({folder!r})
for name, text in {files!r}.items():
    with open(os.path.join({folder!r}, name), "w") as file:
        file.write(text)
print(0)
"""
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"


def eventually(what: str, look: Callable[[], Any], seconds: float = SOON) -> Any:
    """What `look` returns, as soon as it is true; for what has no watch."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"after {seconds:.0f} s: {what}"
        time.sleep(AGAIN)
    return found


@dataclass(frozen=True)
class Release:
    """A release.

    Attributes:
        namespace: where it is.
        name: its name.
        values: files of values, the last comes first.
    """

    namespace: Namespace
    name: str
    values: tuple[Path, ...]

    @property
    def labels(self) -> str:
        """Selects what belongs to it."""
        return f"{INSTANCE}={self.name}"

    def url(self, model: str = "payments", port: int = 3000, suffix: str = "") -> str:
        """Where a part of a model answers, from any namespace."""
        return f"http://{self.name}-driftmill-{model}{suffix}.{self.namespace.name}:{port}"

    def tokens(self, model: str = "payments") -> dict[str, str]:
        """Those that a model's service asks for, by right."""
        name = f"{self.name}-driftmill-{model}-access"
        found = self.namespace.cluster.core.read_namespaced_secret(name, self.namespace.name)
        return {right: b64decode(token).decode() for right, token in found.data.items()}

    def helm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run helm in its namespace."""
        where = ["--kube-context", self.namespace.cluster.context, "-n", self.namespace.name]
        return helm(*arguments, *where)

    def apply(self, verb: str, *settings: str, wait: bool = True) -> None:
        """Install or upgrade it, with `--set` settings, until all that it made is ready."""
        files = [f"--values={path}" for path in self.values]
        given = [f"--set={setting}" for setting in settings]
        waits = ["--wait", f"--timeout={PATIENCE}s"] if wait else []
        done = self.helm(verb, self.name, str(CHART), *files, *given, *waits)
        assert done.returncode == 0, done.stderr + self.explain()

    def explain(self) -> str:
        """What its pods that are not ready say."""
        waiting = [p["metadata"]["name"] for p in self.pods() if not ready(p)]
        return "\n".join(self.namespace.explain(name) for name in waiting)

    def pods(self, component: str = "", model: str = "") -> list[dict[str, Any]]:
        """Its pods, but for those that are going."""
        wanted = {COMPONENT: component, "driftmill/model": model}
        labels = [self.labels, *(f"{k}={v}" for k, v in wanted.items() if v)]
        found = self.namespace.cluster.core.list_namespaced_pod(
            self.namespace.name, label_selector=",".join(labels)
        )
        pods = self.namespace.cluster.json(found)
        return [p for p in pods if "deletionTimestamp" not in p["metadata"]]

    def until_ready(self, count: int, component: str, model: str = "payments") -> None:
        """Return once so many pods of a component are there, all of them ready."""
        stream = watch.Watch().stream(
            self.namespace.cluster.core.list_namespaced_pod,
            self.namespace.name,
            label_selector=f"{self.labels},{COMPONENT}={component},driftmill/model={model}",
            timeout_seconds=PATIENCE,
        )
        for _ in stream:
            found = self.pods(component, model)
            if len(found) == count and all(map(ready, found)):
                return
        names = [p["metadata"]["name"] for p in self.pods(component, model)]
        raise AssertionError(f"after {PATIENCE} s not {count} ready: {names}; {self.explain()}")

    def until_gone(self, names: Collection[str]) -> None:
        """Return once none of these pods is left, not even one that is going."""

        def gone() -> bool:
            found = self.namespace.cluster.core.list_namespaced_pod(self.namespace.name)
            return not {p.metadata.name for p in found.items} & set(names)

        eventually("pods are still going", gone, PATIENCE)

    def addresses(self, service: str) -> set[str]:
        """Addresses of the ready pods behind a Service."""
        slices = client.DiscoveryV1Api(self.namespace.cluster.api).list_namespaced_endpoint_slice(
            self.namespace.name, label_selector=f"kubernetes.io/service-name={service}"
        )
        endpoints = [e for s in slices.items for e in s.endpoints or () if e.conditions.ready]
        return {address for endpoint in endpoints for address in endpoint.addresses}

    def jobs(self, model: str = "payments") -> list[dict[str, Any]]:
        """The training Jobs of a model, oldest first."""
        found = client.BatchV1Api(self.namespace.cluster.api).list_namespaced_job(
            self.namespace.name, label_selector=f"{self.labels},driftmill/model={model}"
        )
        jobs = self.namespace.cluster.json(found)
        return sorted(jobs, key=lambda job: str(job["metadata"]["creationTimestamp"]))

    def until_jobs(self, holds: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The training Jobs, as soon as `holds` says so of them."""
        stream = watch.Watch().stream(
            client.BatchV1Api(self.namespace.cluster.api).list_namespaced_job,
            self.namespace.name,
            label_selector=self.labels,
            timeout_seconds=PATIENCE,
        )
        for _ in stream:
            if holds(found := self.jobs()):
                return found
        raise AssertionError(f"after {PATIENCE} s: {self.jobs()}")

    def python(self, component: str, code: str, model: str = "payments") -> Any:
        """Run Python in a pod of a component; the JSON that it prints last."""
        pod = self.pods(component, model)[0]["metadata"]["name"]
        return execute(self.namespace, pod, code)

    def ledger(self, page: str, model: str = "payments") -> list[dict[str, Any]]:
        """`runs` or `decisions`, newest first, as the controller tells them."""
        code = (
            "import urllib.request\n"
            f"print(urllib.request.urlopen('http://127.0.0.1:3002/{page}').read().decode())"
        )
        rows: list[dict[str, Any]] = self.python("controller", code, model)[page]
        return rows

    def until_run(self, count: int, model: str = "payments") -> dict[str, Any]:
        """The newest run, as soon as there are so many and it has ended."""

        def ended() -> dict[str, Any] | None:
            runs = self.ledger("runs", model)
            over = len(runs) == count and runs[0]["state"] not in ("pending", "running")
            return runs[0] if over else None

        found: dict[str, Any] = eventually("the run did not end", ended, PATIENCE)
        return found

    def trigger(self, reason: str, model: str = "payments") -> dict[str, Any]:
        """Ask the controller for a run, with its own token; its decision."""
        code = (
            "import json, urllib.request\n"
            "token = open('/etc/driftmill/webhook-token').read().strip()\n"
            "headers = {'Authorization': 'Bearer ' + token}\n"
            f"body = json.dumps({{'reason': {reason!r}}}).encode()\n"
            "asked = urllib.request.Request('http://127.0.0.1:3002/trigger', body, headers)\n"
            "print(urllib.request.urlopen(asked).read().decode())"
        )
        decision: dict[str, Any] = self.python("controller", code, model)["decisions"][0]
        return decision


def kubectl(namespace: Namespace, *arguments: str) -> list[str]:
    """A command of kubectl in a namespace."""
    return ["kubectl", "--context", namespace.cluster.context, "-n", namespace.name, *arguments]


def execute(namespace: Namespace, pod: str, code: str, *arguments: str) -> Any:
    """Run Python in a pod; the JSON that it prints last."""
    command = kubectl(namespace, "exec", "-i", pod, "--", "python3", "-", *arguments)
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Traffic:
    """What runs while something else happens, and its report when it has ended."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """Pods in a namespace of their own, which may call the services.

    Attributes:
        namespace: theirs.
    """

    namespace: Namespace

    def call(self, function: str, **values: Any) -> Any:
        """A function of `client.py`, called in the pod."""
        return execute(self.namespace, "client", CODE, function, json.dumps(values))

    @contextmanager
    def replay(self, **values: Any) -> Iterator[Traffic]:
        """A contract's stream as traffic, from its first answer on until the block ends."""
        arguments = ["python3", "-c", CODE, "replayed", json.dumps(values)]
        command = kubectl(self.namespace, "exec", "-i", "client", "--", *arguments)
        with self._run(command) as (process, traffic):
            assert process.stdout is not None
            assert process.stdout.readline() == "began\n", process.communicate()
            yield traffic

    @contextmanager
    def load(self, release: Release, requests: int = 0, connections: int = 4) -> Iterator[Traffic]:
        """Predictions over kept connections, from before the block until it ends."""
        tokens = f"/tmp/tokens-{time.monotonic_ns()}"
        execute(self.namespace, "load", WRITE.format(folder=tokens, files=release.tokens()))
        stop = f"/tmp/stop-{time.monotonic_ns()}"
        options = ["--until", stop, "--requests", str(requests), "--connections", str(connections)]
        options += ["--tokens", tokens]
        code = ("exec", "load", "--", "python3", "-c", LOAD)
        command = kubectl(self.namespace, *code, release.url())
        with self._run([*command, *options]) as (_, traffic):
            yield traffic
            execute(self.namespace, "load", f"open({stop!r}, 'w').close()\nprint(0)")

    @contextmanager
    def _run(self, command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], Traffic]]:
        traffic = Traffic()
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process, traffic
                said, problems = process.communicate(timeout=120)
            except BaseException:
                process.kill()
                raise
        assert said, problems[-2000:]
        traffic.report = json.loads(said.splitlines()[-1])


def client_pod(name: str, image: str, store: Mapping[str, str]) -> dict[str, Any]:
    """A pod that waits for what is run in it."""
    return {
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "command": ["python3", "-c", "import signal; signal.pause()"],
                    "env": [{"name": k, "value": v} for k, v in store.items()],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }


@dataclass(frozen=True)
class Prometheus:
    """The Prometheus of the operator, asked through the API server.

    Attributes:
        namespace: where it is.
    """

    namespace: Namespace

    def get(self, path: str, **query: str) -> Any:
        """The data that a page of its API answers."""
        page = f"/api/v1/namespaces/{self.namespace.name}/services/prometheus-operated:9090/proxy"
        # The client's own call for this takes no query.
        said, _, _ = self.namespace.cluster.api.call_api(
            f"{page}/api/v1/{path}",
            "GET",
            query_params=list(query.items()),
            auth_settings=["BearerToken"],
            response_type="object",
        )
        return said["data"]

    def query(self, text: str) -> dict[str, float]:
        """Values of a query by their labels, as JSON."""
        found = self.get("query", query=text)["result"]
        return {json.dumps(row["metric"], sort_keys=True): float(row["value"][1]) for row in found}

    def alerts(self, namespace: str) -> list[dict[str, Any]]:
        """Alerts that fire about a namespace."""
        found = self.get("alerts")["alerts"]
        return [
            a for a in found if a["labels"].get("namespace") == namespace and a["state"] == "firing"
        ]


#: Images of a release of tables, and the variables that name others in their place.
IMAGES = {
    "serviceTabular": "DRIFTMILL_TEST_SERVICE_IMAGE",
    "monitor": "DRIFTMILL_TEST_MONITOR_IMAGE",
    "controller": "DRIFTMILL_TEST_CONTROLLER_IMAGE",
    "trainingTabular": "DRIFTMILL_IMAGE",
}


def compiled_values(contract: str, folder: Path, store: str, endpoint: str) -> Path:
    """What `driftmill compile` writes for a contract, with the address of the store and the images
    that the environment names."""
    (folder / "contract.yaml").write_text(contract)
    command = [sys.executable, "-m", "driftmill", "compile", str(folder / "contract.yaml")]
    done = subprocess.run(
        [*command, "-o", str(folder / "build"), "--store", store], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = folder / "build" / "values.yaml"
    values = yaml.safe_load(path.read_text())
    values["store"]["endpoint"] = endpoint
    for name, variable in IMAGES.items():
        if named := os.environ.get(variable):
            repository, _, tag = named.rpartition(":")
            values["images"][name] = {"repository": repository, "tag": tag}
    path.write_text(yaml.safe_dump(values))
    return path


def image_of(path: Path, name: str) -> str:
    """The reference of an image in a file of values."""
    image = yaml.safe_load(path.read_text())["images"][name]
    return f"{image['repository']}:{image['tag']}"
