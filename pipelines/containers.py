"""Steps in containers on this machine: what KFP's DockerRunner is told, and what it leaves out.

A step's container may do what the step needs and no more. It has no capabilities and gains none,
its root file system is read-only, and of this machine it sees the store's folder, the files that
the contract names and the folder of the run. It runs as the user who started the run, so that what
it writes is theirs (root stays root, without root's powers). It has a network only where the store,
a source or the tracking server needs one, and this machine's own only where one of them listens on
the loopback interface. It has no GPU.

Every container carries the run's folder as a label. The process that runs the pipeline removes
what it has started; where it was killed, the process that watches it does; and where both were,
the next run does.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from driftmill import extras, images
from driftmill.contract import LOCAL_SCHEMES, Contract, Source
from driftmill.home import cores

#: Label of a container: the run's folder on this machine.
LABEL = "driftmill.run"
#: File in a run's folder, locked as long as the process lives that runs the pipeline.
LOCK = "lock"
#: Bytes that the processes of a step may share; only what they use counts.
SHARED_MEMORY = 1 << 30
#: Seconds that Docker may take for an answer.
PATIENCE = 60
#: What counts as the exit code of a container that somebody else has removed: that of one killed.
REMOVED = 137
#: How the names of the variables begin by which the numbers come out the same to the last bit.
_NUMERIC = ("OMP_", "OPENBLAS_", "MKL_", "ONEDNN_")
#: How the names of the variables begin that a step with a network gets.
_PASSED_ON = (
    "AWS_", "KAGGLE_", "MLFLOW_TRACKING_", "GOOGLE_APPLICATION_CREDENTIALS", "SSL_CERT_",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

#: Held while a container is started, and for ever once no other may be.
_starting = threading.Lock()


class DockerError(RuntimeError):
    """Steps cannot run in containers; the message says why and what to do."""


# Before a run


def image(contract: Contract) -> str:
    """The image of a contract's steps."""
    return images.for_steps("vision" if contract.is_vision else "tabular")


def check(name: str) -> None:
    """Raise DockerError unless Docker answers and has the image."""
    with _docker() as client:
        import docker

        try:
            client.images.get(name)
        except docker.errors.ImageNotFound:
            if name == os.environ.get("DRIFTMILL_IMAGE"):
                how = f"fetch it (docker pull {name}), or unset DRIFTMILL_IMAGE"
            else:
                family = name.rpartition("/")[2].partition(":")[0]
                how = f"build it: driftmill images build --family {family}"
            raise DockerError(f"there is no image {name} on this machine; {how}") from None


def sweep(runs: Path) -> None:
    """Remove containers of runs that have ended without doing so.

    Args:
        runs: the folder with a folder for each run.
    """
    with _docker() as client:
        for container in _labelled(client, LABEL):
            root = Path(container.labels[LABEL])
            if root.parent == runs and not _is_locked(root / LOCK):
                _remove(container)


# In the process that runs the pipeline


def settings(contract: Contract, store: str, tracking: str, *, rootless: bool) -> dict[str, Any]:
    """What a step may see and do, as arguments of Docker's Python client.

    Args:
        contract: whose steps.
        store: URI of the store.
        tracking: MLflow tracking URI.
        rootless: whether Docker runs as the user, who then is root in the containers.
    """
    from docker.types import Mount

    writable, readable, environment = [], set(_files(contract)), _environment(tracking)
    if store.startswith("file://"):
        writable.append(store.removeprefix("file://"))
    network = "none"
    far_sources = [s for s in _sources(contract) if _is_far(s)]
    if far_sources or not writable or _host(tracking):
        passed = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
        passed |= {"MLFLOW_TRACKING_URI": tracking}
        network = "host" if any(map(_is_loopback, passed.values())) else "bridge"
        environment = passed | environment
        # A variable that names a file, of credentials or certificates, brings the file along.
        readable |= {Path(v) for v in passed.values() if v.startswith("/")}
    if far_sources:
        from driftmill.data.sources import cache_folder

        cache_folder().mkdir(parents=True, exist_ok=True)
        environment["DRIFTMILL_CACHE"] = str(cache_folder().absolute())
        writable.append(environment["DRIFTMILL_CACHE"])
    # What is not there is not mounted: the step says better what is missing.
    files = sorted(str(p.absolute()) for p in readable if p.exists())
    return {
        "user": "0:0" if rootless else f"{os.getuid()}:{os.getgid()}",
        "group_add": [] if rootless else [str(group) for group in os.getgroups()],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "read_only": True,
        "tmpfs": {"/tmp": "mode=1777"},  # noqa: S108 (the container's own)
        "shm_size": SHARED_MEMORY,
        "network_mode": network,
        "mounts": [
            *(Mount(path, path, "bind") for path in writable),
            *(Mount(path, path, "bind", read_only=True) for path in files),
        ],
        "environment": environment,
    }


def runner(contract: Contract, store: str, tracking: str, root: Path) -> Any:
    """KFP's DockerRunner for a run, from now on without what goes wrong with it.

    It removes each container at its end, and where that is done before it has asked for the exit
    code, it takes the step for a success (kubeflow/pipelines#13332: a third of the failures of
    steps that end at once). So the containers are started, waited for and removed here.

    Args:
        contract: whose steps.
        store: URI of the store.
        tracking: MLflow tracking URI.
        root: the run's folder.
    """
    from kfp import local
    from kfp.local import docker_task_handler

    with _docker() as client:
        rootless = "name=rootless" in client.info()["SecurityOptions"]
    assert callable(docker_task_handler.run_docker_container)
    docker_task_handler.run_docker_container = _run
    return local.DockerRunner(
        labels={LABEL: str(root)}, **settings(contract, store, tracking, rootless=rootless)
    )


