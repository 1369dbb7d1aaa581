"""Permutation importance through real ONNX models whose inputs are known; errors on images."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from driftmill.bundle import Bundle
from driftmill.contract import Contract, Metric
from driftmill.evaluate import explain
from driftmill.features import IMAGE
from tests.conftest import tiny_frame
from tests.evaluate import models, pictures


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


def test_the_worst_errors_are_those_that_the_model_is_surest_of(picture_model: Bundle) -> None:
    model = picture_model
    test = pictures.prepared(model.manifest.contract, model, wrong=40).test
    output = model.predict(test)
    found, trouble = explain.worst_errors(model, test, output)
    assert trouble == ""
    assert len(found) == explain.ERRORS
    stated = [error.probability for error in found]
    assert stated == sorted(stated, reverse=True)
    assert stated[0] == output[:40].max()
    wrong = {test[IMAGE][row].tobytes(): row for row in range(40)}
    for error in found:
        row = wrong[error.image.tobytes()]  # none of the right answers is shown
        assert error.truth == test["label"][row]
        assert error.answer == pictures.LABELS[output[row].argmax()]
        assert error.answer != error.truth
        assert error.seen is not None
        assert error.seen.shape == (8, 8)


def test_no_error_is_no_picture(picture_model: Bundle) -> None:
    model = picture_model
    test = pictures.prepared(model.manifest.contract, model, wrong=0).test
    assert explain.worst_errors(model, test, model.predict(test)) == ([], "")


def test_errors_stand_alone_where_nothing_explains_them(tmp_path: Path) -> None:
    of = pictures.make_contract()
    for family, with_weights, reason in (
        ("small-cnn", False, r"weights\.safetensors does not hold a small-cnn"),
        ("mlp", True, "keeps no places"),
    ):
        net = pictures.network(of, family)
        model = pictures.make_bundle(tmp_path / family, of, net, with_weights=with_weights)
        test = pictures.prepared(of, model, wrong=5).test
        found, trouble = explain.worst_errors(model, test, model.predict(test))
        assert [error.seen for error in found] == [None] * 5
        assert re.search(reason, trouble)


def test_errors_stand_alone_without_pytorch(
    picture_model: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = picture_model
    test = pictures.prepared(model.manifest.contract, model, wrong=5).test
    for name in ("gradcam", "nets"):
        monkeypatch.delitem(sys.modules, f"driftmill.vision.{name}", raising=False)
        monkeypatch.delattr(f"driftmill.vision.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    found, trouble = explain.worst_errors(model, test, model.predict(test))
    assert len(found) == 5
    assert trouble == "Grad-CAM needs the package torch, which is not installed here."
