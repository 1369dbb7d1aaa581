"""A cluster to test on, and a namespace of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kubernetes import client, watch

from k8s.explain import explain

#: Time for a pod to end, images being there.
PATIENCE = 240


def ready(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is ready."""
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


@dataclass(frozen=True)
class Cluster:
    """A cluster that these tests may use as they like.

    Attributes:
        context: its context in the kubeconfig.
        kind: name of the kind cluster; None: it is none, and pulls its images.
        api: speaks to it.
    """

    context: str
    kind: str | None
    api: client.ApiClient

    @property
    def core(self) -> client.CoreV1Api:
        """Pods, nodes and what else is of the core group."""
        return client.CoreV1Api(self.api)

    def json(self, answer: Any) -> Any:
        """An object, or a list's items, as the API gives it."""
        value = self.api.sanitize_for_serialization(answer)
        return value.get("items", value)

    def workers(self) -> list[dict[str, Any]]:
        """Nodes for pods of their own, in the order of their names."""
        nodes = self.json(self.core.list_node())
        plane = "node-role.kubernetes.io/control-plane"
        workers = [n for n in nodes if plane not in n["metadata"]["labels"]]
        return sorted(workers or nodes, key=lambda n: str(n["metadata"]["name"]))

    def load(self, image: str) -> None:
        """Bring an image of this machine's Docker onto the workers of a kind cluster."""
        if self.kind is None:
            return
        nodes = ",".join(n["metadata"]["name"] for n in self.workers())
        subprocess.run(
            ["kind", "load", "docker-image", image, "--name", self.kind, "--nodes", nodes],
            check=True,
            capture_output=True,
            text=True,
        )


