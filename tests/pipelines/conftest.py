"""What the tests of `submit` and `schedule` ask, and with what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp.dsl import pipeline_task

from tests.conftest import CONTRACT
from tests.pipelines.standin import StandIn, serve


@pytest.fixture(autouse=True, scope="session")
def _names_without_sources() -> Iterator[None]:
    """KFP reads the sources of the whole call stack to learn one function's name, at every setting
    of a step. With the stack and the modules of pytest that is most of a compilation's time."""

    def stack() -> list[tuple[object, ...]]:
        caller = sys._getframe(2)  # of the function that asks
        return [(), (None, None, None, caller.f_code.co_name)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=stack))
        yield


@pytest.fixture
def kfp() -> Iterator[StandIn]:
    """A stand-in of Kubeflow Pipelines' API."""
    with serve() as state:
        yield state


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    """The file of the tiny contract."""
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    return path
