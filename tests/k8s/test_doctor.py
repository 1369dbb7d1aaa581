from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftmill import images
from k8s import doctor, preflight
from k8s.preflight import Check, Supported
from tests.k8s.conftest import Api

KINDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def test_this_machine_has_what_the_project_needs() -> None:
    checks = by_name(doctor.this_machine())
    assert checks["python"].state == "ok"
    assert checks["kfp"].state == "ok"
    assert checks["kfp-kubernetes"].state == "ok"
    assert checks["kubernetes (Python)"].state == "ok"
    assert checks["kubectl"].found


def test_supported_packages_are_those_of_the_project() -> None:
    text = Path("pyproject.toml").read_text()
    for name, supported in doctor.PACKAGES.items():
        wanted = f"{name}>={preflight.dotted(supported.least)}"
        if supported.below:
            wanted += f",<{preflight.dotted(supported.below)}"
        assert f'"{wanted}"' in text


def test_a_package_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "kfp", Supported((9, 1), (9, 2)))
    check = doctor.package("kfp")
    assert check.state == "wrong"
    assert check.mend == "pip install 'kfp>=9.1,<9.2'"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", Supported((1,)))
    check = doctor.package("no-such-package")
    assert check.state == "warning"
    assert check.mend == "pip install 'driftmill[cluster]'"


def test_images_of_ours(program: Callable[[str, str], None]) -> None:
    program("docker", "exit 0")
    (check,) = doctor.our_images()
    assert check.state == "warning"
    assert check.mend == "driftmill images build"
    every = "; ".join(f"echo {images.reference(name)}" for name in images.IMAGES)
    program("docker", every)
    (check,) = doctor.our_images()
    assert check.state == "ok"
    program("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    (check,) = doctor.our_images()
    assert check.found == "Docker does not answer"


def kind(name: str, *versions: str, served: bool = True) -> dict[str, Any]:
    spec = {"versions": [{"name": v, "served": served} for v in versions]}
    return {"metadata": {"name": name}, "spec": spec}


def test_a_cluster_with_and_without(api: Api) -> None:
    api.answers |= {
        "/version": {"gitVersion": "v1.34.4"},
        KINDS: {
            "items": [
                kind("workflows.argoproj.io", "v1alpha1"),
                kind("trainjobs.trainer.kubeflow.org", "v2beta1"),
            ]
        },
        "/api/v1/namespaces/driftmill/secrets": 403,
    }
    checks = by_name(doctor.cluster("test", ask_pipelines=True))
    assert checks["kubernetes"].state == "ok"
    assert checks["workflows.argoproj.io"] == Check("workflows.argoproj.io", "ok", "v1alpha1")
    assert checks["scheduledworkflows.kubeflow.org"].state == "wrong"
    trainer = checks["trainjobs.trainer.kubeflow.org"]
    assert (trainer.state, trainer.found) == ("warning", "serves v2beta1, not v1alpha1")
    assert checks["releases"].state == "warning"
    assert "you may not read" in checks["releases"].mend
    assert checks["kubeflow pipelines"].state == "wrong"
    assert "does not run" in checks["kubeflow pipelines"].found


def test_a_cluster_of_another_age(api: Api) -> None:
    api.answers["/version"] = {"gitVersion": "v1.24.0-gke.1"}
    checks = by_name(doctor.cluster("test", ask_pipelines=False))
    assert checks["kubernetes"].state == "wrong"
    assert checks["kubernetes"].mend == "use a cluster of Kubernetes 1.30 or newer, below 1.37"


def test_releases_of_the_chart(api: Api) -> None:
    secret = {"metadata": {"labels": {"name": "payments", "version": "3", "status": "deployed"}}}
    api.answers |= {
        "/version": {"gitVersion": "v1.34.4"},
        "/api/v1/namespaces/driftmill/secrets": {"items": [secret]},
    }
    checks = [c for c in doctor.cluster("test", ask_pipelines=False) if c.name == "chart"]
    assert checks[0] == Check("chart", "ok", "release payments, revision 3")


def test_nodes_of_kind_need_the_images(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (tmp_path / "kubeconfig").read_text().replace("name: test", "name: kind-c")
    (tmp_path / "kubeconfig").write_text(text)
    names = [f"docker.io/{images.reference(n)}" for n in images.IMAGES if "vision" not in n]
    monkeypatch.delenv("DRIFTMILL_IMAGE_PREFIX", raising=False)
    api.answers |= {
        "/version": {"gitVersion": "v1.34.4"},
        "/api/v1/nodes": {"items": [{"status": {"images": [{"names": [n]} for n in names]}}]},
    }
    check = by_name(doctor.cluster("kind-c", ask_pipelines=False))["images on nodes"]
    assert check.found == "nodes lack python-vision, service-vision"
    assert check.mend == "driftmill images build --load-into c"


@pytest.mark.parametrize(
    ("status", "body", "state", "found"),
    [
        (200, b'{"tag_name": "2.17.0", "multi_user": false}', "ok", "2.17.0"),
        (200, b'{"tag_name": "2.4.1"}', "wrong", "2.4.1"),
        (200, b'{"tag_name": "unknown"}', "warning", "version 'unknown'"),
        (200, b"<html>", "wrong", "HTTP 200, and no version in the answer"),
        (200, b"[]", "wrong", "HTTP 200, and no version in the answer"),
        (404, b"{}", "wrong", "HTTP 404, and no version in the answer"),
        (403, b"{}", "wrong", "HTTP 403"),
    ],
)
def test_what_kubeflow_pipelines_says_of_itself(
    status: int, body: bytes, state: str, found: str
) -> None:
    check = doctor.health(status, body)
    assert (check.state, check.found) == (state, found)
    assert (check.state != "ok") == bool(check.mend)


def test_an_endpoint_is_asked(api: Api) -> None:
    api.answers[doctor.HEALTH] = {"tag_name": "2.17.0"}
    assert doctor.pipelines_at(f"{api.url}/").state == "ok"
    assert doctor.pipelines_at(api.url.removeprefix("http://")).state == "ok"
    nobody = doctor.pipelines_at("http://127.0.0.1:1")
    assert nobody.state == "wrong"
    assert "does not answer" in nobody.found
    assert "is no URL" in doctor.pipelines_at("ftp://x").found


def test_the_answer_as_json_and_as_exit_code(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DRIFTMILL_CONTEXT", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.main(["--context", "production", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    (cluster,) = (c for c in answer if c["name"] == "cluster")
    assert cluster["state"] == "wrong"
    assert "no usable context production" in cluster["mend"]
    # No context is named and ours is not there: no cluster is looked at, whatever is current.
    doctor.main(["--json"])
    (cluster,) = (c for c in json.loads(capsys.readouterr().out) if c["name"] == "cluster")
    assert (cluster["state"], cluster["found"]) == ("warning", "none looked at")
    assert api.asked == []
