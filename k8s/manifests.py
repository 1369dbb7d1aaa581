"""What the folders of this package render to, and changes to it that kustomize cannot make."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

#: An object of the API, as JSON.
Object = dict[str, Any]

ROOT = Path(__file__).parent
#: Sources of the manifests that are not ours.
REMOTE = "https://github.com/kubeflow/pipelines"


class ManifestError(RuntimeError):
    """Manifests could not be rendered; the message says why and what to do."""


def render(folder: Path, *, timeout: float = 600) -> list[Object]:
    """Render a kustomization; remote references are fetched with git.

    Args:
        folder: with a `kustomization.yaml`.
        timeout: seconds.

    Raises:
        ManifestError: kubectl is missing, or the kustomization does not render.
    """
    command = ["kubectl", "kustomize", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        raise ManifestError(
            "kubectl is not installed: see https://kubernetes.io/docs/tasks/tools"
        ) from None
    except subprocess.TimeoutExpired:
        raise ManifestError(
            f"{folder.name} did not render within {timeout:.0f} s: the network is too slow; start"
            " again with a longer --timeout"
        ) from None
    if done.returncode != 0:
        raise ManifestError(_why(folder, done.stderr))
    return [o for o in yaml.load_all(done.stdout, Loader=_LOADER) if o]


#: The C parser, where there is one: Argo's CRDs have 16 000 lines.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def dump(objects: Iterable[Object]) -> str:
    """YAML of objects, for kubectl."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump_all(objects, Dumper=dumper, sort_keys=False)


def _why(folder: Path, said: str) -> str:
    if re.search(r"no 'git' program|executable file not found", said):
        return "git is not installed, and remote manifests are fetched with it: install git"
    unreachable = r"failed to run '\S*git|no such host|Could not resolve|timeout running"
    if re.search(unreachable, said):
        found = re.search(r"https://github\.com/[\w.-]+/[\w.-]+", said)
        return (
            f"the manifests at {found[0] if found else REMOTE} cannot be fetched: check the network"
            " (git uses https_proxy), or point git at a mirror (docs/cluster.md, Without the"
            " internet)"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{folder} does not render: {lines[-1] if lines else 'kubectl kustomize said nothing'}"


def split(objects: Iterable[Object], kinds: Iterable[str]) -> tuple[list[Object], list[Object]]:
    """Those of some kinds, and the others."""
    wanted = set(kinds)
    every = list(objects)
    return (
        [o for o in every if o["kind"] in wanted],
        [o for o in every if o["kind"] not in wanted],
    )


def without(objects: Iterable[Object], names: Iterable[str]) -> list[Object]:
    """Leave out Deployments by name.

    Raises:
        ManifestError: there is no such Deployment.
    """
    every, unwanted = list(objects), set(names)
    known = {o["metadata"]["name"] for o in every if o["kind"] == "Deployment"}
    if foreign := sorted(unwanted - known):
        raise ManifestError(
            f"--without names {', '.join(foreign)}, which is neither `pipelines` nor one of the"
            f" Deployments {', '.join(sorted(known))}"
        )
    return [o for o in every if o["kind"] != "Deployment" or o["metadata"]["name"] not in unwanted]


#: Where an image stands besides a container's own field: settings of Kubeflow Pipelines, and an
#: argument of Argo's controller.
_IMAGE_VARIABLE = re.compile(r"(^|_)IMAGE$")
_IMAGE_ARGUMENT = "--executor-image"


def images(objects: Iterable[Object]) -> list[str]:
    """Every image that the objects' pods run or start others with, sorted."""
    found: set[str] = set()

    def note(image: str) -> str:
        found.add(image)
        return image

    for _ in _replace_images(objects, note):
        pass
    return sorted(found)


def mirrored(objects: Iterable[Object], prefix: str) -> list[Object]:
    """The same objects with every image taken from a mirror.

    `alpine:3` becomes `PREFIX/docker.io/library/alpine:3`, `ghcr.io/a/b:1` `PREFIX/ghcr.io/a/b:1`.
    """
    return list(_replace_images(objects, lambda image: mirror(image, prefix)))


def mirror(image: str, prefix: str) -> str:
    """Name of an image in a mirror of registries."""
    return f"{prefix.rstrip('/')}/{full_name(image)}"


def full_name(image: str) -> str:
    """An image with the registry and folder that Docker would add: `alpine` and `docker.io/alpine`
    are `docker.io/library/alpine`."""
    first, slash, rest = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost") and first != "docker.io":
        return image
    path = rest if first == "docker.io" else image
    return f"docker.io/{path}" if "/" in path else f"docker.io/library/{path}"


def _replace_images(objects: Iterable[Object], change: Any) -> Iterator[Object]:
    for each in objects:
        yield _replace_in(each, change) if "spec" in each and _has_pods(each) else each


def _has_pods(each: Object) -> bool:
    return each["kind"] in {"Deployment", "StatefulSet", "DaemonSet", "Job", "Pod"} or (
        each["kind"].endswith("TrainingRuntime")
    )


def _replace_in(value: Any, change: Any) -> Any:
    if isinstance(value, list):
        parts = [_replace_in(v, change) for v in value]
        for i, part in enumerate(parts[:-1]):
            if part == _IMAGE_ARGUMENT:
                parts[i + 1] = change(parts[i + 1])
        return parts
    if not isinstance(value, dict):
        return value
    is_variable = isinstance(value.get("value"), str) and _IMAGE_VARIABLE.search(
        str(value.get("name", ""))
    )
    return {
        key: change(item)
        if (key == "image" and isinstance(item, str)) or (key == "value" and is_variable)
        else _replace_in(item, change)
        for key, item in value.items()
    }
