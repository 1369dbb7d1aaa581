"""Writes what the chart `helm/driftmill` says of its values: `python -m k8s.chart`.

| file | what |
|---|---|
| `values.yaml` | every value with its default and a comment |
| `values.schema.json` | JSON Schema (draft 7, as Helm reads it), strict at every level |
| `README.md` | between two marks the table of all values |
| `files/*.json` | Grafana's dashboards |

All of it comes from `driftmill.values` and `driftmill.monitor.dashboards`. With `--check` nothing
is written; exit code 1 says that a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from pydantic.fields import FieldInfo

from driftmill.contract import section_in
from driftmill.monitor import dashboards
from driftmill.store import write_atomic
from driftmill.values import KUBERNETES, Section, Values

CHART = Path("helm/driftmill")
#: Version of Kubernetes whose definitions the schema takes.
KUBERNETES_VERSION = "1.34.0"
MARKS = ("<!-- values -->", "<!-- /values -->")
_WIDTH = 100
_HEAD = (
    "# Made by `make chart` from driftmill/values.py; do not edit. All values and their defaults.\n"
)


def main(arguments: list[str] | None = None) -> int:
    """Write, or check, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m k8s.chart", description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where out of date")
    options = parser.parse_args(arguments)
    old = [path for path, text in files().items() if _read(path) != text]
    for path in old:
        if options.check:
            print(f"{path} is out of date: make chart", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, files()[path].encode())
            print(path)
    return 1 if options.check and old else 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


@cache
def files() -> dict[Path, str]:
    """The text of each file by its path."""
    readme = (CHART / "README.md").read_text()
    before, _, rest = readme.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return {
        CHART / "values.yaml": values_yaml(),
        CHART / "values.schema.json": json.dumps(schema(), indent=1) + "\n",
        CHART / "README.md": f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}",
        **{CHART / "files" / name: text for name, text in dashboards.files().items()},
    }


# values.yaml


def values_yaml() -> str:
    """Every value with its default, below its documentation."""
    return _HEAD + "".join(_yaml(Values(), 0))


def _yaml(section: Section, depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        yield "\n" if depth == 0 else ""
        width = _WIDTH - len(pad) - 2
        for line in textwrap.wrap(_about(field), width):
            yield f"{pad}# {line}\n"
        if isinstance(value, Section):
            yield f"{pad}{key}:\n"
            yield from _yaml(value, depth + 1)
        else:
            plain = section.model_dump(mode="json", by_alias=True)[key]
            text = yaml.safe_dump({key: plain}, sort_keys=False, width=_WIDTH)
            yield textwrap.indent(text, pad)


def _about(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


# values.schema.json


def schema() -> dict[str, Any]:
    """The JSON Schema of the values."""
    found = Values.model_json_schema(by_alias=True)
    wanted: set[str] = set()
    body = _plain(found, wanted)
    definitions = body.pop("$defs")
    while missing := wanted - definitions.keys():
        for name in sorted(missing):
            definitions[name] = _strict(_kubernetes()[name], wanted)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of Driftmill's chart",
        **{k: v for k, v in body.items() if k != "title"},
        "definitions": dict(sorted(definitions.items())),
    }


def _plain(node: Any, wanted: set[str]) -> Any:
    """A schema of Pydantic's with references as draft 7 has them, and to Kubernetes' kinds."""
    if isinstance(node, list):
        return [_plain(item, wanted) for item in node]
    if not isinstance(node, dict):
        return node
    if KUBERNETES in node:
        name = f"io.k8s.api.{node[KUBERNETES]}"
        wanted.add(name)
        about = {k: v for k, v in node.items() if k in ("description", "default")}
        return {**about, "$ref": f"#/definitions/{name}"}
    plain = {}
    for key, value in node.items():
        # Titles that Pydantic makes of the names say nothing; a field may be called so, too.
        if key == "title" and isinstance(value, str):
            continue
        reference = key == "$ref"
        plain[key] = value.replace("$defs", "definitions") if reference else _plain(value, wanted)
    if "patternProperties" in plain:
        plain["additionalProperties"] = False
    # A description beside a reference is for people and editors: draft 7 does not read it. (`allOf`
    # would add a line to each of Helm's messages.)
    return plain


def _strict(node: Any, wanted: set[str]) -> Any:
    """A definition of Kubernetes without its prose, in which unknown keys are mistakes."""
    if isinstance(node, list):
        return [_strict(item, wanted) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        wanted.add(name)
        return {"$ref": f"#/definitions/{name}"}
    kept = {
        k: {n: _strict(p, wanted) for n, p in v.items()}
        if k == "properties"
        else _strict(v, wanted)
        for k, v in node.items()
        if k == "properties" or not (k in ("description", "format") or k.startswith("x-"))
    }
    if "properties" in kept:
        kept.setdefault("additionalProperties", False)
    return kept


@cache
def _kubernetes() -> dict[str, Any]:
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    path = folder / f"v{KUBERNETES_VERSION}-local-strict" / "_definitions.json"
    definitions: dict[str, Any] = json.loads(path.read_text())["$defs"]
    return definitions


# README.md


def table() -> str:
    """Markdown table of all values."""
    rows = [f"| `{path}` | `{default}` | {about} |" for path, default, about in _rows(Values(), "")]
    return "\n".join(["| value | default | what |", "|---|---|---|", *rows])


def _rows(section: Section, path: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(section).model_fields.items():
        here, value = f"{path}{field.alias or name}", getattr(section, name)
        about = _about(field).replace("|", "\\|")
        if isinstance(value, Section):
            yield from _rows(value, f"{here}.")
            continue
        plain = section.model_dump(mode="json", by_alias=True)[field.alias or name]
        yield here, json.dumps(plain).replace("|", "\\|"), about
        if (inner := section_in(field.annotation)) is not None:
            # What overrides the settings for all models has their names.
            for item, settings in inner.model_fields.items():
                kind = settings.annotation
                if not (isinstance(kind, type) and issubclass(kind, Section)):
                    default = "" if settings.is_required() else json.dumps(settings.default)
                    yield f"{here}.*.{settings.alias or item}", default, _about(settings)
                else:
                    yield f"{here}.*.{settings.alias or item}", "{}", _about(settings)


if __name__ == "__main__":
    sys.exit(main())
