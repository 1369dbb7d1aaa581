"""From a file's bytes to the pixels that a model sees, the same in training and in serving.

Nothing that comes from outside is decoded before its header has passed the limits of `data.image`:
bytes, format, pixels, and kinds that must be listed to be taken. Whatever the bytes are, `decode`
gives pixels or an `ImageError`. Needs Pillow and NumPy alone.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError, DecompressionBombWarning, Resampling, Transpose
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from driftmill.contract import Image

#: How a file of each format begins, and Pillow's class for it. The classes are used by themselves:
#: `PIL.Image.open` has a limit of its own on pixels, tries formats that nobody listed, and takes
#: some JPEG files of telephones (MPO) for animated.
_FORMATS: dict[str, tuple[tuple[bytes, ...], type[ImageFile]]] = {
    "png": ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    "jpeg": ((b"\xff\xd8\xff",), JpegImageFile),
    "gif": ((b"GIF87a", b"GIF89a"), GifImageFile),
    "tiff": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    "webp": ((b"RIFF",), WebPImageFile),
    "bmp": ((b"BM",), BmpImageFile),
}
#: What Pillow raises on files that are cut off, damaged or made to harm.
_BROKEN = (
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
#: Pillow's limit of 179 million pixels, where it cannot be passed by: WebP, TIFF, and frames of a
#: GIF that are larger than it.
_BOMBS = (DecompressionBombError, DecompressionBombWarning)
#: EXIF's tag for how the camera was held, and what sets its values right.
_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image that is not taken. The text is a short reason, the same for the same kind."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as the model sees it."""

    pixels: np.ndarray
    """uint8 (channels, height, width), in the contract's size."""
    width: int
    """Pixels across as it came, after EXIF rotation."""
    height: int
    """Pixels down as it came."""


def format_of(content: bytes) -> str:
    """Which of the formats that a contract may list a file has, by how it begins. Raises ImageError
    where it has none of them."""
    for name, (beginnings, _) in _FORMATS.items():
        if content.startswith(beginnings) and (name != "webp" or content[8:12] == b"WEBP"):
            return name
    raise ImageError("not an image")


def decode(content: bytes, image: Image) -> Decoded:
    """Decode a file.

    Args:
        content: the whole file.
        image: which files are taken, and what the model sees of them.

    Raises:
        ImageError: it breaks a limit, is of a kind that `convert` does not list, or cannot be
            decoded.
    """
    opened = _open(content, image)
    # A JPEG file can be decoded at an eighth of its size and more: far faster, and still twice as
    # large as what is kept of it.
    width, height = opened.size
    if isinstance(opened, JpegImageFile):
        side = 2 * max(image.size)
        opened.draft(None, (side, side))
    turned, plain = _load(opened, image)
    if turned:
        width, height = height, width
    return Decoded(_fit(plain, image), width, height)


def decode_whole(content: bytes, image: Image) -> np.ndarray:
    """As `decode`, without making the image fit: uint8 (height, width) grey or (height, width, 3)
    as it came."""
    return np.asarray(_load(_open(content, image), image)[1])


def from_array(array: np.ndarray, image: Image) -> Decoded:
    """Make an image that is pixels already fit.

    Args:
        array: uint8, (height, width) grey or (height, width, 3) red, green, blue.
        image: what the model sees of it.

    Raises:
        ImageError: it has another shape or type.
    """
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)) or array.ndim < 2:
        raise ImageError("not 8-bit pixels of one or three channels")
    height, width = array.shape[:2]
    if height * width > image.max_pixels:
        raise ImageError("too many pixels")
    if not height * width:
        raise ImageError("empty")
    if array.shape[:2] == image.size and image.channels == (1 if array.ndim == 2 else 3):
        return Decoded(_channels_first(array), width, height)
    plain = PIL.Image.fromarray(array).convert("L" if image.channels == 1 else "RGB")
    return Decoded(_fit(plain, image), width, height)


