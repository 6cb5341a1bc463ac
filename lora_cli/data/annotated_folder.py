"""Folders of pictures with a file of boxes for each: Pascal VOC's xml, or YOLO's text.

    VOC2012/JPEGImages/1.jpg   VOC2012/Annotations/1.xml   VOC2012/ImageSets/Main/train.txt
    data/train/1.jpg           data/train/1.xml            next to each other, a folder a split
    yolo/train/images/1.jpg    yolo/train/labels/1.txt     yolo/data.yaml: the names, and the splits
    yolo/images/train/1.jpg    yolo/labels/train/1.txt     yolo/classes.txt: the names, one a line

Pascal VOC counts pixels from 1, and some programs from 0: which of the two is decided by all files
of a folder together. Objects that VOC marks as `difficult` are regions that are neither trained nor
measured, as in its own evaluation.

A line of YOLO's text is the number of the label and the box (its centre and size, in shares of the
picture), or the corners of an outline; where the YAML file has a `kpt_shape`, key points follow the
box and are not read. A picture without such a file has no objects.
"""

from __future__ import annotations

import functools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_cli.data.boxes import FORMAT, SIZE, said_size
from lora_cli.data.media import written_here
from lora_cli.data.media_folder import SUFFIXES, media_files
from lora_cli.data.text_lines import RawRow, unreadable
from lora_cli.errors import LoraError, printable
from lora_cli.recipe import Recipe

VOC_LISTS = Path("ImageSets", "Main")
DEFAULT_LIST = "default.txt"  # of CVAT, for a set without splits
VOC_PICTURES, XML_FOLDERS = "JPEGImages", ("Annotations", "annotations", "xmls", "labels")
NAMES_FILES = ("classes.txt", "obj.names", "classes.names")
YAML = (".yaml", ".yml")
SPLIT_KEYS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
EDGES = re.compile(rb"<[xy]min>\s*([01])(?:\.0*)?\s*<")  # of boxes at the left or upper edge
XML_ENCODING = re.compile(rb"""<\?xml[^>]*\sencoding=["']([\w.:-]+)["'][^>]*\?>""")
LEVELS = 4  # folders above a picture in which the names of the labels are looked for
WHOLE = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")  # `3`, or as NumPy writes it: `3.0`, `3.000e+00`
SHOWN = 60
Json = dict[str, Any]


def annotated_files(place: Path, split: str, recipe: Recipe) -> list[Path] | None:
    """Return the pictures of a split, if a file or a folder is one of VOC or YOLO; else None.

    Args:
        place: The folder, a YAML file of YOLO, or a list of VOC.
        split: Its name; where `place` is what the recipe names for the split, all belong to it.
        recipe: Says what the task reads.
    """
    if place.suffix.lower() in YAML and place.is_file():
        return _of_yaml(place, split, recipe)
    if place.suffix == ".txt" and place.parent.name == VOC_LISTS.name:
        return _of_list(place)
    if not place.is_dir():
        return None
    if (lists := place / VOC_LISTS).is_dir():
        for name in SPLIT_KEYS.get(split, (split,)):
            if (listed := lists / f"{name}.txt").is_file():
                return _of_list(listed)
        whole = lists / DEFAULT_LIST
        return _of_list(whole) if split == "train" and whole.is_file() else []
    for file in sorted(place.glob("*.y*ml")):
        if (found := _of_yaml(file, split, recipe)) is not None:
            return found
    return None


def annotation_of(picture: Path) -> Path | None:
    """Return the file of the boxes of a picture, if there is one."""
    name = picture.stem
    candidates = [picture.with_suffix(".xml"), picture.with_suffix(".txt")]
    parents = list(picture.parents)
    for i, folder in enumerate(parents[:3]):
        inside = picture.parent.relative_to(folder)
        candidates += [folder.parent / x / inside / f"{name}.xml" for x in XML_FOLDERS]
        candidates += [folder.parent / x / f"{name}.xml" for x in XML_FOLDERS[:2]]
        if folder.name == "images":
            candidates.append(parents[i + 1] / "labels" / inside / f"{name}.txt")
    return next((file for file in candidates if file.is_file()), None)


