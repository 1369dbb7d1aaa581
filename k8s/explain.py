"""Why a pod does not run, in one sentence with a next step.

`driftmill cluster explain POD` reads the pod and what surrounds it: nodes with their labels, taints
and what is taken of them, claims, events. The reason is worked out from these, for the scheduler's
own message counts nodes ("0/9 nodes are available: 4 node(s) had untolerated taint ...") and does
not say which node would have done, nor what to change. Its message is used where nothing is found.

`explain` and `refusal` take objects as the API gives them (JSON) and ask no cluster.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k8s.client import Cluster

#: An object of the API, as JSON.
Object = Mapping[str, Any]

CONTEXT = "kind-driftmill"
NAMESPACE = "kubeflow"
#: Kueue's gate, and its label that names the queue.
KUEUE_GATE, KUEUE_QUEUE = "kueue.x-k8s.io/admission", "kueue.x-k8s.io/queue-name"
#: Taints that Kubernetes itself puts on a node, and what they say of it.
CONDITIONS = {
    "node.kubernetes.io/not-ready": "is not ready",
    "node.kubernetes.io/unreachable": "cannot be reached",
    "node.kubernetes.io/unschedulable": "is cordoned",
    "node.kubernetes.io/disk-pressure": "is short of disk",
    "node.kubernetes.io/memory-pressure": "is short of memory",
    "node.kubernetes.io/pid-pressure": "is short of process ids",
    "node.kubernetes.io/network-unavailable": "has no network",
}
CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName")
#: Field of the contract that asks for a resource.
FIELDS = {"cpu": "train.resources.cpu", "memory": "train.resources.memory"}


def main(arguments: list[str] | None = None) -> int:
    """Explain pods; 0 if each could be explained, 1 if there is none or the cluster does not
    answer, 2 for a wrong context."""
    parser = argparse.ArgumentParser(
        prog="driftmill cluster explain",
        description="Say in one sentence why a pod does not run, and what to do about it.",
        epilog="Example: driftmill cluster explain -n kubeflow --selector driftmill/model=payments",
    )
    parser.add_argument("pod", nargs="?", help="name of the pod")
    parser.add_argument("--selector", "-l", metavar="LABELS", help="instead: all with these labels")
    parser.add_argument("--namespace", "-n", default=NAMESPACE, help="default: %(default)s")
    parser.add_argument(
        "--context",
        default=os.environ.get("DRIFTMILL_CONTEXT") or CONTEXT,
        help="which cluster of the kubeconfig; default: $DRIFTMILL_CONTEXT, else %(default)s",
    )
    options = parser.parse_args(arguments)
    if (options.pod is None) == (options.selector is None):
        parser.error("name a pod, or give --selector LABELS")
    # Half a second to import: help and wrong usage come before it.
    from k8s.client import Cluster, ClusterError

    try:
        cluster = Cluster(options.context)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        said = sentences(cluster, options.namespace, name=options.pod, selector=options.selector)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(said))
    return 0


def explain(
    pod: Object,
    nodes: Sequence[Object] = (),
    events: Sequence[Object] = (),
    *,
    pods: Sequence[Object] = (),
    claims: Sequence[Object] = (),
) -> str:
    """What a pod waits for or died of, and what to do about it.

    Args:
        pod: the pod.
        nodes: all nodes; without them the scheduler's own message is used.
        events: of the pod's namespace; events of other objects are left aside, but for those of
            the pod's claims and Kueue's workload.
        pods: of all namespaces, to see what is taken of each node.
        claims: PersistentVolumeClaims of the pod's namespace.

    Returns:
        One sentence that starts with the pod's name.
    """
    name = pod["metadata"]["name"]
    status = pod.get("status", {})
    about = _about(pod, events)
    if pod["metadata"].get("deletionTimestamp"):
        return f"{name} is being deleted."
    if status.get("phase") == "Succeeded":
        return f"{name} has finished."
    if status.get("phase") == "Failed":
        return f"{name} failed: {_death(pod)}."
    if gates := [g["name"] for g in pod["spec"].get("schedulingGates", [])]:
        return f"{name} waits: {_gated(pod, gates, events)}."
    if not pod["spec"].get("nodeName"):
        return f"{name} waits: {_unscheduled(pod, nodes, about, pods, claims, events)}."
    return f"{name} {_on_its_node(pod, about)}."


def refusal(message: str) -> str:
    """What the API server's reason for refusing a pod means, and what to do about it; one
    sentence without a full stop. `message` is that of the error, or of the event `FailedCreate`.
    """
    who = f"{found[1]} was refused" if (found := re.search(r'pods "([^"]+)"', message)) else (
        "the pod was refused"
    )  # fmt: skip
    if found := re.search(r'violates PodSecurity "([a-z]+):[^"]*": (.*)', message):
        # Each clause ends with what to set, in brackets; the rule is enough here.
        rules = ", ".join(re.sub(r"\s*\([^)]*\)", "", found[2]).split(", "))
        return (
            f"{who}: its namespace takes only pods of the {found[1]} Pod Security level, and this "
            f"one breaks it ({rules}); set a security context that passes, as compiled packages do"
        )
    if found := re.search(r"exceeded quota: (\S+), (requested: .*)", message):
        return (
            f"{who}: it exceeds the quota {found[1]} of its namespace ({found[2]}); wait until "
            "other pods have ended, ask for less in train.resources, or raise the quota"
        )
    if found := re.search(r"failed quota: ([^:]+): must specify (.*)", message):
        return (
            f"{who}: the quota {found[1]} demands that every container states {found[2]}; state "
            "it, or give the namespace a LimitRange with defaults"
        )
    if found := re.search(r"error looking up service account (\S+?)/([^:\s]+):", message):
        return (
            f"{who}: the service account {found[2]} is missing from the namespace {found[1]}; "
            f"`kubectl -n {found[1]} create serviceaccount {found[2]}` makes it"
        )
    if found := re.search(r"(maximum|minimum) (\w+) usage per (\w+) is ([^,.]+)", message):
        return (
            f"{who}: a LimitRange of its namespace sets a {found[1]} {found[2]} of "
            f"{found[4].strip()} for a {found[3].lower()}; ask for what lies within, or change it"
        )
    if found := re.search(r'User "([^"]+)" cannot (\w+) resource "(\w+)"', message):
        return f"{who}: {found[1]} may not {found[2]} {found[3]} there; bind a Role that allows it"
    return f"{who}: {_line(message.rpartition(' is forbidden: ')[2])}"


# --- before a node is found ---


@dataclass(frozen=True)
class _Obstacle:
    """What keeps a pod off a node.

    `weight` orders obstacles by how far they are from being overcome: of several nodes the one
    with the least weight is worth talking about. Its fraction tells how much of a resource is
    lacking. `{nodes}` in `text` stands for the names of all nodes of which the same is to be said;
    `remedy` is what to do.
    """

    weight: float
    text: str
    remedy: str


def _unscheduled(
    pod: Object,
    nodes: Sequence[Object],
    about: Sequence[Object],
    pods: Sequence[Object],
    claims: Sequence[Object],
    events: Sequence[Object],
) -> str:
    if reason := _claim(pod, about, claims, events):
        return reason
    said = next((e["message"] for e in about if e.get("reason") == "FailedScheduling"), "")
    said = said or _condition(pod, "PodScheduled").get("message", "")
    if not nodes:
        return f"the scheduler says: {_line(said)}" if said else _unseen(pod)
    by_node = [(n, _obstacles(pod, n, nodes, pods)) for n in nodes]
    if not all(obstacles for _, obstacles in by_node):
        return f"the scheduler says: {_line(said)}" if said else _unseen(pod)
    _, obstacles = min(by_node, key=lambda one: sum(o.weight for o in one[1]))
    names = _list([n["metadata"]["name"] for n, o in by_node if o == obstacles])
    texts = ", and ".join(o.text.replace("{nodes}", names) for o in obstacles)
    return f"{texts}; {', and '.join(dict.fromkeys(o.remedy for o in obstacles))}"


def _unseen(pod: Object) -> str:
    scheduler = pod["spec"].get("schedulerName", "default-scheduler")
    if scheduler != "default-scheduler":
        return (
            f"no scheduler has looked at it yet, and it asks for the one called {scheduler}; "
            "see whether that runs"
        )
    return "no scheduler has looked at it yet; ask again in some seconds"


def _obstacles(
    pod: Object, node: Object, nodes: Sequence[Object], pods: Sequence[Object]
) -> list[_Obstacle]:
    """All that keeps the pod off the node; none: it would fit."""
    return [
        *_taints(pod, node),
        *_labels(pod, node, nodes),
        *_resources(pod, node, nodes, pods),
    ]


def _taints(pod: Object, node: Object) -> Iterator[_Obstacle]:
    for taint in node["spec"].get("taints", []):
        if taint["effect"] == "PreferNoSchedule" or any(
            _tolerates(t, taint) for t in pod["spec"].get("tolerations", [])
        ):
            continue
        key = taint["key"]
        if key in CONDITIONS:
            remedy = "`kubectl describe node` says more"
            if key == "node.kubernetes.io/unschedulable":
                remedy = "`kubectl uncordon NODE` opens it again"
            yield _Obstacle(3, f"{{nodes}} would do, but {CONDITIONS[key]}", remedy)
        elif key == CONTROL_PLANE:
            # No step belongs there: another node must be nearer than this one.
            yield _Obstacle(50, "{nodes} is kept for the control plane", "add a node")
        else:
            value = f"={taint['value']}" if taint.get("value") else ""
            yield _Obstacle(
                5,
                f"the taint {key}{value}:{taint['effect']} of {{nodes}} is not tolerated",
                "add a toleration to train.resources.tolerations",
            )


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if not toleration.get("key"):
        return toleration.get("operator") == "Exists"
    if toleration["key"] != taint["key"]:
        return False
    exists = toleration.get("operator") == "Exists"
    return exists or toleration.get("value", "") == taint.get("value", "")


def _labels(pod: Object, node: Object, nodes: Sequence[Object]) -> Iterator[_Obstacle]:
    labels = node["metadata"].get("labels", {})
    for key, value in pod["spec"].get("nodeSelector", {}).items():
        if labels.get(key) != value:
            yield _Obstacle(
                10,
                _unlike(key, labels.get(key), f"{key}={value}", nodes),
                f"label a node (`kubectl label node NODE {key}={value}`) or change "
                "train.resources.node_selector",
            )
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get(
        "nodeSelectorTerms", []
    )
    fields = {"metadata.name": node["metadata"]["name"]}
    unmet = [
        [e for e in term.get("matchExpressions", []) if not _matches(e, labels)]
        + [e for e in term.get("matchFields", []) if not _matches(e, fields)]
        for term in terms
    ]
    if terms and all(unmet):  # terms are alternatives: the nearest one is worth talking about
        for rule in min(unmet, key=len):
            key = rule["key"]
            product = key == "nvidia.com/gpu.product"
            yield _Obstacle(
                10,
                _unlike(key, labels.get(key), _rule(rule), nodes),
                "add such a node or change "
                + ("train.resources.gpu_products" if product else "the node affinity"),
            )


def _unlike(key: str, has: str | None, wanted: str, nodes: Sequence[Object]) -> str:
    """How a node differs from what is wanted of its label."""
    if has is not None:
        return f"it asks for nodes with {wanted}, and {key} of {{nodes}} is {has}"
    if any(key in n["metadata"].get("labels", {}) for n in nodes):
        return f"it asks for nodes with {wanted}, and {{nodes}} has no label {key}"
    return f"it asks for nodes with {wanted}, and no node has the label {key}"


def _rule(rule: Object) -> str:
    """A label expression in words."""
    key, values = rule["key"], rule.get("values", [])
    match rule["operator"]:
        case "In" if len(values) == 1:
            return f"{key}={values[0]}"
        case "Exists":
            return str(key)
        case "DoesNotExist":
            return f"no {key}"
        case operator:
            words = {"In": "in", "NotIn": "not in", "Gt": "above", "Lt": "below"}
            return f"{key} {words.get(operator, operator)} {', '.join(values)}"


def _matches(rule: Object, labels: Mapping[str, str]) -> bool:
    has, values = labels.get(rule["key"]), rule.get("values", [])
    match rule["operator"]:
        case "In":
            return has in values
        case "NotIn":
            return has not in values
        case "Exists":
            return has is not None
        case "DoesNotExist":
            return has is None
        case "Gt":
            return has is not None and has.isdecimal() and int(has) > int(values[0])
        case _:  # Lt
            return has is not None and has.isdecimal() and int(has) < int(values[0])


def _resources(
    pod: Object, node: Object, nodes: Sequence[Object], pods: Sequence[Object]
) -> Iterator[_Obstacle]:
    there = [
        p
        for p in pods
        if p["spec"].get("nodeName") == node["metadata"]["name"]
        and p.get("status", {}).get("phase") not in ("Succeeded", "Failed")
    ]
    allocatable = node.get("status", {}).get("allocatable", {})
    if len(there) >= int(allocatable.get("pods", 110)):
        yield _Obstacle(1, "{nodes} holds as many pods as it may", "wait, or add a node")
    for resource, wanted in requests(pod).items():
        if not wanted:
            continue
        has = _quantity(allocatable.get(resource, "0"))
        field = FIELDS.get(resource, "train.resources.gpu")
        if not has:
            if any(_quantity(n["status"]["allocatable"].get(resource, "0")) for n in nodes):
                yield _Obstacle(100, f"{{nodes}} has no {resource}", f"add a node with {resource}")
            else:
                remedy = f"add a node with {resource}"
                if "gpu" in resource:
                    remedy = "add a GPU node, or install the device plugin that announces its GPUs"
                asked = f"it asks for {_amount(resource, wanted)}, and no node has any"
                yield _Obstacle(100, asked, remedy)
            continue
        if wanted > has:
            yield _Obstacle(
                20 + float(1 - has / wanted),
                f"it asks for {_amount(resource, wanted)}, more than the "
                f"{_number(resource, has)} of {{nodes}}",
                f"lower {field} or add a larger node",
            )
            continue
        takers = {
            f"{p['metadata']['namespace']}/{p['metadata']['name']}": requests(p).get(
                resource, Decimal()
            )
            for p in there
        }
        free = has - sum(takers.values())
        if wanted > free:
            most = sorted((t for t in takers if takers[t]), key=lambda t: (-takers[t], t))
            yield _Obstacle(
                1 + float(min(wanted - free, wanted) / wanted),
                f"it asks for {_amount(resource, wanted)}, and of the {_number(resource, has)} of "
                f"{{nodes}} {f'only {_number(resource, free)}' if free > 0 else 'none'} is free "
                f"({_list(most, 2)} {'hold' if len(most) > 1 else 'holds'} the rest)",
                f"wait until that ends, lower {field} or add a node",
            )


def requests(pod: Object) -> dict[str, Decimal]:
    """What the scheduler reserves for a pod, by resource, in cores, bytes and pieces."""
    spec = pod["spec"]
    total = _sum(spec["containers"])
    starting: dict[str, Decimal] = {}  # most that is needed at once while it starts
    for container in spec.get("initContainers", []):
        own = _sum([container])
        if container.get("restartPolicy") == "Always":  # a side car: stays
            total = _join(total, own, lambda a, b: a + b)
        else:
            starting = _join(starting, own, max)
    overhead = {k: _quantity(v) for k, v in spec.get("overhead", {}).items()}
    return _join(_join(total, starting, max), overhead, lambda a, b: a + b)


def _sum(containers: Iterable[Object]) -> dict[str, Decimal]:
    total: dict[str, Decimal] = {}
    for container in containers:
        asked = container.get("resources") or {}
        # The API server does the same: what has a limit and no request requests its limit.
        either = {**(asked.get("limits") or {}), **(asked.get("requests") or {})}
        own = {k: _quantity(v) for k, v in either.items()}
        total = _join(total, own, lambda a, b: a + b)
    return total


def _join(
    one: Mapping[str, Decimal],
    two: Mapping[str, Decimal],
    how: Callable[[Decimal, Decimal], Decimal],
) -> dict[str, Decimal]:
    return {k: how(one.get(k, Decimal()), two.get(k, Decimal())) for k in {**one, **two}}


def _claim(
    pod: Object, about: Sequence[Object], claims: Sequence[Object], events: Sequence[Object]
) -> str:
    """What is wrong with the pod's volumes, if the scheduler waits for them."""
    by_name = {c["metadata"]["name"]: c for c in claims}
    waiting = next((e["message"] for e in about if e.get("reason") == "FailedScheduling"), "")
    for volume in pod["spec"].get("volumes", []):
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        if name is None:
            continue
        if f'persistentvolumeclaim "{name}" not found' in waiting:
            return f"the volume claim {name} does not exist; create it in the pod's namespace"
        claim = by_name.get(name)
        if claim is None or claim.get("status", {}).get("phase") != "Pending":
            continue
        problem = next(
            (e["message"] for e in _of("PersistentVolumeClaim", name, events)
             if e.get("type") == "Warning"), "",
        )  # fmt: skip
        if problem or "unbound immediate" in waiting:
            kind = claim["spec"].get("storageClassName")
            with_class = f"of storage class {kind}" if kind else "without a storage class"
            return (
                f"the volume claim {name} ({with_class}) has no volume"
                + (f": {_line(problem)}" if problem else "")
                + "; `kubectl get storageclass` lists the classes that there are"
            )
    return ""


