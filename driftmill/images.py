"""The container images: how they are called, what is in them, and how they are built.

    driftmill images build                    # those that this machine does not have yet
    driftmill images build --family tabular --load-into driftmill
    driftmill images list

An image is named `<prefix>/<name>:<version>-<digest>`. The digest is taken over the files that the
image is made of, so that other code never has the same name, and an image that is there already
need not be built. Where Driftmill is installed without its sources, the tag is the version alone.

| variable | what |
|---|---|
| `DRIFTMILL_IMAGE_PREFIX` | registry and folder of the images; default `driftmill` |
| `DRIFTMILL_IMAGE` | image of all steps, in place of those that are built here |
| `DRIFTMILL_BASE_IMAGE` | image to build on in place of the one that the Dockerfiles pin |
| `DRIFTMILL_BUILD_NETWORK` | network of the builds, as in `docker build --network` |
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

#: Endings of the files of a package that go into an image.
_SUFFIXES = {".py", ".j2", ".typed"}
_LABEL = "org.opencontainers.image"


@dataclass(frozen=True)
class Image:
    """One image."""

    name: str
    summary: str
    dockerfile: str
    packages: tuple[str, ...]
    """Folders of the repository whose code it holds."""
    target: str | None = None
    """Stage of the Dockerfile."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Build arguments."""
    default: bool = True
    """Whether it is built when no image is named."""

    @property
    def family(self) -> str:
        """The part of the name after the first dash, or the name: what `--family` also takes."""
        return self.name.partition("-")[2].removesuffix("-cuda") or self.name


def _component(kind: str, summary: str, **arguments: str) -> Image:
    default = arguments.get("TORCH") != "cuda"
    packages = ("driftmill", "components", "pipelines")
    name, dockerfile = f"python-{kind}", "components/Dockerfile"
    return Image(name, summary, dockerfile, packages, None, arguments, default)


def _service(name: str, summary: str, *more: str) -> Image:
    return Image(name, summary, "services/Dockerfile", ("driftmill", "services", *more), name)


#: All images, by name. `python` is in the names of those for steps because KFP's local runner takes
#: any other name for a foreign image and warns.
IMAGES = {
    image.name: image
    for image in (
        _component("tabular", "steps for tables", FAMILY="tabular"),
        _component("vision", "steps for images, on CPUs", FAMILY="vision", TORCH="cpu"),
        _component("vision-cuda", "steps for images, on GPUs", FAMILY="vision", TORCH="cuda"),
        _service("service-tabular", "serves a model of tables"),
        _service("service-vision", "serves a model of images"),
        _service("monitor", "watches a model"),
        _service("controller", "decides about retraining", "components", "pipelines", "k8s"),
    )
}
#: What else every image is made of.
_COMMON = ("LICENSE", "components/slim.py", "constraints.txt", "pyproject.toml")


class ImageError(RuntimeError):
    """An image could not be had; the message says why and what to do."""


class Unreachable(ImageError):
    """A registry or an index of packages cannot be reached."""


def reference(name: str) -> str:
    """The full name of an image, as `docker run` and a pod take it.

    Args:
        name: one of `IMAGES`.

    Raises:
        KeyError: there is no such image.
    """
    prefix = os.environ.get("DRIFTMILL_IMAGE_PREFIX") or "driftmill"
    return f"{prefix.rstrip('/')}/{name}:{tag(name)}"


def for_steps(kind: Literal["tabular", "vision", "vision-cuda"]) -> str:
    """The image of the pipeline's steps; `DRIFTMILL_IMAGE` names another one."""
    return os.environ.get("DRIFTMILL_IMAGE") or reference(f"python-{kind}")


@functools.cache
def tag(name: str) -> str:
    """The tag of an image: the version, and in a clone twelve digits of the digest."""
    root = sources()
    release = version("driftmill")
    return f"{release}-{digest(IMAGES[name], root)[:12]}" if root else release


