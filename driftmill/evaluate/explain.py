"""Why does a model answer as it does?

**Tables: permutation importance**, through the exported model. An input's values are shuffled
between the test rows; what the metric loses is what the model owes to that input (given the others:
of two inputs that say the same, both may look unimportant). It needs nothing but the ONNX session,
so it works alike for every family, and it looks at the very model that serves.

**Images: the worst errors**, each with what spoke for the wrong answer (Grad-CAM). That needs
gradients, so it asks the network's weights, with PyTorch; where they are missing, the images stand
alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd

from driftmill import features
from driftmill.bundle import Bundle
from driftmill.contract import Metric
from driftmill.evaluate import metrics
from driftmill.serving.session import Session

#: Wrong answers that are shown.
ERRORS = 24
#: Test rows and shuffles for each column that are used at most: enough to rank the inputs.
ROWS, REPEATS = 2000, 5


@dataclass(frozen=True)
class Importance:
    """What the metric loses when one input is shuffled."""

    column: str
    loss: float
    """Mean over the repeats, oriented: positive is worse without the input."""
    spread: float
    """Standard deviation over the repeats."""


def importance(
    bundle: Bundle,
    test: pd.DataFrame,
    metric: Metric,
    seed: int = 0,
    rows: int = ROWS,
    repeats: int = REPEATS,
) -> list[Importance]:
    """Permutation importance of every input column, the most important first.

    Args:
        bundle: the model.
        test: labelled test rows.
        metric: what is lost.
        seed: of the sample and of the shuffles.
        rows: a sample of so many is used where there are more.
        repeats: shuffles of each column.

    Returns:
        One entry for each input; none where the metric is undefined on these rows.
    """
    rng = np.random.default_rng(seed)
    if len(test) > rows:
        test = test.iloc[np.sort(rng.choice(len(test), rows, replace=False))]
    sign = bundle.signature
    y = metrics.encode(sign.labels, test[sign.target])
    numeric, categorical = features.arrays(test, sign)
    # Unlike serving, this is one batch after another: all cores may work on it.
    session = Session(bundle.folder / "model.onnx", threads=os.cpu_count() or 1)
    whole = metrics.score(metric.name, y, session.run(numeric, categorical))
    if not np.isfinite(whole):
        return []
    found = []
    for column in sign.columns:
        losses = []
        for _ in range(repeats):
            order = rng.permutation(len(test))
            mixed_numeric, mixed_categorical = numeric, categorical
            if column.is_numeric:
                mixed_numeric = numeric.copy()
                place = sign.numeric.index(column.name)
                mixed_numeric[:, place] = numeric[order, place]
            else:
                mixed_categorical = categorical.copy()
                place = sign.categorical.index(column.name)
                mixed_categorical[:, place] = categorical[order, place]
            without = metrics.score(metric.name, y, session.run(mixed_numeric, mixed_categorical))
            losses.append(metric.sign * (whole - without))
        found.append(Importance(column.name, float(np.mean(losses)), float(np.std(losses))))
    return sorted(found, key=lambda i: -i.loss)


@dataclass(frozen=True)
class WrongAnswer:
    """A test image with a wrong answer."""

    image: np.ndarray
    """uint8 (channels, height, width)."""
    truth: str
    answer: str
    probability: float
    """Of the answer, as the model states it."""
    seen: np.ndarray | None
    """float32 (height, width), 0 to 1: what spoke for the answer; None where that is unknown."""


def worst_errors(
    bundle: Bundle, test: pd.DataFrame, output: np.ndarray, most: int = ERRORS
) -> tuple[list[WrongAnswer], str]:
    """The images for which the model is most sure of a wrong label, the surest first.

    Args:
        bundle: a model of images.
        test: labelled test rows.
        output: (rows, labels), what the model says of them.
        most: so many are shown.

    Returns:
        The errors; and why they come without Grad-CAM, or nothing.
    """
    labels = bundle.signature.labels
    y = metrics.encode(labels, test[bundle.signature.target])
    chosen = output.argmax(axis=1)
    stated = output[np.arange(len(output)), chosen]
    wrong = np.flatnonzero(chosen != y)
    worst = wrong[np.argsort(-stated[wrong], kind="stable")][:most]
    if not len(worst):
        return [], ""
    (images,) = features.arrays(test.iloc[worst], bundle.signature)
    seen, trouble = _seen(bundle, images, chosen[worst])
    found = [
        WrongAnswer(
            image=image,
            truth=labels[y[row]],
            answer=labels[chosen[row]],
            probability=float(stated[row]),
            seen=None if seen is None else seen[place],
        )
        for place, (row, image) in enumerate(zip(worst, images, strict=True))
    ]
    return found, trouble


def _seen(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Grad-CAM (rows, height, width) of these images, or None and why there is none."""
    try:
        from driftmill.vision import gradcam, nets
    except ModuleNotFoundError as error:
        return None, f"Grad-CAM needs the package {error.name}, which is not installed here."
    image = bundle.signature.image
    assert image is not None
    try:
        net = gradcam.load(
            bundle.folder / "weights.safetensors",
            bundle.manifest.family,
            image,
            len(bundle.signature.labels),
        )
        return gradcam.maps(net, images, labels), ""
    except nets.NetError as error:
        return None, f"There is no Grad-CAM: {error}."