@dataclass(frozen=True)
class Namespace:
    """A namespace of one test module.

    Attributes:
        cluster: where it is.
        name: its name.
    """

    cluster: Cluster
    name: str

    def apply(self, *bodies: Mapping[str, Any]) -> None:
        """Make objects of the core, apps or networking group."""
        for body in bodies:
            make: Callable[..., Any] = {
                "ConfigMap": self.cluster.core.create_namespaced_config_map,
                "Secret": self.cluster.core.create_namespaced_secret,
                "ServiceAccount": self.cluster.core.create_namespaced_service_account,
                "Service": self.cluster.core.create_namespaced_service,
                "PersistentVolumeClaim": (
                    self.cluster.core.create_namespaced_persistent_volume_claim
                ),
                "ResourceQuota": self.cluster.core.create_namespaced_resource_quota,
                "Pod": self.cluster.core.create_namespaced_pod,
                "Deployment": client.AppsV1Api(self.cluster.api).create_namespaced_deployment,
                "NetworkPolicy": (
                    client.NetworkingV1Api(self.cluster.api).create_namespaced_network_policy
                ),
            }[body["kind"]]
            make(self.name, dict(body))

    def pod(self, name: str) -> dict[str, Any]:
        """A pod as the API gives it."""
        pod: dict[str, Any] = self.cluster.json(
            self.cluster.core.read_namespaced_pod(name, self.name)
        )
        return pod

    def until(
        self, name: str, holds: Callable[[dict[str, Any]], bool], seconds: int = PATIENCE
    ) -> dict[str, Any]:
        """The pod as soon as `holds` says so of it; an AssertionError after `seconds`."""
        stream = watch.Watch().stream(
            self.cluster.core.list_namespaced_pod,
            self.name,
            field_selector=f"metadata.name={name}",
            timeout_seconds=seconds,
        )
        for event in stream:
            pod: dict[str, Any] = event["raw_object"]
            if holds(pod):
                return pod
        raise AssertionError(f"after {seconds} s: {self.explain(name)}")

    def until_ready(self, labels: str, seconds: int = PATIENCE) -> dict[str, Any]:
        """A pod with these labels, as soon as one is ready; an AssertionError after `seconds`."""
        stream = watch.Watch().stream(
            self.cluster.core.list_namespaced_pod,
            self.name,
            label_selector=labels,
            timeout_seconds=seconds,
        )
        seen = ""
        for event in stream:
            pod: dict[str, Any] = event["raw_object"]
            seen = pod["metadata"]["name"]
            if ready(pod):
                return pod
        raise AssertionError(
            f"after {seconds} s: {self.explain(seen) if seen else f'no pod has {labels}'}"
        )

    def until_running(self, labels: str, seconds: int = PATIENCE) -> dict[str, Any]:
        """A pod with these labels whose container runs; an AssertionError after `seconds`."""
        stream = watch.Watch().stream(
            self.cluster.core.list_namespaced_pod,
            self.name,
            label_selector=labels,
            timeout_seconds=seconds,
        )
        for event in stream:
            pod: dict[str, Any] = event["raw_object"]
            if pod["status"]["phase"] == "Running":
                return pod
        raise AssertionError(f"after {seconds} s no pod with {labels} runs")

    def event(self, reason: str, about: str, seconds: int = PATIENCE) -> None:
        """Return once there is an event of this kind about an object whose name starts so."""
        stream = watch.Watch().stream(
            self.cluster.core.list_namespaced_event,
            self.name,
            field_selector=f"reason={reason}",
            timeout_seconds=seconds,
        )
        for event in stream:
            if event["raw_object"]["involvedObject"]["name"].startswith(about):
                return
        raise AssertionError(f"after {seconds} s no event {reason} about {about}")

    def until_quota(self, name: str) -> None:
        """Return once a ResourceQuota counts."""
        stream = watch.Watch().stream(
            self.cluster.core.list_namespaced_resource_quota,
            self.name,
            field_selector=f"metadata.name={name}",
            timeout_seconds=PATIENCE,
        )
        for event in stream:
            if event["raw_object"].get("status", {}).get("used"):
                return
        raise AssertionError(f"the quota {name} does not count")

    def finish(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Run a pod to its end; the pod, succeeded or failed."""
        self.apply(body)
        name = body["metadata"]["name"]
        return self.until(name, lambda pod: pod["status"]["phase"] in ("Succeeded", "Failed"))

    def log(self, name: str) -> str:
        """What a pod's container printed."""
        # Read raw: the client turns a log that is JSON into something else.
        answer = self.cluster.core.read_namespaced_pod_log(name, self.name, _preload_content=False)
        return str(answer.data.decode())

    def lines(self, name: str) -> list[tuple[float, str]]:
        """What a pod's container printed, line by line, with the times in seconds since 1970."""
        answer = self.cluster.core.read_namespaced_pod_log(
            name, self.name, timestamps=True, _preload_content=False
        )
        lines = (line.partition(" ") for line in answer.data.decode().splitlines())
        return [(seconds(at), text) for at, _, text in lines]

    def surroundings(self, name: str) -> dict[str, Any]:
        """What `explain` is given: the pod, and lists of nodes, events, pods and claims."""
        core, items = self.cluster.core, self.cluster.json
        return {
            "pod": self.pod(name),
            "nodes": items(core.list_node()),
            "events": items(core.list_namespaced_event(self.name)),
            "pods": items(core.list_pod_for_all_namespaces()),
            "claims": items(core.list_namespaced_persistent_volume_claim(self.name)),
        }

    def explain(self, name: str, case: str = "") -> str:
        """What `driftmill cluster explain` says of a pod; recorded as `case`, if that is wished."""
        around = self.surroundings(name)
        if case:
            record(case, around)
        return explain(**around)


def seconds(at: str) -> float:
    """A time as the API writes it, in seconds since 1970."""
    return datetime.fromisoformat(at).timestamp()


def record(case: str, around: Mapping[str, Any]) -> None:
    """Keep what `explain` was given for the tests that have no cluster, in the folder
    `DRIFTMILL_TEST_RECORD`, without what it does not read."""
    folder = os.environ.get("DRIFTMILL_TEST_RECORD")
    if folder is None:
        return
    if "pod" in around:
        names = [around["pod"]["metadata"]["name"]]
        names += [c["metadata"]["name"] for c in around["claims"]]
        events = [e for e in around["events"] if e["involvedObject"]["name"] in names]
        around = {**around, "events": events}
        if around["pod"]["spec"].get("nodeName"):  # other nodes no longer matter
            around = {k: v for k, v in around.items() if k not in ("nodes", "pods")}
    text = json.dumps({key: _lean(key, value) for key, value in around.items()}, indent=1)
    Path(folder, f"{case}.json").write_text(text + "\n")


def _lean(kind: str, value: Any) -> Any:
    """Objects without what says nothing of why a pod does not run."""
    if isinstance(value, list):
        return [_lean(kind, one) for one in value]
    kept = {k: v for k, v in value.items() if k not in ("apiVersion", "kind")}
    metadata = kept["metadata"]
    names = ("name", "namespace", "uid", "labels", "deletionTimestamp")
    kept["metadata"] = {k: metadata[k] for k in names if k in metadata}
    status = kept.get("status", {})
    match kind:
        case "nodes":
            kept["status"] = {k: status[k] for k in ("allocatable", "capacity")}
        case "pods":  # only what they take of a node
            spec = kept["spec"]
            containers = [
                {"name": c["name"], "resources": c.get("resources", {})} for c in spec["containers"]
            ]
            kept["spec"] = {"nodeName": spec.get("nodeName"), "containers": containers}
            kept["status"] = {"phase": status["phase"]}
            kept["metadata"].pop("labels", None)
    return kept
