"""How the parameters of a family are chosen: by cross-validation on the training rows.

| method | settings tried |
|---|---|
| `none` | the defaults |
| `grid` | as many values as the budget allows, most of the most important parameters |
| `random` | the defaults and random combinations |
| `halving` | as random, but all on few rows; the best third goes on with three times the rows |

Folds are stratified for a classification, in order of time where the contract has a time. The score
is the contract's metric, averaged over the folds. Fits run side by side in threads, each on one
core: training never starves what else runs on the machine, and the result does not depend on the
number of cores.
"""

from __future__ import annotations

import logging
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold, TimeSeriesSplit
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from driftmill.contract import Contract
from driftmill.evaluate import metrics
from driftmill.features import Signature
from driftmill.home import cores
from driftmill.tabular import candidates

log = logging.getLogger("driftmill")

#: Halving keeps one of this many settings, and gives the next round this many times the rows.
FACTOR = 3
#: The first round of halving uses no fewer rows than this.
FEWEST_ROWS = 500

Fold = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Trial:
    """A setting and how it did."""

    params: dict[str, Any]
    score: float
    """Mean of the metric over the folds."""
    std: float
    """Its standard deviation over the folds."""
    rows: int
    """Rows that the folds were made of."""


class SearchError(ValueError):
    """The training rows do not allow a score."""


def search(
    contract: Contract, sign: Signature, family: str, inputs: pd.DataFrame, y: np.ndarray
) -> list[Trial]:
    """Try settings of a family.

    Args:
        contract: method, budget, folds, metric and seed are taken from it.
        sign: the columns.
        family: one of `candidates.FAMILIES`.
        inputs: training rows as `candidates.table` gives them, in order of time if they have one.
        y: (rows,) their target as `candidates.truth` gives it.

    Returns:
        The trials, best first. With halving, those that saw more rows come before the others.

    Raises:
        SearchError: there are too few rows or labels.
    """
    settings = propose(contract, family)
    rounds = [len(y)]
    if contract.train.search.method == "halving":
        rounds = _rounds(len(settings), len(y))
    trials: list[Trial] = []
    for number, rows in enumerate(rounds, start=1):
        chosen = _some(contract, y, rows)
        done = _evaluate(contract, sign, family, settings, inputs.iloc[chosen], y[chosen])
        ranked = sorted(
            done, key=lambda t: -contract.metric.sign * t.score
        )  # stable: ties by order
        trials = ranked + [t for t in trials if t.params not in settings]
        if number < len(rounds):
            settings = [t.params for t in ranked[: math.ceil(len(ranked) / FACTOR)]]
        log.info(
            "%s: best of %d on %d rows: %s %.4f", family, len(done), rows,
            contract.metric.name, ranked[0].score,
        )  # fmt: skip
    return trials


def propose(contract: Contract, family: str) -> list[dict[str, Any]]:
    """The settings to try: at most the budget, the defaults first, none twice."""
    space = candidates.SPACES[family]
    budget = contract.train.search.budget
    method = contract.train.search.method
    if method == "none":
        budget = 1
    elif method == "grid":
        space = _thinned(space, budget)
    combinations = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
    if len(combinations) <= budget:
        return combinations
    rng = np.random.default_rng(contract.train.seed)
    others = 1 + rng.choice(len(combinations) - 1, size=budget - 1, replace=False)
    return [combinations[0]] + [combinations[i] for i in others]


def folds(contract: Contract, y: np.ndarray) -> list[Fold]:
    """Positions of the learning and of the judging rows of every fold.

    Raises:
        SearchError: there are fewer rows than folds need.
    """
    count, seed = contract.train.search.folds, contract.train.seed
    if len(y) < 2 * (count + 1):
        raise SearchError(f"{len(y)} training rows are too few for {count} folds")
    splitter: TimeSeriesSplit | StratifiedKFold | KFold
    if contract.data.time is not None:
        splitter = TimeSeriesSplit(count)
    elif contract.task != "regression":
        splitter = StratifiedKFold(count, shuffle=True, random_state=seed)
    else:
        splitter = KFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A label with fewer rows than folds is missing from some of them: that is all right.
        warnings.filterwarnings("ignore", message="The least populated class")
        try:
            return list(splitter.split(np.zeros(len(y)), y))
        except ValueError as error:  # every label has fewer rows than folds
            raise SearchError(
                f"the training rows cannot be cut into {count} folds: {error}"
            ) from None


def _evaluate(
    contract: Contract,
    sign: Signature,
    family: str,
    settings: list[dict[str, Any]],
    inputs: pd.DataFrame,
    y: np.ndarray,
) -> list[Trial]:
    """Every setting on every fold."""
    parts = [(a, b) for a, b in folds(contract, y) if len(np.unique(y[a])) > 1]
    if not parts:
        raise SearchError("the training rows hold one value of the target only; nothing to learn")

    def score(task: tuple[dict[str, Any], Fold]) -> float:
        params, (learning, judging) = task
        pipeline = candidates.build(family, contract, sign, params, threads=1)
        candidates.learn(pipeline, contract, inputs.iloc[learning], y[learning])
        output = candidates.answer(pipeline, contract, sign, inputs.iloc[judging])
        return metrics.score(contract.metric.name, y[judging], output)

    # Each thread limits its own OpenMP threads; those of BLAS are the whole process's.
    with (
        warnings.catch_warnings(),
        threadpool_limits(1),
        ThreadPoolExecutor(cores()) as pool,
    ):
        # A setting that has not converged is judged as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = np.array(list(pool.map(score, product(settings, parts))))
    found = found.reshape(len(settings), len(parts))
    if np.isnan(found).all():
        raise SearchError(f"{contract.metric.name} is not defined on any fold: too few labels")
    return [
        Trial(params, float(np.nanmean(of)), float(np.nanstd(of)), len(y))
        for params, of in zip(settings, found, strict=True)
    ]


def _thinned(space: dict[str, tuple[Any, ...]], budget: int) -> dict[str, tuple[Any, ...]]:
    """The start of each parameter's values, so that all combinations fit the budget: each gets one
    more value in turn, the most important first, until none fits."""
    taken = dict.fromkeys(space, 1)
    grown = True
    while grown:
        grown = False
        for name, values in space.items():
            larger = taken | {name: taken[name] + 1}
            if taken[name] < len(values) and math.prod(larger.values()) <= budget:
                taken, grown = larger, True
    return {name: values[: taken[name]] for name, values in space.items()}


def _rounds(settings: int, rows: int) -> list[int]:
    """Rows of each round of halving, the last with all."""
    count = max(1, math.ceil(math.log(settings, FACTOR))) if settings > 1 else 1
    sizes = [rows // FACTOR**i for i in range(count)]
    return sorted(size for size in sizes if size >= min(FEWEST_ROWS, rows))


def _some(contract: Contract, y: np.ndarray, rows: int) -> np.ndarray:
    """Positions of `rows` training rows: the newest where there is a time, else drawn by seed."""
    if rows == len(y) or contract.data.time is not None:
        return np.arange(len(y) - rows, len(y))
    return np.sort(np.random.default_rng(contract.train.seed).permutation(len(y))[:rows])
