"""The contract: the one file in which a user says what a model needs.

Every setting of Driftmill is defined here and nowhere else. The models are frozen and forbid
unknown keys; `load` turns a mistake into a `ContractError` that names file, line, field, what was
expected and, for a typo, the nearest valid word.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Task = Literal["classification", "regression", "image-classification"]
TabularFamily = Literal["linear", "random-forest", "hist-gradient-boosting"]
VisionFamily = Literal[
    "mlp",
    "small-cnn",
    "resnet18",
    "resnet50",
    "mobilenet-v3-small",
    "efficientnet-b0",
    "convnext-tiny",
]
Family = Literal[TabularFamily, VisionFamily]
MetricName = Literal["auc", "accuracy", "f1", "log_loss", "brier", "rmse", "rmsle", "mae", "r2"]
Direction = Literal["maximize", "minimize"]

#: Which way is better, and for which task a metric is defined; what is for `classification` is for
#: `image-classification`, too.
METRICS: dict[str, tuple[Direction, Task]] = {
    "auc": ("maximize", "classification"),
    "accuracy": ("maximize", "classification"),
    "f1": ("maximize", "classification"),
    "log_loss": ("minimize", "classification"),
    "brier": ("minimize", "classification"),
    "rmse": ("minimize", "regression"),
    "rmsle": ("minimize", "regression"),
    "mae": ("minimize", "regression"),
    "r2": ("maximize", "regression"),
}

#: What is measured of every image, as ordinary numeric columns beside the image itself. Size is
#: that of the file as it came, all else is of the pixels that the model sees.
STATISTICS: dict[str, str] = {
    "width": "Pixels across, as it came.",
    "height": "Pixels down, as it came.",
    "aspect": "Width over height, as it came.",
    "brightness": "Mean luminance, 0 black to 1 white.",
    "contrast": "Standard deviation of the luminance, 0 to 0.5.",
    "sharpness": "Standard deviation of the luminance's Laplacian: low when blurred.",
    "entropy": "Of the luminance's histogram, 0 to 8 bits.",
    "noise": "Estimated standard deviation of noise in the luminance (Immerkaer 1996).",
}
#: More of them for images in colour.
COLOUR_STATISTICS: dict[str, str] = {
    "saturation": "Mean saturation, 0 grey to 1.",
    "red": "Red's part of all light, 1/3 where colours are in balance.",
    "blue": "Blue's part of all light, 1/3 where colours are in balance.",
}
#: What the monitor calls a model's embeddings, which it compares as a whole.
EMBEDDING = "embedding"

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d|w))+")


def parse_duration(value: object) -> object:
    """Seconds from `90`, `"90s"`, `"5m"`, `"1h30m"` or `"2d"`; the rest is left to Pydantic."""
    if isinstance(value, str):
        text = value.replace(" ", "")
        if not _DURATION.fullmatch(text):
            raise ValueError("expected a duration such as 30s, 5m, 1h30m or 2d")
        return sum(
            float(n) * _UNITS[unit]
            for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)", text)
        )
    return value


def _as_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(ge=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^(\d+(\.\d+)?(ms|s|m|h|d|w))+$"},
            ]
        }
    ),
]
Fraction = Annotated[float, Field(ge=0, le=1)]

#: Edges of the histogram of the service's latency, in seconds.
LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
Timestamp = Annotated[datetime, AfterValidator(_as_utc)]


def _without_account(uri: str) -> str:
    """The contract travels in parameters and logs, where a password must not be."""
    if re.match(r"[a-z0-9+.-]+://[^/]*@", uri):
        raise ValueError("a URI with credentials; leave them out and put them into the environment")
    return uri


class Section(BaseModel):
    """Base of every part of the contract: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    #: A field that a plain value may stand for: `target: cnt` is `target: {name: cnt}`.
    short_for: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _long_form(cls, value: Any) -> Any:
        return {cls.short_for: value} if cls.short_for and isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.short_for:
            schema = {
                "description": schema.pop("description", ""),
                "anyOf": [{"type": "string"}, schema],
            }
        return schema


class Csv(Section):
    """How to read a CSV file."""

    separator: str = Field(",", min_length=1, max_length=1)
    """The character between two fields."""
    header: bool = True
    """Whether the first line holds the column names; if not, give `names`."""
    names: tuple[str, ...] = ()
    """Column names, in order, for a file without a header line."""
    missing: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "null", "?")
    """Texts that mean: no value."""
    comment: str | None = Field(None, min_length=1, max_length=1)
    """Lines from this character on are ignored."""

    @model_validator(mode="after")
    def _names_without_header(self) -> Csv:
        if not self.header and not self.names:
            raise ValueError("a file without a header line needs `names`")
        return self


