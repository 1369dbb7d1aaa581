"""Permutation importance through real ONNX models whose inputs are known."""

from __future__ import annotations

from pathlib import Path

from driftmill.contract import Contract, Metric
from driftmill.evaluate import explain
from tests.conftest import tiny_frame
from tests.evaluate import models


def test_inputs_rank_by_what_the_model_owes_to_them(tiny: Contract, tmp_path: Path) -> None:
    model = models.classifier(tmp_path, tiny)  # looks at the amount alone
    first, *rest = explain.importance(model, tiny_frame(400, seed=2), tiny.metric)
    assert first.column == "amount"
    assert first.loss > 0.3
    assert first.spread > 0
    assert {i.column for i in rest} == {"age", "channel"}
    assert all((i.loss, i.spread) == (0, 0) for i in rest)


def test_a_category_counts_too(tiny: Contract, tmp_path: Path) -> None:
    turned = models.classifier(tmp_path, tiny, app=-1.0)
    found = {i.column: i for i in explain.importance(turned, tiny_frame(400), tiny.metric)}
    assert found["channel"].spread > 0


def test_a_metric_to_minimise_is_lost_by_rising(tmp_path: Path) -> None:
    of = models.numbers()
    found = explain.importance(
        models.regressor(tmp_path, of), models.numbers_frame(300), Metric.model_validate("rmse")
    )
    assert found[0].column == "x"
    assert found[0].loss > 10


def test_the_seed_decides_also_of_a_sample(tiny: Contract, tmp_path: Path) -> None:
    model, rows = models.classifier(tmp_path, tiny), tiny_frame(500)
    one, same, other = (
        explain.importance(model, rows, tiny.metric, seed, rows=100) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_rows_without_a_metric_have_no_importance(tiny: Contract, tmp_path: Path) -> None:
    rows = tiny_frame(100).assign(fraud="no")
    assert explain.importance(models.classifier(tmp_path, tiny), rows, tiny.metric) == []
