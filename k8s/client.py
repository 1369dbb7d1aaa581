"""Reading a cluster, and waiting until what was applied works."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.stream import portforward

from k8s import tools
from k8s.explain import IMAGE_REASONS, explain, explainer, refusal

#: An object of the API, as JSON.
Object = dict[str, Any]

#: Seconds between two looks at a cluster that changes.
INTERVAL = 1.0
#: Seconds that an image may fail to be pulled before that is taken for final: registries stumble.
PULL_PATIENCE = 60.0
#: Restarts after which a container is taken to crash for good. Servers that wait for others by
#: dying have some to spend.
RESTARTS = 6


class ClusterError(RuntimeError):
    """A cluster cannot be used, or something in it does not work; says why and what to do."""


class Cluster:
    """A cluster, by its context in the kubeconfig.

    Args:
        context: name of the context; the current one is never used.

    Raises:
        ClusterError: the kubeconfig has no such context.
    """

    def __init__(self, context: str) -> None:
        self.context = context
        try:
            # The file by name: the package reads the variable only once, when it is imported.
            kubeconfig = os.environ.get("KUBECONFIG")
            self._api = config.new_client_from_config(kubeconfig, context=context)
        except ConfigException as error:
            known = contexts()
            raise ClusterError(
                f"the kubeconfig has no usable context {context} ({_line(error)}); it has"
                f" {', '.join(known) if known else 'none'}; `driftmill cluster up` makes"
                " kind-driftmill, --context names another"
            ) from None
        self._api.configuration.retries = False

    def get(self, path: str, **query: str) -> Object:
        """Read an object or a list of objects.

        Args:
            path: `/api/v1/...` or `/apis/...`.
            query: such as `labelSelector`.

        Raises:
            ClusterError: the cluster does not answer, or this user may not read that.
        """
        return self._call("GET", path, query=query)

    def find(self, path: str) -> Object | None:
        """An object, or None where there is none."""
        try:
            return self.get(path)
        except NotFoundError:
            return None

    def items(self, path: str, **query: str) -> list[Object]:
        """The objects of a list; none where their kind is not known to the cluster."""
        try:
            return list(self.get(path, **query)["items"])
        except NotFoundError:
            return []

    @contextmanager
    def forward(self, namespace: str, pod: str, port: int) -> Iterator[socket.socket]:
        """A connection to a port of a pod, through the cluster's API."""
        core = client.CoreV1Api(self._api)
        forwarder = portforward(
            core.connect_get_namespaced_pod_portforward, pod, namespace, ports=str(port)
        )
        try:
            yield forwarder.socket(port)
        finally:
            forwarder.close()

    def patch_status(self, path: str, status: Mapping[str, Any]) -> None:
        """Merge something into an object's status."""
        self._call("PATCH", f"{path}/status", body={"status": status})

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        try:
            self._call("DELETE", path)
        except NotFoundError:
            return

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Object:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json"
        try:
            answer: Object = self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=20,
            )
        except ApiException as error:
            raise self._refused(error, path) from None
        except (urllib3.exceptions.HTTPError, OSError):
            raise UnreachableError(
                f"the cluster of context {self.context} does not answer; see whether it runs"
                " (`driftmill cluster status`), or start it with `driftmill cluster up`"
            ) from None
        return answer

    def _refused(self, error: ApiException, path: str) -> ClusterError:
        if error.status == 404:
            return NotFoundError(f"the cluster of context {self.context} has no {path}")
        if error.status == 401:
            return ClusterError(
                f"the cluster of context {self.context} does not know you; log in anew, or name"
                " another context with --context"
            )
        if error.status == 403:
            return ForbiddenError(
                f"you may not read {path} of the cluster {self.context}; ask its administrator for"
                " that right, or name another context with --context"
            )
        if error.status in (500, 502, 503, 504, 429):
            return UnreachableError(
                f"the cluster of context {self.context} is not ready (HTTP {error.status}); try"
                " again in a minute"
            )
        return ClusterError(
            f"the cluster of context {self.context} answered {error.status} {error.reason}"
            f" to {path}"
        )


