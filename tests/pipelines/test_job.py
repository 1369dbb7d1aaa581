"""Runs as Kubernetes Jobs, on a stand-in of the API server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from driftmill import contract as contracts
from driftmill import home as homes
from driftmill import runs
from driftmill.contract import Contract
from driftmill.retrain.controller import Controller
from driftmill.retrain.ledger import Ledger, Run
from driftmill.retrain.runner import Mark, RunnerAway, RunnerError
from driftmill.store import Store
from pipelines import job
from tests.conftest import CONTRACT
from tests.pipelines import apiserver
from tests.pipelines.apiserver import JOBS, NAMESPACE, ApiServer

TEMPLATE = Path(__file__).parent / "job.yaml"
RUN_ID = "20261125-070000-ab12"
NAME = f"driftmill-tiny-{RUN_ID}"
NOW = datetime(2026, 11, 25, 8, tzinfo=UTC)
GPU = """
train:
  resources:
    {cpu: 1500m, memory: 8Gi, gpu: 2, gpu_products: [NVIDIA-L4], shared_memory: 2Gi, spot: true,
     node_selector: {zone: b}, tolerations: [{key: team, value: ml}], timeout: 3600, queue: gpus}
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.delenv(job.OWNER, raising=False)
    with apiserver.serve() as state:
        yield state


