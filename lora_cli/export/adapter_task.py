"""Find the task that an adapter was trained for, from its recipe or PEFT's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModel

from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.diffusion_names import DENOISERS
from lora_cli.errors import LoraError
from lora_cli.models.base_facts import read_tokenizer
from lora_cli.models.base_model import load_config, load_tokenizer
from lora_cli.recipe import (
    RECIPE_FILE,
    TASKS,
    Recipe,
    load_adapter_recipe,
    load_recipe,
)
from lora_cli.tasks import build_task, task_types
from lora_cli.tasks.contract import Task

DRAWING = next(kind for kind, spec in TASKS.items() if spec.generates_images)
PEFT_COPY = ".base_layer.weight"  # a copy of a base weight that PEFT also writes
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def adapter_task(
    adapter: Path,
    recipe_file: Path | None = None,
    base: str | None = None,
    overrides: list[str] | None = None,
) -> tuple[Task, AdapterFolder]:
    """Return the task that an adapter was trained for, and the adapter.

    The recipe is `recipe_file`, or the one in the adapter's folder, or derived from PEFT's
    configuration.
    """
    recipe = None
    if recipe_file is not None:
        recipe = load_recipe(recipe_file, overrides or [])
    elif (adapter / RECIPE_FILE).is_file():
        recipe = load_adapter_recipe(adapter, overrides or [])
    elif overrides:
        raise LoraError(
            f"{adapter} holds no {RECIPE_FILE} whose keys could be set",
            f"--set {overrides[0]}",
            "give a recipe with `--recipe`",
        )
    if recipe is not None and recipe.adapter.type == "full":
        hint = "use the folder as it is: there is nothing to merge"
        raise LoraError(f"{adapter} is already a complete model", "--adapter", hint)
    if base is not None and Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().absolute())
    saved = read_adapter(adapter)
    if recipe is None:
        recipe = _recipe_of(saved, base)
    elif base is not None:
        places = {**recipe.origin.places, "model.name": f"--base {base}"}
        recipe = recipe.with_values({"model.name": base})
        recipe = recipe.with_origin(replace(recipe.origin, places=places))
    # merging runs on the CPU, in the dtype of the checkpoint
    recipe = recipe.with_values({"model.dtype": None, "model.attention": None})
    return build_task(recipe), saved


def _recipe_of(saved: AdapterFolder, base: str | None) -> Recipe:
    """Derive a recipe from PEFT's configuration, the tensors and the base."""
    task_type = saved.config.get("task_type")
    kind = _kind_of(saved.config)
    if kind is None and DRAWING in TASKS and (saved.file or {*saved.parts} & {*DENOISERS}):
        kind = DRAWING
    name = base or saved.config.get("base_model_name_or_path")
    if kind is None or not name:
        what = f"{saved.path} does not say what it was trained for"
        if task_type:
            what = f"{saved.path} was trained for `{task_type}`, for which there is no task here"
        hint = "give a recipe with `--recipe`, for its `model` and `task`"
        if kind is not None:
            what, hint = f"{saved.path} names no base", f"name it with `--base`, or {hint}"
        raise LoraError(what, "--adapter", hint)
    model = {"name": name}
    if base is None and (revision := saved.config.get("revision")):  # of the base, not its own
        model["revision"] = revision
    recipe = Recipe.model_validate(
        {"model": model, "task": {"type": kind}, "data": {"path": "none.csv"}}
    )
    if tokens := _new_tokens(saved, recipe):
        recipe = recipe.with_values({"model.add_tokens": tokens})
    task = build_task(recipe)
    task.complete_from(saved.tensors)
    return task.completed_recipe


def _kind_of(config: dict[str, Any]) -> str | None:
    """Return the task that PEFT's configuration names, or that the base's class is made for.

    PEFT has no names for image and speech tasks. Without a task, it writes the class of the base
    model, which may be used for several tasks.
    """
    if task_type := config.get("task_type"):
        return next((k for k, spec in TASKS.items() if spec.peft_task_type == task_type), None)
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    if DRAWING in TASKS and str(mapping.get("parent_library")).startswith("diffusers."):
        return DRAWING
    name = mapping.get("base_model_class")
    kinds = {
        kind for kind, task in zip(TASKS, task_types(), strict=True) if name in _model_classes(task)
    }
    return kinds.pop() if len(kinds) == 1 else None


def _model_classes(task: type[Task]) -> set[str]:
    """Return the names of transformers' model classes for a task."""
    class_names: set[str] = set()
    for auto in (getattr(task, "auto_class", AutoModel), *getattr(task, "other_auto_classes", ())):
        if auto is not AutoModel:  # a model without a head, for any task
            for names in auto._model_mapping._model_mapping.values():
                class_names |= {names} if isinstance(names, str) else {*names}
    return class_names


def _new_tokens(saved: AdapterFolder, recipe: Recipe) -> list[str]:
    """Return the tokens that the adapter's tokenizer has in addition to those of its base."""
    if not any((saved.path / name).is_file() for name in TOKENIZER_FILES):
        return []
    tokenizer = read_tokenizer(saved.path, recipe)
    if not saved.config.get("trainable_token_indices"):
        # then only a fully saved embedding shows that it got rows for new tokens
        rows = getattr(load_config(recipe).get_text_config(), "vocab_size", 0)
        full_tensors = [t for name, t in saved.tensors.items() if not name.endswith(PEFT_COPY)]
        if not any(t.ndim > 1 and t.shape[0] == len(tokenizer) > rows for t in full_tensors):
            return []
    vocabulary, base_vocabulary = tokenizer.get_vocab(), load_tokenizer(recipe).get_vocab()
    return sorted(vocabulary.keys() - base_vocabulary.keys(), key=vocabulary.__getitem__)
