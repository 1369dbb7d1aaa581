"""What holds for every pod of the chart: its user, its rights, its labels, what it mounts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests import checkov
from tests.helm.chart import CI, Object, of, render
from tests.helm.pods import container, environment, mounts, templates

#: Every kind of pod that there is is in one of these.
SETS = [
    *((name, {}) for name in CI),
    ("minimal", {"controller": {"enabled": False}, "training": {"recurring": {"type": "cronjob"}}}),
    (
        "minimal",
        {"controller": {"enabled": False}, "training": {"recurring": {"type": "kubeflow"}}},
    ),
]
EVERY = pytest.mark.parametrize(
    ("base", "values"), SETS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(SETS)]
)


@EVERY
def test_pods_pass_the_level_restricted(base: str, values: dict[str, object]) -> None:
    for name, template in templates(render(values, base)).items():
        spec = template["spec"]
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 65532), name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), name
        for each in [*spec.get("initContainers", []), *spec["containers"]]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


@EVERY
def test_only_a_controller_that_makes_jobs_has_a_token(
    base: str, values: dict[str, object]
) -> None:
    objects = render(values, base)
    roles = of(objects, "Role")
    for name, template in templates(objects).items():
        token = template["spec"]["automountServiceAccountToken"]
        assert token == (name.startswith("Deployment") and name.split()[1] in roles), name
    for account in of(objects, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False


@EVERY
def test_pods_write_where_they_may(base: str, values: dict[str, object]) -> None:
    for name, template in templates(render(values, base)).items():
        volumes = mounts(template)
        assert volumes["/tmp"]["emptyDir"] == {}, name
        assert len(volumes) == len(template["spec"]["volumes"]) - (
            "initContainers" in template["spec"]
        )


@EVERY
def test_pods_say_what_they_need(base: str, values: dict[str, object]) -> None:
    for name, template in templates(render(values, base)).items():
        if name.startswith("ConfigMap"):
            continue  # the controller writes the contract's into each Job
        resources = container(template)["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert set(resources["limits"]) & {"cpu", "memory"} == {"memory"}, name


@EVERY
def test_everything_that_goes_on_has_probes(base: str, values: dict[str, object]) -> None:
    for name, deployment in of(render(values, base), "Deployment").items():
        each = container(deployment["spec"]["template"])
        assert each["startupProbe"]["httpGet"] == {"path": "/livez", "port": "http"}, name
        assert each["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}, name
        assert each["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}, name
        assert [p["name"] for p in each["ports"]] == ["http"], name


@EVERY
def test_selectors_find_their_pods_and_no_others(base: str, values: dict[str, object]) -> None:
    objects = render(values, base)
    pods = {name: t["metadata"]["labels"] for name, t in templates(objects).items()}
    deployments, services = of(objects, "Deployment"), of(objects, "Service")
    assert deployments.keys() == services.keys()
    budgets = of(objects, "PodDisruptionBudget")
    for name, deployment in deployments.items():
        selectors = [
            deployment["spec"]["selector"]["matchLabels"],
            services[name]["spec"]["selector"],
        ]
        if name in budgets:
            selectors.append(budgets[name]["spec"]["selector"]["matchLabels"])
        for selector in selectors:
            found = [n for n, labels in pods.items() if selector.items() <= labels.items()]
            assert found == [f"Deployment {name}"]


@EVERY
def test_objects_say_whose_they_are(base: str, values: dict[str, object]) -> None:
    for thing in render(values, base):
        if thing["metadata"]["name"] in ("as-it-is", "rel-with-templates"):
            continue  # somebody else's
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "driftmill"
        assert labels["app.kubernetes.io/instance"] == "rel"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"


def test_a_new_chart_alone_rolls_no_pods() -> None:
    for name, template in templates(render({}, "two-models")).items():
        if not name.startswith("Pod"):
            assert "helm.sh/chart" not in json.dumps(template), name
            assert "app.kubernetes.io/version" not in json.dumps(template), name


def test_settings_of_pods_reach_all_of_them() -> None:
    pods = {
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "ml", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d", "app.kubernetes.io/name": "mine"},
        "extraEnv": [{"name": "X", "value": "1"}],
        "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
        "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
    }
    parts = ("service", "monitor", "controller", "training")
    found = templates(render(dict.fromkeys(parts, pods)))
    assert len(found) == 5
    for name, template in found.items():
        if name.startswith("Pod"):
            continue
        spec = template["spec"]
        for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
            assert spec[key] == pods[key], name
        assert template["metadata"]["annotations"]["a"] == "b", name
        labels = template["metadata"]["labels"]
        assert (labels["c"], labels["app.kubernetes.io/name"]) == ("d", "driftmill"), name
        assert environment(template)["X"] == "1", name
        assert container(template)["envFrom"] == pods["extraEnvFrom"], name
        assert mounts(template)["/etc/ca"] == pods["extraVolumes"][0], name  # type: ignore[index]


def test_images_go_by_digest_where_there_is_one() -> None:
    images = {
        each["image"]
        for template in templates(render({}, "existing-secrets")).values()
        for each in template["spec"]["containers"]
    }
    assert len(images) == 4
    assert all("@sha256:" in image for image in images)


def test_images_have_the_charts_version_unless_a_tag_is_given() -> None:
    values = {
        "images": {
            "monitor": {"repository": "r.corp/monitor", "tag": "7"},
            "pullPolicy": "Always",
            "pullSecrets": ["registry"],
        }
    }
    found = templates(render(values))
    version = yaml.safe_load(Path("helm/driftmill/Chart.yaml").read_text())["appVersion"]
    service, monitor = (
        found["Deployment rel-driftmill-payments"],
        found["Deployment rel-driftmill-payments-monitor"],
    )
    assert container(service)["image"] == f"driftmill/service-tabular:{version}"
    assert container(monitor)["image"] == "r.corp/monitor:7"
    for template in found.values():
        assert container(template)["imagePullPolicy"] == "Always"
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_a_model_of_images_has_its_images() -> None:
    images = {
        container(t)["image"].split(":")[0] for t in templates(render({}, "vision-gpu")).values()
    }
    assert {"driftmill/service-vision", "driftmill/python-vision"} <= {
        image.rpartition("driftmill/")[1] + image.rpartition("driftmill/")[2] for image in images
    }


@pytest.mark.slow
def test_checkov_finds_nothing(tmp_path: Path) -> None:
    for i, (base, values) in enumerate(SETS):
        objects: list[Object] = list(render(values, base))
        (tmp_path / f"{base}-{i}.yaml").write_text(yaml.safe_dump_all(objects))
    assert checkov.check(Path("helm/checkov.yaml"), tmp_path)["passed"] > 4000
