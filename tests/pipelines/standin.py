"""A stand-in for the API server of Kubeflow Pipelines: real HTTP, no cluster.

It takes what the back end takes (fields, package, parameters, cron of six fields, limits), keeps
what it was sent, and answers as the back end does. What becomes of a run, the test says.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api  # type: ignore[import-untyped]
from google.protobuf import json_format  # type: ignore[import-untyped]
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.http_server import Handler, listening

Object = dict[str, Any]
API = "/apis/v2beta1"


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StandIn:
    """The server's state."""

    url: str = ""
    token: str | None = None
    """The bearer token that it wants."""
    many_users: bool = False
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and body of all requests."""
    experiments: list[Object] = field(default_factory=list)
    runs: list[Object] = field(default_factory=list)
    recurring: list[Object] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    """What a run looks like each time that it is looked at, or a function that says so; the last
    stays."""
    faults: dict[tuple[str, str], list[tuple[int, str]]] = field(default_factory=dict)
    """Status and body of the next answers, by method and pattern of the path. Status 0: none
    comes."""
    patience: threading.Event = field(default_factory=threading.Event)
    """Set at the end, for answers that never come."""
    clock: datetime = datetime(2026, 11, 24, tzinfo=UTC)

    def sent(self, method: str, path: str) -> list[Any]:
        """The bodies of all requests to a path."""
        return [body for m, p, body in self.requests if (m, p) == (method, path)]

    def fault(self, method: str, path: str) -> tuple[int, str] | None:
        """The answer that a test wants here, if any."""
        for (wanted, pattern), answers in self.faults.items():
            if answers and wanted == method and fnmatch(path, pattern):
                return answers.pop(0)
        return None

    def awake(self) -> list[Object]:
        """The recurring runs that start runs."""
        return [r for r in self.recurring if r["status"] == "ENABLED"]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Object:
        """What the back end answers."""
        match (method, path.strip("/").split("/")):
            case "GET", ["healthz"]:
                return {"multi_user": True} if self.many_users else {}
            case "GET", ["experiments"]:
                return self._page("experiments", self.experiments, query)
            case "POST", ["experiments"]:
                self._known(body, kfp_server_api.V2beta1Experiment)
                self._namespaced(body.get("namespace"))
                return self._add(self.experiments, "experiment_id", body)
            case "GET", ["runs"]:
                return self._page("runs", self.runs, query)
            case "POST", ["runs"]:
                self._known(body, kfp_server_api.V2beta1Run)
                self._package(body)
                return self._add(self.runs, "run_id", {**body, "state": "PENDING"})
            case "GET", ["runs", name]:
                run = self._one(self.runs, "run_id", name)
                if self.script:
                    now = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                    run.update(now() if callable(now) else now)
                return run
            case "DELETE", ["runs", name]:
                self.runs.remove(self._one(self.runs, "run_id", name))
                return {}
            case "GET", ["recurringruns"]:
                return self._page("recurringRuns", self.recurring, query)
            case "POST", ["recurringruns"]:
                self._known(body, kfp_server_api.V2beta1RecurringRun)
                self._package(body)
                if not 1 <= int(body["max_concurrency"]) <= 10:
                    raise Refused(400, "Max concurrency must be at least 1 and at most 10")
                if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                    raise Refused(400, "Schedule cron is not a supported format")
                status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[body["mode"]]
                return self._add(self.recurring, "recurring_run_id", {**body, "status": status})
            case "POST", ["recurringruns", change]:
                name, _, what = change.partition(":")
                recurring = self._one(self.recurring, "recurring_run_id", name)
                recurring["status"] = {"enable": "ENABLED", "disable": "DISABLED"}[what]
                return {}
            case "DELETE", ["recurringruns", name]:
                # Without it the back end ends the runs that this one has started.
                assert query == {"propagation_policy": "ORPHAN"}
                self.recurring.remove(self._one(self.recurring, "recurring_run_id", name))
                return {}
        raise Refused(404, "Not Found")

    def _namespaced(self, namespace: str | None) -> None:
        if self.many_users and not namespace:
            raise Refused(400, "Namespace is empty in multi-user mode")
        if namespace and not self.many_users:
            raise Refused(400, "In single-user mode, the namespace must be empty")

    def _known(self, body: Object, model: Any) -> None:
        if unknown := set(body) - set(model.attribute_map.values()):
            raise Refused(400, f"unknown field {sorted(unknown)[0]!r}")
        if not body.get("display_name"):
            raise Refused(400, "Run name cannot be empty")

    def _package(self, body: Object) -> None:
        self._one(self.experiments, "experiment_id", body["experiment_id"])
        package = body["pipeline_spec"]
        spec = json_format.ParseDict(package["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(package["platform_spec"], pipeline_spec_pb2.PlatformSpec())
        taken = set(spec.root.input_definitions.parameters)
        if unknown := set(body["runtime_config"]["parameters"]) - taken:
            raise Refused(400, f"parameter {sorted(unknown)[0]!r} is not an input of the pipeline")

    def _add(self, kept: list[Object], key: str, body: Object) -> Object:
        self.clock += timedelta(seconds=1)
        kept.append({**body, key: str(uuid.uuid4()), "created_at": self.clock.isoformat()})
        return kept[-1]

    def _one(self, kept: list[Object], key: str, name: str) -> Object:
        for one in kept:
            if one[key] == name:
                return one
        raise Refused(404, f"ResourceNotFoundError: {name} not found.")

    def _page(self, field: str, kept: list[Object], query: dict[str, str]) -> Object:
        """A page of one, to see that all pages are read."""
        if "experiment_id" not in query and (self.many_users or query.get("namespace")):
            self._namespaced(query.get("namespace"))
        found = kept
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert predicate["operation"] in ("EQUALS", 1)
            found = [o for o in found if o.get(predicate["key"]) == predicate["stringValue"]]
        if "experiment_id" in query:
            found = [o for o in found if o["experiment_id"] == query["experiment_id"]]
        start = int(query.get("page_token") or 0)
        page: Object = {field: found[start : start + 1]} if found[start:] else {}
        return {**page, "next_page_token": str(start + 1)} if found[start + 1 :] else page


def task(name: str, state: str, at: int = 0, **more: Any) -> Object:
    """One of a run's task details."""
    times = {"create_time": "2026-11-24T00:00:00Z", "start_time": f"2026-11-24T00:00:{at:02d}Z"}
    if state in ("SUCCEEDED", "FAILED"):
        times["end_time"] = f"2026-11-24T00:00:{at + 7:02d}Z"
    return {"display_name": name, "state": state, "task_id": name, **times, **more}


