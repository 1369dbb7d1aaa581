"""What the tests of `submit` and `schedule` ask, and with what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CONTRACT
from tests.pipelines.standin import StandIn, serve


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
