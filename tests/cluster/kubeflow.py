"""A compiled package, run on a cluster as Kubeflow Pipelines runs it, without Kubeflow Pipelines.

`Package.pod` makes of a step the pod that the back end makes of it, and `Run` follows the graph as
its driver does. So the package is proven on any cluster, kind included, where the back end itself
would need a registry. What follows was read in the sources of Kubeflow Pipelines 2.17.0
(`backend/src/v2/compiler/argocompiler`, `driver`, `component`) and Argo Workflows 4.0.5
(`workflow/controller/workflowpod.go`).

**The pod of a step.** The compiler writes one template for all steps; for each step the driver's
own pod computes a strategic merge patch (`initPodSpecPatch`, `extendPodSpecPatch`) with:

- container `main`: the executor's image; command = the launcher with the executor input as JSON,
  then `--`; args = the executor's command and args. The launcher, not the driver, replaces `{{$}}`;
- resources: `resourceCpuRequest`, ... before the older numbers; the accelerator becomes a *limit*
  (the API server makes the request of it). No CPU limit unless one is set;
- from the platform spec: node selector, tolerations, node affinity (each entry one *term*, and
  terms are alternatives; with a weight a preference), `emptyDirMounts`, Secrets and ConfigMaps as
  environment by reference, with `optional`, image pull policy (of `main` alone),
  `activeDeadlineSeconds` of the pod (pending time does not count), and user, group and
  `runAsNonRoot`.

Labels and annotations come not by the patch but by parameters of the template; Argo adds its own.

The template has empty directories at /kfp-launcher, /gcs, /s3, /minio, /.local, /.cache, /.config;
`KFP_POD_NAME` and `KFP_POD_UID`; an init container that copies the launcher; restart policy Never.
Argo adds the containers `init` and `wait`, with the security context of its own configuration (KFP
sets one that passes `restricted`), and wraps the command.

**Security.** A step's template has its own pod security context, only `seccompProfile:
RuntimeDefault`, and it *replaces* the workflow's, which says `runAsNonRoot`. To `main` it gives
`allowPrivilegeEscalation: false`, `capabilities.drop: [ALL]` and the seccomp profile, but no
`runAsNonRoot`, as images of users may run as root. So a step passes the Pod Security level
`restricted` only if it sets `runAsNonRoot` itself (`kubernetes.set_security_context`), or the
administrator sets `DEFAULT_SECURITY_CONTEXT_RUN_AS_NON_ROOT`. An identity that the administrator
sets wins over the step's. The root file system stays writable: nothing can make it read-only.

**The graph.** An artifact of a task lies at `ROOT/<task>/<salt>/<name>`, and at `/s3/<bucket>/...`
in the pod; output parameters come from the executor's output file. Iterations of a loop run at the
same time and are not retried, other steps are (`retryPolicy`). An exit handler is told the
state that ML Metadata keeps, COMPLETE or FAILED, not the SDK's SUCCEEDED, and no error message.

**What is different here.** The launcher is `launcher.py`, from a ConfigMap; there are no driver,
`init` and `wait` containers; retries follow at once, without a back-off, and in loops too.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.launcher import OUTPUT
from tests.cluster.objects import Namespace

LAUNCHER = "kfp-launcher"
RUNNER = "driftmill-runner"
SCRATCH = ("gcs", "s3", "minio", ".local", ".cache", ".config")


class Package:
    """A compiled pipeline.

    Args:
        path: the `pipeline.yaml`.
    """

    def __init__(self, path: Path) -> None:
        self.spec, *platforms = yaml.safe_load_all(path.read_text())
        self.executors = self.spec["deploymentSpec"]["executors"]
        settings = platforms[0]["platforms"]["kubernetes"] if platforms else {}
        self._settings = settings.get("deploymentSpec", {}).get("executors", {})

    def pod(self, executor: str, name: str, executor_input: Mapping[str, Any]) -> dict[str, Any]:
        """The pod that the back end makes of a step.

        Args:
            executor: such as `exec-fit`.
            name: of the pod.
            executor_input: what the launcher gives the step.
        """
        container = self.executors[executor]["container"]
        settings = self._settings.get(executor, {})
        metadata = settings.get("podMetadata", {})
        main: dict[str, Any] = {
            "name": "main",
            "image": container["image"],
            "command": [
                *("python3", f"/{LAUNCHER}/launcher.py"),
                *("--executor_input", json.dumps(executor_input), "--"),
            ],
            "args": [*container["command"], *container["args"]],
            "env": _environment(container, settings),
            "resources": _resources(container.get("resources", {})),
            "volumeMounts": [
                {"name": LAUNCHER, "mountPath": f"/{LAUNCHER}"},
                *({"name": _volume(f), "mountPath": f"/{f}"} for f in SCRATCH),
            ],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
                **_identity(settings.get("securityContext", {})),
            },
        }
        if policy := settings.get("imagePullPolicy"):
            main["imagePullPolicy"] = policy
        spec: dict[str, Any] = {
            "restartPolicy": "Never",
            "serviceAccountName": RUNNER,
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [main],
            "volumes": [
                {"name": LAUNCHER, "configMap": {"name": LAUNCHER}},
                *({"name": _volume(f), "emptyDir": {}} for f in SCRATCH),
            ],
        }
        for mount in settings.get("emptyDirMounts", []):
            source = {"medium": mount.get("medium", ""), "sizeLimit": mount.get("sizeLimit")}
            spec["volumes"].append({"name": mount["volumeName"], "emptyDir": source})
            main["volumeMounts"].append(
                {"name": mount["volumeName"], "mountPath": mount["mountPath"]}
            )
        if deadline := int(settings.get("activeDeadlineSeconds", 0)):
            spec["activeDeadlineSeconds"] = deadline
        if labels := settings.get("nodeSelector", {}).get("labels"):
            spec["nodeSelector"] = labels
        if tolerations := settings.get("tolerations"):
            spec["tolerations"] = tolerations
        if terms := [_term(term) for term in settings.get("nodeAffinity", [])]:
            required = {"nodeSelectorTerms": terms}
            key = "requiredDuringSchedulingIgnoredDuringExecution"
            spec["affinity"] = {"nodeAffinity": {key: required}}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {
                    "pipelines.kubeflow.org/v2_component": "true",
                    "workflows.argoproj.io/workflow": "driftmill-test",
                    "workflows.argoproj.io/completed": "false",
                    **metadata.get("labels", {}),
                },
                "annotations": metadata.get("annotations", {}),
            },
            "spec": spec,
        }


def _environment(container: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    environment: list[dict[str, Any]] = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in (("KFP_POD_NAME", "metadata.name"), ("KFP_POD_UID", "metadata.uid"))
    ]
    environment += [{"name": e["name"], "value": e["value"]} for e in container.get("env", [])]
    for kind, of in (("secret", "secretAsEnv"), ("configMap", "configMapAsEnv")):
        for source in settings.get(of, []):
            name = source[f"{kind}NameParameter"]["runtimeValue"]["constant"]
            for entry in source["keyToEnv"]:
                reference = {
                    "name": name,
                    "key": entry[f"{kind}Key"],
                    "optional": source.get("optional", False),
                }
                environment.append(
                    {"name": entry["envVar"], "valueFrom": {f"{kind}KeyRef": reference}}
                )
    return environment


def _resources(asked: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    limits, requests = {}, {}
    for resource in ("Cpu", "Memory"):
        if limit := asked.get(f"resource{resource}Limit"):
            limits[resource.lower()] = limit
        if request := asked.get(f"resource{resource}Request"):
            requests[resource.lower()] = request
    if accelerator := asked.get("accelerator"):
        limits[accelerator["resourceType"]] = accelerator["resourceCount"]
    return {"limits": limits, "requests": requests}


def _identity(security: Mapping[str, Any]) -> dict[str, Any]:
    # Numbers are text in the package, as JSON has no 64-bit integers.
    numbers = {k: int(security[k]) for k in ("runAsUser", "runAsGroup") if k in security}
    named = {"runAsNonRoot": security["runAsNonRoot"]} if "runAsNonRoot" in security else {}
    return {**numbers, **named}


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    return {k: term[k] for k in ("matchExpressions", "matchFields") if k in term}


def _volume(folder: str) -> str:
    return f"{folder.removeprefix('.')}-scratch"


@dataclass
class Step:
    """A pod that ran.

    Attributes:
        task: such as `fit`.
        pod: its name.
        state: COMPLETE or FAILED.
        node: where it ran.
        waited: seconds from the pod's creation to the container's start.
        ran: seconds from there to its end.
        log: what it printed.
    """

    task: str
    pod: str
    state: str
    node: str
    waited: float
    ran: float
    log: str
    output: dict[str, Any] = field(default_factory=dict)


class StepFailed(Exception):
    """A step has failed as often as it may."""


@dataclass
class _Outputs:
    parameters: dict[str, Any]
    artifacts: dict[str, list[dict[str, Any]]]


class Run:
    """One run of a package.

    Args:
        package: what to run.
        namespace: where.
        arguments: of the pipeline; defaults for those not named.
        root: where artifacts go, `s3://bucket/prefix`.
    """

    def __init__(
        self, package: Package, namespace: Namespace, arguments: Mapping[str, Any], root: str
    ) -> None:
        self.package, self.namespace = package, namespace
        self.id = str(uuid.uuid4())
        self._root = f"{root}/{self.id}"
        inputs = package.spec["root"]["inputDefinitions"]["parameters"]
        defaults = {name: spec.get("defaultValue") for name, spec in inputs.items()}
        self._arguments = {**defaults, **arguments}
        self.state = "RUNNING"
        #: Every pod that ran, also those that failed, in the order of their ends.
        self.steps: list[Step] = []

    def follow(self) -> str:
        """Run it to its end; COMPLETE or FAILED."""
        try:
            self._graph(self.package.spec["root"]["dag"], _Outputs(self._arguments, {}))
        except StepFailed:
            return "FAILED"
        return "COMPLETE"

    def _graph(self, dag: Mapping[str, Any], given: _Outputs) -> dict[str, _Outputs]:
        """Run the tasks of a graph, each after those that it depends on."""
        done: dict[str, _Outputs] = {}
        states: dict[str, str] = {}
        failure: StepFailed | None = None
        waiting = dict(dag["tasks"])
        while waiting:
            name = next(
                n for n, t in waiting.items() if not set(t.get("dependentTasks", [])) & set(waiting)
            )
            task = waiting.pop(name)
            before = [states[d] for d in task.get("dependentTasks", [])]
            trigger = task.get("triggerPolicy", {})
            if "FAILED" in before and trigger.get("strategy") != "ALL_UPSTREAM_TASKS_COMPLETED":
                states[name] = "FAILED"
                continue
            inputs = self._inputs(task, given, done, states)
            if not _holds(trigger.get("condition"), inputs.parameters):
                states[name] = "NOT_TRIGGERED"
                continue
            try:
                done[name] = self._task(name, task, inputs)
                states[name] = "COMPLETE"
            except StepFailed as error:
                states[name], failure = "FAILED", error
        if failure:
            raise failure
        return done

    def _task(self, name: str, task: Mapping[str, Any], inputs: _Outputs) -> _Outputs:
        component = self.package.spec["components"][task["componentRef"]["name"]]
        if "executorLabel" in component:
            retries = int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
            return self._execute(name, component, inputs, retries)
        iterator = task.get("parameterIterator")
        if iterator is None:
            return _collect(component["dag"], [self._graph(component["dag"], inputs)])
        items = json.loads(iterator["items"]["raw"])
        each = [
            _Outputs({**inputs.parameters, iterator["itemInput"]: item}, inputs.artifacts)
            for item in items
        ]
        with ThreadPoolExecutor(len(each)) as pool:
            ended = list(pool.map(lambda one: self._graph(component["dag"], one), each))
        return _collect(component["dag"], ended)

    def _inputs(
        self,
        task: Mapping[str, Any],
        given: _Outputs,
        done: Mapping[str, _Outputs],
        states: Mapping[str, str],
    ) -> _Outputs:
        parameters: dict[str, Any] = {}
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            match source:
                case {"componentInputParameter": name}:
                    parameters[key] = given.parameters[name]
                case {"runtimeValue": {"constant": text}}:
                    parameters[key] = text.replace("{{$.pipeline_job_uuid}}", self.id)
                case {"taskOutputParameter": {"producerTask": by, "outputParameterKey": name}}:
                    parameters[key] = done[by].parameters[name]
                case {"taskFinalStatus": {"producerTask": by}}:
                    parameters[key] = {
                        "state": states[by],
                        "pipelineTaskName": by,
                        "pipelineJobResourceName": f"run-{self.id}",
                        "error": {},
                    }
                case _:
                    raise NotImplementedError(source)
        artifacts: dict[str, list[dict[str, Any]]] = {}
        for key, source in task.get("inputs", {}).get("artifacts", {}).items():
            match source:
                case {"componentInputArtifact": name}:
                    artifacts[key] = given.artifacts[name]
                case {"taskOutputArtifact": {"producerTask": by, "outputArtifactKey": name}}:
                    artifacts[key] = done[by].artifacts[name]
                case _:
                    raise NotImplementedError(source)
        return _Outputs(parameters, artifacts)

    def _execute(
        self, task: str, component: Mapping[str, Any], inputs: _Outputs, retries: int
    ) -> _Outputs:
        definitions = component.get("outputDefinitions", {})
        place = f"{self._root}/{task}/{uuid.uuid4()}"
        artifacts = {
            name: [{"name": name, "uri": f"{place}/{name}", "type": spec["artifactType"]}]
            for name, spec in definitions.get("artifacts", {}).items()
        }
        executor_input = {
            "inputs": {
                "parameterValues": inputs.parameters,
                "artifacts": {name: {"artifacts": a} for name, a in inputs.artifacts.items()},
            },
            "outputs": {
                "artifacts": {name: {"artifacts": a} for name, a in artifacts.items()},
                "parameters": {
                    name: {"outputFile": f"/tmp/kfp/outputs/{name}"}
                    for name in definitions.get("parameters", {})
                },
                "outputFile": f"/s3/{place.removeprefix('s3://')}/output_metadata.json",
            },
        }
        for attempt in range(1 + retries):
            name = f"{task}-{self.id[:8]}-{uuid.uuid4().hex[:5]}-{attempt}"
            pod = self.package.pod(component["executorLabel"], name, executor_input)
            step = self._pod(task, pod)
            if step.state == "COMPLETE":
                for key, told in step.output.get("artifacts", {}).items():
                    artifacts[key] = [{**artifacts[key][0], **told["artifacts"][0]}]
                return _Outputs(step.output.get("parameterValues", {}), artifacts)
        raise StepFailed(f"{task}: {step.log[-2000:]}")

    def _pod(self, task: str, body: Mapping[str, Any]) -> Step:
        pod = self.namespace.finish(body)
        container = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        log = self.namespace.log(body["metadata"]["name"])
        *_, last = ["", *log.splitlines()]
        step = Step(
            task=task,
            pod=body["metadata"]["name"],
            state="COMPLETE" if pod["status"]["phase"] == "Succeeded" else "FAILED",
            node=pod["spec"]["nodeName"],
            waited=seconds(pod["metadata"]["creationTimestamp"], container["startedAt"]),
            ran=seconds(container["startedAt"], container["finishedAt"]),
            log=log,
            output=json.loads(last.removeprefix(OUTPUT)) if last.startswith(OUTPUT) else {},
        )
        self.steps.append(step)
        return step


def _collect(dag: Mapping[str, Any], ended: Sequence[Mapping[str, _Outputs]]) -> _Outputs:
    """What a graph puts out: of a loop, all iterations' artifacts in a list."""
    artifacts = {}
    for name, source in dag.get("outputs", {}).get("artifacts", {}).items():
        (selector,) = source["artifactSelectors"]
        by, key = selector["producerSubtask"], selector["outputArtifactKey"]
        artifacts[name] = [a for done in ended for a in done[by].artifacts[key]]
    return _Outputs({}, artifacts)


def _holds(condition: str | None, parameters: Mapping[str, Any]) -> bool:
    """Whether a condition of the form `inputs.parameter_values['x'] == 'y'` is true."""
    if condition is None:
        return True
    left, right = condition.split(" == ")
    name = left.split("'")[1]
    return bool(parameters[name] == right.strip("'"))


def seconds(start: str, end: str) -> float:
    """Seconds between two of the API's timestamps; they have no fractions."""
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