def run(state: str, *tasks: Object, **more: Any) -> Object:
    """How a run looks at some moment."""
    return {"state": state, "run_details": {"task_details": list(tasks)}, **more}


@contextmanager
def serve() -> Iterator[StandIn]:
    """A stand-in on a free port of this machine."""
    state = StandIn()

    class Answers(Handler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            split = urlsplit(self.path)
            path = split.path.removeprefix(API)
            body = json.loads(text) if text else None
            state.requests.append((self.command, path, body))
            query = {k: v[0] for k, v in parse_qs(split.query).items()}
            status, answer = 200, ""
            if fault := state.fault(self.command, path):
                status, answer = fault
            elif state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
                status, answer = 401, json.dumps({"code": 16, "message": "Unauthenticated"})
            else:
                try:
                    answer = json.dumps(state.answer(self.command, path, query, body))
                except Refused as refused:
                    status = refused.status
                    answer = json.dumps({"code": 3, "message": str(refused)})
            if status == 0:
                state.patience.wait(30)
                return
            kind = "application/json" if answer.startswith("{") else "text/html"
            self.respond(status, answer.encode(), kind)

        do_GET = do_POST = do_DELETE = _handle  # noqa: N815

    with listening(Answers) as state.url:
        try:
            yield state
        finally:
            state.patience.set()
