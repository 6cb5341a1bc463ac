"""The recipe keys that decide an adapter's answers: saved with the adapter, and checked on use.

Anybody can edit the `recipe.yaml` that is saved with an adapter. Some edits are harmless, such as
the new path of data that were moved, or another batch size. Others change the adapter's answers: if
two labels are swapped, so are the predictions. Therefore `computation.json`, whose hash is in the
manifest, contains the values that the adapter was trained with:

    {"format": 1,
     "recipe": {"task.labels": ["bad", "good"], "task.max_length": 512, …},
     "base": {"config": {…}, "tokenizer": "…", "chat_template": null}}

(`lora_cli.models.base_facts` writes and checks `base`.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli.errors import BACKUP, IntegrityError, Problem, warn
from lora_cli.format_version import require_format
from lora_cli.recipe.spec import Recipe

COMPUTATION_FILE = "computation.json"
# Files may be moved (the text of the chat template is saved, so its path does not matter), and how
# an answer is measured does not change it.
EXCLUDED_KEYS = {
    "task.answer_pattern", "task.chat_template", "task.prior.path", "data.path", "data.name",
    "data.config", "data.revision", "data.train", "data.validation", "data.test",
}  # fmt: skip
WARN_ABOUT = ("data.", "evaluate.generation.", "model.dtype", "model.attention",
                   "train.precision")  # fmt: skip
LABEL_KEYS = ("task.labels", "task.problem", "task.type")


def computing_values(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that decide a trained adapter's answers, with their values."""
    sections: dict[str, Any] = {
        "task": True, "data": True, "model": {"dtype", "attention"}, "train": {"precision"},
        "evaluate": {"generation"},
    }  # fmt: skip
    values = flat(recipe.model_dump(mode="json", by_alias=True, include=sections))
    keys = (key for key in values if key not in EXCLUDED_KEYS and not key.startswith("data.mix."))
    return {key: values[key] for key in keys}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: `{"train": {"seed": 0}}` becomes `{"train.seed": 0}`."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def read_computation(folder: Path) -> dict[str, Any] | None:
    """Return the content of `computation.json`, or None if the folder has no such file.

    Raises:
        IntegrityError: If the file is damaged.
        LoraError: If a later version of this tool wrote it.
    """
    file = folder / COMPUTATION_FILE
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        require_format(value, str(file))
        parts = value["recipe"], value["base"]["config"]
        if not (isinstance(parts[0], dict) and isinstance(parts[1], dict)):
            raise ValueError("a part is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "what the adapter was trained with cannot be read"
        raise IntegrityError(what, str(file), BACKUP) from error
    return dict(value)


def check_recipe_file(folder: Path, written: Recipe, file: Path) -> None:
    """Check that the recipe saved with an adapter still has the values that it was trained with.

    Args:
        folder: The adapter's folder.
        written: The recipe in the file, without overrides.
        file: The path of the recipe, for errors.

    Raises:
        IntegrityError: With every key of the task that was changed.
    """
    _compare(folder, written, str(file), lambda key: key.startswith("task."))


def check_labels(folder: Path, recipe: Recipe) -> None:
    """Check that a recipe, wherever it comes from, has the labels that an adapter was trained with.

    Labels that a `--set` flag changes are what the user wants, so they only cause a warning.

    Raises:
        IntegrityError: If the labels or their order differ.
    """
    _compare(folder, recipe, None, lambda key: key in LABEL_KEYS, LABEL_KEYS)


def _compare(
    folder: Path,
    recipe: Recipe,
    place: str | None,
    is_error: Callable[[str], bool],
    only: tuple[str, ...] = (),
) -> None:
    trained = read_computation(folder)
    if trained is None:
        return
    then, now = trained["recipe"], computing_values(recipe)
    problems = []
    for key in sorted(then.keys() & now.keys()):  # another version may have other keys
        if then[key] == now[key] or (only and key not in only) or now[key] is None:
            continue
        what = f"the adapter was trained with {_quoted(key, then[key])}, and the recipe says "
        what += f"`{_json(now[key])}`"
        if recipe.is_overridden(key):
            warn(what)
        elif is_error(key):
            hint = f"restore {_quoted(key, then[key])}; for one command, use `--set {key}=…`"
            problems.append(Problem(what, place or recipe.at(key), hint))
        elif key.startswith(WARN_ABOUT):
            warn(what)
    if problems:
        raise IntegrityError(problems)


def _quoted(key: str, value: Any) -> str:
    return f"`{key}: {_json(value)}`"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"
