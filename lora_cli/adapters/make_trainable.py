"""Prepare a model for training, with new low-rank layers or with those of a trained adapter.

`adapter.from` names the trained adapter. Its rank, alpha, targets and other settings are taken from
its folder, as if the recipe contained them; a recipe with different values is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from lora_cli.adapters.attach import attach, lora_layers
from lora_cli.adapters.find_adapter import find_adapter_folder
from lora_cli.adapters.load_adapter import load_adapter, untied_parameters, verify_base
from lora_cli.adapters.match_names import inside, pattern_matches
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import target_names, with_current_names
from lora_cli.adapters.peft_format.peft_rules import base_modules, copied_modules, full_names
from lora_cli.adapters.peft_format.peft_token_rules import token_reading
from lora_cli.adapters.peft_format.peft_tokens import split_rows
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.peft_format.tensor_names import adapted_module
from lora_cli.adapters.targets import resolve_targets
from lora_cli.adapters.token_rows import TokenRows, add_token_rows, embedding_names, sharing
from lora_cli.errors import LoraError, Problem, name_neighbours
from lora_cli.models.base_facts import (
    require_facts,
    warn_of_own_processor,
    warn_of_own_tokenizer,
)
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.recipe import (
    LOW_RANK_TYPES,
    RECIPE_FILE,
    AdapterSpec,
    Learned,
    Recipe,
    load_adapter_recipe,
    read_computation,
)

TARGET_KEYS = ("target_modules", "target_parameters", "exclude_modules", "layers")


def make_trainable(
    model: nn.Module,
    recipe: Recipe,
    head: Iterable[str] = (),
    base: Fingerprint | None = None,
    facts: dict[str, Any] | None = None,
    learned: Learned | None = None,
    drawn: Collection[str] | None = None,
) -> Fingerprint | None:
    """Attach the adapter that the recipe describes, new or from a trained adapter.

    Args:
        model: The base model, changed in place; on the meta device it gets no weights.
        recipe: Its adapter section says what is trained.
        head: Names of the modules that the task created.
        base: The fingerprint of the base model.
        facts: Further properties of the base that affect outputs, as `base_facts` returns them.
        learned: What was learned from the data, such as labels; with `adapter.from`, its adapter
            section is set.
        drawn: Names of parameters that the base checkpoint lacks; None for all of the head.

    Returns:
        The fingerprint to save with the trained adapter.

    Raises:
        LoraError: As `attach`, or if the recipe or its labels contradict the trained adapter.
        IntegrityError: If the adapter is damaged or of another base; the model is then unchanged.
    """
    head, learned = list(head), Learned() if learned is None else learned
    if recipe.adapter.from_ is None or learned.in_checkpoint:
        completed = learned.completed(recipe)
        if learned.adapter is not None:
            targets = learned.adapter.target_modules
            head = _without(head, targets if isinstance(targets, list) else [])
        ids = _token_ids(completed, learned)
        attach(model, completed, head, learned.in_checkpoint, ids)
        return base
    saved = find_adapter(recipe)
    _reject_other_labels(saved, learned.completed(recipe))
    use_names_of(model, saved)
    head = _without(head, target_names(with_current_names(saved, model), model)[0])
    learned.adapter = completed_section(model, recipe, head, saved, learned.token_ids)
    if any(parameter.is_meta for parameter in model.parameters()):
        completed = learned.completed(recipe)
        attach(model, completed, head, token_ids=_token_ids(completed, learned))
        return None
    base = verify_base(saved, base, recipe)
    computation = read_computation(saved.path)
    if computation is not None and facts is not None:
        require_facts(computation["base"], facts, recipe, f"the adapter {saved.path}", True)
    elif facts is not None and not saved.verified:
        warn_of_own_tokenizer(saved.path, facts, recipe)
        warn_of_own_processor(saved.path, recipe)
    embeddings = embedding_names(model)
    load_adapter(model, saved, head, learned.adapter.dropout, trained=True, drawn=drawn)
    ids = _token_ids(learned.completed(recipe), learned)
    for name in embeddings if ids else []:
        if not isinstance(model.get_submodule(name), TokenRows):  # PEFT trained the input alone
            add_token_rows(model, name, ids, sharing(model, name))
    return base


def head_in_full(model: nn.Module, head: Iterable[str]) -> list[str]:
    """Return the modules of a head that are trained in full: those without low-rank layers.

    (PEFT's `all-linear` adapts the layers of a head before the last one, such as a pooler.)
    """
    return _without(head, lora_layers(model))


def _without(head: Iterable[str], adapted: Iterable[str]) -> list[str]:
    names = list(adapted)
    return [top for top in head if not any(inside(name, top) for name in names)]


def _token_ids(completed: Recipe, learned: Learned) -> list[int]:
    """Return the ids of the tokens whose rows are trained, in ascending order."""
    named_ids = [token for token in completed.adapter.train_tokens if isinstance(token, int)]
    return sorted({*learned.token_ids, *named_ids})


def find_adapter(recipe: Recipe) -> AdapterFolder:
    """Read the adapter that `adapter.from` names, from a folder or the Hub.

    Raises:
        LoraError: If there is none, or as `read_adapter`.
    """
    name, at = recipe.adapter.from_ or "", recipe.at("adapter.from")
    folder = find_adapter_folder(name, at)
    if not folder.exists():
        raise LoraError(f"there is no folder {folder}", at, name_neighbours(folder))
    return read_adapter(folder)


def _reject_other_labels(saved: AdapterFolder, recipe: Recipe) -> None:
    """Reject a recipe whose labels or their order differ from those of the adapter's recipe."""
    file = saved.path / RECIPE_FILE
    if not file.is_file():
        return
    adapter_task = load_adapter_recipe(saved.path).task
    for key in ("problem", "labels", "letters"):
        value, other = getattr(recipe.task, key, None), getattr(adapter_task, key, None)
        if (
            value is not None
            and other is not None
            and list(map(str, value)) != list(map(str, other))
        ):
            raise LoraError(
                f"`{key}` is {value} in the recipe and {other} in the adapter of `adapter.from`",
                recipe.at(f"task.{key}"),
                "its head answers with its own labels, in their order",
            )


def completed_section(
    model: nn.Module,
    recipe: Recipe,
    head: list[str],
    saved: AdapterFolder,
    token_ids: Sequence[int] = (),
) -> AdapterSpec:
    """Return the recipe's adapter section, completed from a trained adapter.

    Raises:
        LoraError: For all keys whose value in the recipe differs from the adapter's.
    """
    use_names_of(model, saved)
    saved = with_current_names(saved, model)
    spec, config = recipe.adapter, saved.config
    modules, parameters = target_names(saved, model)
    adapted = [*modules, *parameters]
    train_modules, tied = _trained_in_full(model, split_rows(saved)[0], head)
    trained_tokens, token_problems = _other_tokens(model, recipe, saved, token_ids)
    adapter_values: dict[str, Any] = {"type": saved.type, "train_modules": train_modules}
    adapter_values["ensure_weight_tying"] = tied
    if saved.type in LOW_RANK_TYPES:
        adapter_values |= {
            "rank": int(config.get("r", 8)),
            "alpha": float(config.get(PEFT_TYPES[config["peft_type"]].alpha, 8)),
            "use_rslora": bool(config.get("use_rslora")),
            "rank_pattern": _used(config.get("rank_pattern"), adapted, int),
            "alpha_pattern": _used(config.get("alpha_pattern"), adapted, float),
            "bias": config.get("bias") or "none",
        }
    _reject_other_shapes(recipe, config)
    stated = {key: getattr(spec, key) for key in spec.model_fields_set & adapter_values.keys()}
    if "train_modules" in stated and set(
        full_names(base_modules(model), stated["train_modules"])
    ) == {*train_modules}:
        del stated["train_modules"]  # the same modules, written shorter
    problems = [
        _differs(recipe, key, stated[key], value)
        for key, value in adapter_values.items()
        if key in stated and stated[key] != value
    ]
    problems += token_problems
    problems += _other_targets(model, recipe, head, modules, parameters)
    if parameters and spec.dropout:
        what = "the adapter of `adapter.from` has single parameters (experts), without dropout"
        problems.append(Problem(what, recipe.at("adapter.dropout"), "leave `dropout` out"))
    if problems:
        raise LoraError(problems)
    settings = {"from_": spec.from_, "dropout": spec.dropout}
    targets: dict[str, Any] = (
        {"target_modules": modules, "target_parameters": parameters} if adapted else {}
    )
    targets["train_tokens"] = trained_tokens
    try:
        return AdapterSpec(**{**settings, **adapter_values, **targets})
    except ValidationError as error:  # PEFT accepts an alpha of 0 or less
        first = error.errors()[0]
        what = f"`{first['loc'][0]}` of the adapter of `adapter.from` is {first['input']}"
        hint = "it can be used as it is, but not trained further"
        raise LoraError(what, recipe.at("adapter.from"), hint) from error


def _reject_other_shapes(recipe: Recipe, config: dict[str, Any]) -> None:
    """Reject an adapter with factors of a shape for which a recipe has no key."""
    for key, off in PEFT_TYPES[config["peft_type"]].shaping:
        if config.get(key, off) not in (off, None):
            raise LoraError(
                f"the adapter of `adapter.from` has `{key}`: {json.dumps(config[key])}, for which "
                "no recipe has a key",
                recipe.at("adapter.from"),
                "it can be used as it is, but not trained further",
            )


def _other_tokens(
    model: nn.Module, recipe: Recipe, saved: AdapterFolder, token_ids: Sequence[int]
) -> tuple[list[int], list[Problem]]:
    """Return the tokens whose rows an adapter trains, and a problem if the recipe differs."""
    ids = [sorted(row_ids) for row_ids in token_reading(model, saved.config).ids.values()]
    if len({tuple(row_ids) for row_ids in ids}) > 1:
        what = "the adapter of `adapter.from` has rows of other tokens in the embedding than in "
        hint = "it can be used as it is, but not trained further"
        return [], [Problem(f"{what}the output layer", recipe.at("adapter.from"), hint)]
    tokens = ids[0] if ids else []
    names_tokens = bool(recipe.adapter.train_tokens)  # otherwise only the new tokens
    if set(token_ids) == set(tokens) or (not names_tokens and not set(token_ids) - set(tokens)):
        return tokens, []
    key = "adapter.train_tokens" if recipe.adapter.train_tokens else "model.add_tokens"
    what = f"the recipe trains the rows of the tokens {_listed(token_ids)}, and the adapter of "
    what += f"`adapter.from` has {f'those of {_listed(tokens)}' if tokens else 'none'}"
    hint = "name the same tokens, or start without `adapter.from`"
    return tokens, [Problem(what, recipe.at(key), hint)]


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ids)[:8])) + (", …" if len(ids) > 8 else "")