class NotFoundError(ClusterError):
    """There is no such object, or no such kind of object."""


class ForbiddenError(ClusterError):
    """This user lacks a right."""


class UnreachableError(ClusterError):
    """The cluster does not answer now; it may later."""


def contexts() -> list[str]:
    """Names of the kubeconfig's contexts."""
    try:
        done = tools.run(["kubectl", "config", "get-contexts", "--output", "name"], timeout=30)
    except tools.ToolError:
        return []
    return sorted(done.stdout.split())


# --- waiting ---


class Deadline:
    """A point in time until which everything has to be done.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; at least one, so that what is asked next can still fail well."""
        return max(1.0, self._end - time.monotonic())

    def passed(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._end


def wait_for_nodes(cluster: Cluster, count: int, deadline: Deadline) -> None:
    """Wait until a number of nodes are Ready."""

    def unready() -> str | None:
        nodes = cluster.items("/api/v1/nodes")
        ready = [n for n in nodes if is_true(n, "Ready")]
        if len(ready) >= count:
            return None
        names = ", ".join(n["metadata"]["name"] for n in nodes if n not in ready)
        return f"{len(ready)} of {count} nodes are ready" + (f"; waiting for {names}" * bool(names))

    _until(unready, deadline, "the nodes are not ready", "`kubectl describe node` says more")


def wait_for_kinds(cluster: Cluster, names: Iterable[str], deadline: Deadline) -> None:
    """Wait until CustomResourceDefinitions are Established."""
    wanted = set(names)
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

    def missing() -> str | None:
        there = {c["metadata"]["name"] for c in cluster.items(path) if is_true(c, "Established")}
        return ", ".join(sorted(wanted - there)) or None

    _until(missing, deadline, "not Established", "`kubectl describe crd` says more")


def retry_pulls(cluster: Cluster, deployments: Sequence[tuple[str, str]]) -> None:
    """Delete pods whose images could not be pulled, so that new ones try again at once: a node
    waits up to five minutes before it looks again, even for an image that was loaded meanwhile."""
    for namespace, name in deployments:
        deployment = cluster.find(_path(namespace, name))
        for pod in _pods(cluster, deployment) if deployment else []:
            states = [each.get("state", {}).get("waiting") or {} for each in _containers(pod)]
            if any(state.get("reason") in IMAGE_REASONS for state in states):
                cluster.delete(f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}")


def _containers(pod: Object) -> list[Object]:
    """What a pod's status says of its containers."""
    status = pod.get("status", {})
    kinds = ("initContainerStatuses", "containerStatuses")
    return [each for kind in kinds for each in status.get(kind) or []]


def wait_for_deployments(
    cluster: Cluster,
    deployments: Sequence[tuple[str, str]],
    deadline: Deadline,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Wait until Deployments run what was applied, on all their replicas.

    What cannot come right by waiting ends the wait early: an image that is not there, a pod that
    is refused, a container that crashes again and again.

    Args:
        cluster: where.
        deployments: namespace and name of each.
        deadline: of the wait.
        say: told how many are ready, whenever that changes.

    Raises:
        ClusterError: names the object that fails, with the reason and its last events.
    """
    failing: dict[str, float] = {}
    told = -1
    while True:
        waiting = [d for d in deployments if not is_ready(cluster.find(_path(*d)))]
        if (ready := len(deployments) - len(waiting)) != told:
            told = ready
            say(f"{ready} of {len(deployments)} ready")
        if not waiting:
            return
        trouble = final_trouble(cluster, waiting, failing)
        if trouble is None and deadline.passed():
            trouble = _last_trouble(cluster, waiting, deadline)
        if trouble is not None:
            raise ClusterError(trouble)
        time.sleep(INTERVAL)


def _until(
    lacking: Callable[[], str | None], deadline: Deadline, problem: str, advice: str
) -> None:
    while (missing := lacking()) is not None:
        if deadline.passed():
            raise ClusterError(f"after {deadline.seconds:.0f} s: {problem}: {missing}; {advice}")
        time.sleep(INTERVAL)


def _path(namespace: str, name: str) -> str:
    return f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}"


def is_ready(deployment: Object | None) -> bool:
    if deployment is None:
        return False
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return False
    counts = ("replicas", "updatedReplicas", "availableReplicas")
    return all(status.get(count, 0) == wanted for count in counts)


def is_true(each: Object, condition: str) -> bool:
    conditions = each.get("status", {}).get("conditions") or []
    return any(c["type"] == condition and c["status"] == "True" for c in conditions)


def final_trouble(
    cluster: Cluster, waiting: Sequence[tuple[str, str]], failing: dict[str, float]
) -> str | None:
    """What will not come right by waiting, in one sentence.

    Args:
        cluster: where.
        waiting: Deployments that are not ready.
        failing: since when each image could not be pulled (kept between calls).
    """
    for namespace, name in waiting:
        deployment = cluster.find(_path(namespace, name))
        if deployment is None:
            return f"the Deployment {namespace}/{name} is gone; start again"
        for condition in deployment.get("status", {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return f"the Deployment {namespace}/{name}: {refusal(condition['message'])}"
        for pod in _pods(cluster, deployment):
            if found := _container_trouble(pod, failing):
                return f"the Deployment {namespace}/{name}: {found}" + _events(cluster, pod)
    return None


def _container_trouble(pod: Object, failing: dict[str, float]) -> str | None:
    for each in _containers(pod):
        waiting = each.get("state", {}).get("waiting") or {}
        reason, key = waiting.get("reason"), f"{pod['metadata']['uid']}/{each['name']}"
        if reason in IMAGE_REASONS:
            since = failing.setdefault(key, time.monotonic())
            if reason == "InvalidImageName" or time.monotonic() - since >= PULL_PATIENCE:
                return _image(pod, each["image"], reason, waiting.get("message", ""))
        else:
            failing.pop(key, None)
        if reason == "CrashLoopBackOff" and each.get("restartCount", 0) >= RESTARTS:
            return explain(pod).rstrip(".")
    return None


def _image(pod: Object, image: str, reason: str, message: str) -> str:
    where = f"{pod['metadata']['name']} waits on {pod['spec'].get('nodeName', 'its node')}"
    return (
        f"{where}: {reason}, the image {image} cannot be had"
        f" ({_line(message) or 'no reason given'}); `docker pull {image}` here and start"
        " again, which loads it, or name a mirror with --image-prefix"
    )


def _last_trouble(cluster: Cluster, waiting: Sequence[tuple[str, str]], deadline: Deadline) -> str:
    names = ", ".join(f"{namespace}/{name}" for namespace, name in waiting)
    text = f"after {deadline.seconds:.0f} s these are not ready: {names}"
    for namespace, name in waiting:
        deployment = cluster.find(_path(namespace, name))
        for pod in _pods(cluster, deployment) if deployment else []:
            if not is_true(pod, "Ready"):
                said = explainer(cluster.items, namespace)(pod)
                return f"{text}. {said}" + _events(cluster, pod)
    return f"{text}; start again, or give it more time with --timeout"


def _pods(cluster: Cluster, deployment: Object) -> list[Object]:
    labels = deployment["spec"]["selector"].get("matchLabels", {})
    pods = cluster.items(
        f"/api/v1/namespaces/{deployment['metadata']['namespace']}/pods",
        labelSelector=",".join(f"{k}={v}" for k, v in sorted(labels.items())),
    )
    return [p for p in pods if not p["metadata"].get("deletionTimestamp")]


def _events(cluster: Cluster, pod: Object, count: int = 3) -> str:
    """The last events of a pod, a line each, below the message."""
    name = pod["metadata"]["name"]
    events = cluster.items(
        f"/api/v1/namespaces/{pod['metadata']['namespace']}/events",
        fieldSelector=f"involvedObject.name={name}",
    )
    events.sort(key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    lines = [f"  {e.get('reason')}: {_line(e.get('message', ''))}" for e in events[-count:]]
    return "".join(f"\n{line}" for line in (["its last events:", *lines] if lines else []))


def _line(error: object) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    return text if len(text) <= 240 else f"{text[:237]}..."
