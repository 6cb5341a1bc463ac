"""Attach low-rank layers to a model, freeze the rest, merge, and count."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALayer, layer_for
from lora_cli.adapters.targets import Target, inside, matches, resolve_targets, unmatched_in_full
from lora_cli.adapters.tied_weights import give_own_parameters, tied_groups
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe

# --------------------------------------------------------------------------- attach and freeze


def attach(model: nn.Module, recipe: Recipe, head: Iterable[str] = ()) -> None:
    """Make the model ready for training as the recipe's adapter section says.

    Low-rank layers replace their bases, the base is frozen, and what is trained in full becomes
    float32. The new matrices are drawn from torch's global generator.

    Args:
        model: The base model, changed in place.
        recipe: Its `adapter` section says what is trained.
        head: Names of the modules that the task created.

    Raises:
        LoraError: As `resolve_targets`; the model is untouched then.
    """
    spec, head = recipe.adapter, list(head)
    if spec.type == "full":
        for parameter in model.parameters():
            _train(parameter)
        return
    targets = resolve_targets(model, recipe, head) if spec.low_rank else []
    if problems := unmatched_in_full(model, recipe):
        raise LoraError(problems)
    in_full = [
        name
        for name, _ in model.named_modules()
        if name in head or (name and matches(spec.train_modules, name))
    ]
    _part_ties(model, in_full, recipe)
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
    if not trainable_parameters(model):
        lacking = "bias" if spec.type == "bitfit" else "new head"
        what = f"nothing is trained: the model has no {lacking}"
        raise LoraError(
            what, recipe.at("adapter.type"), "`--set adapter.type=lora` trains adapters"
        )
    even_norms(model)
    compute_in_own_dtype(model, head)


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
    """Make every normalisation with a float32 bias float32 as a whole: torch takes no mixture."""
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None or weight.ndim != 1:
            continue
        if bias.dtype == torch.float32:
            weight.data = weight.data.float()
            for name, statistic in module._buffers.items():  # of batch normalisation
                if statistic is not None and statistic.is_floating_point():
                    module._buffers[name] = statistic.float()


def compute_in_own_dtype(model: nn.Module, head: Iterable[str]) -> None:
    """Let the float32 parameters of a 16-bit model meet its activations, where autocast does not.

    A module that is float32 as a whole computes in float32. Of one that also holds 16-bit weights
    (a linear layer whose bias is trained), the float32 parameters are cast at their use.

    Args:
        model: The model with its adapter attached.
        head: Modules whose outputs stay float32; those of others return to their input's dtype.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    base_dtype = next((dtype for dtype in dtypes if dtype.itemsize == 2), None)
    if base_dtype is None:
        return
    head = list(head)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        wide = [key for key, p in own.items() if p.dtype == torch.float32]
        if isinstance(module, LoRALayer) or not wide:
            continue
        if any(p.dtype == base_dtype for p in module.parameters()):
            _cast_at_use(module, wide, base_dtype)
            continue
        module.register_forward_pre_hook(_to_float32)
        if not any(inside(name, top) for top in head):
            module.register_forward_hook(functools.partial(_from_float32, base_dtype))


def _cast_at_use(module: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    """Let a module's forward see some of its own parameters in another dtype."""
    # a partial, whose module a copy of the model exchanges for its own, as of no closure
    forward = functools.partial(_forward_with_casts, module, module.forward, names, dtype)
    module.forward = forward


def _forward_with_casts(
    module: nn.Module,
    forward: Callable[..., Any],
    names: list[str],
    dtype: torch.dtype,
    *inputs: Any,
    **options: Any,
) -> Any:
    kept = {name: module._parameters[name] for name in names}
    if any(p is not None and torch.is_autocast_enabled(p.device.type) for p in kept.values()):
        return forward(*inputs, **options)
    try:
        for name, parameter in kept.items():
            assert parameter is not None
            module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]  # no leaf
        return forward(*inputs, **options)
    finally:
        module._parameters.update(kept)


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not torch.is_autocast_enabled(value.device.type)
        else value
        for value in inputs
    )


def _from_float32(
    dtype: torch.dtype, _module: nn.Module, _inputs: tuple[Any, ...], output: Any
) -> Any:
    if isinstance(output, Tensor) and not torch.is_autocast_enabled(output.device.type):
        return output.to(dtype)
    return output


def _part_ties(model: nn.Module, in_full: list[str], recipe: Recipe) -> None:
    """Reject half of a tie among the modules trained in full, or give each a copy of its own.

    Raises:
        LoraError: If one of two modules that share a weight is to be trained, and the recipe does
            not allow to part them.
    """
    for names in tied_groups(model):
        owners = {name: name.rpartition(".")[0] for name in names}
        trained = [n for n, owner in owners.items() if any(inside(owner, top) for top in in_full)]
        if not recipe.adapter.ensure_weight_tying:
            give_own_parameters(model, trained)
        elif trained and len(trained) < len(names):
            other = next(owner for name, owner in owners.items() if name not in trained)
            raise LoraError(
                f"`{owners[trained[0]]}` shares its weight with `{other}`",
                recipe.at("adapter.train_modules"),
                "name both, or neither; `adapter.ensure_weight_tying: false` trains a copy of it",
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
