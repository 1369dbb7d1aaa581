"""Fixtures of the tests of retraining: ledgers in SQLite and in a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from driftmill.retrain.ledger import Ledger
from tests.postgres import database


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty ledger, once in each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'home' / 'ledger.db'}"
    return database(request.getfixturevalue("postgres"), "ledger")


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    """An empty ledger, once in each database."""
    opened = Ledger(url)
    yield opened
    opened.close()
