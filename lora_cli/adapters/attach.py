"""Attach low-rank layers to a model, freeze the rest, merge, and count."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.freeze import frozen_parameters
from lora_cli.adapters.frozen_lower_layers import FrozenLayers
from lora_cli.adapters.initialise import reject_impossible_starts, start_layers
from lora_cli.adapters.lora import LORA_LAYERS, LoRAConv, LoRALayer, Shape
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.mixed_dtypes import let_dtypes_meet
from lora_cli.adapters.targets import (
    Target,
    inside,
    matches,
    resolve_targets,
    unmatched_in_full,
)
from lora_cli.adapters.tied_weights import separate, separate_trained
from lora_cli.adapters.token_rows import (
    TokenRows,
    add_token_rows,
    embedding_names,
    merge_rows,
    sharing,
    token_layers,
)
from lora_cli.adapters.variants import Layers, layer_for, layers_to_train
from lora_cli.errors import LoraError, counted
from lora_cli.models.bundle import Bundle, is_frozen
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import AdapterSpec, Recipe

# --------------------------------------------------------------------------- attach and freeze


def attach(
    model: nn.Module,
    recipe: Recipe,
    head: Iterable[str] = (),
    restored: bool = False,
    token_ids: Sequence[int] = (),
) -> None:
    """Make the model ready for training as the recipe's adapter section says.

    Low-rank layers replace their bases, the base is frozen, and what is trained in full becomes
    float32. The new matrices are drawn from torch's global generator.

    Args:
        model: The base model, changed in place.
        recipe: Its `adapter` section says what is trained.
        head: Names of the modules that the task created.
        restored: The matrices are read from a checkpoint afterwards: where they start needs no
            decomposition of weights.
        token_ids: Tokens of which the rows of the embedding are trained.

    Raises:
        LoraError: As `resolve_targets`, or if `adapter.init` does not fit a target; the model is
            untouched then.
    """
    spec, head = recipe.adapter, list(head)
    kept = frozen_parameters(model, recipe, head)
    if spec.type == "full":
        _train_all(model, recipe, kept)
        return
    targets = resolve_targets(model, recipe, head) if spec.low_rank else []
    if problems := unmatched_in_full(model, recipe):
        raise LoraError(problems)
    reject_impossible_starts(model, targets, recipe)
    in_full = [
        name
        for name, _ in model.named_modules()
        if name in head or (name and matches(spec.train_modules, name))
    ]
    embeddings = _embeddings(model, recipe, targets, in_full, token_ids) if token_ids else []
    separate_trained(model, in_full, recipe)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        layer = add_layer(model, target, layers_to_train(spec), spec.dropout, spec.use_rslora)
        layer.reset_parameters()
    if not restored:
        start_layers(model, lora_layers(model), recipe)
    for name in embeddings:
        add_token_rows(model, name, sorted(token_ids), sharing(model, name))
    for name in in_full:
        for parameter in model.get_submodule(name).parameters():
            _train(parameter)
    _train_biases(model, spec)
    for name in kept:
        model.get_parameter(name).requires_grad_(False)
    if not trainable_parameters(model):
        raise _nothing_trained(recipe)
    let_dtypes_meet(model, head)


def _train_all(model: nn.Module, recipe: Recipe, kept: Collection[str]) -> None:
    """Train every parameter but those of frozen parts, and those that the recipe names."""
    parameters = dict(model.named_parameters())
    trained = {name for name in parameters if name not in kept and not is_frozen(model, name)}
    if not trained:
        raise _nothing_trained(recipe)
    for name, parameter in parameters.items():
        if name in trained:
            _train(parameter)
        else:
            parameter.requires_grad_(False)


def _nothing_trained(recipe: Recipe) -> LoraError:
    if recipe.adapter.frozen_entries:
        what = "`adapter.freeze` leaves nothing to train"
        return LoraError(what, recipe.at("adapter.freeze"), "freeze fewer modules")
    lacking = "bias" if recipe.adapter.type == "bitfit" else "new head"
    what = f"nothing is trained: the model has no {lacking}"
    hint = "`--set adapter.type=lora` trains adapters"
    return LoraError(what, recipe.at("adapter.type"), hint)


def _train_biases(model: nn.Module, spec: AdapterSpec) -> None:
    """Train the biases that the recipe asks for."""
    if spec.type == "bitfit" or (spec.low_rank and spec.bias == "all"):
        for name, module in model.named_modules():
            has_bias = isinstance(module._parameters.get("bias"), nn.Parameter)
            if has_bias and not is_frozen(model, name):
                _train(module._parameters["bias"])
    elif spec.low_rank and spec.bias == "lora_only":
        for layer in lora_layers(model).values():
            if layer.bias is not None:
                _train(layer.bias)


def _embeddings(
    model: nn.Module,
    recipe: Recipe,
    targets: Collection[Target],
    in_full: Collection[str],
    token_ids: Sequence[int],
) -> list[str]:
    """Return the embedding and the output layer of which single rows are trained.

    Raises:
        LoraError: If they have an adapter, have no row of a token, or are trained in full though
            the recipe names tokens.
    """
    key = "adapter.train_tokens" if recipe.adapter.train_tokens else "model.add_tokens"
    names, at = embedding_names(model), recipe.at(key)
    if not names:
        raise LoraError("the model has no embedding of tokens", at, f"leave `{key}` out")
    adapted = {target.name for target in targets}
    for name in names:
        rows = int(model.get_submodule(name).get_parameter("weight").shape[0])
        if max(token_ids) >= rows:
            what = f"`{name}` has rows for {counted(rows, 'token')}, and none for {max(token_ids)}"
            hint = f"name tokens that `{name}` has too: its vocabulary is one of its own"
            raise LoraError(what, at, hint)
        for place in sharing(model, name):
            if place in adapted:
                what = f"`{place}` cannot have an adapter, and single rows that are trained"
                raise LoraError(what, at, f"leave `{place}` out of `adapter.target_modules`")
    full = [name for name in names if any(inside(name, top) for top in in_full)]
    if full and key == "adapter.train_tokens":
        what = f"`{full[0]}` is trained in full, so all of its rows are"
        raise LoraError(what, at, "leave one of the two out")
    return [name for name in names if name not in full]


def add_layer(
    model: nn.Module,
    target: Target,
    layers: Layers = LORA_LAYERS,
    dropout: float = 0.0,
    use_rslora: bool = False,
    shapes: dict[str, Shape] | None = None,
) -> LoRALayer:
    """Put a layer in the place of the module that `target` names, and return it.

    What it adds is zero: `reset_parameters` draws it for a training, `from_peft` loads it.
    """
    parent_name, _, child_name = target.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    base = getattr(parent, child_name)
    if target.parameter is not None:
        layer: LoRALayer = LoRAParameter(
            base, target.parameter, target.rank, target.alpha, use_rslora
        )
    else:
        kind = layer_for(base, layers)
        assert kind is not None, f"{target.name} was resolved but no layer fits it"
        layer = kind(base, target.rank, target.alpha, dropout, use_rslora, shapes)
    layer.train(base.training)
    setattr(parent, child_name, layer)
    return layer


def _train(parameter: torch.Tensor | nn.Parameter | None) -> None:
    assert parameter is not None
    parameter.data = parameter.data.float()  # an optimizer's steps are too small for 16 bits
    parameter.requires_grad_(True)


def adapter_layers(model: nn.Module) -> dict[str, LoRALayer | TokenRows]:
    """Return all that takes the place of modules: low-rank layers, and layers with trained rows."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer | TokenRows)}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the low-rank layers of a model by the names of the modules they replace.

    Of layers that are nested, since they adapt parameters of one module, the outer comes first.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def name_in_base(name: str, layers: Collection[str]) -> str:
    """Return the name that a module of an adapted model has in the model without the adapter."""
    while name.endswith(".base") and name.removesuffix(".base") in layers:
        name = name.removesuffix(".base")
    return name


