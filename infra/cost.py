"""What a platform of each size costs on each cloud: `python -m infra.cost`.

From the descriptions in `sizes/`, the machines in `modules/policy/machines.yaml` and the prices in
`prices.yaml` it writes the table in this folder's README. With `--check` nothing is written; exit
code 1 says that the table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
MARKS = ("<!-- cost -->", "<!-- /cost -->")
CLOUDS = {"aws": "AWS", "google": "Google", "azure": "Azure"}
SIZES = ("small", "medium", "large")
#: Hours of a month, as the clouds count them.
MONTH = 730
#: GiB of a node's disk (see the roots).
DISK = 100
#: What the table assumes of a size: GiB in the store; training runs a month on CPUs (they fit on
#: the machines that run anyway) and, by pool, hours of machines with GPUs.
USE: dict[str, dict[str, Any]] = {
    "small": {"store": 100, "gpu_hours": {"small": 20}},
    "medium": {"store": 1000, "gpu_hours": {"small": 400}},
    "large": {"store": 10000, "gpu_hours": {"small": 2000, "large": 60}},
}
#: Hours of one training run on one machine of a pool; a new node takes a tenth of an hour more.
RUN, START = 1.0, 0.1


@dataclass(frozen=True)
class Cost:
    """US dollars of one size on one cloud."""

    idle: float
    """A month in which nothing is trained."""
    runs: dict[str, tuple[float, float]]
    """One training run of an hour, by pool: on a spot machine, on demand."""
    month: float
    """A month of the use that is assumed."""


def main(arguments: list[str] | None = None) -> int:
    """Write, or check, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.cost", description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where out of date")
    options = parser.parse_args(arguments)
    readme = FOLDER / "README.md"
    old = readme.read_text()
    new = renewed(old)
    if new == old:
        return 0
    if options.check:
        print(f"{readme} is out of date: python -m infra.cost", file=sys.stderr)
        return 1
    readme.write_text(new)
    print(readme)
    return 0


def renewed(readme: str) -> str:
    """The README with the table as it is now."""
    before, _, rest = readme.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{table()}{MARKS[1]}{after}"


def load(name: str) -> dict[str, Any]:
    """A YAML file of this folder."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def table() -> str:
    """The table, as Markdown."""
    prices = load("prices.yaml")
    lines = [
        f"US dollars by approximate list prices, as of {prices['date']}, in "
        + ", ".join(f"{CLOUDS[c]} {prices['region'][c]}" for c in CLOUDS)
        + " ([prices.yaml](prices.yaml)).",
        "",
        "| size | cloud | idle, a month | a training run of an hour: spot / on demand | a month |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        for cloud, name in CLOUDS.items():
            found = cost(load(f"sizes/{size}.yaml"), cloud, USE[size], prices)
            runs = "; ".join(
                f"{pool} {spot:,.2f} / {full:,.2f}" for pool, (spot, full) in found.runs.items()
            )
            lines.append(f"| {size} | {name} | {found.idle:,.0f} | {runs} | {found.month:,.0f} |")
    lines += ["", "A month is the idle one and:", ""]
    for size in SIZES:
        hours = ", ".join(f"{n} hours of `{pool}`" for pool, n in USE[size]["gpu_hours"].items())
        lines.append(f"- {size}: {hours}, {USE[size]['store']} GiB in the store.")
    return "\n".join([*lines, ""])


def cost(platform: dict[str, Any], cloud: str, use: dict[str, Any], prices: dict[str, Any]) -> Cost:
    """What a platform costs on a cloud.

    Args:
        platform: its description.
        cloud: aws, google or azure.
        use: GiB in the store (`store`), hours of machines of each pool a month (`gpu_hours`).
        prices: as in `prices.yaml`.

    Raises:
        KeyError: there is no such machine, or no price of it.
    """
    machines = load("modules/policy/machines.yaml")
    others, cpu = prices["others"][cloud], platform["cpu"]
    hourly = prices["machines"][cloud]
    node = hourly[machines["cpu"][cloud][cpu["vcpus"]]]["on_demand"] * MONTH + DISK * others["disk"]
    idle = (others["control_plane"] + others["nat"]) * MONTH + cpu["min"] * node
    idle += _databases(platform, cloud, machines, prices)

    runs: dict[str, tuple[float, float]] = {}
    month = idle + use["store"] * others["store"]
    for pool, asked in platform["gpus"].items():
        price = hourly[machines["gpu"][cloud][asked["product"]][asked["per_node"]]]
        disk = DISK * others["disk"] / MONTH
        spot, full = price["spot"] + disk, price["on_demand"] + disk
        runs[pool] = ((RUN + START) * spot, (RUN + START) * full)
        # Spot comes first; how often it can be had is assumed to be its share of the pool.
        share = asked["spot_share"]
        month += use["gpu_hours"][pool] * (share * spot + (1 - share) * full)
    return Cost(idle=idle, runs=runs, month=month)


def _databases(
    platform: dict[str, Any], cloud: str, machines: dict[str, Any], prices: dict[str, Any]
) -> float:
    """A month of PostgreSQL and, where Kubeflow Pipelines needs it, MySQL."""
    asked = platform["database"]
    # On Azure, Kubeflow Pipelines is not wired.
    number = 2 if platform["pipelines"] and cloud != "azure" else 1
    machine = prices["databases"][cloud][machines["database"][cloud][asked["vcpus"]]]
    disk = asked["disk"] * prices["others"][cloud]["database_disk"]
    one: float = machine * MONTH + disk
    return number * one * (2 if asked["standby"] else 1)


if __name__ == "__main__":
    sys.exit(main())
