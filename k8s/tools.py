"""The programs that a cluster on this machine needs: Docker, kind, kubectl; nothing here reads the
kubeconfig's current context."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: Where a node of ours has `/dev/null` mounted. A container cannot be labelled through kind, and
#: the mark has to be there from the first moment, so that a cluster whose making was cut short is
#: known as ours and can be made anew.
MARK = "/etc/driftmill/cluster"
LABEL = "io.x-k8s.kind.cluster"


class ToolError(RuntimeError):
    """A program failed or is missing; the message says what to do."""


def run(
    command: Sequence[str], *, text: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and keep its output.

    Args:
        command: program and arguments.
        text: for its standard input.
        timeout: seconds.

    Raises:
        ToolError: it is not installed, or took too long.
    """
    try:
        return subprocess.run(
            list(command),
            check=False,
            capture_output=True,
            text=True,
            input=text,
            timeout=timeout,
            stdin=None if text is not None else subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ToolError(f"{command[0]} is not installed: {INSTALL[command[0]]}") from None
    except subprocess.TimeoutExpired:
        raise ToolError(
            f"`{' '.join(command[:3])}` did not end in time; start again with a longer --timeout"
        ) from None


#: How to get each program.
INSTALL = {
    "docker": "see https://docs.docker.com/engine/install",
    "kind": "see https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    "kubectl": "see https://kubernetes.io/docs/tasks/tools",
    "helm": "see https://helm.sh/docs/intro/install",
    "git": "see https://git-scm.com/downloads",
}

_KNOWN = (
    (
        r"cannot connect to the docker daemon|is the docker daemon running",
        "Docker does not answer: start it (`systemctl start docker`, or Docker Desktop)",
    ),
    (
        r"permission denied.*docker|docker\.sock: connect: permission denied",
        "this user may not use Docker: join the group docker and log in anew, or use rootless"
        " Docker",
    ),
    (
        r"no space left on device|disk quota exceeded",
        "the disk is full: make room with `docker system prune` and `docker builder prune`, then"
        " start again",
    ),
    (
        r"port is already allocated|address already in use",
        "a port of the cluster is taken: end what uses it, or name a copy of k8s/kind.yaml with"
        " other host ports by --config",
    ),
    (
        r"failed to pull image|pull access denied|error response from daemon: (get|head) ",
        "the node image cannot be pulled: check the network, or name one that this machine has by"
        " KIND_NODE_IMAGE",
    ),
    (
        r"too many open files|failed to create fsnotify watcher",
        "the kernel's limits for watching files are used up: `sudo sysctl"
        " fs.inotify.max_user_instances=512 fs.inotify.max_user_watches=524288`",
    ),
    (
        r"forbidden|cannot (create|patch|get) resource",
        "this user may not do that in the cluster: ask its administrator for the rights, or name"
        " another context",
    ),
)


def why(said: str) -> str:
    """What a program's error output means, and what to do next; its last line where that is not
    known."""
    for pattern, sentence in _KNOWN:
        if re.search(pattern, said.lower()):
            return sentence
    if found := re.search(r"Error response from daemon: (.+)", said):
        return found[1]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error", "Error"))]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")


# --- Docker ---


@dataclass(frozen=True)
class Node:
    """A container that is a node of a kind cluster."""

    name: str
    running: bool
    ours: bool


def docker_info() -> dict[str, Any]:
    """What Docker says of itself: `NCPU`, `MemTotal` in bytes, `DockerRootDir`, `ServerVersion`.

    Raises:
        ToolError: it is not installed or does not answer.
    """
    done = run(["docker", "info", "--format", "{{json .}}"], timeout=30)
    try:
        info: dict[str, Any] = json.loads(done.stdout or "{}")
    except ValueError:
        info = {}
    if done.returncode != 0 or not info.get("ServerVersion"):
        problems = " ".join(info.get("ServerErrors") or []) or done.stderr
        raise ToolError(why(problems or "Cannot connect to the Docker daemon"))
    return info


