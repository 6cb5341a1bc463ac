"""Which modules get an adapter: the recipe's `target_modules` and what refines it.

Every entry must match a module, and every error is collected before the model is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import regex
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.parameter_targets import resolve_parameters
from lora_cli.adapters.variants import Layers, layer_for, layers_of
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.models.bundle import is_frozen
from lora_cli.patterns import regex_error
from lora_cli.recipe import Recipe

# The names that transformers' encoders give to the query and value projections.
QUERY_VALUE_NAMES = (
    "query",
    "value",
    "q_proj",
    "v_proj",
    "q_lin",
    "v_lin",
    "q",
    "v",
    "c_attn",
    "query_proj",
    "value_proj",
    "Wqkv",
    "in_proj",
    "query_key_value",
)


MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_KERNEL = ("out_proj", "conv1d")  # layers whose weights Mamba's kernels read themselves

GATES = regex.compile(r"(^|\.)(squeeze_excite|squeeze_excitation|se|se_module)(\.|$)")

LONGEST_NUMBER = 15  # digits of a layer's number; no model has as many layers as that allows
PATIENCE = 0.5  # seconds for one expression and one name; most take a millionth of it
EXPRESSION = "a valid one: `.*\\.(query|value)`; names need none: `[query, value]`"


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter."""

    name: str
    rank: int
    alpha: float
    parameter: str | None = None
    """Its one parameter that gets it, as of a module that holds many experts in one tensor; None
    for the module as a whole."""

    @property
    def full_name(self) -> str:
        """The name of the module, or of its parameter."""
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"


def layer_index(name: str) -> int | None:
    """Return the number of the layer that a module belongs to: 3 in `encoder.layer.3.output`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(layers: str | list[int]) -> range | frozenset[int]:
    """Return the layer numbers of `0-5`, `7`, or a list; of any range, however long, at once."""
    if not isinstance(layers, str):
        return frozenset(layers)
    first, _, last = (number[:LONGEST_NUMBER] for number in layers.partition("-"))
    return range(int(first), int(last or first) + 1)


def matches(pattern: str | list[str], name: str) -> bool:
    """Return whether a name matches a regular expression, or ends in one of the suffixes.

    A broken expression matches nothing; `resolve_targets` reports it.

    Raises:
        LoraError: If an expression takes too long, as in a hostile adapter's configuration.
    """
    if isinstance(pattern, str):
        return regex_error(pattern) is None and _fits(pattern, name)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def _fits(expression: str, name: str, written: str | None = None) -> bool:
    """Return whether an expression matches a whole name, by `regex`: `re` knows no time limit.

    Raises:
        LoraError: If it takes longer than `PATIENCE`.
    """
    try:
        return regex.fullmatch(expression, name, timeout=PATIENCE) is not None
    except TimeoutError:
        raise LoraError(
            f"`{written or expression}` takes too long to match",
            f"module {name}",
            "an expression without a repetition inside a repetition; names need none: "
            "`[query, value]`",
        ) from None


def resolve_targets(model: nn.Module, recipe: Recipe, head: Iterable[str] = ()) -> list[Target]:
    """Return which modules get an adapter, with their ranks and alphas; touch nothing.

    Args:
        model: The base model; may be on the meta device.
        recipe: Its `adapter` section says which modules.
        head: Names of modules that are trained in full and therefore get no adapter.

    Raises:
        LoraError: With every entry of `target_modules`, `exclude_modules`, `layers`,
            `rank_pattern`, `alpha_pattern` and `train_modules` that matches nothing, and every
            rank that a module cannot have.
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
        and not read_by_kernels(model, name)
        and not is_frozen(model, name)
    }

    pattern, chosen = _chosen(model, recipe, adaptable)
    problems += _unmatched(pattern, "adapter.target_modules", adaptable, model, recipe)
    if spec.exclude_modules is not None:
        key = "adapter.exclude_modules"
        problems += _unmatched(spec.exclude_modules, key, adaptable, model, recipe)
        chosen = [name for name in chosen if not matches(spec.exclude_modules, name)]
    if spec.layers is not None:
        wanted = parse_layers(spec.layers)
        problems += absent_layers(wanted, modules, spec.layers, recipe.at("adapter.layers"))
        chosen = [name for name in chosen if layer_index(name) in wanted]
    parameters, found = _parameter_targets(model, recipe, chosen, in_full)
    problems += found
    problems += _unmatched_patterns([*chosen, *(t.full_name for t in parameters)], recipe)
    problems += unmatched_in_full(model, recipe)
    if not problems and not chosen and not parameters:
        what = "no module is left to adapt"
        hint = "`exclude_modules` and `layers` leave none of the targets"
        if spec.target_modules == []:
            what = "`target_modules` names no module"
            hint = (
                "name some, or leave it out for the default; single tokens and modules in "
                "`train_modules` are trained besides an adapter, not instead of it"
            )
        problems.append(Problem(what, recipe.at("adapter.target_modules"), hint))
    targets = [Target(name, *rank_and_alpha(recipe, name)) for name in chosen]
    for target in targets:
        problems += shape_problem(modules[target.name], target, layers)
    if problems:
        raise LoraError(problems)
    return targets + parameters


