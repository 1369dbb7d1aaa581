"""Real files of each format: what is taken, what is refused, and what is measured."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from driftmill.contract import Image
from driftmill.vision import images
from driftmill.vision.images import Decoded, ImageError, decode, from_array, from_png, to_png

ALL = ("png", "jpeg", "webp", "bmp", "gif", "tiff")
KINDS = ("cmyk", "transparent", "16-bit", "animated")
#: Pillow warns of broken TIFF tags and EXIF, and goes on.
ignore_tags = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
RNG = np.random.default_rng(0)
#: Smooth, so that a lossy format keeps it.
DOWN, ACROSS = np.mgrid[:20, :24] * 10.0
PICTURE = np.stack([DOWN, ACROSS, 240 - DOWN], axis=2).astype(np.uint8)


def rules(**more: Any) -> Image:
    return Image.model_validate({"size": 8, "channels": 3, "formats": ALL} | more)


def file(picture: PIL.Image.Image | np.ndarray, kind: str = "png", **options: Any) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(PICTURE).convert(mode)


def frames(kind: str) -> bytes:
    return file(picture(), kind, save_all=True, append_images=[picture().rotate(90)])


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file by hand, for what Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *((c[:4], c[4:]) for c in chunks), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in (*parts, (b"IEND", b"")))


def refused(content: bytes, **more: Any) -> str:
    with pytest.raises(ImageError) as error:
        decode(content, rules(**more))
    return str(error.value)


# What comes out


@given(arrays.arrays(np.uint8, st.sampled_from([(8, 8), (8, 8, 3), (4, 12), (12, 4, 3)])))
def test_an_image_that_fits_is_not_changed(array: np.ndarray) -> None:
    channels = 1 if array.ndim == 2 else 3
    fitting = rules(size=array.shape[:2], channels=channels)
    canonical = from_array(array, fitting).pixels
    assert canonical.shape == (channels, *array.shape[:2])
    np.testing.assert_array_equal(images.to_array(canonical), array)
    for content in (file(array), file(array, "bmp"), to_png(canonical)):
        decoded = decode(content, fitting)
        np.testing.assert_array_equal(decoded.pixels, canonical)
        assert (decoded.width, decoded.height) == (array.shape[1], array.shape[0])
    np.testing.assert_array_equal(from_png(to_png(canonical)), canonical)


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))),
    st.sampled_from([1, 3]),
    st.sampled_from(["crop", "stretch", "pad"]),
    st.sampled_from([(8, 8), (5, 9), (16, 4)]),
)
def test_any_image_is_made_to_fit_the_same_way_from_a_file_as_from_pixels(
    array: np.ndarray, channels: int, resize: str, size: tuple[int, int]
) -> None:
    wanted = rules(size=size, channels=channels, resize=resize)
    decoded, direct = decode(file(array), wanted), from_array(array, wanted)
    assert decoded.pixels.shape == (channels, *size)
    assert decoded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(decoded.pixels, direct.pixels)
    assert (decoded.width, decoded.height) == (array.shape[1], array.shape[0])


def test_crop_cuts_pad_adds_black_and_stretch_keeps_all() -> None:
    halves = np.zeros((8, 16), dtype=np.uint8)
    halves[:, :4], halves[:, 12:] = 255, 255  # white at both ends
    grey = {"channels": 1}
    assert from_array(halves, rules(resize="crop", **grey)).pixels.max() == 0
    padded = from_array(halves + np.uint8(0), rules(resize="pad", **grey)).pixels[0]
    assert padded[0].max() == padded[-1].max() == 0
    assert padded[3:5, [0, -1]].min() > 200
    stretched = from_array(halves, rules(resize="stretch", **grey)).pixels[0]
    assert stretched[:, [0, -1]].min() > 200
    assert stretched[:, 3:5].max() < 60


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    shrunk = from_array(stripes, rules(channels=1)).pixels
    assert abs(shrunk.astype(int) - 127).max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tiff"])
def test_modes_become_grey_or_rgb(mode: str, kind: str) -> None:
    given_ = picture(mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        found = decode(file(given_, kind), rules(size=(20, 24), channels=channels)).pixels
        wanted = np.asarray(given_.convert("RGB").convert(target))
        if kind == "gif" and mode == "RGB":  # 256 colours
            assert np.abs(images.to_array(found).astype(int) - wanted).mean() < 10
        else:
            np.testing.assert_allclose(images.to_array(found), wanted, atol=1)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_formats(kind: str) -> None:
    found = decode(file(picture(), kind, quality=95), rules(size=(20, 24))).pixels
    assert np.abs(images.to_array(found).astype(int) - PICTURE).mean() < 8


def test_a_large_jpeg_that_is_decoded_small_looks_the_same() -> None:
    tiles = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8).repeat(50, axis=0).repeat(50, axis=1)
    wanted = from_array(tiles, rules(size=(240, 320))).pixels.astype(int)
    found = decode(file(tiles, "jpeg", quality=95, subsampling=0), rules(size=(240, 320)))
    assert (found.width, found.height) == (1600, 1200)
    assert np.abs(found.pixels - wanted).mean() < 3


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """The top left corner of the scene is white, the top right one grey."""
    scene = np.zeros((16, 32), dtype=np.uint8)
    scene[:8, :16], scene[:8, 16:] = 255, 128
    undo = {
        v: images._TURNS[w] for v, w in ((2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6))
    }
    stored = PIL.Image.fromarray(scene)
    if orientation > 1:
        stored = stored.transpose(undo[orientation])
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(file(stored, kind, exif=exif), rules(size=(16, 32), channels=1))
    assert (decoded.width, decoded.height) == (32, 16)
    np.testing.assert_allclose(decoded.pixels[0, 2:6, 2:14], 255, atol=3)
    np.testing.assert_allclose(decoded.pixels[0, 2:6, 18:30], 128, atol=3)
    np.testing.assert_allclose(decoded.pixels[0, 10:], 0, atol=3)


@ignore_tags
def test_broken_exif_is_no_reason_to_refuse() -> None:
    content = file(picture(), "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(content, rules()).width == 24


# What is refused


def test_limits_come_before_decoding() -> None:
    content = file(picture())
    assert refused(b"") == "empty"
    assert refused(file(RNG.integers(0, 256, (20, 24, 3), np.uint8)), max_bytes=64) == (
        "too many bytes"
    )
    assert refused(content, max_pixels=24 * 20 - 1) == "too many pixels"
    assert decode(content, rules(max_pixels=24 * 20)).width == 24
    bmp = file(picture(), "bmp")
    # Only a header: what follows is never looked at.
    for huge in (png(60_000, 60_000, 8, 2, b""), bmp[:18] + b"\xff\x7f\0\0" * 2 + bmp[26:]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert refused(huge + b"\0" * 64) == "too many pixels"


def test_a_bomb_that_pillow_would_stop_is_stopped_before() -> None:
    bomb = file(PIL.Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(bomb) == "too many pixels"
        # Another limit than Pillow's holds where the contract says so.
        larger = file(PIL.Image.new("1", (10_000, 9_000)))
        assert decode(larger, rules(max_pixels=90_000_000)).width == 10_000


def test_bombs_that_pillow_finds_itself() -> None:
    gif = bytearray(file(picture("L"), "gif"))
    frame = gif.rindex(b"\x2c\0\0\0\0")  # the frame is far larger than its file says
    gif[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert refused(bytes(gif)) == "too many pixels"
    exif = PIL.Image.Exif()
    exif[0x0112] = 1
    webp = bytearray(file(picture(), "webp", exif=exif))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xfe\x3f\0\xfe\x3f\0"
    assert refused(bytes(webp)) == "too many pixels"


def test_formats() -> None:
    for kind in ALL:
        content = file(picture(), kind)
        assert decode(content, rules(formats=[kind])).width == 24
        others = [other for other in ALL if other != kind]
        assert refused(content, formats=others) == f"format {kind} is not listed"
    for text in (b"hello", b"<svg></svg>", b"RIFF1234WAVE", file(picture(), "ppm")):
        assert refused(text) == "not an image"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("animated", frames("gif")),
        ("animated", frames("png")),
        ("animated", frames("webp")),
        ("animated", frames("tiff")),
        ("cmyk", file(picture("CMYK"), "jpeg")),
        ("cmyk", file(picture("CMYK"), "tiff")),
        ("16-bit", file(np.full((20, 24), 0x8012, dtype=np.uint16))),
        ("16-bit", file(np.full((20, 24), 0x8012, dtype=np.uint16), "tiff")),
        ("16-bit", png(24, 20, 16, 2, (b"\0" + b"\x80\x12" * 72) * 20)),
        ("16-bit", png(24, 20, 16, 4, (b"\0" + b"\x80\x12\xff\xff" * 24) * 20)),
        ("16-bit", png(24, 20, 16, 6, (b"\0" + b"\x80\x12" * 3 * 24 + b"\xff\xff" * 24) * 20)),
        ("transparent", file(PIL.Image.new("RGBA", (24, 20), (9, 9, 9, 254)))),
        ("transparent", file(PIL.Image.new("LA", (24, 20), (9, 0)))),
        ("transparent", file(PIL.Image.new("RGBA", (24, 20), (9, 9, 9, 0)), "webp")),
        ("transparent", file(PIL.Image.new("P", (24, 20)), transparency=0)),
        ("transparent", file(PIL.Image.new("P", (24, 20)), "gif", transparency=0)),
        ("transparent", file(PIL.Image.new("RGB", (24, 20), (1, 2, 3)), transparency=(1, 2, 3))),
    ],
)
def test_kinds_are_refused_unless_listed(kind: str, content: bytes) -> None:
    listed = [k for k in KINDS if k != kind]
    if kind == "16-bit" and content[25:26] == b"\x06":
        listed = []  # that one is transparent, too
    assert refused(content, convert=listed) == kind
    assert decode(content, rules(convert=KINDS)).pixels.shape == (3, 8, 8)


def test_how_listed_kinds_are_converted() -> None:
    every = rules(size=(20, 24), convert=KINDS)
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    assert (decode(file(deep), every).pixels == deep >> 8).all()
    half = file(PIL.Image.new("RGBA", (24, 20), (0, 0, 0, 0)))
    assert decode(half, every).pixels.min() == 255
    np.testing.assert_allclose(decode(frames("png"), every).pixels[0], PICTURE[:, :, 0])
    cyan = file(PIL.Image.new("CMYK", (24, 20), (255, 0, 0, 0)), "tiff")
    assert decode(cyan, every).pixels[:, 0, 0].tolist() == [0, 255, 255]


def test_an_alpha_channel_without_holes_is_no_transparency() -> None:
    solid = picture("RGBA")
    np.testing.assert_array_equal(
        images.to_array(decode(file(solid), rules(size=(20, 24))).pixels), PICTURE
    )


def test_numbers_that_are_no_pixels() -> None:
    assert refused(file(RNG.random((8, 8)).astype(np.float32), "tiff"), convert=KINDS) == (
        "more than 16 bits"
    )
    for array in (np.zeros((8, 8)), np.zeros((8, 8, 2), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(ImageError, match="not 8-bit pixels"):
            from_array(array, rules())
    with pytest.raises(ImageError, match="too many pixels"):
        from_array(np.zeros((8, 8), np.uint8), rules(max_pixels=63))
    with pytest.raises(ImageError, match="empty"):
        from_array(np.zeros((0, 8), np.uint8), rules())


@ignore_tags
@pytest.mark.parametrize("kind", ALL)
def test_files_that_are_cut_off(kind: str) -> None:
    content = file(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8), kind)
    for length in range(16, len(content) // 2, 7):
        assert refused(content[:length]) in ("cannot be decoded", "not an image", "empty")


def test_a_palette_image_without_a_palette() -> None:
    assert refused(png(4, 4, 8, 3, (b"\0" + b"\1" * 4) * 4)) == "cannot be decoded"


SEEDS = [
    *(file(picture(), kind) for kind in ALL),
    *(frames(kind) for kind in ("png", "gif", "webp")),
    file(picture("P"), transparency=0),
    file(picture("CMYK"), "jpeg"),
    file(picture("L"), "tiff", compression="tiff_lzw"),
]


@ignore_tags
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4), st.integers(0, 4)), max_size=4),
    st.integers(0, 2000),
    st.booleans(),
)
def test_damaged_files_are_decoded_or_refused(
    content: bytes, changes: list[tuple[int, bytes, int]], length: int, all_kinds: bool
) -> None:
    for place, new, dropped in changes:
        content = content[:place] + new + content[place + dropped :]
    _decoded_or_refused(content[:length] if length < 1500 else content, all_kinds)


@ignore_tags
@given(st.sampled_from([b"", *(s[:12] for s in SEEDS)]), st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(beginning: bytes, rest: bytes) -> None:
    _decoded_or_refused(beginning + rest, all_kinds=True)


def _decoded_or_refused(content: bytes, all_kinds: bool) -> None:
    wanted = rules(convert=KINDS if all_kinds else (), max_pixels=100_000)
    try:
        decoded = decode(content, wanted)
    except ImageError:
        return
    assert isinstance(decoded, Decoded)
    assert decoded.pixels.shape == (3, 8, 8)
    assert 0 < decoded.width * decoded.height <= 100_000


@pytest.mark.parametrize("content", [b"", b"nothing", file(picture("P")), file(picture(), "jpeg")])
def test_from_png_takes_only_what_to_png_made(content: bytes) -> None:
    with pytest.raises(ImageError):
        from_png(content)


# Statistics


def measured(pixels: np.ndarray) -> dict[str, float]:
    one = images.statistics(pixels[None], np.array([[24, 20]]))
    return {name: float(values[0]) for name, values in one.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_the_contracts_columns(channels: int) -> None:
    pixels = RNG.integers(0, 256, (7, channels, 12, 9), dtype=np.uint8)
    sizes = RNG.integers(1, 5000, (7, 2))
    found = images.statistics(pixels, sizes)
    assert list(found) == [c.name for c in rules(channels=channels).statistics]
    assert all(v.shape == (7,) and v.dtype == np.float32 for v in found.values())
    np.testing.assert_allclose(found["aspect"], sizes[:, 0] / sizes[:, 1], rtol=1e-6)
    # A batch says of each image what it says of the image alone.
    for i in range(7):
        alone = images.statistics(pixels[i : i + 1], sizes[i : i + 1])
        for name, values in alone.items():
            np.testing.assert_allclose(found[name][i], values[0], rtol=1e-5, atol=1e-6)


def test_statistics_by_their_formulas() -> None:
    """Against plain loops in float64."""
    pixels = RNG.integers(0, 256, (3, 9, 11), dtype=np.uint8)
    red, green, blue = pixels.astype(np.float64) / 255
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    laplacian, mixed = [], []
    for y in range(1, 8):
        for x in range(1, 10):
            around = luma[y - 1 : y + 2, x - 1 : x + 2]
            cross = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
            laplacian.append((around * cross).sum())
            immerkaer = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
            mixed.append(abs((around * immerkaer).sum()))
    _, counts = np.unique(np.rint(luma * 255), return_counts=True)
    parts = counts / counts.sum()
    largest = pixels.max(axis=0).astype(np.float64)
    wanted = {
        "brightness": luma.mean(),
        "contrast": luma.std(),
        "sharpness": np.std(laplacian),
        "entropy": -(parts * np.log2(parts)).sum(),
        "noise": np.sqrt(np.pi / 2) / 6 * np.mean(mixed),
        "saturation": ((largest - pixels.min(axis=0)) / np.maximum(largest, 1)).mean(),
        "red": red.sum() / (red + green + blue).sum(),
        "blue": blue.sum() / (red + green + blue).sum(),
    }
    found = measured(pixels)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_image_has_no_structure(value: int) -> None:
    found = measured(np.full((3, 8, 8), value, dtype=np.uint8))
    assert found["brightness"] == pytest.approx(value / 255, abs=1e-6)
    for name in ("contrast", "sharpness", "entropy", "noise", "saturation"):
        assert found[name] == pytest.approx(0, abs=1e-5), name
    assert found["red"] == pytest.approx(1 / 3)
    assert found["blue"] == pytest.approx(1 / 3)


def test_noise_is_estimated_in_its_own_units() -> None:
    slope = np.tile(np.linspace(60, 180, 128), (128, 1))
    noisy = np.rint(slope + RNG.normal(0, 12, slope.shape)).astype(np.uint8)
    assert measured(noisy[None])["noise"] == pytest.approx(12 / 255, rel=0.05)
    assert measured(np.rint(slope).astype(np.uint8)[None])["noise"] < 0.004
