"""Pascal VOC: the lists of its splits, and a file of XML with the boxes of each picture.

VOC counts pixels from 1, and some programs from 0: which of the two is decided by all files of a
folder together. Objects that are marked as `difficult` are regions that are neither trained nor
measured, as in VOC's own evaluation.
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
DEFAULT_LIST = "default.txt"  # of CVAT, for a set without splits
PICTURES, XML_FOLDERS = "JPEGImages", ("Annotations", "annotations", "xmls", "labels")
EDGES = re.compile(rb"<[xy]min>\s*([01])(?:\.0*)?\s*<")  # of boxes at the left or upper edge
XML_ENCODING = re.compile(rb"""<\?xml[^>]*\sencoding=["']([\w.:-]+)["'][^>]*\?>""")
SHOWN = 60
Json = dict[str, Any]


def listed_images(file: Path) -> list[Path]:
    """Return the pictures that a list of VOC names."""
    folder = file.parents[2] / PICTURES
    stems = [line.split()[0] for line in whole_text(file).splitlines() if line.strip()]
    suffixes = SUFFIXES["image"]
    found = []
    for stem in stems:
        paths = (folder / f"{stem}{suffix}" for suffix in suffixes)
        found.append(next((path for path in paths if path.is_file()), folder / f"{stem}.jpg"))
    return found


def first_pixel(folder: Path) -> int:
    """Return the number of the first pixel in the files of Pascal VOC in a folder: 1, or 0.

    Boxes at the left or upper edge show it: more of them begin at 0 than at 1 where 0 is the first.
    """
    counts = {0: 0, 1: 0}
    for file in folder.glob("*.xml"):
        for found in EDGES.finditer(file.read_bytes()):
            counts[int(found[1])] += 1
    return 0 if counts[0] > counts[1] else 1


def read_xml(file: Path, first: int) -> tuple[Json, str]:
    """Return the objects of a file of Pascal VOC, and what is wrong with it.

    Args:
        file: The file.
        first: The number of the first pixel.

    Returns:
        The value of a row's column of objects, with boxes as (x0, y0, x1, y1) in pixels from 0,
        and an error, which is empty if the file is right.
    """
    try:
        root = _xml_of(file)
    except (ET.ParseError, ValueError, LookupError) as error:
        return {}, f"not valid XML: {error}"
    if root.tag != "annotation" and root.find("object") is None:
        return {}, f"no annotation of Pascal VOC: it is XML of `{printable(root.tag, SHOWN)}`"
    boxes: list[list[float]] = []
    categories, difficult = [], []
    for i, one in enumerate(root.iter("object"), 1):
        name, box = one.findtext("name"), one.find("bndbox")
        if not name or not name.strip() or box is None:
            return {}, f"object {i} has no name or no box"
        try:
            texts = [box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([float(text or "") for text in texts])
        except ValueError:
            return {}, f"the box of object {i} lacks a number"
        categories.append(name.strip())
        difficult.append(int((one.findtext("difficult") or "").strip() == "1"))
    # the last pixel belongs to the box
    boxes = [[x0 - first, y0 - first, x1, y1] for x0, y0, x1, y1 in boxes]
    found: Json = {"bbox": boxes, "category": categories, "iscrowd": difficult, FORMAT: "xyxy"}
    if size := stated_size({side: root.findtext(f"size/{side}") for side in ("width", "height")}):
        found[SIZE] = size
    return found, ""


def _xml_of(file: Path) -> ET.Element:
    """Return the content of an XML file in whatever encoding it names.

    Raises:
        ParseError: If it is not XML.
        ValueError: If it is not in its encoding.
        LookupError: If that is unknown.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    declared = XML_ENCODING.match(content)
    if declared is None:
        return ET.fromstring(content)
    # the parser itself reads no encoding of several bytes a character but Unicode's
    encoding = declared[1].decode("ascii")
    return ET.fromstring(content[declared.end() :].decode(encoding))
