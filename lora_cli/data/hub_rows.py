"""Load data sets from the Hub, or from folders with the same layout, with media undecoded.

The cache of `datasets` is keyed by the name of a data set and the layout that its README declares,
not by the contents of its files. On the Hub, the commit distinguishes contents. Nothing does so for
a folder: another folder of the same name, or new files in the same folder, would get the cached
rows of the first. So each folder has its own cache, named by a hash of its files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.data.dataset_cache import damaged_files, forget_files
from lora_cli.data.folder_files import reject_saved
from lora_cli.data.media import without_decoding
from lora_cli.data.numbered_labels import label_names
from lora_cli.data.renamed_columns import renamed_columns
from lora_cli.data.rows import Rows
from lora_cli.errors import LoraError, warn
from lora_cli.files import sha256_of
from lora_cli.recipe import Recipe

COMMIT = re.compile(r"[0-9a-f]{40}")
HASH_OF_FOLDER = re.compile(r"[0-9a-f]{16}")  # names the prepared files of a folder


def load_hub(recipe: Recipe, split: str, streaming: bool = False, **options: Any) -> Any:
    """Load a split of the recipe's data set with `datasets`.

    Raises:
        LoraError: If it cannot be loaded, or is not the data set that the recipe names.
    """
    import datasets

    data = recipe.data
    is_folder = _is_folder(recipe)
    if is_folder:
        reject_saved(Path(str(data.name)))
    had_progress_bars = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if is_folder and not streaming:
            options["cache_dir"] = str(_cache_of(_folder_sha256(recipe)))
        dataset = datasets.load_dataset(
            data.name,
            data.config,
            split=split,
            revision=data.revision,
            streaming=streaming,
            **options,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        from lora_cli.models.load_errors import place_error

        if (access_error := place_error(error)) is not None:
            raise access_error from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoraError(
            f"cannot load `{data.name}`: {reason}",
            recipe.at("data.name"),
            "a local file is given as `data.path`",
        ) from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()
    if not is_folder and not streaming:
        _require_revision(recipe, dataset)
    return dataset


def _is_folder(recipe: Recipe) -> bool:
    """Return whether `data.name` is a local folder, whose path is absolute in a loaded recipe.

    Raises:
        LoraError: If `data.revision` is set for a folder, or a folder hides a Hub data set.
    """
    data, name = recipe.data, recipe.data.name or ""
    if not os.path.isdir(name):
        return False
    if not os.path.isabs(name):
        raise LoraError(
            f"`{name}` is also a folder in the working directory, which would be read instead of "
            "the data set on the Hub",
            recipe.at("data.name"),
            f"run the command in another directory, or name the folder: `{os.path.abspath(name)}`",
        )
    if data.revision != "main":
        what = f"`{data.name}` is a folder, which has no revision `{data.revision}`"
        raise LoraError(what, recipe.at("data.revision"), "leave it out")
    return True


def _cache_of(sha256: str) -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "lora" / f"folder-{sha256[:32]}"


def _folder_sha256(recipe: Recipe) -> str:
    """Return a hash of the files of a folder and their assignment to splits."""
    import datasets

    builder = datasets.load_dataset_builder(recipe.data.name, recipe.data.config)
    files = [
        (str(split), str(file), _sha256_of(str(file)))
        for split, split_files in (builder.config.data_files or {}).items()
        for file in split_files
    ]
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()


def _sha256_of(file: str) -> str:
    """Return the SHA-256 of a file; empty for a URL."""
    if not os.path.isfile(file):
        return ""
    status = os.stat(file)
    times = status.st_mtime_ns, status.st_ctime_ns
    return _sha256_of_state(file, status.st_ino, status.st_size, times)


@functools.lru_cache(maxsize=100_000)
def _sha256_of_state(file: str, _inode: int, _size: int, _times: tuple[int, int]) -> str:
    """Return the SHA-256 of a file, cached because every split needs it."""
    return sha256_of(Path(file))


def _require_revision(recipe: Recipe, dataset: Any) -> None:
    """Reject cached rows of another data set, which `datasets` may load without a connection.

    It then loads whatever it last prepared under the name: any revision, or a folder.

    Raises:
        LoraError: If the rows are not from the revision that the recipe names.
    """
    data, files = recipe.data, dataset.cache_files
    cached = Path(files[0]["filename"]).parent.name if files else ""
    if HASH_OF_FOLDER.fullmatch(cached):
        what = f"cannot reach `{data.name}` on the Hub; the cache has a folder of this name only"
    elif COMMIT.fullmatch(data.revision) and COMMIT.fullmatch(cached) and cached != data.revision:
        what = f"cannot reach `{data.name}` on the Hub; the cache has revision {cached} only"
    else:
        return
    hint = "connect once, so that it is downloaded; or name a folder that holds it, by its path"
    raise LoraError(what, recipe.at("data.name"), hint)


def hub_rows(recipe: Recipe, name: str) -> Rows:
    """Return the rows of a split from the Hub, or from a folder with the same layout."""
    dataset = load_hub(recipe, name)
    if damaged := damaged_files(dataset):
        warn(f"the cached data set of the Hub is damaged and is prepared again: {damaged[0]}")
        forget_files(dataset)
        dataset = load_hub(recipe, name, download_mode="reuse_cache_if_exists")
        damaged_files(dataset)
    dataset = _renamed(recipe, dataset)
    names = label_names(dataset.features)
    source = "/".join(filter(None, (recipe.data.name, recipe.data.config, name)))
    sha256, media = dataset._fingerprint, tuple(recipe.task.media_columns)
    if _is_folder(recipe):  # the fingerprint depends only on names
        sha256 = hashlib.sha256(f"{_folder_sha256(recipe)} {sha256}".encode()).hexdigest()
    positions = np.arange(len(dataset))
    return Rows(without_decoding(dataset), source, sha256, positions, names, media=media)


def _renamed(recipe: Recipe, dataset: Any) -> Any:
    """Rename the columns of a data set according to `data.columns`."""
    place = recipe.at("data.columns")
    names = renamed_columns(dataset.column_names, recipe.data.columns, place)
    if not names:
        return dataset
    temporary = {old: f"\0{i}" for i, old in enumerate(names)}  # so that two names can be swapped
    dataset = dataset.rename_columns(temporary)
    return dataset.rename_columns({temporary[old]: new for old, new in names.items()})
