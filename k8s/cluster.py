"""`driftmill cluster`: a kind cluster with Kubeflow Pipelines on this machine.

    driftmill cluster up                        # make it, or go on where an earlier call stopped
    driftmill cluster up --without pipelines    # only the cluster, namespaces and policies
    driftmill cluster status
    driftmill cluster down

All state is in the cluster: `up` looks at what is there and does the rest. It touches no cluster
but the kind cluster of that name, and that only if it has made it.

| variable | what |
|---|---|
| `KIND_NODE_IMAGE` | image of the nodes; default: kind's own |
| `DRIFTMILL_MIRROR` | as `--image-prefix` |
| `DRIFTMILL_IMAGE_PREFIX` | where Driftmill's own images are, see `driftmill images` |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` | for the Secret `driftmill-store` |
| `AWS_ENDPOINT_URL`, `AWS_REGION`, `MLFLOW_TRACKING_URI` | for the ConfigMap `driftmill` |
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from driftmill import images
from k8s import manifests, preflight, tools
from k8s.explain import explainer
from k8s.manifests import ROOT, ManifestError, Object
from k8s.tools import ToolError

if TYPE_CHECKING:
    from k8s.client import Cluster, Deadline

NAME = "driftmill"
NAMESPACES = ("kubeflow", "driftmill")
#: What `--with` takes, and the folders it applies one after the other.
EXTRAS = {
    "kueue": ("components/kueue", "components/kueue/queues"),
    "trainer": ("components/trainer", "components/trainer/runtimes"),
}
GPU, GPU_PRODUCT, GPU_COUNT = "nvidia.com/gpu", "nvidia.com/gpu.product", "nvidia.com/gpu.count"
#: How often a node may fail to boot in kind's 30 s, which a busy machine takes longer for.
TRIES = 3

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one of `up`, `status`, `down`, `explain`.

    Returns:
        0 done, 1 failed (`status`: something is not ready), 2 wrong usage, 130 interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["explain"]:
        from k8s import explain

        return explain.main(given[1:])
    options = _parser().parse_args(given)
    signal.signal(signal.SIGTERM, _stop)
    try:
        code: int = options.run(options)
    except ModuleNotFoundError as error:
        from driftmill import extras

        if (advice := extras.advice(error)) is None:
            raise
        return _fail(advice)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here")
        return INTERRUPTED
    except (ToolError, ManifestError, images.ImageError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        from k8s.client import ClusterError  # half a second to import: not for --help

        if not isinstance(error, ClusterError):
            raise
        return _fail(str(error))
    return code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that the program that runs just now is ended, too.
    raise SystemExit(128 + number)


def _fail(message: str) -> int:
    print(f"driftmill cluster: {message}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="driftmill cluster",
        description="A kind cluster with Kubeflow Pipelines on this machine.",
        epilog="Example: driftmill cluster up --without pipelines",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="make the cluster, or go on where an earlier call stopped",
        description="Make the cluster, or go on where an earlier call stopped. Twice is once.",
        epilog="Example: driftmill cluster up --with kueue --timeout 20m",
    )
    up.set_defaults(run=_up)
    up.add_argument("--name", default=NAME, type=_name, help="of the kind cluster [%(default)s]")
    up.add_argument(
        "--config", type=Path, default=ROOT / "kind.yaml", metavar="FILE",
        help="kind configuration; default: the package's k8s/kind.yaml",
    )  # fmt: skip
    up.add_argument(
        "--overlay", default="kind", metavar="NAME|FOLDER",
        help="which of k8s/overlays to install, or a folder of your own [%(default)s]",
    )  # fmt: skip
    up.add_argument(
        "--without", action="append", default=[], type=_words, metavar="NAMES",
        help="leave out `pipelines`, or Deployments of them by name",
    )  # fmt: skip
    up.add_argument(
        "--with", dest="extra", action="append", default=[], type=_words, metavar="NAMES",
        help=f"also install: {', '.join(EXTRAS)}",
    )  # fmt: skip
    up.add_argument(
        "--image-prefix", metavar="PREFIX", default=os.environ.get("DRIFTMILL_MIRROR"),
        help="a mirror for all images that are not ours: docker.io/library/x is taken from"
        " PREFIX/docker.io/library/x; default: $DRIFTMILL_MIRROR",
    )  # fmt: skip
    up.add_argument(
        "--load", action=argparse.BooleanOptionalAction, default=True,
        help="load images that this machine's Docker has into the nodes [yes]",
    )  # fmt: skip
    up.add_argument(
        "--store-endpoint", metavar="URL", default=os.environ.get("AWS_ENDPOINT_URL"),
        help="S3 endpoint of the store, as pods reach it; default: $AWS_ENDPOINT_URL, else the"
        " object store of Kubeflow Pipelines",
    )  # fmt: skip
    up.add_argument(
        "--timeout", type=_seconds, default="15m", metavar="TIME",
        help="until all of it has to be ready, such as 90s, 15m, 1h [%(default)s]",
    )  # fmt: skip

    status = commands.add_parser(
        "status",
        help="show nodes, what is installed, and what is not ready",
        description="Show nodes, what is installed, and what is not ready and why.",
        epilog="Example: driftmill cluster status --json",
    )
    status.set_defaults(run=_status)
    status.add_argument("--name", default=NAME, type=_name, help="[%(default)s]")
    status.add_argument(
        "--context", default=os.environ.get("DRIFTMILL_CONTEXT"),
        help="another cluster of the kubeconfig; default: $DRIFTMILL_CONTEXT, else kind-NAME",
    )  # fmt: skip
    status.add_argument("--json", action="store_true", help="print JSON, for scripts")

    down = commands.add_parser(
        "down",
        help="remove the cluster and all that is in it",
        description="Remove the cluster and all that is in it, if `up` made it.",
        epilog="Example: driftmill cluster down",
    )
    down.set_defaults(run=_down)
    down.add_argument("--name", default=NAME, type=_name, help="[%(default)s]")

    commands.add_parser("explain", help="say why a pod does not run", add_help=False)
    return parser


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,48}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a cluster: small letters, digits, dots and dashes"
        )
    return text


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)(s|m|h)?", text)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; such as 90s, 15m, 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]


# --- up ---


@dataclass
class Plan:
    """What `up` is to apply, rendered before anything is made."""

    kinds: list[Object] = field(default_factory=list)
    base: list[Object] = field(default_factory=list)
    """With the pipelines, where they are wanted."""
    extras: dict[str, list[list[Object]]] = field(default_factory=dict)
    """By name: objects that are applied one after the other, each when the last are ready."""

    def every(self) -> Iterator[Object]:
        """All objects."""
        yield from (*self.kinds, *self.base)
        for steps in self.extras.values():
            for objects in steps:
                yield from objects


def plan(
    overlay: Path,
    *,
    pipelines: bool = True,
    without: Iterable[str] = (),
    extras: Iterable[str] = (),
    prefix: str | None = None,
    timeout: float = 600,
) -> Plan:
    """Render what is to be installed.

    Args:
        overlay: folder of the installation with the pipelines.
        pipelines: whether those are wanted; without them nothing is fetched.
        without: Deployments of the pipelines to leave out.
        extras: of `EXTRAS`.
        prefix: mirror for images.
        timeout: seconds for each rendering.

    Raises:
        ManifestError: something does not render.
    """

    def render(folder: Path) -> list[Object]:
        objects = manifests.render(folder, timeout=timeout)
        return manifests.mirrored(objects, prefix) if prefix else objects

    made = Plan()
    if pipelines:
        made.kinds = render(ROOT / "pipelines" / "crds")
        made.base = manifests.without(render(overlay), without)
    else:
        made.base = manifests.without(render(ROOT / "base"), without)
    for name in extras:
        made.extras[name] = [render(ROOT / folder) for folder in EXTRAS[name]]
    return made


def _up(options: argparse.Namespace) -> int:
    without = {word for words in options.without for word in words}
    extras = list(dict.fromkeys(word for words in options.extra for word in words))
    if foreign := [e for e in extras if e not in EXTRAS]:
        print(
            f"driftmill cluster: --with {foreign[0]} is none of {', '.join(EXTRAS)}",
            file=sys.stderr,
        )
        return USAGE
    overlay = ROOT / "overlays" / options.overlay
    if not (overlay / "kustomization.yaml").is_file():
        overlay = Path(options.overlay)
    if not (overlay / "kustomization.yaml").is_file():
        known = sorted(p.name for p in (ROOT / "overlays").iterdir() if p.is_dir())
        print(
            f"driftmill cluster: --overlay {options.overlay} is neither one of {', '.join(known)}"
            " nor a folder with a kustomization.yaml",
            file=sys.stderr,
        )
        return USAGE
    config = tools.read_config(options.config)
    pipelines = "pipelines" not in without

    phases = Phases()
    with phases.run("preflight") as say:
        checks = _preflight(options.name, config, pipelines=pipelines, remote=bool(extras))
        if any(c.state == "wrong" for c in checks):
            print(preflight.report(checks), file=sys.stderr)
            return _fail("this machine lacks what is marked `wrong`; mend that and start again")
        warnings = [c for c in checks if c.state == "warning"]
        say("; ".join(f"{c.name}: {c.found}; {c.mend}".rstrip("; ") for c in warnings) or "ok")

    from k8s import client  # half a second, and not needed before

    deadline = client.Deadline(options.timeout)
    with phases.run("manifests") as say:
        made = plan(
            overlay,
            pipelines=pipelines,
            without=without - {"pipelines"},
            extras=extras,
            prefix=options.image_prefix,
            timeout=deadline.left(),
        )
        say(f"{len(list(made.every()))} objects")
    context = f"kind-{options.name}"
    with phases.run("cluster") as say:
        say(ensure(options.name, config, deadline, say))
        cluster = client.Cluster(context)
        client.wait_for_nodes(cluster, config.node_count, deadline)
        add_gpus(cluster)
    if options.load:
        with phases.run("images") as say:
            say(load(options.name, made.every(), deadline))
    if made.kinds:
        with phases.run("kinds") as say:
            say(_apply_kinds(cluster, made.kinds, deadline))
    with phases.run("base" if not pipelines else "pipelines") as say:
        settings = _settings(cluster, options.store_endpoint, pipelines=pipelines)
        objects = configured(made.base, settings) + _secrets(cluster, made.base)
        say(
            f"{len(tools.apply(context, manifests.dump(objects), deadline.left()))} objects applied"
        )
        _wait(cluster, made.base, deadline, say)
    for name, steps in made.extras.items():
        with phases.run(name) as say:
            for objects in steps:
                kinds, others = manifests.split(objects, ["CustomResourceDefinition"])
                if kinds:
                    _apply_kinds(cluster, kinds, deadline)
                tools.apply(context, manifests.dump(others), deadline.left())
                _wait(cluster, others, deadline, say)
    print(f"ready after {phases.total():.0f} s; kubectl --context {context} get pods -A")
    has_page = any(o["metadata"]["name"] == "ml-pipeline-ui" for o in made.base if _runs(o))
    print(*next_steps(context, config, has_page), sep="\n")
    return OK


def _runs(each: Object) -> bool:
    return bool(each["kind"] == "Deployment")


def next_steps(context: str, config: tools.Config, has_page: bool) -> list[str]:
    """What to do with a new cluster."""
    if not has_page:
        return []
    page = _page(config)
    if page is None:
        forward = f"kubectl --context {context} -n kubeflow port-forward svc/ml-pipeline-ui 8080:80"
        return [f"the page of Kubeflow Pipelines: `{forward}`, then http://127.0.0.1:8080"]
    return [
        f"the page of Kubeflow Pipelines: {page}",
        f"a run: driftmill submit CONTRACT --endpoint {page} --store s3://mlpipeline/driftmill",
    ]


#: Node port of the page of Kubeflow Pipelines, see overlays/kind.
_PAGE_PORT = 30080


def _page(config: tools.Config) -> str | None:
    """Where the page is open on this machine, if the kind configuration leads a port there."""
    for node in config.document["nodes"]:
        for mapping in node.get("extraPortMappings") or []:
            if mapping.get("containerPort") == _PAGE_PORT:
                return f"http://127.0.0.1:{mapping['hostPort']}"
    return None


def _preflight(
    name: str, config: tools.Config, *, pipelines: bool, remote: bool
) -> list[preflight.Check]:
    needs = preflight.PIPELINES if pipelines else preflight.BARE
    ports: Sequence[tuple[str, int]] = config.ports
    # One that is there has its memory and ports already.
    try:
        if tools.nodes(name):
            needs = preflight.Needs(0, 0, 2 * preflight.GIB, 0, 0)
            ports = ()
    except ToolError:
        pass  # the checks say what is wrong with Docker, and all else
    return preflight.check(needs, ports, git=pipelines or remote)


def ensure(name: str, config: tools.Config, deadline: Deadline, say: Callable[[str], None]) -> str:
    """Make the kind cluster unless it is there, whole, and ours.

    Returns:
        What was done, in words.

    Raises:
        ToolError: it cannot be made, or a cluster of that name is not ours.
    """
    there = tools.nodes(name)
    _refuse_foreign(name, there)
    done = "made"
    if stopped := [node.name for node in there if not node.running]:
        say("starting its nodes")
        tools.start(stopped)
    if there:
        if _is_whole(name, len(there), patience=90 if stopped else 20):
            return "started again" if stopped else "there already"
        say("an earlier start was cut short; making it anew")
        tools.delete(name)
        done = "made anew, an earlier start was cut short"
    image = os.environ.get("KIND_NODE_IMAGE")
    for attempt in range(1, TRIES + 1):
        try:
            say(f"making {config.node_count} nodes" + (f", try {attempt}" if attempt > 1 else ""))
            tools.create(name, config, image, deadline.left())
            return f"{config.node_count} nodes {done}"
        except tools.SlowStartError:
            if attempt == TRIES or deadline.passed():
                raise
    raise AssertionError("unreachable")


def _refuse_foreign(name: str, nodes: Iterable[tools.Node]) -> None:
    if foreign := [node.name for node in nodes if not node.ours]:
        raise ToolError(
            f"the kind cluster {name} was not made by `driftmill cluster up` ({foreign[0]} bears no"
            f" mark of it) and is left alone; choose another --name, or `kind delete cluster --name"
            f" {name}`"
        )


def _is_whole(name: str, count: int, patience: float) -> bool:
    """Whether the making of a cluster came to its end: all nodes joined, storage set up."""
    from k8s import client

    try:
        tools.export_kubeconfig(name)
        cluster = client.Cluster(f"kind-{name}")
    except (ToolError, client.ClusterError):
        return False
    deadline = client.Deadline(patience)
    while True:
        try:
            joined = len(cluster.items("/api/v1/nodes"))
            classes = cluster.items("/apis/storage.k8s.io/v1/storageclasses")
            return joined == count and bool(classes)
        except client.UnreachableError:
            if deadline.passed():
                return False
            time.sleep(client.INTERVAL)


def add_gpus(cluster: Cluster) -> None:
    """Give the nodes that stand for GPU nodes the resource itself, for the scheduler to count.

    No device is behind it: pods that ask for a GPU are placed, and find none.
    """
    for node in cluster.items("/api/v1/nodes"):
        labels, status = node["metadata"].get("labels", {}), node["status"]
        if GPU_PRODUCT in labels and GPU not in status["allocatable"]:
            count = {GPU: labels.get(GPU_COUNT, "1")}
            path = f"/api/v1/nodes/{node['metadata']['name']}"
            cluster.patch_status(path, {"capacity": count, "allocatable": count})


def load(name: str, objects: Iterable[Object], deadline: Deadline) -> str:
    """Load images that Docker has into the nodes: Driftmill's, and those of the manifests.

    Images for GPUs stay out: they are large, and kind's nodes have no GPU.

    Returns:
        What was done, in words.
    """
    local = tools.local_images()
    ours = [images.reference(n) for n in images.IMAGES if not n.endswith("-cuda")]
    theirs = [i for i in manifests.images(objects) if manifests.full_name(i) in local]
    found = [i for i in ours if manifests.full_name(i) in local]
    if not (found or theirs):
        return "none of them is in this machine's Docker; nodes pull what they need"
    tools.load(name, [*found, *theirs], deadline.left())
    return f"{len(found)} of ours and {len(theirs)} others on all nodes"


def _apply_kinds(cluster: Cluster, kinds: list[Object], deadline: Deadline) -> str:
    from k8s import client

    tools.apply(cluster.context, manifests.dump(kinds), deadline.left())
    names = [k["metadata"]["name"] for k in kinds if k["kind"] == "CustomResourceDefinition"]
    client.wait_for_kinds(cluster, names, deadline)
    return f"{len(names)} established"


def _wait(
    cluster: Cluster, objects: Iterable[Object], deadline: Deadline, say: Callable[[str], None]
) -> None:
    from k8s import client

    wanted = [
        (o["metadata"]["namespace"], o["metadata"]["name"])
        for o in objects
        if o["kind"] == "Deployment"
    ]
    if wanted:
        client.retry_pulls(cluster, wanted)
        client.wait_for_deployments(cluster, wanted, deadline, say)


# --- settings of the steps and services ---


def _settings(cluster: Cluster, endpoint: str | None, *, pipelines: bool) -> dict[str, str]:
    """Values of the ConfigMap `driftmill`: what is given now, else what stands there already."""
    there: dict[str, str] = {}
    found = cluster.find("/api/v1/namespaces/kubeflow/configmaps/driftmill")
    if found is not None:
        there = found.get("data") or {}
    given = {}
    if endpoint and not _is_loopback(endpoint):
        given["AWS_ENDPOINT_URL"] = endpoint
    if region := os.environ.get("AWS_REGION"):
        given["AWS_REGION"] = region
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if tracking.startswith(("http://", "https://")) and not _is_loopback(tracking):
        given["MLFLOW_TRACKING_URI"] = tracking
    default = {"AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000"} if pipelines else {}
    return {**default, **there, **given}


def _is_loopback(url: str) -> bool:
    """Whether a URL names the machine that reads it, which in a pod is the pod."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "0.0.0.0")  # noqa: S104


