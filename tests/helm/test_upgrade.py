"""What an upgrade finds in the cluster: tokens that it keeps, Secrets whose change rolls pods."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, CI, NAME, NAMESPACE, RELEASE, Object, helm, of
from tests.k8s.conftest import Api, kubeconfig

TOKEN, ACCESS = f"{NAME}-payments-token", f"{NAME}-payments-access"
SERVICE, MONITOR, CONTROLLER = (
    f"{NAME}-payments{part}" for part in ("", "-monitor", "-controller")
)


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A Kubernetes API."""
    served = Api({})
    yield served
    served.close()


@pytest.fixture
def upgrade(api: Api, tmp_path: Path) -> Any:
    """Renders for a cluster that has some Secrets: their text by name, under keys of all sorts."""
    config = tmp_path / "kubeconfig"
    kubeconfig(config, api.url)

    def render(base: str = "minimal", **secrets: str) -> tuple[Object, ...]:
        kind = {"name": "secrets", "kind": "Secret", "namespaced": True, "verbs": ["get"]}
        api.answers = {
            "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [kind]},
        }
        for name, text in secrets.items():
            api.answers[f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}"] = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name},
                "data": dict.fromkeys(("token", "predict", "feedback"), encoded(text)),
            }
        done = helm(
            *("template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(CI[base])),
            *("--dry-run=server", f"--kubeconfig={config}", "--kube-context=test"),
        )
        assert done.returncode == 0, done.stderr
        return tuple(o for o in yaml.load_all(done.stdout, yaml.CSafeLoader) if o)

    return render


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def templates(objects: tuple[Object, ...]) -> dict[str, Any]:
    return {name: d["spec"]["template"] for name, d in of(objects, "Deployment").items()}


def changed(before: tuple[Object, ...], after: tuple[Object, ...]) -> set[str]:
    old, new = templates(before), templates(after)
    return {name for name in old if old[name] != new[name]}


def test_the_token_stays(upgrade: Any) -> None:
    objects = upgrade(**{TOKEN: "old"})
    data = of(objects, "Secret")[TOKEN]["data"]
    assert base64.b64decode(data["token"]) == b"old"


def test_tokens_of_the_service_stay_and_what_is_missing_is_made(upgrade: Any) -> None:
    data = of(upgrade(**{ACCESS: "old\nnew"}), "Secret")[ACCESS]["data"]
    assert data["predict"] == data["feedback"] == encoded("old\nnew")
    assert len(base64.b64decode(data["metrics"])) == len(base64.b64decode(data["admin"])) == 40


@pytest.mark.parametrize("secret", [TOKEN, ACCESS])
def test_a_new_token_needs_no_new_pods(upgrade: Any, secret: str) -> None:
    assert changed(upgrade(**{secret: "old"}), upgrade(**{secret: "new"})) == set()


def test_new_keys_of_the_store_make_new_pods(upgrade: Any) -> None:
    old, new = upgrade(**{"driftmill-store": "old"}), upgrade(**{"driftmill-store": "new"})
    assert changed(old, new) == {SERVICE, MONITOR, CONTROLLER}
    assert changed(old, upgrade(**{"driftmill-store": "old"})) == set()


def test_another_url_of_the_ledger_makes_a_new_controller(upgrade: Any) -> None:
    old = upgrade("existing-secrets", **{"our-ledger": "old"})
    assert changed(old, upgrade("existing-secrets", **{"our-ledger": "new"})) == {CONTROLLER}