def sources() -> Path | None:
    """The repository that this code is a clone of, or None where it was installed without."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "components" / "Dockerfile").is_file() else None


def files(image: Image, root: Path) -> list[str]:
    """The files that an image is made of: paths below `root`, sorted."""
    found = {*_COMMON, image.dockerfile}
    for package in image.packages:
        for folder, below, names in os.walk(root / package):
            below[:] = [name for name in below if name != "__pycache__"]
            where = Path(folder).relative_to(root)
            found |= {str(where / name) for name in names if Path(name).suffix in _SUFFIXES}
    return sorted(path for path in found if (root / path).is_file())


def digest(image: Image, root: Path) -> str:
    """sha256, in hex, over what an image is made of: files, stage and arguments."""
    total = hashlib.sha256(f"{image.target} {sorted(image.arguments.items())}".encode())
    for path in files(image, root):
        total.update(f"\0{path}\0".encode())
        total.update(hashlib.sha256((root / path).read_bytes()).digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Built:
    """An image that is on this machine."""

    name: str
    reference: str
    bytes: int
    seconds: float | None
    """Seconds that its build took; None where it was there."""


def build(
    name: str,
    *,
    base: str | None = None,
    network: str | None = None,
    extras: str = "",
    force: bool = False,
    log: Path | None = None,
) -> Built:
    """Build an image, unless this machine has it.

    Args:
        name: one of `IMAGES`.
        base: image to build on; None: `DRIFTMILL_BASE_IMAGE`, else what the Dockerfile pins. An
            image on another base is built anew, under the same name.
        network: network of the build's commands, as `docker build --network` takes it; None:
            `DRIFTMILL_BUILD_NETWORK`, else Docker's usual one.
        extras: more packages, such as `gcsfs`, separated by spaces.
        force: build it even if it is there, and every layer anew.
        log: file for the output of the build; None: a temporary one, kept where the build fails.

    Raises:
        ImageError: it could not be built.
    """
    root = sources()
    if root is None:
        raise ImageError(
            "images are built from a clone of the repository, and this Driftmill was installed "
            "without one: clone it, or name an image that exists with DRIFTMILL_IMAGE"
        )
    image, full = IMAGES[name], reference(name)
    base = base or os.environ.get("DRIFTMILL_BASE_IMAGE") or None
    network = network or os.environ.get("DRIFTMILL_BUILD_NETWORK") or None
    if not force and (found := inspect(full)) is not None:
        labels = found["Config"].get("Labels") or {}
        same = (labels.get("driftmill.extras") or "") == extras
        if same and (base is None or labels.get(f"{_LABEL}.base.name") == base):
            return Built(name, full, found["Size"], None)
    arguments = image.arguments | _provenance(image, root)
    arguments |= {"EXTRAS": extras} if extras else {}
    arguments |= {"BASE": base, "BASE_NAME": base} if base else {}
    command = [*_builder(), "--progress", "plain", "--tag", full]
    command += ["--target", image.target] if image.target else []
    command += ["--network", network] if network else []
    command += ["--no-cache"] if force else []
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    started = time.monotonic()
    with _context(image, root) as folder:
        command += ["--file", str(folder / image.dockerfile), str(folder)]
        _follow(command, image, base, log)
    seconds = time.monotonic() - started
    found = inspect(full)
    if found is None:
        raise ImageError(
            f"{name} was built, but {full} is not among Docker's images: the builder in use keeps "
            "them elsewhere; choose Docker's own with `docker buildx use default`"
        )
    return Built(name, full, found["Size"], seconds)


def inspect(full: str) -> dict[str, Any] | None:
    """What Docker knows of an image, or None where this machine does not have it.

    Raises:
        ImageError: Docker does not answer.
    """
    done = _docker("image", "inspect", full)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found
    if "no such image" in done.stderr.lower() or "not found" in done.stderr.lower():
        return None
    raise _problem(done.stderr, full)


def push(full: str) -> str:
    """Push an image to the registry that its name says.

    Returns:
        `<image>@sha256:...`, which never names anything else.

    Raises:
        ImageError: the registry did not take it.
    """
    done = _docker("push", "--quiet", full)
    if done.returncode != 0:
        raise _problem(done.stderr, full)
    found = inspect(full)
    repository = full.rpartition(":")[0]
    for digested in (found or {}).get("RepoDigests", []):
        if digested.startswith(f"{repository}@"):
            return str(digested)
    raise ImageError(f"{full} was pushed, but Docker tells no digest of it; look with docker push")


def load_into(cluster: str, full: str) -> None:
    """Put an image onto every node of a kind cluster.

    Raises:
        ImageError: there is no such cluster, or it did not take the image.
    """
    kind = shutil.which("kind")
    if kind is None:
        raise ImageError(
            "kind is not installed: see https://kind.sigs.k8s.io, or leave out --load-into"
        )
    done = subprocess.run(
        [kind, "load", "docker-image", full, "--name", cluster],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return
    if "no nodes found" in done.stderr:
        raise ImageError(f"there is no kind cluster {cluster}: make it with driftmill cluster up")
    raise ImageError(f"kind could not load {full}: {_last(done.stderr)}")


def client() -> str:
    """Path of a Docker client that can build with BuildKit: the first on the PATH.

    Raises:
        ImageError: there is none.
    """
    return _client()[0]


@functools.cache
def _client() -> tuple[str, bool]:
    """A client, and whether its BuildKit is buildx. Clients before 23 have it built in; a later
    one without the plugin cannot build."""
    found = [p for folder in os.get_exec_path() if (p := shutil.which("docker", path=folder))]
    if not found:
        raise ImageError("docker is not installed: see https://docs.docker.com/engine/install")
    for path in found:
        if (
            subprocess.run([path, "buildx", "version"], check=False, capture_output=True).returncode
            == 0
        ):
            return path, True
        said = subprocess.run([path, "--version"], check=False, capture_output=True, text=True)
        release = re.search(r"version (\d+)", said.stdout)
        if release and 18 <= int(release[1]) < 23:
            return path, False
    raise ImageError(
        f"{found[0]} cannot build with BuildKit: install the plugin docker-buildx "
        "(Debian: docker-buildx; others: docker-buildx-plugin)"
    )


def _builder() -> list[str]:
    path, has_buildx = _client()
    return [path, "buildx", "build", "--load"] if has_buildx else [path, "build"]


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([client(), *arguments], check=False, capture_output=True, text=True)


@contextmanager
def _context(image: Image, root: Path) -> Iterator[Path]:
    """A folder with the files of an image and nothing else: only what is in the digest can get
    into a build."""
    with tempfile.TemporaryDirectory(prefix="driftmill-build-") as temporary:
        folder = Path(temporary)
        for path in files(image, root):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, folder / path)
            (folder / path).chmod(0o644)
        yield folder


def _provenance(image: Image, root: Path) -> dict[str, str]:
    """Build arguments for the labels: of the last commit that changed the image's files, so that
    the same files give the same labels. Without git there is none."""
    named = {"VERSION": version("driftmill")}
    paths = files(image, root)
    git = ["git", "-C", str(root)]
    log = (
        subprocess.run(
            [*git, "log", "-1", "--format=%H %cI", "--", *paths],
            check=False,
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    if log is None or log.returncode != 0 or not log.stdout.strip():
        return named
    revision, created = log.stdout.split()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *paths], check=False, capture_output=True, text=True
    )
    origin = subprocess.run(
        [*git, "config", "remote.origin.url"], check=False, capture_output=True, text=True
    ).stdout.strip()
    # An address with an account in it is nobody else's business.
    source = origin if origin.startswith("https://") and "@" not in origin else ""
    return named | {
        "REVISION": revision + ("-dirty" if changed.stdout.strip() else ""),
        "CREATED": created,
        "SOURCE": source,
    }


def _pinned(image: Image) -> str:
    """The image that a Dockerfile builds on where nobody says another."""
    root = sources()
    assert root is not None
    found = re.search(r"^ARG BASE=([^@\s]+)", (root / image.dockerfile).read_text(), re.M)
    return found[1] if found else "the image to build on"


def _follow(command: list[str], image: Image, base: str | None, log: Path | None) -> None:
    """Run a build and show, on a terminal, the step that it is at."""
    name = image.name
    terminal = sys.stderr.isatty()
    kept = log or Path(tempfile.mkstemp(prefix=f"driftmill-{name}-", suffix=".log")[1])
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    started = time.monotonic()
    if not terminal:
        print(f"building {name}", file=sys.stderr, flush=True)
    with (
        kept.open("w", buffering=1) as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            step = re.match(r"#\d+ (\[.+)", line)
            if terminal and step:
                shown = f"{name}  {time.monotonic() - started:4.0f} s  {step[1]}"
                print(
                    f"\r\033[K{shown[: shutil.get_terminal_size().columns - 1]}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode != 0:
        # What went well before must not be taken for the reason.
        end = "".join(kept.read_text(errors="replace").splitlines(keepends=True)[-40:])
        problem = _problem(end, base or _pinned(image), kept)
        if log is None and str(kept) not in str(problem):
            kept.unlink()
        raise type(problem)(f"{name}: {problem}")
    if log is None:
        kept.unlink()


#: What Docker says, as a pattern; whether it is about a place that cannot be reached; and what to
#: tell people, where `{0}` is the image.
_KNOWN = (
    (
        r"cannot connect to the docker daemon|is the docker daemon running",
        False,
        "the Docker daemon does not answer: start it (systemctl start docker, or Docker Desktop)",
    ),
    (
        r"permission denied.*docker\.sock|docker\.sock.*permission denied",
        False,
        "this user may not use Docker: join the group docker, or use rootless Docker",
    ),
    (
        r"no space left on device|disk quota exceeded",
        False,
        "the disk is full: make room with docker system prune and docker builder prune",
    ),
    (
        r"/whl/cpu|failed to fetch.*torch",
        True,
        "PyTorch's index of CPU builds cannot be reached from a build: try --network host, or "
        "build python-vision-cuda, which takes PyTorch from the usual index",
    ),
    (
        r"failed to fetch|dns error|error sending request|temporary failure (in name )?resol"
        r"|newconnectionerror|could not find a version",
        True,
        "the index of packages cannot be reached from a build: try --network host",
    ),
    (
        r"denied: |unauthorized|authentication required|no basic auth|insufficient_scope",
        True,
        "the registry refuses {0}: log in with docker login, or name another place with "
        "DRIFTMILL_IMAGE_PREFIX (to push to) or --base (to build on)",
    ),
    (
        r"failed to resolve source metadata|pull access denied|manifest unknown|manifest for .* not"
        r"|failed to do request|no such host|connection refused|i/o timeout|tls handshake"
        r"|server misbehaving|failed to load cache key|server gave http response to https",
        True,
        "{0} cannot be reached in its registry: check its name and the network, or name another "
        "place with --base (to build on) or DRIFTMILL_IMAGE_PREFIX (to push to)",
    ),
)


def _problem(output: str, subject: str, log: Path | None = None) -> ImageError:
    """What a failed command of Docker says, as one sentence with a next step.

    Args:
        output: of the command.
        subject: the image that it is about.
        log: the file that tells more.
    """
    text = output.lower()
    for pattern, away, sentence in _KNOWN:
        if re.search(pattern, text):
            return (Unreachable if away else ImageError)(sentence.format(subject))
    if log:
        return ImageError(f"a command of the build failed: {log} says why")
    return ImageError(f"{subject}: {_last(output)}")


def _last(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed and said nothing"


def megabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e6:,.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    """`driftmill images`: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return _list() if options.command == "list" else _build(options)
    except ImageError as error:
        print(f"driftmill images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("driftmill images: interrupted; what is built so far is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(IMAGES)
    parser = argparse.ArgumentParser(
        prog="driftmill images",
        description="Build and list the container images of steps and services.",
        epilog="Example: driftmill images build --family python-tabular service-tabular",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|list")
    build_parser = commands.add_parser(
        "build",
        help="build what this machine does not have yet",
        description="Build images. One that is there under the same tag is not built again: the "
        "tag holds a digest of all that goes into it.",
        epilog="Example: driftmill images build --family tabular --load-into driftmill",
    )
    build_parser.add_argument(
        "--family",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"images or families: tabular, vision, {names}; default: all but python-vision-cuda",
    )
    build_parser.add_argument("--push", action="store_true", help="push them and print digests")
    build_parser.add_argument("--load-into", metavar="CLUSTER", help="load into this kind cluster")
    build_parser.add_argument(
        "--base", metavar="IMAGE", help="build on this image; default: $DRIFTMILL_BASE_IMAGE"
    )
    build_parser.add_argument("--network", metavar="NETWORK", help="network of the build: host")
    build_parser.add_argument(
        "--extras", default="", metavar="PACKAGES", help="more packages, as in 'gcsfs adlfs'"
    )
    build_parser.add_argument(
        "--force", action="store_true", help="build also what is there, every layer"
    )
    commands.add_parser("list", help="names of the images, and which of them are on this machine")
    return parser


def choose(wanted: list[str] | None) -> list[str]:
    """Names of images for names and families. Raises ImageError for one that there is not."""
    if not wanted:
        return [name for name, image in IMAGES.items() if image.default]
    chosen = []
    for word in wanted:
        of_family = [n for n, i in IMAGES.items() if i.default and word == i.family != n]
        if not (found := of_family or [n for n in IMAGES if n == word]):
            raise ImageError(f"there is no image {word}; choose from {', '.join(IMAGES)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def _build(options: argparse.Namespace) -> int:
    pushed = {}
    try:
        names = choose(options.family)
    except ImageError as error:
        print(f"driftmill images: {error}", file=sys.stderr)
        return 2
    for name in names:
        built = build(
            name,
            base=options.base,
            network=options.network,
            extras=options.extras,
            force=options.force,
        )
        took = "there already" if built.seconds is None else f"{built.seconds:.0f} s"
        print(f"{name:<20}{megabytes(built.bytes):>10}  {took:<14}{built.reference}", flush=True)
        if options.load_into:
            load_into(options.load_into, built.reference)
            print(f"{'':<20}{'':>10}  loaded into the kind cluster {options.load_into}", flush=True)
        if options.push:
            pushed[name] = push(built.reference)
            print(f"{'':<20}{'':>10}  {pushed[name]}", flush=True)
    for name, digested in pushed.items():
        if name.startswith("python-"):
            print(f"\nCompile with it: driftmill compile CONTRACT -o build/ --image {digested}")
    return 0


def _list() -> int:
    for name, image in IMAGES.items():
        full = reference(name)
        found = inspect(full)
        size = megabytes(found["Size"]) if found else "not here"
        print(f"{name:<20}{size:>10}  {image.summary:<28}{full}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
