"""How rows become the arrays that a model takes, the same in training and in serving.

A model of a table has at most two inputs: `numeric`, float32 of shape (rows, numeric columns),
where a missing value is NaN; and `categorical`, text of shape (rows, categorical columns), where a
missing value is the empty string. Columns stand in the contract's order.

A model of images has one: `image`, uint8 of shape (rows, channels, height, width). In a table each
row carries its image in the column `_image`; the other columns are the image's statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from driftmill.contract import Column, Contract, Image, Task

if TYPE_CHECKING:
    import pandas as pd

#: The text that stands for a missing category.
MISSING = ""

#: Columns that Driftmill adds to a table: the row's identity and its time (UTC).
ID, TIME = "_id", "_time"
#: Of image tasks: the image, uint8 (channels, height, width) in memory; and the model's embedding.
IMAGE, EMBEDDING = "_image", "_embedding"
#: Of the stream: the bytes that a client would send.
ORIGINAL = "_original"


class Signature(BaseModel):
    """What a model takes and gives; `schema.json` of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    columns: tuple[Column, ...]
    """Inputs; a categorical column carries the categories seen in training."""
    target: str
    labels: tuple[str, ...] = ()
    """Classification: the label of each column of the model's output."""
    image: Image | None = None
    """Of image tasks: what the model sees of an image."""

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the columns of the `numeric` input, in order."""
        return tuple(c.name for c in self.columns if c.is_numeric)

    @property
    def categorical(self) -> tuple[str, ...]:
        """Names of the columns of the `categorical` input, in order."""
        return tuple(c.name for c in self.columns if not c.is_numeric)


def signature(contract: Contract, train: pd.DataFrame) -> Signature:
    """The signature of a model trained on these rows: categories and labels as learnt from them
    where the contract does not list them."""
    columns = []
    for column in contract.data.columns:
        if column.is_numeric or column.categories:
            columns.append(column)
        else:
            seen = sorted(str(v) for v in train[column.name].dropna().unique())
            columns.append(column.model_copy(update={"categories": tuple(seen)}))
    labels: tuple[str, ...] = ()
    if contract.task != "regression":
        target = contract.data.target
        labels = target.labels or tuple(sorted(train[target.name].unique()))
    return Signature(
        task=contract.task,
        columns=tuple(columns),
        target=contract.data.target.name,
        labels=labels,
        image=contract.data.image,
    )


def arrays(frame: pd.DataFrame, sign: Signature) -> tuple[np.ndarray, ...]:
    """The inputs of a table, as `Session.run` takes them.

    Args:
        frame: has the signature's columns and, for an image task, `_image`; more are ignored.
        sign: which columns, in which order.

    Returns:
        `numeric` (rows, a) float32 and `categorical` (rows, b) object array of str; for an image
        task `image` (rows, channels, height, width) uint8 alone.
    """
    if sign.image is not None:
        shape = (len(frame), sign.image.channels, *sign.image.size)
        images = np.empty(shape, dtype=np.uint8)
        for place, image in zip(images, frame[IMAGE], strict=True):
            place[...] = image
        return (images,)
    numeric = frame[list(sign.numeric)].to_numpy(dtype=np.float32, na_value=np.nan)
    texts = frame[list(sign.categorical)]
    categorical = texts.astype(object).where(texts.notna(), MISSING).to_numpy(dtype=object)
    return np.ascontiguousarray(numeric), categorical
