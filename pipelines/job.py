"""Runs as Kubernetes Jobs: for clusters without Kubeflow Pipelines.

A run is one Job of the controller's own namespace, whose pod runs `python -m pipelines.run`, the
same pipeline as everywhere. The Job's name comes from the run id, so that creating it twice is one
Job. A pod that is taken away, as by a node drain or with a spot node, is made anew by Kubernetes;
the run then goes on (`--resume`) with the fits that are kept in the store. One pod holds what all
steps need together: `train.resources` says how much.

What a pod of this installation needs (image, store, accounts, volumes, security) stands in a file,
a whole Job that the Helm chart writes; its container that trains is called `run`. For each run are
filled in:

| field | what |
|---|---|
| `metadata.name` | `driftmill-<model>-<run id>` |
| labels of Job and pod | `driftmill/run`; those of every pod of a pipeline, where not set |
| labels of the Job | Kueue's, where `train.resources.queue` names a queue |
| `metadata.ownerReferences` | the Deployment that `DRIFTMILL_OWNER` names: Jobs go when it goes |
| `spec.activeDeadlineSeconds` | `train.resources.timeout`, for all attempts together |
| `spec.template.metadata.annotations` | `driftmill/contract`: the contract, which a volume shows |
| container `run`, `args` | `--run-id`, `--trigger`, `--resume`, after those that are there |
| container `run`, `env` | `DRIFTMILL_CORES` and `OMP_NUM_THREADS`, where they are not set |
| container `run`, `resources` | CPU, memory and GPUs of the contract; other resources stay |
| node selector, tolerations, affinity, `/dev/shm` | what the contract asks for, added |

This speaks to the API server by itself, with five requests: the Python client is 31 MB and takes a
second to load.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml

from driftmill.contract import Contract
from driftmill.retrain.ledger import Run
from driftmill.retrain.policy import span
from driftmill.retrain.runner import Mark, RunnerAway, RunnerError, why
from k8s.explain import explain, refusal
from pipelines import pods

logger = logging.getLogger(__name__)

#: Files that every pod with a service account finds: `token`, `ca.crt`, `namespace`.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Names a Deployment of the namespace that owns the Jobs.
OWNER = "DRIFTMILL_OWNER"
#: Container of the template that trains.
CONTAINER = "run"
#: Annotation that holds the contract.
CONTRACT = "driftmill/contract"
#: Label that holds the run id.
RUN = "driftmill/run"
#: Time that a pod may wait for its node and its image.
START_WITHIN = timedelta(minutes=30)
#: Seconds for an answer of the API server.
TIMEOUT = 20.0

Object = dict[str, Any]


class Api:
    """The API server, for the service account of this pod.

    Args:
        url: its address.
        account: folder with `token`, `namespace` and, for https, `ca.crt`.

    Raises:
        OSError: a file is missing.
    """

    def __init__(self, url: str, account: Path = ACCOUNT) -> None:
        self._account = account
        self.namespace = (account / "namespace").read_text().strip()
        trusted: ssl.SSLContext | bool = True
        if url.startswith("https:"):
            trusted = ssl.create_default_context(cafile=str(account / "ca.crt"))
        # The server is this cluster's own: no proxy of the environment leads there.
        self._client = httpx.Client(base_url=url, verify=trusted, timeout=TIMEOUT, trust_env=False)

    @classmethod
    def of_this_pod(cls) -> Api:
        """The API server of the cluster that this process is a pod of.

        Raises:
            RunnerError: it is none, or its service account has no token.
        """
        host = os.environ.get("KUBERNETES_SERVICE_HOST")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise RunnerError(
                "the runner `job` makes Jobs of the cluster that the controller is a pod of, and "
                "this is no pod; choose --runner local"
            )
        try:
            return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}")
        except OSError as error:
            raise RunnerError(
                f"the pod has no token of its service account ({error}); set "
                "automountServiceAccountToken: true"
            ) from error

    def get(self, path: str, **query: str) -> Object | None:
        """An object or a list, below `/apis` or `/api`; None where there is none."""
        response = self._ask("GET", path, query)
        return None if response.status_code == 404 else _body(response)

    def create(self, path: str, body: Object) -> bool:
        """Create an object; False where there is one of this name.

        Raises:
            RunnerError: the API server does not take it, now or later.
        """
        response = self._ask("POST", path, body=body)
        if response.status_code == 409:
            return False
        if response.status_code in (400, 413, 422):
            raise RunnerError(f"the Job was refused: {_message(response)}")
        _body(response)
        return True

    def delete(self, path: str) -> None:
        """Delete an object, and what it owns; nothing where there is none."""
        response = self._ask("DELETE", path, {"propagationPolicy": "Background"})
        if response.status_code != 404:
            _body(response)

    def _ask(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None
    ) -> httpx.Response:
        # Kubernetes replaces the token now and then.
        token = (self._account / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        try:
            return self._client.request(method, path, params=query, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise RunnerAway(
                f"the Kubernetes API at {self._client.base_url} cannot be asked: "
                f"{str(error) or type(error).__name__}"
            ) from None


class JobRunner:
    """Runs as Kubernetes Jobs.

    Args:
        api: the API server.
        template: the file with the Job; it is read for each run.
        start_within: time that a pod may wait for its node and its image before the run has failed;
            the time in a queue of Kueue does not count.
        clock: the present time, with a time zone.
    """

    def __init__(
        self,
        api: Api,
        template: Path,
        start_within: timedelta = START_WITHIN,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._template = template
        self._start_within = start_within
        self._clock = clock
        self.host = f"the namespace {api.namespace}"
        #: What was last said of a pod that waits, by run.
        self._said: dict[str, str] = {}

    def begun(self, run: Run) -> bool:
        """Whether there is a Job."""
        return self._job(run) is not None

    def start(self, run: Run, contract: Contract) -> Mark:
        """Create the Job, unless it is there. One that has ended counts as started, too: `running`
        tells."""
        job = fill(read(self._template), run, contract, self._owners())
        if self._api.create(self._jobs(), job):
            logger.info("created the Job %s", name(run))
        return Mark()

    def running(self, run: Run) -> bool:
        """Whether the Job goes on; not where its pod has waited too long to begin."""
        job = self._job(run)
        if job is None or _ending(job) is not None:
            return False
        waits = self._waits(run, job)
        if waits is None:
            return True
        said, since = waits
        if said and said != self._said.get(run.run_id):
            self._said[run.run_id] = said
            logger.info("run %s: %s", run.run_id, said)
        return self._clock() - since <= self._start_within

    def failure(self, run: Run) -> str:
        """What Job and pods say of themselves."""
        job = self._job(run)
        if job is None:
            return f"the Job {name(run)} was deleted before it left an outcome"
        look = f"`kubectl -n {self._api.namespace} describe job {name(run)}` says more"
        if waits := self._waits(run, job):
            said, since = waits
            waited = span((self._clock() - since).total_seconds())
            return f"the Job {name(run)} did not begin in {waited}: {said or look}"
        found = [pod for pod in self._pods(run) if pod["status"].get("phase") == "Failed"]
        if found:
            return f"the Job {name(run)} left no outcome: {explain(found[-1]).rstrip('.')}"
        return f"the Job {name(run)} left no outcome: {_ending(job) or 'it goes on'}; {look}"

    def sweep(self, run: Run) -> None:
        """Delete a Job that has not ended, with its pods."""
        job = self._job(run)
        if job is not None and _ending(job) is None:
            self._api.delete(f"{self._jobs()}/{name(run)}")

    def _jobs(self) -> str:
        return f"/apis/batch/v1/namespaces/{self._api.namespace}/jobs"

    def _job(self, run: Run) -> Object | None:
        return self._api.get(f"{self._jobs()}/{name(run)}")

    def _pods(self, run: Run) -> list[Object]:
        """The run's pods, the newest last."""
        path = f"/api/v1/namespaces/{self._api.namespace}/pods"
        found = self._api.get(path, labelSelector=f"{RUN}={run.run_id}") or {}
        return sorted(found.get("items", []), key=lambda p: str(p["metadata"]["creationTimestamp"]))

    def _waits(self, run: Run, job: Object) -> tuple[str, datetime] | None:
        """Why a Job that has not ended has no pod at work, and since when; None where it has one,
        or waits in a queue, or between two attempts."""
        status = job.get("status", {})
        if _ending(job) or status.get("ready") or not status.get("startTime"):
            return None
        found = self._pods(run)
        if not found:
            return "", datetime.fromisoformat(status["startTime"])
        newest = found[-1]
        if newest["status"].get("phase") != "Pending" or newest["metadata"].get(
            "deletionTimestamp"
        ):
            return None
        since = datetime.fromisoformat(newest["metadata"]["creationTimestamp"])
        return explain(newest).rstrip("."), since

    def _owners(self) -> list[Object]:
        """The Deployment that the Jobs go with."""
        owner = os.environ.get(OWNER)
        if not owner:
            return []
        path = f"/apis/apps/v1/namespaces/{self._api.namespace}/deployments/{owner}"
        found = self._api.get(path)
        if found is None:
            raise RunnerAway(
                f"there is no Deployment {owner} in the namespace {self._api.namespace}; correct "
                f"{OWNER}"
            )
        identity = {"apiVersion": "apps/v1", "kind": "Deployment", "name": owner}
        return [{**identity, "uid": found["metadata"]["uid"]}]


