"""Where bundles, rollout and log lie."""

from __future__ import annotations

from typing import Any

from tests.helm.chart import NAME, of, render
from tests.helm.pods import container, environment, mounts, templates


def test_a_volume_is_mounted_by_all_that_use_the_store() -> None:
    objects = render({"store": {"uri": "", "type": "pvc"}})
    claims = of(objects, "PersistentVolumeClaim")
    assert claims[f"{NAME}-store"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claims[f"{NAME}-store"]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for name, template in templates(objects).items():
        if name.startswith("Pod"):
            continue
        assert environment(template)["DRIFTMILL_STORE"] == "/store", name
        claim = mounts(template)["/store"]["persistentVolumeClaim"]
        assert claim == {"claimName": f"{NAME}-store"}, name


def test_the_volume_may_be_there_already_or_be_of_a_class() -> None:
    store: dict[str, Any] = {"uri": "", "type": "pvc"}
    mine = render({"store": {**store, "pvc": {"existingClaim": "mine"}}})
    assert f"{NAME}-store" not in of(mine, "PersistentVolumeClaim")
    volume = mounts(templates(mine)[f"Deployment {NAME}-payments"])["/store"]
    assert volume["persistentVolumeClaim"] == {"claimName": "mine"}
    for value, written in (("fast", "fast"), ("-", "")):
        found = render({"store": {**store, "pvc": {"storageClass": value, "keep": False}}})
        claim = of(found, "PersistentVolumeClaim")[f"{NAME}-store"]
        assert claim["spec"]["storageClassName"] == written
        assert "annotations" not in claim["metadata"]


def test_an_image_is_copied_to_where_the_log_can_be_written() -> None:
    template = templates(render({}, "image-store"))[f"Deployment {NAME}-payments"]
    volumes = {v["name"]: v for v in template["spec"]["volumes"]}
    assert volumes["store-image"]["image"] == {
        "reference": "registry.example.com/models/payments:7",
        "pullPolicy": "Always",
    }
    (copies,) = template["spec"]["initContainers"]
    assert copies["image"] == container(template)["image"]
    assert {"name": "store-image", "mountPath": "/store-image", "readOnly": True} in copies[
        "volumeMounts"
    ]
    compile(copies["command"][-1], "command", "exec")
    assert mounts(template)["/store"]["emptyDir"] == {}
    assert environment(template)["DRIFTMILL_STORE"] == "/store/copy"


def test_in_s3_there_is_no_volume_of_it() -> None:
    for name, template in templates(render()).items():
        assert "/store" not in mounts(template), name