class Source(Section):
    """Where rows come from. A plain string is short for `uri` alone."""

    short_for = "uri"

    uri: str = Field(min_length=1)
    """`file:` path (relative to the contract), `https:`, `s3:`, `gs:`, `sklearn:NAME`,
    `openml:ID`, `kaggle:OWNER/DATASET/FILE` or `sim:NAME?key=value`. For images `idx:PATH` (the
    images' file of a pair in MNIST's format, also `.gz`), `folder:PATH` (a sub-folder for each
    label), `cifar10:PATH` (folder of the binary version), `sklearn:digits`, or a `file:` table of
    paths."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Digest of the file, checked after reading. Needed for `https:`."""
    dataset: str | None = Field(None, pattern="^[A-Za-z0-9._-]+$")
    """A folder below `$DRIFTMILL_DATA`; if it holds a file of the same name as the URI's last
    part, that file is read and nothing is downloaded (the digest is checked all the same)."""
    format: Literal["auto", "csv", "parquet"] = "auto"
    """File format; `auto` goes by the file name (`.gz` is unpacked either way)."""
    csv: Csv = Csv()
    """How to read a CSV file."""

    @model_validator(mode="after")
    def _digest_for_https(self) -> Source:
        if self.uri.startswith("http:"):
            raise ValueError("http: is not encrypted; use https: with sha256")
        if self.uri.startswith("https:") and self.sha256 is None:
            raise ValueError("an https: source needs the file's sha256")
        return self

    @field_validator("uri")
    @classmethod
    def _names_no_account(cls, uri: str) -> str:
        return _without_account(uri)


class Column(Section):
    """One input of the model."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_.\- ]*$")
    """Name in the data and in requests. It may not begin with an underscore."""
    type: Literal["float", "int", "bool", "category"]
    """`float`, `int` and `bool` go to the model as numbers, `category` as text."""
    nullable: bool = False
    """Whether the value may be missing."""
    min: float | None = None
    """Smallest valid number."""
    max: float | None = None
    """Largest valid number."""
    categories: tuple[str, ...] = ()
    """Valid categories; empty: those seen in training."""
    unknown: Literal["allow", "reject"] = "allow"
    """What happens to a category outside the list: `allow` treats it as unknown and counts it,
    `reject` quarantines the row in training and answers 422 in serving."""
    aliases: dict[str, str] = {}
    """Spellings to read as another value, e.g. `{"Male.": "Male"}`."""
    description: str = ""
    """For people."""

    @property
    def is_numeric(self) -> bool:
        """Whether the model sees this column as a number."""
        return self.type != "category"

    @model_validator(mode="after")
    def _consistent(self) -> Column:
        if self.is_numeric and (self.categories or self.aliases):
            raise ValueError(f"`categories` and `aliases` do not fit type {self.type}")
        if not self.is_numeric and (self.min is not None or self.max is not None):
            raise ValueError("`min` and `max` do not fit type category")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min` {self.min} is above `max` {self.max}")
        if self.unknown == "reject" and not self.categories:
            raise ValueError("`unknown: reject` needs `categories`")
        return self


class Target(Section):
    """What is predicted. A plain string is short for `name` alone."""

    short_for = "name"

    name: str = Field(min_length=1)
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """Classification: the valid labels, negative first for two of them. Empty: those in the data,
    sorted."""
    aliases: dict[str, str] = {}
    """Spellings to read as another label."""
    min: float | None = None
    """Regression: smallest valid value."""
    max: float | None = None
    """Regression: largest valid value."""
    transform: Literal["none", "log1p"] = "none"
    """Regression: learn log(1 + y) and predict y; for counts and prices."""


class Time(Section):
    """When a row happened. A plain string is short for one column."""

    short_for = "columns"

    columns: Annotated[
        tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
    ] = Field(min_length=1)
    """Columns that together give the time; several are joined by a space before parsing."""
    format: str | None = None
    """`strptime` format, e.g. `%Y-%m-%d %H`; none: ISO 8601."""
    until: Timestamp | None = None
    """Rows before this time are the history that the first model learns from; later ones are the
    stream that `driftmill replay` sends."""


class Image(Section):
    """What the model sees of an image, and which images are taken. What breaks a rule here is
    quarantined in training and refused in serving, with the reason."""

    size: Annotated[
        tuple[Annotated[int, Field(ge=4, le=4096)], Annotated[int, Field(ge=4, le=4096)]],
        BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 4, "maximum": 4096},
                    {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 4, "maximum": 4096},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                ]
            }
        ),
    ]
    """Height and width that the model sees, in pixels; one number for both."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 red, green, blue; other images are converted."""
    resize: Literal["crop", "stretch", "pad"] = "crop"
    """How an image of another shape is made to fit: `crop` cuts the longer side's ends off, `pad`
    adds black ones to the shorter side, `stretch` distorts."""
    column: str = Field("image", min_length=1)
    """Column of a table that holds each image: a path (relative to the table), or its bytes."""
    formats: tuple[Literal["png", "jpeg", "webp", "bmp", "gif", "tiff"], ...] = Field(
        ("png", "jpeg", "webp", "bmp"), min_length=1
    )
    """File formats that are read."""
    max_pixels: int = Field(25_000_000, ge=16)
    """An image with more pixels is refused before it is decoded."""
    max_bytes: int = Field(20 * 1024 * 1024, ge=64)
    """A larger file is refused before it is decoded."""
    convert: tuple[Literal["cmyk", "transparent", "16-bit", "animated"], ...] = ()
    """Kinds of image that are refused unless listed here: `cmyk` becomes RGB, `transparent` is laid
    on white, `16-bit` is scaled to 8, of `animated` the first frame is taken."""

    @property
    def statistics(self) -> tuple[Column, ...]:
        """The columns that stand beside every image."""
        named = STATISTICS | (COLOUR_STATISTICS if self.channels == 3 else {})
        return tuple(
            Column(name=name, type="float", min=0, description=text) for name, text in named.items()
        )


