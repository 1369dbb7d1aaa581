"""`driftmill doctor`: what is installed, here and on a cluster, against what is supported.

    driftmill doctor                          # this machine and, if it is there, kind-driftmill
    driftmill doctor --context production --endpoint https://pipelines.example.com

Each line is ok, a warning or wrong, with the command that mends it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from driftmill import images
from k8s import preflight, tools
from k8s.explain import CONTEXT
from k8s.manifests import full_name
from k8s.preflight import Check, Supported, parse

if TYPE_CHECKING:
    from k8s.client import Cluster, Object

#: Python and its packages on this machine.
PYTHON = Supported((3, 11))
PACKAGES = {
    "kfp": Supported((2, 17), (2, 18)),
    "kfp-kubernetes": Supported((2, 17), (2, 18)),
    "kubernetes": Supported((30, 1), (31,)),
    "docker": Supported((7, 1), (8,)),
    "botocore": Supported((1, 36), (2,)),
    "mlflow": Supported((3, 10), (4,)),
}
#: Servers on the cluster.
KUBERNETES = Supported((1, 30), (1, 37))
KUBEFLOW_PIPELINES = Supported((2, 17), (2, 18))

#: Kinds of objects: the version of them that is used, what for, and how to get them. The first are
#: needed, the others open possibilities.
KINDS: dict[str, tuple[str, str, str]] = {
    "workflows.argoproj.io": ("v1alpha1", "runs", "driftmill cluster up"),
    "scheduledworkflows.kubeflow.org": ("v1beta1", "recurring runs", "driftmill cluster up"),
    "trainjobs.trainer.kubeflow.org": (
        "v1alpha1", "training on several nodes",
        "driftmill cluster up --with trainer; elsewhere see k8s/components/trainer",
    ),
    "clusterqueues.kueue.x-k8s.io": (
        "v1beta2", "queues",
        "driftmill cluster up --with kueue; elsewhere see k8s/components/kueue",
    ),
    "servicemonitors.monitoring.coreos.com": (
        "v1", "metrics", "install the Prometheus operator (chart kube-prometheus-stack)",
    ),
    "prometheusrules.monitoring.coreos.com": (
        "v1", "alerts", "install the Prometheus operator (chart kube-prometheus-stack)",
    ),
    "httproutes.gateway.networking.k8s.io": (
        "v1", "routes to the services", "install a Gateway API implementation",
    ),
}  # fmt: skip
NEEDED = {"workflows.argoproj.io", "scheduledworkflows.kubeflow.org"}


def main(arguments: list[str] | None = None) -> int:
    """Print the checks; 1 if something is wrong, else 0."""
    options = _parser().parse_args(arguments)
    checks = [*this_machine(), *our_images()]
    context = options.context or _ours()
    endpoint = options.endpoint
    if context is not None:
        checks += cluster(context, ask_pipelines=endpoint is None)
    else:
        checks.append(
            Check(
                "cluster", "warning", "none looked at",
                "name one with --context, or make one: driftmill cluster up",
            )
        )  # fmt: skip
    if endpoint is not None:
        checks.append(pipelines_at(endpoint))
    if options.json:
        print(json.dumps([vars(c) for c in checks], indent=1))
    else:
        print(preflight.report(checks))
    return 1 if any(c.state == "wrong" for c in checks) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="driftmill doctor",
        description="Compare what is installed, here and on a cluster, with what is supported.",
        epilog="Example: driftmill doctor --context production",
    )
    parser.add_argument(
        "--context",
        default=os.environ.get("DRIFTMILL_CONTEXT"),
        help="cluster of the kubeconfig to look at; default: $DRIFTMILL_CONTEXT, else"
        f" {CONTEXT} where that exists",
    )
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("KF_PIPELINES_ENDPOINT"),
        metavar="URL",
        help="of Kubeflow Pipelines; default: $KF_PIPELINES_ENDPOINT, else through the cluster",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _ours() -> str | None:
    try:
        from k8s import client
    except ModuleNotFoundError:
        return None  # said by `this_machine`
    return CONTEXT if CONTEXT in client.contexts() else None


# --- here ---


def this_machine() -> list[Check]:
    """Python, its packages and the programs."""
    version = platform.python_version()
    python = parse(version) or ()
    checks = [
        Check("python", "ok", version)
        if python in PYTHON
        else Check("python", "wrong", version, f"install Python {PYTHON}")
    ]
    checks += [package(name) for name in PACKAGES]
    checks += [preflight.tool(name, needed=name == "kubectl") for name in preflight.TOOLS]
    return checks


def package(name: str) -> Check:
    """Whether a Python package is there, in a version that works."""
    supported = PACKAGES[name]
    # Docker and Kubernetes are also what these are clients of.
    title = f"{name} (Python)" if name in ("docker", "kubernetes") else name
    try:
        found = installed_version(name)
    except PackageNotFoundError:
        extra = "tracking" if name == "mlflow" else "cluster"
        return Check(title, "warning", "not installed", f"pip install 'driftmill[{extra}]'")
    if (parse(found) or ()) in supported:
        return Check(title, "ok", found)
    least, below = preflight.dotted(supported.least), supported.below
    wanted = f"{name}>={least}" + (f",<{preflight.dotted(below)}" if below else "")
    return Check(title, "wrong", found, f"pip install '{wanted}'")


def our_images() -> list[Check]:
    """Driftmill's images in this machine's Docker."""
    try:
        local = tools.local_images()
    except tools.ToolError as error:
        return [Check("images", "warning", "Docker does not answer", str(error))]
    wanted, missing = _lacking(local)
    if not missing:
        return [Check("images", "ok", f"all {wanted} are in Docker, as this code needs them")]
    found = f"{len(missing)} of {wanted} are not in Docker: {', '.join(missing)}"
    return [Check("images", "warning", found, "driftmill images build")]


def _lacking(there: set[str]) -> tuple[int, list[str]]:
    """How many images there are of ours, and which of them are not among these full names."""
    wanted = [i.name for i in images.IMAGES.values() if i.default]
    return len(wanted), [n for n in wanted if full_name(images.reference(n)) not in there]


# --- on a cluster ---


def cluster(context: str, *, ask_pipelines: bool) -> list[Check]:
    """Versions, kinds, images and releases of a cluster.

    Args:
        context: of the kubeconfig.
        ask_pipelines: whether to ask Kubeflow Pipelines for its version, through the cluster's API.
    """
    from k8s import client

    try:
        there = client.Cluster(context)
        found = there.get("/version")
    except client.ClusterError as error:
        return [Check("cluster", "wrong", context, str(error))]
    checks = [Check("cluster", "ok", context), _kubernetes(found)]
    for part in (_kinds, _node_images, _releases, *([_pipelines] if ask_pipelines else [])):
        try:
            checks += part(there)
        except client.ClusterError as error:
            checks.append(Check(part.__name__.lstrip("_"), "warning", "not looked at", str(error)))
    return checks


def _kubernetes(found: Object) -> Check:
    version = str(found["gitVersion"])
    if (parse(version) or ()) in KUBERNETES:
        return Check("kubernetes", "ok", version)
    return Check("kubernetes", "wrong", version, f"use a cluster of Kubernetes {KUBERNETES}")


def _kinds(there: Cluster) -> Iterator[Check]:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    served = {
        k["metadata"]["name"]: [v["name"] for v in k["spec"]["versions"] if v["served"]]
        for k in there.items(path)
    }
    for name, (version, purpose, command) in KINDS.items():
        if version in served.get(name, []):
            yield Check(name, "ok", version)
        elif name in served:
            found = f"serves {', '.join(served[name])}, not {version}"
            yield Check(name, "wrong" if name in NEEDED else "warning", found, command)
        else:
            found = f"not installed: no {purpose}"
            yield Check(name, "wrong" if name in NEEDED else "warning", found, command)


def _node_images(there: Cluster) -> Iterator[Check]:
    """Whether nodes have our images; a cloud's nodes pull them, kind's cannot."""
    if not there.context.startswith("kind-"):
        return
    names = {
        full_name(name)
        for node in there.items("/api/v1/nodes")
        for image in node["status"].get("images", [])
        for name in image.get("names") or []
    }
    wanted, missing = _lacking(names)
    if missing:
        found = f"nodes lack {', '.join(missing)}"
        cluster_name = there.context.removeprefix("kind-")
        command = f"driftmill images build --load-into {cluster_name}"
        yield Check("images on nodes", "warning", found, command)
    else:
        yield Check("images on nodes", "ok", f"all {wanted}")


def _releases(there: Cluster) -> Iterator[Check]:
    """Helm's releases in our namespace, by the labels of what Helm keeps of them."""
    found = there.items(
        "/api/v1/namespaces/driftmill/secrets", labelSelector="owner=helm,status=deployed"
    )
    for each in found:
        labels = each["metadata"]["labels"]
        yield Check("chart", "ok", f"release {labels['name']}, revision {labels['version']}")
    failed = there.items(
        "/api/v1/namespaces/driftmill/secrets",
        labelSelector="owner=helm,status in (failed,pending-install,pending-upgrade)",
    )
    for each in failed:
        labels = each["metadata"]["labels"]
        yield Check(
            "chart", "wrong", f"release {labels['name']} is {labels['status']}",
            f"helm -n driftmill rollback {labels['name']}",
        )  # fmt: skip