def _gated(pod: Object, gates: Sequence[str], events: Sequence[Object]) -> str:
    if KUEUE_GATE not in gates:
        return f"it is held by the scheduling gate {_list(gates)}; see who is to lift it"
    queue = pod["metadata"].get("labels", {}).get(KUEUE_QUEUE, "")
    name = pod["metadata"]["name"]
    said = next(
        (
            e["message"]
            for e in _newest_first(events)
            if e["involvedObject"].get("kind") == "Workload"
            and e["involvedObject"].get("name", "").startswith(f"pod-{name}")
        ),
        "",
    )
    return (
        f"Kueue has not admitted it from the queue {queue}"
        + (f" ({_line(said)})" if said else "")
        + "; wait for quota, or see `kubectl get localqueue,workload`"
    )


# --- on its node ---


def _on_its_node(pod: Object, about: Sequence[Object]) -> str:
    node = pod["spec"]["nodeName"]
    status = pod.get("status", {})
    states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in states:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in (
            None, "ContainerCreating", "PodInitializing",
        ):  # fmt: skip
            return _waiting(pod, container, waiting)
    if status.get("phase") == "Running":
        unready = [c["name"] for c in status.get("containerStatuses", []) if not c.get("ready")]
        probe = next((e["message"] for e in about if e.get("reason") == "Unhealthy"), "")
        if unready and probe:
            return (
                f"runs on {node}, but {_list(unready)} is not ready: {_line(probe)}; "
                f"`kubectl logs {pod['metadata']['name']}` says more"
            )
        return f"runs on {node}"
    for event in about:
        if event.get("reason") in ("FailedMount", "FailedAttachVolume"):
            return f"waits on {node}: {_missing(event['message']) or _line(event['message'])}"
        if event.get("reason") == "FailedCreatePodSandBox":
            return f"waits on {node}, which cannot set it up: {_line(event['message'])}"
        if event.get("reason") == "Pulling":
            return f"waits on {node}, which pulls its image; ask again in a minute"
    return f"starts on {node}; ask again in some seconds"


