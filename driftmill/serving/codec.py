"""Requests to arrays and answers to JSON, by decoders built from a model's signature.

The decoders are strict: no text for a number, no unknown field, no value outside its range, and
what they refuse they name by its path. Nothing here imports pandas.

`Codec` is what models of tables and of images have in common, `TableCodec` reads tables,
`image_codec.ImageCodec` images; `codec_for` makes the right one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NoReturn, overload

import msgspec
import numpy as np
from msgspec import Meta

from driftmill.contract import Column, Contract, did_you_mean
from driftmill.features import ID, MISSING, TIME, Signature
from driftmill.serving.session import Session

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"

#: What a prediction id looks like: who made it (16 digits) and a counter (10 digits).
ID_PATTERN = "^[0-9a-f]{26}$"
#: Largest number that still is one as float32.
_LARGEST = float(np.finfo(np.float32).max)
#: Times that every reader of the log can hold.
_YEARS = range(1700, 2200)
_TIME_OF_A_ROW = Annotated[
    datetime,
    Meta(
        tz=True,
        description="When it happened, RFC 3339, between 1700 and 2199.",
        extra_json_schema={"pattern": "^(1[7-9]|2[01])[0-9]{2}-"},
    ),
]

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)
_RECORD = re.compile(r"\$\.records\[\d+\]\.(?P<name>.*)", re.DOTALL)

_encode = msgspec.json.Encoder().encode


#: Headers of an answer: try again in a second, and elsewhere.
RETRY = (b"retry-after", b"1")
CLOSE = (b"connection", b"close")


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        code: short word for programs.
        message: one sentence for people.
        path: which part of the body, e.g. `$.records[3].amount`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        path: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.path = path
        self.headers = headers

    def body(self) -> bytes:
        """`{"error": {"code", "message", "path"?}}`."""
        error = {"code": self.code, "message": self.message}
        if self.path is not None:
            error["path"] = self.path
        return _encode({"error": error})


class Answer(msgspec.Struct, gc=False, omit_defaults=True):
    """One prediction of the answer."""

    id: str
    prediction: str | float
    score: float | None = None
    """Classification: probability of the last label of two, or of the chosen one of more."""
    probabilities: dict[str, float] | None = None


class Answers(msgspec.Struct, gc=False):
    """The answer to `POST /predict`."""

    model: str
    version: str
    predictions: list[Answer]


class GivenLabel(msgspec.Struct, gc=False):
    """One label of a feedback, before it is checked."""

    id: str
    label: Any


class Rows(Sequence[Any]):
    """Records that are columns as long as nobody asks for one.

    Args:
        numeric: (rows, a) float32, as the model takes it.
        text: (rows, b) str, as the model takes it.
        make: gives the records.
    """

    def __init__(
        self, numeric: np.ndarray, text: np.ndarray, make: Callable[[], list[Any]]
    ) -> None:
        self.numeric = numeric
        self.text = text
        self._make = make
        self._records: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.numeric)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def _all(self) -> list[Any]:
        if self._records is None:
            self._records = self._make()
        return self._records


class Codec:
    """Decodes requests for one model and encodes its answers.

    Args:
        signature: what the model takes and gives.
        contract: how many records a request may have, and spellings of labels.
        fields: of a record, beside `_id` and `_time`, which every record may have.
        rename: names in JSON of the fields that have others in Python.
        words: the words that each field takes, by its name in JSON; none where any will do.
    """

    #: Whether decoding and running the model take so long that they happen in threads.
    threaded: ClassVar[bool] = False

    def __init__(
        self,
        signature: Signature,
        contract: Contract,
        fields: Sequence[tuple[str, Any] | tuple[str, Any, Any]],
        rename: dict[str, str],
        words: dict[str, tuple[str, ...]],
    ) -> None:
        self.signature = signature
        most = contract.serve.max_records
        record = msgspec.defstruct(
            "Record",
            [
                *fields,
                ("id", Annotated[str, Meta(max_length=512)] | None, None),
                ("time", _TIME_OF_A_ROW | None, None),
            ],
            rename=rename | {"id": ID, "time": TIME},
            forbid_unknown_fields=True,
            kw_only=True,
            gc=False,
        )
        records = Annotated[list[record], Meta(min_length=1, max_length=most)]  # type: ignore[valid-type]
        self.predict_type = msgspec.defstruct(
            "PredictRequest", [("records", records)], forbid_unknown_fields=True
        )
        label = msgspec.defstruct(
            "Label",
            [
                ("id", Annotated[str, Meta(pattern=ID_PATTERN, max_length=26)]),
                ("label", _label(contract, signature)),
            ],
            forbid_unknown_fields=True,
            gc=False,
        )
        labels = Annotated[list[label], Meta(min_length=1, max_length=most)]  # type: ignore[valid-type]
        self.feedback_type = msgspec.defstruct(
            "FeedbackRequest", [("labels", labels)], forbid_unknown_fields=True
        )
        #: Most rows that waiting requests are joined to.
        self.batch_rows = contract.serve.max_batch_rows
        self._words = words
        self._predict = msgspec.json.Decoder(self.predict_type)
        self._feedback = msgspec.json.Decoder(self.feedback_type)
        self._label_aliases = contract.data.target.aliases

    def content(self) -> dict[str, Any]:
        """Content types of `/predict` beside JSON, and what is sent with them, for OpenAPI."""
        return {}

    def answer_content(self, answers: dict[str, Any]) -> dict[str, Any]:
        """Content types of the answers of `/predict`, for OpenAPI.

        Args:
            answers: their schema in JSON.
        """
        return {JSON: {"schema": answers}}

    def check_kind(self, kind: str) -> None:
        """Raise RequestError (415) for a content type that `/predict` does not take."""
        if not is_json(kind):
            raise RequestError(415, "unsupported_media_type", f"Send Content-Type: {JSON}")

    def records(self, body: bytes, kind: str = JSON) -> Sequence[Any]:
        """The records of a request, not decoded yet.

        Raises:
            RequestError: 400, 422.
        """
        records: list[Any] = self._decode(self._predict, body).records
        for index, record in enumerate(records):
            if record.time is not None and record.time.year not in _YEARS:
                raise RequestError(
                    422,
                    "invalid_field",
                    f"Expected a time between {_YEARS[0]} and {_YEARS[-1]}",
                    f"$.records[{index}].{TIME}",
                )
        return records

    def decode_now(self, records: Sequence[Any]) -> Sequence[Any] | None:
        """As `decode`; None where that would hold the event loop up."""
        return self.decode(records)

    def decode(self, records: Sequence[Any]) -> Sequence[Any]:
        """Records as `run` takes them. Raises RequestError (413, 415, 422)."""
        return records

    def run(
        self, session: Session, records: Sequence[Any], keep: bool = True
    ) -> tuple[np.ndarray, Sequence[Any]]:
        """Predict.

        Args:
            session: the model.
            records: from `decode`.
            keep: whether the log keeps what a record weighs most with.

        Returns:
            The model's output, and what the log keeps of each record.
        """
        raise NotImplementedError

    def labels(self, body: bytes) -> list[GivenLabel]:
        """The labels of a feedback, spelt as the model spells them. Raises RequestError."""
        aliases = self._label_aliases
        return [
            GivenLabel(given.id, aliases.get(given.label, given.label) if aliases else given.label)
            for given in self._decode(self._feedback, body).labels
        ]

    def answers(self, ids: Sequence[str], output: np.ndarray) -> list[Answer]:
        """A model's output, row by row, as `bundle.answers` reads it."""
        values = output.tolist()
        labels = self.signature.labels
        if not labels:
            return [Answer(i, value) for i, value in zip(ids, values, strict=True)]
        if len(labels) == 2:  # most models: no loop over labels
            no, yes = labels
            return [
                Answer(i, yes if q > p else no, q, {no: p, yes: q})
                for i, (p, q) in zip(ids, values, strict=True)
            ]
        answers = []
        for i, row in zip(ids, values, strict=True):
            best = max(row)
            chosen = labels[row.index(best)]
            answers.append(Answer(i, chosen, best, dict(zip(labels, row, strict=True))))
        return answers

    def _decode(self, decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            self._refuse(str(error))
        except msgspec.DecodeError as error:
            raise RequestError(
                400, "invalid_json", f"The body is not valid JSON: {error}"
            ) from None
        except UnicodeDecodeError:
            raise RequestError(400, "invalid_json", "The body is not valid UTF-8") from None
        except RecursionError:
            raise RequestError(400, "invalid_json", "The body is nested too deep") from None

    def _refuse(self, text: str) -> NoReturn:
        """Raise what msgspec says, with the full path and, for a typo, the nearest valid word."""
        match = _AT.match(text)
        assert match is not None
        what, path = match["what"], match["path"] or "$"
        field = _FIELD.fullmatch(what)
        if field is not None:
            name = field["name"]
            if "unknown" in what:
                known = [*self._words, ID, TIME] if path.startswith("$.records[") else []
                what = f"Unknown field {name!r}{did_you_mean(name, known)}"
            else:
                what = f"The field {name!r} is needed"
            path = f"{path}.{name}"
        elif what.startswith("Invalid enum value "):
            value = what.removeprefix("Invalid enum value ").strip("'")
            column = _RECORD.fullmatch(path)
            valid = self._words[column["name"]] if column is not None else self.signature.labels
            shown = ", ".join(repr(v) for v in valid[:10]) + (", ..." if len(valid) > 10 else "")
            what = f"Expected one of {shown}, got {value[:60]!r}{did_you_mean(value[:60], valid)}"
        raise RequestError(422, "invalid_field", what, path)


class TableCodec(Codec):
    """The codec of a model whose records are rows of a table; arguments are those of `Codec`."""

    def __init__(self, signature: Signature, contract: Contract) -> None:
        names = {c.name: f"c{i}" for i, c in enumerate(signature.columns)}
        rename = {attribute: name for name, attribute in names.items()}
        super().__init__(
            signature,
            contract,
            fields=[_field(names[c.name], c) for c in signature.columns],
            rename=rename,
            words={c.name: c.categories for c in signature.columns},
        )
        self._numbers, self._texts = len(signature.numeric), len(signature.categorical)
        self._numeric = _getter([names[n] for n in signature.numeric])
        self._text = _getter([names[n] for n in signature.categorical])
        self._nullable_text = any(c.nullable for c in signature.columns if not c.is_numeric)
        self._booleans = [names[c.name] for c in signature.columns if c.type == "bool"]
        self._aliases = [(names[c.name], c.aliases) for c in signature.columns if c.aliases]
        from driftmill.serving.arrow import Reader  # which needs this module

        self._arrow = Reader(
            signature,
            rename | {"id": ID, "time": TIME},
            _YEARS,
            contract.serve.max_records,
            contract.serve.max_body_bytes,
        )

    def content(self) -> dict[str, Any]:
        """Content types of `/predict` beside JSON, and what is sent with them, for OpenAPI."""
        return {ARROW: {}}

    def answer_content(self, answers: dict[str, Any]) -> dict[str, Any]:
        """Content types of the answers of `/predict`, for OpenAPI."""
        return super().answer_content(answers) | {ARROW: {}}

    def check_kind(self, kind: str) -> None:
        """Raise RequestError (415) for a content type that `/predict` does not take."""
        if not is_json(kind) and media_type(kind) != ARROW:
            text = f"Send Content-Type: {JSON} or {ARROW}"
            raise RequestError(415, "unsupported_media_type", text)

    def records(self, body: bytes, kind: str = JSON) -> Sequence[Any]:
        """The records of a request. Raises RequestError (400, 413, 422)."""
        if not is_json(kind):
            return self._arrow.rows(body)
        records = super().records(body)
        for name in self._booleans:
            for record in records:
                value = getattr(record, name)
                if value.__class__ is float:
                    setattr(record, name, value == 1.0)
        for name, aliases in self._aliases:
            for record in records:
                value = getattr(record, name)
                if value in aliases:
                    setattr(record, name, aliases[value])
        return records

    def run(
        self, session: Session, records: Sequence[Any], keep: bool = True
    ) -> tuple[np.ndarray, Sequence[Any]]:
        """Predict; the log keeps the records as they are."""
        return session.run(*self.arrays(records)), records

    def arrays(self, records: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The model's inputs, as `features.arrays` makes them: (rows, a) float32, (rows, b) str."""
        if isinstance(records, Rows):
            return records.numeric, records.text
        rows = len(records)
        numbers = chain.from_iterable(map(self._numeric, records))
        numeric = np.fromiter(numbers, np.float32, rows * self._numbers)  # None becomes NaN
        texts: Iterable[str | None] = chain.from_iterable(map(self._text, records))
        if self._nullable_text:
            texts = [MISSING if text is None else text for text in texts]
        text = np.fromiter(texts, object, rows * self._texts)
        return numeric.reshape(rows, self._numbers), text.reshape(rows, self._texts)


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Some attributes of a record as a tuple."""
    if len(names) == 1:
        one = attrgetter(names[0])
        return lambda record: (one(record),)
    if names:
        return attrgetter(*names)
    return lambda record: ()


def _field(name: str, column: Column) -> tuple[str, Any] | tuple[str, Any, Any]:
    """A column as a field of the record; one that is nullable may also be absent."""
    kind: Any
    match column.type:
        case "category" if column.unknown == "reject":
            values = (*column.categories, *column.aliases)
            kind = Literal[(*values, MISSING) if column.nullable else values]
        case "category":
            kind = Annotated[str, Meta(min_length=0 if column.nullable else 1)]
        case "bool":
            kind = bool | Annotated[float, Meta(ge=0, le=1, multiple_of=1)]
        case _:
            low = -_LARGEST if column.min is None else max(column.min, -_LARGEST)
            high = _LARGEST if column.max is None else min(column.max, _LARGEST)
            # JSON has one kind of number: 5.0 is a valid integer.
            whole = 1 if column.type == "int" else None
            kind = Annotated[float, Meta(ge=low, le=high, multiple_of=whole)]
    if column.description:
        kind = Annotated[kind, Meta(description=column.description)]
    return (name, kind | None, None) if column.nullable else (name, kind)


def _label(contract: Contract, signature: Signature) -> Any:
    target = contract.data.target
    if signature.labels:
        return Literal[(*signature.labels, *target.aliases)]
    low = -math.inf if target.min is None else target.min
    high = math.inf if target.max is None else target.max
    return Annotated[float, Meta(ge=max(low, -_LARGEST), le=min(high, _LARGEST))]


def is_json(kind: str) -> bool:
    """Whether a content type is JSON's."""
    if kind == JSON:
        return True
    kind = media_type(kind)
    return kind == JSON or kind.endswith("+json")


def media_type(kind: str) -> str:
    """A content type without its parameters."""
    return kind.partition(";")[0].strip().lower()


def codec_for(signature: Signature, contract: Contract) -> Codec:
    """The codec of a model of tables or of images."""
    if signature.image is None:
        return TableCodec(signature, contract)
    from driftmill.serving.image_codec import ImageCodec  # tables need no Pillow

    return ImageCodec(signature, contract)


def encode_answers(model: str, version: str, answers: list[Answer]) -> bytes:
    """The body of the answer to `POST /predict`."""
    return _encode(Answers(model, version, answers))
