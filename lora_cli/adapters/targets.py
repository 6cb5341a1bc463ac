"""Resolve which modules get an adapter: `target_modules`, `exclude_modules` and `layers`.

Every entry has to match a module. All errors are collected before the model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_cli.adapters.default_targets import all_linear, default_targets
from lora_cli.adapters.match_names import (
    first_match,
    inside,
    layer_index,
    matches,
    parse_layers,
    pattern_matches,
)
from lora_cli.adapters.parameter_targets import resolve_parameters
from lora_cli.adapters.variants import Layers, layer_for, layers_of
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.models.bundle import is_frozen
from lora_cli.patterns import regex_error
from lora_cli.recipe import Recipe

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_KERNEL = ("out_proj", "conv1d")  # layers that Mamba's kernels read without calling them
TIME_STEP_TYPES = ("mamba", "falcon_mamba", "jamba")  # these multiply by the weight of `dt_proj`
# WavLM passes the weights of its attention to torch's `multi_head_attention_forward`
WAVLM_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

SHOWN = 8  # names of modules
EXPRESSION = "a valid one: `.*\\.(query|value)`; names need none: `[query, value]`"


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter."""

    name: str
    rank: int
    alpha: float
    parameter: str | None = None
    """The parameter to adapt, in modules that hold many experts in one tensor; None to adapt the
    module itself."""

    @property
    def full_name(self) -> str:
        """The name of the module, or of its parameter."""
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"


def resolve_targets(model: nn.Module, recipe: Recipe, head: Iterable[str] = ()) -> list[Target]:
    """Return the modules that get an adapter, with ranks and alphas, without changing the model.

    Args:
        model: The base model; may be on the meta device.
        recipe: Its `adapter` section names the modules.
        head: The names of modules that are trained in full, and so get no adapter.

    Raises:
        LoraError: With every entry of `target_modules`, `exclude_modules`, `layers`,
            `rank_pattern`, `alpha_pattern` and `train_modules` that matches nothing, and every rank
            that is impossible for a module.
    """
    spec, layers = recipe.adapter, layers_of(recipe.adapter.type)
    problems: list[Problem] = []
    in_full = [*head, *spec.train_modules]
    modules = {name: module for name, module in model.named_modules() if name}
    adaptable = {
        name: module
        for name, module in modules.items()
        if layer_for(module, layers)
        and not any(inside(name, top) for top in in_full)
        and not is_never_called(model, name)
        and not is_frozen(model, name)
    }

    pattern, chosen = _requested_modules(model, recipe, adaptable)
    problems += _unmatched(pattern, "adapter.target_modules", adaptable, model, recipe)
    if spec.exclude_modules is not None:
        key = "adapter.exclude_modules"
        problems += _unmatched(spec.exclude_modules, key, adaptable, model, recipe)
        chosen = [name for name in chosen if not matches(spec.exclude_modules, name)]
    if spec.layers is not None:
        layer_numbers = parse_layers(spec.layers)
        problems += absent_layers(layer_numbers, modules, spec.layers, recipe.at("adapter.layers"))
        chosen = [name for name in chosen if layer_index(name) in layer_numbers]
    parameters, parameter_problems = _parameter_targets(model, recipe, chosen, in_full)
    problems += parameter_problems
    problems += _unmatched_patterns([*chosen, *(t.full_name for t in parameters)], recipe)
    problems += unmatched_in_full(model, recipe)
    if not problems and not chosen and not parameters:
        problems.append(_none_left(recipe, pattern, adaptable, all_linear(model, adaptable)))
    targets = [Target(name, *rank_and_alpha(recipe, name)) for name in chosen]
    for target in targets:
        problems += shape_problem(modules[target.name], target, layers)
    if problems:
        raise LoraError(problems)
    return targets + parameters


def _none_left(
    recipe: Recipe, pattern: str | list[str], adaptable: Iterable[str], linear: Iterable[str]
) -> Problem:
    """Return a problem for a recipe whose keys are valid, but together leave nothing to adapt."""
    what = "no module is left to adapt"
    hint = "`exclude_modules` and `layers` leave none of the targets"
    if recipe.adapter.target_modules == []:
        what = "`target_modules` names no module"
        hint = (
            "name some, or leave it out for the default; single tokens and modules in "
            "`train_modules` are trained besides an adapter, not instead of it"
        )
    elif pattern == "all-linear" and not linear:
        hint = "the model has no linear layers, or only its head: leave `target_modules` out"
        if other_names := _last_names(adaptable)[:SHOWN]:
            hint += f" for the default, or name others (the model has {', '.join(other_names)})"
        if recipe.adapter.train_modules:
            hint = "`train_modules` trains all linear layers in full: name fewer there"
    return Problem(what, recipe.at("adapter.target_modules"), hint)


