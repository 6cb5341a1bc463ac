"""Attach an adapter to a model: add low-rank layers, train what the recipe names, freeze the rest.

This module also finds an adapter's layers and parameters in a model, disables and removes them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_cli.adapters.freeze import frozen_parameters
from lora_cli.adapters.frozen_lower_layers import FrozenLayers
from lora_cli.adapters.initialise import check_initialisation, initialise_layers
from lora_cli.adapters.lora import LoRALayer, Shape
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.match_names import inside, matches
from lora_cli.adapters.mixed_dtypes import reconcile_dtypes
from lora_cli.adapters.targets import Target, resolve_targets, unmatched_in_full
from lora_cli.adapters.tied_weights import untie_trained
from lora_cli.adapters.token_rows import (
    TokenRows,
    add_token_rows,
    embedding_names,
    sharing,
)
from lora_cli.adapters.variants import LORA_LAYERS, Layers, layer_for, layers_to_train
from lora_cli.errors import LoraError, counted
from lora_cli.models.bundle import is_frozen
from lora_cli.recipe import AdapterSpec, Recipe


def attach(
    model: nn.Module,
    recipe: Recipe,
    head: Iterable[str] = (),
    restored: bool = False,
    token_ids: Sequence[int] = (),
) -> None:
    """Add the adapter that the recipe asks for, and freeze everything that is not trained.

    Parameters that are trained directly, not through an adapter layer, become float32. Random
    initial values are drawn from torch's global generator.

    Args:
        model: The base model; it is changed in place.
        recipe: Its `adapter` section says what is trained.
        head: The names of the modules that the task created; they are trained in full.
        restored: Whether the parameters are loaded from a checkpoint afterwards, so that their
            initial values need not be computed from the base's weights.
        token_ids: The tokens whose rows of the embedding are trained.

    Raises:
        LoraError: As `resolve_targets`, or if `adapter.init` is impossible for a target. The
            model is then unchanged.
    """
    spec, head = recipe.adapter, list(head)
    frozen_by_recipe = frozen_parameters(model, recipe, head)
    if spec.type == "full":
        _train_all_but(model, recipe, frozen_by_recipe)
        return
    targets = resolve_targets(model, recipe, head) if spec.low_rank else []
    if problems := unmatched_in_full(model, recipe):
        raise LoraError(problems)
    check_initialisation(model, targets, recipe)
    in_full = [
        name
        for name, _ in model.named_modules()
        if (name in head or (name and matches(spec.train_modules, name)))
        and not is_frozen(model, name)
    ]
    embeddings = _token_embeddings(model, recipe, targets, in_full, token_ids) if token_ids else []
    untie_trained(model, in_full, recipe)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        layer = add_layer(model, target, layers_to_train(spec), spec.dropout, spec.use_rslora)
        layer.reset_parameters()
    if not restored:
        initialise_layers(model, lora_layers(model), recipe)
    for name in embeddings:
        add_token_rows(model, name, sorted(token_ids), sharing(model, name))
    for name in in_full:
        for parameter in model.get_submodule(name).parameters():
            _train(parameter)
    _train_biases(model, spec)
    for name in frozen_by_recipe:
        model.get_parameter(name).requires_grad_(False)
    if not trainable_parameters(model):
        raise _nothing_trained(recipe)
    reconcile_dtypes(model, head)


def _train(parameter: torch.Tensor | nn.Parameter | None) -> None:
    """Make a parameter trainable, in float32."""
    assert parameter is not None
    parameter.data = parameter.data.float()  # 16 bits cannot hold an optimizer's small changes
    parameter.requires_grad_(True)


def _train_all_but(model: nn.Module, recipe: Recipe, frozen_by_recipe: Collection[str]) -> None:
    """Train all parameters, except those of frozen submodels and those that the recipe freezes."""
    parameters = dict(model.named_parameters())
    trained = {
        name for name in parameters if name not in frozen_by_recipe and not is_frozen(model, name)
    }
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


def _token_embeddings(
    model: nn.Module,
    recipe: Recipe,
    targets: Collection[Target],
    in_full: Collection[str],
    token_ids: Sequence[int],
) -> list[str]:
    """Return the embedding and the output layer in which single rows are trained, by name.

    Raises:
        LoraError: If one of them has an adapter, has no row for a token, or is trained in full
            although the recipe names tokens.
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
        for tied_name in sharing(model, name):
            if tied_name in adapted:
                what = f"`{tied_name}` cannot have an adapter, and single rows that are trained"
                raise LoraError(what, at, f"leave `{tied_name}` out of `adapter.target_modules`")
    trained_in_full = [name for name in names if any(inside(name, top) for top in in_full)]
    if trained_in_full and key == "adapter.train_tokens":
        what = f"`{trained_in_full[0]}` is trained in full, so all of its rows are"
        raise LoraError(what, at, "leave one of the two out")
    return [name for name in names if name not in trained_in_full]


def add_layer(
    model: nn.Module,
    target: Target,
    layers: Layers = LORA_LAYERS,
    dropout: float = 0.0,
    use_rslora: bool = False,
    shapes: dict[str, Shape] | None = None,
) -> LoRALayer:
    """Wrap the module that `target` names in an adapter layer, and return the layer.

    The update is zero until `reset_parameters` or `from_peft` is called.
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


def adapter_layers(model: nn.Module) -> dict[str, LoRALayer | TokenRows]:
    """Return the adapter layers of a model: low-rank layers, and embeddings with trained rows."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer | TokenRows)}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the low-rank layers of a model, by the names of the modules that they replaced.

    Layers that adapt two parameters of one module are nested; the outer one comes first.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def name_in_base(name: str, layers: Collection[str]) -> str:
    """Return the name that a module of an adapted model had before the adapter was added."""
    while name.endswith(".base") and name.removesuffix(".base") in layers:
        name = name.removesuffix(".base")
    return name


def remove_layers(model: nn.Module) -> None:
    """Undo `attach`: put the adapted modules back in place of their adapter layers."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer | TokenRows)
    }
    for name, layer in reversed(layers.items()):  # the inner one of nested layers first
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer.base)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the adapter layers of a model added to it, by name."""
    return {
        f"{module}.{name}": parameter
        for module, layer in adapter_layers(model).items()
        for name, parameter in layer.named_parameters(recurse=False)
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, each once.

    The optimizer, clipping, the checks for NaN, the counts and the checkpoints all use this set.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_mode(model: nn.Module, frozen: FrozenLayers | None = None) -> None:
    """Put the model into training mode, but its batch normalisation into eval mode.

    In training mode, batch normalisation would update its running statistics, which an adapter
    folder does not contain, so the saved adapter would not fit the original base. It would also
    normalise by the micro-batch, so the result would depend on the size of the micro-batches.

    Args:
        model: The model.
        frozen: The layers below the first trained one, which go into eval mode too.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # instance normalisation too
            module.eval()
    if frozen is not None:
        frozen.evaluate()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapter within the context: the model then computes what its base computes."""
    layers = list(adapter_layers(model).values())
    states = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, states, strict=True):
            layer.enabled = enabled