class Simulate(Section):
    """Makes a stream out of a set of images, for demos and drills: in a fixed random order and with
    a time each, and from one row on the world is another one."""

    onset: int | None = Field(None, ge=0)
    """First row of the changed world; null: it never changes."""
    corruptions: dict[
        Literal["blur", "brightness", "contrast", "rotation", "noise"], Literal[1, 2, 3]
    ] = {}
    """What is done to the images from then on, and how strongly: 1, 2 or 3."""
    new_labels: tuple[str, ...] = ()
    """Images with these labels are left out before the onset."""
    seed: int = Field(0, ge=0)
    """Seed of the order and of the corruptions."""
    start: Timestamp = datetime(2026, 1, 1, tzinfo=UTC)
    """Time of the first image; it stands in the column `at`."""
    step: Seconds = 60.0
    """Time between two images."""
    rows: int | None = Field(None, ge=1)
    """Only so many images; null: all."""


class Quarantine(Section):
    """What happens to rows that break the schema: they are kept aside with the reason."""

    max_fraction: Fraction = 0.05
    """A run stops when more than this part of the rows is bad."""


class Split(Section):
    """How test rows are set apart: the last ones where there is a time, else stratified."""

    test: float = Field(0.2, gt=0, lt=1)
    """Part of the rows that is frozen for the gate. Unused where `data.test` names a file."""
    seed: int = 0
    """Seed of the stratified split."""


class Data(Section):
    """Where the rows are and what they look like."""

    source: Source
    """Rows to learn from."""
    test: Source | None = None
    """A fixed test set, if there is one."""
    target: Target
    """What is predicted."""
    id: str | None = None
    """Column that names a row uniquely; duplicates are quarantined."""
    time: Time | None = None
    """When a row happened."""
    columns: tuple[Column, ...] = Field((), validate_default=False)
    """The model's inputs, one at least. Columns of the source that are not listed are ignored. With
    `image` they are the images' statistics and cannot be given."""
    image: Image | None = None
    """What an image looks like, where the model's input is one."""
    simulate: Simulate | None = None
    """Makes a stream with a change in it out of a set of images."""
    quarantine: Quarantine = Quarantine()
    """What happens to bad rows."""
    split: Split = Split()
    """How test rows are set apart."""

    @property
    def numeric(self) -> tuple[Column, ...]:
        """Columns that the model sees as numbers, in order."""
        return tuple(c for c in self.columns if c.is_numeric)

    @property
    def categorical(self) -> tuple[Column, ...]:
        """Columns that the model sees as text, in order."""
        return tuple(c for c in self.columns if not c.is_numeric)

    @model_validator(mode="before")
    @classmethod
    def _statistics(cls, value: Any) -> Any:
        """With `image`, put its statistics in the place of the columns."""
        if not isinstance(value, dict) or value.get("image") is None:
            return value
        try:
            statistics = Image.model_validate(value["image"]).statistics
        except ValidationError:
            return value  # the field itself says what is wrong with it
        given = value.get("columns") or statistics
        if list(given) not in (
            list(statistics),
            [c.model_dump() for c in statistics],
            [c.model_dump(mode="json") for c in statistics],
        ):
            raise ValueError("`columns` cannot be given beside `image`: they are its statistics")
        return {**value, "columns": statistics}

    @model_validator(mode="after")
    def _names(self) -> Data:
        if not self.columns:
            raise ValueError("`columns` must list one input at least (or give `image`)")
        if self.simulate is not None and self.image is None:
            raise ValueError("`simulate` is for images; a table takes a `sim:` source")
        names = [c.name for c in self.columns]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"columns listed twice: {', '.join(twice)}")
        if self.target.name in names:
            raise ValueError(f"the target {self.target.name!r} is also listed as an input")
        if self.id in names:
            raise ValueError(f"the id {self.id!r} is also listed as an input")
        return self


