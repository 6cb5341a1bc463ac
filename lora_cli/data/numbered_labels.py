"""What the numbers of labels mean in sets of the Hub, and in parquet files that `datasets` wrote.

A column of `ClassLabel` holds numbers. The names stand in its type, or in the metadata of the file,
whether the labels stand in a column or inside a column of objects.
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
SHOWN = 60
HINT = "write both with one list of names, or the labels as names (`ClassLabel.int2str`)"


def label_names(features: Any) -> dict[str, list[str]]:
    """Return the names of the labels of each column that has them."""
    import datasets

    # of a list of labels, those of its items
    kinds = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    names = {
        column: list(kind.names)
        for column, kind in kinds.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    inside = {column: nested_names(feature) for column, feature in features.items()}
    return names | {column: found for column, found in inside.items() if found}


def parquet_label_names(recipe: Recipe, files: Sequence[Path]) -> Names:
    """Return the names of the labels by column, as far as all files have them.

    Raises:
        LoraError: If a number is another label in one file than in another.
    """
    known = {str(file): _names_in(file, recipe) for file in files}
    require_one_numbering(known)
    columns = [c for c in next(iter(known.values())) if all(c in names for names in known.values())]
    return {column: max((n[column] for n in known.values()), key=len) for column in columns}


def _names_in(file: Path, recipe: Recipe) -> Names:
    """Return the names of the labels in a file by column; none where its metadata are no such."""
    import datasets

    schema = parquet_schema(file)
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = label_names(datasets.Features.from_dict(about["info"]["features"]))
    except Exception:  # metadata of whatever version: the file is read without
        return {}
    columns = dict(zip(schema.names, parquet_names(file, recipe.data.format), strict=True))
    known = {columns[c]: own for c, own in names.items() if c in columns}
    return {recipe.data.columns.get(c) or c: own for c, own in known.items()}


def require_one_numbering(known: Mapping[str, Names]) -> None:
    """Check that a number stands for one label, wherever it is found.

    Args:
        known: The names of the labels of each column, by where they are from.

    Raises:
        LoraError: With the first number that does not.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    for place, names in known.items():
        for column, own in names.items():
            where, other = first.setdefault(column, (place, own))
            for i, pair in enumerate(zip(other, own, strict=False)):
                if pair[0] != pair[1]:
                    shown = [f"`{printable(name, SHOWN)}`" for name in pair]
                    what = f"label {i} of column `{column}` is {shown[1]} here, and {shown[0]} in "
                    raise LoraError(what + where, place, HINT)


def holds_numbers(value: Any) -> bool:
    """Return whether the labels in a cell are numbers."""
    if isinstance(value, dict):
        return any(holds_numbers(value[key]) for key in CATEGORY_KEYS if key in value)
    if isinstance(value, list):
        return any(map(holds_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)
