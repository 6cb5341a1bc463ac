"""Find the files of a split, and parse the slice of their rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from lora_cli.data.annotated_folder import annotated_files, annotation_file
from lora_cli.data.coco_rows import is_coco
from lora_cli.data.file_formats import KINDS, kind_by_name, kind_of
from lora_cli.data.folder_files import files_inside
from lora_cli.data.labelled_text import class_files
from lora_cli.data.media_folder import SAMPLE, media_files, split_parts
from lora_cli.data.parallel_texts import parts_of
from lora_cli.data.split_names import SPLITS as SPLITS
from lora_cli.data.split_names import names_split
from lora_cli.errors import LoraError, counted, did_you_mean, nearest, printable, warn
from lora_cli.errors import name_neighbours as name_neighbours
from lora_cli.recipe import FormatSpec, Recipe
from lora_cli.recipe.spec import is_file


def split_slice(text: str, location: str) -> tuple[str, str]:
    """Split `train[:80%]` into the name and the slice.

    Raises:
        LoraError: If the brackets at the end do not contain a slice.
    """
    match = re.fullmatch(r"(.*?)(?:\[([^\[\]/]*)\])?", text, re.DOTALL)
    assert match is not None
    name, part = match[1], match[2]
    if part is None:
        return name, ""
    bounds = part.split(":")
    is_valid = len(bounds) == 2 and all(re.fullmatch(r"(-?\d{1,15}%?)?", bound) for bound in bounds)
    if not is_valid or any(abs(int(b[:-1])) > 100 for b in bounds if b.endswith("%")):
        hint = "a slice is written `train[:80%]`, `train[500:1000]` or `train[-100:]`"
        raise LoraError(f"`{text}` is not a slice", location, hint)
    return name, part


def parse_slice(part: str, count: int) -> slice:
    """Convert the text of a slice to a `slice` of `count` rows."""

    def bound(text: str) -> int | None:
        if not text:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    start, _, stop = part.partition(":")
    return slice(bound(start), bound(stop))


def files_of(recipe: Recipe, split: str, name: str) -> list[Path]:
    """Return the files of a split, in order.

    Args:
        recipe: The recipe, whose `data` section says where to look.
        split: The split: `train`, `validation` or `test`.
        name: The value that the recipe gives for the split: a file, a glob pattern, or the name of
            a split in `data.path`.

    Raises:
        LoraError: If there are no such files.
    """
    try:
        return _files_of(recipe, split, name)
    except OSError as error:  # the folder cannot be read, or the name is too long
        location = recipe.at(f"data.{split}" if is_file(name) else "data.path")
        what = f"cannot be read: {(error.strerror or str(error)).lower()}"
        hint = f"check `ls -ld {printable(str(error.filename), 200)}`"
        raise LoraError(what, location, hint) from error


def _files_of(recipe: Recipe, split: str, name: str) -> list[Path]:
    data = recipe.data
    location = recipe.at(f"data.{split}")
    pattern = Path(name if is_file(name) else (data.path or ""))
    if not is_file(name):
        location = recipe.at("data.path")
    annotated = None
    if recipe.task.boxes_column is not None:
        annotated = annotated_files(pattern, split if is_file(name) else name, recipe)
    if annotated is not None:
        files, shown_names = annotated, [pattern.name]
    elif pattern.is_dir():
        are_media = False
        listed = [file for file in files_inside(pattern) if _is_data_file(file, recipe)]
        if recipe.task.boxes_column is not None and _has_annotations(pattern, listed, recipe):
            listed = []  # such as `notes.json`, which Label Studio puts next to the folders
        shown_names = [str(file) for file in listed]
        if data.format.label_from == "folder":
            listed = class_files(listed)
        names = {file: _split_parts(file, data.format) for file in listed}
        if not listed and (listed := _own_files(recipe, pattern, media_files(pattern, recipe))):
            shown_names, names = [str(file) for file in listed], split_parts(listed)
            are_media = True
            if not recipe.task.label_columns_by_key:  # folders are not classes
                names = {file: file.parent.parts for file in listed}
        by_split = [file for file in listed if _belongs(names[file], name)]
        no_split = [file for file in listed if not any(_belongs(names[file], s) for s in SPLITS)]
        default_train = no_split if are_media or len(no_split) == len(listed) else []
        split_files = by_split or (default_train if name == "train" else [])
        if is_file(name) and are_media:
            split_files = listed  # the recipe names a folder of images as this split
        elif are_media and by_split and no_split and name == "train":
            _announce_left_out(pattern, tuple(no_split))
        files = [pattern / file for file in split_files]
    elif parts := parts_of(pattern):
        if missing := [part for part in parts.values() if not part.is_file()]:
            raise LoraError(f"there is no file {missing[0]}", location, name_neighbours(missing[0]))
        files = [pattern] if is_file(name) or name == "train" else []
    elif pattern.is_file():
        files = [pattern] if is_file(name) or name == "train" else []
    else:
        folder = next(parent for parent in pattern.parents if parent.is_dir())
        files = [f for f in sorted(folder.glob(str(pattern.relative_to(folder)))) if f.is_file()]
        if not files:
            raise LoraError(*_no_such_file(pattern, folder, location))
        files = files if is_file(name) or name == "train" else []
    if not files and pattern.is_dir() and not shown_names:
        hint = f"known are {', '.join(KINDS)}, also with .gz"
        raise LoraError(f"the folder {pattern} contains no file of a known kind", location, hint)
    if not files:
        held_out = f", or draw rows from train: `{split}: {{from: train, fraction: 0.1}}`"
        hint = "name a file" + ("" if split == "train" else held_out)
        if pattern.is_dir():
            hint += f"; the files in it are: {', '.join(shown_names[:10])}"
        split_name = split if is_file(name) else name
        raise LoraError(f"{pattern} has no split `{split_name}`", recipe.at(f"data.{split}"), hint)
    return files


def _own_files(recipe: Recipe, folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of a folder, except for those in other folders that the task names."""
    keys = (key.split(".") for key in recipe.task.local_folders)
    other_folders = [
        Path(str(functools.reduce(getattr, key, recipe.task))).absolute() for key in keys
    ]
    root = folder.absolute()
    other_folders = [
        other for other in other_folders if other != root and other.is_relative_to(root)
    ]
    return [
        file
        for file in files
        if not any((root / file).is_relative_to(other) for other in other_folders)
    ]