def _waiting(pod: Object, container: Object, waiting: Object) -> str:
    node = pod["spec"]["nodeName"]
    reason, message = waiting["reason"], waiting.get("message", "")
    if reason in IMAGE_REASONS:
        return f"waits on {node}: {_image(container['image'], reason, message)}"
    if reason == "CrashLoopBackOff":
        ended = container.get("lastState", {}).get("terminated", {})
        return f"crashes again and again on {node}: {_ended(pod, container, ended)}"
    if found := _missing(message):
        return f"waits on {node}: {found}"
    if "runAsNonRoot" in message:
        return (
            f"waits on {node}: its image {container['image']} would run as root, or does not name "
            "its user by number; rebuild it with `driftmill images build` or set runAsUser"
        )
    return f"waits on {node}: {reason}, {_line(message)}"


def _image(image: str, reason: str, message: str) -> str:
    if reason == "InvalidImageName":
        return f"{image} is not the name of an image; correct it and compile again"
    if reason == "ErrImageNeverPull":
        why = "is not on the node and its pull policy is Never"
    elif re.search(r"not found|manifest unknown", message):
        why = "does not exist in its registry"
    elif re.search(r"denied|unauthorized|authentication required|\b40[13]\b", message):
        why = "is refused by its registry, which wants credentials"
    elif re.search(r"no such host|refused|timeout|unreachable|network|server misbehaving", message):
        why = "cannot be pulled, as its registry cannot be reached from the node"
    else:
        why = f"cannot be pulled ({_line(message)})"
    return (
        f"the image {image} {why}; `driftmill images build --push` puts it into a registry, "
        f"`kind load docker-image {image}` onto the nodes of kind"
    )


