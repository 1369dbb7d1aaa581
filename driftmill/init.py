"""Draft a contract from a data file (types, ranges, categories, target, id and time) or a folder of
images (labels, size, colours, formats), with comments that say what was seen, so that a person can
correct what a program cannot know."""

from __future__ import annotations

import csv
import gzip
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from driftmill import contract as contracts
from driftmill.contract import Column, Contract, Csv, Image, did_you_mean

#: Texts that mean "no value".
MISSING = Csv().missing
#: A text column with more different values than this is taken for free text, and a number with
#: more of them is a quantity to predict, not a class.
MAX_CATEGORIES, MAX_CLASSES = 50, 10
#: Rows that are looked at.
MAX_ROWS = 500_000
#: Images that are looked at, and the longest side that is proposed.
MAX_IMAGES, MAX_SIDE = 500, 224
#: Categories of a column are listed up to this many; beyond it training learns them.
MAX_LISTED = 20
TARGETS = ("target", "label", "class", "outcome", "y", "default", "churn", "fraud", "species")
FALSE_WORDS = ("0", "false", "no", "n", "f", "negative", "ham", "good")
#: Formats that are tried on a column of texts after ISO 8601.
TIME_FORMATS = (
    "%d.%m.%Y",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y %H:%M:%S",
    "%m/%d/%Y",
    "%m/%d/%Y %H:%M",
    "%m/%d/%Y %H:%M:%S",
    "%d/%m/%Y",
    "%d/%m/%Y %H:%M",
    "%d/%m/%Y %H:%M:%S",
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M",
    "%Y/%m/%d %H:%M:%S",
)
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_.\- ]*$")
_INT = re.compile(r"[+-]?\d+(\.0+)?")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}(:\d{2}(:\d{2}(\.\d+)?)?)?(Z|[+-]\d{2}:?\d{2})?)?")
_ID_NAME = re.compile(r"(^|[_\- .])((?i:id|uuid|guid|key|instant|index|nr|number))$|[a-z]I[dD]$")


class InitError(ValueError):
    """A file that no contract can be drafted from; the message says why."""


@dataclass(frozen=True)
class Draft:
    """A contract, ready to be written."""

    text: str
    """YAML with comments."""
    contract: Contract
    notes: tuple[str, ...]
    """What a person should look at."""


@dataclass
class _Seen:
    """What was seen in one column."""

    name: str
    kind: str
    """`float`, `int`, `bool`, `category`, `time`, or `text` (too many different texts)."""
    values: pd.Series[Any]
    """Values that are not missing, as texts, or as numbers where they are some."""
    missing: int
    unique: int
    time_format: str | None = None
    texts: pd.Series[Any] | None = None
    """Numbers as they are written."""

    @property
    def complete(self) -> bool:
        """Whether it names each row: no value is missing and none comes twice."""
        return self.missing == 0 and self.unique == len(self.values)


def draft(data: Path, *, target: str | None = None, folder: Path | None = None) -> Draft:
    """Draft a contract from a CSV or Parquet file (gzip is unpacked), or from a folder that has a
    sub-folder of images for each label.

    Args:
        data: the file or folder.
        target: column to predict; None guesses one by its name, else takes the last. Of a folder
            it is what the label is called, `label` by default.
        folder: where the contract will lie; the source is written relative to it where it is
            near, else as an absolute path.

    Raises:
        InitError: the file cannot be read, has no rows, or no such column; the folder has no two
            labels, or no image that can be read.
    """
    if data.is_dir():
        return _draft_images(data, target or "label", folder or data.resolve().parent)
    frame, dialect = _read(data)
    if len(frame) < 2 or frame.shape[1] < 2:
        raise InitError(
            f"{data} has {len(frame)} rows and {frame.shape[1]} columns;"
            " a contract needs a table with an input and a target"
        )
    if twice := sorted({str(n) for n in frame.columns[frame.columns.duplicated()]}):
        raise InitError(f"{data} has the column {', '.join(twice)} twice; rename one")
    seen = {str(name): _look(str(name), frame[name]) for name in frame.columns}
    notes: list[str] = []
    if len(frame) == MAX_ROWS:
        notes.append(f"only the first {MAX_ROWS} rows were looked at")
    if target is None:
        target = _guess_target(seen)
        notes.append(f"the target was guessed: {target}; another one is chosen with --target")
    elif target not in seen:
        near = did_you_mean(target, set(seen))
        raise InitError(f"{data} has no column {target!r}{near}; it has {', '.join(seen)}")
    parts = _parts(seen, target, notes)
    text = _text(data, folder or data.resolve().parent, dialect, seen, target, parts, notes)
    return Draft(text, contracts.parse(text, name="the draft"), tuple(notes))


