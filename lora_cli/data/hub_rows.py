"""Data sets on the Hub: loaded through `datasets`, their pictures and sound undecoded."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.data.dataset_cache import damaged_files, forget_files
from lora_cli.data.media import undecoded
from lora_cli.data.rows import Rows
from lora_cli.errors import LoraError, warn
from lora_cli.recipe import Recipe


def load_hub(recipe: Recipe, split: str, streaming: bool = False, **options: Any) -> Any:
    """Return a split of the recipe's data set on the Hub, as `datasets` loads it.

    Raises:
        LoraError: If it cannot be loaded.
    """
    import datasets

    data = recipe.data
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            data.name,
            data.config,
            split=split,
            revision=data.revision,
            streaming=streaming,
            **options,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        from lora_cli.models.load_errors import place_error

        if (place := place_error(error)) is not None:
            raise place from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoraError(
            f"cannot load `{data.name}`: {reason}",
            recipe.at("data.name"),
            "a local file is given as `data.path`",
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def hub_rows(recipe: Recipe, name: str) -> Rows:
    """Return the rows of a split of the recipe's data set on the Hub."""
    dataset = load_hub(recipe, name)
    if damaged := damaged_files(dataset):
        warn(f"the cached data set of the Hub is damaged and is prepared again: {damaged[0]}")
        forget_files(dataset)
        dataset = load_hub(recipe, name, download_mode="reuse_cache_if_exists")
        damaged_files(dataset)
    names = label_names(dataset.features)
    source = "/".join(filter(None, (recipe.data.name, recipe.data.config, name)))
    sha256, media = dataset._fingerprint, tuple(recipe.task.media_columns)
    positions = np.arange(len(dataset))
    return Rows(undecoded(dataset), source, sha256, positions, names, media=media)


def label_names(features: Any) -> dict[str, list[str]]:
    """Return the names of the labels of each column that has them."""
    import datasets

    # of a list of labels, those of its items
    kinds = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {
        column: list(kind.names)
        for column, kind in kinds.items()
        if isinstance(kind, datasets.ClassLabel)
    }
