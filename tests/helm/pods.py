"""The pods of what has been rendered, whatever makes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from tests.helm.chart import Object


def templates(objects: Iterable[Object]) -> dict[str, Object]:
    """Templates of pods by kind and name of what makes them, such as `Deployment rel-driftmill-x`;
    also of the Jobs that a controller makes."""
    found = {}
    for thing in objects:
        kind = thing["kind"]
        match kind:
            case "Deployment" | "Job":
                template = thing["spec"]["template"]
            case "CronJob":
                template = thing["spec"]["jobTemplate"]["spec"]["template"]
            case "Pod":
                template = thing
            case "ConfigMap" if "job.yaml" in thing["data"]:
                template = yaml.safe_load(thing["data"]["job.yaml"])["spec"]["template"]
            case _:
                continue
        found[f"{kind} {thing['metadata']['name']}"] = template
    return found


def container(template: Object) -> dict[str, Any]:
    """The one container of a pod."""
    (found,) = template["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def environment(template: Object) -> dict[str, Any]:
    """Its variables: values as they are, others as what they come from."""
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(template)["env"]}


def mounts(template: Object) -> dict[str, Any]:
    """What is mounted where: volumes by path."""
    volumes = {v["name"]: v for v in template["spec"]["volumes"]}
    return {m["mountPath"]: volumes[m["name"]] for m in container(template)["volumeMounts"]}
