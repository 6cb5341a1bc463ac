"""What the README of a data set says of its files, as the Hub reads it: configurations and splits.

A folder is read by the names of its files. Where the README says otherwise, rows that the author
holds out would be trained, or the rows of several languages be one set.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lora_cli.data.split_names import SPLITS, names_split
from lora_cli.errors import LoraError

README = "README.md"
HEAD = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)  # what the Hub reads, in YAML
MOST_SHOWN = 5


def require_as_the_readme(folder: Path, files_of: Callable[[str], list[Path]]) -> None:
    """Check that the names of files say the same as the README.

    Args:
        folder: The folder.
        files_of: Returns the files of a split, by their names.

    Raises:
        LoraError: If they do not; it names the files of the train split.
    """
    configs = _configs(folder)
    if len(configs) > 1:
        names = ", ".join(f"`{name}`" for name in list(configs)[:MOST_SHOWN])
        what = f"{README} says that this folder holds {len(configs)} data sets: {names}"
        first = next(iter(configs.values())).get("train", [])
        raise LoraError(what, str(folder), _hint(folder, first))
    for splits in configs.values():
        for split in SPLITS:
            wanted = splits.get(split, [])
            if wanted and sorted(wanted) != sorted(files_of(split)):
                listed = ", ".join(str(file.relative_to(folder)) for file in wanted[:MOST_SHOWN])
                what = f"{README} says that the {split} rows are in {listed}; names of files do not"
                raise LoraError(what, str(folder), _hint(folder, splits.get("train", [])))


def _hint(folder: Path, train: list[Path]) -> str:
    one = f"`lora init {train[0]}`" if train else "a file"
    return (
        f"name a file of its train rows, for example {one}, and the others as `data.validation` "
        f"and `data.test` in the recipe; or write `data: {{name: ./{folder.name}, config: NAME, "
        "train: train}`, which reads the README"
    )


def _configs(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of each split of each configuration; none if the README names no files."""
    try:
        text = (folder / README).read_text(encoding="utf-8-sig")
        head = yaml.safe_load(written[1]) if (written := HEAD.match(text)) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        return {}
    found = {}
    for config in configs:
        place = str(config.get("data_dir") or ".")
        splits = _splits(folder, place, config.get("data_files"))
        if any(splits.values()):
            found[str(config.get("config_name", "default"))] = splits
    return found


def _splits(folder: Path, place: str, files: Any) -> dict[str, list[Path]]:
    """Return the files that a configuration names, by our names of splits.

    Args:
        folder: The folder of the README.
        place: The folder within it that the names start from.
        files: The configuration's `data_files`.
    """
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    if not isinstance(files, list):
        files = [files] if isinstance(files, str) else []
    found: dict[str, list[Path]] = {}
    for entry in files:
        one = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        name = str(one.get("split", "train"))
        split = next((ours for ours in SPLITS if names_split(name, [ours])), name)
        patterns = one.get("path")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            if isinstance(pattern, str):
                found.setdefault(split, []).extend(_matches(folder, f"{place}/{pattern}"))
    return found


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder, and of none outside of it, that a pattern names."""
    path = os.path.normpath(pattern)
    if os.path.isabs(path) or path.startswith(os.pardir):
        return []
    names = sorted(glob.glob(path, root_dir=folder, recursive=True))
    return [file for name in names if (file := folder / name).is_file()]
