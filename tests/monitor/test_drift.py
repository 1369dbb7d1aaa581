from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from driftmill.contract import Column, Image, Monitor
from driftmill.features import Signature
from driftmill.monitor import drift
from tests.monitor.traffic import normal_frame

START = datetime(2026, 1, 1, tzinfo=UTC)
MONITOR = Monitor(window=500, min_rows=50)


def signature(*columns: Column) -> Signature:
    return Signature(task="classification", columns=columns, target="y", labels=("no", "yes"))


def stamped(frame: pd.DataFrame) -> pd.DataFrame:
    """With the log's time and an answer that depends on nothing."""
    at = [START + timedelta(seconds=i) for i in range(len(frame))]
    score = np.random.default_rng(len(frame)).random(len(frame))
    return frame.assign(_at=at, _score=score, _prediction="no")


def mixed(rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "number": rng.normal(size=rows),
            "flag": rng.integers(0, 2, rows).astype(float),
            "text": rng.choice(["a", "b", "c"], rows, p=[0.6, 0.3, 0.1]),
            "gap": np.where(rng.random(rows) < 0.1, np.nan, rng.random(rows)),
        }
    )
    return stamped(frame).assign(_score=rng.random(rows))


MIXED = signature(
    Column(name="number", type="float", min=-10, max=10),
    Column(name="flag", type="bool"),
    Column(name="text", type="category", categories=("a", "b", "c")),
    Column(name="gap", type="float", nullable=True),
)


def judge(
    frame: pd.DataFrame, sign: Signature = MIXED, monitor: Monitor = MONITOR, rows: int = 2000
) -> dict[str, drift.ColumnResult]:
    """The columns of a window, by name."""
    reference = drift.compile_reference(sign, mixed(rows, seed=1))
    result = drift.decide(reference, monitor, frame, index=0, version="v")
    assert result.drifted == any(c.drifted for c in result.columns)
    return {c.name: c for c in result.columns}


def test_a_window_like_the_reference_is_calm() -> None:
    columns = judge(mixed(500, seed=2))
    assert list(columns) == ["number", "flag", "text", "gap", "_score"]
    assert not any(c.drifted or c.reason for c in columns.values())
    assert [columns[n].test for n in ("number", "flag", "text")] == ["ks", "chi2", "chi2"]
    assert columns["_score"].kind == "prediction"


@pytest.mark.parametrize(
    ("change", "name", "test"),
    [
        (lambda f: f.assign(number=f["number"] + 1), "number", "ks"),
        (lambda f: f.assign(flag=1.0), "flag", "chi2"),
        (lambda f: f.assign(text="a"), "text", "chi2"),
        (lambda f: f.assign(text=f["text"].where(f.index % 2 == 0, "new")), "text", "chi2"),
        (lambda f: f.assign(gap=f["gap"].where(f.index % 5 == 0)), "gap", "missing"),
        (lambda f: f.assign(number=np.nan), "number", "missing"),
        (lambda f: f.assign(text=None), "text", "missing"),
        (lambda f: f.assign(number="many"), "number", "schema"),
        (lambda f: f.assign(number=np.inf), "number", "schema"),
        (lambda f: f.drop(columns="number"), "number", "schema"),
        (lambda f: f.drop(columns="text"), "text", "schema"),
        (lambda f: f.assign(_score=f["_score"] ** 2), "_score", "ks"),
    ],
)
def test_a_changed_column_is_named(change, name: str, test: str) -> None:  # type: ignore[no-untyped-def]
    columns = judge(change(mixed(500, seed=2)))
    assert columns[name].test == test
    p_value = columns[name].p_value
    assert p_value is not None
    assert p_value < 0.01
    assert [n for n, c in columns.items() if c.drifted] == [name]


def test_broken_columns_say_why() -> None:
    frame = mixed(500, seed=2)
    frame["number"] = frame["number"].astype(object)
    frame.loc[:99, "number"] = "broken"
    columns = judge(frame.assign(gap=np.nan).drop(columns="text"))
    assert columns["number"].reason == "100 of 500 values are not finite numbers"
    assert columns["gap"].reason == "every value is missing"
    assert columns["text"].reason == "the column is absent from the window"
    assert columns["text"].missing == 1.0
    assert columns["number"].missing == pytest.approx(0.2)


def test_data_quality_is_measured() -> None:
    frame = mixed(500, seed=2)
    frame.loc[:49, "number"] = 11.0
    frame.loc[:24, "text"] = "new"
    frame.loc[25:49, "text"] = ""
    columns = judge(frame)
    assert columns["number"].out_of_range == pytest.approx(0.1)
    assert columns["text"].unseen == pytest.approx(25 / 475)
    assert columns["text"].missing == pytest.approx(0.05)