@pytest.fixture
def make(server: ApiServer, tmp_path: Path) -> Callable[..., job.JobRunner]:
    """A runner with an account of its own, as after a restart."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "namespace").write_text(NAMESPACE)
    (account / "token").write_text(server.token + "\n")

    def runner(now: datetime = NOW, template: Path = TEMPLATE) -> job.JobRunner:
        return job.JobRunner(job.Api(server.url, account), template, clock=lambda: now)

    return runner


def run(**more: Any) -> Run:
    values = {"run_id": RUN_ID, "model": "tiny", "key": "k", "trigger": "drift", "created": NOW}
    return Run(**{**values, **more})


def pod(age: timedelta, phase: str = "Pending", **status: Any) -> dict[str, Any]:
    made = (NOW - age).isoformat().replace("+00:00", "Z")
    return {
        "metadata": {"name": f"{NAME}-x1", "labels": {job.RUN: RUN_ID}, "creationTimestamp": made},
        "spec": {"containers": [{"name": "run", "image": "driftmill/python-tabular:1"}]},
        "status": {"phase": phase, **status},
    }


def begin(server: ApiServer, age: timedelta = timedelta(hours=2), **status: Any) -> None:
    """Let the Job controller take the Job up."""
    since = (NOW - age).isoformat().replace("+00:00", "Z")
    server.jobs[NAME]["status"] = {"startTime": since, **status}


def fail(server: ApiServer, reason: str, message: str) -> None:
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": message}
    server.jobs[NAME]["status"]["conditions"] = [condition]


def test_a_job_is_made_from_template_run_and_contract(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    assert not make().begun(run())
    assert make().start(run(note="$(AWS_SECRET_ACCESS_KEY) $x drifted"), tiny) == Mark()
    made = server.jobs[NAME]
    assert make().begun(run())
    assert "namespace" not in made["metadata"]
    labels = {
        "app.kubernetes.io/name": "driftmill",
        "app.kubernetes.io/instance": "rel",
        "app.kubernetes.io/part-of": "driftmill",
        "app.kubernetes.io/component": "training",
        "driftmill/model": "tiny",
        "driftmill/run": RUN_ID,
    }
    assert made["metadata"]["labels"] == made["spec"]["template"]["metadata"]["labels"] == labels
    assert made["spec"]["activeDeadlineSeconds"] == tiny.train.resources.timeout
    written = made["spec"]["template"]["metadata"]["annotations"][job.CONTRACT]
    assert contracts.parse(written) == tiny
    proxy, trainer = made["spec"]["template"]["spec"]["containers"]
    assert "args" not in proxy
    # Kubernetes turns $$ into $, and would turn $(NAME) into the variable's value.
    assert trainer["args"] == [
        f"--run-id={RUN_ID}",
        "--trigger=drift: $$(AWS_SECRET_ACCESS_KEY) $$x drifted",
        "--resume",
    ]
    assert trainer["resources"] == {
        "requests": {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "2Gi"},
        "limits": {"memory": "2Gi"},
    }
    assert {e["name"]: e["value"] for e in trainer["env"]} == {
        "DRIFTMILL_STORE": "s3://models/driftmill",
        "DRIFTMILL_CORES": "1",
        "OMP_NUM_THREADS": "1",
    }
    spec = made["spec"]["template"]["spec"]
    assert spec["tolerations"] == [{"key": "batch", "operator": "Exists"}]
    assert spec["nodeSelector"] == {"disk": "ssd", "zone": "a"}


def test_the_contract_places_the_pod(server: ApiServer, make: Callable[..., job.JobRunner]) -> None:
    make().start(run(), contracts.parse(CONTRACT + GPU))
    made = server.jobs[NAME]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["activeDeadlineSeconds"] == 3600
    spec = made["spec"]["template"]["spec"]
    trainer = spec["containers"][1]
    assert trainer["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "2"}
    assert trainer["volumeMounts"][-1] == {"name": "shared-memory", "mountPath": "/dev/shm"}
    assert spec["volumes"][-1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert spec["nodeSelector"] == {"disk": "ssd", "zone": "b"}
    tolerated = [t["key"] for t in spec["tolerations"]]
    assert tolerated[:3] == ["batch", "team", "nvidia.com/gpu"]
    assert "cloud.google.com/gke-spot" in tolerated
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for term, arch in zip(required["nodeSelectorTerms"], ("amd64", "arm64"), strict=True):
        first, second = term["matchExpressions"]
        assert first["values"] == [arch]
        assert (second["key"], second["values"]) == ("nvidia.com/gpu.product", ["NVIDIA-L4"])


def test_a_run_is_one_job_whoever_starts_it(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    assert make().host == make().host  # any replica may look after it
    for _ in range(2):
        make().start(run(), tiny)
    assert list(server.jobs) == [NAME]
    assert make().running(run())


def test_a_name_fits_a_label() -> None:
    name = job.name(run(model="m" * 40))
    assert len(name) == 63
    assert name.endswith(RUN_ID)


def test_a_job_goes_with_its_owner(
    server: ApiServer,
    make: Callable[..., job.JobRunner],
    tiny: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(job.OWNER, "rel-tiny-controller")
    with pytest.raises(RunnerAway, match="no Deployment rel-tiny-controller"):
        make().start(run(), tiny)
    server.deployments["rel-tiny-controller"] = {"metadata": {"uid": "u1"}}
    make().start(run(), tiny)
    assert server.jobs[NAME]["metadata"]["ownerReferences"] == [
        {"apiVersion": "apps/v1", "kind": "Deployment", "name": "rel-tiny-controller", "uid": "u1"}
    ]


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "etcdserver: request timed out"), (401, "Unauthorized"), (429, "too many"), (403, "no")],
)
def test_an_api_server_that_is_away_is_asked_again_later(
    server: ApiServer,
    make: Callable[..., job.JobRunner],
    tiny: Contract,
    status: int,
    message: str,
) -> None:
    server.fault = (status, message)
    runner = make()
    for ask in (lambda: runner.start(run(), tiny), lambda: runner.running(run())):
        with pytest.raises(RunnerAway, match=rf"{status}.*{message}"):
            ask()
    server.fault = None
    runner.start(run(), tiny)
    assert runner.running(run())


def test_no_api_server_is_asked_again_later(tmp_path: Path) -> None:
    (tmp_path / "namespace").write_text("shop")
    (tmp_path / "token").write_text("t")
    runner = job.JobRunner(job.Api("http://127.0.0.1:9", tmp_path), TEMPLATE)
    with pytest.raises(RunnerAway, match="cannot be asked"):
        runner.running(run())


def test_a_job_that_is_refused_is_not_tried_again(
    make: Callable[..., job.JobRunner], tiny: Contract, tmp_path: Path
) -> None:
    wrong = tmp_path / "job.yaml"
    wrong.write_text(TEMPLATE.read_text().replace("backoffLimit", "backofLimit"))
    with pytest.raises(RunnerError, match=r"was refused: .*backofLimit"):
        make(template=wrong).start(run(), tiny)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: .*No such file"),
        ("a: [", "cannot be read"),
        ("kind: Pod", "holds no Job"),
        ("kind: Job\nspec: {template: {spec: {containers: [{name: a}]}}}", "no container called"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_explained(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunnerError, match=message):
        job.read(path)


def test_a_pod_that_waits_too_long_ends_the_run(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    make().start(run(), tiny)
    begin(server)
    why = "0/3 nodes are available: 3 Insufficient cpu."
    condition = {"type": "PodScheduled", "status": "False", "message": why}
    server.pods = [pod(timedelta(minutes=29), conditions=[condition])]
    assert make().running(run())
    late = make(NOW + timedelta(minutes=2))
    assert not late.running(run())
    assert late.failure(run()).startswith(f"the Job {NAME} did not begin in 31m: {NAME}-x1 waits:")
    assert "Insufficient cpu" in late.failure(run())
    late.sweep(run())
    assert server.deleted == [(f"{JOBS}/{NAME}", {"propagationPolicy": "Background"})]
    assert "was deleted before it left an outcome" in late.failure(run())


def test_pods_that_are_refused_end_the_run(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    make().start(run(), tiny)
    assert make().running(run())  # it waits in a queue: it has not begun
    begin(server, timedelta(minutes=31))
    assert not make().running(run())
    assert f"did not begin in 31m: `kubectl -n shop describe job {NAME}`" in make().failure(run())


def test_time_at_work_is_no_waiting(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    make().start(run(), tiny)
    begin(server, ready=1)
    assert make().running(run())
    # Between two attempts: the first pod was taken away with its node.
    begin(server)
    server.pods = [pod(timedelta(hours=2), "Failed")]
    assert make().running(run())


def test_how_a_job_ended_is_said(
    server: ApiServer, make: Callable[..., job.JobRunner], tiny: Contract
) -> None:
    make().start(run(), tiny)
    begin(server)
    fail(server, "DeadlineExceeded", "Job was active longer than specified deadline")
    assert not make().running(run())
    assert "it ran longer than 86400 s; raise train.resources.timeout" in make().failure(run())
    fail(server, "PodFailurePolicy", "Container run failed with exit code 137")
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    server.pods = [
        pod(timedelta(hours=1), "Failed", containerStatuses=[
            {"name": "run", "state": {"terminated": ended}},
        ]),
    ]  # fmt: skip
    server.pods[0]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "2Gi"}}
    assert "it used more than its 2Gi of memory" in make().failure(run())
    make().sweep(run())
    assert server.deleted == []  # it has ended, and people may want to look


def test_the_controller_runs_jobs_and_survives_their_loss(
    server: ApiServer, make: Callable[..., job.JobRunner], tmp_path: Path
) -> None:
    """Decided, created, followed by another replica, closed by its outcome."""
    home = homes.find(tmp_path / "home")
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT + "retrain: {cooldown: 0, min_fresh_rows: 0}\n")
    store, ledger = Store(home.store_uri), Ledger(home.ledger_url)

    def controller() -> Controller:
        return Controller(path, store, ledger, make())

    first = controller()
    run_id = first.trigger("please").run_id
    assert run_id is not None
    server.fault = (500, "away")
    with pytest.raises(RunnerAway):
        first.tick()
    server.fault = None
    controller().tick()
    (made,) = server.jobs.values()
    (now,) = ledger.runs("tiny")
    assert (now.state, now.pid, now.host) == ("running", None, "the namespace shop")
    runs.begin(store, "tiny", run_id, "manual")
    controller().tick()
    assert ledger.active("tiny") is not None
    made["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    outcome = runs.conclude(store, "tiny", run_id, trigger="manual", code_version="1", failure="x")
    controller().tick()
    (now,) = ledger.runs("tiny")
    assert (now.state, now.reason) == ("failed", outcome.reason)

    second = controller().trigger("again").run_id
    controller().tick()
    server.jobs.clear()
    controller().tick()
    ended = ledger.runs("tiny", 1)[0]
    assert (ended.run_id, ended.state) == (second, "failed")
    assert "was deleted before it left an outcome" in ended.reason
    ledger.close()


def test_outside_of_a_cluster_the_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(RunnerError, match="this is no pod; choose --runner local"):
        job.Api.of_this_pod()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(RunnerError, match="set automountServiceAccountToken: true"):
        job.Api.of_this_pod()
