"""Read folders of images or audio: one row per file, labelled by the name of its folder.

    pictures/cat/1.png  pictures/dog/2.png                      label: cat, dog
    pictures/train/cat/1.png  pictures/test/cat/2.png           one folder per split above them
    pictures/Greek/alpha/1.png  pictures/Latin/alpha/2.png      label: Greek/alpha, Latin/alpha
    pictures/metadata.csv                                       a table of files: read as a table
    speech/a/1.wav  speech/a/1.txt                              text: the content of the text file
    speech/a/1.wav  speech/a/a.trans.txt                        text: its line `1 …` (LibriSpeech)

As in `datasets`, the label is the last part of the folder's path. If two folders share it, the
label is the whole path, as they would otherwise silently become one class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.folder_files import files_inside
from lora_cli.data.labelled_text import LABEL_COLUMN
from lora_cli.data.media import decode_base64_media
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
        ".m4a", ".aac", ".wma", ".amr",  # unsupported, with an error that says so
    ),
}  # fmt: skip
ALL_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
SPLIT_NAME = re.compile(r"(?i)train(ing)?|validation|valid|val|dev|test|eval")
NOT_A_CAPTION = re.compile(r"(?i)readme|licen[cs]e|classes|notes?$|requirements")  # not a caption
LIST_SUFFIX = (
    ".trans.txt"  # LibriSpeech: one line per recording in a folder, with its name and text
)
IGNORED_FOLDERS = ("__MACOSX",)  # added to archives by macOS
SAMPLE = 100  # number of values to inspect in a column


def is_media_file(path: Path) -> bool:
    """Return whether a file is an image or audio, by its extension."""
    return path.name.lower().endswith(ALL_SUFFIXES)


def are_media(values: Sequence[Any]) -> bool:
    """Return whether nearly all values of a column are media or paths of media files."""
    is_medium = [
        _is_path(value)
        or (isinstance(value, str) and decode_base64_media(value) is not None)
        or isinstance(value, bytes)
        or (isinstance(value, dict) and value.keys() >= {"bytes", "path"})
        or (isinstance(value, dict) and _is_path(value.get("path")))
        for value in values
    ]
    return sum(is_medium) > 0.9 * len(is_medium)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and is_media_file(Path(value))


def text_file_of(file: Path) -> Path | None:
    """Return the transcript or caption file next to a media file; None if there is none.

    kohya's scripts use the extension `.caption` for images.
    """
    candidates = (file.with_suffix(suffix) for suffix in (".txt", ".TXT", ".caption"))
    return next((text for text in candidates if text.is_file()), None)


def transcript_files(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the files that may contain the transcript or caption of each media file.

    These are the text file of the same name, or otherwise the transcript lists of its folder.
    """
    lists: dict[Path, list[Path]] = {}
    for folder in {file.parent for file in files}:
        lists[folder] = sorted(folder.glob(f"*{LIST_SUFFIX}"))
    text_files = ((file, text_file_of(file)) for file in files)
    return {file: lists[file.parent] if text is None else [text] for file, text in text_files}


