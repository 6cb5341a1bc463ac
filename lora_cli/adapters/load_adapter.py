"""Load an adapter folder onto its base model, after checking that all of it fits.

The tensors determine which modules are adapted and with which rank; the configuration gives alpha.
Every tensor that the configuration promises has to be present.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.attach import adapter_parameters, add_layer
from lora_cli.adapters.check_adapter import (
    check_buffers,
    check_layers,
    check_parameters,
    ignore_trained_rows,
    misfit_error,
    missing_tensors,
    module_of,
)
from lora_cli.adapters.mixed_dtypes import reconcile_dtypes
from lora_cli.adapters.peft_format.adapter_folder import (
    AdapterFolder,
)
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.peft_format.peft_rules import (
    copied_modules,
)
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_tokens import (
    saved_rows,
    split_rows,
)
from lora_cli.adapters.peft_format.saved_buffers import persistent_buffers, without_buffers
from lora_cli.adapters.tied_weights import tied_groups, untie
from lora_cli.adapters.token_rows import add_token_rows, embedding_names
from lora_cli.adapters.variants import layers_of
from lora_cli.models.fingerprint import Fingerprint, require_base
from lora_cli.recipe import Recipe


def load_adapter(
    model: nn.Module,
    adapter: AdapterFolder,
    new: list[str],
    dropout: float = 0.0,
    trained: bool = False,
    drawn: Collection[str] | None = None,
) -> None:
    """Attach an adapter to its base model and load its weights.

    Args:
        model: The base model, changed in place.
        adapter: The adapter, as `read_adapter` returns it.
        new: Names of the modules that the task adds to the pretrained model: its head.
        dropout: The dropout probability of the low-rank layers in training.
        trained: Whether to train the adapter and the head further, instead of freezing them.
        drawn: Names of parameters that the base checkpoint lacks, so the adapter must hold them;
            None for all parameters of `new`. Like PEFT, use a head that only the base holds.

    Raises:
        IntegrityError: With all misfit or missing tensors; the model is then unchanged.
    """
    use_names_of(model, adapter)
    buffer_problems = check_buffers(adapter.tensors, persistent_buffers(model))
    adapter = replace(adapter, tensors=without_buffers(adapter.tensors, model))
    adapter, rows = split_rows(with_current_names(adapter, model))
    parameters, layers = _parameters(model), layers_of(adapter.type)
    tensors = sort_tensors(adapter.tensors, adapter.type, parameters)
    full = tensors.full_parameters
    untied = untied_parameters(model, adapter.config, full)
    targets, layer_problems = check_layers(tensors.by_layer, model, adapter, layers)
    rows_to_load, row_problems = saved_rows(model, rows, adapter)
    problems = [*buffer_problems, *tensors.problems, *layer_problems, *row_problems]
    base_copies = ignore_trained_rows(tensors.base_copies, rows_to_load, parameters)
    problems += check_parameters(
        full, base_copies, parameters, untied, embedding_names(model), tensors.by_layer
    )
    missing = missing_tensors(adapter, model, parameters, full, new, drawn)
    if problems or missing:
        raise misfit_error(problems, missing, adapter)
    model.requires_grad_(False)
    untie(model, untied)
    parameters = _parameters(model)
    with torch.no_grad():
        for name, (target, shapes) in targets.items():
            use_rslora = bool(adapter.config.get("use_rslora"))
            layer = add_layer(model, target, layers, dropout, use_rslora, shapes)
            for key, tensor in tensors.by_layer[name].items():
                layer.from_peft(key, tensor)
        for saved in rows_to_load:
            token_rows = add_token_rows(model, saved.name, saved.token_ids, saved.others)
            token_rows.from_peft("rows", saved.rows)
        for name in sorted(full, key=untied.__contains__):  # untied copies after the originals
            parameter = parameters[name]
            parameter.data = full[name].to(parameter.device, torch.float32)
    head = [] if not trained else [n for n in parameters if n not in full and module_of(n, new)]
    for name in head:
        parameters[name].data = parameters[name].data.float()
    reconcile_dtypes(model, new)
    _train_alone(model, [parameters[name] for name in [*full, *head]], trained)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by all of their names; tied ones have several."""
    return dict(model.named_parameters(remove_duplicate=False))


def _train_alone(model: nn.Module, in_full: list[nn.Parameter], trained: bool) -> None:
    """Freeze all parameters, except those of the adapter if it is trained further."""
    of_adapter = {id(parameter) for parameter in in_full}
    of_adapter |= {id(parameter) for parameter in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(trained and id(parameter) in of_adapter)


def untied_parameters(
    model: nn.Module, config: dict[str, Any], full_parameters: dict[str, Tensor]
) -> list[str]:
    """Return the parameters that must be untied, because PEFT's `modules_to_save` copies them.

    If all parameters of a tie are saved and equal, they stay tied.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    copied = copied_modules(names, config)
    untied = []
    for group in tied_groups(model):
        saved = [name for name in group if name in full_parameters]
        same = all(torch.equal(full_parameters[name], full_parameters[saved[0]]) for name in saved)
        if len(saved) < len(group) or not same:
            untied += [n for n in saved if any(n.startswith(f"{top}.") for top in copied)]
    return untied


def verify_base(
    adapter: AdapterFolder, base: Fingerprint | None, recipe: Recipe
) -> Fingerprint | None:
    """Reject an adapter that was trained on another base model.

    Args:
        adapter: The adapter, as `read_adapter` returns it.
        base: The fingerprint of the base that it is to be attached to.
        recipe: Names that base, and may allow another.

    Returns:
        The fingerprint to save with a result that is made from the adapter.
    """
    return require_base(adapter.base, base, recipe, f"the adapter {adapter.path}", adapter.tensors)


def without_copies(model: nn.Module, adapter: AdapterFolder) -> AdapterFolder:
    """Return an adapter without the copies of base weights that PEFT also saves.

    The copies are compared with the model here, before another adapter changes the base.

    Raises:
        IntegrityError: If they differ from the model's weights.
    """
    parameters = _parameters(model)
    base_copies = sort_tensors(adapter.tensors, adapter.type, parameters).base_copies
    if problems := check_parameters({}, base_copies, parameters, [], embedding_names(model)):
        raise misfit_error(problems, [], adapter)
    tensors = {n: t for n, t in adapter.tensors.items() if not n.endswith(".base_layer.weight")}
    return replace(adapter, tensors=tensors)
