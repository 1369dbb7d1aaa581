"""Where a training run goes on after it was killed.

A checkpoint is one safetensors file in the store, `<model>/checkpoints/<identity>/<step>-<digest>`:
tensors (weights, optimizer, average, best), and JSON facts in its header. The folder's name is the
digest of everything that the result depends on, so a run never goes on from another's state; the
file's name holds the digest of its content, so a damaged one is never believed. Random numbers
need no state: the trainer derives them from seed and step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from driftmill.store import Store

log = logging.getLogger("driftmill")

#: Checkpoints that are kept; older ones are removed.
KEPT = 2
_SUFFIX = ".safetensors"
#: Key of the facts in a safetensors header, which maps text to text.
_FACTS = "facts"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps of the optimizer."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        store: where they lie.
        model: the model's name.
        identity: all that the result depends on, JSON-able: fingerprint of the data, family,
            settings, seed, code version.
    """

    def __init__(self, store: Store, model: str, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.store = store
        #: Key of the folder that holds them.
        self.folder = f"{model}/checkpoints/{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    @classmethod
    def at(cls, store: Store, folder: str) -> Checkpoints:
        """Those in the folder of another `Checkpoints`, for a process that knows no more."""
        found = cls.__new__(cls)
        found.store, found.folder = store, folder
        return found

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove all but the last two."""
        content = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            metadata={_FACTS: json.dumps(facts)},
        )
        self.store.write(f"{self.folder}/{step:09d}-{_digest(content)}{_SUFFIX}", content)
        for key in self._keys()[KEPT:]:
            self.store.delete(key)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none. Changes nothing."""
        for key in self._keys():
            step, _, digest = key.rpartition("/")[2].removesuffix(_SUFFIX).partition("-")
            try:
                content = self.store.read(key)
            except FileNotFoundError:
                continue  # a process that is still dying has removed it
            if _digest(content) != digest:
                log.warning("checkpoint %s is damaged; trying the one before", key)
                continue
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            facts = json.loads(header["__metadata__"][_FACTS])
            return Checkpoint(int(step), load(content), facts)
        return None

    def clear(self) -> None:
        """Remove all of them: the training has ended well."""
        for key in self.store.list(self.folder):
            self.store.delete(key)
        if self.store.folder is not None:  # with what a killed write may have left
            shutil.rmtree(self.store.folder / self.folder, ignore_errors=True)

    def _keys(self) -> list[str]:
        """Keys of the checkpoints, the newest first."""
        return [key for key in reversed(self.store.list(self.folder)) if key.endswith(_SUFFIX)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
