"""Which files belong to a split, and which of their rows."""

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


def split_slice(text: str, at: str) -> tuple[str, str]:
    """Divide `train[:80%]` into its name and its slice.

    Raises:
        LoraError: If what stands in brackets at the end is not a slice.
    """
    match = re.fullmatch(r"(.*?)(?:\[([^\[\]/]*)\])?", text, re.DOTALL)
    assert match is not None
    name, part = match[1], match[2]
    if part is None:
        return name, ""
    bounds = part.split(":")
    good = len(bounds) == 2 and all(re.fullmatch(r"(-?\d{1,15}%?)?", bound) for bound in bounds)
    if not good or any(abs(int(b[:-1])) > 100 for b in bounds if b.endswith("%")):
        hint = "a slice is written `train[:80%]`, `train[500:1000]` or `train[-100:]`"
        raise LoraError(f"`{text}` is not a slice", at, hint)
    return name, part


def positions(part: str, count: int) -> slice:
    """Return what a slice of `count` rows means."""

    def bound(text: str) -> int | None:
        if not text:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    start, _, stop = part.partition(":")
    return slice(bound(start), bound(stop))


def files_of(recipe: Recipe, split: str, name: str) -> list[Path]:
    """Return the files of a split, in order.

    Args:
        recipe: Its `data` section says where to look.
        split: The split that is asked for.
        name: What the recipe says of it: a file or a pattern, or its name in `data.path`.

    Raises:
        LoraError: If there are none.
    """
    try:
        return _files_of(recipe, split, name)
    except OSError as error:  # of a folder that may not be looked into, a name that is too long
        at = recipe.at(f"data.{split}" if is_file(name) else "data.path")
        what = f"cannot be read: {(error.strerror or str(error)).lower()}"
        hint = f"check `ls -ld {printable(str(error.filename), 200)}`"
        raise LoraError(what, at, hint) from error


def _files_of(recipe: Recipe, split: str, name: str) -> list[Path]:
    data = recipe.data
    at = recipe.at(f"data.{split}")
    pattern = Path(name if is_file(name) else (data.path or ""))
    if not is_file(name):
        at = recipe.at("data.path")
    listed = None
    if recipe.task.boxes_column is not None:
        listed = annotated_files(pattern, split if is_file(name) else name, recipe)
    if listed is not None:
        files, others_there = listed, [pattern.name]
    elif pattern.is_dir():
        are_media = False
        inside = [file for file in files_inside(pattern) if _readable(file, recipe)]
        if recipe.task.boxes_column is not None and _has_boxes_beside(pattern, inside, recipe):
            inside = []  # Label Studio puts `notes.json` next to the folders
        others_there = [str(file) for file in inside]
        if data.format.label_from == "folder":
            inside = class_files(inside)
        of = {file: _split_parts(file, data.format) for file in inside}
        if not inside and (inside := _of_rows(recipe, pattern, media_files(pattern, recipe))):
            others_there, of = [str(file) for file in inside], split_parts(inside)
            are_media = True
            if not recipe.task.label_columns_by_key:  # no folder is a class
                of = {file: file.parent.parts for file in inside}
        by_split = [file for file in inside if _belongs(of[file], name)]
        of_none = [file for file in inside if not any(_belongs(of[file], s) for s in SPLITS)]
        rest = of_none if are_media or len(of_none) == len(inside) else []
        of_split = by_split or (rest if name == "train" else [])
        if is_file(name) and are_media:
            of_split = inside  # a folder of pictures that is named as a split
        elif are_media and by_split and of_none and name == "train":
            _announce_left_out(pattern, tuple(of_none))
        files = [pattern / file for file in of_split]
    elif parts := parts_of(pattern):
        if missing := [part for part in parts.values() if not part.is_file()]:
            raise LoraError(f"there is no file {missing[0]}", at, name_neighbours(missing[0]))
        files = [pattern] if is_file(name) or name == "train" else []
    elif pattern.is_file():
        files = [pattern] if is_file(name) or name == "train" else []
    else:
        folder = next(parent for parent in pattern.parents if parent.is_dir())
        files = [f for f in sorted(folder.glob(str(pattern.relative_to(folder)))) if f.is_file()]
        if not files:
            raise LoraError(*_not_there(pattern, folder, at))
        files = files if is_file(name) or name == "train" else []
    if not files and pattern.is_dir() and not others_there:
        hint = f"known are {', '.join(KINDS)}, also with .gz"
        raise LoraError(f"the folder {pattern} contains no file of a known kind", at, hint)
    if not files:
        drawn = f", or draw rows from train: `{split}: {{from: train, fraction: 0.1}}`"
        hint = "name a file" + ("" if split == "train" else drawn)
        if pattern.is_dir():
            hint += f"; the files in it are: {', '.join(others_there[:10])}"
        wanted = split if is_file(name) else name
        raise LoraError(f"{pattern} has no split `{wanted}`", recipe.at(f"data.{split}"), hint)
    return files