def _parameter_targets(
    model: nn.Module, recipe: Recipe, adapted: list[str], in_full: list[str]
) -> tuple[list[Target], list[Problem]]:
    """Return the single parameters that get an adapter, and the problems with their names."""
    spec = recipe.adapter
    if not spec.target_parameters:
        return [], []

    def is_in_full(name: str) -> bool:
        return any(inside(name, top) for top in in_full) or is_frozen(model, name)

    places, problems = resolve_parameters(model, recipe, adapted, is_in_full)
    if spec.exclude_modules is not None:
        places = [place for place in places if not matches(spec.exclude_modules, place[0])]
    if spec.layers is not None:
        layer_numbers = parse_layers(spec.layers)
        places = [place for place in places if layer_index(place[0]) in layer_numbers]
    targets = [Target(n, *rank_and_alpha(recipe, f"{n}.{key}"), key) for n, key in places]
    return targets, problems


def rank_and_alpha(recipe: Recipe, name: str) -> tuple[int, float]:
    """Return the rank and the alpha of the module or parameter with this name."""
    spec = recipe.adapter
    rank = int(first_match(spec.rank_pattern, name, spec.rank))
    return rank, first_match(spec.alpha_pattern, name, spec.alpha)


def absent_layers(
    requested: range | frozenset[int], modules: Iterable[str], written: str | list[int], at: str
) -> list[Problem]:
    """Return a problem if the model does not have some of the layers.

    Args:
        requested: The numbers of the requested layers.
        modules: Names of the model's modules or parameters.
        written: The numbers as written in the recipe.
        at: The location in the recipe.
    """
    if not requested:
        hint = "write the lower number first: `0-3`" if written else "leave it out for all layers"
        return [Problem(f"`{written}` names no layer", at, hint)]
    existing = {index for name in modules if (index := layer_index(name)) is not None}
    # a range may be huge: among its first len(existing) + 1 layers, at least one is absent
    limit = len(existing) + 1
    first = requested[:limit] if isinstance(requested, range) else sorted(requested)
    absent = [index for index in first if index not in existing]
    if not absent:
        return []
    shown = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
    if isinstance(requested, range):
        shown = f"{absent[0]}" + (f" to {requested[-1]}" if absent[0] < requested[-1] else "")
    what = "there is no layer" if shown.isdecimal() else "there are no layers"
    hint = (
        f"the model has layers 0 to {max(existing)}"
        if existing
        else "the model has no numbered layers"
    )
    return [Problem(f"{what} {shown}", at, hint)]


def _unmatched_patterns(chosen: list[str], recipe: Recipe) -> list[Problem]:
    """Return a problem for each entry of `rank_pattern` and `alpha_pattern` that fits no target.

    Without targets there are no problems, since the patterns are not to blame.
    """
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(recipe.adapter, key):
            at = recipe.at(f"adapter.{key}.{entry}")
            if error := regex_error(entry):
                what = f"`{entry}` is not a regular expression: {error}"
                problems.append(Problem(what, at, EXPRESSION))
            elif chosen and not any(pattern_matches(entry, name) for name in chosen):
                hint = did_you_mean(entry, _last_names(chosen), "adapted are")
                problems.append(Problem(f"`{entry}` matches no adapted module", at, hint))
    return problems


def rejected_in_mamba(model: nn.Module, name: str) -> bool:
    """Return whether PEFT raises an error for a module, since Mamba's kernels read its weight."""
    return _model_type(model) in MAMBA_TYPES and name.rpartition(".")[2] in MAMBA_KERNEL


def is_never_called(model: nn.Module, name: str) -> bool:
    """Return whether a model reads a module's weight without a call: an adapter has no effect."""
    model_type, last_name = _model_type(model), name.rpartition(".")[2]
    if model_type == "wavlm":
        return last_name in WAVLM_ATTENTION
    is_time_step = last_name == "dt_proj" and model_type in TIME_STEP_TYPES
    return is_time_step or rejected_in_mamba(model, name)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def shape_problem(base: nn.Module, target: Target, layers: Layers) -> list[Problem]:
    """Return a problem if an adapter layer on a module cannot have the target's rank."""
    layer = layer_for(base, layers)
    assert layer is not None
    try:
        layer.shapes(base, target.rank)
    except LoraError as error:
        problem = error.problems[0]
        return [Problem(problem.what, f"module {target.name}", problem.hint)]
    return []


