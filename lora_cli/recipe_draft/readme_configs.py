"""Compare the file names in a data folder with the configurations in its README.

Splits are recognised by file names. If the README of a Hub data set disagrees, the model would be
trained on held-out rows, or several languages would be mixed in one data set.
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
HEAD = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)  # YAML metadata read by the Hub
MAX_SHOWN = 5


def require_splits_of_readme(folder: Path, files_of: Callable[[str], list[Path]]) -> None:
    """Check that file names and README agree on the splits of a folder.

    Args:
        folder: The folder.
        files_of: Returns the files of a split according to their names.

    Raises:
        LoraError: If they disagree; the hint names a train file.
    """
    configs = _configs(folder)
    if len(configs) > 1:
        names = ", ".join(f"`{name}`" for name in list(configs)[:MAX_SHOWN])
        what = f"{README} says that this folder holds {len(configs)} data sets: {names}"
        first = next(iter(configs.values())).get("train", [])
        raise LoraError(what, str(folder), _hint(folder, first))
    for splits in configs.values():
        for split in SPLITS:
            stated = splits.get(split, [])
            if stated and sorted(stated) != sorted(files_of(split)):
                listed = ", ".join(str(file.relative_to(folder)) for file in stated[:MAX_SHOWN])
                what = f"{README} says that the {split} rows are in {listed}; names of files do not"
                raise LoraError(what, str(folder), _hint(folder, splits.get("train", [])))


def _hint(folder: Path, train: list[Path]) -> str:
    file = f"`lora init {train[0]}`" if train else "a file"
    return (
        f"name a file of its train rows, for example {file}, and the others as `data.validation` "
        f"and `data.test` in the recipe; or write `data: {{name: ./{folder.name}, config: NAME, "
        "train: train}`, which reads the README"
    )


def _configs(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of each split by configuration; empty if the README lists no files."""
    try:
        text = (folder / README).read_text(encoding="utf-8-sig")
        metadata = yaml.safe_load(match[1]) if (match := HEAD.match(text)) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return {}
    files_by_config = {}
    for config in configs:
        place = str(config.get("data_dir") or ".")
        splits = _splits(folder, place, config.get("data_files"))
        if any(splits.values()):
            files_by_config[str(config.get("config_name", "default"))] = splits
    return files_by_config


def _splits(folder: Path, place: str, files: Any) -> dict[str, list[Path]]:
    """Return the files of a configuration by split, with the split names of recipes.

    Args:
        folder: The folder of the README.
        place: The subfolder that file names are relative to.
        files: The `data_files` of the configuration.
    """
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    if not isinstance(files, list):
        files = [files] if isinstance(files, str) else []
    by_split: dict[str, list[Path]] = {}
    for entry in files:
        spec = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        name = str(spec.get("split", "train"))
        split = next((known for known in SPLITS if names_split(name, [known])), name)
        patterns = spec.get("path")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            if isinstance(pattern, str):
                by_split.setdefault(split, []).extend(_matches(folder, f"{place}/{pattern}"))
    return by_split


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern, but none outside the folder."""
    path = os.path.normpath(pattern)
    if os.path.isabs(path) or path.startswith(os.pardir):
        return []
    names = sorted(glob.glob(path, root_dir=folder, recursive=True))
    return [file for name in names if (file := folder / name).is_file()]
