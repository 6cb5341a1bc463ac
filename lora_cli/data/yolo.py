"""Read YOLO data sets: the YAML file, the label names, and a text file of boxes per image.

A line of a text file is a label index and either a box (centre and size, relative to the image) or
the corners of a polygon. If the YAML file has a `kpt_shape`, key points follow the box and are
ignored. An image without a text file has no objects.
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
YAML_SUFFIXES = (".yaml", ".yml")
# names of the splits in YAML files and VOC image lists, by the recipe's names
SPLIT_KEYS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
N_PARENTS = 4  # folders above an image to search for the label names
INDEX = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")  # `3`, or as NumPy writes it: `3.0`, `3.000e+00`
MAX_SHOWN = 60
Json = dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """How to interpret the lines of YOLO's text files.

    Args:
        names: Label names by index, in order; empty if they are unknown.
        n_points: Number of key point values after each box.
    """

    names: dict[int, str] = field(default_factory=dict)
    n_points: int = 0


def names_for(image: Path) -> list[str]:
    """Return the label names of a YOLO data set, in the order of their indices."""
    return list(labels_for(image).names.values())


def labels_for(image: Path) -> Labels:
    """Return the labels from a names file or YAML file in a folder above an image."""
    for folder in list(image.parents)[:N_PARENTS]:
        if (labels := _labels_in(folder)).names:
            return labels
    return Labels()


@functools.lru_cache(maxsize=4096)
def _labels_in(folder: Path) -> Labels:
    """Return the labels that the files in a folder define.

    Raises:
        LoraError: If two files disagree.
    """
    by_file: dict[Path, Labels] = {}
    for file in (folder / name for name in NAMES_FILES):
        if file.is_file():
            lines = [line.strip() for line in whole_text(file).strip().splitlines()]
            by_file[file] = Labels({i: line for i, line in enumerate(lines) if line})
    for file in sorted(folder.glob("*.y*ml")):
        content = _yaml(file)
        if names := _label_names(content, file):
            by_file[file] = Labels(names, _n_points(content))
    files = [file for file, labels in by_file.items() if labels.names]
    for file in files[1:]:
        first, other = by_file[files[0]].names, by_file[file].names
        differing = [i for i in sorted({*first, *other}) if first.get(i) != other.get(i)]
        if differing:
            number = differing[0]
            shown = [f"`{printable(n.get(number, 'nothing'), MAX_SHOWN)}`" for n in (first, other)]
            what = f"label {number} is {shown[0]} in {files[0].name} and {shown[1]} in {file.name}"
            raise LoraError(what, str(folder), "delete the file that is not of these pictures")
    return (
        by_file[files[-1]] if files else Labels()
    )  # prefer a YAML file, which also has the key points


def _label_names(content: Json, file: Path) -> dict[int, str]:
    """Return the label names in a YAML file by index, in order.

    Raises:
        LoraError: If the keys of `names` are not numbers.
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
    """Return the number of key point values after a box: points times values per point."""
    shape = content.get("kpt_shape")
    if isinstance(shape, list) and all(str(n).isdecimal() for n in shape):
        return math.prod(int(n) for n in shape)
    return 0


def _yaml(file: Path) -> Json:
    """Parse a YAML file, with label names as text; return {} if it is not a mapping.

    YAML would parse the names `yes` and `no` as booleans.
    """
    try:
        text = whole_text(file)
        content = yaml.safe_load(text)
        names = yaml.BaseLoader(text).get_single_data()  # parses all scalars as text
    except yaml.YAMLError:
        return {}
    if not isinstance(content, dict):
        return {}
    return content | ({"names": names["names"]} if content.get("names") else {})


def images_of_split(file: Path, split: str, recipe: Recipe) -> list[Path] | None:
    """Return the images of a split in a YOLO YAML file; None if the file is not one."""
    content = _yaml(file)
    if not content.get("names") or not any(
        k in content for keys in SPLIT_KEYS.values() for k in keys
    ):
        return None
    key = next((k for k in SPLIT_KEYS.get(split, (split,)) if content.get(k)), None)
    if key is None:
        return []
    locations = content[key] if isinstance(content[key], list) else [content[key]]
    images = []
    for name in map(str, locations):
        location = _resolve(file, str(content.get("path") or ""), name)
        if location is None:
            what = f"`{key}: {printable(name, MAX_SHOWN)}` is not there"
            raise LoraError(what, str(file), "correct the path, from the folder of the file")
        if location.is_file():
            lines = [line.strip() for line in whole_text(location).splitlines() if line.strip()]
            images += [Path(local_path(str(location.parent / line))) for line in lines]
        else:
            images += [location / image for image in media_files(location, recipe)]
    return images


def _resolve(file: Path, root: str, name: str) -> Path | None:
    """Resolve a path in a YAML file, which exports often begin with one `../` too many."""
    folder = file.parent
    without_parents = re.sub(r"^(\.\./)+", "", name)
    candidates = [
        folder / root / name,
        folder / name,
        folder / without_parents,
        folder / root / without_parents,
    ]
    local_paths = (Path(local_path(str(path))) for path in candidates)
    return next((path for path in local_paths if path.exists()), None)


def read_boxes(file: Path, labels: Labels) -> tuple[Json, str]:
    """Read the objects in a YOLO text file.

    Args:
        file: The file.
        labels: The labels of the data set.

    Returns:
        The value of a row's column of objects, with boxes as (centre x, centre y, width, height)
        relative to the image, and an error message, which is empty if the file is valid.
    """
    boxes, categories = [], []
    for i, line in enumerate(whole_text(file).splitlines(), 1):
        if not line.strip():
            continue
        index, *values = line.split()
        try:
            numbers = [float(text) for text in values]
        except ValueError:
            return {}, f"line {i} holds something that is not a number"
        if not INDEX.fullmatch(index) or float(index) % 1:
            return {}, f"line {i} does not begin with the number of a label"
        label = int(float(index))
        if labels.n_points and len(numbers) == 4 + labels.n_points:
            numbers = numbers[:4]
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:  # a polygon
            xs, ys = numbers[::2], numbers[1::2]
            size = max(xs) - min(xs), max(ys) - min(ys)
            numbers = [min(xs) + size[0] / 2, min(ys) + size[1] / 2, *size]
        if len(numbers) != 4:
            return {}, f"line {i} has {len(numbers)} numbers behind the label, and a box has 4"
        if labels.names and label not in labels.names:
            expected = f"the names are of {_ranges(labels.names)}"
            return {}, f"line {i} is of label {label}, and {expected}"
        boxes.append(numbers)
        categories.append(labels.names[label] if labels.names else label)
    return {"bbox": boxes, "category": categories, FORMAT: "relative_cxcywh"}, ""


def _ranges(numbers: Iterable[int]) -> str:
    """Format numbers as a range, `0 to 4`, or as a list if the range has gaps."""
    ordered = sorted(numbers)
    if ordered[-1] - ordered[0] + 1 == len(ordered) > 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return printable(", ".join(map(str, ordered)), MAX_SHOWN)
