"""The tabular pipeline as pods: every step to its end, promote and reject, a stop by the data.

The compiled package runs as Kubeflow Pipelines would run it (see `kubeflow.py`), in a namespace
that enforces the `restricted` Pod Security level and the network policies of `k8s/base`, with the
object store in the cluster and its key in a Secret.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmill.contract import Contract
from pipelines.compile import compile_package
from tests.cluster.conftest import KEY
from tests.cluster.kubeflow import Package, Run
from tests.cluster.objects import Namespace
from tests.k8s.test_explain import sentence

CONTRACT = """
apiVersion: driftmill/v1
model: payments
task: classification
data:
  source: sim:payments?rows=3000&seed=7
  target: {name: fraud, labels: ["no", "yes"]}
  id: payment_id
  time: {columns: [at]}
  columns:
    - {name: amount, type: float, min: 0}
    - {name: account_age_days, type: int, min: 0}
    - {name: distance_km, type: float, min: 0, nullable: true}
    - {name: channel, type: category}
train:
  candidates: [linear, hist-gradient-boosting]
  metric: auc
  search: {method: random, budget: 2, folds: 3}
  resources: {cpu: 250m, memory: 1Gi}
gates: {min_test_rows: 50, resamples: 200, max_latency_ms: null}
tracking: none
"""
MODEL = "payments"
#: The graph's steps, in order, where the new model is promoted.
ALL = ["prepare", "fit", "fit", "assemble", "judge", "promote", "record"]


@pytest.fixture(scope="module")
def image(loaded: Callable[[str], str]) -> str:
    """The component image, in the cluster."""
    from driftmill.images import for_steps as usual_image

    return loaded(usual_image("tabular"))


def prepare(namespace: Namespace, object_store: str, policies: str) -> None:
    """What a namespace of Driftmill has: where the store is and its key, and who may talk to whom
    as a file of `k8s/base` says it."""
    key = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), KEY, strict=True))
    where = {"AWS_ENDPOINT_URL": object_store, "AWS_REGION": "us-east-1"}
    namespace.apply(
        {"kind": "ConfigMap", "metadata": {"name": "driftmill"}, "data": where},
        {"kind": "Secret", "metadata": {"name": "driftmill-store"}, "stringData": key},
    )
    for body in yaml.safe_load_all(Path("k8s/base", policies).read_text()):
        body["metadata"]["namespace"] = namespace.name
        namespace.apply(body)


@pytest.fixture(scope="module")
def bucket(namespace: Namespace, image: str, object_store: str) -> str:
    """A bucket of its own; the namespace is like that of real runs."""
    prepare(namespace, object_store, "network-kubeflow.yaml")
    name = f"driftmill-{uuid.uuid4().hex[:8]}"
    ask(
        namespace,
        image,
        "import botocore.session\n"
        "s3 = botocore.session.get_session().create_client('s3')\n"
        f"s3.create_bucket(Bucket={name!r})\nprint(1)",
    )
    return name


@pytest.fixture(scope="module")
def run(
    namespace: Namespace,
    image: str,
    bucket: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Run]:
    """Runs the contract, with changes to it, to the end."""

    def run_to_the_end(**changes: Any) -> Run:
        values = yaml.safe_load(CONTRACT)
        for section, settings in changes.items():
            values[section].update(settings)
        folder = tmp_path_factory.mktemp("package")
        contract = Contract.model_validate(values)
        path = compile_package(contract, folder, store=f"s3://{bucket}/store", image=image)
        one = Run(Package(path), namespace, {}, root=f"s3://{bucket}/artifacts")
        one.state = one.follow()
        for step in one.steps:
            print(
                f"{step.task:10} {step.state:9} on {step.node}: "
                f"{step.waited:.0f} s to start, {step.ran:.0f} s to run"
            )
        return one

    return run_to_the_end


@pytest.fixture(scope="module")
def promoted(run: Callable[..., Run]) -> Run:
    """The first run: there is no champion yet."""
    return run()


#: Labels by which the network policies know a step and a service.
OURS = {"workflows.argoproj.io/workflow": "ask", "app.kubernetes.io/part-of": "driftmill"}


def ask(namespace: Namespace, image: str, code: str, labels: dict[str, str] = OURS) -> Any:
    """Run Python in a pod, which may do what a step and a service may; what it prints last, as
    JSON."""
    name = f"ask-{uuid.uuid4().hex[:8]}"
    named = {"AWS_ENDPOINT_URL": "driftmill", "AWS_REGION": "driftmill"}
    secret = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    pod = namespace.finish(
        {
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": labels,
            },
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "main",
                        "image": image,
                        "command": ["python3", "-c", code],
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                        "env": [
                            *(
                                {"name": k, "valueFrom": {"configMapKeyRef": {"name": v, "key": k}}}
                                for k, v in named.items()
                            ),
                            *(
                                {
                                    "name": k,
                                    "valueFrom": {
                                        "secretKeyRef": {"name": "driftmill-store", "key": k}
                                    },
                                }
                                for k in secret
                            ),
                        ],
                    }
                ],
            },
        }
    )
    log = namespace.log(name)
    assert pod["status"]["phase"] == "Succeeded", log
    return json.loads(log.splitlines()[-1])


def outcome(
    namespace: Namespace, image: str, bucket: str, run_id: str, store: str = "store"
) -> Any:
    """What the store says of a run, and the rollout."""
    return ask(
        namespace,
        image,
        "import json\n"
        "from driftmill import rollout, runs\n"
        "from driftmill.store import Store\n"
        f"store = Store('s3://{bucket}/{store}')\n"
        f"one = runs.read(store, {MODEL!r}, {run_id!r})\n"
        f"now = rollout.read(store, {MODEL!r})\n"
        "print(json.dumps({'run': one and one.model_dump(mode='json'),"
        " 'rollout': now and now.model_dump(mode='json')}))",
    )


def test_every_step_runs_to_its_end_and_the_model_is_promoted(
    promoted: Run, namespace: Namespace, image: str, bucket: str
) -> None:
    assert [step.task for step in promoted.steps] == ALL, promoted.steps[-1].log
    assert promoted.state == "COMPLETE"
    said = outcome(namespace, image, bucket, promoted.id)
    assert said["run"]["state"] == "promoted"
    assert said["rollout"]["champion"] == said["run"]["version"]
    judged = next(step for step in promoted.steps if step.task == "judge")
    assert judged.output["parameterValues"] == {"Output": "promote"}
    told = judged.output["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert told["auc"] == pytest.approx(said["run"]["metrics"]["auc"])
    assert said["run"]["metrics"]["auc"] > 0.7


def test_the_same_data_again_is_rejected(
    promoted: Run, run: Callable[..., Run], namespace: Namespace, image: str, bucket: str
) -> None:
    again = run()
    assert again.state == "COMPLETE"
    assert [step.task for step in again.steps] == [t for t in ALL if t != "promote"]
    said = outcome(namespace, image, bucket, again.id)
    assert said["run"]["state"] == "rejected"
    assert said["rollout"]["revision"] == 1
    assert said["run"]["champion_before"] == said["rollout"]["champion"]


def test_bad_rows_stop_the_run_and_it_is_recorded(
    run: Callable[..., Run], namespace: Namespace, image: str, bucket: str
) -> None:
    columns = yaml.safe_load(CONTRACT)["data"]["columns"]
    columns[0]["max"] = 1  # no payment is that small
    stopped = run(data={"columns": columns})
    assert stopped.state == "FAILED"
    *prepared, recorded = stopped.steps
    assert {step.task for step in prepared} == {"prepare"}
    assert (recorded.task, recorded.state) == ("record", "COMPLETE")
    said = outcome(namespace, image, bucket, stopped.id)
    assert said["run"]["state"] == "stopped"
    assert "quarantine" in said["run"]["reason"] or "rows" in said["run"]["reason"]


def test_pods_name_the_key_of_the_store_and_do_not_hold_it(
    promoted: Run, namespace: Namespace
) -> None:
    pods = namespace.cluster.json(
        namespace.cluster.core.list_namespaced_pod(
            namespace.name, label_selector="driftmill/model=payments"
        )
    )
    assert len(pods) >= len(ALL)
    assert KEY[1] not in json.dumps(pods)
    assert {p["spec"]["containers"][0]["securityContext"]["runAsUser"] for p in pods} == {65532}


def test_a_pod_that_breaks_the_level_is_refused_and_the_reason_told(
    namespace: Namespace, image: str, tmp_path: Path
) -> None:
    from kubernetes import client

    from k8s.explain import refusal

    contract = Contract.model_validate(yaml.safe_load(CONTRACT))
    package = Package(compile_package(contract, tmp_path, store="s3://b/s", image=image))
    pod = package.pod("exec-prepare", "prepare-as-root", {})
    # Without this setting of ours, the back end's pod is not enough.
    del pod["spec"]["containers"][0]["securityContext"]["runAsNonRoot"]
    with pytest.raises(client.ApiException) as refused:
        namespace.apply(pod)
    assert refusal(json.loads(refused.value.body)["message"]) == (
        "prepare-as-root was refused: its namespace takes only pods of the restricted Pod "
        "Security level, and this one breaks it (runAsNonRoot != true); set a security context "
        "that passes, as compiled packages do"
    )


SERVICE = "payments"
#: Asks the service and the bundle for the same rows, and waits for the log to reach the store.
CLIENT = """
import json, time, urllib.error, urllib.request
from driftmill import bundle, rollout
from driftmill.store import Store
store = Store("s3://{bucket}/store")
now = rollout.read(store, "payments")
rows = [
    dict(amount=12.5, account_age_days=900, distance_km=3.0, channel="web"),
    dict(amount=900.0, account_age_days=2, distance_km=None, channel="app"),
]
body = json.dumps(dict(records=[dict(r, _id=str(i)) for i, r in enumerate(rows)])).encode()
headers = {{"content-type": "application/json"}}
request = urllib.request.Request("http://payments/predict", body, headers)
deadline = time.monotonic() + 60
while True:  # until the network has heard that this pod may call
    try:
        answer = json.load(urllib.request.urlopen(request, timeout=20))
        break
    except urllib.error.URLError:
        if time.monotonic() > deadline:
            raise
        time.sleep(1)
