"""Fixtures of the tests of gate and report."""

from __future__ import annotations

import pytest

from driftmill.bundle import Bundle
from tests.evaluate import pictures


@pytest.fixture(scope="session")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model of `pictures.make_contract()`."""
    of, folder = pictures.make_contract(), tmp_path_factory.mktemp("pictures")
    return pictures.make_bundle(folder / "new", of, pictures.network(of))