def to_array(pixels: np.ndarray) -> np.ndarray:
    """(channels, height, width) as (height, width) grey or (height, width, 3)."""
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 (channels, height, width) as a PNG file; `from_png` gives it back."""
    return array_to_png(to_array(pixels))


def array_to_png(array: np.ndarray) -> bytes:
    """uint8 (height, width) or (height, width, 3) as a PNG file."""
    buffer = io.BytesIO()
    # Of photographs, rows that are filtered hardly repeat themselves: to look for runs alone takes
    # two thirds of the time and makes smaller files.
    PIL.Image.fromarray(array).save(buffer, "png", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def from_png(content: bytes) -> np.ndarray:
    """The uint8 pixels (channels, height, width) of a PNG file that `to_png` made.

    Raises:
        ImageError: it is not such a file.
    """
    try:
        with PngImageFile(io.BytesIO(content)) as opened:
            if opened.mode not in ("L", "RGB"):
                raise ImageError("cannot be decoded")
            return _channels_first(np.asarray(opened))
    except _BROKEN:
        raise ImageError("cannot be decoded") from None


def column(contents: Iterable[Any], length: int) -> np.ndarray:
    """Images as a table's column: an object array (length,) with an image in each place. (NumPy
    would make one array of images of one shape.)"""
    places = np.empty(length, dtype=object)
    for place, content in enumerate(contents):
        places[place] = content
    return places


def statistics(pixels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of images, each a float32 array (n,), named as the contract's columns.

    With luminance Y = (0.299 R + 0.587 G + 0.114 B) / 255 (ITU-R BT.601; a grey image's own value):

    - `brightness` mean of Y; `contrast` its standard deviation.
    - `sharpness` standard deviation of Y's Laplacian, 4 neighbours, without the border.
    - `entropy` -sum p log2 p over the 256 bins of 255 Y, rounded (Shannon).
    - `noise` sqrt(pi / 2) / 6 times the mean of |Y * N| without the border, where N is the outer
      product of (1, -2, 1) with itself: the standard deviation of additive noise, blind to what is
      locally linear (Immerkaer 1996).
    - `saturation` mean of (max - min) / max of a pixel's channels, 0 where black (HSV).
    - `red`, `blue` the channel's sum over the sum of all three, 1/3 where all is black.

    Args:
        pixels: uint8 (n, channels, height, width).
        sizes: (n, 2) width and height of each image as it came.
    """
    width, height = np.asarray(sizes, dtype=np.float32).reshape(len(pixels), 2).T
    found = {"width": width, "height": height, "aspect": width / height}
    if pixels.shape[1] == 1:
        luma = pixels[:, 0].astype(np.float32)
    else:
        luma = np.float32(0.299) * pixels[:, 0]
        luma += np.float32(0.587) * pixels[:, 1]
        luma += np.float32(0.114) * pixels[:, 2]
    levels = np.rint(luma).astype(np.uint8)
    luma /= np.float32(255)
    # Second differences along each axis, on the pixels that have all neighbours.
    across = luma[:, :, 2:] + luma[:, :, :-2] - 2 * luma[:, :, 1:-1]
    down = luma[:, 2:, 1:-1] + luma[:, :-2, 1:-1] - 2 * luma[:, 1:-1, 1:-1]
    mixed = across[:, 2:] + across[:, :-2] - 2 * across[:, 1:-1]
    found["brightness"] = luma.mean(axis=(1, 2))
    found["contrast"] = luma.std(axis=(1, 2))
    found["sharpness"] = (across[:, 1:-1] + down).std(axis=(1, 2))
    found["entropy"] = _entropy(levels)
    found["noise"] = np.float32(np.sqrt(np.pi / 2) / 6) * np.abs(mixed).mean(axis=(1, 2))
    if pixels.shape[1] == 3:
        highest, lowest = pixels.max(axis=1), pixels.min(axis=1)
        saturation = (highest - lowest) / np.maximum(highest, 1).astype(np.float32)
        found["saturation"] = saturation.mean(axis=(1, 2))
        light = pixels.sum(axis=(2, 3), dtype=np.float64)
        light[light.sum(axis=1) == 0] = 1
        red, _, blue = (light / light.sum(axis=1, keepdims=True)).astype(np.float32).T
        found |= {"red": red, "blue": blue}
    return found


def _entropy(levels: np.ndarray) -> np.ndarray:
    """Shannon entropy in bits of each image's histogram; uint8 (n, height, width) in."""
    flat = levels.reshape(len(levels), -1).astype(np.intp)
    flat += 256 * np.arange(len(levels), dtype=np.intp)[:, None]
    counts = np.bincount(flat.ravel(), minlength=256 * len(levels)).reshape(-1, 256)
    size = flat.shape[1]
    # -sum p log2 p with p = count / size; an empty bin adds nothing.
    logs = counts * np.log2(np.maximum(counts, 1), dtype=np.float32)
    return np.asarray(np.log2(size) - logs.sum(axis=1) / size, dtype=np.float32)