def local_images() -> set[str]:
    """Full names of the images that Docker has, with registry and tag."""
    from k8s.manifests import full_name

    done = run(["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], timeout=60)
    if done.returncode != 0:
        raise ToolError(why(done.stderr))
    return {full_name(line) for line in done.stdout.split() if not line.endswith(":<none>")}


def nodes(cluster: str) -> list[Node]:
    """The containers of a kind cluster; none: there is no such cluster."""
    names = run(
        ["docker", "ps", "--all", "--quiet", "--filter", f"label={LABEL}={cluster}"], timeout=30
    )
    if names.returncode != 0:
        raise ToolError(why(names.stderr))
    if not names.stdout.split():
        return []
    inspected = run(["docker", "inspect", *names.stdout.split()], timeout=30)
    if inspected.returncode != 0:  # removed in between
        return []
    return sorted(
        (
            Node(
                name=each["Name"].lstrip("/"),
                running=each["State"]["Running"],
                ours=any(m["Destination"] == MARK for m in each["Mounts"]),
            )
            for each in json.loads(inspected.stdout)
        ),
        key=lambda node: node.name,
    )


def start(names: Sequence[str]) -> None:
    """Start stopped nodes."""
    done = run(["docker", "start", *names], timeout=120)
    if done.returncode != 0:
        raise ToolError(why(done.stderr))


# --- kind ---


@dataclass(frozen=True)
class Config:
    """A kind configuration."""

    document: dict[str, Any]
    ports: list[tuple[str, int]] = field(default_factory=list)
    """Addresses and ports of this machine that it takes."""

    @property
    def node_count(self) -> int:
        """Nodes that the cluster has."""
        return len(self.document["nodes"])


def read_config(path: Path) -> Config:
    """Read a kind configuration and mark its nodes as ours.

    Raises:
        ToolError: it cannot be read, or is none.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ToolError(
            f"{path}: {error.strerror}; name a kind configuration by --config"
        ) from None
    except yaml.YAMLError as error:
        raise ToolError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or document.get("kind") != "Cluster":
        raise ToolError(f"{path} is not a kind configuration (kind: Cluster); see k8s/kind.yaml")
    document.setdefault("nodes", [{"role": "control-plane"}])
    ports = []
    for node in document["nodes"]:
        node.setdefault("extraMounts", []).append(
            {"hostPath": "/dev/null", "containerPath": MARK, "readOnly": True}
        )
        for mapping in node.get("extraPortMappings") or []:
            if port := mapping.get("hostPort"):
                ports.append((mapping.get("listenAddress") or "0.0.0.0", int(port)))  # noqa: S104
    return Config(document, ports)


def create(cluster: str, config: Config, image: str | None, timeout: float) -> None:
    """Make a kind cluster and add its context to the kubeconfig, whose current context stays.

    Raises:
        ToolError: it could not be made.
    """
    command = ["kind", "create", "cluster", "--name", cluster, "--config", "-"]
    if image:
        command += ["--image", image]
    with _current_context_kept():
        done = run(command, text=yaml.safe_dump(config.document), timeout=timeout)
    if done.returncode == 0:
        return
    if "could not find a log line" in done.stderr:
        raise SlowStartError(
            "a node did not start within the 30 s that kind gives it: this machine is too busy;"
            " start again when it is quieter"
        )
    raise ToolError(f"kind could not make the cluster: {why(done.stderr)}")


@contextmanager
def _current_context_kept() -> Iterator[None]:
    """Put the kubeconfig's current context back, which kind changes."""
    before = run(["kubectl", "config", "current-context"])
    yield
    if before.returncode == 0:
        run(["kubectl", "config", "use-context", before.stdout.strip()])


class SlowStartError(ToolError):
    """A node took too long to boot; worth another try."""


def delete(cluster: str) -> None:
    """Remove a kind cluster and its context."""
    done = run(["kind", "delete", "cluster", "--name", cluster], timeout=300)
    if done.returncode != 0:
        raise ToolError(f"kind could not remove the cluster: {why(done.stderr)}")


def export_kubeconfig(cluster: str) -> None:
    """Add the context of a cluster to the kubeconfig, whose current context stays."""
    with _current_context_kept():
        done = run(["kind", "export", "kubeconfig", "--name", cluster], timeout=60)
    if done.returncode != 0:
        raise ToolError(f"kind could not write the kubeconfig: {why(done.stderr)}")


def load(cluster: str, images: Sequence[str], timeout: float) -> None:
    """Put images of the local Docker onto every node; kind passes over those that are there."""
    done = run(["kind", "load", "docker-image", *images, "--name", cluster], timeout=timeout)
    if done.returncode != 0:
        raise ToolError(f"kind could not load images: {why(done.stderr)}")


# --- kubectl ---


def apply(context: str, manifests: str, timeout: float) -> list[str]:
    """Apply objects, as the owner of their fields.

    Returns:
        What changed: kubectl's lines but for those of objects that were applied before as they are.

    Raises:
        ToolError: the cluster refused one.
    """
    command = ["kubectl", "--context", context, "apply", "--server-side", "--force-conflicts"]
    command += ["--field-manager", "driftmill", "-f", "-"]
    done = run(command, text=manifests, timeout=timeout)
    if done.returncode != 0:
        raise ToolError(f"the cluster {context} refused: {why(done.stderr)}")
    return done.stdout.splitlines()
