"""What is served answers as what was trained, also on the rows where it is hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import BayesianRidge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from driftmill import features
from driftmill.contract import Contract
from driftmill.features import Signature
from driftmill.serving.session import Session
from driftmill.tabular import candidates, export
from tests.tabular.conftest import NUMBERS, TEXTS, make_contract, rows


def trained(
    family: str, contract: Contract, frame: pd.DataFrame, params: dict[str, Any] | None = None
) -> tuple[Pipeline, Signature]:
    sign = features.signature(contract, frame)
    pipeline = candidates.build(family, contract, sign, params or {})
    inputs, y = candidates.table(frame, sign), candidates.truth(frame, sign)
    return candidates.learn(pipeline, contract, inputs, y), sign


def exported(folder: Path, pipeline: Pipeline, contract: Contract, sign: Signature) -> Session:
    (folder / "model.onnx").write_bytes(export.to_onnx(pipeline, contract, sign))
    return Session(folder / "model.onnx")


def spoilt(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with what training never saw: other missing values, unknown categories."""
    rows = frame.copy()
    rows.loc[::3, [c for c in ("age", "size", "empty") if c in rows]] = np.nan
    rows.loc[1::3, [c for c in ("colour", "town") if c in rows]] = "unheard of"
    rows.loc[2::3, [c for c in ("colour", "town") if c in rows]] = None
    return rows


SHAPES: dict[str, dict[str, Any]] = {
    "two labels": {"labels": 2},
    "three labels": {"labels": 3},
    "regression": {"labels": 0},
    "log1p": {"labels": 0, "target": {"transform": "log1p", "min": 1, "max": 5}},
    "mae": {"labels": 0, "train": {"metric": "mae"}},
    "numbers only": {"labels": 2, "columns": NUMBERS},
    "one number": {"labels": 0, "columns": NUMBERS[:1]},
    "texts only": {"labels": 3, "columns": TEXTS},
    "one text": {"labels": 2, "columns": TEXTS[:1]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", candidates.FAMILIES)
def test_every_family_and_shape_is_exported_alike(family: str, shape: str, tmp_path: Path) -> None:
    contract = make_contract(**SHAPES[shape])
    train, test = rows(SHAPES[shape]["labels"]), rows(SHAPES[shape]["labels"], seed=1)
    pipeline, sign = trained(family, contract, train)
    session = exported(tmp_path, pipeline, contract, sign)
    for frame in (train, test, spoilt(test), test.head(1)):
        assert export.parity(session, pipeline, contract, sign, frame) <= export.TOLERANCE
    output = session.run(*features.arrays(test, sign))
    assert output.dtype == np.float32
    expected = {"probabilities": (len(test), len(sign.labels)), "prediction": (len(test),)}
    assert output.shape == expected[session.output]
    columns = {"numeric": sign.numeric, "categorical": sign.categorical}
    assert set(session.inputs) == {name for name, listed in columns.items() if listed}
    assert shape_of_output(tmp_path / "model.onnx") == len(output.shape)


def shape_of_output(model: Path) -> int:
    (output,) = onnx.load(model).graph.output
    return len(output.type.tensor_type.shape.dim)


def test_predictions_stay_within_the_limits_of_the_target(tmp_path: Path) -> None:
    contract = make_contract(**SHAPES["log1p"])
    pipeline, sign = trained("linear", contract, rows(0))
    output = exported(tmp_path, pipeline, contract, sign).run(*features.arrays(rows(0), sign))
    assert output.min() == 1
    assert output.max() == 5


@pytest.mark.parametrize("family", candidates.FAMILIES)
def test_a_label_without_training_rows_has_probability_zero(family: str, tmp_path: Path) -> None:
    contract = make_contract(target={"labels": ["no", "perhaps", "yes"]})
    pipeline, sign = trained(family, contract, rows(2))
    session = exported(tmp_path, pipeline, contract, sign)
    export.parity(session, pipeline, contract, sign, rows(2, seed=1))
    output = session.run(*features.arrays(rows(2, seed=1), sign))
    assert output.shape[1] == 3
    assert (output[:, 1] == 0).all()
    assert output.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", candidates.FAMILIES)
def test_the_same_training_gives_the_same_bytes(family: str) -> None:
    contract, frame = make_contract(3), rows(3)
    first, second = (export.to_onnx(*args(trained(family, contract, frame))) for _ in range(2))
    assert first == second


def args(of: tuple[Pipeline, Signature]) -> tuple[Pipeline, Contract, Signature]:
    return of[0], make_contract(3), of[1]


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1), st.data())
def test_a_rounded_threshold_sorts_every_float32_as_before(
    thresholds: list[float], data: st.DataObject
) -> None:
    values = np.array(thresholds)
    rounded = export.round_down(values)
    assert rounded.dtype == np.float32
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
        up = np.nextafter(near, np.float32(np.inf))
        down = np.nextafter(near, np.float32(-np.inf))
    drawn = data.draw(st.lists(st.floats(allow_nan=False, width=32), max_size=20))
    for x in (near, up, down, *np.array(drawn, dtype=np.float32)):
        finite = np.isfinite(x) & np.isfinite(values)
        before = np.asarray(x, dtype=np.float64) <= values
        assert ((before == (x <= rounded)) | ~finite).all()


