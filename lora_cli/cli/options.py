"""Options and arguments that several commands share, and how a command finds its recipe.

The options of a single command are in its own file (`train_command.py`, …). No command imports
torch before it has read its recipe, so that a mistake there is reported at once.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.cli.shell_completion import offer_overrides
from lora_cli.environment import clean_environment
from lora_cli.errors import LoraError, name_neighbours
from lora_cli.not_an_adapter import require_adapter
from lora_cli.paths import expanded, path_problem

if TYPE_CHECKING:
    from lora_cli.recipe import Recipe


def expand(parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the path, or paths, of an argument, with `~` replaced by the home directory."""
    if isinstance(value, list | tuple):
        return [expand(parameter, one) for one in value]
    if value is None:
        return None
    option = next((name for name in parameter.opts if name.startswith("--")), None)
    if (problem := path_problem(str(value), option or str(parameter.metavar))) is not None:
        raise LoraError([problem])
    return type(value)(expanded(str(value)))


def find_adapter(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the folders of the adapters that an argument names; download those on the Hub."""
    if isinstance(value, list | tuple):
        return [find_adapter(context, parameter, one) for one in value]
    if value is None or context.resilient_parsing:
        return value
    from lora_cli.adapters.find_adapter import find_adapter_folder

    option = next((name for name in parameter.opts if name.startswith("--")), None)
    at = option or str(parameter.metavar)
    written = re.sub("^hf:/+", "hf://", str(value))  # `Path` has removed one of two slashes
    if not written.startswith("hf://"):
        written = str(expand(parameter, value))
    return find_adapter_folder(written, at)


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe, a YAML file.",
        callback=expand,
    ),
]
AdapterDir = Annotated[
    Path,
    typer.Option(
        "--adapter",
        help="Output folder of `lora train`, a PEFT folder, a LoRA file of a diffusion model, or a "
        "Hub id: USER/NAME[@REVISION].",
        callback=find_adapter,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe; repeatable.",
        autocompletion=offer_overrides,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe for an adapter whose folder has none.", callback=expand),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Hub id or folder of the base model. Default: the one that the adapter names.",
        callback=expand,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(path: Path, overrides: list[str] | None, output: Path | None = None) -> Recipe:
    """Return the recipe in a file, with the values of `--set` and `-o`."""
    from lora_cli.recipe import load_recipe

    sets = list(overrides or [])
    if output is not None:
        sets.append(f"output_dir={json.dumps(str(output))}")
    return load_recipe(path, sets)


def quiet_libraries() -> None:
    """Remove environment variables that other libraries read, and silence their output."""
    clean_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import warnings

    _import_torch_and_transformers()
    from transformers.utils import logging

    logging.disable_progress_bar()
    if logging.get_verbosity() != logging.ERROR:  # setting it is slow, as it visits all loggers
        logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch|datasets)\.")


def _import_torch_and_transformers() -> None:
    """Import torch and transformers with garbage collection turned off.

    During the import, the collector would search the loaded modules again and again without finding
    anything, which takes a tenth of the time.
    """
    import gc

    gc.disable()
    try:
        import lora_cli.tasks.contract  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def recipe_for(adapter: Path, recipe: Path | None, overrides: list[str] | None) -> Recipe:
    """Return the recipe in an adapter's folder, or the one that `--recipe` names."""
    if not adapter.exists():
        raise LoraError(f"there is no folder {adapter}", "--adapter", name_neighbours(adapter))
    if recipe is not None:
        return load(recipe, overrides)
    from lora_cli.adapters.find_adapter import shown_name
    from lora_cli.recipe import RECIPE_FILE, load_adapter_recipe

    if not (adapter / RECIPE_FILE).is_file():
        if adapter.is_dir():
            require_adapter(adapter)
        raise LoraError(
            f"{shown_name(adapter)} contains no {RECIPE_FILE}",
            "--adapter",
            "name a recipe with `--recipe FILE`, for its task and data",
        )
    return load_adapter_recipe(adapter, overrides or [])
