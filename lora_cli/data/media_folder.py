"""Folders of pictures (or of sound): a row for each file, with the name of its folder as the label.

    pictures/cat/1.png  pictures/dog/2.png                      label: cat, dog
    pictures/train/cat/1.png  pictures/test/cat/2.png           a folder for each split above them
    pictures/Greek/alpha/1.png  pictures/Latin/alpha/2.png      label: Greek/alpha, Latin/alpha
    pictures/metadata.csv                                       a table of them: an ordinary file
    speech/a/1.wav  speech/a/1.txt                              text: the content of the text file
    speech/a/1.wav  speech/a/a.trans.txt                        text: its line `1 …` (LibriSpeech)

The last name of a folder is the label, as `datasets` has it, unless two folders share it: those
would become one class in silence, so that there the whole path is the label.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.folder_files import files_inside
from lora_cli.data.labelled_text import LABEL_COLUMN
from lora_cli.data.media import decoded
from lora_cli.data.split_names import SPLITS, names_split
from lora_cli.data.text_lines import RawRow
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import is_file
from lora_cli.recipe.spec.task_section import MediaKind

SUFFIXES: dict[MediaKind, tuple[str, ...]] = {
    "image": (
        ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff",
        ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga",
    ),
    "audio": (
        ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au",
        ".m4a", ".aac", ".wma", ".amr",  # which are not read, and said to be so
    ),
}  # fmt: skip
ALL_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
SPLIT_NAME = re.compile(r"(?i)train(ing)?|validation|valid|val|dev|test|eval")
REMARK = re.compile(r"(?i)readme|licen[cs]e|classes|notes?$|requirements")  # is no caption
LISTED = ".trans.txt"  # LibriSpeech: a line for each recording of a folder, its name and its text
ASIDE = ("__MACOSX",)  # what a Mac puts into archives
SAMPLE = 100  # values of a column that are inspected


def is_media_file(path: Path) -> bool:
    """Return whether a file is a picture or sound, by its name."""
    return path.name.lower().endswith(ALL_SUFFIXES)


def are_media(values: Sequence[Any]) -> bool:
    """Return whether the values of a column are pictures or sound, or nearly all paths of such."""
    are = [
        _is_path(value)
        or (isinstance(value, str) and decoded(value) is not None)
        or isinstance(value, bytes)
        or (isinstance(value, dict) and value.keys() >= {"bytes", "path"})
        or (isinstance(value, dict) and _is_path(value.get("path")))
        for value in values
    ]
    return sum(are) > 0.9 * len(are)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and is_media_file(Path(value))


def transcript_of(file: Path) -> Path | None:
    """Return the text file next to a file that says what is said or shown in it, if there is one.

    kohya's scripts call those of pictures `.caption`.
    """
    beside = (file.with_suffix(suffix) for suffix in (".txt", ".TXT", ".caption"))
    return next((text for text in beside if text.is_file()), None)


def transcript_files(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return, for each file, the text files that may say what is said or shown in it.

    It is the one of the same name, or else the lists of its folder.
    """
    lists: dict[Path, list[Path]] = {}
    for folder in {file.parent for file in files}:
        lists[folder] = sorted(folder.glob(f"*{LISTED}"))
    own = ((file, transcript_of(file)) for file in files)
    return {file: lists[file.parent] if text is None else [text] for file, text in own}


