"""The API of Kubeflow Pipelines, as far as `driftmill submit` and `driftmill schedule` need it.

This is the REST interface v2beta1 of Kubeflow Pipelines 2
(https://www.kubeflow.org/docs/components/pipelines/reference/api/kubeflow-pipeline-api-spec/), and
not `kfp.Client`, which waits for an answer without end, goes to whatever cluster the current
context of kubectl names where it is given no endpoint, and keeps settings in the user's home.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from driftmill.contract import Contract, ContractError
from driftmill.home import find
from pipelines import compile as packages

#: Variables that `kfp` knows, too.
ENDPOINT, UI = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"
#: A bearer token. It is not an option, as those stand in logs and in the list of processes.
TOKEN = "KF_PIPELINES_TOKEN"  # noqa: S105 (the variable's name)
#: Seconds to wait for a connection, and for an answer.
CONNECT, ANSWER = 10.0, 60.0
#: Objects asked for at a time.
PAGE = 100

_API = "/apis/v2beta1"
_PORT_FORWARD = "kubectl port-forward -n kubeflow svc/ml-pipeline 8888:8888"

#: Reads a package five times as fast where PyYAML comes with it, which it nearly always does.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Exit codes.
FAILED, USAGE = 1, 2

Object = dict[str, Any]


class ApiError(RuntimeError):
    """What the API did not do; the message says why, and what to do."""

    def __init__(self, message: str, *, status: int = 0, usage: bool = False) -> None:
        super().__init__(message)
        #: HTTP status; 0 where there was no answer.
        self.status = status
        #: Whether the command has to be given in another way.
        self.usage = usage

    @property
    def passing(self) -> bool:
        """Whether it may work when it is tried again."""
        return self.status in (0, 408, 429) or self.status >= 500


class Kubeflow:
    """An API server.

    Args:
        endpoint: its address, e.g. `http://localhost:8888`; None: `$KF_PIPELINES_ENDPOINT`.
        namespace: the user's namespace, where there are many users.

    Raises:
        ApiError: no endpoint is given, nothing answers there, or something else does.
    """

    def __init__(self, endpoint: str | None = None, namespace: str | None = None) -> None:
        self.endpoint = address(endpoint)
        token = os.environ.get(TOKEN)
        self._client = httpx.Client(
            timeout=httpx.Timeout(ANSWER, connect=CONNECT),
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        health = self._ask("GET", "/healthz")
        many = health.get("multi_user") or health.get("multiUser")
        if many and not namespace:
            raise ApiError(
                f"{self.endpoint} has many users: name your namespace by --namespace", usage=True
            )
        #: Where there is only one user, the server takes no namespace.
        self.namespace = namespace if many else None

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is created where there is none of this name."""
        for found in self._list("/experiments", "experiments", display_name=name):
            if found.get("storage_state") != "ARCHIVED":
                return str(found["experiment_id"])
        body = {"display_name": name}
        if self.namespace:
            body["namespace"] = self.namespace
        return str(self._ask("POST", "/experiments", body=body)["experiment_id"])

    def create_run(self, run: Object) -> Object:
        """Start a run."""
        return self._ask("POST", "/runs", body=run)

    def run(self, run_id: str) -> Object:
        """A run, by Kubeflow's id."""
        return self._ask("GET", f"/runs/{run_id}")

    def delete_run(self, run_id: str) -> None:
        """Remove a run; what it does is ended."""
        self._ask("DELETE", f"/runs/{run_id}")

    def runs(self, experiment_id: str, name: str) -> list[Object]:
        """The runs of this name in an experiment, the newest first."""
        found = self._list("/runs", "runs", experiment_id=experiment_id, display_name=name)
        return sorted(found, key=lambda run: str(run["created_at"]), reverse=True)

    def recurring_runs(self, name: str) -> list[Object]:
        """The recurring runs of this name, the oldest first."""
        found = self._list("/recurringruns", "recurringRuns", display_name=name)
        return sorted(found, key=lambda run: str(run["created_at"]))

    def create_recurring_run(self, recurring: Object) -> Object:
        """Create a recurring run."""
        return self._ask("POST", "/recurringruns", body=recurring)

    def enable(self, recurring_run_id: str) -> None:
        """Let a recurring run start runs."""
        self._ask("POST", f"/recurringruns/{recurring_run_id}:enable")

    def disable(self, recurring_run_id: str) -> None:
        """Let a recurring run start no more runs."""
        self._ask("POST", f"/recurringruns/{recurring_run_id}:disable")

    def delete_recurring_run(self, recurring_run_id: str) -> None:
        """Remove a recurring run; a run that it has started goes on, which without being told so
        Kubernetes would end in mid-course."""
        self._ask(
            "DELETE",
            f"/recurringruns/{recurring_run_id}",
            query={"propagation_policy": "ORPHAN"},
        )

    def _list(
        self, path: str, field: str, *, display_name: str, experiment_id: str | None = None
    ) -> list[Object]:
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": display_name}
        query = {"page_size": str(PAGE), "filter": json.dumps({"predicates": [predicate]})}
        if experiment_id:
            query["experiment_id"] = experiment_id
        elif self.namespace:
            query["namespace"] = self.namespace
        found: list[Object] = []
        while True:
            page = self._ask("GET", path, query=query)
            found += page.get(field, [])
            if not page.get("next_page_token"):
                return found
            query["page_token"] = page["next_page_token"]

    def _ask(
        self, method: str, path: str, *, query: dict[str, str] | None = None, body: Any = None
    ) -> Object:
        with self._explained(method, path):
            response = self._client.request(
                method, f"{self.endpoint}{_API}{path}", params=query, json=body
            )
        if not response.is_success:
            raise self._refused(method, path, response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(
                f"{self.endpoint} is not the API of Kubeflow Pipelines: what answers is a page for "
                "people, as of a login; name the address of the service ml-pipeline",
                status=response.status_code,
            )
        return answer

    @contextmanager
    def _explained(self, method: str, path: str) -> Iterator[None]:
        """Say what a failure to get an answer means."""
        try:
            yield
        except httpx.ConnectError as error:
            raise ApiError(
                f"nothing answers at {self.endpoint} ({_line(error)}); for one in a cluster: "
                f"`{_PORT_FORWARD}`"
            ) from None
        except httpx.TimeoutException:
            raise ApiError(
                f"{self.endpoint} did not answer {method} {path} in time; look at its log: "
                "`kubectl logs -n kubeflow deploy/ml-pipeline`"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ApiError(f"{self.endpoint} cannot be asked: {_line(error)}") from None

    def _refused(self, method: str, path: str, response: httpx.Response) -> ApiError:
        """What a status that is no success means."""
        status, said = response.status_code, _message(response)
        match status:
            case 301 | 302 | 303 | 307 | 308 | 401:
                token = f"the token in {TOKEN} is refused: take a new one"
                if not os.environ.get(TOKEN):
                    token = f"set {TOKEN} to a bearer token"
                text = f"{self.endpoint} does not know you ({status}); {token}"
            case 403:
                text = f"{self.endpoint} does not let you: {said or method + ' ' + path}"
            case 404 if path == "/healthz":
                text = (
                    f"{self.endpoint} is not the API of Kubeflow Pipelines 2: it has no "
                    f"{_API}{path}; name the address of the service ml-pipeline"
                )
            case 404:
                text = f"{self.endpoint} has no {path}: {said}"
            case _ if status >= 500:
                text = (
                    f"{self.endpoint} failed ({status}): {said}; look at its log: "
                    "`kubectl logs -n kubeflow deploy/ml-pipeline`"
                )
            case _:
                text = f"{self.endpoint} refused {method} {path} ({status}): {said}"
        return ApiError(text, status=status)


def address(endpoint: str | None) -> str:
    """The address of the API server.

    Args:
        endpoint: as given; None: `$KF_PIPELINES_ENDPOINT`.

    Raises:
        ApiError: none is given, or it is no address.
    """
    endpoint = endpoint or os.environ.get(ENDPOINT)
    if not endpoint:
        raise ApiError(
            f"no Kubeflow Pipelines is named: give --endpoint or set {ENDPOINT}; for one in "
            f"a cluster: `{_PORT_FORWARD}`, then --endpoint http://localhost:8888",
            usage=True,
        )
    if not endpoint.startswith(("http://", "https://")):
        raise ApiError(f"{endpoint} is no address: write http:// or https:// before it", usage=True)
    if urlsplit(endpoint).username is not None:
        raise ApiError(f"an endpoint holds no credentials: set {TOKEN} instead", usage=True)
    return endpoint.rstrip("/")


def add_options(parser: argparse._ActionsContainer) -> None:
    """The options that say which API server, and how runs are there."""
    parser.add_argument(
        "--endpoint", metavar="URL", help=f"Kubeflow Pipelines' API; default: ${ENDPOINT}"
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="your namespace, where Kubeflow has many users"
    )
    parser.add_argument(
        "--experiment", metavar="E", help="experiment of the runs; default: the model's name"
    )
    parser.add_argument(
        "--service-account",
        default="driftmill-runner",
        metavar="NAME",
        help="service account of the pods; default: %(default)s",
    )
    parser.add_argument(
        "--pipeline-root",
        metavar="URI",
        help="where Kubeflow keeps what steps pass on; default: where it always does",
    )


def answer(command: Callable[[], int]) -> int:
    """Run a command; what the user has to know becomes a sentence on stderr and an exit code."""
    try:
        return command()
    except ContractError as error:
        print(error, file=sys.stderr)
        return USAGE
    except ApiError as error:
        print(f"driftmill: {error}", file=sys.stderr)
        return USAGE if error.usage else FAILED
    except packages.PackageError as error:
        print(f"driftmill: {error}", file=sys.stderr)
        return FAILED


def store_uri(options: argparse.Namespace) -> str:
    """The store that is asked for. Raises ApiError for a folder of this machine."""
    uri: str = options.store or find().store_uri
    if packages.is_folder(uri):
        raise ApiError(
            f"the store {uri} is a folder of this machine, which a cluster has not got; give "
            "--store s3://... or gs://..., or set DRIFTMILL_STORE to one",
            usage=True,
        )
    return uri


def body(
    contract: Contract, store: str, parameters: dict[str, str], options: argparse.Namespace
) -> Object:
    """What a run and a recurring run have in common: the compiled package and its settings."""
    packages.note_local_files(contract)
    with tempfile.TemporaryDirectory(prefix="driftmill-") as folder:
        path = packages.compile_package(contract, Path(folder), store=store, image=options.image)
        spec = package(path)
    config: Object = {"parameters": parameters}
    if options.pipeline_root:
        config["pipeline_root"] = options.pipeline_root
    account = {"service_account": options.service_account} if options.service_account else {}
    return {"pipeline_spec": spec, "runtime_config": config, **account}


def package(path: Path) -> Object:
    """A compiled package as the API takes it."""
    documents = list(yaml.load_all(path.read_text(encoding="utf-8"), _LOADER))
    if len(documents) == 1:
        spec: Object = documents[0]
        return spec
    pipeline, platform = documents
    return {"pipeline_spec": pipeline, "platform_spec": platform}


def _message(response: httpx.Response) -> str:
    """What the server says went wrong, on one line and not too long."""
    try:
        body = response.json()
    except ValueError:
        return response.reason_phrase
    text = body.get("message") or body.get("error") if isinstance(body, dict) else None
    return _line(text or response.reason_phrase)


def _line(said: object) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
