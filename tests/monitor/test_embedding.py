from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from driftmill.monitor import embedding


def rows(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Embeddings as networks make them: of ten kinds, and never below zero."""
    centres = np.random.default_rng(7).normal(0, 1.5, (10, width))
    rng = np.random.default_rng(seed)
    values = centres[rng.integers(0, 10, count)] + rng.normal(size=(count, width))
    values[:, 0] += shift
    return np.maximum(values, 0).astype(np.float32)


def column(values: np.ndarray) -> pd.Series:
    return pd.Series([row.tobytes() for row in values.astype("<f2")])


def test_what_is_no_embedding_is_left_out() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values[2, 1] = np.inf
    given = [*column(values), None, np.nan, b"", b"short", "text"]
    places, matrix = embedding.read(pd.Series(given))
    assert places.tolist() == [0, 1, 3]
    assert matrix.dtype == np.float32
    assert matrix.tolist() == values[[0, 1, 3]].tolist()
    # Of another network.
    assert len(embedding.read(pd.Series(given), width=4)[0]) == 0
    assert embedding.read(pd.Series([None, None]))[1].shape == (0, 0)


def test_the_window_s_strangers_have_the_highest_scores() -> None:
    window = rows(300, 16, seed=2)
    window[::10] += 3
    found = embedding.separate(rows(1000, 16, seed=1), window)
    assert set(np.argsort(-found.scores)[:30]) == set(range(0, 300, 10))


def test_the_effect_grows_with_the_change() -> None:
    old = rows(1000, 16, seed=1)
    effects = [embedding.separate(old, rows(500, 16, seed=2, shift=s)).effect for s in (0, 1, 2, 9)]
    assert effects == sorted(effects)
    assert effects[0] < 0.1
    assert effects[-1] == pytest.approx(1, abs=0.01)


def test_embeddings_that_never_vary_are_no_drift() -> None:
    same = np.full((100, 8), 0.1, dtype=np.float32)
    found = embedding.separate(same, same[:50])
    assert (found.p_value, found.effect) == (1.0, 0.0)
    # A part that is always the same does not disturb the others.
    old, new = rows(400, 8, seed=1), rows(200, 8, seed=2, shift=2)
    dead = [np.hstack([side, np.zeros((len(side), 4), np.float32)]) for side in (old, new)]
    assert embedding.separate(*dead).effect == pytest.approx(embedding.separate(old, new).effect)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(20, 80), st.integers(20, 80), st.integers(1, 60), st.integers(0, 10_000),
    st.sampled_from([0.0, 1e-3, 1e4]),
)  # fmt: skip
def test_any_embeddings_can_be_compared(m: int, n: int, width: int, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    # Few rows, many of them equal, columns that repeat each other.
    old, new = (size * rng.integers(0, 3, (k, width)).astype(np.float32) for k in (m, n))
    old[:, -1], new[:, -1] = old[:, 0], new[:, 0]
    found = embedding.separate(old, new)
    assert 0 <= found.p_value <= 1
    assert 0 <= found.effect <= 1
    assert np.isfinite(found.scores).all()
    again = embedding.separate(old, new)
    assert (again.p_value, again.effect) == (found.p_value, found.effect)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "width"), [(200, 100, 32), (1000, 300, 64)])
def test_without_drift_it_holds_its_level(m: int, n: int, width: int) -> None:
    count = 300
    found = [
        embedding.separate(rows(m, width, seed=2 * i), rows(n, width, seed=2 * i + 1)).p_value
        for i in range(count)
    ]
    for level in (0.01, 0.05, 0.2):
        # What 999 of 1000 fair series would show; it may be a little careful, but not useless.
        false = sum(p <= level for p in found)
        assert false <= stats.binom.ppf(0.999, count, level)
        assert false >= stats.binom.ppf(0.001, count, level / 2)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 512])
def test_a_new_kind_in_a_quarter_of_the_rows_is_found(width: int) -> None:
    centre = np.random.default_rng(8).normal(0, 1.5, width)
    for seed in range(10):
        window = rows(500, width, seed=100 + seed)
        window[:125] = np.maximum(centre + np.random.default_rng(seed).normal(size=(125, width)), 0)
        found = embedding.separate(rows(2000, width, seed=seed), window)
        assert found.p_value < 1e-4
        assert found.effect > 0.2