def _pipelines(there: Cluster) -> Iterator[Check]:
    """Kubeflow Pipelines' own answer, through a forwarded port: no policy stands in the way."""
    pods = there.items(
        "/api/v1/namespaces/kubeflow/pods",
        labelSelector="app=ml-pipeline,application-crd-id=kubeflow-pipelines",
    )
    running = [p for p in pods if p["status"].get("phase") == "Running"]
    if not running:
        yield Check(
            "kubeflow pipelines", "wrong", "does not run in the namespace kubeflow",
            "driftmill cluster up; `driftmill cluster status` says what is not ready",
        )  # fmt: skip
        return
    try:
        with there.forward("kubeflow", running[0]["metadata"]["name"], 8888) as stream:
            stream.sendall(f"GET {HEALTH} HTTP/1.0\r\nHost: ml-pipeline\r\n\r\n".encode())
            answer = http.client.HTTPResponse(stream)
            answer.begin()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        yield Check("kubeflow pipelines", "wrong", f"does not answer: {error}", _LOGS)
        return
    yield health(answer.status, body)


HEALTH = "/apis/v2beta1/healthz"
_LOGS = "kubectl -n kubeflow logs deploy/ml-pipeline says why"


def pipelines_at(endpoint: str) -> Check:
    """The version of Kubeflow Pipelines at a URL."""
    import httpx

    url = endpoint if "//" in endpoint else f"http://{endpoint}"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        return Check(
            "kubeflow pipelines", "wrong", f"{endpoint} is no URL",
            "give --endpoint such as http://127.0.0.1:8080",
        )  # fmt: skip
    try:
        answer = httpx.get(url.rstrip("/") + HEALTH, timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Check(
            "kubeflow pipelines", "wrong", f"{endpoint} does not answer ({error})",
            "see whether the address is right and the server runs: driftmill cluster status",
        )  # fmt: skip
    return health(answer.status_code, answer.content)


def health(status: int, body: bytes) -> Check:
    """What Kubeflow Pipelines says of itself.

    Args:
        status: of its HTTP answer.
        body: of it, JSON with `tag_name`.
    """
    name = "kubeflow pipelines"
    if status in (401, 403):
        return Check(name, "wrong", f"HTTP {status}", "log in: its proxy wants to know you")
    try:
        document: Any = json.loads(body)
        tag = str(document["tag_name"])
    except (ValueError, KeyError, TypeError):
        return Check(
            name, "wrong", f"HTTP {status}, and no version in the answer",
            "give the address of Kubeflow Pipelines by --endpoint",
        )  # fmt: skip
    version = parse(tag)
    if version is None:  # built by hand
        return Check(name, "warning", f"version {tag!r}", f"supported: {KUBEFLOW_PIPELINES}")
    if version in KUBEFLOW_PIPELINES:
        return Check(name, "ok", tag)
    advice = f"supported is {KUBEFLOW_PIPELINES}: kubectl apply --server-side -k k8s/overlays/…"
    return Check(name, "wrong", tag, advice)


if __name__ == "__main__":
    sys.exit(main())
