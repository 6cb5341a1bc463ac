"""Find the names of numbered labels in Hub data sets, and in parquet files from `datasets`.

A `ClassLabel` column contains numbers. Their names are part of its type, or in the metadata of the
file, both for label columns and for labels inside a column of objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.boxes import CATEGORY_KEYS, nested_names
from lora_cli.data.parquet_rows import parquet_names, parquet_schema
from lora_cli.errors import LoraError, printable
from lora_cli.recipe import Recipe

Names = dict[str, list[str]]
MAX_SHOWN = 60
HINT = "write both with one list of names, or the labels as names (`ClassLabel.int2str`)"


def label_names(features: Any) -> dict[str, list[str]]:
    """Return the label names of each column that has them."""
    import datasets

    # for a list of labels, the type of its items
    kinds = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    names = {
        column: list(kind.names)
        for column, kind in kinds.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    nested = {column: nested_names(feature) for column, feature in features.items()}
    return names | {column: names_inside for column, names_inside in nested.items() if names_inside}


def parquet_label_names(recipe: Recipe, files: Sequence[Path]) -> Names:
    """Return the label names of each column that has them in all files.

    Raises:
        LoraError: If a number stands for different labels in two files.
    """
    names_by_file = {str(file): _names_in(file, recipe) for file in files}
    require_one_numbering(names_by_file)
    columns = [
        c
        for c in next(iter(names_by_file.values()))
        if all(c in names for names in names_by_file.values())
    ]
    return {
        column: max((names[column] for names in names_by_file.values()), key=len)
        for column in columns
    }


def _names_in(file: Path, recipe: Recipe) -> Names:
    """Return the label names of a file by column; empty if its metadata has none."""
    import datasets

    schema = parquet_schema(file)
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        names = label_names(datasets.Features.from_dict(metadata["info"]["features"]))
    except Exception:  # metadata of an unknown version: the file is read without label names
        return {}
    columns = dict(zip(schema.names, parquet_names(file, recipe.data.format), strict=True))
    by_column = {columns[c]: label_list for c, label_list in names.items() if c in columns}
    return {recipe.data.columns.get(c) or c: label_list for c, label_list in by_column.items()}


def require_one_numbering(names_by_source: Mapping[str, Names]) -> None:
    """Check that a number stands for the same label in all sources.

    Args:
        names_by_source: The label names of each column, by source.

    Raises:
        LoraError: With the first number that stands for different labels.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    for place, names in names_by_source.items():
        for column, labels in names.items():
            other_place, other_labels = first.setdefault(column, (place, labels))
            for i, pair in enumerate(zip(other_labels, labels, strict=False)):
                if pair[0] != pair[1]:
                    shown = [f"`{printable(name, MAX_SHOWN)}`" for name in pair]
                    what = f"label {i} of column `{column}` is {shown[1]} here, and {shown[0]} in "
                    raise LoraError(what + other_place, place, HINT)


def holds_numbers(value: Any) -> bool:
    """Return whether the labels in a cell are numbers."""
    if isinstance(value, dict):
        return any(holds_numbers(value[key]) for key in CATEGORY_KEYS if key in value)
    if isinstance(value, list):
        return any(map(holds_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)
