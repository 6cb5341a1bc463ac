"""Group the trained parameters by learning rate and weight decay, for the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lora_cli.adapters.attach import adapter_parameters, trainable_parameters
from lora_cli.adapters.freeze import depths
from lora_cli.adapters.match_names import inside, layer_index, matches, parse_layers
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import OptimizerSpec, Recipe
from lora_cli.recipe.spec import ParameterGroupSpec


def parameter_groups(
    model: nn.Module, recipe: Recipe, in_full: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: one for each learning rate and weight decay.

    The `names` of a group are the names of its `params`, in the same order.

    Args:
        model: The model with its adapter attached; may be on the meta device.
        recipe: Its `train.optimizer` section sets the rates.
        in_full: Names of the modules trained in full: the `head` of the recipe's groups.

    Raises:
        LoraError: For all groups that match no trained parameter.
    """
    spec, trained = recipe.train.optimizer, trainable_parameters(model)
    if problems := _group_problems(recipe, trained, model):
        raise LoraError(problems)
    adapters = adapter_parameters(model).keys()
    _reject_unused_ratio(adapters, recipe)
    depth_of = depths(model, in_full) if spec.layer_decay is not None else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained.items():
        is_head = any(inside(name, module) for module in in_full)
        kind = "adapter" if name in adapters else "head" if is_head else None
        rate, decay = _settings(name, kind, spec, depth_of.get(name, 0))
        if name in adapters and name.endswith("lora_B") and spec.lora_plus_ratio is not None:
            rate *= spec.lora_plus_ratio
        if parameter.ndim < 2:  # biases and the scales of normalisation layers
            decay = 0.0
        group = groups.setdefault(
            (rate, decay),
            {"params": [], "names": [], "lr": rate, "initial_lr": rate, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _settings(name: str, kind: str | None, spec: OptimizerSpec, depth: int) -> tuple[float, float]:
    """Return the learning rate and the weight decay of a parameter.

    Args:
        name: The parameter's name.
        kind: `adapter` or `head` if the parameter belongs to one, otherwise None.
        spec: The recipe's settings.
        depth: The number of layers that the parameter lies below the top.
    """
    layer, groups = layer_index(name), spec.groups
    by_module = (group for entry, group in groups.modules.items() if _is_in(name, entry))
    by_layer = (group for layers, group in groups.layers.items() if layer in parse_layers(layers))
    default = getattr(groups, kind) if kind else ParameterGroupSpec()
    chosen = next(by_module, None) or next(by_layer, None)
    decay = (chosen or default).weight_decay
    decay = spec.weight_decay if decay is None else decay
    if chosen is not None and chosen.learning_rate is not None:
        return chosen.learning_rate, decay
    rate = default.learning_rate if chosen is None else None
    factor = 1.0 if spec.layer_decay is None else float(spec.layer_decay**depth)
    return (spec.learning_rate if rate is None else rate) * factor, decay


def _is_in(name: str, entry: str) -> bool:
    """Return whether an entry names a parameter, or a module that contains it."""
    parts = name.split(".")
    return any(matches([entry], ".".join(parts[: n + 1])) for n in range(len(parts)))


def _group_problems(recipe: Recipe, trained: Collection[str], model: nn.Module) -> list[Problem]:
    """Return a problem for every setting that applies to no trained parameter."""
    spec, at, problems = recipe.train.optimizer, "train.optimizer", []
    numbers = sorted({i for name in trained if (i := layer_index(name)) is not None})
    for layers in spec.groups.layers:
        chosen = parse_layers(layers)
        if not any(i in chosen for i in numbers):
            hint = f"layers with trained parameters are {', '.join(map(str, numbers)) or 'none'}"
            what = f"nothing is trained in layers {layers}"
            problems.append(Problem(what, recipe.at(f"{at}.groups.layers.{layers}"), hint))
    for entry in spec.groups.modules:
        if any(_is_in(name, entry) for name in trained):
            continue
        frozen = any(_is_in(name, entry) for name, _ in model.named_parameters())
        what = f"`{entry}` matches no module of the model"
        what = f"nothing is trained in `{entry}`" if frozen else what
        names = {part for name in trained for part in name.split(".") if not part.isdigit()}
        hint = did_you_mean(entry, sorted(names), "trained are")
        problems.append(Problem(what, recipe.at(f"{at}.groups.modules.{entry}"), hint))
    if spec.layer_decay is not None and not numbers:
        what = "nothing is trained in a numbered layer, so no rate would be smaller"
        problems.append(Problem(what, recipe.at(f"{at}.layer_decay"), "leave `layer_decay` out"))
    return problems


def _reject_unused_ratio(adapters: Collection[str], recipe: Recipe) -> None:
    """Reject LoRA+ for adapters without B: other types, or only trained rows of an embedding."""
    has_no_b = not any(name.endswith("lora_B") for name in adapters)
    if recipe.train.optimizer.lora_plus_ratio is not None and recipe.adapter.low_rank and has_no_b:
        what = "nothing that is trained has a `lora_B`, which LoRA+ lets learn faster"
        at = recipe.at("train.optimizer.lora_plus_ratio")
        raise LoraError(what, at, "leave `lora_plus_ratio` out")