def test_an_ignored_column_never_drifts_and_a_weight_counts() -> None:
    frame = mixed(500, seed=2)
    frame["number"] += 5
    ignored = judge(frame, monitor=Monitor(ignore=("number",), min_rows=50))
    assert not any(c.drifted for c in ignored.values())
    assert ignored["number"].reason == "ignored by the contract"
    reference = drift.compile_reference(MIXED, mixed(2000, seed=1))
    light, heavy = (
        drift.decide(
            reference, Monitor(weights={"number": w}, min_rows=50), frame, index=0, version="v"
        )
        for w in (1, 6)
    )
    assert light.score == pytest.approx(light.columns[0].effect / 5)
    assert heavy.score == pytest.approx(light.columns[0].effect * 6 / 10)


def test_few_rows_are_not_tested() -> None:
    frame = mixed(500, seed=2).head(40)
    columns = judge(frame.assign(number=9.0))
    assert not any(c.drifted for c in columns.values())
    assert "monitor.min_rows is 50" in columns["number"].reason
    sparse = mixed(500, seed=2)
    sparse.loc[30:, "gap"] = np.nan
    column = judge(sparse)["gap"]
    assert column.drifted
    assert column.test == "missing"
    assert "distribution not tested: 3" in column.reason or "distribution" in column.reason


def test_a_small_effect_is_not_drift_however_sure() -> None:
    sign = signature(Column(name="x0", type="float"))
    reference = drift.compile_reference(sign, stamped(normal_frame(50_000, 1, seed=1)))
    window = stamped(normal_frame(50_000, 1, seed=2, shifted=1, shift=0.1))
    result = drift.decide(reference, Monitor(effect=0.1), window, index=0, version="v")
    p_value = result.columns[0].p_value
    assert p_value is not None
    assert p_value < 1e-9
    assert not result.columns[0].drifted
    again = drift.decide(reference, Monitor(effect=0.02), window, index=0, version="v")
    assert again.columns[0].drifted


def test_values_are_compared_as_the_model_sees_them() -> None:
    sign = signature(Column(name="x", type="float"))
    values = np.random.default_rng(0).integers(0, 10, 2000) / 10
    learnt = values.astype(np.float32).astype(np.float64)
    reference = drift.compile_reference(sign, stamped(pd.DataFrame({"x": learnt})))
    window = stamped(pd.DataFrame({"x": values}))
    assert drift.decide(reference, MONITOR, window, index=0, version="v").columns[0].effect == 0


def test_streaks_alarms_and_incidents() -> None:
    reference = drift.compile_reference(MIXED, mixed(2000, seed=1))
    calm, bad = mixed(500, seed=2), mixed(500, seed=2)
    bad["number"] += 3
    previous, seen = None, []
    for i, which in enumerate([calm, bad, bad, bad, calm, bad]):
        rows = which.assign(_at=which["_at"] + timedelta(days=i))
        previous = drift.decide(reference, MONITOR, rows, index=i, version="v", previous=previous)
        seen.append((previous.streak, previous.alarm, previous.started_at))
    day = timedelta(days=1)
    assert seen == [
        (0, False, None),
        (1, False, START + day),
        (2, True, START + day),
        (3, True, START + day),
        (0, False, None),
        (1, False, START + 5 * day),
    ]
    other = drift.decide(reference, MONITOR, bad, index=6, version="w", previous=previous)
    assert (other.streak, other.started_at) == (1, START)


def test_the_answers_that_are_watched_fit_the_task() -> None:
    frame = mixed(300, seed=1).assign(_prediction=np.tile(["a", "b", "c"], 100))
    several = MIXED.model_copy(update={"labels": ("a", "b", "c")})
    number = MIXED.model_copy(update={"task": "regression", "labels": ()})
    last = drift.compile_reference(several, frame)[-1]
    assert (last.column.name, last.column.type) == ("_prediction", "category")
    last = drift.compile_reference(number, frame.assign(_prediction=1.5))[-1]
    assert (last.column.name, last.column.type) == ("_prediction", "float")


SPEC = Image(size=8, channels=1)
SEEN = Signature(
    task="image-classification",
    columns=SPEC.statistics,
    target="label",
    labels=("a", "b", "c"),
    image=SPEC,
)


