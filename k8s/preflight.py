"""What this machine needs for a cluster: all that is missing, at once, and how to get it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k8s import tools

State = Literal["ok", "warning", "wrong"]
Version = tuple[int, ...]

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    mend: str = ""
    """What to do; empty where nothing is to be done."""


@dataclass(frozen=True)
class Supported:
    """Versions that are known to work: from `least` on, below `below`."""

    least: Version
    below: Version | None = None

    def __contains__(self, version: Version) -> bool:
        return version >= self.least and (self.below is None or version < self.below)

    def __str__(self) -> str:
        text = f"{dotted(self.least)} or newer"
        return text if self.below is None else f"{text}, below {dotted(self.below)}"


#: Programs on this machine.
TOOLS = {
    "docker": Supported((20, 10)),
    "kind": Supported((0, 24)),
    "kubectl": Supported((1, 29)),
    "git": Supported((2, 20)),
    "helm": Supported((3, 14)),
}
_VERSION_COMMANDS = {
    "docker": ["docker", "--version"],
    "kind": ["kind", "version"],
    "kubectl": ["kubectl", "version", "--client"],
    "git": ["git", "--version"],
    "helm": ["helm", "version", "--short"],
}


@dataclass(frozen=True)
class Needs:
    """What a cluster takes of the machine."""

    cores: int
    memory: int
    """Bytes that have to be free."""
    disk: int
    """Bytes that have to be free where Docker keeps images."""
    instances: int
    watches: int


#: Three idle nodes take 1.5 GiB; Kubeflow Pipelines and the pods of a run 3 to 4 GiB more.
BARE = Needs(cores=2, memory=2 * GIB, disk=8 * GIB, instances=128, watches=65_536)
PIPELINES = Needs(cores=2, memory=6 * GIB, disk=15 * GIB, instances=512, watches=524_288)


def check(needs: Needs, ports: Sequence[tuple[str, int]], *, git: bool) -> list[Check]:
    """Look at the machine.

    Args:
        needs: what the cluster takes.
        ports: addresses and ports that it will listen at; none where it is there already.
        git: whether remote manifests will be fetched.
    """
    names = ["docker", "kind", "kubectl", *(["git"] if git else [])]
    found = [tool(name) for name in names]
    try:
        info = tools.docker_info()
    except tools.ToolError as error:
        if shutil.which("docker"):
            found.append(Check("Docker's server", "wrong", "no answer", str(error)))
    else:
        server = Check("Docker's server", "ok", info["ServerVersion"])
        found += [server, *machine(needs, info)]
    return [*found, *inotify(needs), *(port(*each) for each in ports)]


def tool(name: str, *, needed: bool = True) -> Check:
    """Whether a program is there, in a version that works."""
    supported = TOOLS[name]
    missing: State = "wrong" if needed else "warning"
    if shutil.which(name) is None:
        return Check(name, missing, "not installed", f"install {name}: {tools.INSTALL[name]}")
    try:
        version = parse(tools.run(_VERSION_COMMANDS[name], timeout=30).stdout)
    except tools.ToolError as error:
        return Check(name, missing, "does not run", str(error))
    if version is None:
        return Check(name, "warning", "says no version", f"needed: {supported}")
    if version not in supported:
        advice = f"install {supported}: {tools.INSTALL[name]}"
        return Check(name, missing, dotted(version), advice)
    return Check(name, "ok", dotted(version))


def machine(needs: Needs, info: dict[str, Any]) -> Iterator[Check]:
    """Cores, memory and disk, as Docker has them.

    Args:
        needs: what the cluster takes.
        info: of `tools.docker_info`.
    """
    cores, total = int(info["NCPU"]), int(info["MemTotal"])
    yield Check(
        "cores",
        "ok" if cores >= needs.cores else "wrong",
        str(cores),
        "" if cores >= needs.cores else f"give Docker {needs.cores} cores",
    )
    # Docker on this very machine shares its memory; Docker Desktop has a machine of its own.
    free = available_memory() if _is_here(info) else None
    memory = total if free is None else min(total, free)
    state: State = "ok" if memory >= needs.memory else "wrong"
    of = f"{_gib(memory)} free of {_gib(total)}" if free is not None else _gib(total)
    advice = f"{_gib(needs.memory)} are needed: end other programs, or give Docker more memory"
    yield Check("memory", state, of, "" if state == "ok" else advice)
    folder = Path(info.get("DockerRootDir") or "/var/lib/docker")
    if not _is_here(info):
        yield Check("disk", "ok", "not looked at: Docker runs on another machine")
        return
    disk = shutil.disk_usage(folder).free
    state = "ok" if disk >= needs.disk else "wrong"
    advice = f"{_gib(needs.disk)} are needed: `docker system prune` and `docker builder prune`"
    yield Check("disk", state, f"{_gib(disk)} free at {folder}", "" if state == "ok" else advice)


def _is_here(info: dict[str, Any]) -> bool:
    """Whether Docker's server shares this machine's kernel and disk."""
    folder = Path(info.get("DockerRootDir") or "/var/lib/docker")
    return info.get("Name") == socket.gethostname() and folder.exists()


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory that programs can still get; None where the system does not say."""
    if not meminfo.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def inotify(needs: Needs, folder: Path = Path("/proc/sys/fs/inotify")) -> Iterator[Check]:
    """The kernel's limits for watching files, which all nodes share."""
    if not folder.exists():  # macOS: Docker Desktop's are high enough
        return
    short = []
    found = []
    for name, least in (
        ("max_user_instances", needs.instances),
        ("max_user_watches", needs.watches),
    ):
        value = int((folder / name).read_text())
        found.append(f"{name} {value}")
        if value < least:
            short.append(f"fs.inotify.{name}={least}")
    yield Check(
        "inotify",
        "wrong" if short else "ok",
        ", ".join(found),
        f"`sudo sysctl {' '.join(short)}`; in /etc/sysctl.d/ it lasts" if short else "",
    )


def port(address: str, number: int) -> Check:
    """Whether a port of this machine is free."""
    name = f"port {number}"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, number))
        except OSError as error:
            if error.errno == errno.EACCES:
                return Check(name, "warning", "not looked at: below 1024, which only root may bind")
            if error.errno != errno.EADDRINUSE:
                problem = f"{address}: {os.strerror(error.errno or 0)}"
                advice = "name an address of this machine in the kind configuration"
                return Check(name, "wrong", problem, advice)
            return Check(
                name,
                "wrong",
                f"taken at {address}",
                f"end what listens there (`ss -ltnp 'sport = {number}'` shows it), or give --config"
                " a copy of k8s/kind.yaml with another hostPort",
            )
    return Check(name, "ok", f"free at {address}")


def parse(text: str) -> Version | None:
    """The first version in a text: `kind v0.30.0 go1.26` gives `(0, 30, 0)`."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in found.groups() if part is not None) if found else None


def report(checks: Sequence[Check]) -> str:
    """The checks as a table, with what to do below each that is not ok."""
    width = max((len(c.name) for c in checks), default=0)
    lines = []
    for each in checks:
        lines.append(f"{each.state:<8}{each.name:<{width}}  {each.found}".rstrip())
        if each.mend:
            lines.append(f"{'':<8}{'':<{width}}  -> {each.mend}")
    return "\n".join(lines)


def dotted(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