# Images


def _draft_images(data: Path, target: str, folder: Path) -> Draft:
    paths = [
        path
        for path in sorted(data.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(data).parts)
    ]
    counts = Counter(p.relative_to(data).parts[0] for p in paths if p.parent != data)
    if len(counts) < 2:
        raise InitError(
            f"{data} has files in {len(counts)} sub-folders; a contract needs two labels, each"
            " with a sub-folder of images"
        )
    notes = []
    if loose := len(paths) - counts.total():
        notes.append(f"{loose} files lie in no sub-folder and have no label")
    image, seen = _look_at_images(paths, notes)
    rarest = min(counts, key=lambda label: counts[label])
    notes.append(f"{len(counts)} labels; the rarest is {rarest} with {counts[rarest]} files")
    gates = "\n".join(_gates_lines(counts.total(), notes))
    size = image.size[0] if image.size[0] == image.size[1] else list(image.size)
    text = f"""\
# Drafted by `driftmill init` from {_comment(data.name)}: {len(counts)} labels.
# Look at every line once: a program cannot know what the data means.
# All settings: docs/contract.md. Check it with `driftmill validate`.
apiVersion: driftmill/v1
model: {_yaml(_model_name(data.resolve()))}
owner: ""  # who answers for it
task: image-classification

data:
  source: {_yaml(_uri(data, folder, "folder"))}
  target:
    name: {_yaml(target)}
    labels: {_yaml(sorted(counts))}
  id: path  # of the file, below the folder
  image:
    size: {_yaml(size)}  # seen {seen}
    channels: {image.channels}
    resize: crop  # or pad, stretch
    formats: {_yaml(list(image.formats))}
    # convert: [transparent]  # kinds to take instead of setting them aside

train:
  candidates: [small-cnn]
  vision:
    epochs: 10
    # augment: {{flip: true, shift: 0.1}}  # changes that leave the label as it is

{gates}

monitor:
  window: 500  # images that are compared with the test images at a time

retrain:
  min_fresh_rows: 500  # labelled images since the last training
  cooldown: 1h
  budget: {{runs: 10, period: 1d}}
"""
    return Draft(text, contracts.parse(text, name="the draft"), tuple(notes))


def _look_at_images(paths: list[Path], notes: list[str]) -> tuple[Image, str]:
    """What fits a random part of some files, and what sizes were seen."""
    from driftmill.vision import images  # needs Pillow, which tables do not

    chosen = random.Random(0).sample(paths, min(len(paths), MAX_IMAGES))  # noqa: S311
    rules = Image(size=(16, 16))
    grey, sizes, refused = True, [], Counter[str]()
    for path in chosen:
        content = path.read_bytes()
        try:
            name = images.format_of(content) if content else ""
            if name and name not in rules.formats:
                rules = Image.model_validate({"size": 16, "formats": [*rules.formats, name]})
            decoded = images.decode(content, rules)
        except images.ImageError as error:
            refused[str(error)] += 1
            continue
        grey = grey and bool((decoded.pixels == decoded.pixels[0]).all())
        sizes.append((decoded.height, decoded.width))
    if not sizes:
        raise InitError(f"none of {len(chosen)} files can be used: {_listed(refused)}")
    if refused:
        notes.append(
            f"{refused.total()} of {len(chosen)} files that were looked at will be set aside: "
            f"{_listed(refused)}"
        )
    (height, width), most = Counter(sizes).most_common(1)[0]
    if most < len(sizes) or max(height, width) > MAX_SIDE:
        # The usual side, and no more than the networks have learnt to look at.
        height = width = min(int(np.median([min(size) for size in sizes])), MAX_SIDE)
    shortest, longest = min(map(min, sizes)), max(map(max, sizes))
    seen = f"{shortest} to {longest} pixels a side" if most < len(sizes) else "in every image"
    side = (max(height, 4), max(width, 4))
    return rules.model_copy(update={"size": side, "channels": 1 if grey else 3}), seen


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} ({n})" for reason, n in counts.most_common())


