"""The chart on a real cluster: install, the loop from drift to a better model, upgrades and a drain
under load, two releases side by side, uninstall. The tests build on each other, in this order.

What needs the Prometheus operator or the Gateway API is skipped where the cluster has none.
"""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client as kubernetes

from driftmill.contract import load
from driftmill.data import sources
from driftmill.replay import records
from tests.cluster.chart import (
    IMAGES,
    PATIENCE,
    Client,
    Prometheus,
    Release,
    client_pod,
    compiled_values,
    eventually,
    image_of,
    kubectl,
)
from tests.cluster.conftest import KEY
from tests.cluster.objects import Cluster, Namespace, ready, seconds

MODEL, OTHER = "payments", "refunds"
#: Rows of history, and of traffic before the world changes.
HISTORY, CALM = 4000, 600
#: Rows a second, and in a request.
RATE, BATCH = 200, 10
#: Pods that serve the model.
REPLICAS = 2
#: Requests at least through an upgrade, and through a promotion.
MANY = 100_000
#: What the tests change of the values that `driftmill compile` writes. Pods of the service may go
#: to the node that stands for one with a GPU, so that there are two to choose from.
SETTINGS = {
    "service": {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "test": {"timeoutSeconds": 30},
}


def contract_of(model: str) -> dict[str, Any]:
    """The example's contract, for quick runs: one family without search, a short canary."""
    document: dict[str, Any] = yaml.safe_load(Path("examples/payments/contract.yaml").read_text())
    onset = HISTORY + CALM
    source = f"sim:payments?rows=60000&seed=7&onset={onset}&start=2026-01-01T00:00:00Z&step=60"
    document["model"] = model
    document["data"]["source"] = source
    document["train"] |= {
        "candidates": ["hist-gradient-boosting"],
        "search": {"method": "none"},
        "resources": {"cpu": "500m", "memory": "1Gi"},
    }
    document["serve"] |= {"replicas": REPLICAS, "canary": {"steps": [0.5], "hold": "2s"}}
    document["retrain"] |= {"min_fresh_rows": 500, "cooldown": "0s"}
    document["tracking"] = "none"
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contracts and values, by model."""
    folder = tmp_path_factory.mktemp("chart")
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def contract(folder: Path) -> str:
    """The contract, as text."""
    return yaml.safe_dump(contract_of(MODEL))


@pytest.fixture(scope="module")
def bucket() -> str:
    """Name of the bucket of all stores here."""
    return f"chart-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def values(folder: Path, object_store: str, bucket: str) -> Callable[[str, str], Path]:
    """Compiles the contract of a model to values, with its store in a folder of the bucket."""

    def compile_values(model: str, store: str) -> Path:
        place = folder / f"{store}-{model}"
        place.mkdir()
        text = yaml.safe_dump(contract_of(model))
        return compiled_values(text, place, f"s3://{bucket}/{store}", object_store)

    return compile_values


@pytest.fixture(scope="module")
def release_values(values: Callable[[str, str], Path], loaded: Callable[[str], str]) -> Path:
    """Values of the release; its images are in the cluster."""
    path = values(MODEL, "shop")
    for name in IMAGES:
        loaded(image_of(path, name))
    return path


@pytest.fixture(scope="module")
def client(
    new_namespace: Callable[[], Namespace], release_values: Path, object_store: str, bucket: str
) -> Client:
    """A client in a namespace that may call the services; it makes the bucket."""
    place = new_namespace()
    place.cluster.core.patch_namespace(
        place.name, {"metadata": {"labels": {"driftmill/may-call": "true"}}}
    )
    pods = {"client": "trainingTabular", "load": "serviceTabular"}
    environment = {"AWS_ENDPOINT_URL": object_store, "AWS_REGION": "us-east-1", **KEYS}
    for name, image in pods.items():
        place.apply(client_pod(name, image_of(release_values, image), environment))
    for name in pods:
        place.until_ready(f"app={name}")
    made = Client(place)
    made.call("bucket", name=bucket)
    return made


KEYS = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), KEY, strict=True))


def prepared(namespace: Namespace) -> Namespace:
    """A namespace with the key of the store."""
    namespace.apply({"kind": "Secret", "metadata": {"name": "driftmill-store"}, "stringData": KEYS})
    return namespace


@pytest.fixture(scope="module")
def record(folder: Path, contract: str) -> dict[str, Any]:
    """A row as clients send it."""
    path = folder / "contract.yaml"
    path.write_text(contract)
    document = load(path)
    (row,) = records(sources.stream(document).head(1), document)
    return row


@pytest.fixture(scope="module")
def release(
    new_namespace: Callable[[], Namespace],
    client: Client,
    release_values: Path,
    folder: Path,
    record: dict[str, Any],
) -> Release:
    """The release; its first model serves."""
    made = Release(prepared(new_namespace()), "shop", (release_values, folder / "settings.yaml"))
    began = time.time()
    made.apply("install", wait=False)
    first = client.call(
        "predicted", url=made.url(), token=made.tokens()["predict"], records=[record]
    )
    print(f"\nfrom helm install to the first prediction: {first['at'] - began:.1f} s")
    made.until_ready(REPLICAS, "service")
    made.until_ready(1, "monitor")
    made.until_ready(1, "controller")
    print(f"until all pods were ready: {time.time() - began:.1f} s")
    return made


@pytest.fixture(scope="module")
def neighbour(
    release: Release,
    new_namespace: Callable[[], Namespace],
    values: Callable[[str, str], Path],
    folder: Path,
) -> Release:
    """Another release, of the same model and a second one; it is not waited for."""
    files = (values(MODEL, "kiosk"), values(OTHER, "kiosk"), folder / "settings.yaml")
    made = Release(prepared(new_namespace()), "kiosk", files)
    made.apply("install", *(f"models.{m}.service.replicas=1" for m in (MODEL, OTHER)), wait=False)
    return made


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, release: Release) -> Prometheus:
    """The Prometheus of the cluster's operator; skips where there is none."""
    found = cluster.json(
        cluster.core.list_service_for_all_namespaces(label_selector="operated-prometheus=true")
    )
    if not found:
        pytest.skip("the cluster has no Prometheus operator; name one by DRIFTMILL_TEST_CONTEXT")
    return Prometheus(Namespace(cluster, found[0]["metadata"]["namespace"]))


def test_wrong_values_are_refused_by_name(
    new_namespace: Callable[[], Namespace], release_values: Path
) -> None:
    place = Release(new_namespace(), "typo", (release_values,))
    done = place.helm(
        *("install", "typo", "helm/driftmill", "-f", str(release_values)),
        *("--set", "service.replica=3", "--set", "monitor.webhook=maybe"),
    )
    assert done.returncode != 0
    assert "replica" in done.stderr
    assert "monitor.webhook" in done.stderr
    assert place.pods() == []


def test_all_pods_are_ready_in_a_restricted_namespace(release: Release) -> None:
    # The model serves some moments before the run has ended.
    release.until_jobs(lambda jobs: [j["status"].get("succeeded") for j in jobs] == [1])
    pods = release.pods()
    training = [p for p in pods if p["metadata"]["labels"].get("batch.kubernetes.io/job-name")]
    others = [p for p in pods if p not in training]
    assert len(others) == REPLICAS + 2
    assert [p["metadata"]["name"] for p in others if not ready(p)] == []
    assert [p["status"]["phase"] for p in training] == ["Succeeded"]
    level = release.namespace.cluster.core.read_namespace(release.namespace.name).metadata.labels
    assert level["pod-security.kubernetes.io/enforce"] == "restricted"
    run = release.until_run(1)
    assert (run["state"], run["trigger"]) == ("promoted", "first")


def test_the_pods_of_a_service_are_on_different_nodes(release: Release) -> None:
    nodes = [p["spec"]["nodeName"] for p in release.pods("service")]
    assert len(set(nodes)) == min(REPLICAS, len(release.namespace.cluster.workers())), nodes


def test_helm_test_passes(release: Release) -> None:
    done = release.helm("test", release.name, "--timeout=180s")
    assert done.returncode == 0, done.stdout + done.stderr + release.namespace.log(TEST)


#: The pod of `helm test`.
TEST = "shop-driftmill-payments-test"


def test_helm_test_fails_where_a_policy_does_not_hold(release: Release, client: Client) -> None:
    everything = {
        "kind": "NetworkPolicy",
        "metadata": {"name": "everything"},
        "spec": {"podSelector": {}, "ingress": [{}], "egress": [{}]},
    }
    release.namespace.apply(everything)
    # It is applied some moments after it has come.
    (controller,) = release.pods("controller")
    client.call("reachable", host=controller["status"]["podIP"], port=3002)
    try:
        done = release.helm("test", release.name, "--timeout=180s")
    finally:
        kubernetes.NetworkingV1Api(release.namespace.cluster.api).delete_namespaced_network_policy(
            "everything", release.namespace.name
        )
    assert done.returncode != 0
    assert "can be reached, and must not be" in release.namespace.log(TEST)


def test_prometheus_reads_all_parts_and_evaluates_the_rules(
    release: Release, prometheus: Prometheus
) -> None:
    query = f'up{{namespace="{release.namespace.name}"}}'

    def up() -> bool:
        found = prometheus.query(query)
        return len(found) == REPLICAS + 2 and set(found.values()) == {1.0}

    eventually("not every part is read", up, PATIENCE)

    def groups() -> list[dict[str, Any]]:
        found = prometheus.get("rules")["groups"]
        return [g for g in found if release.namespace.name in g["file"]]

    def evaluated() -> bool:
        rules = [r for g in groups() for r in g["rules"]]
        return bool(rules) and all(not r["lastEvaluation"].startswith("0001") for r in rules)

    eventually("the rules are not evaluated", evaluated, PATIENCE)
    names = {g["name"].removeprefix(f"driftmill-{MODEL}-") for g in groups()}
    assert names == {"slo", "service", "monitor", "controller"}
    wrong = [
        (r["name"], r["health"], r.get("lastError"))
        for g in groups()
        for r in g["rules"]
        if r["health"] != "ok"
    ]
    assert wrong == []
    assert prometheus.alerts(release.namespace.name) == []


def test_drift_becomes_a_better_model_without_one_failed_request(
    release: Release, neighbour: Release, prometheus: Prometheus, client: Client, contract: str
) -> None:
    pods = [f"http://{p['status']['podIP']}:3000" for p in release.pods("service")]
    with client.replay(
        url=release.url(), tokens=release.tokens(), contract=contract, rate=RATE, batch=BATCH
    ) as traffic:
        release.until_jobs(lambda jobs: len(jobs) == 2)
        fired = prometheus.alerts(release.namespace.name)
        release.until_jobs(lambda jobs: jobs[1]["status"].get("completionTime") is not None)
        run = release.until_run(2)
        assert run["state"] == "promoted", run["reason"]
        admin = release.tokens()["admin"]
        served = client.call("serving", addresses=pods, token=admin, version=run["version"])

    report = traffic.report
    assert report["failed"] == report["labels_failed"] == 0, report["errors"]
    assert report["versions"][run["version"]] > 0
    assert [j["metadata"]["labels"]["driftmill/run"] for j in release.jobs()][1:] == [run["run_id"]]
    started = [d for d in release.ledger("decisions") if d["action"] == "start"]
    assert [d["trigger"] for d in started] == ["drift", "first"]
    drift = [a for a in fired if a["labels"]["alertname"] == "ModelDrift"]
    assert [a["labels"]["model"] for a in drift] == [MODEL]

    onset = next(at for at, row in report["answers"] if row >= CALM)
    log = release.namespace.lines(release.pods("monitor")[0]["metadata"]["name"])
    judged = next(at for at, text in log if ": alarm, score" in text)
    marks = {
        "onset": onset,
        "window judged": judged,
        "alert fires": seconds(drift[0]["activeAt"]),
        "webhook answered": seconds(started[0]["at"]),
        "training pod starts": seconds(run["started"]),
        "run ended": seconds(run["ended"]),
        "all pods serve it": served,
    }
    print("\n" + "\n".join(f"{at - onset:7.1f} s  {what}" for what, at in marks.items()))
    print(f"{report['sent']} rows answered, {report['failed']} failed")
    # Nothing of this reached the neighbour, which serves a model of the same name.
    assert not prometheus.alerts(neighbour.namespace.name)


def test_a_run_outlives_its_pod_and_its_controller(release: Release) -> None:
    before = len(release.ledger("runs"))
    decision = release.trigger("a test of what a run survives")
    assert decision["action"] == "start", decision
    labels = f"driftmill/run={decision['run_id']}"
    namespace = release.namespace

    first = namespace.until_running(labels)
    (controller,) = release.pods("controller")
    namespace.cluster.core.delete_namespaced_pod(controller["metadata"]["name"], namespace.name)
    name = first["metadata"]["name"]
    namespace.cluster.core.create_namespaced_pod_eviction(
        name,
        namespace.name,
        {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}},
    )
    release.until_ready(1, "controller")
    run = release.until_run(before + 1)
    assert run["run_id"] == decision["run_id"]
    assert run["state"] in ("promoted", "rejected"), run["reason"]
    print(f"\n{run['state']} after an eviction: {run['reason']}")
    (job,) = [
        j for j in release.jobs() if j["metadata"]["labels"]["driftmill/run"] == run["run_id"]
    ]
    # A model that is not better ends its Job with exit code 3.
    ended = {c["type"] for c in job["status"]["conditions"] if c["status"] == "True"}
    assert ("Complete" if run["state"] == "promoted" else "Failed") in ended


