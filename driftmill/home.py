"""Where a laptop keeps everything: one folder, `.driftmill` unless the environment says otherwise;
and how many cores it has to offer.

| variable | default | what |
|---|---|---|
| `DRIFTMILL_HOME` | `.driftmill` in the current folder | folder of all that follows |
| `DRIFTMILL_STORE` | `<home>/store` | store: folder, `s3://` or `gs://` |
| `DRIFTMILL_LEDGER` | `sqlite:///<home>/ledger.db` | SQLAlchemy URL of the controller's ledger |
| `MLFLOW_TRACKING_URI` | `sqlite:///<home>/mlflow.db` | where runs are recorded |

An empty variable counts as none. Who may use them stands in other variables, which
`docs/storage.md` names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from driftmill.store import Store


@dataclass(frozen=True)
class Home:
    """The places of one installation."""

    folder: Path
    store_uri: str
    ledger_url: str
    tracking_uri: str

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.store_uri)

    @property
    def logs(self) -> Path:
        """Folder of the processes' output."""
        return self.folder / "logs"

    @property
    def processes(self) -> Path:
        """Folder with a file for each process of the laptop stack."""
        return self.folder / "processes"

    @property
    def spool(self) -> Path:
        """Folder of the inference log before it moves into the store."""
        return self.folder / "spool"

    @property
    def token_file(self) -> Path:
        """File with the bearer token of the controller's webhook."""
        return self.folder / "webhook-token"

    def environment(self) -> dict[str, str]:
        """The variables that give another process the same places."""
        return {
            "DRIFTMILL_HOME": str(self.folder),
            "DRIFTMILL_STORE": self.store_uri,
            "DRIFTMILL_LEDGER": self.ledger_url,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
        }


def find(folder: Path | None = None) -> Home:
    """The places that the environment names; nothing is created.

    Args:
        folder: overrides `DRIFTMILL_HOME`.
    """
    root = (folder or Path(os.environ.get("DRIFTMILL_HOME") or ".driftmill")).resolve()
    return Home(
        folder=root,
        store_uri=os.environ.get("DRIFTMILL_STORE") or str(root / "store"),
        ledger_url=os.environ.get("DRIFTMILL_LEDGER") or f"sqlite:///{root / 'ledger.db'}",
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}",
    )


def cores() -> int:
    """Cores that this process may use: as many as `DRIFTMILL_CORES` says, which a pod of a pipeline
    sets to what it has asked for, or all."""
    if asked := os.environ.get("DRIFTMILL_CORES"):
        return max(1, int(asked))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
