"""Optimizers, parameter groups and schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.attach import adapter_parameters, trainable_parameters
from lora_cli.adapters.targets import inside, layer_index, parse_layers
from lora_cli.errors import LoraError
from lora_cli.recipe import OptimizerSpec, Recipe, SchedulerSpec
from lora_cli.recipe.spec import ParameterGroupSpec


def build_optimizer(
    model: nn.Module, recipe: Recipe, in_full: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the trained parameters.

    Each parameter group holds `names`, the names of its parameters, in the same order.

    Args:
        model: The model with its adapter attached.
        recipe: Its `train.optimizer` section says which.
        in_full: Names of the modules trained in full: the `head` of the recipe's groups.

    Raises:
        LoraError: If a group matches nothing, or a package is missing.
    """
    spec = recipe.train.optimizer
    groups = parameter_groups(model, recipe, in_full)
    on_gpu = next(model.parameters()).is_cuda
    match spec.type:
        case "adamw":
            return torch.optim.AdamW(
                groups, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, fused=on_gpu or None
            )
        case "adamw_8bit":
            try:
                import bitsandbytes
            except ImportError as error:
                raise LoraError(
                    "`adamw_8bit` needs bitsandbytes",
                    recipe.at("train.optimizer.type"),
                    "pip install 'lora-cli[quantization]'",
                ) from error
            optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
                groups, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps
            )
            return optimizer
        case "sgd":
            return torch.optim.SGD(groups, momentum=spec.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups)


def parameter_groups(
    model: nn.Module, recipe: Recipe, in_full: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return parameters with the same learning rate and weight decay together."""
    spec = recipe.train.optimizer
    _reject_empty_layer_groups(model, recipe)
    adapters = adapter_parameters(model).keys()
    _reject_ratio_of_nothing(adapters, recipe)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable_parameters(model).items():
        is_head = any(inside(name, module) for module in in_full)
        kind = "adapter" if name in adapters else "head" if is_head else None
        rate, decay = _settings(name, kind, spec)
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


def _settings(name: str, kind: str | None, spec: OptimizerSpec) -> tuple[float, float]:
    """Return the learning rate and the weight decay of a parameter."""
    layer = layer_index(name)
    chosen = next(
        (group for layers, group in spec.groups.layers.items() if layer in parse_layers(layers)),
        getattr(spec.groups, kind) if kind else ParameterGroupSpec(),
    )
    rate, decay = chosen.learning_rate, chosen.weight_decay
    return (
        spec.learning_rate if rate is None else rate,
        spec.weight_decay if decay is None else decay,
    )


def _reject_empty_layer_groups(model: nn.Module, recipe: Recipe) -> None:
    trained = {layer_index(name) for name in trainable_parameters(model)}
    for layers in recipe.train.optimizer.groups.layers:
        chosen = parse_layers(layers)
        if not any(i in chosen for i in trained if i is not None):
            with_any = sorted(i for i in trained if i is not None)
            hint = f"layers with trained parameters are {', '.join(map(str, with_any)) or 'none'}"
            at = recipe.at(f"train.optimizer.groups.layers.{layers}")
            raise LoraError(f"nothing is trained in layers {layers}", at, hint)


def _reject_ratio_of_nothing(adapters: Collection[str], recipe: Recipe) -> None:
    """Reject LoRA+ for an adapter without B: of another type, or of single rows alone."""
    without = not any(name.endswith("lora_B") for name in adapters)
    if recipe.train.optimizer.lora_plus_ratio is not None and recipe.adapter.low_rank and without:
        what = "nothing that is trained has a `lora_B`, which LoRA+ lets learn faster"
        at = recipe.at("train.optimizer.lora_plus_ratio")
        raise LoraError(what, at, "leave `lora_plus_ratio` out")


def learning_rate_factor(spec: SchedulerSpec, step: int, total_steps: int) -> float:
    """Return what the learning rates are multiplied by at a step, counted from 1.

    The curves are those of transformers' `get_scheduler`, so that published settings carry over.
    """
    warmup = (
        spec.warmup_steps
        if spec.warmup_steps is not None
        else math.ceil((spec.warmup_ratio or 0.0) * total_steps)
    )
    done = step - 1
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / (total_steps - warmup)  # some steps are left: `done` is not last
    match spec.type:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's learning rate; return the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)
