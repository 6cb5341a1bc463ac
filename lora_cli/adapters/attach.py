"""Attach low-rank layers to a model, freeze the rest, merge, and count.

Modules are found by walking the model; every entry of `target_modules` must match, and every fault
is collected before the model is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.lora import (
    LoRAConv,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    check_groups,
)
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import AdapterSpec, Recipe

# The names that transformers' encoders give to the query and value projections.
QUERY_VALUE_NAMES = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "c_attn",
                     "query_proj", "value_proj", "Wqkv", "in_proj", "query_key_value")


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter."""

    name: str
    rank: int
    alpha: float


def layer_for(
    base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
) -> LoRALayer | None:
    """Return the low-rank layer that fits `base`, or None where none does."""
    if isinstance(base, nn.Linear | Conv1D):
        return LoRALinear(base, rank, alpha, dropout, use_rslora)
    if type(base) is nn.Embedding:  # subclasses scale or cut what they look up
        return LoRAEmbedding(base, rank, alpha, dropout, use_rslora)
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        return LoRAConv(base, rank, alpha, dropout, use_rslora)
    return None


def can_adapt(module: nn.Module) -> bool:
    """Return whether a low-rank layer fits the module."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention takes its weight and never calls it
    return (
        isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d)
        or type(module) is nn.Embedding
    )


def layer_index(name: str) -> int | None:
    """Return the number of the layer that a module belongs to: 3 in `encoder.layer.3.output`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(layers: str | list[int]) -> set[int]:
    """Return the layer numbers of `0-5`, `7`, or a list."""
    if not isinstance(layers, str):
        return set(layers)
    first, _, last = layers.partition("-")
    return set(range(int(first), int(last or first) + 1))


def matches(pattern: str | list[str], name: str) -> bool:
    """Return whether a name matches a regular expression, or ends in one of the suffixes.

    A broken expression matches nothing; `resolve_targets` reports it.
    """
    if isinstance(pattern, str):
        return _regex_fault(pattern) is None and re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def _regex_fault(pattern: str) -> str | None:
    """Return why a text is no regular expression, or None if it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


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
    spec = recipe.adapter
    problems: list[Problem] = []
    in_full = [*head, *spec.train_modules]
    modules = {name: module for name, module in model.named_modules() if name}
    adaptable = {
        name: module
        for name, module in modules.items()
        if can_adapt(module) and not any(_inside(name, top) for top in in_full)
    }

    pattern, chosen = _chosen(model, spec, adaptable)
    problems += _unmatched(pattern, "adapter.target_modules", adaptable, modules, recipe)
    if spec.exclude_modules is not None:
        key = "adapter.exclude_modules"
        problems += _unmatched(spec.exclude_modules, key, adaptable, modules, recipe)
        chosen = [name for name in chosen if not matches(spec.exclude_modules, name)]
    if spec.layers is not None:
        wanted, found = parse_layers(spec.layers), {layer_index(name) for name in modules}
        for layer in sorted(wanted - found):  # type: ignore[type-var]  # None never is in wanted
            count = max((i for i in found if i is not None), default=-1) + 1
            problems.append(Problem(f"there is no layer {layer}", recipe.at("adapter.layers"),
                                    f"the model has layers 0 to {count - 1}"))
        chosen = [name for name in chosen if layer_index(name) in wanted]
    for key in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(spec, key):
            if fault := _regex_fault(entry):
                problems.append(Problem(f"`{entry}` is not a regular expression: {fault}",
                                        recipe.at(f"adapter.{key}.{entry}")))
            elif not any(_pattern_matches(entry, name) for name in chosen):
                problems.append(Problem(f"`{entry}` matches no adapted module",
                                        recipe.at(f"adapter.{key}.{entry}"),
                                        did_you_mean(entry, _last_names(chosen), "adapted are")))
    problems += _unmatched_in_full(model, recipe)
    if not problems and not chosen:
        problems.append(Problem("no module is left to adapt", recipe.at("adapter.target_modules"),
                                "`exclude_modules` and `layers` leave none of the targets"))
    targets = [
        Target(
            name,
            int(_first_match(spec.rank_pattern, name, spec.rank)),
            _first_match(spec.alpha_pattern, name, spec.alpha),
        )
        for name in chosen
    ]
    for target in targets:
        problems += groups_problem(modules[target.name], target)
    if problems:
        raise LoraError(problems)
    return targets


def groups_problem(base: nn.Module, target: Target) -> list[Problem]:
    """Return a problem if the groups of a convolution do not divide the rank."""
    try:
        check_groups(base, target.rank)
    except LoraError as error:
        problem = error.problems[0]
        return [Problem(problem.what, f"module {target.name}", problem.hint)]
    return []


def _unmatched_in_full(model: nn.Module, recipe: Recipe) -> list[Problem]:
    """Return a problem for every entry of `train_modules` that matches no module."""
    names = [name for name, _ in model.named_modules() if name]
    return [
        Problem(f"`{entry}` matches no module of the model", recipe.at("adapter.train_modules"),
                did_you_mean(entry, _last_names(names), "the model has"))
        for entry in recipe.adapter.train_modules
        if not any(matches([entry], name) for name in names)
    ]


def _chosen(
    model: nn.Module, spec: AdapterSpec, adaptable: dict[str, nn.Module]
) -> tuple[str | list[str], list[str]]:
    """Return the pattern in effect and the names that it matches."""
    linear = [name for name, module in adaptable.items() if isinstance(module, nn.Linear | Conv1D)]
    output = _output_embedding_name(model)
    pattern = spec.target_modules
    if pattern is None:
        found = {name.rsplit(".", 1)[-1] for name in linear}
        pattern = [name for name in QUERY_VALUE_NAMES if name in found]
        if output is not None or not pattern:  # a language model, or names that we do not know
            pattern = "all-linear"
    if pattern == "all-linear":
        return pattern, [name for name in linear if name != output]
    return pattern, [name for name in adaptable if matches(pattern, name)]


def _output_embedding_name(model: nn.Module) -> str | None:
    """Return the name of the layer that maps to the vocabulary, if the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    return next((name for name, module in model.named_modules() if module is output), None)


