"""The contract's reference as Markdown, made from the schema so that it cannot be out of date."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from driftmill.contract import METRICS, Contract, Timestamp, parse_duration, section_in

_HEAD = """\
# The contract

<!-- Made by `driftmill schema --markdown`; do not edit. -->

A contract is one YAML file that says what a model needs. `driftmill init DATA` drafts one from a
data file, `driftmill validate CONTRACT` checks it, and `driftmill schema` prints the JSON Schema
that gives editors completion and checks while you type. Fields without a default are needed;
unknown fields are mistakes. Durations are seconds, or texts such as `30s`, `5m`, `1h30m`, `2d`.

```yaml
apiVersion: driftmill/v1
model: payments
task: classification
data:
  source: file:payments.csv
  target: {name: fraud, labels: ["no", "yes"]}
  columns:
    - {name: amount, type: float, min: 0}
    - {name: channel, type: category, categories: [web, app]}
```
"""


def markdown() -> str:
    """The whole reference: a table for each section of the contract."""
    parts = [_HEAD, _section("Contract", "", Contract)]
    parts += [_section(f"`{path}`", path, model) for path, model in _walk(Contract, "")]
    parts.append(_metrics())
    return "\n".join(parts)


def _walk(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections below a model with their path, each followed by its own sections; one that is used
    twice is described where it stands first."""
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None or (path == "data" and name == "test"):
            continue
        many = "[]" if get_origin(field.annotation) is tuple else ""
        here = f"{path}.{name}{many}".lstrip(".")
        yield here, inner
        yield from _walk(inner, here)


def _section(title: str, path: str, model: type[BaseModel]) -> str:
    about = " ".join((model.__doc__ or "").split())
    rows = [_row(name, field, path) for name, field in model.model_fields.items()]
    head = "| field | type | default | description |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", about, "", head, *rows, ""])


def _row(name: str, field: FieldInfo, path: str) -> str:
    cells = [f"`{name}`", _type(field, path, name), _default(field), field.description or ""]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo, path: str, name: str) -> str:
    limits = [text for item in field.metadata for text in _limits(item)]
    annotation = field.annotation
    if (model := section_in(annotation)) is not None:
        target = "data.source" if (path, name) == ("data", "test") else f"{path}.{name}".lstrip(".")
        many = get_origin(annotation) is tuple
        anchor = target.replace(".", "").lower()
        text = f"{'list of ' if many else ''}[{model.__name__}](#{anchor})"
    elif any(getattr(item, "func", None) is parse_duration for item in field.metadata):
        return "duration"
    else:
        text = _name(annotation)
    return f"{text}, {', '.join(limits)}" if limits else text


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == Timestamp:
        return "time"
    if origin is Annotated:
        limits = [text for item in arguments[1:] for text in _limits(item)]
        return ", ".join([_name(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"map of {_name(arguments[0])} to {_name(arguments[1])}"
    if origin in (Union, types.UnionType):
        kinds = [_name(a) for a in arguments if a is not type(None)]
        return " or ".join([*kinds, "null"])
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return plain.get(annotation, "time")


def _limits(item: Any) -> Iterator[str]:
    """A constraint in words."""
    if isinstance(item, FieldInfo):
        for inner in item.metadata:
            yield from _limits(inner)
    signs = {
        annotated_types.Ge: ("≥", "ge"),
        annotated_types.Gt: (">", "gt"),
        annotated_types.Le: ("≤", "le"),
        annotated_types.Lt: ("<", "lt"),
    }
    if type(item) in signs:
        sign, attribute = signs[type(item)]
        yield f"{sign} {getattr(item, attribute):g}"
    elif isinstance(item, annotated_types.MinLen) and item.min_length == 1:
        yield "not empty"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "needed"
    if isinstance(field.default, BaseModel):
        return "see there"
    return f"`{json.dumps(field.default, default=str)}`"


def _metrics() -> str:
    rows = [f"| `{name}` | {task} | {way} |" for name, (way, task) in METRICS.items()]
    return "\n".join(["## Metrics", "", "| metric | task | |", "|---|---|---|", *rows, ""])