def read_annotated(
    files: Sequence[Path], root: Path, column: str, boxes_column: str
) -> Iterator[RawRow]:
    """Yield a row for each picture: its path, and its objects.

    Args:
        files: The pictures.
        root: The folder that places are told from.
        column: Name of the column of the picture.
        boxes_column: Name of the column of the objects.
    """
    used: set[Path] = set()
    first_pixels: dict[Path, int] = {}
    are_xml = any(file.suffix == ".xml" for file in map(annotation_of, files) if file)
    for picture in files:
        place = (
            picture.relative_to(root).as_posix() if picture.is_relative_to(root) else picture.name
        )
        file, error = annotation_of(picture), ""
        objects: Json = {"bbox": [], "category": [], FORMAT: "relative_cxcywh"}
        if file is None and are_xml:
            error = f"there is no `{picture.stem}.xml` with its boxes"
        elif file is not None:
            used.add(file)
            if file.suffix == ".xml":
                if file.parent not in first_pixels:
                    first_pixels[file.parent] = first_pixel(file.parent)
                objects, error = _read_xml(file, first_pixels[file.parent])
            else:
                objects, error = _read_yolo(file, labels_for(picture))
            error = f"{file.name}: {error}" if error else ""
        value = {"bytes": None, "path": str(picture)}
        yield RawRow({column: value, boxes_column: objects}, place, error)
    yield from _without_picture(used)


def _without_picture(used: set[Path]) -> Iterator[RawRow]:
    """Yield an error for each file next to those that were read for which there is no picture."""
    for folder, suffix in sorted({(file.parent, file.suffix) for file in used}):
        for file in sorted(folder.glob(f"*{suffix}")):
            if file in used or file.name in NAMES_FILES or file.stem.lower().startswith("readme"):
                continue
            if not _has_picture(file):
                yield RawRow(None, file.name, f"there is no picture `{file.stem}` for its boxes")


def _has_picture(file: Path) -> bool:
    above = file.parent.parent
    folders = [file.parent, above / VOC_PICTURES, above / "images", above.parent / "images"]
    folders.append(above.parent / "images" / file.parent.name)
    names = (file.stem + suffix for suffix in SUFFIXES["image"])
    return any((folder / name).is_file() for name in names for folder in folders)


@dataclass(frozen=True)
class YoloLabels:
    """What the numbers in YOLO's text files mean.

    Args:
        names: The name of each label by its number, in order; empty if there are none.
        n_points: Numbers of the key points behind each box.
    """

    names: dict[int, str] = field(default_factory=dict)
    n_points: int = 0


def names_for(picture: Path) -> list[str]:
    """Return the names of YOLO's labels, in the order of their numbers."""
    return list(labels_for(picture).names.values())


def labels_for(picture: Path) -> YoloLabels:
    """Return YOLO's labels, by the file with them in a folder above a picture."""
    for folder in list(picture.parents)[:LEVELS]:
        if (labels := _labels_in(folder)).names:
            return labels
    return YoloLabels()


@functools.lru_cache(maxsize=4096)
def _labels_in(folder: Path) -> YoloLabels:
    """Return the labels that files of a folder name.

    Raises:
        LoraError: If two files name them differently.
    """
    found: dict[Path, YoloLabels] = {}
    for file in (folder / name for name in NAMES_FILES):
        if file.is_file():
            lines = [line.strip() for line in _text_of(file).strip().splitlines()]
            found[file] = YoloLabels({i: line for i, line in enumerate(lines) if line})
    for file in sorted(folder.glob("*.y*ml")):
        content = _yaml(file)
        if names := _names_of(content, file):
            found[file] = YoloLabels(names, _n_points(content))
    files = [file for file, labels in found.items() if labels.names]
    for file in files[1:]:
        first, other = found[files[0]].names, found[file].names
        differing = [i for i in sorted({*first, *other}) if first.get(i) != other.get(i)]
        if differing:
            number = differing[0]
            said = [f"`{printable(n.get(number, 'nothing'), SHOWN)}`" for n in (first, other)]
            what = f"label {number} is {said[0]} in {files[0].name} and {said[1]} in {file.name}"
            raise LoraError(what, str(folder), "delete the file that is not of these pictures")
    return found[files[-1]] if files else YoloLabels()  # a YAML file knows of key points too


def _names_of(content: Json, file: Path) -> dict[int, str]:
    """Return the names of the labels in a YAML file by their numbers, in order.

    Raises:
        LoraError: If they stand behind something else than numbers.
    """
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return {}
    if not all(str(key).strip().isdecimal() for key in names):
        what = "the keys of `names` are not the numbers of the labels"
        raise LoraError(what, str(file), "write `names: {0: cat, 1: dog}`, or a list of names")
    return {int(key): str(names[key]).strip() for key in sorted(names, key=int)}


def _n_points(content: Json) -> int:
    """Return how many numbers of key points stand behind a box: points, by numbers of each."""
    shape = content.get("kpt_shape")
    if isinstance(shape, list) and all(str(n).isdecimal() for n in shape):
        return math.prod(int(n) for n in shape)
    return 0


