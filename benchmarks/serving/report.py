"""What the benchmark says: tables, goals and a picture of its measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.catalogue import ECHO, OURS, SERVICES
from benchmarks.serving.drive import Load
from benchmarks.serving.soak import FLAT

CONNECTIONS = (1, 16, 64)
ROWS = (1, 32)


@dataclass(frozen=True)
class Goal:
    """Something wanted of ours."""

    name: str
    measured: str
    passed: bool | None
    """None where it was not measured."""


def cell(rows: int, connections: int, loads: Sequence[Load]) -> dict[str, Any]:
    """The rounds of a service at so many rows and connections, by their medians. Times in ms."""
    rates = [load.rate for load in loads]
    return {
        "rows": rows,
        "connections": connections,
        "requests_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "p50_ms": statistics.median(load.p50 for load in loads),
        "p99_ms": statistics.median(load.p99 for load in loads),
        "cpu_ms": statistics.median(load.cpu for load in loads),
        "failed": sum(load.failed for load in loads),
        "rounds": [asdict(load) for load in loads],
    }


def find(report: dict[str, Any], name: str, rows: int, connections: int) -> dict[str, Any] | None:
    """A cell, or None where it was not measured."""
    for result in report["services"]:
        if result["service"] == name:
            for one in result["cells"]:
                if (one["rows"], one["connections"]) == (rows, connections):
                    return dict(one)
    return None


def best_peer(
    report: dict[str, Any], rows: int, connections: int, engine: str = "onnx"
) -> str | None:
    """The peer with this engine that answers most requests, or None."""
    rates = {
        name: one["requests_per_s"]
        for name, service in SERVICES.items()
        if name != OURS and service.engine == engine
        if (one := find(report, name, rows, connections)) is not None
    }
    return max(rates, key=rates.__getitem__) if rates else None


def goals(report: dict[str, Any], soak: dict[str, Any] | None) -> list[Goal]:
    """What is wanted of ours, and whether it is so.

    Args:
        report: of a run.
        soak: of a run with `--soak`, or None.
    """
    found = [
        _times(report, 1, 10),
        _echo(report),
        _limit(
            "p99 at 1 connection <= 2 ms",
            find(report, OURS, 1, 1), lambda one: float(one["p99_ms"]), 2, "ms",
        ),
        _times(report, 32, 5),
        _limit(
            "open loop at 70 % of capacity: p99.9 <= 25 ms",
            report["open_loop"].get(OURS), lambda one: float(one["p999_ms"]), 25, "ms",
        ),
        _limit(
            "memory <= 250 MB",
            report["ours"], lambda one: max([*one["resident_mb"], *_soaked(soak)]), 250, "MB",
        ),
        _limit(
            f"memory flat: grows <= {FLAT:.0%} in {soak['requests']:,} requests"
            if soak else "memory flat (run with --soak)",
            soak, lambda one: 100 * float(one["growth"]), 100 * FLAT, "%",
        ),
        _limit(
            "start to ready <= 3 s",
            report["ours"], lambda one: statistics.median(one["start_s"]), 3, "s",
        ),
    ]  # fmt: skip
    failed = sum(
        one["failed"] for r in report["services"] if r["service"] == OURS for one in r["cells"]
    )
    return [*found, Goal("no request failed", str(failed), failed == 0)]


def _soaked(soak: dict[str, Any] | None) -> list[float]:
    return [point["resident_mb"] for point in soak["points"]] if soak else []


def _times(report: dict[str, Any], rows: int, wanted: float) -> Goal:
    name = f">= {wanted:g} x the best peer on ONNX, {rows} row{'s' * (rows > 1)}, 64 connections"
    peer, ours = best_peer(report, rows, 64), find(report, OURS, rows, 64)
    if peer is None or ours is None:
        return Goal(name, "not measured", None)
    other = find(report, peer, rows, 64)
    assert other is not None
    ratio = ours["requests_per_s"] / max(other["requests_per_s"], 1e-9)
    return Goal(name, f"{ratio:.1f} x {peer}", ratio >= wanted)


def _echo(report: dict[str, Any]) -> Goal:
    name = "half of the bare echo, 1 row, 64 connections"
    echo, ours = find(report, ECHO, 1, 64), find(report, OURS, 1, 64)
    if echo is None or ours is None:
        return Goal(name, "not measured", None)
    part = ours["requests_per_s"] / echo["requests_per_s"]
    return Goal(name, f"{part:.0%}", part >= 0.5)


def _limit(
    name: str,
    measured: dict[str, Any] | None,
    value: Callable[[dict[str, Any]], float],
    most: float,
    unit: str,
) -> Goal:
    if not measured:
        return Goal(name, "not measured", None)
    return Goal(name, f"{value(measured):.3g} {unit}", value(measured) <= most)


def markdown(report: dict[str, Any], found: list[Goal]) -> str:
    """The tables of a run."""
    machine = report["machine"]
    lines = [
        f"{report['date']} · {machine['cores']} cores · {machine['cpu']} · "
        f"Python {machine['python']} · {report['rounds']} rounds of {report['seconds']:g} s",
    ]
    for rows in ROWS:
        lines += ["", f"**{rows} row{'s' * (rows > 1)} a request**", ""]
        lines += _table(
            ["service", *(f"{c} conn.: req/s (min-max) · p50 · p99 ms" for c in CONNECTIONS),
             "CPU ms a request", "ours is"],
            [_row(report, result, rows) for result in report["services"] if result["cells"]],
        )  # fmt: skip
    lines += ["", "**Processes**", ""]
    lines += _table(
        ["service", "version", "first answer s", "memory MB", "largest difference"],
        [
            [r["service"], r["version"], f"{statistics.median(r['ready_s']):.1f}",
             f"{max(r['memory_mb']):.0f}", f"{r['difference']:.1g}"]
            for r in report["services"] if r["cells"]
        ],
    )  # fmt: skip
    if report["open_loop"]:
        lines += ["", "**Constant rate, 70 % of what each did at 64 connections**", ""]
        lines += _table(
            ["service", "requests/s", "p50 ms", "p99 ms", "p99.9 ms", "failed"],
            [
                [name, f"{one['rate']:.0f}", f"{one['p50_ms']:.1f}", f"{one['p99_ms']:.1f}",
                 f"{one['p999_ms']:.1f}", str(one["failed"])]
                for name, one in report["open_loop"].items()
            ],
        )  # fmt: skip
    failed = [r for r in report["services"] if r["failed"]]
    lines += ["", *(f"- failed: {r['service']}: {r['failed']}" for r in failed)]
    lines += [f"- {note}" for note in report["notes"]]
    lines += ["", "**Goals**", ""]
    said = {True: "pass", False: "FAIL", None: "-"}
    lines += _table(["goal", "measured", ""], [[g.name, g.measured, said[g.passed]] for g in found])
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _row(report: dict[str, Any], result: dict[str, Any], rows: int) -> list[str]:
    cells = [find(report, result["service"], rows, c) for c in CONNECTIONS]
    texts = []
    for one in cells:
        if one is None:
            texts.append("-")
            continue
        failed = f" ({one['failed']} failed)" if one["failed"] else ""
        texts.append(
            f"{one['requests_per_s']:.0f} ({one['lowest']:.0f}-{one['highest']:.0f}) · "
            f"{one['p50_ms']:.1f} · {one['p99_ms']:.1f}{failed}"
        )
    last, ours = cells[-1], find(report, OURS, rows, CONNECTIONS[-1])
    ratio, cpu = "-", "-"
    if last is not None:
        cpu = f"{last['cpu_ms']:.2g}"
        if ours is not None and last["requests_per_s"]:
            ratio = f"{ours['requests_per_s'] / last['requests_per_s']:.2g} x"
    return [result["service"], *texts, cpu, ratio]


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture of the requests a second at 64 connections; PNG or SVG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"": "#9aa0a6", "onnx": "#5b8db8", "scikit-learn": "#c9b27c"}
    named = {"": "no model", "onnx": "the same ONNX model", "scikit-learn": "scikit-learn pipeline"}
    names = [r["service"] for r in report["services"] if r["cells"]]
    first = {n: find(report, n, 1, 64) for n in names}
    names.sort(key=lambda n: one["requests_per_s"] if (one := first[n]) else 0.0)
    names = [r["service"] for r in report["services"] if not r["cells"]] + names
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.28 * len(names) + 1.6), sharey=True)
    for axis, rows in zip(axes, ROWS, strict=True):
        for place, name in enumerate(names):
            one = find(report, name, rows, 64)
            if one is None or not one["requests_per_s"]:
                axis.text(12, place, "failed", va="center", fontsize=8)
                continue
            rate, lowest = one["requests_per_s"], max(one["lowest"], 1.0)
            colour = "#d1495b" if name == OURS else colours[SERVICES[name].engine]
            axis.plot([lowest, one["highest"]], [place, place], color=colour, lw=2.5)
            axis.plot(rate, place, "o", color=colour, ms=7)
            axis.text(one["highest"] * 1.3, place, f"{rate:,.0f}", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(left=10, right=axis.get_xlim()[1] * 4)
        axis.grid(axis="x", color="#e3e3e3", lw=0.7)
        axis.set_axisbelow(True)
        axis.set_title(f"{rows} row{'s' * (rows > 1)} a request", fontsize=10)
        axis.set_xlabel("requests/s at 64 connections: median, min-max (log scale)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(-0.8, len(names) - 0.2)
    patches = [plt.Rectangle((0, 0), 1, 1, color="#d1495b", label=f"{OURS} (the same ONNX model)")]
    patches += [
        plt.Rectangle((0, 0), 1, 1, color=colours[engine], label=named[engine])
        for engine in ("onnx", "scikit-learn", "")
    ]
    figure.legend(handles=patches, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight() + 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