def _missing(message: str) -> str:
    """The Secret or ConfigMap, or the key of one, that a message says is missing."""
    if found := re.search(r'(secret|configmap) "([^"]+)" not found', message):
        kind = "Secret" if found[1] == "secret" else "ConfigMap"
        return (
            f"the {kind} {found[2]} is missing from its namespace; create it "
            f"(`kubectl create {'secret generic' if kind == 'Secret' else 'configmap'} {found[2]} "
            "--from-literal=KEY=VALUE`)"
        )
    if found := re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) \S+?/(\S+)", message):
        return f"the {found[2]} {found[3]} has no key {found[1]}; add it"
    return ""


def _death(pod: Object) -> str:
    status = pod.get("status", {})
    if status.get("reason") == "DeadlineExceeded":
        return (
            f"it ran longer than its {pod['spec'].get('activeDeadlineSeconds')} s; "
            "raise train.resources.timeout"
        )
    if status.get("reason") == "Evicted":
        return f"its node threw it out ({_line(status.get('message', ''))}); run it again"
    states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in states:
        ended = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode"):
            return _ended(pod, container, ended)
    said = _line(status.get("message") or status.get("reason") or "it does not say why")
    return f"{said}; `kubectl describe pod {pod['metadata']['name']}` says more"


def _ended(pod: Object, container: Object, ended: Object) -> str:
    name = container["name"]
    if ended.get("reason") == "OOMKilled":
        spec: Object = next(
            (c for c in pod["spec"]["containers"] if c["name"] == name), {"resources": {}}
        )
        limit = spec.get("resources", {}).get("limits", {}).get("memory", "")
        return (
            f"{name} was killed because it used more than its {limit} of memory; "
            "raise train.resources.memory"
        )
    said = ended.get("message", "")
    if found := re.search(r'exec: ("[^"]+"): .*(no such file|not found)', said):
        return (
            f"the image of {name} has no program {found[1]}; correct the command or build the "
            "image again"
        )
    return (
        f"{name} ended with exit code {ended.get('exitCode')}"
        + (f" ({_line(said)})" if said else "")
        + f"; `kubectl logs {pod['metadata']['name']} -c {name}` says why"
    )