def _parameter_targets(
    model: nn.Module, recipe: Recipe, adapted: list[str], in_full: list[str]
) -> tuple[list[Target], list[Problem]]:
    """Return the single parameters that get an adapter, and what is wrong with their names."""
    spec = recipe.adapter
    if not spec.target_parameters:
        return [], []

    def is_in_full(name: str) -> bool:
        return any(inside(name, top) for top in in_full) or is_frozen(model, name)

    places, problems = resolve_parameters(model, recipe, adapted, is_in_full)
    if spec.exclude_modules is not None:
        places = [place for place in places if not matches(spec.exclude_modules, place[0])]
    if spec.layers is not None:
        wanted = parse_layers(spec.layers)
        places = [place for place in places if layer_index(place[0]) in wanted]
    targets = [Target(n, *rank_and_alpha(recipe, f"{n}.{key}"), key) for n, key in places]
    return targets, problems


def rank_and_alpha(recipe: Recipe, name: str) -> tuple[int, float]:
    """Return the rank and the alpha of a module, or of a parameter, by its name."""
    spec = recipe.adapter
    rank = int(first_match(spec.rank_pattern, name, spec.rank))
    return rank, first_match(spec.alpha_pattern, name, spec.alpha)


def absent_layers(
    wanted: range | frozenset[int], modules: Iterable[str], written: str | list[int], at: str
) -> list[Problem]:
    """Return a problem if the model does not have some of the layers.

    Args:
        wanted: Numbers of layers.
        modules: Names of modules or parameters of the model.
        written: The layers as the recipe writes them.
        at: Where it does.
    """
    if not wanted:
        return [Problem(f"`{written}` names no layer", at, "write the lower number first: `0-3`")]
    found = {index for name in modules if (index := layer_index(name)) is not None}
    # a range may be long: only as much of it is looked at as the model could have
    most = len(found) + 1
    first = wanted[:most] if isinstance(wanted, range) else sorted(wanted)
    absent = [index for index in first if index not in found]
    if not absent:
        return []
    shown = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
    if isinstance(wanted, range):
        shown = f"{absent[0]}" + (f" to {wanted[-1]}" if absent[0] < wanted[-1] else "")
    what = "there is no layer" if shown.isdecimal() else "there are no layers"
    hint = (
        f"the model has layers 0 to {max(found)}" if found else "the model has no numbered layers"
    )
    return [Problem(f"{what} {shown}", at, hint)]


def _unmatched_patterns(chosen: list[str], recipe: Recipe) -> list[Problem]:
    """Return a problem for every entry of the patterns of rank and alpha that fits no target."""
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(recipe.adapter, key):
            at = recipe.at(f"adapter.{key}.{entry}")
            if error := regex_error(entry):
                what = f"`{entry}` is not a regular expression: {error}"
                problems.append(Problem(what, at, EXPRESSION))
            elif not any(_pattern_matches(entry, name) for name in chosen):
                hint = did_you_mean(entry, _last_names(chosen), "adapted are")
                problems.append(Problem(f"`{entry}` matches no adapted module", at, hint))
    return problems


def read_by_kernels(model: nn.Module, name: str) -> bool:
    """Return whether a Mamba kernel reads a module's weight: an adapter on it would be passed by.

    PEFT adapts no module of these names in such models, and raises an error.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type in MAMBA_TYPES and name.rpartition(".")[2] in MAMBA_KERNEL


def shape_problem(base: nn.Module, target: Target, layers: Layers) -> list[Problem]:
    """Return a problem if the layer that fits a module cannot have a target's rank on it."""
    layer = layer_for(base, layers)
    assert layer is not None
    try:
        layer.shapes(base, target.rank)
    except LoraError as error:
        problem = error.problems[0]
        return [Problem(problem.what, f"module {target.name}", problem.hint)]
    return []


def unmatched_in_full(model: nn.Module, recipe: Recipe) -> list[Problem]:
    """Return a problem for every entry of `train_modules` that matches no module."""
    names = [name for name, _ in model.named_modules() if name]
    return [
        Problem(
            f"`{entry}` matches no module of the model",
            recipe.at("adapter.train_modules"),
            did_you_mean(entry, _last_names(names), "the model has"),
        )
        for entry in recipe.adapter.train_modules
        if not any(matches([entry], name) for name in names)
    ]


