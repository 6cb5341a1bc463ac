"""YOLO: the YAML file of a data set, the names of its labels, and a text with a picture's boxes.

A line of the text is the number of the label and the box (its centre and size, in shares of the
picture), or the corners of an outline; where the YAML file has a `kpt_shape`, key points follow the
box and are not read. A picture without such a file has no objects.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_cli.data.boxes import FORMAT
from lora_cli.data.media import local_path
from lora_cli.data.media_folder import media_files
from lora_cli.data.text_lines import whole_text
from lora_cli.errors import LoraError, printable
from lora_cli.recipe import Recipe

NAMES_FILES = ("classes.txt", "obj.names", "classes.names")
YAML = (".yaml", ".yml")
# the splits of a YAML file, and of the lists of Pascal VOC, by those of a recipe
SPLIT_KEYS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
LEVELS = 4  # folders above a picture in which the names of the labels are looked for
WHOLE = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")  # `3`, or as NumPy writes it: `3.0`, `3.000e+00`
SHOWN = 60
Json = dict[str, Any]


@dataclass(frozen=True)
class Labels:
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


def labels_for(picture: Path) -> Labels:
    """Return YOLO's labels, by the file with them in a folder above a picture."""
    for folder in list(picture.parents)[:LEVELS]:
        if (labels := _labels_in(folder)).names:
            return labels
    return Labels()


@functools.lru_cache(maxsize=4096)
def _labels_in(folder: Path) -> Labels:
    """Return the labels that files of a folder name.

    Raises:
        LoraError: If two files name them differently.
    """
    found: dict[Path, Labels] = {}
    for file in (folder / name for name in NAMES_FILES):
        if file.is_file():
            lines = [line.strip() for line in whole_text(file).strip().splitlines()]
            found[file] = Labels({i: line for i, line in enumerate(lines) if line})
    for file in sorted(folder.glob("*.y*ml")):
        content = _yaml(file)
        if names := _names_of(content, file):
            found[file] = Labels(names, _n_points(content))
    files = [file for file, labels in found.items() if labels.names]
    for file in files[1:]:
        first, other = found[files[0]].names, found[file].names
        differing = [i for i in sorted({*first, *other}) if first.get(i) != other.get(i)]
        if differing:
            number = differing[0]
            said = [f"`{printable(n.get(number, 'nothing'), SHOWN)}`" for n in (first, other)]
            what = f"label {number} is {said[0]} in {files[0].name} and {said[1]} in {file.name}"
            raise LoraError(what, str(folder), "delete the file that is not of these pictures")
    return found[files[-1]] if files else Labels()  # a YAML file knows of key points too


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
        text = whole_text(file)
        content = yaml.safe_load(text)
        names = yaml.BaseLoader(text).get_single_data()  # it makes texts only
    except yaml.YAMLError:
        return {}
    if not isinstance(content, dict):
        return {}
    return content | ({"names": names["names"]} if content.get("names") else {})


def images_of_split(file: Path, split: str, recipe: Recipe) -> list[Path] | None:
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
            lines = [line.strip() for line in whole_text(place).splitlines() if line.strip()]
            found += [Path(local_path(str(place.parent / line))) for line in lines]
        else:
            found += [place / picture for picture in media_files(place, recipe)]
    return found


def _found_place(file: Path, root: str, name: str) -> Path | None:
    """Return where a path of a YAML file leads; exports often begin it with one `../` too many."""
    here = file.parent
    plain = re.sub(r"^(\.\./)+", "", name)
    places = [here / root / name, here / name, here / plain, here / root / plain]
    there = (Path(local_path(str(place))) for place in places)
    return next((place for place in there if place.exists()), None)


def read_boxes(file: Path, labels: Labels) -> tuple[Json, str]:
    """Return the objects of a text file of YOLO, and what is wrong with it.

    Args:
        file: The file.
        labels: What the numbers of labels in it mean.

    Returns:
        The value of a row's column of objects, with boxes as (centre x, centre y, width, height)
        in shares of the picture, and an error, which is empty if the file is right.
    """
    boxes, categories = [], []
    for i, line in enumerate(whole_text(file).splitlines(), 1):
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