def remove_layers(model: nn.Module) -> None:
    """Put the bases back into the places of their low-rank layers."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer | TokenRows)
    }
    for name, layer in reversed(layers.items()):  # the inner ones of nested first
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer.base)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the low-rank layers of a model added to it, by name."""
    return {
        f"{module}.{name}": parameter
        for module, layer in adapter_layers(model).items()
        for name, parameter in layer.named_parameters(recurse=False)
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, each once.

    It is this set that is optimized, clipped, checked, counted and kept in a checkpoint.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_mode(model: nn.Module, frozen: FrozenLayers | None = None) -> None:
    """Put the model into training mode, but batch normalisation into eval mode.

    In training mode it would average the new data into its running statistics, which no adapter
    folder holds: the base would drift away from what was saved. It would also normalise by the
    micro-batch, so that how a step is divided would decide what it computes. So its statistics
    stay those of the base, also where its weight and bias are trained.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # instance normalisation too
            module.eval()
    if frozen is not None:
        frozen.evaluate()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Turn the low-rank updates off within the context: the model is its base, bit for bit."""
    layers = list(adapter_layers(model).values())
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
    layers, in_place = lora_layers(model), adapter_layers(model)
    for layer in layers.values():
        if isinstance(layer, LoRAConv):
            layer.delta_weight()  # which not every convolution has: before anything is changed
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name_in_base(name, in_place))
    untied: list[str] = []
    for layer in layers.values():
        sharers = users.get(id(layer.weight), [])
        if len(sharers) > 1:
            untied += [other for other in sharers if other not in untied]
        if layer.weight.is_meta:  # there is only the structure to merge
            merged = torch.empty_like(layer.weight)
        else:  # one at a time: all merged weights together would take as much memory as the base
            merged = layer.merged_weight(layer.weight.detach().float()).to(layer.weight.dtype)
        layer.replace_weight(nn.Parameter(merged, requires_grad=False))
    merge_rows(list(token_layers(model).values()))
    remove_layers(model)
    return untied


def merge_and_untie(model: nn.Module, ties: Iterable[Collection[str]]) -> list[str]:
    """Merge, and give each side of a tie that was parted a weight of its own.

    The sides may have been parted by the low-rank update of one, or by a copy that was trained.

    Args:
        model: Changed in place; also its configuration, if a tie ends.
        ties: The names that shared a parameter in the base.

    Returns:
        Names of modules whose weight was shared and no longer is.
    """
    untied = merge(model)
    parted = [name.rpartition(".")[0] for name in separate(model, ties)]
    untied += [name for name in dict.fromkeys(parted) if name not in untied]
    for name in untied:
        part = model.parts[name.partition(".")[0]] if isinstance(model, Bundle) else model
        config: Any = part.config
        config.tie_word_embeddings = False
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
    """Return a row for every parameter of the model, each counted once however often shared.

    A quantised layer counts as the weights that it stands for.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rows = []
    for name, parameter in model.named_parameters():
        layer, last = layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        shape = tuple(parameter.shape)
        if layer is not None and last != "bias":
            if last != "weight":
                continue  # scales
            shape = (layer.out_features, layer.in_features)
        rows.append(ParameterRow(name, shape, parameter.requires_grad))
    return rows


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
