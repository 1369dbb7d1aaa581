"""The model families that a training run tries.

A family is a scikit-learn pipeline on the table that `table` makes: the numeric columns as float32,
then the categorical ones as text, so that training sees exactly what serving sees. Every step of a
pipeline can be exported to ONNX.

| family | numbers | categories |
|---|---|---|
| `dummy` | ignored | ignored |
| `linear` | median for a missing value, an indicator of it, standardised | one-hot |
| `random-forest` | median for a missing value, an indicator of it | ordinal |
| `hist-gradient-boosting` | as they are, missing included | one-hot if few, else ordinal |

A missing category is a category of its own if the training rows hold one. A category that the
training rows do not hold is no category in one-hot, and -1 in ordinal coding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from driftmill import features
from driftmill.contract import Contract, TabularFamily
from driftmill.evaluate.metrics import encode
from driftmill.features import Signature

FAMILIES: tuple[str, ...] = ("dummy", *get_args(TabularFamily))

#: Up to this many categories boosting sees a column one-hot: trees then split off any of them at
#: once. Beyond it the many columns would cost more time than they are worth.
FEW_CATEGORIES = 16

Params = Mapping[str, Any]

#: What a search may choose from, most important parameter first, default value first.
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "dummy": {},
    "linear": {"strength": (1.0, 0.1, 10.0, 0.01, 100.0, 0.001)},
    "random-forest": {
        "min_samples_leaf": (3, 10, 1, 30),
        "max_features": (0.33, "sqrt", 0.66, 1.0),
    },
    "hist-gradient-boosting": {
        "learning_rate": (0.1, 0.05, 0.2),
        "max_leaf_nodes": (15, 31, 8, 63),
        "max_iter": (200, 100, 400),
        "min_samples_leaf": (20, 50, 10),
        "l2_regularization": (0.0, 1.0, 10.0),
    },
}


class Numbers(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Numeric columns for a model that takes no missing values: each is filled with its median,
    and a column that misses values in training gets a second one, 1 where the value is missing. A
    column without any value in training is filled with 0.

    Arithmetic is in float64 and the result is float32, in training as in the exported model.

    Args:
        fill: false leaves missing values as they are, but for columns without any value; for a
            model that takes missing values.
        scale: whether the filled columns are brought to mean 0 and standard deviation 1.
    """

    def __init__(self, fill: bool = True, scale: bool = False) -> None:
        self.fill = fill
        self.scale = scale

    def fit(self, X: pd.DataFrame, y: object = None) -> Numbers:  # noqa: N803
        """Learn medians, means and deviations from (rows, columns) numbers."""
        values = np.asarray(X, dtype=np.float64)
        missing = np.isnan(values)
        empty = missing.all(axis=0)
        self.n_features_in_ = values.shape[1]
        self.filling_ = np.where(empty, 0.0, np.nan)
        self.indicated_ = np.empty(0, dtype=np.int64)
        self.mean_, self.factor_ = np.zeros(values.shape[1]), np.ones(values.shape[1])
        if self.fill:
            self.filling_[~empty] = np.nanmedian(values[:, ~empty], axis=0)
            self.indicated_ = np.flatnonzero(missing.any(axis=0) & ~empty)
        if self.scale:
            filled = np.where(missing, self.filling_, values)
            deviation = filled.std(axis=0)
            self.mean_ = filled.mean(axis=0)
            self.factor_ = 1 / np.where(deviation > 0, deviation, 1.0)
        return self

    def transform(self, X: pd.DataFrame) -> np.ndarray:  # noqa: N803
        """(rows, columns + indicated columns) float32."""
        values = np.asarray(X, dtype=np.float64)
        missing = np.isnan(values)
        filled = (np.where(missing, self.filling_, values) - self.mean_) * self.factor_
        return np.hstack([filled, missing[:, self.indicated_]]).astype(np.float32)


def table(frame: pd.DataFrame, sign: Signature) -> pd.DataFrame:
    """The input of every pipeline: (rows, numeric + categorical columns), float32 and text."""
    numeric, categorical = features.arrays(frame, sign)
    return pd.concat(
        [
            pd.DataFrame(numeric, columns=list(sign.numeric)),
            pd.DataFrame(categorical, columns=list(sign.categorical), dtype=object),
        ],
        axis=1,
    )


def truth(frame: pd.DataFrame, sign: Signature) -> np.ndarray:
    """(rows,) the target: int codes into the signature's labels, or numbers."""
    return encode(sign.labels, frame[sign.target])


def build(
    family: str, contract: Contract, sign: Signature, params: Params, threads: int = 1
) -> Pipeline:
    """An unfitted pipeline of a family.

    Args:
        family: one of `FAMILIES`.
        contract: task, metric and seed are taken from it.
        sign: the columns.
        params: a choice from `SPACES[family]`; what is left out takes its default.
        threads: Python threads that a forest grows its trees in.

    Raises:
        ValueError: no such family.
    """
    if family not in SPACES:
        raise ValueError(f"no family {family!r}; choose one of {', '.join(FAMILIES)}")
    chosen = defaults(family) | dict(params)
    pipeline = _BUILDERS[family](contract, sign, chosen)
    if family == "random-forest":
        pipeline.set_params(model__n_jobs=threads)
    return pipeline