def _trained_in_full(
    model: nn.Module, saved: AdapterFolder, head: list[str]
) -> tuple[list[str], bool]:
    """Return the modules other than the head that were trained in full, and if ties remain."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    plain = {name: tensor for name, tensor in saved.tensors.items() if adapted_module(name) is None}
    copied = copied_modules(names, saved.config)
    modules = [n for n in full_names(names, copied) if any(t.startswith(f"{n}.") for t in plain)]
    modules = [name for name in modules if not any(inside(name, top) for top in head)]
    return modules, not untied_parameters(model, saved.config, plain)


def _used(patterns: dict[str, Any] | None, names: list[str], kind: type) -> dict[str, Any]:
    """Return the patterns that match a module: unlike PEFT, a recipe must not have others."""
    return {
        pattern: kind(value)
        for pattern, value in (patterns or {}).items()
        if any(pattern_matches(pattern, name) for name in names)
    }


def _other_targets(
    model: nn.Module,
    recipe: Recipe,
    head: list[str],
    modules: list[str],
    parameters: list[str],
) -> list[Problem]:
    """Return a problem if the recipe names other targets than the adapter has."""
    spec = recipe.adapter
    keys = [key for key in TARGET_KEYS if getattr(spec, key) not in (None, [])]
    if not keys or not spec.low_rank:
        return []
    adapted, completed = [*modules, *parameters], recipe
    if spec.target_modules is None:
        completed = completed.with_values({"adapter.target_modules": modules})
    if not spec.target_parameters:
        completed = completed.with_values({"adapter.target_parameters": parameters})
    requested = {target.full_name for target in resolve_targets(model, completed, head)}
    if requested == set(adapted):
        return []
    odd = sorted(requested ^ set(adapted))[0]
    where = "the recipe" if odd in requested else "the adapter"
    names = sorted({name.rpartition(".")[2] for name in adapted})
    return [
        Problem(
            f"the recipe's targets are {len(requested)} modules, those of the adapter of "
            f"`adapter.from` are {len(adapted)} ({', '.join(names)}); only {where} has `{odd}`",
            recipe.at(f"adapter.{keys[0]}"),
            f"leave `{'`, `'.join(keys)}` out: the targets come from the adapter",
        )
    ]


def _differs(recipe: Recipe, key: str, in_recipe: Any, in_adapter: Any) -> Problem:
    return Problem(
        f"`{key}` is {in_recipe} in the recipe and {in_adapter} in the adapter of `adapter.from`",
        recipe.at(f"adapter.{key}"),
        "leave it out: it comes from the adapter",
    )