def _of_rows(recipe: Recipe, folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of a folder that lie in no other folder that the task names."""
    keys = (key.split(".") for key in recipe.task.local_folders)
    others = [Path(str(functools.reduce(getattr, key, recipe.task))).absolute() for key in keys]
    whole = folder.absolute()
    others = [one for one in others if one != whole and one.is_relative_to(whole)]
    return [file for file in files if not any((whole / file).is_relative_to(o) for o in others)]


@functools.lru_cache(maxsize=64)
def _announce_left_out(folder: Path, files: tuple[Path, ...]) -> None:
    """Say once which files of a folder are of no split, where others are of some."""
    lies, are = ("lies", "is") if len(files) == 1 else ("lie", "are")
    what = f"{counted(len(files), 'file')} in {folder} {lies} in no folder of a split and {are} "
    warn(f"{what}left out, the first is {files[0]}")


def _not_there(pattern: Path, folder: Path, at: str) -> tuple[str, str, str]:
    """Return why there is no file of a name or a pattern: what, where, and a hint."""
    if pattern.is_symlink():
        target = pattern.readlink()
        what = f"{pattern} is a link to {target}, which is not there, or leads back to it"
        return what, at, f"create the link again: `ln -sfn FILE {pattern.name}`"
    if pattern.exists():
        what = f"{pattern} is a pipe, a device or a socket, which can be read once at most"
        return what, at, "write its content into a file, and name that"
    around = sorted(f.name for f in folder.iterdir() if not f.name.startswith("."))
    kind = "no file that matches" if re.search(r"[*?\[]", str(pattern)) else "no file"
    close = nearest(pattern.name, around) if pattern.parent == folder else None
    hint = did_you_mean(pattern.name, around, f"in {folder} are") if close else ""
    if not close:
        data = [name for name in around if kind_by_name(name) or (folder / name).is_dir()]
        hint = f"in {folder} are " + (", ".join(data[:20]) or "no data files")
    return f"there is {kind} {pattern}", at, hint


def _has_boxes_beside(folder: Path, tables: Sequence[Path], recipe: Recipe) -> bool:
    """Return whether a folder's pictures have files of boxes, and no table is one of boxes."""
    if any(file.stem == "metadata" or is_coco(folder / file) for file in tables):
        return False
    pictures = media_files(folder, recipe)[:SAMPLE] if tables else []
    return any(annotation_file(folder / picture) for picture in pictures)


def _readable(file: Path, recipe: Recipe) -> bool:
    """Return whether a file in a folder is one of data, and neither hidden nor a read-me.

    Next to pictures, a text file is a remark, and a table describes them.
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
    """Return the parts of a path that may name its split; the folder of a class does not."""
    return file.parts[:-2] if form.label_from == "folder" else file.parts


def _belongs(parts: Sequence[str], split: str) -> bool:
    """Return whether a name or a folder of a path says that the file is of a split."""
    return any(names_split(part, [split]) for part in parts)
