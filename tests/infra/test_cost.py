from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

from infra import cost
from tests.infra.conftest import CLOUDS, INFRA

PRICES = {
    "machines": {
        "aws": {
            "m7i.xlarge": {"on_demand": 0.2},
            "g4dn.xlarge": {"on_demand": 1.0, "spot": 0.25},
        }
    },
    "databases": {"aws": {"db.t4g.medium": 0.1}},
    "others": {
        "aws": {"control_plane": 0.1, "nat": 0.0, "disk": 0.0, "database_disk": 0.5, "store": 0.02}
    },
}
PLATFORM = {
    "cpu": {"vcpus": 4, "min": 2, "max": 4},
    "gpus": {"small": {"product": "Tesla-T4", "per_node": 1, "max": 4, "spot_share": 0.5}},
    "database": {"vcpus": 2, "disk": 20, "standby": False},
    "pipelines": False,
}


def test_a_small_platform_by_hand() -> None:
    found = cost.cost(PLATFORM, "aws", {"store": 100, "gpu_hours": {"small": 8}}, PRICES)
    assert found.idle == pytest.approx(730 * (0.1 + 2 * 0.2 + 0.1) + 20 * 0.5)
    assert found.runs["small"] == pytest.approx((1.1 * 0.25, 1.1 * 1.0))
    assert found.month - found.idle == pytest.approx(100 * 0.02 + 4 * 0.25 + 4 * 1.0)


def test_a_standby_and_the_pipelines_database_cost_as_much_again() -> None:
    use = {"store": 0, "gpu_hours": {"small": 0}}
    plain = cost.cost(PLATFORM, "aws", use, PRICES).idle
    one = 730 * 0.1 + 20 * 0.5
    platform = PLATFORM | {"pipelines": True}
    assert cost.cost(platform, "aws", use, PRICES).idle == pytest.approx(plain + one)
    platform |= {"database": {"vcpus": 2, "disk": 20, "standby": True}}
    assert cost.cost(platform, "aws", use, PRICES).idle == pytest.approx(plain + 3 * one)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_machine_has_a_price_and_every_price_a_machine(cloud: str) -> None:
    machines, prices = cost.load("modules/policy/machines.yaml"), cost.load("prices.yaml")
    gpu = {m for sizes in machines["gpu"][cloud].values() for m in sizes.values()}
    assert prices["machines"][cloud].keys() == gpu | set(machines["cpu"][cloud].values())
    assert prices["databases"][cloud].keys() == set(machines["database"][cloud].values())
    for name in gpu:
        price = prices["machines"][cloud][name]
        assert 0 < price["spot"] < price["on_demand"], name


def test_prices_have_a_date_and_sources() -> None:
    prices = cost.load("prices.yaml")
    assert isinstance(prices["date"], datetime.date)
    for cloud in CLOUDS:
        assert all(url.startswith("https://") for url in prices["sources"][cloud])


@pytest.mark.parametrize("size", cost.SIZES)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_alarm_does_not_sound_in_a_month_as_foreseen(size: str, cloud: str) -> None:
    platform = yaml.safe_load((INFRA / f"sizes/{size}.yaml").read_text())
    found = cost.cost(platform, cloud, cost.USE[size], cost.load("prices.yaml"))
    assert found.month <= platform["budget"]["monthly"]


def test_the_table_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["--check"]) == 0, capsys.readouterr().err


def test_an_old_table_is_found_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("prices.yaml", "modules/policy/machines.yaml", "sizes/small.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((INFRA / name).read_text())
    (tmp_path / "README.md").write_text(f"before\n{cost.MARKS[0]}\nold\n{cost.MARKS[1]}\nafter\n")
    monkeypatch.setattr(cost, "FOLDER", tmp_path)
    monkeypatch.setattr(cost, "SIZES", ("small",))
    assert cost.main(["--check"]) == 1
    assert "is out of date: python -m infra.cost" in capsys.readouterr().err
    assert cost.main([]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| small | AWS |" in text
    assert cost.main(["--check"]) == 0