# Reading


def _read(path: Path) -> tuple[pd.DataFrame, Csv]:
    """The table (all text, for a CSV) and how the CSV was read."""
    if not path.is_file():
        raise InitError(f"{path}: no such file")
    plain = path.name.removesuffix(".gz").lower()
    if plain.endswith((".parquet", ".pq")):
        try:
            return pd.read_parquet(path), Csv()
        except (OSError, ValueError) as error:
            raise InitError(f"{path} cannot be read as Parquet: {error}") from None
    try:
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            head = [line for line, _ in zip(file, range(200), strict=False)]
        dialect = _dialect(head)
        with warnings.catch_warnings():
            # Pandas warns where it would drop fields that have no column.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                sep=dialect.separator,
                header=0 if dialect.header else None,
                names=list(dialect.names) or None,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                nrows=MAX_ROWS,
                skipinitialspace=True,
                encoding="utf-8-sig",
            )
    except UnicodeDecodeError as error:
        raise InitError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    except (OSError, EOFError, ValueError, csv.Error, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())
        raise InitError(f"{path} cannot be read as CSV: {reason}") from None
    frame.columns = frame.columns.map(lambda name: str(name).strip())
    return frame, dialect


def _dialect(head: list[str]) -> Csv:
    """Separator, and whether there is a header line, from the first lines of a file."""
    if not head:
        raise ValueError("the file is empty")

    def split(separator: str) -> list[list[str]]:
        return [row for row in csv.reader(head, delimiter=separator, skipinitialspace=True) if row]

    def agreement(separator: str) -> tuple[bool, int]:
        widths = [len(row) for row in split(separator)]
        return len(set(widths)) == 1 and widths[0] > 1, widths[0]

    separator = max(",;\t|", key=agreement)
    first, *rest = split(separator)
    if any(_is_number(cell) for cell in first) and not _names(first, rest):
        names = tuple(f"column{i + 1}" for i in range(len(first)))
        return Csv(separator=separator, header=False, names=names)
    return Csv(separator=separator)


def _names(first: list[str], rest: list[list[str]]) -> bool:
    """Whether a line with a number in it is a header all the same: a text above numbers."""
    for i, cell in enumerate(first):
        below = [row[i] for row in rest if i < len(row) and row[i] not in MISSING]
        if not _is_number(cell) and below and all(_is_number(c) for c in below):
            return True
    return False


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# Looking at a column


def _look(name: str, column: pd.Series[Any]) -> _Seen:
    if pd.api.types.is_datetime64_any_dtype(column):
        values = column.dropna()
        return _Seen(name, "time", values, len(column) - len(values), values.nunique())
    if pd.api.types.is_bool_dtype(column):
        column = column.map({True: "true", False: "false"})
    texts = column.dropna()
    if pd.api.types.is_float_dtype(texts):  # as the data is read: 3.0 is the text 3
        texts = texts.map(lambda v: str(int(v)) if float(v).is_integer() else str(v))
    texts = texts.astype(str).str.strip()
    texts = texts[~texts.isin(MISSING)]
    missing, unique = len(column) - len(texts), texts.nunique()
    distinct = set(texts.unique()) if unique <= MAX_CATEGORIES else set()
    if not len(texts):
        return _Seen(name, "text", texts, missing, 0)
    if {d.lower() for d in distinct} in ({"true", "false"}, {"0", "1"}):
        return _Seen(name, "bool", texts, missing, unique)
    numbers = pd.to_numeric(texts, errors="coerce")
    if numbers.notna().all() and bool(numbers.abs().max() < math.inf):
        kind = "int" if bool(texts.map(lambda t: bool(_INT.fullmatch(t))).all()) else "float"
        return _Seen(name, kind, numbers, missing, int(numbers.nunique()), texts=texts)
    if texts.map(lambda t: bool(_ISO.fullmatch(t))).all() and _parses(texts, "ISO8601"):
        return _Seen(name, "time", texts, missing, unique)
    for pattern in TIME_FORMATS:
        if _parses(texts, pattern):
            return _Seen(name, "time", texts, missing, unique, time_format=pattern)
    kind = "category" if unique <= MAX_CATEGORIES and unique < max(len(texts), 3) else "text"
    return _Seen(name, kind, texts, missing, unique)