def defaults(family: str) -> dict[str, Any]:
    """The default parameters of a family."""
    return {name: values[0] for name, values in SPACES[family].items()}


def learn(
    pipeline: Pipeline, contract: Contract, inputs: pd.DataFrame, y: np.ndarray, threads: int = 1
) -> Pipeline:
    """Fit a pipeline to the target as the contract wants it learnt (`target.transform`).

    Args:
        pipeline: fitted in place.
        contract: says how the target is learnt.
        inputs: rows as `table` gives them.
        y: (rows,) their target as `truth` gives it.
        threads: OpenMP and BLAS threads. Waiting OpenMP threads spin: on a busy machine boosting
            was seen to take twenty times as long with two threads as with one.
    """
    target = np.log1p(y) if contract.data.target.transform == "log1p" else y
    with threadpool_limits(threads):
        return pipeline.fit(inputs, target)


def answer(
    pipeline: Pipeline, contract: Contract, sign: Signature, inputs: pd.DataFrame
) -> np.ndarray:
    """What a fitted pipeline predicts, as metrics take it: (rows, labels) probabilities, 0 for a
    label that it never saw, or (rows,) numbers on the target's scale, within its limits."""
    with threadpool_limits(1):
        if contract.task != "regression":
            output = np.zeros((len(inputs), len(sign.labels)))
            output[:, pipeline.classes_] = pipeline.predict_proba(inputs)
            return output
        predicted = np.asarray(pipeline.predict(inputs), dtype=np.float64)
    target = contract.data.target
    if target.transform == "log1p":
        predicted = np.expm1(predicted)
    if target.min is not None or target.max is not None:
        predicted = np.clip(predicted, target.min, target.max)
    return predicted


def _columns(sign: Signature, numbers: Numbers, one_hot: int) -> ColumnTransformer:
    """The first step of a pipeline.

    Args:
        sign: the columns.
        numbers: transformer of the numeric columns.
        one_hot: columns with up to this many categories are coded one-hot, others ordinal.
    """
    first = len(sign.numeric)
    texts = [column for column in sign.columns if not column.is_numeric]
    few = [first + i for i, c in enumerate(texts) if len(c.categories) <= one_hot]
    many = [first + i for i, c in enumerate(texts) if len(c.categories) > one_hot]
    ordinal = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, dtype=np.float32)
    steps = [
        ("numeric", numbers, list(range(first))),
        ("one-hot", OneHotEncoder(handle_unknown="ignore", dtype=np.float32), few),
        ("ordinal", ordinal, many),
    ]
    return ColumnTransformer([step for step in steps if step[2]])


def _dummy(contract: Contract, sign: Signature, params: Params) -> Pipeline:
    if contract.task != "regression":
        return Pipeline([("model", DummyClassifier(strategy="prior"))])
    # The constant that is best by the metric: the median for absolute errors, else the mean.
    strategy = "median" if contract.metric.name == "mae" else "mean"
    return Pipeline([("model", DummyRegressor(strategy=strategy))])


def _linear(contract: Contract, sign: Signature, params: Params) -> Pipeline:
    strength = params["strength"]
    if contract.task != "regression":
        model = LogisticRegression(C=strength, max_iter=1000)
    else:
        model = Ridge(alpha=1 / strength)
    return Pipeline(
        [("columns", _columns(sign, Numbers(scale=True), sys.maxsize)), ("model", model)]
    )


def _forest(contract: Contract, sign: Signature, params: Params) -> Pipeline:
    kind = RandomForestClassifier if contract.task != "regression" else RandomForestRegressor
    model = kind(
        n_estimators=100,
        max_leaf_nodes=4096,  # keeps the exported file below some 30 MB, whatever the rows
        random_state=contract.train.seed,
        **params,
    )
    return Pipeline([("columns", _columns(sign, Numbers(), 0)), ("model", model)])


def _boosting(contract: Contract, sign: Signature, params: Params) -> Pipeline:
    settings: dict[str, Any] = {
        "early_stopping": False,  # the search chooses the number of trees
        "random_state": contract.train.seed,
        **params,
    }
    if contract.task != "regression":
        model = HistGradientBoostingClassifier(**settings)
    else:
        loss = "absolute_error" if contract.metric.name == "mae" else "squared_error"
        model = HistGradientBoostingRegressor(loss=loss, **settings)
    columns = _columns(sign, Numbers(fill=False), FEW_CATEGORIES)
    columns.set_params(sparse_threshold=0)  # boosting takes dense arrays only
    return Pipeline([("columns", columns), ("model", model)])


_BUILDERS: dict[str, Callable[[Contract, Signature, Params], Pipeline]] = {
    "dummy": _dummy,
    "linear": _linear,
    "random-forest": _forest,
    "hist-gradient-boosting": _boosting,
}
