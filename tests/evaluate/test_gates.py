"""The gate, with real ONNX models of known faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmill import contract
from driftmill.contract import Contract
from driftmill.evaluate import gates
from driftmill.evaluate.gates import Verdict
from tests.conftest import tiny_frame
from tests.evaluate import models, pictures


def _failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def _detail(verdict: Verdict, name: str) -> str:
    return next(check.detail for check in verdict.checks if check.name == name)


def test_a_first_model_that_knows_something_beats_the_dummy(tiny: Contract, tmp_path: Path) -> None:
    verdict = gates.judge(
        tiny, models.tiny_prepared(), models.classifier(tmp_path / "new", tiny), None
    )
    assert verdict.promote
    assert verdict.against == "dummy"
    assert verdict.champion_metrics["auc"] == 0.5
    assert verdict.comparison is not None
    assert verdict.comparison.low > 0.4
    assert verdict.reason.startswith("Promoted: auc is better than that of a dummy")
    interval = verdict.challenger_intervals["auc"]
    assert interval.low < interval.value < interval.high
    assert interval.value == verdict.challenger_metrics["auc"]


def test_a_first_model_that_knows_nothing_does_not_pass(tiny: Contract, tmp_path: Path) -> None:
    blind = models.classifier(tmp_path / "new", tiny, slope=0.0, noise=0.01)
    verdict = gates.judge(tiny, models.tiny_prepared(), blind, None)
    assert not verdict.promote
    assert "better" in _failed(verdict)


def test_a_better_challenger_replaces_the_champion_and_not_the_other_way(
    tiny: Contract, tmp_path: Path
) -> None:
    good = models.classifier(tmp_path / "good", tiny)
    poor = models.classifier(tmp_path / "poor", tiny, noise=0.1)
    rows = models.tiny_prepared()
    there, back = gates.judge(tiny, rows, good, poor), gates.judge(tiny, rows, poor, good)
    assert there.promote
    assert not back.promote
    assert there.against == poor.version
    assert there.comparison is not None
    assert back.comparison is not None
    assert there.comparison.difference == -back.comparison.difference
    assert "is surely a loss" in back.reason
    assert good.version in back.reason


def test_the_champion_itself_is_not_promoted_again(tiny: Contract, tmp_path: Path) -> None:
    model = models.classifier(tmp_path / "one", tiny)
    verdict = gates.judge(tiny, models.tiny_prepared(), model, model)
    assert not verdict.promote
    assert verdict.comparison is not None
    assert (verdict.comparison.difference, verdict.comparison.low) == (0, 0)
    assert verdict.reason.startswith("Not promoted: the challenger is the champion itself")


def test_the_gain_must_clear_the_margin(tiny: Contract, tmp_path: Path) -> None:
    good = models.classifier(tmp_path / "good", tiny)
    poor = models.classifier(tmp_path / "poor", tiny, noise=0.1)
    rows = models.tiny_prepared()
    gain = gates.judge(tiny, rows, good, poor).comparison
    assert gain is not None
    low = models.changed(tiny, gates={"margin": gain.low * 0.9})
    high = models.changed(tiny, gates={"margin": (gain.low + gain.difference) / 2})
    assert gates.judge(low, rows, good, poor).promote
    refused = gates.judge(high, rows, good, poor)
    assert _failed(refused) == {"better"}
    assert "not surely above the margin" in refused.reason


def test_too_few_test_rows_promote_nothing(tiny: Contract, tmp_path: Path) -> None:
    model = models.classifier(tmp_path / "new", tiny)
    verdict = gates.judge(tiny, models.tiny_prepared(99), model, None)
    assert _failed(verdict) == {"test rows"}
    assert "99 test rows, at least 100" in verdict.reason
    none = models.prepared(tiny_frame(50), tiny_frame(50).head(0))
    assert {"test rows", "answers"} <= _failed(gates.judge(tiny, none, model, None))


def test_answers_that_are_no_numbers_are_refused(tiny: Contract, tmp_path: Path) -> None:
    broken = models.classifier(tmp_path / "new", tiny, nan_above=700)
    rows = models.tiny_prepared()
    verdict = gates.judge(tiny, rows, broken, models.classifier(tmp_path / "old", tiny))
    bad = int((rows.test["amount"] > 700).sum())
    assert _failed(verdict) == {"answers"}
    assert f"{bad} of 800 answers are not numbers" in verdict.reason
    assert verdict.challenger_metrics == {}
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_a_champion_whose_answers_are_no_numbers_gives_way_to_the_dummy(
    tiny: Contract, tmp_path: Path
) -> None:
    broken = models.classifier(tmp_path / "old", tiny, nan_above=700)
    new = models.classifier(tmp_path / "new", tiny)
    verdict = gates.judge(tiny, models.tiny_prepared(), new, broken)
    assert verdict.promote
    assert verdict.against == "dummy"
    assert "not numbers" in verdict.notes[0]


def test_a_label_that_the_challenger_never_learnt_is_refused(
    tiny: Contract, tmp_path: Path
) -> None:
    rows = models.tiny_prepared()
    rows.test.loc[:2, "fraud"] = "perhaps"
    verdict = gates.judge(tiny, rows, models.classifier(tmp_path / "new", tiny), None)
    assert _failed(verdict) == {"answers"}
    assert "3 test rows carry labels that the challenger never learnt: perhaps" in verdict.reason


def test_a_champion_that_cannot_score_the_rows_gives_way_to_the_dummy(
    tiny: Contract, tmp_path: Path
) -> None:
    old = tiny.model_dump(mode="json")
    old["data"]["columns"][1]["name"] = "shoe size"
    before = contract.Contract.model_validate(old)
    champion_rows = tiny_frame(300).rename(columns={"age": "shoe size"})
    champion = models.classifier(tmp_path / "old", before, frame=champion_rows)
    new = models.classifier(tmp_path / "new", tiny)
    verdict = gates.judge(tiny, models.tiny_prepared(), new, champion)
    assert verdict.promote
    assert verdict.against == "dummy"
    assert "it needs the column 'shoe size'" in verdict.notes[0]
    assert "the champion cannot score these rows" in verdict.reason


def test_the_order_of_the_champions_labels_does_not_matter(tiny: Contract, tmp_path: Path) -> None:
    """A champion with its labels the other way round, and its probabilities too, is the same."""
    new = models.classifier(tmp_path / "new", tiny, slope=0.03)
    turned = models.classifier(tmp_path / "old", tiny, slope=-0.03, labels=("yes", "no"))
    verdict = gates.judge(tiny, models.tiny_prepared(), new, turned)
    for name, value in verdict.challenger_metrics.items():
        assert verdict.champion_metrics[name] == pytest.approx(value, abs=1e-5)


def test_a_loss_on_a_protected_slice_outweighs_a_gain(tiny: Contract, tmp_path: Path) -> None:
    """Better on the whole, but wrong about the app, which is few rows."""
    rng = np.random.default_rng(0)
    rows = models.tiny_prepared(3000)
    rows.test["channel"] = np.where(rng.random(3000) < 0.06, "app", "web")
    good = models.classifier(tmp_path / "new", tiny, app=-1.0)
    poor = models.classifier(tmp_path / "old", tiny, noise=0.4)
    assert gates.judge(tiny, rows, good, poor).promote
    guarded = models.changed(tiny, gates={"slices": {"columns": ["channel", "age"]}})
    verdict = gates.judge(guarded, rows, good, poor)
    assert _failed(verdict) == {"slices"}
    assert "on channel = app" in verdict.reason
    failed = [s for s in verdict.slices if not s.passed]
    assert [(s.column, s.value) for s in failed] == [("channel", "app")]
    deciding = sum(s.comparison is not None for s in verdict.slices)
    assert failed[0].comparison is not None
    assert failed[0].comparison.confidence == pytest.approx(1 - 0.05 / deciding)
    # With fewer rows than `min_rows` the group is shown, but does not decide.
    few = models.changed(
        tiny, gates={"slices": {"columns": ["channel"], "min_rows": 1000, "max_loss": 0.0}}
    )
    verdict = gates.judge(few, rows, good, poor)
    assert verdict.promote
    app = next(s for s in verdict.slices if s.value == "app")
    assert app.comparison is None
    assert app.challenger is not None


def test_a_slice_on_which_the_metric_is_undefined_does_not_decide(
    tiny: Contract, tmp_path: Path
) -> None:
    rows = models.tiny_prepared()
    rows.test.loc[rows.test["channel"] == "app", "fraud"] = "no"  # no AUC of one label
    guarded = models.changed(tiny, gates={"slices": {"columns": ["channel"]}})
    verdict = gates.judge(guarded, rows, models.classifier(tmp_path / "new", tiny), None)
    app = next(s for s in verdict.slices if s.value == "app")
    assert (app.challenger, app.champion, app.comparison) == (None, None, None)
    assert verdict.promote


@given(
    values=st.lists(
        st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(0, 3).map(float)), min_size=1
    )
)
@settings(deadline=None)
def test_quartiles_put_every_row_into_one_group(values: list[float | None]) -> None:
    frame = pd.DataFrame({"x": np.array(values, dtype=np.float64)})
    members = np.array([who for _, who in gates.groups(models.numbers(), "x", frame)])
    assert (members.sum(axis=0) == 1).all()


def test_categories_and_missing_ones_are_groups(tiny: Contract) -> None:
    frame = pd.DataFrame({"channel": ["web", None, "app", "fax"], "age": [1.0, np.nan, 2.0, 2.0]})
    found = {name: who.tolist() for name, who in gates.groups(tiny, "channel", frame)}
    assert found["fax"] == [False, False, False, True]
    assert found[gates.NO_VALUE] == [False, True, False, False]
    assert [n for n, who in gates.groups(tiny, "age", frame) if who.any()] == [
        "1 or less",
        "1 to 2",
        gates.NO_VALUE,
    ]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"floor": 0.9999}, "floor"),
        ({"max_calibration_error": 0.0001}, "calibration"),
        ({"max_latency_ms": 1e-6}, "latency"),
        ({"max_size_mb": 1e-6}, "size"),
    ],
)
def test_each_limit_alone_keeps_a_model_out(
    tiny: Contract, tmp_path: Path, setting: dict[str, float], name: str
) -> None:
    model, rows = models.classifier(tmp_path / "new", tiny), models.tiny_prepared()
    verdict = gates.judge(models.changed(tiny, gates=setting), rows, model, None)
    assert _failed(verdict) == {name}
    assert verdict.reason == f"Not promoted: {_detail(verdict, name)}."
    assert gates.judge(tiny, rows, model, None).promote


def test_several_failures_are_all_named(tiny: Contract, tmp_path: Path) -> None:
    strict = models.changed(tiny, gates={"floor": 0.9999, "max_size_mb": 1e-6})
    verdict = gates.judge(
        strict, models.tiny_prepared(), models.classifier(tmp_path / "new", tiny), None
    )
    assert _failed(verdict) == {"floor", "size"}
    assert verdict.reason.endswith("(also failed: size).")


@pytest.mark.parametrize("metric", ["rmse", "mae", "r2"])
def test_regression_is_judged_in_the_direction_of_its_metric(tmp_path: Path, metric: str) -> None:
    of = models.changed(models.numbers(), train={"metric": {"name": metric}})
    rows = models.prepared(models.numbers_frame(1000, 1), models.numbers_frame(600, 2))
    good, poor = (models.regressor(tmp_path / f"{slope}", of, slope) for slope in (3.0, 2.5))
    assert gates.judge(of, rows, good, None).promote
    there, back = gates.judge(of, rows, good, poor), gates.judge(of, rows, poor, good)
    assert there.promote
    assert not back.promote
    assert there.comparison is not None
    assert there.comparison.difference > 0
    assert there.calibration_error is None


def test_the_floor_of_a_metric_to_minimise_is_its_largest_value(tmp_path: Path) -> None:
    rows = models.prepared(models.numbers_frame(1000, 1), models.numbers_frame(600, 2))
    model = models.regressor(tmp_path / "new", models.numbers())
    for floor, passes in ((1.0, False), (3.0, True)):  # the noise is 2
        of = models.changed(models.numbers(), gates={"floor": floor})
        verdict = gates.judge(of, rows, model, None)
        assert verdict.promote is passes
        assert f"must be at most {floor:g}" in _detail(verdict, "floor")


def test_the_dummy_is_the_best_constant_of_the_metric(tmp_path: Path) -> None:
    train, test = models.numbers_frame(999, 1), models.numbers_frame(200, 2)
    train["y"] = np.abs(train["y"])
    test["y"] = np.abs(test["y"])
    rows = models.prepared(train, test)
    model = models.regressor(tmp_path / "new", models.numbers())
    for metric, best in (
        ("mae", train["y"].median()),
        ("rmse", train["y"].mean()),
        ("rmsle", np.expm1(np.log1p(train["y"]).mean())),
    ):
        of = models.changed(models.numbers(), train={"metric": {"name": metric}})
        np.testing.assert_allclose(gates.rival_output(of, rows, model, None), best)


def test_a_metric_that_the_rows_do_not_define_promotes_nothing(
    tiny: Contract, tmp_path: Path
) -> None:
    rows = models.tiny_prepared()
    rows.test["fraud"] = "no"
    verdict = gates.judge(tiny, rows, models.classifier(tmp_path / "new", tiny), None)
    assert not verdict.promote
    assert verdict.comparison is None
    assert "auc cannot be measured" in verdict.reason
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_a_champion_that_learnt_from_test_rows_is_noted(tiny: Contract, tmp_path: Path) -> None:
    rows = models.tiny_prepared(test_from_time="2024-03-01T00:00:00Z")
    new = models.classifier(tmp_path / "new", tiny)
    for name, until, noted in (("late", "2024-03-02", 1), ("early", "2024-02-20", 0)):
        old = models.classifier(
            tmp_path / name, tiny, noise=0.1, data={"test_from_time": f"{until}T00:00:00Z"}
        )
        verdict = gates.judge(tiny, rows, new, old)
        assert len(verdict.notes) == noted
        assert verdict.promote


def test_another_split_than_the_champions_is_noted(tiny: Contract, tmp_path: Path) -> None:
    other = models.changed(tiny, data={"split": {"test": 0.2, "seed": 5}})
    old = models.classifier(tmp_path / "old", other, noise=0.1)
    new = models.classifier(tmp_path / "new", tiny)
    assert "chosen otherwise" in gates.judge(tiny, models.tiny_prepared(), new, old).notes[0]
    same = models.classifier(tmp_path / "same", tiny, noise=0.1)
    assert not gates.judge(tiny, models.tiny_prepared(), new, same).notes


def test_the_same_inputs_give_the_same_verdict(tiny: Contract, tmp_path: Path) -> None:
    of = models.changed(tiny, gates={"slices": {"columns": ["channel"]}})
    new, old = models.classifier(tmp_path / "n", of), models.classifier(tmp_path / "o", of, 0.02)
    first, second = (gates.judge(of, models.tiny_prepared(), new, old) for _ in range(2))
    measured = {"latency_ms", "checks"}
    assert first.model_dump(exclude=measured) == second.model_dump(exclude=measured)
    assert Verdict.model_validate_json(first.model_dump_json()) == first


def test_models_of_images_are_judged_alike(tmp_path: Path) -> None:
    of = pictures.make_contract()
    new, old = (
        pictures.make_bundle(tmp_path / name, of, pictures.network(of, "mlp", seed=seed))
        for seed, name in enumerate(("new", "old"))
    )
    rows = pictures.prepared(of, new, rows=600, wrong=60)
    first = gates.judge(of, rows, new, None)
    assert first.promote
    assert first.challenger_metrics["accuracy"] == pytest.approx(0.9)
    against = gates.judge(of, rows, new, old)
    assert against.against == old.version
    assert against.promote
    assert against.latency_ms > 0
    assert [s.column for s in against.slices] == ["brightness"] * 4
    assert sum(s.rows for s in against.slices) == 600
    assert all(s.comparison is not None for s in against.slices)


def test_a_champion_of_another_image_size_is_replaced_by_the_dummy(tmp_path: Path) -> None:
    of = pictures.make_contract()
    before = pictures.make_contract(size=10)
    new, old = (
        pictures.make_bundle(tmp_path / name, c, pictures.network(c, "mlp"))
        for name, c in (("new", of), ("old", before))
    )
    verdict = gates.judge(of, pictures.prepared(of, new), new, old)
    assert verdict.against == "dummy"
    assert "cannot score these rows (it sees images of" in verdict.notes[0]