def _parses(texts: pd.Series[Any], pattern: str) -> bool:
    return bool(pd.to_datetime(texts, format=pattern, errors="coerce", utc=True).notna().all())


def _guess_target(seen: dict[str, _Seen]) -> str:
    usable = [name for name, s in seen.items() if s.kind not in ("text", "time") and s.unique > 1]
    if not usable:
        raise InitError("no column can be predicted: each is a text, a time or constant")
    named = [name for name in usable if name.lower() in TARGETS]
    return named[0] if named else usable[-1]


# Choosing


@dataclass
class _Parts:
    task: str
    labels: tuple[str, ...]
    id: str | None
    time: str | None
    inputs: list[Column]
    comments: dict[str, str]
    """What was seen in an input."""
    left_out: list[tuple[str, str]]
    """Columns that are no input, and why."""


def _parts(seen: dict[str, _Seen], target: str, notes: list[str]) -> _Parts:
    task, labels = _task(seen[target])
    if seen[target].missing:
        notes.append(
            f"{seen[target].missing} rows have no {target}; training sets them aside, and stops"
            " if they are more than data.quarantine.max_fraction"
        )
    others = [s for s in seen.values() if s.name != target]
    ids = [s for s in others if _may_be_id(s)]
    times = [s for s in others if s.kind == "time" and s.missing == 0 and s.unique > 1]
    identity = ids[0].name if ids else None
    time = times[0].name if times else None
    if len(times) > 1:
        notes.append(
            f"{time} was taken for the time of a row; "
            f"{', '.join(s.name for s in times[1:])} would do as well"
        )
    parts = _Parts(task, labels, identity, time, [], {}, [])
    for s in others:
        if s.name in (identity, time):
            continue
        if reason := _unusable(s, ids):
            parts.left_out.append((s.name, reason))
            continue
        column, comment = _column(s)
        parts.inputs.append(column)
        parts.comments[s.name] = comment
    if not parts.inputs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in parts.left_out)
        raise InitError(f"no column is left to predict {target} from ({reasons})")
    return parts


def _task(s: _Seen) -> tuple[str, tuple[str, ...]]:
    if s.kind in ("text", "time") or s.unique < 2:
        raise InitError(
            f"{s.name} cannot be predicted: it holds "
            + ("one value only" if s.unique == 1 else "nothing" if not s.unique else s.kind)
            + "; choose another column with --target"
        )
    few_ints = s.kind == "int" and s.unique <= MAX_CLASSES and len(s.values) >= 10 * s.unique
    if s.kind in ("int", "float") and not few_ints:
        return "regression", ()
    texts = s.values if s.texts is None else s.texts
    labels = [str(v) for v in texts.unique()]
    numeric = all(_is_number(v) for v in labels)
    ordered = sorted(labels, key=lambda v: (float(v) if numeric else 0.0, v))
    if len(ordered) == 2:
        # The second of two labels is the one that scores stand for: the yes, or the rarer.
        said = [v for v in ordered if v.lower() in FALSE_WORDS]
        first = said[0] if len(said) == 1 else str(texts.value_counts().index[0])
        ordered.sort(key=lambda v: v != first)
    return "classification", tuple(ordered)


def _may_be_id(s: _Seen) -> bool:
    if not s.complete or s.kind in ("float", "time", "bool"):
        return False
    if _ID_NAME.search(s.name) or s.name.startswith("Unnamed"):
        return True
    if s.kind == "int":
        return len(s.values) > MAX_CATEGORIES and bool((s.values.diff().dropna() == 1).all())
    return s.kind == "text" and bool(s.values.map(lambda t: " " not in t).all())


