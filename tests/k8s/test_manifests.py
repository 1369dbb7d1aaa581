from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from k8s import manifests
from k8s.manifests import ManifestError, Object
from tests.k8s.conftest import rendered


def deployment(name: str = "server", **container: object) -> Object:
    spec = {"containers": [{"name": "main", **container}]}
    return {
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"template": {"spec": spec}},
    }


def test_a_folder_renders_to_its_objects() -> None:
    kinds = [o["kind"] for o in rendered("base")]
    assert kinds.count("Namespace") == 2
    assert "ServiceAccount" in kinds


@pytest.mark.parametrize(
    ("image", "full"),
    [
        ("mysql:8.4", "docker.io/library/mysql:8.4"),
        ("me/app:1", "docker.io/me/app:1"),
        ("docker.io/alpine:3.23", "docker.io/library/alpine:3.23"),
        ("docker.io/me/app:1", "docker.io/me/app:1"),
        ("ghcr.io/a/b:1", "ghcr.io/a/b:1"),
        ("localhost/a:1", "localhost/a:1"),
        ("registry:5000/a:1", "registry:5000/a:1"),
        ("a@sha256:0123", "docker.io/library/a@sha256:0123"),
    ],
)
def test_full_name_has_the_registry(image: str, full: str) -> None:
    assert manifests.full_name(image) == full
    assert manifests.mirror(image, "corp.example/mirror/") == f"corp.example/mirror/{full}"


def test_images_are_found_wherever_they_stand() -> None:
    objects = [
        deployment(
            image="a:1",
            args=["--configmap", "c", "--executor-image", "argoexec:4"],
            env=[{"name": "V2_DRIVER_IMAGE", "value": "driver:2"}, {"name": "X", "value": "y"}],
        ),
        {"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"image": "not one"}},
    ]
    assert manifests.images(objects) == ["a:1", "argoexec:4", "driver:2"]
    changed = manifests.mirrored(objects, "m")
    assert manifests.images(changed) == [
        "m/docker.io/library/a:1",
        "m/docker.io/library/argoexec:4",
        "m/docker.io/library/driver:2",
    ]
    assert changed[1] == objects[1]
    assert manifests.images(objects) == ["a:1", "argoexec:4", "driver:2"]  # as they were


def test_every_image_of_the_pipelines_comes_from_the_mirror() -> None:
    objects = manifests.mirrored(rendered("overlays/kind"), "corp.example/m")
    assert all(i.startswith("corp.example/m/") for i in manifests.images(objects))
    servers = manifests.dump(o for o in objects if o["kind"] == "Deployment")
    for registry in ("ghcr.io/", "quay.io/", "gcr.io/"):
        assert servers.count(registry) == servers.count(f"corp.example/m/{registry}")


def test_deployments_are_left_out_by_name() -> None:
    objects = [deployment("a"), deployment("b"), {"kind": "Service", "metadata": {"name": "a"}}]
    left = manifests.without(objects, ["a"])
    assert [(o["kind"], o["metadata"]["name"]) for o in left] == [
        ("Deployment", "b"),
        ("Service", "a"),
    ]
    with pytest.raises(ManifestError, match=r"names c, which is neither .* Deployments a, b"):
        manifests.without(objects, ["c"])


def test_a_folder_without_a_kustomization_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"{tmp_path} does not render: .*kustomization"):
        manifests.render(tmp_path)


def test_a_remote_that_cannot_be_reached_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text('[url "/nowhere/"]\n\tinsteadOf = https://github.com/\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    (tmp_path / "kustomization.yaml").write_text(
        "resources:\n- https://github.com/kubeflow/pipelines/manifests?ref=2.17.0&timeout=10s\n"
    )
    with pytest.raises(ManifestError) as caught:
        manifests.render(tmp_path)
    assert "manifests at https://github.com/kubeflow/pipelines cannot be fetched" in str(
        caught.value
    )
    assert "docs/cluster.md" in str(caught.value)


def test_slow_networks_are_told_of_the_time(
    tmp_path: Path, program: Callable[[str, str], None]
) -> None:
    program("kubectl", "exec sleep 30")
    with pytest.raises(ManifestError, match=r"did not render within 1 s: .*--timeout"):
        manifests.render(tmp_path, timeout=1)


def test_kubectl_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ManifestError, match="kubectl is not installed: see https"):
        manifests.render(tmp_path)
