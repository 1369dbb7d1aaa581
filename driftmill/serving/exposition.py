"""Several texts in Prometheus' format as one.

Of a family the lines must stand together, below one description:
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from collections.abc import Iterable


def merge(parts: Iterable[tuple[str, str]]) -> str:
    """One text with the series of all.

    Args:
        parts: texts as `prometheus_client.generate_latest` makes them, each with the label that its
            series get, such as `worker="0"`; empty: none.

    Returns:
        Families in the order in which they first come. Of a series that several have, the first.
    """
    heads: dict[str, list[str]] = {}
    series: dict[str, dict[str, str]] = {}
    for label, text in parts:
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                if family not in series:
                    heads[family], series[family] = [], {}
                if line not in heads[family]:
                    heads[family].append(line)
            else:
                name, _, value = line.rpartition(" ")
                series[family].setdefault(_with(name, label), value)
    lines = []
    for family, head in heads.items():
        lines += head
        lines += [f"{name} {value}" for name, value in series[family].items()]
    return "".join(f"{line}\n" for line in lines)


def _with(series: str, label: str) -> str:
    """The name of a series with one label more."""
    if not label:
        return series
    name, brace, labels = series.partition("{")
    return f"{name}{{{label},{labels}" if brace else f"{name}{{{label}}}"