def _yaml(file: Path) -> Json:
    """Return what a YAML file holds, or nothing if that is no mapping; names are texts as written.

    YAML would take the names `yes` and `no` for true and false.
    """
    try:
        text = _text_of(file)
        content = yaml.safe_load(text)
        names = yaml.BaseLoader(text).get_single_data()  # it makes texts only
    except yaml.YAMLError:
        return {}
    if not isinstance(content, dict):
        return {}
    return content | ({"names": names["names"]} if content.get("names") else {})


def _of_yaml(file: Path, split: str, recipe: Recipe) -> list[Path] | None:
    """Return the pictures of a split as YOLO's YAML file names them; None if it is no such file."""
    content = _yaml(file)
    if not content.get("names") or not any(
        k in content for keys in SPLIT_KEYS.values() for k in keys
    ):
        return None
    key = next((k for k in SPLIT_KEYS.get(split, (split,)) if content.get(k)), None)
    if key is None:
        return []
    named = content[key] if isinstance(content[key], list) else [content[key]]
    found = []
    for name in map(str, named):
        place = _found_place(file, str(content.get("path") or ""), name)
        if place is None:
            what = f"`{key}: {printable(name, SHOWN)}` is not there"
            raise LoraError(what, str(file), "correct the path, from the folder of the file")
        if place.is_file():
            lines = [line.strip() for line in _text_of(place).splitlines() if line.strip()]
            found += [Path(written_here(str(place.parent / line))) for line in lines]
        else:
            found += [place / picture for picture in media_files(place, recipe)]
    return found


def _found_place(file: Path, root: str, name: str) -> Path | None:
    """Return where a path of a YAML file leads; exports often begin it with one `../` too many."""
    here = file.parent
    plain = re.sub(r"^(\.\./)+", "", name)
    places = [here / root / name, here / name, here / plain, here / root / plain]
    there = (Path(written_here(str(place))) for place in places)
    return next((place for place in there if place.exists()), None)


def _of_list(file: Path) -> list[Path]:
    """Return the pictures that a list of VOC names."""
    folder = file.parents[2] / VOC_PICTURES
    stems = [line.split()[0] for line in _text_of(file).splitlines() if line.strip()]
    suffixes = SUFFIXES["image"]
    found = []
    for stem in stems:
        paths = (folder / f"{stem}{suffix}" for suffix in suffixes)
        found.append(next((path for path in paths if path.is_file()), folder / f"{stem}.jpg"))
    return found


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise unreadable(file, error) from error


def first_pixel(folder: Path) -> int:
    """Return the number of the first pixel in the files of Pascal VOC in a folder: 1, or 0.

    Boxes at the left or upper edge show it: more of them begin at 0 than at 1 where 0 is the first.
    """
    counts = {0: 0, 1: 0}
    for file in folder.glob("*.xml"):
        for found in EDGES.finditer(file.read_bytes()):
            counts[int(found[1])] += 1
    return 0 if counts[0] > counts[1] else 1


def _read_xml(file: Path, first: int) -> tuple[Json, str]:
    """Return the objects of a file of Pascal VOC, and what is wrong with it.

    Args:
        file: The file.
        first: The number of the first pixel.
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
    if size := said_size({side: root.findtext(f"size/{side}") for side in ("width", "height")}):
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


def _read_yolo(file: Path, labels: YoloLabels) -> tuple[Json, str]:
    """Return the objects of a text file of YOLO, and what is wrong with it."""
    boxes, categories = [], []
    for i, line in enumerate(_text_of(file).splitlines(), 1):
        if not line.strip():
            continue
        first, *rest = line.split()
        try:
            numbers = [float(text) for text in rest]
        except ValueError:
            return {}, f"line {i} holds something that is not a number"
        if not WHOLE.fullmatch(first) or float(first) % 1:
            return {}, f"line {i} does not begin with the number of a label"
        label = int(float(first))
        if labels.n_points and len(numbers) == 4 + labels.n_points:
            numbers = numbers[:4]
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:  # an outline
            xs, ys = numbers[::2], numbers[1::2]
            size = max(xs) - min(xs), max(ys) - min(ys)
            numbers = [min(xs) + size[0] / 2, min(ys) + size[1] / 2, *size]
        if len(numbers) != 4:
            return {}, f"line {i} has {len(numbers)} numbers behind the label, and a box has 4"
        if labels.names and label not in labels.names:
            known = f"the names are of {_ranges(labels.names)}"
            return {}, f"line {i} is of label {label}, and {known}"
        boxes.append(numbers)
        categories.append(labels.names[label] if labels.names else label)
    return {"bbox": boxes, "category": categories, FORMAT: "relative_cxcywh"}, ""


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers in short: `0 to 4`, or each by itself where some are left out."""
    known = sorted(numbers)
    if known[-1] - known[0] + 1 == len(known) > 1:
        return f"{known[0]} to {known[-1]}"
    return printable(", ".join(map(str, known)), SHOWN)