@pytest.mark.parametrize("labels", [2, 0])
@pytest.mark.parametrize("family", ["random-forest", "hist-gradient-boosting"])
def test_rows_on_a_threshold_keep_their_leaf(family: str, labels: int, tmp_path: Path) -> None:
    # Neighbouring float32 values: a threshold between two of them is no float32 itself, so that
    # rounding it to the nearest would send about half of them the wrong way.
    x = np.float32(1000)
    steps = [x := np.nextafter(x, np.float32(2000)) for _ in range(120)]
    size = np.repeat(np.array(steps, dtype=np.float64), 10)
    y = np.repeat(np.random.default_rng(0).integers(0, 2, 120), 10)
    frame = pd.DataFrame({"size": size, "y": np.array(["no", "yes"])[y] if labels else y * 1.0})
    contract = make_contract(labels, columns=NUMBERS[:1])
    params = {"min_samples_leaf": 2}
    pipeline, sign = trained(family, contract, frame, params)
    output = candidates.answer(pipeline, contract, sign, candidates.table(frame, sign))
    assert np.ptp(output) > 0.3, "the trees must have used these thresholds"
    session = exported(tmp_path, pipeline, contract, sign)
    assert export.parity(session, pipeline, contract, sign, frame) <= export.TOLERANCE


def test_numbers_too_large_for_float32_arithmetic_agree(tmp_path: Path) -> None:
    frame = rows(2)
    frame["size"] = (1.7e9 + 128 * np.arange(len(frame))).astype(np.float32).astype(float)
    contract = make_contract(2, columns=NUMBERS)
    pipeline, sign = trained("linear", contract, frame)
    session = exported(tmp_path, pipeline, contract, sign)
    assert export.parity(session, pipeline, contract, sign, frame) <= export.TOLERANCE


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_numbers_fill_scale_and_indicate(seed: int, scale: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.normal(0, 1e3), 10, (30, 3)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    step = candidates.Numbers(scale=scale).fit(pd.DataFrame(values))
    result = step.transform(pd.DataFrame(values))
    assert result.dtype == np.float32
    assert not np.isnan(result).any()
    assert result.shape == (30, 3 + np.isnan(values).any(axis=0).sum())
    if scale:
        assert result[:, :3].mean(axis=0) == pytest.approx(0, abs=1e-5)
        assert result[:, :3].std(axis=0) == pytest.approx(1, abs=1e-5)
    else:
        known = ~np.isnan(values)
        assert (result[:, :3][known] == values[known]).all()
        assert result[:, 0] == pytest.approx(
            np.where(known[:, 0], values[:, 0], np.nanmedian(values[:, 0]))
        )


def test_another_model_fails_the_parity_check(tmp_path: Path) -> None:
    contract = make_contract(2)
    pipeline, sign = trained("linear", contract, rows(2))
    other, _ = trained("hist-gradient-boosting", contract, rows(2))
    session = exported(tmp_path, other, contract, sign)
    with pytest.raises(export.ExportError, match=r"LogisticRegression: .* differs .* by 0\.\d+"):
        export.parity(session, pipeline, contract, sign, rows(2, seed=1))


def test_another_number_of_labels_fails_the_parity_check(tmp_path: Path) -> None:
    pipeline, sign = trained("dummy", make_contract(2), rows(2))
    other, more = trained("dummy", make_contract(3), rows(3))
    session = exported(tmp_path, other, make_contract(3), more)
    with pytest.raises(export.ExportError, match="gives"):
        export.parity(session, pipeline, make_contract(2), sign, rows(2))


def test_a_tie_may_go_either_way_but_a_clear_label_may_not(tmp_path: Path) -> None:
    contract = make_contract(2)
    frame = rows(2).iloc[:10].assign(y=["no", "yes"] * 5)
    pipeline, sign = trained("dummy", contract, frame)
    session = exported(tmp_path, pipeline, contract, sign)
    model = pipeline.steps[-1][1]
    model.class_prior_ = np.array([0.5 - 1e-6, 0.5 + 1e-6])  # torn: within the tolerance
    export.parity(session, pipeline, contract, sign, frame)
    model.class_prior_ = np.array([0.4, 0.6])
    with pytest.raises(export.ExportError):
        export.parity(session, pipeline, contract, sign, frame)


def test_a_step_without_onnx_form_is_named() -> None:
    contract = make_contract(0, columns=NUMBERS[:1])
    sign = features.signature(contract, rows(0))
    pipeline = Pipeline([("as", FunctionTransformer(np.sin)), ("model", BayesianRidge())])
    candidates.learn(
        pipeline, contract, candidates.table(rows(0), sign), candidates.truth(rows(0), sign)
    )
    with pytest.raises(export.ExportError, match="BayesianRidge has no ONNX form"):
        export.to_onnx(pipeline, contract, sign)