class Metric(Section):
    """What a better model is better at. A plain string is short for `name` alone."""

    short_for = "name"

    name: MetricName
    """Metric that candidates are ranked and gated by."""
    direction: Direction
    """Which way is better; filled in from the name."""

    @model_validator(mode="before")
    @classmethod
    def _fill_direction(cls, value: Any) -> Any:
        if isinstance(value, str):  # validators of a base class run after this one
            value = {"name": value}
        if isinstance(value, dict) and value.get("name") in METRICS and "direction" not in value:
            value = {**value, "direction": METRICS[value["name"]][0]}
        return value

    @model_validator(mode="after")
    def _direction(self) -> Metric:
        if self.direction != METRICS[self.name][0]:
            raise ValueError(f"{self.name} is a metric to {METRICS[self.name][0]}")
        return self

    @property
    def sign(self) -> int:
        """+1 where higher is better, -1 where lower is."""
        return 1 if self.direction == "maximize" else -1


class Search(Section):
    """How hyper-parameters are chosen, by cross-validation on the training rows."""

    method: Literal["none", "grid", "random", "halving"] = "random"
    """`none` takes the defaults; `halving` starts many on few rows and keeps the best."""
    budget: int = Field(6, ge=1, le=1000)
    """Settings tried for each family."""
    folds: int = Field(3, ge=2, le=20)
    """Cross-validation folds (in order of time where there is one)."""


class Toleration(Section):
    """A Kubernetes toleration of a training step."""

    key: str
    """Taint key."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """How `value` is compared."""
    value: str | None = None
    """Taint value, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = "NoSchedule"
    """Taint effect; null: all."""