def files_with_shared_text(files: Sequence[Path]) -> list[list[Path]]:
    """Return groups of files that share a text file because only their extensions differ."""
    groups: dict[Path, list[Path]] = {}
    for file in files:
        if (text := text_file_of(file)) is not None:
            groups.setdefault(text, []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def media_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the media files in a folder that the recipe's task reads, sorted.

    Args:
        folder: The folder.
        recipe: The recipe, whose task reads certain kinds of media, or none.

    Returns:
        Paths relative to the folder.
    """
    kinds = set(recipe.task.media_columns.values())
    suffixes = tuple(suffix for kind in kinds for suffix in SUFFIXES[kind])
    return [
        file for file in _visible_files(folder) if suffixes and file.name.lower().endswith(suffixes)
    ]


def other_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the files in class folders that are not media files of the task."""
    media = set(media_files(folder, recipe))
    classes = {file.parent for file in media if file.parent != Path()}
    return [file for file in _visible_files(folder) if file.parent in classes and file not in media]


def texts_without_media(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the text files of a folder without an image or recording of the same name."""
    files = media_files(folder, recipe)
    texts = {file.with_suffix(suffix) for file in files for suffix in (".txt", ".TXT")}
    folders = {file.parent for file in files}
    return [
        file
        for file in _visible_files(folder)
        if file.suffix.lower() == ".txt"
        and file not in texts
        and not NOT_A_CAPTION.match(file.stem)
        and not (file.name.endswith(LIST_SUFFIX) and file.parent in folders)
    ]


def _visible_files(folder: Path) -> list[Path]:
    return [
        file
        for file in files_inside(folder)
        if not any(part.startswith(".") or part in IGNORED_FOLDERS for part in file.parts)
        and file.name.lower() not in ("thumbs.db", "desktop.ini")
    ]


def split_parts(files: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Return the parts of the path of each file that may name its split.

    These are the parts above the class folder, or all parts if every file is in a split folder.
    """
    parents = {file: file.parent.parts for file in files}
    if all(parts and SPLIT_NAME.fullmatch(parts[-1]) for parts in parents.values()):
        return parents
    return {file: parts[:-1] for file, parts in parents.items()}


def classes_of(files: Sequence[Path], splits: Collection[str] = SPLITS) -> dict[Path, str]:
    """Return the class name of each folder that contains files, omitting folders without a class.

    Args:
        files: All files of a media folder, relative to it.
        splits: Names of split folders, which are not part of a class name.
    """
    split_names = split_parts(files)
    paths: dict[Path, tuple[str, ...]] = {}
    for file in files:
        parts = file.parent.parts
        if parts and len(split_names[file]) < len(parts):
            names = [part.strip() for part in parts[:-1] if not names_split(part, splits)]
            paths[file.parent] = (*names, parts[-1].strip())
    class_paths = set(paths.values())
    are_unique = len({names[-1] for names in class_paths}) == len(class_paths)
    return {folder: names[-1] if are_unique else "/".join(names) for folder, names in paths.items()}


def root_of(recipe: Recipe, files: Sequence[Path]) -> Path:
    """Return the media folder that contains the files."""
    data = recipe.data
    locations = [data.path, data.train, data.validation, data.test]
    for folder in (Path(name) for name in locations if isinstance(name, str)):
        if folder.is_dir() and files[0].is_relative_to(folder):
            return folder
    return Path(os.path.commonpath([file.parent for file in files]))


def class_names(recipe: Recipe, files: Sequence[Path]) -> dict[str, list[str]]:
    """Return the names of all classes in the folder of the files, sorted."""
    labels = folder_labels(recipe, files)
    return {LABEL_COLUMN: sorted(set(labels.values()))} if labels else {}


def folder_labels(recipe: Recipe, files: Sequence[Path]) -> dict[Path, str]:
    """Return the label of each class folder, relative to the media folder."""
    locations = (recipe.data.train, recipe.data.validation, recipe.data.test)
    names = (
        name.partition("[")[0] for name in locations if isinstance(name, str)
    )  # without the slice
    splits = {*SPLITS, *(name for name in names if not is_file(name))}
    return classes_of(media_files(root_of(recipe, files), recipe), splits)


def read_media_files(recipe: Recipe, files: Sequence[Path]) -> Iterator[RawRow]:
    """Yield one row per file, with its label or text.

    The label is the class of the folder, if it has one. The text comes from the text file next to
    the file, or from its line in a transcript list of the folder.
    """
    root = root_of(recipe, files)
    text_column = recipe.task.transcript_column
    text_files = {} if text_column is None else transcript_files(files)
    transcripts = _Transcripts(recipe.data.format.encoding)
    classes = folder_labels(recipe, files)
    (column, *_) = recipe.task.media_columns
    for file in files:
        relative = file.relative_to(root)
        row: dict[str, Any] = {column: {"bytes": None, "path": str(file)}}
        if (label := classes.get(relative.parent)) is not None:
            row[LABEL_COLUMN] = label
        error = ""
        if text_column is not None and text_column not in row:  # it may be the label
            row[text_column], error = transcripts.of(file, text_files[file])
        yield RawRow(row, relative.as_posix(), error)


class _Transcripts:
    """Reads transcripts and captions from the text files next to media files.

    Args:
        encoding: Encoding of the text files.
    """

    def __init__(self, encoding: str) -> None:
        is_utf8 = encoding.lower() in ("utf-8", "utf8")
        self.encoding = "utf-8-sig" if is_utf8 else encoding
        self.lists: dict[Path, dict[str, str]] = {}

    def of(self, file: Path, texts: Sequence[Path]) -> tuple[str | None, str]:
        """Return the text of a media file, and an error message.

        The text is None if there is no text file, as for recordings to be transcribed.

        Args:
            file: The media file.
            texts: The text files that may contain its text.
        """
        text = None
        for text_file in texts:
            try:
                if text_file.name.endswith(LIST_SUFFIX):
                    text = self._texts_in_list(text_file).get(file.stem, text)
                else:
                    text = " ".join(text_file.read_text(encoding=self.encoding).split())
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                return None, f"`{text_file.name}` cannot be read: {reason}"
            except (UnicodeError, LookupError):
                name = self.encoding.removesuffix("-sig")
                return None, f"`{text_file.name}` is not in the encoding `{name}`"
        return text, ""

    def _texts_in_list(self, file: Path) -> dict[str, str]:
        """Return the texts in a transcript list, by the name of the recording."""
        if file not in self.lists:
            lines = file.read_text(encoding=self.encoding).splitlines()
            pairs = (line.strip().partition(" ") for line in lines)
            self.lists[file] = {name: " ".join(text.split()) for name, _, text in pairs if name}
        return self.lists[file]
