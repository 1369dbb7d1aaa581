"""Rendered manifests, a kubeconfig of an API that answers as told, and programs that fail."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import manifests
from k8s.manifests import ROOT, Object
from tests.http_server import Handler, listening

REMOTES = {
    "pipelines": "https://github.com/kubeflow/pipelines",
    "argo": "https://github.com/argoproj/argo-workflows",
    "kueue": "https://github.com/kubernetes-sigs/kueue",
    "trainer": "https://github.com/kubeflow/trainer",
}


@functools.cache
def reachable(remote: str) -> bool:
    """Whether git reaches a repository."""
    try:
        done = subprocess.run(
            ["git", "ls-remote", "--exit-code", remote, "HEAD"],
            capture_output=True,
            timeout=20,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@functools.cache
def rendered(folder: str) -> tuple[Object, ...]:
    """The objects of a folder of `k8s/`; skips where what it refers to cannot be reached."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    wanted = {
        "pipelines": ["pipelines", "argo"],
        "overlays": ["pipelines", "argo"],
        "components/kueue": ["kueue"],
        "components/trainer": ["trainer"],
    }
    own = ("base", "components/kueue/queues")
    remotes = [r for start, names in wanted.items() if folder.startswith(start) for r in names]
    for name in [] if folder in own else remotes:
        if not reachable(REMOTES[name]):
            pytest.skip(f"git does not reach {REMOTES[name]}, which k8s/{folder} refers to")
    return tuple(manifests.render(ROOT / folder))


class Api:
    """A Kubernetes API that answers with prepared objects."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        """By path: an object, or a status code."""
        self.asked: list[str] = []
        self.patched: list[tuple[str, Any]] = []
        self.deleted: list[str] = []
        api = self

        class Answers(Handler):
            def do_GET(self) -> None:  # noqa: N802
                api.asked.append(self.path)
                self._answer(api.answers.get(self.path.partition("?")[0], 404))

            def do_PATCH(self) -> None:  # noqa: N802
                body = self.rfile.read(int(self.headers["Content-Length"]))
                api.patched.append((self.path, json.loads(body)))
                self._answer({})

            def do_DELETE(self) -> None:  # noqa: N802
                api.deleted.append(self.path)
                self._answer({})

            def _answer(self, answer: Any) -> None:
                if callable(answer):
                    answer = answer()
                status, body = (answer, {}) if isinstance(answer, int) else (200, answer)
                self.respond(status, json.dumps(body).encode())

        self._running = ExitStack()
        self.url = self._running.enter_context(listening(Answers))

    def close(self) -> None:
        self._running.close()


def kubeconfig(path: Path, server: str, context: str = "test") -> None:
    """Write a kubeconfig with one context, which is not the current one."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": context, "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(document))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API at the context `test` of the kubeconfig."""
    served = Api({})
    kubeconfig(tmp_path / "kubeconfig", served.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield served
    served.close()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts programs of our own, shell scripts, before all others, or takes all others away."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write