def _unmatched(
    pattern: str | list[str],
    key: str,
    adaptable: dict[str, nn.Module],
    modules: dict[str, nn.Module],
    recipe: Recipe,
) -> list[Problem]:
    """Return a problem for every entry that matches no module which an adapter fits."""
    if pattern == "all-linear" and key == "adapter.target_modules":
        return []
    problems = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        test = entry if isinstance(pattern, str) else [entry]
        if isinstance(test, str) and (fault := _regex_fault(test)):
            what = f"`{entry}` is not a regular expression: {fault}"
            problems.append(Problem(what, recipe.at(key)))
            continue
        if any(matches(test, name) for name in adaptable):
            continue
        others = [name for name in modules if matches(test, name)]
        hint: str | None
        if others and can_adapt(modules[others[0]]):
            what = f"`{entry}` matches {others[0]}, which is trained in full"
            hint = "it needs no adapter; take it out"
        elif others:
            kind = type(modules[others[0]]).__name__
            inside = [name for name in adaptable if _inside(name, others[0])]
            what = f"`{entry}` matches {others[0]} ({kind}), which no adapter fits"
            hint = f"inside it are {', '.join(_last_names(inside))}" if inside else None
        else:
            what = f"`{entry}` matches no module of the model"
            hint = did_you_mean(entry, _last_names(adaptable), "the model has")
            if isinstance(test, str):
                hint += "; a regular expression has to match the whole name"
        problems.append(Problem(what, recipe.at(key), hint))
    return problems


def _inside(name: str, top: str) -> bool:
    """Return whether module `name` is `top` or lies beneath it."""
    return name == top or name.startswith(f"{top}.") or f".{top}." in f".{name}."


def _last_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name))


def _pattern_matches(pattern: str, name: str) -> bool:
    if _regex_fault(pattern):
        return False
    return re.match(rf"(.*\.)?({pattern})$", name) is not None  # PEFT's rule for its patterns


def _first_match(patterns: dict[str, int] | dict[str, float], name: str, default: float) -> float:
    return next((v for pattern, v in patterns.items() if _pattern_matches(pattern, name)), default)


# --------------------------------------------------------------------------- attach and freeze