# --- reading a cluster ---


def sentences(
    cluster: Cluster, namespace: str, *, name: str | None = None, selector: str | None = None
) -> list[str]:
    """A sentence for each pod that is sought, or for each that could not be made.

    Args:
        cluster: where.
        namespace: of the pods.
        name: of the pod, or
        selector: labels of the pods.

    Raises:
        ClusterError: there is no such pod and nothing says why, or the cluster does not answer.
    """
    from k8s.client import ClusterError, ForbiddenError

    def items(path: str) -> list[Object]:
        try:
            return list(cluster.items(path))
        except ForbiddenError:
            return []  # a reason can often be found without

    place = f"/api/v1/namespaces/{namespace}"
    query = (
        {"fieldSelector": f"metadata.name={name}"} if name else {"labelSelector": selector or ""}
    )
    if sought := cluster.items(f"{place}/pods", **query):
        return list(map(explainer(items, namespace), sought))
    if refused := list(_never_made(items(f"{place}/events"), name, selector)):
        return refused
    what = name or f"with the labels {selector}"
    raise ClusterError(
        f"there is no pod {what} in the namespace {namespace}, and no event that says why; "
        "`kubectl get pods --all-namespaces` shows where it may be"
    )


def explainer(items: Callable[[str], Sequence[Object]], namespace: str) -> Callable[[Object], str]:
    """Reads what surrounds the pods of a namespace, once, and gives what explains each of them.

    Args:
        items: reads a list of the API by its path.
        namespace: of the pods.
    """
    place = f"/api/v1/namespaces/{namespace}"
    return partial(
        explain,
        nodes=items("/api/v1/nodes"),
        events=items(f"{place}/events"),
        pods=items("/api/v1/pods"),
        claims=items(f"{place}/persistentvolumeclaims"),
    )