def _unusable(s: _Seen, ids: Iterable[_Seen]) -> str | None:
    if s.unique == 0:
        return "it is empty"
    if s.unique == 1:
        return f"it is always {s.values.iloc[0]}"
    if any(s.name == other.name for other in ids):
        return "it looks like another id"
    if s.kind == "time":
        return "it is a time"
    if s.kind == "text":
        return f"free text or an identifier ({s.unique} different values)"
    if not _NAME.match(s.name) or len(s.name.encode()) > 200:
        return "its name cannot be used: begin with a letter and use A-Z a-z 0-9 _ . - and spaces"
    return None


def _column(s: _Seen) -> tuple[Column, str]:
    missing = f", {s.missing} missing" if s.missing else ""
    nullable = s.missing > 0
    if s.kind == "bool":
        return Column(name=s.name, type="bool", nullable=nullable), f"{s.unique} values{missing}"
    if s.kind == "category":
        listed = sorted(s.values.unique())
        return (
            Column(
                name=s.name,
                type="category",
                nullable=nullable,
                categories=tuple(listed) if s.unique <= MAX_LISTED else (),
            ),
            f"{s.unique} categories{missing}",
        )
    low, high = float(s.values.min()), float(s.values.max())
    lower, upper = widen(low, high)
    if s.kind == "int":
        lower, upper = float(math.floor(lower)), float(math.ceil(upper))
    return (
        Column(
            name=s.name,
            type="int" if s.kind == "int" else "float",
            nullable=nullable,
            min=lower,
            max=upper,
        ),
        f"seen {_short(low)} to {_short(high)}{missing}",
    )


def widen(low: float, high: float) -> tuple[float, float]:
    """A valid range for numbers seen between `low` and `high`: half the span wider on each side
    and rounded outwards; it does not cross zero, and a fraction stays one."""
    if low >= 0 and 0.5 < high <= 1 and not high.is_integer():
        return 0.0, 1.0
    span = high - low
    lower, upper = _round(low - span / 2, math.floor), _round(high + span / 2, math.ceil)
    if low >= 0:
        lower = max(lower, 0.0)
    if high <= 0:
        upper = min(upper, 0.0)
    return lower, upper


def _round(value: float, how: Any) -> float:
    """Two significant digits, rounded by `math.floor` or `math.ceil`."""
    if value == 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    rounded = float(f"{how(value / unit) * unit:.6g}")
    return rounded if math.isfinite(rounded) else value


# Writing