def attach(model: nn.Module, recipe: Recipe, head: Iterable[str] = ()) -> None:
    """Make the model ready for training as the recipe's adapter section says.

    Low-rank layers replace their bases, the base is frozen, and what is trained in full becomes
    float32. The new matrices are drawn from torch's global generator.

    Args:
        model: The base model, changed in place.
        recipe: Its `adapter` section says what is trained.
        head: Names of the modules that the task created anew.

    Raises:
        LoraError: As `resolve_targets`; the model is untouched then.
    """
    spec, head = recipe.adapter, list(head)
    if spec.type == "full":
        for parameter in model.parameters():
            _train(parameter)
        return
    targets = resolve_targets(model, recipe, head) if spec.low_rank else []
    if problems := _unmatched_in_full(model, recipe):
        raise LoraError(problems)
    in_full = [
        name
        for name, _ in model.named_modules()
        if name in head or (name and matches(spec.train_modules, name))
    ]
    _refuse_half_of_a_tie(model, in_full, recipe)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        add_layer(model, target, spec.dropout, spec.use_rslora)
    for name in in_full:
        for parameter in model.get_submodule(name).parameters():
            _train(parameter)
    if spec.type == "bitfit" or (spec.low_rank and spec.bias == "all"):
        for module in model.modules():
            if isinstance(module._parameters.get("bias"), nn.Parameter):
                _train(module._parameters["bias"])
    elif spec.low_rank and spec.bias == "lora_only":
        for layer in lora_layers(model).values():
            if layer.bias is not None:
                _train(layer.bias)
    even_norms(model)


def add_layer(
    model: nn.Module, target: Target, dropout: float = 0.0, use_rslora: bool = False
) -> LoRALayer:
    """Put a low-rank layer in the place of the module that `target` names, and return it."""
    parent_name, _, child_name = target.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    base = getattr(parent, child_name)
    layer = layer_for(base, target.rank, target.alpha, dropout, use_rslora)
    assert layer is not None, f"{target.name} was resolved but no layer fits it"
    layer.train(base.training)
    setattr(parent, child_name, layer)
    return layer


def _train(parameter: torch.Tensor | nn.Parameter | None) -> None:
    assert parameter is not None
    parameter.data = parameter.data.float()  # an optimizer's steps are too small for 16 bits
    parameter.requires_grad_(True)


def even_norms(model: nn.Module) -> None:
    """Give every normalisation with a float32 bias a float32 weight: torch takes no mixture."""
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None or weight.ndim != 1:
            continue
        if bias.dtype == torch.float32:
            weight.data = weight.data.float()


def _refuse_half_of_a_tie(model: nn.Module, in_full: list[str], recipe: Recipe) -> None:
    """Refuse to train one of two modules that share a weight: PEFT's folder holds copies."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        inside = [name for name in names if any(_inside(name, top) for top in in_full)]
        if inside and len(inside) < len(names):
            raise LoraError(
                f"`{inside[0]}` shares its weight with `{(set(names) - set(inside)).pop()}`",
                recipe.at("adapter.train_modules"), "name both, or neither",
            )


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the low-rank layers of a model by the names of the modules they replace."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_mode(model: nn.Module) -> None:
    """Put the model into training mode, but frozen batch normalisation into eval mode.

    In training mode it would average the new data into its running statistics, which no adapter
    folder holds: the base would drift away from what was saved.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Turn the low-rank updates off within the context: the model is its base, bit for bit."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


# --------------------------------------------------------------------------------------- merge


def merge(model: nn.Module) -> list[str]:
    """Replace every low-rank layer by its base with the update added to the weight.

    Where an adapted weight is shared (a tied embedding and output layer) and the sharers do not
    have the same update, they cannot share any longer: the weight is copied first.

    Returns:
        Names of modules whose weight was shared and no longer is.

    Raises:
        LoraError: If a layer cannot be merged; the model is untouched then.
    """
    layers = lora_layers(model)
    merged = {name: layer.merged_weight() for name, layer in layers.items()}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            short = name.removesuffix(".base")
            users.setdefault(id(weight), []).append(short if short in layers else name)
    untied: list[str] = []
    for name, layer in layers.items():
        sharers = users[id(layer.weight)]
        if len(sharers) > 1:
            untied += [other for other in sharers if other not in untied]
        weight = nn.Parameter(merged[name].to(layer.weight.dtype), requires_grad=False)
        layer.base.weight = weight
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer.base)
    return untied


# --------------------------------------------------------------------------------------- count


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: its name, shape, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    trainable: bool

    @property
    def count(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())


def parameter_table(model: nn.Module) -> list[ParameterRow]:
    """Return a row for every parameter of the model, each counted once however often shared."""
    return [
        ParameterRow(name, tuple(parameter.shape), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]


def group_rows(rows: Iterable[ParameterRow]) -> list[tuple[str, int, bool, int]]:
    """Join rows that differ only in the layer's number.

    Returns:
        (name with `*` for the number, how many parameters, trainable, entries in all) each.
    """
    groups: dict[tuple[str, bool], list[ParameterRow]] = {}
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
        groups.setdefault((name, row.trainable), []).append(row)
    return [
        (name, len(members), trainable, sum(row.count for row in members))
        for (name, trainable), members in groups.items()
    ]