def test_upgrade_and_rollback_without_one_failed_request(release: Release, client: Client) -> None:
    parts = ("service", "monitor", "controller")
    before = {p["metadata"]["name"] for part in parts for p in release.pods(part)}
    roll = [f"{part}.podAnnotations.test=upgrade" for part in parts]
    with client.load(release, requests=MANY) as traffic:
        release.apply("upgrade", *roll)
        now = release.pods("service")
        assert {p["metadata"]["annotations"].get("test") for p in now} == {"upgrade"}
        assert not before & {p["metadata"]["name"] for p in now}
        done = release.helm("rollback", release.name, "--wait", f"--timeout={PATIENCE}s")
        assert done.returncode == 0, done.stderr
        now = release.pods("service")
        assert {"test" in p["metadata"].get("annotations", {}) for p in now} == {False}
        release.until_gone(before)
    calm(traffic.report, "upgrade and rollback")


def calm(report: dict[str, Any], what: str) -> None:
    """Fails where a request failed, and tells how many there were."""
    print(f"\n{what}: {report['sent']} requests, {report['failed'] or 'none'} failed, {report}")
    assert report["failed"] == {}
    assert report["ok"] == report["sent"] > 0


def test_promotion_by_the_rollout_without_one_failed_request(
    release: Release, client: Client
) -> None:
    pods = [f"http://{p['status']['podIP']}:3000" for p in release.pods("service")]
    with client.load(release, requests=MANY) as traffic:
        back = release.python("controller", ROLLBACK)
        admin = release.tokens()["admin"]
        client.call("serving", addresses=pods, token=admin, version=back["champion"])
    calm(traffic.report, "promotion")
    assert set(traffic.report["versions"]) == {back["before"], back["champion"]}