def _chosen(
    model: nn.Module, recipe: Recipe, adaptable: dict[str, nn.Module]
) -> tuple[str | list[str], list[str]]:
    """Return the pattern in effect and the names that it matches."""
    linear = [name for name, module in adaptable.items() if isinstance(module, nn.Linear | Conv1D)]
    output = _output_embedding_name(model)
    pattern = recipe.adapter.target_modules
    usual = recipe.task.default_targets
    if pattern is None and isinstance(usual, tuple):
        pattern = [name for name in usual if any(matches([name], n) for n in linear)]
        pattern = pattern or "all-linear"
    if pattern is None and usual == "layers":
        if linear:
            return "all-linear", [name for name in linear if name != output]
        if convolutions := default_convolutions(adaptable):
            return convolutions, convolutions
    if pattern is None:
        found = {name.rsplit(".", 1)[-1] for name in linear}
        pattern = [name for name in QUERY_VALUE_NAMES if name in found]
        if output is not None or not pattern:  # a language model, or names that we do not know
            pattern = "all-linear"
    if pattern == "all-linear":
        return pattern, [name for name in linear if name != output]
    return pattern, [name for name in adaptable if matches(pattern, name)]


def default_convolutions(modules: dict[str, nn.Module]) -> list[str]:
    """Return which convolutions of a model are adapted if the recipe does not say.

    Of a model whose convolutions mix the channels at every step (ResNet) it is all of them. Where
    some have groups (EfficientNet), it is those that mix channels and nothing else: of size 1 x 1,
    without groups. An update of few ranks has no room in one group a channel, and the gates of
    squeeze-and-excitation only scale what the others make.
    """
    convolutions = {n: m for n, m in modules.items() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    whole = [name for name, module in convolutions.items() if module.groups == 1]
    if len(whole) == len(convolutions):
        return whole
    return [
        name
        for name in whole
        if set(convolutions[name].kernel_size) == {1} and not GATES.search(name)
    ]


def _output_embedding_name(model: nn.Module) -> str | None:
    """Return the name of the layer that maps to the vocabulary, if the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    return next((name for name, module in model.named_modules() if module is output), None)


def _unmatched(
    pattern: str | list[str],
    key: str,
    adaptable: dict[str, nn.Module],
    model: nn.Module,
    recipe: Recipe,
) -> list[Problem]:
    """Return a problem for every entry that matches no module which an adapter fits."""
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
        others = [name for name in modules if matches(test, name)]
        if others and read_by_kernels(model, others[0]):
            if key == "adapter.exclude_modules":
                continue
            what = f"`{entry}` matches {others[0]}, whose weight Mamba's kernels read themselves"
            hint = "an adapter on it would be passed by, and PEFT rejects it; take it out"
        elif others and is_frozen(model, others[0]):
            what = f"`{entry}` matches {others[0]}, in a part of the model that is used as it is"
            hint = recipe.task.frozen_hint
        elif others and layer_for(modules[others[0]], layers_of(recipe.adapter.type)):
            what = f"`{entry}` matches {others[0]}, which is trained in full"
            hint = "it needs no adapter; remove it"
        elif others:
            kind = type(modules[others[0]]).__name__
            within = [name for name in adaptable if inside(name, others[0])]
            what = f"`{entry}` matches {others[0]} ({kind}), which no adapter fits"
            fitting = ", ".join(_last_names(within or adaptable))
            hint = f"inside it are {fitting}" if within else f"adapters fit {fitting}"
        else:
            what = f"`{entry}` matches no module of the model"
            hint = did_you_mean(entry, _last_names(adaptable), "the model has")
            if isinstance(test, str):
                hint += "; a regular expression has to match the whole name"
        problems.append(Problem(what, recipe.at(key), hint))
    return problems


def inside(name: str, top: str) -> bool:
    """Return whether module `name` is `top` or lies beneath it."""
    return name == top or name.startswith(f"{top}.") or f".{top}." in f".{name}."


def _last_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name))


def _pattern_matches(pattern: str, name: str) -> bool:
    whole = rf"(.*\.)?({pattern})$"  # PEFT's rule for its patterns
    return not regex_error(pattern) and not regex_error(whole) and _fits(whole, name, pattern)


def first_match(patterns: dict[str, int] | dict[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that matches a name, or the default."""
    return next((v for pattern, v in patterns.items() if _pattern_matches(pattern, name)), default)