while not (logged := store.list("payments/log/predictions")) and time.monotonic() < deadline:
    time.sleep(0.5)
print(json.dumps(dict(answer=answer, champion=now.champion, logged=logged)))
"""


def deployment(image: str, store: str) -> dict[str, Any]:
    """The serving image with probes, a read-only root file system and no token."""
    labels = {"app": SERVICE, "app.kubernetes.io/part-of": "driftmill"}
    key = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    container = {
        "name": "service",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["--model", MODEL],
        "env": [
            {"name": "DRIFTMILL_STORE", "value": store},
            *(
                {"name": k, "valueFrom": {"secretKeyRef": {"name": "driftmill-store", "key": k}}}
                for k in key
            ),
        ],
        "envFrom": [{"configMapRef": {"name": "driftmill"}}],
        "ports": [{"name": "http", "containerPort": 3000}],
        "startupProbe": {
            "httpGet": {"path": "/livez", "port": "http"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
            "failureThreshold": 60,
        },
        "livenessProbe": {"httpGet": {"path": "/livez", "port": "http"}, "timeoutSeconds": 5},
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "http"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
        },
        "resources": {
            "requests": {"cpu": "100m", "memory": "256Mi"},
            "limits": {"memory": "512Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "kind": "Deployment",
        "metadata": {"name": SERVICE},
        "spec": {
            "selector": {"matchLabels": {"app": SERVICE}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "automountServiceAccountToken": False,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                    "volumes": [{"name": "tmp", "emptyDir": {}}],
                },
            },
        },
    }


@pytest.fixture(scope="module")
def serving(
    promoted: Run,
    new_namespace: Callable[[], Namespace],
    loaded: Callable[[str], str],
    object_store: str,
    bucket: str,
) -> Namespace:
    """The namespace in which the promoted model is served."""
    from driftmill.images import reference

    serving = new_namespace()
    prepare(serving, object_store, "network-driftmill.yaml")
    service = loaded(os.environ.get("DRIFTMILL_TEST_SERVICE_IMAGE") or reference("service-tabular"))
    serving.apply(
        deployment(service, f"s3://{bucket}/store"),
        {
            "kind": "Service",
            "metadata": {"name": SERVICE},
            "spec": {
                "selector": {"app": SERVICE},
                "ports": [{"port": 80, "targetPort": "http"}],
            },
        },
    )
    serving.until_ready(f"app={SERVICE}")
    return serving


def test_the_trained_model_is_served_and_answers(
    serving: Namespace, image: str, bucket: str
) -> None:
    said = ask(serving, image, CLIENT.format(bucket=bucket))
    assert said["answer"]["version"] == said["champion"]
    predictions = said["answer"]["predictions"]
    assert [p["prediction"] in ("no", "yes") for p in predictions] == [True, True]
    assert all(sum(p["probabilities"].values()) == pytest.approx(1) for p in predictions)
    assert said["logged"]


#: Whether the service and the store can be reached. A policy takes hold of a new pod, for and
#: against it, only when the network has heard of that pod, so some time is given.
REACH = """
import json, socket, time
def reach(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True
host, _, port = {store!r}.removeprefix("http://").partition(":")
until = time.monotonic() + 60
while time.monotonic() < until:
    found = [reach("payments", 80), reach(host, int(port))]
    if found == {wanted}:
        break
    time.sleep(1)
print(json.dumps(found))
"""


def test_a_pod_of_somebody_else_reaches_neither_the_service_nor_the_store(
    serving: Namespace, image: str, object_store: str
) -> None:
    for labels, wanted in ((OURS, [True, True]), ({"app": "stranger"}, [False, False])):
        code = REACH.format(store=object_store, wanted=wanted)
        assert ask(serving, image, code, labels) == wanted


def test_a_step_that_needs_more_memory_than_it_has_says_so(
    namespace: Namespace, image: str, bucket: str, tmp_path: Path
) -> None:
    values = yaml.safe_load(CONTRACT)
    values["train"]["resources"]["memory"] = "128Mi"
    contract = Contract.model_validate(values)
    store = f"s3://{bucket}/short"
    package = Package(compile_package(contract, tmp_path, store=store, image=image))
    run = Run(package, namespace, {}, root=f"s3://{bucket}/artifacts")
    assert run.follow() == "FAILED"
    assert {step.task for step in run.steps} == {"prepare", "record"}
    (name, *_) = [step.pod for step in run.steps]
    assert namespace.explain(name, "memory") == sentence("memory", namespace.surroundings(name))
    said = outcome(namespace, image, bucket, run.id, "short")
    assert said["run"]["state"] == "failed"
    assert said["run"]["reason"] == "prepare was killed before it could say why"