def unmatched_in_full(model: nn.Module, recipe: Recipe) -> list[Problem]:
    """Return a problem for every entry of `train_modules` that matches no trainable module."""
    names, problems = [name for name, _ in model.named_modules() if name], []
    for entry in recipe.adapter.train_modules:
        matched = [name for name in names if matches([entry], name)]
        if any(not is_frozen(model, name) for name in matched):
            continue
        what = f"`{entry}` matches no module of the model"
        hint = did_you_mean(entry, _last_names(names), "the model has")
        if matched:
            what = f"`{entry}` matches {matched[0]}, in a part of the model that is used as it is"
            hint = recipe.task.frozen_hint
        problems.append(Problem(what, recipe.at("adapter.train_modules"), hint))
    return problems


def _requested_modules(
    model: nn.Module, recipe: Recipe, adaptable: dict[str, nn.Module]
) -> tuple[str | list[str], list[str]]:
    """Return `target_modules`, or its default value, and the modules that it matches."""
    pattern = recipe.adapter.target_modules
    if pattern is None:
        return default_targets(model, recipe.task.default_targets, adaptable)
    if pattern == "all-linear":
        return pattern, all_linear(model, adaptable)
    return pattern, [name for name in adaptable if matches(pattern, name)]


def _unmatched(
    pattern: str | list[str],
    key: str,
    adaptable: dict[str, nn.Module],
    model: nn.Module,
    recipe: Recipe,
) -> list[Problem]:
    """Return a problem for every entry that matches no module that can have an adapter."""
    modules = {name: module for name, module in model.named_modules() if name}
    if pattern == "all-linear" and key == "adapter.target_modules":
        return []
    problems = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        test = entry if isinstance(pattern, str) else [entry]
        if isinstance(test, str) and (error := regex_error(test)):
            what = f"`{entry}` is not a regular expression: {error}"
            problems.append(Problem(what, recipe.at(key), EXPRESSION))
            continue
        if any(matches(test, name) for name in adaptable):
            continue
        rejected = [name for name in modules if matches(test, name)]
        if rejected and is_never_called(model, rejected[0]):
            if key == "adapter.exclude_modules":
                continue
            what = f"`{entry}` matches {rejected[0]}, whose weight the model reads without a call"
            hint = "an adapter on it would have no effect; take it out"
        elif rejected and is_frozen(model, rejected[0]):
            what = f"`{entry}` matches {rejected[0]}, in a part of the model that is used as it is"
            hint = recipe.task.frozen_hint
        elif rejected and layer_for(modules[rejected[0]], layers_of(recipe.adapter.type)):
            what = f"`{entry}` matches {rejected[0]}, which is trained in full"
            hint = "it needs no adapter; remove it"
        elif rejected:
            kind = type(modules[rejected[0]]).__name__
            within = [name for name in adaptable if inside(name, rejected[0])]
            what = f"`{entry}` matches {rejected[0]} ({kind}), which no adapter fits"
            fitting = ", ".join(_last_names(within or adaptable))
            hint = f"inside it are {fitting}" if within else f"adapters fit {fitting}"
        else:
            what = f"`{entry}` matches no module of the model"
            hint = _how_to_name(entry, isinstance(pattern, str), key, adaptable)
        problems.append(Problem(what, recipe.at(key), hint))
    return problems


def _how_to_name(entry: str, is_expression: bool, key: str, adaptable: Iterable[str]) -> str:
    """Return a hint on how to write an entry that matches no module."""
    all_linear = re.fullmatch("all[ _-]?linear", entry, re.IGNORECASE)
    if all_linear and key == "adapter.target_modules":
        return "all linear layers are `all-linear`, by itself and not in a list"
    if is_expression and any(matches([entry], name) for name in adaptable):
        return f"a list takes the ends of names, `[{entry}]`; an expression, the whole name"
    hint = did_you_mean(entry, _last_names(adaptable), "the model has")
    return f"{hint}; a regular expression has to match the whole name" if is_expression else hint


def _last_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name))