def lock(root: Path) -> int:
    """Show that the run's process lives, until it ends.

    Returns:
        The file's descriptor; closing it gives the lock up.
    """
    descriptor = os.open(root / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def end(root: Path) -> None:
    """Remove the run's containers. None is started any more in this process."""
    _starting.acquire()
    remove(root)


def remove(root: Path) -> None:
    """Remove the run's containers."""
    with _docker() as client:
        for container in _labelled(client, f"{LABEL}={root}"):
            _remove(container)


def _run(client: Any, image: str, command: list[str], volumes: Any, **arguments: Any) -> int:
    """Run a step and show what it prints; returns its exit code."""
    import docker

    try:
        with _starting:
            container = client.containers.create(image, command, volumes=volumes, **arguments)
            container.start()
    except docker.errors.APIError as error:
        raise DockerError(f"Docker cannot start a step: {error.explanation}") from None
    try:
        for line in _lines(container.logs(stream=True, follow=True)):
            # At once and whole, for other steps print, too; `print` is KFP's, which writes twice.
            sys.stdout.write(line)
        return int(container.wait()["StatusCode"])
    except docker.errors.NotFound:
        return REMOVED
    finally:
        _remove(container)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines with their ends, of a text that comes in any pieces."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield f"{rest}\n"


def _labelled(client: Any, label: str) -> list[Any]:
    found: list[Any] = client.containers.list(
        all=True, filters={"label": label}, ignore_removed=True
    )
    return found


def _remove(container: Any) -> None:
    import docker

    try:
        container.remove(force=True)
    except docker.errors.NotFound:
        return  # another has been quicker
    except docker.errors.APIError as error:
        if error.status_code != 409:  # 409: another is at it
            raise


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


@contextmanager
def _docker() -> Iterator[Any]:
    """Docker's client; raises DockerError where none answers."""
    try:
        import docker
    except ModuleNotFoundError as error:
        raise DockerError(extras.advice(error)) from None
    try:
        client = docker.from_env(timeout=PATIENCE)
    except docker.errors.DockerException as error:
        if "PermissionError" in str(error):
            why = "this account may not use Docker; add it to the group docker, and log in again"
        else:
            why = (
                "no Docker daemon answers; start Docker, or name its socket by DOCKER_HOST "
                "(docker context ls shows it)"
            )
        raise DockerError(why) from None
    with closing(client):
        try:
            yield client
        # What the client raises where a connection fails is an OSError.
        except (docker.errors.DockerException, OSError) as error:
            raise DockerError(f"Docker cannot do what it is asked: {error}") from error


# What steps see


def _sources(contract: Contract) -> list[Source]:
    return [s for s in (contract.data.source, contract.data.test) if s is not None]


def _files(contract: Contract) -> Iterator[Path]:
    """Files and folders of this machine that the contract reads."""
    if (weights := contract.train.vision.weights) is not None:
        yield Path(weights.file)
    for source in _sources(contract):
        path = _path(source)
        if path is None:
            continue
        scheme = source.uri.partition(":")[0]
        if scheme == "idx":
            yield path
            labels = path.name.replace("images", "labels").replace("idx3", "idx1")
            yield from path.parent.glob(f"{labels.removesuffix('.gz')}*")
        elif contract.is_vision and path.is_file() and scheme != "cifar10":
            yield path.parent  # a table: the images lie beside it
        else:
            yield path


def _path(source: Source) -> Path | None:
    """The file or folder of this machine behind a source; None where there is none."""
    from driftmill.data.sources import local_copy

    scheme, _, rest = source.uri.partition(":")
    own = Path(rest.removeprefix("//")) if scheme in LOCAL_SCHEMES else None
    return local_copy(source) or own


def _is_far(source: Source) -> bool:
    """Whether a source is read over the network."""
    is_shipped = source.uri.startswith(("sim:", "sklearn:"))
    if source.uri == "sklearn:california_housing":  # scikit-learn downloads this one
        is_shipped = False
    return not is_shipped and _path(source) is None


def _environment(tracking: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k.startswith(_NUMERIC)}
    environment |= {
        # The image may know nothing of the user.
        "HOME": "/tmp",  # noqa: S108
        "LOGNAME": "driftmill",
        "DRIFTMILL_CORES": str(cores()),
        # A database that is a file is written by the process outside, once the steps have ended.
        "MLFLOW_TRACKING_URI": tracking if _host(tracking) else "none",
    }
    if data := os.environ.get("DRIFTMILL_DATA"):
        environment["DRIFTMILL_DATA"] = str(Path(data).absolute())
    return environment


def _host(uri: str) -> str:
    """Host of a URI; empty where it names a file, or is none."""
    try:
        return urlsplit(uri).hostname or ""
    except ValueError:
        return ""


def _is_loopback(uri: str) -> bool:
    host = _host(uri)
    return host in ("localhost", "::1") or host.startswith("127.")