def name(run: Run) -> str:
    """The name of a run's Job: at most 63 characters, as pods carry it as a label."""
    return f"driftmill-{run.model[: 52 - len(run.run_id)]}-{run.run_id}".lower()


def read(path: Path) -> Object:
    """The Job of a file.

    Raises:
        RunnerError: the file holds none, or none that can be filled in.
    """
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunnerError(f"the template of Jobs cannot be read: {error}") from error
    if not isinstance(job, dict) or job.get("kind") != "Job":
        raise RunnerError(f"{path} holds no Job; see pipelines/job.py for what it must hold")
    if not [c for c in _containers(job) if c.get("name") == CONTAINER]:
        raise RunnerError(f"the Job in {path} has no container called {CONTAINER}")
    return job


def fill(template: Object, run: Run, contract: Contract, owners: list[Object]) -> Object:
    """The Job of a run.

    Args:
        template: a Job, as `read` gives it.
        run: which run.
        contract: what to train, and what that asks of Kubernetes.
        owners: what the Job goes with, as `metadata.ownerReferences` has it.
    """
    job = deepcopy(template)
    asked = contract.train.resources
    own = {**pods.labels(contract, "training"), RUN: run.run_id}
    metadata = job.setdefault("metadata", {})
    metadata.pop("namespace", None)
    queue = {pods.QUEUE: asked.queue} if asked.queue else {}
    metadata |= {"name": name(run), "labels": own | (metadata.get("labels") or {}) | queue}
    if owners:
        metadata["ownerReferences"] = owners
    job["spec"]["activeDeadlineSeconds"] = int(asked.timeout)

    template = job["spec"]["template"]
    about = template.setdefault("metadata", {})
    about["labels"] = own | (about.get("labels") or {})
    about["annotations"] = (about.get("annotations") or {}) | {CONTRACT: contract.to_json()}

    (container,) = (c for c in _containers(job) if c.get("name") == CONTAINER)
    # Kubernetes would put variables in the place of `$(NAME)`, and a trigger is text from outside.
    trigger = why(run).replace("$", "$$")
    container["args"] = [
        *(container.get("args") or []),
        *(f"--run-id={run.run_id}", f"--trigger={trigger}", "--resume"),
    ]
    environment = container.setdefault("env", [])
    for variable in ("DRIFTMILL_CORES", "OMP_NUM_THREADS"):
        if variable not in {e["name"] for e in environment}:
            environment.append({"name": variable, "value": str(pods.cores(asked.cpu))})
    resources = container.setdefault("resources", {})
    gpus = {asked.gpu_type: str(asked.gpu)} if asked.gpu else {}
    # No CPU limit: it would slow training down on a node that has nothing else to do.
    for kind, amounts in (
        ("requests", {"cpu": asked.cpu, "memory": asked.memory}),
        ("limits", {"memory": asked.memory, **gpus}),
    ):
        resources[kind] = (resources.get(kind) or {}) | amounts
    _place(template["spec"], container, contract)
    return job


