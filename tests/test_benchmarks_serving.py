"""What the serving benchmark makes of its measurements; it is run by hand, not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import catalogue, drive, report, soak
from benchmarks.serving.catalogue import ECHO, OURS, SERVICES
from benchmarks.serving.drive import Load

PEER, SLOW = "kserve, onnx", "bentoml, onnx"
RECORDS = [{"x": i / 8, "k": "a"} for i in range(64)]


def measured(rates: dict[str, float], failed: str = "") -> dict[str, Any]:
    """A report in which services answer so many requests a second."""
    loads = {
        name: [Load(int(rate * f), 1.0, 1.0, 1.9, 3.0, 0, 0.05) for f in (0.5, 1, 2)]
        for name, rate in rates.items()
    }
    return {
        "date": "2026-01-02",
        "machine": {"cores": 2, "cpu": "a processor", "python": "3.11"},
        "rounds": 3,
        "seconds": 1.0,
        "notes": ["a note"],
        "ours": {"resident_mb": [180.0, 240.0], "start_s": [1.0, 9.0, 2.0]},
        "open_loop": {
            OURS: {"rate": 7.0, "p50_ms": 1.0, "p99_ms": 2.0, "p999_ms": 30.0, "failed": 0}
        },
        "services": [
            {
                "service": name,
                "version": "1",
                "failed": failed if name == SLOW else "",
                "difference": 0.0,
                "ready_s": [1.0],
                "memory_mb": [100.0],
                "cells": []
                if failed and name == SLOW
                else [
                    report.cell(rows, connections, loads[name])
                    for rows in report.ROWS
                    for connections in report.CONNECTIONS
                ],
            }
            for name in rates
        ],
    }


def test_goals_compare_ours_with_the_fastest_peer() -> None:
    found = measured({ECHO: 3000, OURS: 1400, PEER: 200, SLOW: 20})
    passed = {goal.name: goal.passed for goal in report.goals(found, None)}
    assert list(passed.values()) == [
        False,  # 7 times, not 10
        False,  # less than half
        True,  # p99 at one connection
        True,  # 7 times, 5 wanted
        False,  # open loop: 30 ms
        True,  # memory
        None,  # no soak
        True,  # the median of the starts
        True,  # none failed
    ]
    assert report.best_peer(found, 1, 64) == PEER


def test_a_soak_counts_for_memory() -> None:
    found = measured({OURS: 1000})
    soaked = {"requests": 10, "growth": 0.2, "points": [{"resident_mb": 260.0}]}
    said = {goal.name: (goal.measured, goal.passed) for goal in report.goals(found, soaked)}
    assert said["memory <= 250 MB"] == ("260 MB", False)
    assert said["memory flat: grows <= 5% in 10 requests"] == ("20 %", False)
    assert said["half of the bare echo, 1 row, 64 connections"] == ("not measured", None)


def test_a_peer_that_failed_is_named_with_the_reason(tmp_path: Path) -> None:
    found = measured({ECHO: 3000, OURS: 2000, SLOW: 20}, failed="not installed: no wheel")
    text = report.markdown(found, report.goals(found, None))
    assert f"- failed: {SLOW}: not installed: no wheel" in text
    assert "| driftmill | 2000 (1000-4000) · 1.0 · 1.9 |" in text
    report.draw(found, tmp_path / "p.svg")
    assert OURS in (tmp_path / "p.svg").read_text()


def test_a_cell_takes_failed_answers_off() -> None:
    cell = report.cell(1, 1, [Load(100, 1.0, 1.0, 1.0, 1.0, 40)])
    assert (cell["requests_per_s"], cell["failed"]) == (60, 40)


@pytest.mark.parametrize("service", SERVICES.values(), ids=lambda s: s.name)
def test_requests_are_one_line_each_and_differ(service: catalogue.Service) -> None:
    for rows, count in ((1, 64), (32, 2)):
        sent = drive.bodies(service, RECORDS, rows)
        assert len(set(sent)) == count
        for body in sent:  # wrk and oha read one a line
            assert b"\n" not in body
            json.loads(body)


def test_every_service_has_an_environment_and_a_version() -> None:
    for service in SERVICES.values():
        pins = catalogue.ENVIRONMENTS.get(service.environment, ())
        assert not service.environment or any(
            pin.partition("==")[0].partition("[")[0] == service.project for pin in pins
        )


def test_codes_are_summed_over_versions() -> None:
    page = (
        "# HELP model_requests_total requests\n"
        'model_requests_total{code="200",model="m",version="a"} 2.0\n'
        'model_requests_total{code="200",model="m",version="b"} 3.0\n'
        'model_requests_total{code="422",model="m",version="b"} 1.0\n'
        "up 1.0\n"
    )
    assert soak.codes(page) == {"200": 5, "422": 1}
    assert len(soak.series(page)) == 4


def test_growth_leaves_the_first_tenth_out() -> None:
    assert soak.growth([100.0] * 10 + [200.0] * 90) == 0
    assert soak.growth([100.0 + i for i in range(100)]) == pytest.approx(80 / 114.5)
