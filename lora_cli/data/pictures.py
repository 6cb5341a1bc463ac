"""Pictures as files hold them, and as a model sees them: upright, in colour or grey, 8 bits.

What Pillow alone would read wrongly is put right here: a photograph that its EXIF data turn, 16
bits of grey (of which Pillow cuts off all above the lowest 255) and 12, of which a TIFF may have 0
as white, transparent parts (of which only the colour beneath would be seen, often black): they
become white. Of an animation it is the first picture. A file is opened only if it is of a format
that is a picture and nothing more.
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
MOST_PIXELS = 89_478_485  # from where on Pillow too suspects a bomb; 256 MiB in RGB
ALSO_PAGES = ("MPO",)  # formats of photographs, whose other pictures are previews
KNOWN = ", ".join(FORMATS[:8])
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
BITS, PHOTOMETRIC = 258, 262  # tags of a TIFF: bits of a sample; 0 where 0 is white
FEW_BITS = {"L;2": 85, "L;4": 17}  # Pillow's raw modes of grey, and by what it multiplies pixels
LINE = 120  # characters of what Pillow says


class PictureError(ValueError):
    """A file that cannot be read as a picture; the text says why."""


@dataclass(frozen=True)
class PictureFacts:
    """What is known of a picture once it was decoded.

    Args:
        error: Why it cannot be read, or nothing.
        width: In pixels, as it is seen.
        height: Likewise.
        is_animated: It has several frames, of which the first is read.
        is_transparent: It has transparent parts, which are read as white.
        orientation: Of its EXIF data: from 2 on, it is turned or mirrored to be upright; from 5 on,
            width and height are exchanged.
    """

    error: str = ""
    width: int = 0
    height: int = 0
    is_animated: bool = False
    is_transparent: bool = False
    orientation: int = 1


def require_pillow() -> None:
    """Check that pictures can be read at all.

    Raises:
        LoraError: If Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        what = "pictures are read by the Python package `pillow`, which is not installed"
        raise LoraError(what, hint="pip install 'lora-cli[vision]'") from error


def open_picture(value: dict[str, Any], channels: int = 3) -> Image:
    """Return a picture as a model sees it.

    Args:
        value: A media value: encoded bytes, or a path.
        channels: 3 for colour, 1 for grey.

    Raises:
        PictureError: If it cannot be read.
    """
    image, _ = _open(value)
    return image.convert("L") if channels == 1 else image


def picture_facts(value: dict[str, Any]) -> PictureFacts:
    """Return what is known of a picture; each is decoded once in a process."""
    key = media_hash(value)
    if (found := _FACTS.get(key)) is None:
        try:
            image, found = _open(value)
            del image
        except PictureError as error:
            found = PictureFacts(str(error))
        _FACTS[key] = found
    return found


_FACTS: dict[str, PictureFacts] = {}


def _open(value: dict[str, Any]) -> tuple[Image, PictureFacts]:
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    # another library may have allowed it, and a picture's lower half be grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    data = value["bytes"]
    try:
        raw = data if data is not None else Path(value["path"]).read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not raw:
        raise PictureError("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs, which are rejected, and of odd metadata
        try:
            _refuse_bomb(*_webp_size(raw))
            with Image.open(io.BytesIO(raw), formats=_formats()) as image:
                _refuse_bomb(*image.size)
                _scale_transparent_grey(image)
                orientation = _orientation(image)  # Pillow itself turns a TIFF that it loads
                image.load()
                several = bool(getattr(image, "is_animated", False))
                is_animated = several and image.format not in ALSO_PAGES
                try:
                    turned = ImageOps.exif_transpose(image)
                except Exception:  # broken metadata of any kind: viewers show it as it lies
                    turned, orientation = image.copy(), 1
                plain, is_transparent = _plain(turned, *_greys_of(image))
        except (PictureError, MemoryError):
            raise
        except UnidentifiedImageError:
            what = f"is not a picture, or of a format that is not read ({KNOWN} are)"
            if raw.startswith(POINTER):
                what = f"is {POINTS}"
            raise PictureError(what) from None
        except Image.DecompressionBombError:
            raise PictureError(f"has more than {MOST_PIXELS:,} pixels") from None
        except Exception as error:  # decoders raise anything over damaged files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"is cut off or damaged: {printable(reason, LINE)}"
            raise PictureError(what) from error
    return plain, PictureFacts("", *plain.size, is_animated, is_transparent, orientation)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are read, as far as this Pillow knows them."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        what = f"has {width:,} x {height:,} pixels, and at most {MOST_PIXELS:,} are read"
        raise PictureError(what)


def _webp_size(raw: bytes) -> tuple[int, int]:
    """Return the size that a WebP file claims; for Pillow needs memory for all of it to tell."""
    if raw[:4] != b"RIFF" or raw[8:16] != b"WEBPVP8X" or len(raw) < 30:
        return 0, 0
    width, height = (int.from_bytes(raw[i : i + 3], "little") + 1 for i in (24, 27))
    return width, height


def _orientation(image: Image) -> int:
    """Return how the EXIF data of a picture turn it; 1 where they cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata of any kind
        return 1


def _scale_transparent_grey(image: Image) -> None:
    """Give the grey that a PNG of 2 or 4 bits calls transparent the value that its pixels get."""
    hidden = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # only of what was opened from a file
    raw_mode = tile[0][3] if tile else None
    if isinstance(hidden, int) and isinstance(raw_mode, str) and raw_mode in FEW_BITS:
        image.info["transparency"] = hidden * FEW_BITS[raw_mode]


def _greys_of(image: Image) -> tuple[int, bool]:
    """Return the largest value of a picture of more than 8 bits of grey, and whether it is black.

    It is 0 where the values have no known range, or no more than 8 bits.
    """
    if not (image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")):
        return 0, False
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(BITS, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    return 2 ** int(bits) - 1, tags.get(PHOTOMETRIC) == 0


def _plain(image: Image, most: int, is_inverted: bool) -> tuple[Image, bool]:
    """Return a picture in RGB, 8 bits a channel, and whether parts of it were transparent.

    Args:
        image: The picture.
        most: See `_greys_of`.
        is_inverted: Likewise.
    """
    from PIL import Image

    if most:
        grey = np.asarray(image).astype(np.int64)
        eight = ((most - grey if is_inverted else grey) * 255 + most // 2) // most
        hidden = grey == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(hidden, 255, eight).astype(np.uint8))
        return image.convert("RGB"), bool(hidden.any())
    if image.mode in ("I", "F"):
        what = "has 32 bits a pixel, whose range is not known: save it with 8 or 16 bits"
        raise PictureError(what)
    if image.mode == "La":  # grey that is multiplied by its opacity
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            ground = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(ground, image).convert("RGB"), True
    return image.convert("RGB"), False


def thumbnail_of(value: dict[str, Any], size: int = 96) -> str:
    """Return a small copy of a picture as a `data:` address, for a page of one file.

    Args:
        value: A media value.
        size: The longer side, in pixels.

    Raises:
        PictureError: If it cannot be read.
    """
    import base64

    image = open_picture(value)
    image.thumbnail((size, size))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def resampling(name: int) -> Any:
    """Return Pillow's filter of a number, as a processor's configuration names it."""
    from PIL import Image

    return Image.Resampling(name)
