"""What of a recipe decides an adapter's answers: kept beside the adapter, and checked on use.

`recipe.yaml` beside an adapter is a text that anybody may edit, and some edits are right: data that
were moved, another batch size. Others change what the adapter says: two labels exchanged there
exchange the predictions. So `computation.json`, which the manifest vouches for, holds the values
that the adapter was trained with:

    {"format": 1,
     "recipe": {"task.labels": ["bad", "good"], "task.max_length": 512, …},
     "base": {"config": {…}, "tokenizer": "…", "chat_template": null}}

(`base` is written and checked by `lora_cli.models.base_facts`.)
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
# where rows lie may change; the template's text is kept, not its place; and what is measured of an
# answer does not change it
PLACES = {
    "task.answer_pattern", "task.chat_template", "task.prior.path", "data.path", "data.name",
    "data.config", "data.revision", "data.train", "data.validation", "data.test",
}  # fmt: skip
WORTH_A_WARNING = ("data.", "evaluate.generation.", "model.dtype", "model.attention",
                   "train.precision")  # fmt: skip
LABELS = ("task.labels", "task.problem", "task.type")


def computing_values(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that decide what a trained adapter answers, with their values."""
    kept: dict[str, Any] = {
        "task": True, "data": True, "model": {"dtype", "attention"}, "train": {"precision"},
        "evaluate": {"generation"},
    }  # fmt: skip
    values = flat(recipe.model_dump(mode="json", by_alias=True, include=kept))
    kept_keys = (key for key in values if key not in PLACES and not key.startswith("data.mix."))
    return {key: values[key] for key in kept_keys}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of dictionaries as one: `{"train": {"seed": 0}}` as `{"train.seed": 0}`."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def read_computation(folder: Path) -> dict[str, Any] | None:
    """Return what `computation.json` holds; None if the folder has none.

    Raises:
        IntegrityError: If it is damaged.
        LoraError: If a later version wrote it.
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
    """Check that the recipe beside an adapter still says what the adapter was trained with.

    Args:
        folder: The adapter's.
        written: The recipe as the file says it, without overrides.
        file: Where it stands.

    Raises:
        IntegrityError: With every changed key of the task.
    """
    _compare(folder, written, str(file), lambda key: key.startswith("task."))


def check_labels(folder: Path, recipe: Recipe) -> None:
    """Check that a recipe, wherever it comes from, has the labels that an adapter was trained with.

    What the command line itself says is what the user wants: it is followed, with a warning.

    Raises:
        IntegrityError: If they are others, or in another order.
    """
    _compare(folder, recipe, None, lambda key: key in LABELS, LABELS)


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
        what = f"the adapter was trained with {_shown(key, then[key])}, and the recipe says "
        what += f"`{_json(now[key])}`"
        if recipe.is_overridden(key):
            warn(what)
        elif is_error(key):
            hint = f"restore {_shown(key, then[key])}; for one command, use `--set {key}=…`"
            problems.append(Problem(what, place or recipe.at(key), hint))
        elif key.startswith(WORTH_A_WARNING):
            warn(what)
    if problems:
        raise IntegrityError(problems)


def _shown(key: str, value: Any) -> str:
    return f"`{key}: {_json(value)}`"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"