#: Makes the champion before this one serve.
ROLLBACK = """
import json
from driftmill import home, rollout
store = home.find().store
before = rollout.read(store, "payments").champion
now = rollout.rollback(store, "payments", by="test", reason="a test")
print(json.dumps({"before": before, "champion": now.champion}))
"""


def test_a_node_is_drained_without_one_failed_request(release: Release, client: Client) -> None:
    # Not the node with the controller's volume, if that can be helped.
    controllers = {p["spec"]["nodeName"] for p in release.pods("controller")}
    nodes = sorted({p["spec"]["nodeName"] for p in release.pods("service")} - controllers)
    node = (nodes or sorted(controllers))[0]
    mine = ["--pod-selector", release.labels]
    drain = ["drain", node, *mine, "--delete-emptydir-data", "--timeout=180s"]
    with client.load(release) as traffic:
        done = subprocess.run(kubectl(release.namespace, *drain), capture_output=True, text=True)
        release.until_ready(REPLICAS, "service")
        subprocess.run(kubectl(release.namespace, "uncordon", node), check=True)
    assert done.returncode == 0, done.stderr
    assert "evicted" in done.stdout
    assert node not in {p["spec"]["nodeName"] for p in release.pods("service")}
    calm(traffic.report, "drain")
    release.until_ready(1, "controller")