def configured(objects: Iterable[Object], settings: Mapping[str, str]) -> list[Object]:
    """The same objects with settings put into each ConfigMap `driftmill`."""
    return [
        {**o, "data": {**o.get("data", {}), **settings}}
        if o["kind"] == "ConfigMap" and o["metadata"]["name"] == "driftmill"
        else o
        for o in objects
    ]


def _secrets(cluster: Cluster, objects: Iterable[Object]) -> list[Object]:
    """The Secret `driftmill-store` of each namespace: from the environment or, where none is there
    yet, with the key of the object store that comes with Kubeflow Pipelines."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    wanted: Sequence[str] = NAMESPACES
    if not (key and secret):
        own: Object = next(
            (
                o.get("stringData", {})
                for o in objects
                if o["kind"] == "Secret" and o["metadata"]["name"] == "mlpipeline-minio-artifact"
            ),
            {},
        )
        key, secret = own.get("accesskey"), own.get("secretkey")
        path = "/api/v1/namespaces/{}/secrets/driftmill-store"
        wanted = [n for n in NAMESPACES if cluster.find(path.format(n)) is None]
    if not (key and secret):
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": "driftmill-store",
                "namespace": namespace,
                "labels": {"app.kubernetes.io/part-of": "driftmill"},
            },
            "stringData": {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret},
        }
        for namespace in wanted
    ]


# --- progress ---


class Phases:
    """Says what is being done and how long it took."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @contextmanager
    def run(self, name: str) -> Iterator[Callable[[str], None]]:
        """One phase; gives a function to say how it gets on. The last word is kept."""
        from rich.console import Console

        began, last = time.monotonic(), ""
        console = Console(stderr=True)
        with console.status(name) as spinner:

            def say(text: str) -> None:
                nonlocal last
                last = text
                spinner.update(f"{name}: {text}")

            yield say
        print(f"{name:<10} {time.monotonic() - began:5.1f} s  {last}", flush=True)


