"""Decoding of image files: orientation, bit depth, transparency, and errors."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import tiny_pictures
from PIL import Image, ImageOps
from tiny_pictures import encoded, picture

from lora_cli.data.pictures import PictureError, open_picture, picture_facts

Json = dict[str, Any]


def media(data: bytes) -> Json:
    return {"bytes": data, "path": None}


def grey16(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)))


PLAIN = picture(1)
RED = np.zeros((4, 6, 4), dtype=np.uint8)
RED[..., 0], RED[..., 3] = 255, 255
HALF = RED.copy()
HALF[:, 3:] = 0  # transparent black
RAMP = np.arange(0, 65536, 257).reshape(8, 32)
STEPS = np.repeat(np.arange(16)[None] * 17, 2, axis=0)  # the grey values of 4 bits
TWELVE = "".join(f"{value:012b}" for value in (RAMP >> 4).ravel())
TRANSPARENT = (
    "transparent parts", "a transparent grey of 16 bits", "a transparent grey of 4 bits",
    "grey multiplied by its opacity",
)  # fmt: skip


def colour(grey: np.ndarray) -> np.ndarray:
    """Return a greyscale image (H, W) as RGB (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


READ: dict[str, tuple[bytes, np.ndarray | None]] = {
    "colour": (encoded(PLAIN), np.asarray(PLAIN)),
    "grey": (encoded(PLAIN.convert("L")), np.asarray(PLAIN.convert("L").convert("RGB"))),
    "black and white": (
        encoded(PLAIN.convert("1")), np.asarray(PLAIN.convert("1").convert("RGB"))
    ),
    "a palette": (
        encoded(PLAIN.quantize(7)), np.asarray(PLAIN.quantize(7).convert("RGB"))
    ),
    "16 bits of grey": (grey16(RAMP), np.repeat((RAMP // 257)[..., None], 3, axis=2)),
    "16 bits of grey in a PGM": (
        b"P5 32 8 65535\n" + RAMP.astype(">u2").tobytes(), colour(RAMP // 257)
    ),
    "16 bits of grey with 0 as white": (
        tiny_pictures.tiff((65535 - RAMP).astype("<u2").tobytes(), (32, 8), 16, t262=0),
        colour(RAMP // 257),
    ),
    "12 bits of grey": (
        tiny_pictures.tiff(int(TWELVE, 2).to_bytes(len(TWELVE) // 8, "big"), (32, 8), 12),
        colour(np.rint((RAMP >> 4) * (255 / 4095))),
    ),
    "a transparent grey of 16 bits": (
        tiny_pictures.png([row.astype(">u2").tobytes() for row in RAMP], 32, 16, int(RAMP[1, 2])),
        colour(np.where(RAMP[1, 2] == RAMP, 255, RAMP // 257)),
    ),
    "a transparent grey of 4 bits": (
        tiny_pictures.png([bytes.fromhex("0123456789abcdef")] * 2, 16, 4, 5),
        colour(np.where(STEPS == 5 * 17, 255, STEPS)),
    ),
    "grey multiplied by its opacity": (
        tiny_pictures.tiff(bytes([0, 0, 100, 255]), (2, 1), 8, t258=[8, 8], t277=2, t338=1),
        np.array([[[255] * 3, [100] * 3]]),
    ),
    "transparent parts": (
        encoded(Image.fromarray(HALF)),
        np.where(HALF[..., 3:] == 255, RED[..., :3], 255),
    ),
    "an alpha channel without transparency": (encoded(Image.fromarray(RED)), RED[..., :3]),
    "four inks": (
        encoded(Image.new("CMYK", (5, 4), (0, 255, 255, 0)), "TIFF"),
        np.broadcast_to([255, 0, 0], (4, 5, 3)),
    ),
    "an animation": (
        encoded(Image.new("RGB", (5, 4), "red"), "GIF", save_all=True,
                append_images=[Image.new("RGB", (5, 4), "blue")]),
        np.broadcast_to([255, 0, 0], (4, 5, 3)),
    ),
    "one pixel": (encoded(Image.new("RGB", (1, 1), "red")), np.array([[[255, 0, 0]]])),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_decoded_of_an_image_with(name: str) -> None:
    data, expected = READ[name]
    image = open_picture(media(data))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    facts = picture_facts(media(data))
    assert facts.error == ""
    assert (facts.height, facts.width) == np.asarray(image).shape[:2]
    assert facts.is_animated == (name == "an animation")
    assert facts.is_transparent == (name in TRANSPARENT)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_photograph_is_rotated_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PLAIN, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if format == "TIFF":
        data = encoded(PLAIN, "TIFF", tiffinfo={0x0112: orientation})
    result = open_picture(media(data))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert picture_facts(media(data)).orientation == orientation
    if orientation in (5, 6, 7, 8):
        assert result.size == PLAIN.size[::-1]


def png_of(width: int, height: int) -> bytes:
    """Return the first bytes of a PNG with the given size and a valid checksum."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    part = b"IHDR" + head
    check = struct.pack(">I", zlib.crc32(part))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + part
        + check
        + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )


BROKEN = {
    "a bomb": (png_of(60_000, 60_000), "has more than 89,478,485 pixels|has 60,000 x 60,000"),
    "a smaller bomb": (png_of(10_000, 10_000), "has 10,000 x 10,000 pixels"),
    "a bomb in WebP": (
        b"RIFF\x80\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3e\0\xff\x3e\0" + b"\0" * 60,
        "has 16,128 x 16,128 pixels",
    ),
    "a cut PNG": (encoded(picture(1, width=90, height=90))[:900], "is cut off or damaged"),
    "a cut JPEG": (encoded(picture(1, width=90, height=90), "JPEG")[:900], "is cut off or damaged"),
    "a cut GIF": (encoded(picture(1, width=90, height=90), "GIF")[:900], "is cut off or damaged"),
    "a text": (b"no picture at all", "is not a picture"),
    "a page of the web": (b"<!DOCTYPE html><html>404</html>", "is not a picture"),
    "PostScript, which Pillow would run": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"
    ),
    "nothing": (b"", "is empty"),
    "numbers without a range": (
        encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "32 bits a pixel"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_error_of(name: str) -> None:
    data, expected = BROKEN[name]
    with pytest.raises(PictureError, match=expected):
        open_picture(media(data))
    assert re.search(expected, picture_facts(media(data)).error)


def test_a_truncated_image_is_never_read_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # like other libraries
    with pytest.raises(PictureError, match="cut off"):
        open_picture(media(BROKEN["a cut JPEG"][0]))