def test_a_canary_gets_its_weight_once_it_is_ready(release: Release, cluster: Cluster) -> None:
    if not knows(cluster, "gateway.networking.k8s.io"):
        pytest.skip("the cluster does not know the Gateway API; name one by DRIFTMILL_TEST_CONTEXT")
    settings = (
        *("service.canary.enabled=true", "service.canary.weight=20"),
        *("route.mode=always", "route.parentRefs[0].name=gateway"),
    )

    def weights() -> dict[str, int]:
        route = kubernetes.CustomObjectsApi(cluster.api).get_namespaced_custom_object(
            "gateway.networking.k8s.io", "v1", release.namespace.name, "httproutes", NAME
        )
        return {b["name"]: b["weight"] for b in route["spec"]["rules"][0]["backendRefs"]}

    release.apply("upgrade", *settings)
    assert weights() == {NAME: 100, f"{NAME}-canary": 0}
    release.apply("upgrade", *settings)
    assert weights() == {NAME: 80, f"{NAME}-canary": 20}
    assert len(release.pods("service")) == REPLICAS + 1
    behind = release.addresses(NAME)
    canary = [p for p in release.pods("service") if p["metadata"]["labels"][TRACK] == "canary"]
    assert len(behind) == REPLICAS
    assert canary[0]["status"]["podIP"] not in behind
    release.apply("upgrade")
    assert len(release.pods("service")) == REPLICAS