def texts_of_several(files: Sequence[Path]) -> list[list[Path]]:
    """Return files whose names differ in the ending alone, so that they share a text file."""
    groups: dict[Path, list[Path]] = {}
    for file in files:
        if (text := transcript_of(file)) is not None:
            groups.setdefault(text, []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def media_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the files in a folder that hold what the recipe's task sees or hears, in order.

    Args:
        folder: The folder.
        recipe: Its task says which kinds of media it reads; there may be none.

    Returns:
        Paths relative to the folder.
    """
    kinds = set(recipe.task.media_columns.values())
    suffixes = tuple(suffix for kind in kinds for suffix in SUFFIXES[kind])
    return [file for file in _inside(folder) if suffixes and file.name.lower().endswith(suffixes)]


def other_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the files next to pictures in the folders of the classes that are none."""
    found = set(media_files(folder, recipe))
    classes = {file.parent for file in found if file.parent != Path()}
    return [file for file in _inside(folder) if file.parent in classes and file not in found]


def texts_alone(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the text files of a folder that have no picture, or no recording, next to them."""
    files = media_files(folder, recipe)
    texts = {file.with_suffix(suffix) for file in files for suffix in (".txt", ".TXT")}
    folders = {file.parent for file in files}
    return [
        file
        for file in _inside(folder)
        if file.suffix.lower() == ".txt"
        and file not in texts
        and not REMARK.match(file.stem)
        and not (file.name.endswith(LISTED) and file.parent in folders)
    ]


def _inside(folder: Path) -> list[Path]:
    return [
        file
        for file in files_inside(folder)
        if not any(part.startswith(".") or part in ASIDE for part in file.parts)
        and file.name.lower() not in ("thumbs.db", "desktop.ini")
    ]


def split_parts(files: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Return, for each file of a folder, the parts of its path that may name its split.

    They are those above the folder of its class; or all, if the folders name nothing but splits.
    """
    parents = {file: file.parent.parts for file in files}
    if all(parts and SPLIT_NAME.fullmatch(parts[-1]) for parts in parents.values()):
        return parents
    return {file: parts[:-1] for file, parts in parents.items()}


def classes_of(files: Sequence[Path], splits: Collection[str] = SPLITS) -> dict[Path, str]:
    """Return the name of the class of each folder that holds files; none if it names no class.

    Args:
        files: All files of a folder of pictures, relative to it.
        splits: What folders above those of the classes may be called, which is no part of a name.
    """
    above = split_parts(files)
    inner: dict[Path, tuple[str, ...]] = {}
    for file in files:
        parts = file.parent.parts
        if parts and len(above[file]) < len(parts):
            names = [part.strip() for part in parts[:-1] if not names_split(part, splits)]
            inner[file.parent] = (*names, parts[-1].strip())
    whole = set(inner.values())
    are_unique = len({names[-1] for names in whole}) == len(whole)
    return {folder: names[-1] if are_unique else "/".join(names) for folder, names in inner.items()}


def root_of(recipe: Recipe, files: Sequence[Path]) -> Path:
    """Return the folder of pictures that files were found in."""
    data = recipe.data
    named = [data.path, data.train, data.validation, data.test]
    for folder in (Path(name) for name in named if isinstance(name, str)):
        if folder.is_dir() and files[0].is_relative_to(folder):
            return folder
    return Path(os.path.commonpath([file.parent for file in files]))


def class_names(recipe: Recipe, files: Sequence[Path]) -> dict[str, list[str]]:
    """Return the names of all classes in the folder that files come from, in the order of text."""
    found = folder_labels(recipe, files)
    return {LABEL_COLUMN: sorted(set(found.values()))} if found else {}


def folder_labels(recipe: Recipe, files: Sequence[Path]) -> dict[Path, str]:
    """Return the label of each folder of a class, as seen from the folder of all pictures."""
    named = (recipe.data.train, recipe.data.validation, recipe.data.test)
    names = (name.partition("[")[0] for name in named if isinstance(name, str))  # not its slice
    splits = {*SPLITS, *(name for name in names if not is_file(name))}
    return classes_of(media_files(root_of(recipe, files), recipe), splits)


def read_media_files(recipe: Recipe, files: Sequence[Path]) -> Iterator[RawRow]:
    """Yield a row for each file: the file itself, and what belongs to it.

    This is its label, if its folder names one; of a recording it is the text file next to it, or
    its line in a list of the folder.
    """
    root = root_of(recipe, files)
    text_column = recipe.task.transcript_column
    beside = {} if text_column is None else transcript_files(files)
    transcripts = _Transcripts(recipe.data.format.encoding)
    classes = folder_labels(recipe, files)
    (column, *_) = recipe.task.media_columns
    for file in files:
        place = file.relative_to(root)
        row: dict[str, Any] = {column: {"bytes": None, "path": str(file)}}
        if (label := classes.get(place.parent)) is not None:
            row[LABEL_COLUMN] = label
        error = ""
        if text_column is not None and text_column not in row:  # it may be the label
            row[text_column], error = transcripts.of(file, beside[file])
        yield RawRow(row, place.as_posix(), error)


class _Transcripts:
    """Reads what is said in recordings from the text files next to them.

    Args:
        encoding: Of these files.
    """

    def __init__(self, encoding: str) -> None:
        is_utf8 = encoding.lower() in ("utf-8", "utf8")
        self.encoding = "utf-8-sig" if is_utf8 else encoding
        self.lists: dict[Path, dict[str, str]] = {}

    def of(self, file: Path, texts: Sequence[Path]) -> tuple[str | None, str]:
        """Return what is said in a recording, and what is wrong with its text file.

        There may be no text, as next to recordings that are to be transcribed.

        Args:
            file: The recording.
            texts: The text files that may say it.
        """
        text = None
        for beside in texts:
            try:
                if beside.name.endswith(LISTED):
                    text = self._listed(beside).get(file.stem, text)
                else:
                    text = " ".join(beside.read_text(encoding=self.encoding).split())
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                return None, f"`{beside.name}` cannot be read: {reason}"
            except (UnicodeError, LookupError):
                name = self.encoding.removesuffix("-sig")
                return None, f"`{beside.name}` is not in the encoding `{name}`"
        return text, ""

    def _listed(self, file: Path) -> dict[str, str]:
        """Return the texts of a list, by the name of the recording."""
        if file not in self.lists:
            lines = file.read_text(encoding=self.encoding).splitlines()
            pairs = (line.strip().partition(" ") for line in lines)
            self.lists[file] = {name: " ".join(text.split()) for name, _, text in pairs if name}
        return self.lists[file]
