"""Components stay thin: what they do is in the library, what they need is in the image."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest

from components.common.promote import promote
from components.common.record import record
from components.training.assemble import assemble
from components.training.fit import fit
from components.training.judge import judge
from components.training.prepare import prepare
from driftmill.images import for_steps as image

COMPONENTS = [prepare, fit, assemble, judge, promote, record]
by_name = pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: c.name)


@by_name
def test_the_body_is_short_and_calls_the_library_only(component: Any) -> None:
    source = textwrap.dedent(inspect.getsource(component.python_func))
    (function,) = ast.parse(source[source.index("def ") :]).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:]  # without the docstring
    last = body[-1].end_lineno
    assert last is not None
    assert last - body[0].lineno < 10
    imports = [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom | ast.Import)]
    assert [i.module for i in imports if isinstance(i, ast.ImportFrom)] == ["driftmill"]
    assert len(imports) == 1


@by_name
def test_nothing_is_installed_when_it_starts(component: Any) -> None:
    container = component.component_spec.implementation.container
    assert "pip install" not in " ".join(container.command)
    assert container.image == image("tabular")  # the compiler puts the contract's in its place
    assert "python" in container.image  # else KFP's local runner warns


@by_name
def test_it_is_described(component: Any) -> None:
    assert component.description


@by_name
def test_it_knows_its_run(component: Any) -> None:
    assert {"contract", "store", "run_id", "job_id"} <= set(component.component_spec.inputs)


def test_only_the_image_for_images_holds_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIFTMILL_IMAGE", raising=False)
    assert image("vision").startswith("driftmill/python-vision:")
    assert image("tabular").startswith("driftmill/python-tabular:")
    monkeypatch.setenv("DRIFTMILL_IMAGE", "registry/python@sha256:0")
    assert {image("vision"), image("tabular")} == {"registry/python@sha256:0"}
