"""Decode image files to what a model sees: upright, in colour or greyscale, with 8 bits.

This corrects what Pillow alone would read wrongly: photographs rotated by EXIF data; greyscale with
12 or 16 bits, which Pillow clips at 255, and in which a TIFF may use 0 for white; and transparent
areas, whose hidden colour (often black) would be seen, and which become white. Animations give
their first frame. Only files in pure image formats are opened.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_cli.data.media import media_hash
from lora_cli.errors import LoraError, printable
from lora_cli.git_lfs import POINTER, POINTS

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs; 256 MiB in RGB
WITH_PREVIEWS = ("MPO",)  # photograph formats whose additional frames are previews
KNOWN_FORMATS = ", ".join(FORMATS[:8])
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
BITS, PHOTOMETRIC = 258, 262  # TIFF tags: bits per sample; 0 if 0 means white
GREY_FACTORS = {
    "L;2": 85,
    "L;4": 17,
}  # Pillow's raw greyscale modes, and its factor for pixel values
MAX_MESSAGE = 120  # maximum characters of Pillow's message


class PictureError(ValueError):
    """A file cannot be read as an image; the message says why."""


@dataclass(frozen=True)
class PictureFacts:
    """Properties of a decoded image.

    Args:
        error: Why it cannot be read; empty if it can.
        width: Width in pixels after rotation.
        height: Height in pixels after rotation.
        is_animated: Whether it has several frames, of which the first is read.
        is_transparent: Whether it has transparent areas, which are read as white.
        orientation: Its EXIF orientation: from 2 on, it is rotated or mirrored to be upright; from
            5 on, width and height are swapped.
    """

    error: str = ""
    width: int = 0
    height: int = 0
    is_animated: bool = False
    is_transparent: bool = False
    orientation: int = 1


def require_pillow() -> None:
    """Check that images can be read at all.

    Raises:
        LoraError: If Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        what = "pictures are read by the Python package `pillow`, which is not installed"
        raise LoraError(what, hint="pip install 'lora-cli[vision]'") from error


def open_picture(value: dict[str, Any], channels: int = 3) -> Image:
    """Decode an image as a model sees it.

    Args:
        value: A media value: encoded bytes, or a path.
        channels: 3 for RGB, 1 for greyscale.

    Raises:
        PictureError: If it cannot be read.
    """
    image, _ = _open(value)
    return image.convert("L") if channels == 1 else image


def picture_facts(value: dict[str, Any]) -> PictureFacts:
    """Return the properties of an image, which is decoded once per process."""
    key = media_hash(value)
    if (facts := _FACTS.get(key)) is None:
        try:
            image, facts = _open(value)
            del image
        except PictureError as error:
            facts = PictureFacts(str(error))
        _FACTS[key] = facts
    return facts


_FACTS: dict[str, PictureFacts] = {}


def _open(value: dict[str, Any]) -> tuple[Image, PictureFacts]:
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    # another library may have allowed truncated files, whose missing part would be grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    data = value["bytes"]
    try:
        raw = data if data is not None else Path(value["path"]).read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not raw:
        raise PictureError("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bombs, which are rejected below, and odd metadata
        try:
            _refuse_bomb(*_webp_size(raw))
            with Image.open(io.BytesIO(raw), formats=_formats()) as image:
                _refuse_bomb(*image.size)
                _scale_transparent_grey(image)
                orientation = _orientation(
                    image
                )  # before loading, as Pillow rotates a TIFF when it loads it
                image.load()
                has_frames = bool(getattr(image, "is_animated", False))
                is_animated = has_frames and image.format not in WITH_PREVIEWS
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # any broken metadata: viewers show the image unrotated
                    upright, orientation = image.copy(), 1
                rgb, is_transparent = _to_rgb(upright, *_grey_range(image))
        except (PictureError, MemoryError):
            raise
        except UnidentifiedImageError:
            what = f"is not a picture, or of a format that is not read ({KNOWN_FORMATS} are)"
            if raw.startswith(POINTER):
                what = f"is {POINTS}"
            raise PictureError(what) from None
        except Image.DecompressionBombError:
            raise PictureError(f"has more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # decoders raise many types of errors for damaged files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"is cut off or damaged: {printable(reason, MAX_MESSAGE)}"
            raise PictureError(what) from error
    return rgb, PictureFacts("", *rgb.size, is_animated, is_transparent, orientation)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the supported formats that this version of Pillow can read."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        what = f"has {width:,} x {height:,} pixels, and at most {MAX_PIXELS:,} are read"
        raise PictureError(what)


def _webp_size(raw: bytes) -> tuple[int, int]:
    """Return the size in the header of a WebP file, which Pillow can only read by decoding it."""
    if raw[:4] != b"RIFF" or raw[8:16] != b"WEBPVP8X" or len(raw) < 30:
        return 0, 0
    width, height = (int.from_bytes(raw[i : i + 3], "little") + 1 for i in (24, 27))
    return width, height


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of an image; 1 if it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # any broken metadata
        return 1


def _scale_transparent_grey(image: Image) -> None:
    """Scale the transparent grey value of a PNG with 2 or 4 bits like its pixel values."""
    hidden = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # present only if the image was opened from a file
    raw_mode = tile[0][3] if tile else None
    if isinstance(hidden, int) and isinstance(raw_mode, str) and raw_mode in GREY_FACTORS:
        image.info["transparency"] = hidden * GREY_FACTORS[raw_mode]


def _grey_range(image: Image) -> tuple[int, bool]:
    """Return the maximum grey value of an image with more than 8 bits, and whether it is black.

    The maximum is 0 for images with at most 8 bits or an unknown range.
    """
    if not (image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")):
        return 0, False
    tags = getattr(image, "tag_v2", {})  # TIFF only
    bits = tags.get(BITS, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    return 2 ** int(bits) - 1, tags.get(PHOTOMETRIC) == 0


def _to_rgb(image: Image, max_grey: int, is_inverted: bool) -> tuple[Image, bool]:
    """Convert an image to RGB with 8 bits per channel, and return whether it was transparent.

    Args:
        image: The image.
        max_grey: Maximum grey value; see `_grey_range`.
        is_inverted: Whether the maximum grey value is black.
    """
    from PIL import Image

    if max_grey:
        grey = np.asarray(image).astype(np.int64)
        eight = ((max_grey - grey if is_inverted else grey) * 255 + max_grey // 2) // max_grey
        hidden = grey == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(hidden, 255, eight).astype(np.uint8))
        return image.convert("RGB"), bool(hidden.any())
    if image.mode in ("I", "F"):
        what = "has 32 bits a pixel, whose range is not known: save it with 8 or 16 bits"
        raise PictureError(what)
    if image.mode == "La":  # greyscale with premultiplied alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            background = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(background, image).convert("RGB"), True
    return image.convert("RGB"), False


def thumbnail_url(value: dict[str, Any], size: int = 96) -> str:
    """Return a thumbnail as a `data:` URL, to embed it in a page.

    Args:
        value: A media value.
        size: The longer side in pixels.

    Raises:
        PictureError: If the image cannot be read.
    """
    import base64

    image = open_picture(value)
    image.thumbnail((size, size))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def resampling(name: int) -> Any:
    """Return the Pillow resampling filter for the number in a processor's configuration."""
    from PIL import Image

    return Image.Resampling(name)
