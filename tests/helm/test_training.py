"""The pods that train: what the controller makes Jobs of, and training by the clock."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from driftmill import contract as contracts
from driftmill.retrain.ledger import Run
from pipelines.job import fill
from tests.helm.chart import CI, NAME, Object, check, of, render
from tests.helm.pods import container, environment, mounts, templates

TRAINING = f"{NAME}-payments-training"
CONTRACT = yaml.safe_load(CI["minimal"].read_text())["models"]["payments"]["contract"]


def by_clock(kind: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    recurring = {"type": kind, "schedule": "5 4 * * *"}
    return {"controller": {"enabled": False}, "training": {"recurring": recurring, **(more or {})}}


def job(values: dict[str, Any] | None = None) -> Any:
    return yaml.safe_load(of(render(values), "ConfigMap")[TRAINING]["data"]["job.yaml"])


def test_the_template_of_jobs_is_a_job_but_for_its_name() -> None:
    found = job()
    found["metadata"]["name"] = "x"
    check(json.dumps(found))
    assert found["metadata"]["labels"]["app.kubernetes.io/component"] == "training"


def test_a_run_ends_where_it_has_said_how_and_not_with_its_node() -> None:
    spec = job({"training": {"retries": 4, "keepSeconds": 2000000}})["spec"]
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (4, 2000000)
    ignored, failed = spec["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert ignored["action"] == "Ignore"
    assert failed["onExitCodes"]["values"] == [1, 2, 3, 4, 137]
    assert failed["onExitCodes"]["containerName"] == container(spec["template"])["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_the_contract_comes_with_the_job() -> None:
    template = job()["spec"]["template"]
    (item,) = mounts(template)["/etc/driftmill"]["downwardAPI"]["items"]
    assert item == {
        "path": "contract.yaml",
        "fieldRef": {"fieldPath": "metadata.annotations['driftmill/contract']"},
    }
    assert "--contract=/etc/driftmill/contract.yaml" in container(template)["command"]
    assert "args" not in container(template)


@pytest.mark.parametrize(
    ("server", "inside", "expected"),
    [
        ("", "", "none"),
        ("https://mlflow", "", "https://mlflow"),
        ("https://mlflow", "https://theirs", "https://mlflow"),
        ("", "https://theirs", None),  # the contract's own is what is used where nothing is set
    ],
)
def test_where_runs_are_recorded(server: str, inside: str, expected: str | None) -> None:
    text = f"{CONTRACT}tracking: {{uri: '{inside}'}}\n" if inside else CONTRACT
    values = {"tracking": {"uri": server}, "models": {"payments": {"contract": text}}}
    variables = environment(job(values)["spec"]["template"])
    assert variables.get("MLFLOW_TRACKING_URI") == expected
    assert variables["MLFLOW_TRACKING_PASSWORD"]["secretKeyRef"]["name"] == "driftmill-tracking"


def test_only_what_trains_can_sign() -> None:
    objects = render({"signing": {"existingSecret": "keys"}})
    for name, template in templates(objects).items():
        if name.startswith("Pod"):
            continue
        variables = environment(template)
        trusted = {"secretKeyRef": {"name": "keys", "key": "trusted.pem"}}
        assert variables["DRIFTMILL_TRUSTED_KEYS"] == trusted, name
        signs = {"secretKeyRef": {"name": "keys", "key": "signing.pem"}}
        expected = signs if name.startswith("ConfigMap") else None
        assert variables.get("DRIFTMILL_SIGNING_KEY") == expected, name
    kept = {"signing": {"existingSecret": "keys", "privateKey": ""}}
    assert "DRIFTMILL_SIGNING_KEY" not in environment(job(kept)["spec"]["template"])


def cron(values: dict[str, Any]) -> Object:
    (found,) = of(render(values), "CronJob").values()
    return found


def test_by_the_clock_one_run_after_the_other() -> None:
    spec = cron(by_clock("cronjob"))["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("5 4 * * *", "Etc/UTC")
    assert spec["concurrencyPolicy"] == "Forbid"
    template = spec["jobTemplate"]["spec"]["template"]
    assert template["metadata"]["annotations"]["driftmill/contract"] == CONTRACT
    assert container(template)["args"] == ["--run-id=$(JOB_NAME)", "--resume", "--trigger=schedule"]
    assert "JOB_NAME" in environment(template)


#: What a contract may ask of Kubernetes, and what the values may say beside it.
ASKED = {
    "little": {},
    "much": {
        "cpu": "1500m",
        "memory": "16Gi",
        "gpu": 2,
        "gpu_products": ["NVIDIA-A100"],
        "node_selector": {"pool": "train"},
        "tolerations": [{"key": "team", "value": None}, {"key": "nvidia.com/gpu", "effect": None}],
        "spot": True,
        "timeout": 3600,
        "queue": "team",
        "shared_memory": "4Gi",
    },
}
ARCH = [{"matchExpressions": [{"key": "arch", "operator": "In", "values": ["amd64"]}]}]
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "some": {
        "nodeSelector": {"disk": "fast", "pool": "any"},
        "resources": {"requests": {"cpu": "9", "ephemeral-storage": "1Gi"}},
        "tolerations": [{"key": "batch", "operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": ARCH}
            }
        },
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("asked", ASKED)
def test_by_the_clock_a_pod_is_as_in_a_job_of_the_controller(asked: str, settings: str) -> None:
    asks = json.dumps({"resources": ASKED[asked]})
    contract = contracts.parse(f"{CONTRACT}train: {asks}\n")
    models = {"models": {"payments": {"contract": contract.to_json()}}}
    mine = SETTINGS[settings]
    now = datetime.now(UTC)
    run = Run(
        model="payments", run_id="1", key="k", created=now, state="running", trigger="schedule"
    )
    made = fill(job(models | {"training": mine}), run, contract, [])
    check(json.dumps(made))
    found = cron(models | by_clock("cronjob", mine))
    check(json.dumps(found))

    theirs = found["spec"]["jobTemplate"]
    queue = "kueue.x-k8s.io/queue-name"
    assert theirs["metadata"]["labels"].get(queue) == made["metadata"]["labels"].get(queue)
    assert theirs["spec"].keys() == made["spec"].keys()
    for key in theirs["spec"].keys() - {"template"}:
        assert theirs["spec"][key] == made["spec"][key], key
    one, other = theirs["spec"]["template"]["spec"], made["spec"]["template"]["spec"]
    assert one.keys() == other.keys()
    for key in one.keys() - {"containers"}:
        assert one[key] == other[key], key
    (mine_, theirs_) = container(made["spec"]["template"]), container(theirs["spec"]["template"])
    assert mine_.keys() == theirs_.keys()
    for key in mine_.keys() - {"args", "env"}:
        assert mine_[key] == theirs_[key], key
    names = {e["name"] for e in theirs_["env"]} - {e["name"] for e in mine_["env"]}
    assert names == {"JOB_NAME"}


def test_by_kubeflows_clock_hooks_make_and_remove_the_recurring_run() -> None:
    objects = render(by_clock("kubeflow"))
    jobs = of(objects, "Job")
    hooks = {name: j["metadata"]["annotations"]["helm.sh/hook"] for name, j in jobs.items()}
    assert hooks == {
        f"{NAME}-payments-schedule": "post-install,post-upgrade",
        f"{NAME}-payments-unschedule": "pre-delete",
    }
    for name, ending in (("schedule", ["--cron", "5 4 * * *"]), ("unschedule", ["--remove"])):
        found = jobs[f"{NAME}-payments-{name}"]
        command = container(found["spec"]["template"])["command"]
        assert command[:4] == [
            "python3",
            "-m",
            "pipelines.schedule",
            "/etc/driftmill/contract.yaml",
        ]
        assert command[-len(ending) :] == ending
        assert found["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == (
            "before-hook-creation,hook-succeeded"
        )
        assert "KF_PIPELINES_ENDPOINT" in environment(found["spec"]["template"])
    assert not of(objects, "CronJob")