def _never_made(events: Sequence[Object], name: str | None, selector: str | None) -> Iterator[str]:
    """Why pods were refused before they existed, by the events of what was to make them."""
    # Events carry no labels: of a selector the values must do (`app=web` finds `web-7d4b`).
    words = [name] if name else re.findall(r"=\s*([^,\s]+)", selector or "")
    told: set[str] = set()
    for event in _newest_first(events):
        message, owner = event.get("message", ""), event["involvedObject"].get("name", "")
        if event.get("reason") not in ("FailedCreate", "WorkflowNodeError", "WorkflowNodeFailed"):
            continue
        if any(w and (w.startswith(owner) or w in owner or w in message) for w in words):
            sentence = refusal(message)
            if owner not in told:
                told.add(owner)
                yield f"{sentence}."


# --- small things ---


def _of(kind: str, name: str, events: Iterable[Object]) -> list[Object]:
    return [
        e
        for e in _newest_first(events)
        if e["involvedObject"].get("kind") == kind and e["involvedObject"].get("name") == name
    ]


def _about(pod: Object, events: Iterable[Object]) -> list[Object]:
    """The pod's own events, newest first; not those of an earlier pod of the same name."""
    uid = pod["metadata"].get("uid")
    found = _of("Pod", pod["metadata"]["name"], events)
    return [e for e in found if e["involvedObject"].get("uid", uid) == uid]


def _newest_first(events: Iterable[Object]) -> list[Object]:
    def when(event: Object) -> str:
        series = event.get("series") or {}
        times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
        return next((t for t in times if t), "")

    return sorted(events, key=when, reverse=True)


def _condition(pod: Object, kind: str) -> Object:
    conditions = pod.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def _quantity(text: str | int | float) -> Decimal:
    from kubernetes.utils.quantity import parse_quantity

    return Decimal(parse_quantity(text))


def _number(resource: str, amount: Decimal) -> str:
    """An amount in the unit that people use for it."""
    if resource == "memory" or resource.startswith(("hugepages-", "ephemeral-")):
        return f"{amount / 2**30:.3g} GiB"
    return f"{amount.normalize():f}"


def _amount(resource: str, amount: Decimal) -> str:
    what = {"cpu": "CPU", "memory": "memory"}.get(resource, resource)
    return f"{_number(resource, amount)} {'of memory' if what == 'memory' else what}"


def _list(names: Sequence[str], most: int = 3) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _line(error: object) -> str:
    """A message on one line, without a full stop at its end and not longer than two lines are."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 240 else f"{text[:237]}..."


if __name__ == "__main__":
    sys.exit(main())