def _place(spec: Object, container: Object, contract: Contract) -> None:
    """What the contract asks of the node, beside what the template asks."""
    asked = contract.train.resources
    if asked.node_selector:
        spec["nodeSelector"] = (spec.get("nodeSelector") or {}) | asked.node_selector
    tolerated = [
        {k: v for k, v in t.model_dump(mode="json").items() if v not in (None, "")}
        for t in pods.tolerations(asked)
    ]
    if tolerated:
        spec["tolerations"] = [*(spec.get("tolerations") or []), *tolerated]
    if expressions := pods.gpu_products(asked):
        affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
        required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
        # One of the terms must hold, and in it all expressions.
        for term in required.setdefault("nodeSelectorTerms", [{}]):
            term["matchExpressions"] = [*(term.get("matchExpressions") or []), *expressions]
    if asked.gpu:
        memory = {"medium": "Memory", "sizeLimit": asked.shared_memory}
        spec.setdefault("volumes", []).append({"name": "shared-memory", "emptyDir": memory})
        mount = {"name": "shared-memory", "mountPath": pods.SHARED_MEMORY}
        container.setdefault("volumeMounts", []).append(mount)


def _containers(job: Object) -> list[Object]:
    spec = job.get("spec") or {}
    found: list[Object] = (spec.get("template", {}).get("spec") or {}).get("containers") or []
    return found


def _ending(job: Object) -> str | None:
    """How a Job has ended; None where it goes on."""
    for condition in job.get("status", {}).get("conditions") or []:
        if condition["status"] != "True":
            continue
        if condition["type"] == "Complete":
            return "it has completed"
        if condition["type"] == "Failed":
            reason, said = condition.get("reason", ""), condition.get("message", "")
            if reason == "DeadlineExceeded":
                limit = job["spec"].get("activeDeadlineSeconds")
                return f"it ran longer than {limit} s; raise train.resources.timeout"
            return said or reason or "it has failed"
    return None


def _body(response: httpx.Response) -> Object:
    """The object of an answer. Raises RunnerAway for one that is no success."""
    if not response.is_success:
        raise RunnerAway(
            f"the Kubernetes API answered {response.status_code} to {response.request.method} "
            f"{response.request.url.path}: {_message(response)}"
        )
    found: Object = response.json()
    return found


def _message(response: httpx.Response) -> str:
    """What the API server says, as a sentence with a next step where it is known."""
    try:
        said = str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
    if response.status_code == 403:
        return refusal(said)
    return " ".join(said.split())[:300]
