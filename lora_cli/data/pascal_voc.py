"""Read Pascal VOC: the image lists of its splits, and an XML file of boxes per image.

VOC counts pixels from 1, but some programs count from 0, which is inferred from all files of a
folder together. Objects marked as `difficult` are ignored in training and evaluation, as in VOC's
own evaluation.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from lora_cli.data.boxes import FORMAT, SIZE, stated_size
from lora_cli.data.media_folder import SUFFIXES
from lora_cli.data.text_lines import unreadable, whole_text
from lora_cli.errors import printable

LISTS = Path("ImageSets", "Main")
DEFAULT_LIST = "default.txt"  # written by CVAT for data sets without splits
IMAGE_FOLDER, XML_FOLDERS = "JPEGImages", ("Annotations", "annotations", "xmls", "labels")
EDGES = re.compile(
    rb"<[xy]min>\s*([01])(?:\.0*)?\s*<"
)  # boxes that start at the left or upper edge
XML_ENCODING = re.compile(rb"""<\?xml[^>]*\sencoding=["']([\w.:-]+)["'][^>]*\?>""")
MAX_SHOWN = 60
Json = dict[str, Any]


def listed_images(file: Path) -> list[Path]:
    """Return the images in a VOC image list."""
    folder = file.parents[2] / IMAGE_FOLDER
    stems = [line.split()[0] for line in whole_text(file).splitlines() if line.strip()]
    suffixes = SUFFIXES["image"]
    images = []
    for stem in stems:
        paths = (folder / f"{stem}{suffix}" for suffix in suffixes)
        images.append(next((path for path in paths if path.is_file()), folder / f"{stem}.jpg"))
    return images


def first_pixel(folder: Path) -> int:
    """Return the coordinate of the first pixel in the VOC files of a folder: 1 or 0.

    It is 0 if more boxes at the left or upper edge start at 0 than at 1.
    """
    counts = {0: 0, 1: 0}
    for file in folder.glob("*.xml"):
        for match in EDGES.finditer(file.read_bytes()):
            counts[int(match[1])] += 1
    return 0 if counts[0] > counts[1] else 1


def read_xml(file: Path, first: int) -> tuple[Json, str]:
    """Read the objects in a VOC annotation file.

    Args:
        file: The file.
        first: Coordinate of the first pixel.

    Returns:
        The value of a row's column of objects, with boxes as (x0, y0, x1, y1) in pixels from 0, and
        an error message, which is empty if the file is valid.
    """
    try:
        root = _xml_of(file)
    except (ET.ParseError, ValueError, LookupError) as error:
        return {}, f"not valid XML: {error}"
    if root.tag != "annotation" and root.find("object") is None:
        return {}, f"no annotation of Pascal VOC: it is XML of `{printable(root.tag, MAX_SHOWN)}`"
    boxes: list[list[float]] = []
    categories, difficult = [], []
    for i, element in enumerate(root.iter("object"), 1):
        name, box = element.findtext("name"), element.find("bndbox")
        if not name or not name.strip() or box is None:
            return {}, f"object {i} has no name or no box"
        try:
            texts = [box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([float(text or "") for text in texts])
        except ValueError:
            return {}, f"the box of object {i} lacks a number"
        categories.append(name.strip())
        difficult.append(int((element.findtext("difficult") or "").strip() == "1"))
    # the last pixel is inclusive
    boxes = [[x0 - first, y0 - first, x1, y1] for x0, y0, x1, y1 in boxes]
    objects: Json = {"bbox": boxes, "category": categories, "iscrowd": difficult, FORMAT: "xyxy"}
    if size := stated_size({side: root.findtext(f"size/{side}") for side in ("width", "height")}):
        objects[SIZE] = size
    return objects, ""


def _xml_of(file: Path) -> ET.Element:
    """Parse an XML file in the encoding that it declares.

    Raises:
        ParseError: If it is not XML.
        ValueError: If it cannot be decoded.
        LookupError: If the encoding is unknown.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    declared = XML_ENCODING.match(content)
    if declared is None:
        return ET.fromstring(content)
    # the parser supports no multi-byte encodings besides Unicode
    encoding = declared[1].decode("ascii")
    return ET.fromstring(content[declared.end() :].decode(encoding))