def _short(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def _yaml(value: object) -> str:
    """A scalar or a list on one line, quoted where YAML needs it, also inside `{}` and `[]`."""
    text: str = yaml.safe_dump(
        [value], default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("\n")[1:-1]


def _comment(text: str) -> str:
    """Text that is safe behind a `#`."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _number(value: float) -> str:
    return _yaml(int(value) if value.is_integer() and abs(value) < 1e15 else value)


def _model_name(path: Path) -> str:
    stem = path.name.split(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40].strip("-")
    return name or "model"


def _uri(data: Path, folder: Path, scheme: str = "file") -> str:
    absolute = data.resolve()
    relative = os.path.relpath(absolute, folder.resolve())
    near = not relative.startswith(os.path.join("..", "..", ".."))
    return f"{scheme}:{relative}" if near else f"{scheme}://{absolute}"


def _text(
    data: Path,
    folder: Path,
    dialect: Csv,
    seen: dict[str, _Seen],
    target: str,
    parts: _Parts,
    notes: list[str],
) -> str:
    rows = len(seen[target].values) + seen[target].missing
    lines = [
        f"# Drafted by `driftmill init` from {_comment(data.name)}:"
        f" {rows} rows, {len(seen)} columns.",
        "# Look at every line once: a program cannot know what the data means.",
        "# All settings: docs/contract.md. Check it with `driftmill validate`.",
        "apiVersion: driftmill/v1",
        f"model: {_yaml(_model_name(data))}",
        'owner: ""  # who answers for it',
        f"task: {parts.task}",
        "",
        "data:",
        "  source:",
        f"    uri: {_yaml(_uri(data, folder))}",
    ]
    if dialect != Csv():
        lines.append("    csv:")
        if dialect.separator != ",":
            lines.append(f"      separator: {_yaml(dialect.separator)}")
        if not dialect.header:
            lines.append("      header: false")
            lines.append("      # The file has no header line: give the columns better names.")
            lines.append(f"      names: {_yaml(list(dialect.names))}")
    lines += _target_lines(seen[target], parts)
    if parts.id is not None:
        lines.append(f"  id: {_yaml(parts.id)}  # names a row; duplicates are set aside")
    else:
        lines.append("  # id: COLUMN  # no column names a row; without one, its position does")
    lines += _time_lines(seen, parts)
    lines.append("  columns:")
    for column in parts.inputs:
        lines.append(f"    - {_flow(column)}  # {_comment(parts.comments[column.name])}")
    if parts.left_out:
        lines.append("    # Not used:")
        lines += [f"    # - {_comment(name)}: {_comment(why)}" for name, why in parts.left_out]
    lines += [
        "",
        "train:",
        "  candidates: [linear, random-forest, hist-gradient-boosting]",
        f"  metric: {'auc' if parts.task == 'classification' else 'rmse'}",
        "  # search: {method: random, budget: 6, folds: 3}",
        "",
        *_gates_lines(rows, notes),
    ]
    groups = [c.name for c in parts.inputs if c.type == "bool" or 0 < len(c.categories) <= 10]
    if groups:
        lines.append(
            f"  # slices: {{columns: {_yaml(groups[:2])}}}  # groups that must not get worse"
        )
    lines += [
        "",
        "monitor:",
        "  window: 500  # rows that are compared with the training data at a time",
        "  # max_quality_loss: 0.05  # alarm when labels show that the model got worse",
        "",
        "retrain:",
        "  min_fresh_rows: 500  # labelled rows since the last training",
        "  cooldown: 1h",
        "  budget: {runs: 10, period: 1d}",
    ]
    return "\n".join(lines) + "\n"


def _gates_lines(rows: int, notes: list[str]) -> list[str]:
    lines = ["gates:", "  confidence: 0.95  # a new model must be better with this confidence"]
    test_rows = int(rows * 0.2)
    if test_rows < 125:
        needed = max(10, int(test_rows * 0.8))
        lines.append(f"  min_test_rows: {needed}  # the data are few; with fewer, none is promoted")
        notes.append(f"with {rows} rows only large improvements can be told from chance")
    return lines


def _target_lines(s: _Seen, parts: _Parts) -> list[str]:
    lines = ["  target:", f"    name: {_yaml(s.name)}"]
    if parts.task == "classification":
        comment = "  # negative first" if len(parts.labels) == 2 else ""
        lines.append(f"    labels: {_yaml(list(parts.labels))}{comment}")
        return lines
    low, high = float(s.values.min()), float(s.values.max())
    lower, upper = widen(low, high)
    seen = f"  # seen {_short(low)} to {_short(high)}"
    lines += [f"    min: {_number(lower)}{seen}", f"    max: {_number(upper)}"]
    if low >= 0 and float(s.values.skew()) > 1:  # type: ignore[arg-type]
        lines.append("    # transform: log1p  # it is skewed: worth a try")
    return lines


def _time_lines(seen: dict[str, _Seen], parts: _Parts) -> list[str]:
    if parts.time is None:
        return ["  # time: COLUMN  # when a row happened, if a column says so"]
    s = seen[parts.time]
    lines = ["  time:  # rows are split by time", f"    columns: {_yaml([s.name])}"]
    if s.time_format is not None:
        lines.append(f"    format: {_yaml(s.time_format)}")
    lines.append("    # until: 2024-01-01T00:00:00Z  # later rows are kept for `driftmill replay`")
    return lines


def _flow(column: Column) -> str:
    """A column on one line."""
    values: dict[str, str] = {"name": _yaml(column.name), "type": column.type}
    if column.nullable:
        values["nullable"] = "true"
    if column.min is not None:
        values["min"] = _number(column.min)
    if column.max is not None:
        values["max"] = _number(column.max)
    if column.categories:
        values["categories"] = _yaml(list(column.categories))
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"
