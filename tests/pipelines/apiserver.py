"""A stand-in for a Kubernetes API server: real HTTP, no cluster.

It keeps the Jobs that it is sent, if they are valid, and refuses a second one of the same name.
What becomes of them, the test says: it has no controller and no kubelet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

from tests.http_server import Handler, listening

Object = dict[str, Any]
NAMESPACE = "shop"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
KUBERNETES = "1.34"


@dataclass
class ApiServer:
    """The server's state."""

    url: str = ""
    token: str = "secret"
    jobs: dict[str, Object] = field(default_factory=dict)
    pods: list[Object] = field(default_factory=list)
    deployments: dict[str, Object] = field(default_factory=dict)
    deleted: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and query of what was deleted."""
    fault: tuple[int, str] | None = None
    """Status and message of every answer, until it is taken away."""

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Any
    ) -> tuple[int, Object]:
        """Status and object, as the API server answers."""
        folder, _, name = path.rpartition("/")
        match method:
            case "GET" if path == PODS:
                key, _, value = query["labelSelector"].partition("=")
                found = [p for p in self.pods if p["metadata"]["labels"].get(key) == value]
                return 200, {"items": found}
            case "POST" if path == JOBS:
                name = body["metadata"]["name"]
                if name in self.jobs:
                    return 409, {"message": f'jobs.batch "{name}" already exists'}
                try:
                    kubernetes_validate.validate(body, KUBERNETES, strict=True)
                except kubernetes_validate.ValidationError as error:
                    return 422, {"message": f'Job.batch "{name}" is invalid: {error.message}'}
                self.jobs[name] = {**body, "status": {}}
                return 201, self.jobs[name]
            case "GET" if folder == JOBS and name in self.jobs:
                return 200, self.jobs[name]
            case "DELETE" if folder == JOBS and name in self.jobs:
                del self.jobs[name]
                self.deleted.append((path, query))
                return 200, {}
            case "GET" if folder == DEPLOYMENTS and name in self.deployments:
                return 200, self.deployments[name]
        return 404, {"message": f"{path} not found"}


@contextmanager
def serve() -> Iterator[ApiServer]:
    """A stand-in on a free port of this machine."""
    state = ApiServer()

    class Answers(Handler):
        def _handle(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            split = urlsplit(self.path)
            query = {k: v[0] for k, v in parse_qs(split.query).items()}
            if state.fault:
                status, answer = state.fault[0], {"message": state.fault[1]}
            elif self.headers.get("Authorization") != f"Bearer {state.token}":
                status, answer = 401, {"message": "Unauthorized"}
            else:
                body = json.loads(text) if text else None
                status, answer = state.answer(self.command, split.path, query, body)
            self.respond(status, json.dumps(answer).encode())

        do_GET = do_POST = do_DELETE = _handle  # noqa: N815

    with listening(Answers) as state.url:
        yield state