# --- status ---


def _status(options: argparse.Namespace) -> int:
    from k8s import client

    context = options.context or f"kind-{options.name}"
    if not options.context and not tools.nodes(options.name):
        return _fail(f"there is no kind cluster {options.name}; `driftmill cluster up` makes it")
    facts = look(client.Cluster(context))
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(_shown(facts))
    return OK if facts["ready"] else FAILED


def look(cluster: Cluster) -> dict[str, Any]:
    """The state of a cluster, as `status --json` prints it.

    Raises:
        ClusterError: it does not answer, or this user may not look.
    """
    from k8s import client

    nodes = [
        {
            "name": n["metadata"]["name"],
            "ready": client.is_true(n, "Ready"),
            "version": n["status"]["nodeInfo"]["kubeletVersion"],
            "gpus": int(n["status"]["allocatable"].get(GPU, 0)),
        }
        for n in cluster.items("/api/v1/nodes")
    ]
    kinds = {
        k["metadata"]["name"]
        for k in cluster.items("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
    }
    deployments: list[Object] = []
    troubles: list[str] = []
    present = [n for n in NAMESPACES if cluster.find(f"/api/v1/namespaces/{n}") is not None]
    for namespace in present:
        for each in cluster.items(f"/apis/apps/v1/namespaces/{namespace}/deployments"):
            ready = client.is_ready(each)
            name = f"{namespace}/{each['metadata']['name']}"
            deployments.append({"name": name, "ready": ready})
        unready = [
            pod
            for pod in cluster.items(f"/api/v1/namespaces/{namespace}/pods")
            if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
            and not client.is_true(pod, "Ready")
        ]
        if unready:
            troubles += map(explainer(cluster.items, namespace), unready)
    names = {d["name"] for d in deployments}
    return {
        "context": cluster.context,
        "ready": bool(nodes)
        and all(n["ready"] for n in nodes)
        and len(present) == len(NAMESPACES)
        and all(d["ready"] for d in deployments),
        "nodes": nodes,
        "installed": {
            "base": len(present) == len(NAMESPACES),
            "pipelines": "kubeflow/ml-pipeline" in names,
            "kueue": "clusterqueues.kueue.x-k8s.io" in kinds,
            "trainer": "trainjobs.trainer.kubeflow.org" in kinds,
        },
        "deployments": deployments,
        "not_ready": troubles,
    }


def _shown(facts: Mapping[str, Any]) -> str:
    lines = [f"{facts['context']}: {'ready' if facts['ready'] else 'not ready'}"]
    for node in facts["nodes"]:
        gpus = f", {node['gpus']} GPU for tests of scheduling" if node["gpus"] else ""
        state = "ready" if node["ready"] else "not ready"
        lines.append(f"  {node['name']}  {node['version']}  {state}{gpus}")
    installed = [name for name, there in facts["installed"].items() if there]
    lines.append(f"installed: {', '.join(installed) or 'nothing; run `driftmill cluster up`'}")
    if facts["deployments"]:
        ready = sum(d["ready"] for d in facts["deployments"])
        lines.append(f"deployments: {ready} of {len(facts['deployments'])} ready")
    lines += [f"  {trouble}" for trouble in facts["not_ready"]]
    if facts["installed"]["pipelines"]:
        lines.append(
            f"page: kubectl --context {facts['context']} -n kubeflow port-forward"
            " svc/ml-pipeline-ui 8080:80, then http://127.0.0.1:8080 (clusters of `up` have it"
            " there without)"
        )
    return "\n".join(lines)


# --- down ---


def _down(options: argparse.Namespace) -> int:
    there = tools.nodes(options.name)
    if not there:
        print(f"there is no kind cluster {options.name}")
        return OK
    _refuse_foreign(options.name, there)
    tools.delete(options.name)
    print(f"removed the kind cluster {options.name}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
