"""Pictures to be classified, for `lora init`: a folder of them, or a table of their paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_cli.data.detect_format import DataFile
from lora_cli.data.find_files import files_of
from lora_cli.data.media import FILE_NAME
from lora_cli.data.media_folder import classes_of, is_media_file, media_files, read_media_files
from lora_cli.data.readers import kind_by_name
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import Recipe
from lora_cli.recipe_draft.choose_splits import Keys
from lora_cli.recipe_draft.column_kinds import Column
from lora_cli.recipe_draft.language_model_rows import Chosen

IMAGE, LABEL = "image", "label"
LABEL_NAME = re.compile(r"(?i)labels?|class(es)?|categor(y|ies)|target|species|breed|type")
FEWEST_FOR_A_TENTH = 200
SAMPLE = 100  # rows whose paths are looked at


def read_picture_folder(folder: Path) -> DataFile | None:
    """Return the train pictures of a folder, each with its label; None if it holds none.

    Raises:
        LoraError: If no folder in it names a class.
    """
    if not folder.is_dir():
        return None
    recipe = _recipe(folder)
    files = media_files(folder, recipe)
    tables = [f for f in folder.rglob("*") if kind_by_name(f.name) not in (None, "text")]
    if not files or tables:
        return None
    classes = classes_of(files)
    if not classes:
        what = f"the pictures of {folder} have no labels: no folder in it names a class"
        hint = "move those of each class into a folder of its name, or list them in metadata.csv: "
        raise LoraError(what, str(folder), f"{hint}file_name,label")
    train = files_of(recipe, "train", "train")
    rows = [row.columns for row in read_media_files(recipe, train) if row.columns is not None]
    about = f"{counted(len(train), 'picture')} in {counted(len(set(classes.values())), 'folder')}"
    about += " that name their classes"
    return DataFile(folder, {}, {}, rows, [], [IMAGE, LABEL], True, about)


def _recipe(folder: Path) -> Recipe:
    task = {"type": "image_classification"}
    values = {"model": {"name": "none"}, "task": task, "data": {"path": str(folder)}}
    return Recipe.model_validate(values)


def choose_pictures(file: DataFile, columns: Sequence[Column], label: str | None) -> Chosen:
    """Return the task of rows with a picture and a label.

    Args:
        file: The rows.
        columns: What its columns hold.
        label: The column of the label, if the user names it.

    Raises:
        LoraError: If no column holds pictures, or none is a label.
    """
    place, names = file.path.name, [column.name for column in columns]
    image = next((name for name in names if _holds_pictures(file, name)), None)
    listed = f"the columns are {', '.join(names)}"
    if image is None:
        what = "no column holds pictures, which the model reads"
        raise LoraError(what, place, f"{listed}; a picture is named by its path")
    if label is not None and label not in names:
        raise LoraError(f"there is no column `{label}`", "--label", listed)
    found = [name for name in names if name != image and LABEL_NAME.fullmatch(name)]
    chosen = label or next(iter(found), None)
    if chosen is None:
        raise LoraError("no column is a label", place, f"name it: `--label COLUMN`; {listed}")
    counts = Counter(str(row.get(chosen)).strip() for row in file.rows)
    if len(counts) < 2:
        hint = "nothing can be learned from it; name another with `--label COLUMN`"
        raise LoraError(f"`{chosen}` has one value only", place, hint)
    keys = {"type": "image_classification", "label_column": chosen, "problem": "single_label"}
    why = {
        "label_column": "chosen by you" if label else f"by its name and its {len(counts):,} values"
    }
    if file.path.is_dir() and image == IMAGE:
        why["label_column"] = "the names of the folders"
    if image != FILE_NAME:
        keys = {"type": keys.pop("type"), "image_column": image, **keys}
        why["image_column"] = "the picture itself" if file.path.is_dir() else "paths of pictures"
    left_out = {name: "not needed" for name in names if name not in (image, chosen)}
    return Chosen(keys, why, [image], counts, left_out)


def _holds_pictures(file: DataFile, name: str) -> bool:
    """Return whether the values of a column are pictures, or nearly all paths of such."""
    values = [row.get(name) for row in file.rows[:SAMPLE]]
    are = [
        (isinstance(value, str) and is_media_file(Path(value)))
        or isinstance(value, bytes)
        or (isinstance(value, dict) and value.keys() >= {"bytes", "path"})
        for value in values
    ]
    return sum(are) > 0.9 * len(are)


def picture_splits(file: DataFile) -> Keys:
    """Return which pictures of a folder are held out: those in folders of a split, or drawn."""
    recipe = _recipe(file.path)
    keys: Keys = {}
    for split in ("validation", "test"):
        try:
            count = len(files_of(recipe, split, split))
            keys[split] = (split, f"{counted(count, 'picture')} in the folder of this name")
        except LoraError:
            fraction = 0.1 if len(file.rows) >= FEWEST_FOR_A_TENTH else 0.2
            drawn = {"fraction": fraction, "stratify": True}
            why = "drawn from train, as many of each label; no picture is on both sides"
            keys[split] = ({"from": "train", **drawn}, why)
    return keys
