"""What helm says after an installation."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.helm.chart import NAME, of, render

NOTES = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: notes}
data:
  text: {{ include "driftmill/templates/NOTES.txt" . | quote }}
"""


def notes(values: dict[str, Any] | None = None, base: str = "minimal", **where: Any) -> str:
    objects = render({**(values or {}), "extraObjects": [NOTES]}, base, **where)
    text = of(objects, "ConfigMap")["notes"]["data"]["text"]
    assert not re.search(r"\n\n\n|[ \t]\n", text), text
    return str(text)


def test_the_commands_name_what_there_is() -> None:
    text, objects = notes(), render()
    services = set(re.findall(r"-n shop port-forward svc/(\S+) ", text))
    assert services == set(of(objects, "Service"))
    assert f"rollout status deployment/{NAME}-payments\n" in text
    assert "helm test rel -n shop\n" in text


def test_the_prediction_has_the_models_columns() -> None:
    (body,) = re.findall(r"-d '(.*)'", notes())
    assert json.loads(body) == {"amount": 0, "channel": "web"}
    assert "--data-binary @image.png" in notes({}, "vision-gpu")


def test_the_token_is_that_of_the_right() -> None:
    text = notes()
    secret = f"kubectl -n shop get secret {NAME}-payments-access -o 'jsonpath={{.data.%s}}'"
    assert f"TOKEN=$({secret % 'predict'} | base64 -d)\n" in text
    assert """curl localhost:3000/predict -H "authorization: Bearer $TOKEN" -H""" in text
    nothing = {"models": {"payments": {"contract": "{model: payments, task: classification}"}}}
    text = notes(nothing)
    assert f"TOKEN=$({secret % 'admin'} | base64 -d)\n" in text
    assert """curl localhost:3000/model -H "authorization: Bearer $TOKEN" """ in text
    assert "TOKEN" not in notes({"service": {"access": {"enabled": False}}})


def test_a_screen_is_enough_for_a_model() -> None:
    assert notes().count("\n") < 24
    assert notes(apis=()).count("\n") < 24


def test_a_column_may_hold_quotes() -> None:
    column = {"name": "x", "type": "category", "categories": ["o'clock"]}
    contract = json.dumps(
        {"model": "payments", "task": "classification", "data": {"columns": [column]}}
    )
    assert r"""-d '{"x":"o'\''clock"}'""" in notes({"models": {"payments": {"contract": contract}}})


def test_what_is_missing_is_said() -> None:
    text = notes(apis=())
    assert (
        "does not know AlertmanagerConfig, PrometheusRule, ServiceMonitor, so none was made" in text
    )
    assert (
        "The monitor tells the controller of drift itself, not by Alertmanager: payments." in text
    )
    for missing in ("does not know", "tells the controller"):
        assert missing not in notes()


def test_where_the_first_model_comes_from() -> None:
    assert "the first is trained now" in notes()
    assert "which nothing here trains at once: payments" in notes(
        {"controller": {"enabled": False}}
    )
    assert "trained" not in notes({}, "image-store")


def test_what_stays_or_is_open_is_said() -> None:
    text = notes({"store": {"uri": "", "type": "pvc"}, "networkPolicy": {"enabled": False}})
    assert f"The claim {NAME}-store stays when the release is uninstalled" in text
    assert "networkPolicy.enabled is false: every pod of the cluster may call" in text


def test_a_canary_that_gets_nothing_is_said() -> None:
    text = notes({}, "canary-route")
    assert "payments: no pod of the canary is ready yet" in text
    assert "networkPolicy.clients must name" in text


def test_many_models_do_not_fill_the_screen() -> None:
    models = {f"m{i}": {"contract": f"{{model: m{i}, task: classification}}"} for i in range(20)}
    text = notes({"models": models})
    assert text.count("\n") < 50
    assert "The other models have the same" in text