def _open(content: bytes, image: Image) -> ImageFile:
    """Read the header and hold it against the limits."""
    if not content:
        raise ImageError("empty")
    if len(content) > image.max_bytes:
        raise ImageError("too many bytes")
    name = format_of(content)
    if name not in image.formats:
        raise ImageError(f"format {name} is not listed")
    try:
        opened = _FORMATS[name][1](io.BytesIO(content))
        animated = name != "jpeg" and getattr(opened, "is_animated", False)
    except _BOMBS:
        raise ImageError("too many pixels") from None
    except _BROKEN:
        raise ImageError("cannot be decoded") from None
    width, height = opened.size
    if width * height > image.max_pixels:
        raise ImageError("too many pixels")
    if width * height == 0:
        raise ImageError("empty")
    if animated:
        _listed("animated", image)
    if opened.mode == "CMYK":
        _listed("cmyk", image)
    if _is_deep(opened):
        if opened.mode in ("I", "F"):
            raise ImageError("more than 16 bits")
        _listed("16-bit", image)
    return opened


def _listed(kind: str, image: Image) -> None:
    if kind not in image.convert:
        raise ImageError(kind)


def _is_deep(opened: ImageFile) -> bool:
    """Whether a channel has more than 8 bits. Pillow reads some such files as 8-bit ones: the
    raw mode tells. (Of BMP, `BGR;16` is 16 bits of all three.)"""
    if opened.mode in ("I", "F") or opened.mode.startswith("I;16"):
        return True
    if isinstance(opened, BmpImageFile) or not opened.tile:
        return False
    args = opened.tile[0].args
    raw = args if isinstance(args, str) else args[0] if args else ""
    return ";16" in str(raw)


def _load(opened: ImageFile, image: Image) -> tuple[bool, PIL.Image.Image]:
    """Decode: whether EXIF turns the image on its side, and the image turned, grey or RGB."""
    try:
        opened.load()
        plain = _plain(opened, image)
    except ImageError:
        raise
    except _BOMBS:
        raise ImageError("too many pixels") from None
    except _BROKEN:
        raise ImageError("cannot be decoded") from None
    orientation = _orientation(opened)
    if orientation in _TURNS:
        plain = plain.transpose(_TURNS[orientation])
    return orientation in _SIDEWAYS, plain


def _orientation(opened: ImageFile) -> int:
    if isinstance(opened, TiffImageFile):
        return 1  # Pillow has turned it
    try:
        return int(opened.getexif().get(_ORIENTATION, 1))
    except _BROKEN:
        return 1  # many good pictures carry broken EXIF


def _plain(opened: ImageFile, image: Image) -> PIL.Image.Image:
    """The first frame as grey (`L`) or `RGB`."""
    plain: PIL.Image.Image = opened
    if opened.mode.startswith("I;16"):
        if "transparency" in opened.info:
            raise ImageError("transparent")
        plain = PIL.Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    elif opened.mode == "P" and opened.palette is None:
        raise ImageError("cannot be decoded")
    elif opened.has_transparency_data:
        plain = opened.convert("RGBA")
        if plain.getextrema()[3][0] < 255:
            _listed("transparent", image)
            white = PIL.Image.new("RGBA", plain.size, "white")
            plain = PIL.Image.alpha_composite(white, plain)
    if plain.mode == "P":
        plain = plain.convert("RGB")
    return plain.convert("L" if image.channels == 1 else "RGB")


def _fit(plain: PIL.Image.Image, image: Image) -> np.ndarray:
    """Resize, antialiased; an image that fits already is not changed."""
    height, width = image.size
    size = (width, height)
    if plain.size != size:
        match image.resize:
            case "crop":
                plain = PIL.ImageOps.fit(plain, size, Resampling.BILINEAR)
            case "stretch":
                plain = plain.resize(size, Resampling.BILINEAR, reducing_gap=2.0)
            case "pad":
                plain = _pad(plain, size)
    return _channels_first(np.asarray(plain))


def _pad(plain: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """The whole image in the middle of a black one. (`ImageOps.pad` loses images that are so long
    that nothing is left of their shorter side.)"""
    scale = min(size[0] / plain.width, size[1] / plain.height)
    inner = (
        min(max(round(plain.width * scale), 1), size[0]),
        min(max(round(plain.height * scale), 1), size[1]),
    )
    black = PIL.Image.new(plain.mode, size)
    corner = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    black.paste(plain.resize(inner, Resampling.BILINEAR, reducing_gap=2.0), corner)
    return black


def _channels_first(array: np.ndarray) -> np.ndarray:
    """(height, width) or (height, width, 3) as contiguous (channels, height, width)."""
    return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, -1, 0))