def seen(rows: int, seed: int) -> pd.DataFrame:
    """Rows of the log of a model of images; all images have one size."""
    rng = np.random.default_rng(seed)
    frame = stamped(pd.DataFrame({c.name: rng.random(rows) for c in SPEC.statistics}))
    embeddings = rng.normal(size=(rows, 16)).astype("<f2")
    return frame.assign(
        width=28.0,
        height=28.0,
        aspect=1.0,
        _prediction=rng.choice(["a", "b", "c"], rows),
        _score=rng.random(rows),
        _embedding=[row.tobytes() for row in embeddings],
    )


def judge_images(frame: pd.DataFrame, monitor: Monitor = MONITOR) -> drift.WindowResult:
    reference = drift.compile_reference(SEEN, seen(1000, seed=1))
    return drift.decide(reference, monitor, frame, index=0, version="v")


def moved(frame: pd.DataFrame, by: float) -> pd.DataFrame:
    """With other embeddings and all else as it was."""
    values = np.stack([np.frombuffer(e, "<f2") for e in frame["_embedding"]])
    return frame.assign(_embedding=[(row + np.float16(by)).tobytes() for row in values])


def test_images_are_compared_by_statistics_answers_confidence_and_embedding() -> None:
    result = judge_images(seen(500, seed=2))
    names = [c.name for c in result.columns]
    assert names == [c.name for c in SPEC.statistics] + ["_prediction", "_score", "embedding"]
    assert not result.drifted
    columns = {c.name: c for c in result.columns}
    # Where all images have one size there is nothing to find, and nothing in the way.
    assert (columns["width"].p_value, columns["width"].effect) == (1.0, 0.0)
    assert (columns["embedding"].kind, columns["embedding"].test) == ("embedding", "classifier")
    assert columns["_score"].kind == columns["_prediction"].kind == "prediction"
    two = SEEN.model_copy(update={"labels": ("a", "b")})
    watched = [p.column.name for p in drift.compile_reference(two, seen(100, seed=1))]
    assert watched[-2:] == ["_score", "embedding"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda f: f.assign(width=32.0, aspect=32 / 28), ["width", "aspect"]),
        (lambda f: f.assign(sharpness=f["sharpness"] / 2), ["sharpness"]),
        (lambda f: f.assign(_score=f["_score"] / 2), ["_score"]),
        (lambda f: f.assign(_prediction="a"), ["_prediction"]),
        (lambda f: moved(f, 1), ["embedding"]),
    ],
)
def test_a_change_of_images_is_named(change, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    result = judge_images(change(seen(500, seed=2)))
    assert [c.name for c in result.columns if c.drifted] == names
    assert result.features_drifted == sum(n in [c.name for c in SPEC.statistics] for n in names)


def test_the_embedding_counts_like_a_column() -> None:
    bad = moved(seen(500, seed=2), 1)
    plain = judge_images(bad)
    heavy = judge_images(bad, Monitor(min_rows=50, weights={"embedding": 3}))
    columns = len(plain.columns)
    assert heavy.score == pytest.approx(plain.score * 3 * columns / (columns + 2))
    ignored = judge_images(bad, Monitor(min_rows=50, ignore=("embedding",)))
    assert not ignored.drifted
    assert ignored.columns[-1].reason == "ignored by the contract"


def test_embeddings_that_are_missing_are_no_drift() -> None:
    frame = seen(500, seed=2)
    for broken in (frame.drop(columns="_embedding"), frame.assign(_embedding=b"damaged")):
        column = judge_images(broken).columns[-1]
        assert (column.missing, column.test, column.drifted) == (1.0, "none", False)
        assert "0 valid embeddings in the window" in column.reason
    half = frame.assign(_embedding=frame["_embedding"].where(frame.index % 2 == 0))
    column = judge_images(half).columns[-1]
    assert (column.missing, column.test, column.drifted) == (0.5, "classifier", False)


@given(
    st.lists(st.integers(-50, 50), min_size=5, max_size=60),
    st.lists(st.integers(-50, 50), min_size=5, max_size=60),
)
def test_ks_agrees_with_scipy_and_depends_on_ranks_only(a: list[int], b: list[int]) -> None:
    old, new = np.sort(np.array(a, dtype=float)), np.array(b, dtype=float)
    found = drift.ks(old, new)
    expected = stats.ks_2samp(old, new, method="asymp")
    assert found.effect == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert drift.ks(old**3 * 7 + 1, new**3 * 7 + 1) == found
    assert drift.ks(old, new[::-1]) == found


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 200), min_size=1),
    st.dictionaries(st.sampled_from("abcdefghxyz"), st.integers(1, 200), min_size=1),
)
def test_chi2_stays_in_range_and_ignores_order(a: dict[str, int], b: dict[str, int]) -> None:
    found = drift.chi2(a, b)
    if found is not None:
        assert 0 <= found.p_value <= 1
        assert 0 <= found.effect <= 1 + 1e-12
    assert drift.chi2(dict(reversed(a.items())), dict(reversed(b.items()))) == found
    same = drift.chi2(a, a)
    assert same is None or (same.effect == 0 and same.p_value == pytest.approx(1))