#: The model's Deployment and Service, and what tells its tracks.
NAME, TRACK = "shop-driftmill-payments", "driftmill/track"


def knows(cluster: Cluster, group: str) -> bool:
    """Whether the cluster knows a group of the API."""
    groups = kubernetes.ApisApi(cluster.api).get_api_versions().groups
    return any(g.name == group for g in groups)


def test_two_releases_do_not_mix_and_uninstall_leaves_nothing(
    release: Release, neighbour: Release, client: Client, record: dict[str, Any]
) -> None:
    for model in (MODEL, OTHER):
        token = neighbour.tokens(model)["predict"]
        found = client.call("predicted", url=neighbour.url(model), token=token, records=[record])
        answer = found["answer"]
        assert answer["model"] == model
        # Of the other release's drift this controller has heard nothing.
        assert [run["trigger"] for run in neighbour.ledger("runs", model)] == ["first"]
    pages = [dashboards(r) for r in (release, neighbour)]
    assert len(pages[0]) == len(pages[1]) == 2
    assert not pages[0] & pages[1]

    with client.load(release) as traffic:
        done = neighbour.helm("uninstall", neighbour.name, "--wait", f"--timeout={PATIENCE}s")
        assert done.returncode == 0, done.stderr
        eventually(
            f"after uninstall there is still {labelled(neighbour)}",
            lambda: not labelled(neighbour),
            PATIENCE,
        )
    calm(traffic.report, "uninstall of the neighbour")


def dashboards(release: Release) -> set[str]:
    """The uids of a release's dashboards."""
    maps = release.namespace.cluster.core.list_namespaced_config_map(
        release.namespace.name, label_selector=f"{release.labels},grafana_dashboard"
    )
    return {json.loads(page)["uid"] for m in maps.items for page in m.data.values()}


def labelled(release: Release) -> list[str]:
    """Whatever bears the release's label, of all kinds that the cluster knows."""
    kinds = subprocess.run(
        kubectl(release.namespace, "api-resources", "--verbs=list", "-o=name"),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    found = subprocess.run(
        kubectl(
            release.namespace,
            *("get", ",".join(kinds), "-A", "-l", release.labels, "-o=name"),
        ),
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.split()