@functools.lru_cache(maxsize=64)
def _announce_left_out(folder: Path, files: tuple[Path, ...]) -> None:
    """Warn once of files in a folder that belong to no split while others do."""
    lies, are = ("lies", "is") if len(files) == 1 else ("lie", "are")
    what = f"{counted(len(files), 'file')} in {folder} {lies} in no folder of a split and {are} "
    warn(f"{what}left out, the first is {files[0]}")


def _no_such_file(pattern: Path, folder: Path, location: str) -> tuple[str, str, str]:
    """Return the error for a file or pattern that matches nothing: message, location, hint."""
    if pattern.is_symlink():
        target = pattern.readlink()
        what = f"{pattern} is a link to {target}, which is not there, or leads back to it"
        return what, location, f"create the link again: `ln -sfn FILE {pattern.name}`"
    if pattern.exists():
        what = f"{pattern} is a pipe, a device or a socket, which can be read once at most"
        return what, location, "write its content into a file, and name that"
    neighbours = sorted(f.name for f in folder.iterdir() if not f.name.startswith("."))
    kind = "no file that matches" if re.search(r"[*?\[]", str(pattern)) else "no file"
    similar = nearest(pattern.name, neighbours) if pattern.parent == folder else None
    hint = did_you_mean(pattern.name, neighbours, f"in {folder} are") if similar else ""
    if not similar:
        data = [name for name in neighbours if kind_by_name(name) or (folder / name).is_dir()]
        hint = f"in {folder} are " + (", ".join(data[:20]) or "no data files")
    return f"there is {kind} {pattern}", location, hint


def _has_annotations(folder: Path, tables: Sequence[Path], recipe: Recipe) -> bool:
    """Return whether images have annotation files of their own, and no table has the boxes."""
    if any(file.stem == "metadata" or is_coco(folder / file) for file in tables):
        return False
    images = media_files(folder, recipe)[:SAMPLE] if tables else []
    return any(annotation_file(folder / image) for image in images)


def _is_data_file(file: Path, recipe: Recipe) -> bool:
    """Return whether a file in a folder contains data, and is neither hidden nor a README.

    Next to media files, a text file is a note, and a table is data about them.
    """
    hidden = any(part.startswith(".") for part in file.parts)
    if hidden or file.stem.lower() in ("readme", "license"):
        return False
    try:
        kind = kind_of(file, recipe.data.format)
        return kind != "text" or not recipe.task.media_columns
    except LoraError:
        return False


def _split_parts(file: Path, form: FormatSpec) -> tuple[str, ...]:
    """Return the parts of a path that may name its split, which excludes a class folder."""
    return file.parts[:-2] if form.label_from == "folder" else file.parts


def _belongs(parts: Sequence[str], split: str) -> bool:
    """Return whether any part of a path says that the file belongs to a split."""
    return any(names_split(part, [split]) for part in parts)