def test_chi2_counts_many_new_categories_as_one() -> None:
    old = {"a": 600, "b": 400}
    new = {"a": 250, "b": 150} | {f"n{i}": 1 for i in range(100)}
    found = drift.chi2(old, new)
    assert found is not None
    assert found.effect == pytest.approx(0.2)
    assert found.p_value < 1e-9


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.floats(),
            st.text(max_size=3),
            st.datetimes(),
            st.binary(max_size=2),
        ),
        min_size=60,
        max_size=80,
    )
)
def test_no_content_of_a_column_is_an_error(values: list[object]) -> None:
    frame = mixed(len(values), seed=3)
    for name in ("number", "flag", "text", "gap", "_score"):
        frame[name] = pd.Series(values, dtype=object)
    for column in judge(frame).values():
        assert 0 <= column.effect <= 1
        assert 0 <= column.missing <= 1
        assert column.p_value is None or 0 <= column.p_value <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_same_rows_in_any_order_have_not_drifted(seed: int) -> None:
    frame = mixed(500, seed)
    reference = drift.compile_reference(MIXED, frame)
    shuffled = frame.sample(frac=1, random_state=seed)
    one = drift.decide(reference, MONITOR, frame, index=0, version="v")
    two = drift.decide(reference, MONITOR, shuffled, index=0, version="v")
    assert one == two
    assert not one.drifted
    assert all(c.effect == 0 for c in one.columns)


def windows(
    reference_rows: int, rows: int, monitor: Monitor, *, count: int, shift: float = 0.0
) -> list[drift.WindowResult]:
    """Windows of 30 normal columns, 3 of them shifted, each with a reference of its own."""
    sign = signature(*(Column(name=f"x{i}", type="float") for i in range(30)))
    found = []
    for i in range(count):
        old = stamped(normal_frame(reference_rows, 30, seed=2 * i))
        new = stamped(normal_frame(rows, 30, seed=2 * i + 1, shifted=3, shift=shift))
        reference = drift.compile_reference(sign, old)
        found.append(drift.decide(reference, monitor, new, index=i, version="v"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("reference_rows", [1000, 10_000])
def test_false_alarms_keep_to_their_budget(reference_rows: int) -> None:
    """Without an effect floor, a window alarms with the probability the contract asks for."""
    rate, count = 0.05, 300
    monitor = Monitor(false_alarm_rate=rate, effect=0)
    alarms = sum(w.drifted for w in windows(reference_rows, 500, monitor, count=count))
    # What 999 of 1000 fair series would show.
    assert alarms <= stats.binom.ppf(0.999, count, rate)
    assert alarms >= stats.binom.ppf(0.001, count, rate)


@pytest.mark.slow
@pytest.mark.parametrize("reference_rows", [1000, 10_000])
def test_the_default_settings_are_quiet(reference_rows: int) -> None:
    calm = windows(reference_rows, 500, Monitor(), count=200)
    assert sum(w.drifted for w in calm) <= stats.binom.ppf(0.999, 200, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference_rows", "rows", "expected"), [(10_000, 500, 0.8), (10_000, 2000, 0.99)]
)
def test_a_shift_of_a_fifth_of_a_deviation_is_seen(
    reference_rows: int, rows: int, expected: float
) -> None:
    count = 60
    found = windows(reference_rows, rows, Monitor(effect=0.05), count=count, shift=0.2)
    assert sum(w.drifted for w in found) >= stats.binom.ppf(0.001, count, expected)
    wrong = sum(c.drifted for w in found for c in w.columns[3:])
    right = sum(c.drifted for w in found for c in w.columns[:3])
    assert wrong <= 0.05 * right


@pytest.mark.slow
def test_windows_of_images_are_quiet() -> None:
    """Without an effect floor, at most the part of the windows that the contract allows."""
    rate, count = 0.05, 150
    monitor = Monitor(false_alarm_rate=rate, effect=0)
    alarms = 0
    for i in range(count):
        reference = drift.compile_reference(SEEN, seen(1000, seed=2 * i))
        window = seen(500, seed=2 * i + 1)
        alarms += drift.decide(reference, monitor, window, index=i, version="v").drifted
    assert alarms <= stats.binom.ppf(0.999, count, rate)