class Resources(Section):
    """What the steps ask of a cluster; unused on a laptop. GPUs and the choice of nodes are for
    training alone."""

    cpu: str = Field("1", pattern=r"^\d+(\.\d+)?m?$")
    """CPU cores, as in Kubernetes."""
    memory: str = Field("2Gi", pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$")
    """Memory, as in Kubernetes."""
    gpu: int = Field(0, ge=0)
    """GPUs."""
    gpu_type: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    node_selector: dict[str, str] = {}
    """Labels that a node must carry."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that a step tolerates."""
    gpu_products: tuple[str, ...] = ()
    """GPU models that will do, as in the node label `nvidia.com/gpu.product`; empty: any."""
    nodes: int = Field(1, ge=1)
    """Nodes that train one network together (image tasks; a TrainJob on a cluster)."""
    shared_memory: str = Field("1Gi", pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$")
    """Size of `/dev/shm` of a step with GPUs, taken from `memory`."""
    spot: bool = False
    """Whether a step may run on a node that can be taken away."""
    timeout: Annotated[Seconds, Field(ge=60)] = 86400.0
    """Time after which an attempt of a step is ended; the time that it waits for a node does not
    count."""
    queue: str | None = Field(None, pattern="^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Kueue's LocalQueue that steps which prepare, train and judge wait in; null: none."""

    @property
    def distributed(self) -> bool:
        """Whether several processes train one network together."""
        return self.nodes > 1 or self.gpu > 1


class Augment(Section):
    """Random changes to training images, each drawn anew for every image and epoch."""

    flip: bool = False
    """Mirror left and right, every other image."""
    shift: float = Field(0.0, ge=0, le=0.5)
    """Move by up to this part of the size, either way."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Turn by up to this many degrees, either way."""
    scale: float = Field(0.0, ge=0, le=0.5)
    """Enlarge or shrink by up to this part."""
    erase: float = Field(0.0, ge=0, le=0.5)
    """Blank a random square of this part of the area (Zhong et al. 2017)."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Change brightness by up to this part, either way."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Change contrast by up to this part, either way."""


class Weights(Section):
    """Weights to start from, instead of random ones."""

    file: str = Field(min_length=1)
    """Path of a `.safetensors` file (relative to the contract): the state dict of the family's
    torchvision model. A last layer with another number of labels is left out."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of the file, checked before it is read."""


class Vision(Section):
    """How neural networks for images are trained."""

    epochs: int = Field(10, ge=1, le=10_000)
    """Passes over the training images."""
    batch: int = Field(256, ge=2, le=65_536)
    """Images in a step of the optimizer, on all devices together."""
    accumulate: int = Field(1, ge=1, le=1024)
    """Parts that a batch is cut into, one after the other, to save memory."""
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """`sgd` is with Nesterov's momentum."""
    learning_rate: float | None = Field(None, gt=0)
    """The highest of the schedule; null: what suits the optimizer and the family."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of `sgd` and `rmsprop`."""
    weight_decay: float = Field(5e-4, ge=0)
    """Not for biases and norms."""
    schedule: Literal["one-cycle", "triangular", "constant"] = "one-cycle"
    """The learning rate over all steps: `one-cycle` rises and falls as a cosine, `triangular` as
    straight lines."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of the target that is spread over all labels."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Average the weights with this decay a step, and take the average; null: do not."""
    augment: Augment = Augment()
    """Random changes to training images."""
    validation: float = Field(0.1, gt=0, lt=0.9)
    """Part of the training images that is kept out to rank candidates and to stop early."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better validation loss and take the best; null: train to
    the end and take the last."""
    seeds: int = Field(1, ge=1, le=50)
    """Train so many times, report mean and spread, and keep the run that is best on validation."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What convolutions compute in; `auto` takes bfloat16 where the device is fast with it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    resident: bool | None = None
    """Keep all training images in the device's memory; null: if they fit into half of it."""
    compile: bool = False
    """Compile the network first (torch.compile): takes a minute, pays on long runs on GPUs."""
    weights: Weights | None = None
    """Start from these weights."""
    frozen: int = Field(0, ge=0)
    """Epochs in which only the last layer learns, where `weights` are given."""
    diagnostics: bool = True
    """Check the training itself, for the report: gradients, dead units, learning rate."""


class Train(Section):
    """Which models are tried, and how."""

    candidates: tuple[Family, ...] = Field((), validate_default=False)
    """Model families; a dummy is always added as the floor. Empty: for tables all of `linear`,
    `random-forest` and `hist-gradient-boosting`, for images `small-cnn`."""
    search: Search = Search()
    """How hyper-parameters are chosen (tables)."""
    vision: Vision = Vision()
    """How networks are trained (images)."""
    metric: Metric | None = None
    """What to rank by; default `auc`, for images `accuracy`, for numbers `rmse`."""
    rows: int | None = Field(None, ge=50)
    """Learn from at most this many of the newest rows; null: from all."""
    seed: int = 0
    """Seed of everything random; the same seed and data give the same model."""
    cache: bool = True
    """Take an earlier fit from the store where rows, settings and code are the same."""
    resources: Resources = Resources()
    """What a step asks of its node."""


class Slices(Section):
    """Groups of rows on which a new model may not be worse."""

    columns: tuple[str, ...] = ()
    """Input columns whose values make the groups (numbers are cut into quartiles)."""
    min_rows: int = Field(100, ge=10)
    """Smaller groups are shown but do not decide."""
    max_loss: float = Field(0.02, ge=0)
    """How much worse a group may surely be, in units of the metric."""


class Gates(Section):
    """What a new model must show before it serves."""

    margin: float = Field(0.0, ge=0)
    """The metric must improve by more than this, in its own units."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of the paired bootstrap interval: its lower end must exceed `margin`."""
    resamples: int = Field(1000, ge=100, le=100_000)
    """Bootstrap resamples."""
    min_test_rows: int = Field(100, ge=10)
    """With fewer test rows nothing is promoted."""
    floor: float | None = None
    """Worst value of the metric that may serve at all."""
    slices: Slices = Slices()
    """Groups that are protected."""
    max_calibration_error: Fraction | None = None
    """Largest expected calibration error (classification)."""
    max_latency_ms: float | None = Field(50.0, gt=0)
    """Largest 99th percentile of the time for one row in the ONNX session."""
    max_size_mb: float | None = Field(200.0, gt=0)
    """Largest model file."""
    max_precision_loss: float = Field(0.002, ge=0)
    """How much worse a model in a lower `serve.precision` may surely be, in units of the metric;
    beyond it the model stays in float32."""


class Abort(Section):
    """When a challenger is taken out by itself: at its first error or NaN, and by these rules."""

    timeout: Seconds = 5.0
    """A challenger that computes a batch for longer hangs: it is cut off, and the champion
    answers."""
    window: int = Field(200, ge=1)
    """Answers, or compared rows, after which it is judged, again and again."""
    slow: Fraction | None = 0.05
    """Largest share of answers slower than `serve.slo.latency_ms`, unless half as many of the
    champion's are, too; null: any."""
    disagreement: Fraction | None = None
    """Largest share of rows that it answers otherwise than the champion; null: any. Where it
    answers in the champion's place, the champion predicts, too, and nobody waits for it."""
    tolerance: float = Field(0.0, ge=0)
    """Numbers that differ by no more than this are the same answer (regression)."""


class Canary(Section):
    """How a promoted model takes over."""

    steps: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of requests, in order, before all; empty: all at once."""
    hold: Seconds = 60.0
    """Time at each step."""
    abort: Abort = Abort()
    """When it is broken off."""

    @model_validator(mode="after")
    def _rising(self) -> Canary:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("`steps` must rise, e.g. [0.05, 0.25, 0.5]")
        return self


Fsync = Literal["none", "batch", "interval"]


class Log(Section):
    """The inference log: every prediction is written before it is answered."""

    on_error: Literal["refuse", "serve"] = "refuse"
    """When the log cannot be written: `refuse` answers 503, `serve` answers and counts the loss."""
    rotate_rows: int = Field(20_000, ge=1)
    """Rows after which the log moves into the store as Parquet."""
    rotate: Seconds = 2.0
    """Time after which it moves, if it holds anything."""
    fsync: Fsync = "none"
    """When the disk has to take what was written: `batch` before an answer is given, `interval`
    every so often, `none` when the operating system sees fit. A process that is killed loses
    nothing; a machine that loses power keeps what the disk has taken."""
    fsync_interval: Annotated[Seconds, Field(gt=0)] = 1.0
    """Time between two times, for `interval`."""
    images: bool = True
    """Keep each image as the model saw it. Without them, nothing can be learnt from the log."""


class Slo(Section):
    """What the service promises; alerts follow from it."""

    availability: float = Field(0.999, ge=0.95, lt=1)
    """Share of requests that must not fail by the service's fault (status 500 and above)."""
    latency_ms: float = 100.0
    """Time within which a request shall be answered: an edge of the latency histogram."""
    latency: float = Field(0.99, ge=0.95, lt=1)
    """Share of requests that must be answered within it."""

    @field_validator("latency_ms")
    @classmethod
    def _edge(cls, value: float) -> float:
        edges = [1000 * edge for edge in LATENCY_BUCKETS]
        if value not in edges:
            raise ValueError(f"latencies are counted up to {', '.join(f'{e:g}' for e in edges)} ms")
        return value


class Explain(Section):
    """`POST /explain`: what each column, or each part of an image, contributed to a prediction."""

    rate: float = Field(1.0, ge=0, le=1000)
    """Requests a second that are taken, by each process; more get 429. 0 switches it off."""
    max_records: int = Field(10, ge=1, le=1000)
    """Most records in one request."""
    background: int = Field(100, ge=1, le=1000)
    """Reference rows that a record is compared with. More take longer, and stand better for all."""
    samples: int = Field(1, ge=1, le=100)
    """Random orders of the columns for each of these rows, each taken forwards and backwards. More
    take longer, and make the contributions more exact for these rows."""


class Serve(Section):
    """How the model is served."""

    replicas: int = Field(1, ge=1)
    """Copies on a cluster."""
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Numbers that a network computes with when it serves; see `gates.max_precision_loss`."""
    max_batch_rows: int = Field(1024, ge=1)
    """Most rows that waiting requests are joined to."""
    max_records: int = Field(1000, ge=1)
    """Most records in one request."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Largest request body; beyond it 413. For images the default is 32 MiB (33554432)."""
    timeout: Seconds = 10.0
    """A request that waits longer for its answer gets 504. A client may ask for less by the header
    `X-Request-Timeout`, in seconds."""
    poll: Seconds = 1.0
    """How often the rollout is read."""
    canary: Canary = Canary()
    """How a promoted model takes over."""
    log: Log = Log()
    """The inference log."""
    explain: Explain = Explain()
    """Explanations of single predictions."""
    slo: Slo = Slo()
    """What the service promises."""


class Monitor(Section):
    """When the data or the model counts as drifted."""

    window: int = Field(500, ge=50)
    """Rows in a window."""
    min_rows: int = Field(100, ge=20)
    """A column with fewer values in a window is not tested."""
    false_alarm_rate: float = Field(0.01, gt=0, le=0.2)
    """False-discovery level of the tests of one window (Benjamini-Hochberg)."""
    effect: float = Field(0.1, ge=0, le=1)
    """Smallest change that counts: distance between the distributions, 0 none to 1 all."""
    persistence: int = Field(2, ge=1, le=20)
    """Windows in a row that must drift before the alarm."""
    ignore: tuple[str, ...] = ()
    """Columns that never alarm."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight of a column in the drift score; default 1."""
    max_quality_loss: float | None = Field(None, ge=0)
    """Alarm when the metric, on labelled rows, is worse than the champion's on its test rows by
    more than this; null: no such alarm."""
    labels_within: Seconds | None = 86400.0
    """Alert when predictions are made and no label comes for so long; null: no such alert."""
    report_rows: int = Field(10_000, ge=100, le=10_000)
    """Most rows of a window that go into its Evidently report."""
    poll: Seconds = 1.0
    """How often the log is read."""


class Budget(Section):
    """How often retraining may run."""

    runs: int = Field(10, ge=0)
    """Runs allowed in `period`."""
    period: Seconds = 86400.0
    """Length of the period."""


class Retrain(Section):
    """When an alarm becomes a training run."""

    enabled: bool = True
    """The kill switch: false starts nothing, and the ledger says so."""
    dry_run: bool = False
    """Decide and record, but start nothing."""
    triggers: tuple[Literal["drift", "quality", "schedule", "manual"], ...] = (
        "drift",
        "quality",
        "schedule",
        "manual",
    )
    """What may start a run."""
    schedule: str | None = None
    """Cron expression (five fields, UTC) for runs without an alarm."""
    min_fresh_rows: int = Field(500, ge=0)
    """Labelled rows needed since the champion's training data ended."""
    cooldown: Seconds = 3600.0
    """Least time between the end of a run and the start of the next."""
    budget: Budget = Budget()
    """How often retraining may run."""
    breaker: int = Field(3, ge=1)
    """After this many runs in a row without a promotion nothing starts until a person resets it."""

    @model_validator(mode="after")
    def _cron(self) -> Retrain:
        if self.schedule is None:
            return self
        from croniter import croniter  # a tenth of this module's import time, and rarely needed

        if len(self.schedule.split()) != 5 or not croniter.is_valid(self.schedule):
            raise ValueError(
                f"{self.schedule!r} is not a cron expression of five fields, e.g. '0 3 * * *'"
            )
        return self


class Tracking(Section):
    """Where runs are recorded for people. A plain string is short for `backend` alone."""

    short_for = "backend"

    backend: Literal["mlflow", "none"] = "mlflow"
    """`mlflow` or nothing."""
    uri: str | None = None
    """MLflow tracking URI; null: `$MLFLOW_TRACKING_URI`, else a SQLite file beside the store."""

    @field_validator("uri")
    @classmethod
    def _names_no_account(cls, uri: str | None) -> str | None:
        return None if uri is None else _without_account(uri)


_DEFAULT_METRICS: dict[str, str] = {
    "classification": "auc",
    "regression": "rmse",
    "image-classification": "accuracy",
}


class Contract(Section):
    """All that Driftmill has to know about a model."""

    apiVersion: Literal["driftmill/v1"]  # noqa: N815 (the spelling of Kubernetes)
    """Version of this format."""
    model: str = Field(pattern="^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    """Name of the model: lower case, digits, hyphens, at most 40 characters."""
    owner: str = ""
    """Who answers for it."""
    description: str = ""
    """What it is for."""
    task: Task
    """What kind of model it is."""
    data: Data
    """Where the rows are and what they look like."""
    train: Train = Train()
    """Which models are tried, and how."""
    gates: Gates = Gates()
    """What a new model must show before it serves."""
    serve: Serve = Serve()
    """How it is served."""
    monitor: Monitor = Monitor()
    """When it counts as drifted."""
    retrain: Retrain = Retrain()
    """When it is trained again."""
    tracking: Tracking = Tracking()
    """Where runs are recorded for people."""

    @property
    def metric(self) -> Metric:
        """The metric of the contract, or the default of its task."""
        if self.train.metric is not None:
            return self.train.metric
        return Metric.model_validate(_DEFAULT_METRICS[self.task])

    @property
    def is_vision(self) -> bool:
        """Whether the model's input is an image."""
        return self.task == "image-classification"

    def _fill_in(self, section: str, **values: object) -> None:
        """Set defaults that depend on the task; to everybody else the contract is frozen."""
        filled = getattr(self, section).model_copy(update=values)
        object.__setattr__(self, section, filled)

    @model_validator(mode="after")
    def _for_task(self) -> Contract:
        """Families and image as the task needs them."""
        if self.is_vision != (self.data.image is not None):
            if self.is_vision:
                raise ValueError("data.image: an image task needs it, e.g. {size: 28, channels: 1}")
            raise ValueError(
                "data.image is for image tasks; did you mean task: image-classification?"
            )
        fitting: tuple[str, ...] = get_args(VisionFamily if self.is_vision else TabularFamily)
        if not self.train.candidates:
            chosen = ("small-cnn",) if self.is_vision else fitting
            self._fill_in("train", candidates=chosen)
        if self.is_vision and "max_body_bytes" not in self.serve.model_fields_set:
            self._fill_in("serve", max_body_bytes=32 * 1024 * 1024)
        for family in self.train.candidates:
            if family not in fitting:
                raise ValueError(
                    f"train.candidates: {family} is not for {self.task}; choose from "
                    + ", ".join(fitting)
                )
        if not self.is_vision and self.serve.precision != "float32":
            raise ValueError("serve.precision is for image tasks")
        if not self.is_vision and self.train.resources.nodes > 1:
            raise ValueError("train.resources.nodes is for image tasks: tables train on one node")
        if self.train.resources.gpu and self.train.vision.device == "cpu":
            raise ValueError(
                f"train.resources.gpu asks for {self.train.resources.gpu} and "
                "train.vision.device is cpu: set gpu: 0 or device: auto"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Contract:
        kind = "regression" if self.task == "regression" else "classification"
        if METRICS[self.metric.name][1] != kind:
            fitting = ", ".join(n for n, (_, task) in METRICS.items() if task == kind)
            raise ValueError(
                f"train.metric {self.metric.name} is not for {self.task}; choose one of {fitting}"
            )
        target = self.data.target
        if self.task != "regression":
            if target.min is not None or target.max is not None or target.transform != "none":
                raise ValueError("data.target: `min`, `max` and `transform` are for regression")
            if len(target.labels) == 1:
                raise ValueError("data.target.labels: a classification needs two labels or more")
        elif target.labels:
            raise ValueError("data.target.labels is for classification")
        names = {c.name for c in self.data.columns}
        compared = names | ({EMBEDDING} if self.is_vision else set())
        for field, listed in (
            ("gates.slices.columns", self.gates.slices.columns),
            ("monitor.ignore", self.monitor.ignore),
            ("monitor.weights", tuple(self.monitor.weights)),
        ):
            known = compared if field.startswith("monitor") else names
            for name in listed:
                if name not in known:
                    raise ValueError(
                        f"{field}: {name!r} is not a column of data.columns"
                        + did_you_mean(name, known)
                    )
        return self

    def to_json(self) -> str:
        """The contract as compact JSON with every default filled in; `parse` reads it back."""
        return self.model_dump_json()


class ContractError(ValueError):
    """A contract that cannot be used. `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def did_you_mean(word: str, valid: Iterator[str] | set[str] | list[str] | tuple[str, ...]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid word, or nothing."""
    near = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def load(path: str | Path) -> Contract:
    """Read a contract file. A relative `file:` source is resolved against the file's folder.

    Raises:
        ContractError: it is missing, not YAML, or not a valid contract.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ContractError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError([f"{path}: cannot be read: {error}"]) from None
    return parse(text, name=str(path), folder=path.resolve().parent)


def parse(text: str, name: str = "contract", folder: Path | None = None) -> Contract:
    """Read a contract from YAML (or JSON) text.

    Args:
        text: the contract.
        name: what messages call it.
        folder: base of relative `file:` sources; None leaves them as they are.

    Raises:
        ContractError: one line for each mistake: `name:line: field: what was expected`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise ContractError([f"{name}:{line}: not valid YAML: {problem}"]) from None
    except ValueError as error:  # e.g. a date such as 2011-13-01
        raise ContractError([f"{name}:1: not valid YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ContractError([f"{name}:1: expected a mapping with apiVersion, model, task, data"])
    assert node is not None
    problems = [
        f"{name}:{line}: {field}: this key is given twice" for line, field in _duplicates(node)
    ]
    if problems:
        raise ContractError(problems)
    if folder is not None:
        _resolve_files(values, folder)
    try:
        return Contract.model_validate(values)
    except ValidationError as error:
        found = [
            (_line(node, p["loc"]), _explain(name, node, dict(p)))
            for p in error.errors()
            # A list whose items are wrong is also reported as too short: the items say it better.
            if p["type"] != "too_short" or not p["input"]
        ]
        raise ContractError([text for _, text in sorted(found)]) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the contract, for editors."""
    schema = Contract.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Driftmill contract",
        **{k: v for k, v in schema.items() if k != "title"},
    }


#: Schemes of sources that name a file or a folder of this machine.
LOCAL_SCHEMES = ("file", "idx", "folder", "cifar10")


def _resolve_files(values: dict[str, Any], folder: Path) -> None:
    """Make relative URIs of local files absolute, and the path of the weights, in place."""
    train = values.get("train")
    vision = train.get("vision") if isinstance(train, dict) else None
    weights = vision.get("weights") if isinstance(vision, dict) else None
    if isinstance(weights, dict) and isinstance(weights.get("file"), str):
        weights["file"] = str((folder / weights["file"]).resolve())
    data = values.get("data")
    if not isinstance(data, dict):
        return
    for key in ("source", "test"):
        source = data.get(key)
        uri = source.get("uri") if isinstance(source, dict) else source
        if not isinstance(uri, str):
            continue
        scheme, _, rest = uri.partition(":")
        if scheme in LOCAL_SCHEMES and not rest.startswith("/"):
            absolute = f"{scheme}://{(folder / rest).resolve()}"
            if isinstance(source, dict):
                data[key] = {**source, "uri": absolute}
            else:
                data[key] = absolute


def _duplicates(node: yaml.Node, where: str = "") -> Iterator[tuple[int, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            field = f"{where}.{key.value}".lstrip(".")
            if key.value in seen:
                yield key.start_mark.line + 1, field
            seen.add(key.value)
            yield from _duplicates(value, field)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _duplicates(value, f"{where}[{i}]")


def _line(node: yaml.Node, loc: tuple[Any, ...]) -> int:
    """Line of the deepest part of `loc` that stands in the text."""
    line = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                return line
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _model_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The Pydantic model that a location lies in."""
    model: type[BaseModel] | None = Contract
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        model = section_in(field.annotation)
    return model


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation, as in `tuple[Column, ...] | None`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = section_in(inner)
        if found is not None:
            return found
    return None


def _explain(name: str, node: yaml.Node, problem: dict[str, Any]) -> str:
    loc: tuple[Any, ...] = tuple(problem["loc"])
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    given = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            model = _model_at(loc[:-1])
            valid = list(model.model_fields) if model else []
            text = f"unknown field{did_you_mean(str(loc[-1]), valid)}"
            if "did you mean" not in text and valid:
                text += f"; expected one of {', '.join(valid)}"
        case "missing":
            text = "this field is needed"
            model = _model_at(loc[:-1])
            if model is not None and loc[-1] in model.model_fields:
                description = model.model_fields[loc[-1]].description or ""
                text += f": {' '.join(description.split())}" if description else ""
        case "literal_error":
            expected = problem["ctx"]["expected"]
            valid = re.findall(r"'([^']*)'", expected)
            text = f"expected {expected}, got {given!r}{did_you_mean(str(given), valid)}"
        case "value_error":
            text = str(problem["ctx"]["error"])
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            shown = json.dumps(given, default=str)
            text = f"{message}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return f"{name}:{_line(node, loc)}: {field + ': ' if field else ''}{text}"
