"""Requests of models of images: JSON with base64, a form with files, or the bytes of one image."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from driftmill.contract import Contract, Image, did_you_mean
from driftmill.features import EMBEDDING, ID, IMAGE, TIME, Signature
from driftmill.serving.codec import JSON, Codec, RequestError, is_json, media_type
from driftmill.serving.session import Session
from driftmill.vision import images
from driftmill.vision.images import Decoded, ImageError

# A form that cannot be read is answered; it is not worth a line of the log each time.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

#: The field of a JSON record, and names that a part of a form may have.
FIELD, PARTS = "image", ("image", "images", "file")
FORM, OCTETS = "multipart/form-data", "application/octet-stream"
#: Numbers (pixels times channels) in a batch of a model. Larger ones gain nothing: what the layers
#: of a large network make of them no longer fits into a processor's cache.
BATCH_NUMBERS = 4 * 3 * 224 * 224
#: Files up to this size, of images up to so many pixels, are decoded faster than a thread is woken.
SMALL_BYTES, SMALL_PIXELS = 16 * 1024, 4096

#: Pixels whose statistics are computed at once: what fits into a processor's cache.
STATISTICS_PIXELS = 64 * 1024

#: Reasons of `images.decode` that are not "this image breaks a rule".
_TOO_LARGE, _TOO_MANY_PIXELS, _NO_IMAGE = "too many bytes", "too many pixels", "not an image"
_NOT_LISTED = "format "


@dataclass(slots=True)
class Upload:
    """An image as it came."""

    image: bytes
    id: str | None = None
    time: datetime | None = None


@dataclass(slots=True)
class Picture:
    """An image as the model sees it, and what the log keeps of it."""

    decoded: Decoded
    png: bytes | None
    """The pixels; None where the log keeps no images."""
    id: str | None
    time: datetime | None
    statistics: dict[str, float] | None = None
    """Of the first run; None before."""


class ImageCodec(Codec):
    """The codec of a model of images; arguments are those of `Codec`."""

    threaded: ClassVar[bool] = True

    def __init__(self, signature: Signature, contract: Contract) -> None:
        assert signature.image is not None
        self.image = signature.image
        # JSON Schema cannot say what an image is: one that is taken stands in its place.
        black = np.zeros((self.image.channels, *self.image.size), np.uint8)
        example = base64.b64encode(images.to_png(black)).decode()
        file = Annotated[bytes, Meta(min_length=1, examples=[example])]
        super().__init__(signature, contract, fields=[(FIELD, file)], rename={}, words={FIELD: ()})
        self._small = self.image.model_copy(
            update={"max_pixels": min(SMALL_PIXELS, self.image.max_pixels)}
        )
        #: Content types of one image by itself.
        self._raw = (*(f"image/{name}" for name in self.image.formats), OCTETS)
        self._most = contract.serve.max_records
        self._logs_images = contract.serve.log.images
        self._shape = (self.image.channels, *self.image.size)
        fitting = BATCH_NUMBERS // int(np.prod(self._shape))
        self.batch_rows = max(1, min(contract.serve.max_batch_rows, fitting))

    def content(self) -> dict[str, Any]:
        """Content types of `/predict` beside JSON, and what is sent with them, for OpenAPI."""
        file = {"type": "string", "contentMediaType": OCTETS}
        one_or_many = {"oneOf": [file, {"type": "array", "items": file, "maxItems": self._most}]}
        form = {
            "type": "object",
            "properties": dict.fromkeys(PARTS, one_or_many),
            "additionalProperties": False,
            "minProperties": 1,
        }
        return {FORM: {"schema": form}} | {kind: {} for kind in self._raw}

    def check_kind(self, kind: str) -> None:
        """Raise RequestError (415) for a content type that `/predict` does not take."""
        if not is_json(kind) and media_type(kind) not in (FORM, *self._raw):
            text = f"Send Content-Type: {', '.join((JSON, FORM, *self._raw))}"
            raise RequestError(415, "unsupported_media_type", text)

    def records(self, body: bytes, kind: str = JSON) -> Sequence[Any]:
        """The images of a request as they came. Raises RequestError (400, 415, 422)."""
        if is_json(kind):
            return super().records(body)
        if media_type(kind) == FORM:
            return [Upload(content) for content in self._files(body, kind)]
        return [Upload(body)]

    def decode_now(self, records: Sequence[Any]) -> Sequence[Any] | None:
        """As `decode`; None where that would hold the event loop up."""
        if sum(len(r.image) for r in records) > SMALL_BYTES:
            return None
        decoded = []
        for index, record in enumerate(records):
            try:
                decoded.append(self._picture(record, self._small))
            except ImageError as error:
                if str(error) == _TOO_MANY_PIXELS:
                    return None
                raise _refusal(error, record, index) from None
        return decoded

    def decode(self, records: Sequence[Any]) -> Sequence[Any]:
        """The images as the model sees them. Raises RequestError (413, 415, 422)."""
        decoded = []
        for index, record in enumerate(records):
            try:
                decoded.append(self._picture(record, self.image))
            except ImageError as error:
                raise _refusal(error, record, index) from None
        return decoded

    def run(
        self, session: Session, records: Sequence[Any], keep: bool = True
    ) -> tuple[np.ndarray, Sequence[Any]]:
        """Predict, no more than a batch at a time; the log keeps statistics, embedding and, where
        `keep` is set and the contract says so, the pixels."""
        outputs, kept = [], []
        for start in range(0, len(records), self.batch_rows):
            part = records[start : start + self.batch_rows]
            pixels = np.stack([r.decoded.pixels for r in part])
            output, embeddings = session.embed(pixels)
            outputs.append(output)
            kept += [
                {
                    ID: picture.id,
                    TIME: picture.time,
                    **statistics,
                    IMAGE: picture.png if keep else None,
                    EMBEDDING: embedding.tobytes(),
                }
                for picture, statistics, embedding in zip(
                    part, _statistics(part, pixels), embeddings.astype("<f2"), strict=True
                )
            ]
        return np.concatenate(outputs), kept

    def _picture(self, record: Any, image: Image) -> Picture:
        decoded = images.decode(record.image, image)
        png = images.to_png(decoded.pixels) if self._logs_images else None
        return Picture(decoded, png, record.id, record.time)

    def _files(self, body: bytes, kind: str) -> list[bytes]:
        """The files of a form, in order."""
        files: list[bytes] = []
        ended = False

        def on_file(file: File) -> None:
            self._check_name(file.field_name or b"")
            if len(files) == self._most:
                raise RequestError(422, "invalid_form", f"Send at most {self._most} images")
            file.file_object.seek(0)
            files.append(file.file_object.read())

        def on_field(field: Field) -> None:
            self._check_name(field.field_name or b"")
            name = (field.field_name or b"").decode("latin-1")
            raise RequestError(422, "invalid_form", f"The part {name!r} must be a file")

        def on_end() -> None:
            nonlocal ended
            ended = True

        boundary = parse_options_header(kind)[1].get(b"boundary")
        if not boundary:
            raise RequestError(400, "invalid_form", f"{FORM} needs a boundary")
        try:
            # The body lies in memory already: no part of it goes to a disk.
            form = FormParser(
                FORM, on_field, on_file, on_end, boundary, config={"MAX_MEMORY_FILE_SIZE": 2**63}
            )
            form.write(body)
            form.finalize()
        except FormParserError as error:
            raise RequestError(400, "invalid_form", f"The form cannot be read: {error}") from None
        if not ended:
            raise RequestError(400, "invalid_form", "The form ends early")
        if not files:
            raise RequestError(422, "invalid_form", f"The form has no file named {PARTS[0]!r}")
        return files

    def _check_name(self, given: bytes) -> None:
        name = given.decode("latin-1")
        if name not in PARTS:
            text = f"Unknown part {name[:60]!r}{did_you_mean(name[:60], PARTS)}"
            raise RequestError(422, "invalid_form", f"{text}; name it one of {', '.join(PARTS)}")


def _statistics(pictures: Sequence[Picture], pixels: np.ndarray) -> list[dict[str, float]]:
    """The statistics of each picture, computed unless another model has seen them all."""
    known = [p.statistics for p in pictures if p.statistics is not None]
    if len(known) == len(pictures):
        return known
    found: list[dict[str, float]] = []
    sizes = np.array([(p.decoded.width, p.decoded.height) for p in pictures])
    some = max(1, STATISTICS_PIXELS // (pixels.shape[2] * pixels.shape[3]))
    for start in range(0, len(pixels), some):
        table = images.statistics(pixels[start : start + some], sizes[start : start + some])
        rows = zip(*(values.tolist() for values in table.values()), strict=True)
        found += [dict(zip(table, row, strict=True)) for row in rows]
    for picture, statistics in zip(pictures, found, strict=True):
        picture.statistics = statistics
    return found


def _refusal(error: ImageError, record: Any, index: int) -> RequestError:
    """What `images.decode` says, as an answer. Of a JSON body the content type was right, so that
    a field that is no image is a wrong field."""
    reason = str(error)
    status, code = 422, "invalid_image"
    if reason == _TOO_LARGE:
        status, code = 413, "image_too_large"
    elif isinstance(record, Upload) and (reason == _NO_IMAGE or reason.startswith(_NOT_LISTED)):
        status, code = 415, "unsupported_image"
    return RequestError(
        status, code, f"The image cannot be taken: {reason}", f"$.records[{index}].{FIELD}"
    )
