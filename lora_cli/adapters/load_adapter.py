"""Load an adapter folder onto its base model, once everything about it is checked.

The tensors say which modules are adapted and with which rank, the configuration says alpha, and
what the configuration promises has to be there.
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
    misfit_error,
    missing_tensors,
    module_of,
    without_trained_rows,
)
from lora_cli.adapters.mixed_dtypes import let_dtypes_meet
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
from lora_cli.adapters.tied_weights import give_own_parameters, tied_groups
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
        adapter: What `read_adapter` returned.
        new: Names of modules that the task adds to the pretrained model: its head.
        dropout: Of the low-rank layers, where they are trained.
        trained: What the adapter holds is trained further, and the head; else nothing is.
        drawn: Names of parameters that the base checkpoint does not hold, so that the adapter must;
            None: all those of `new`. A head that only the base holds is used, as PEFT does.

    Raises:
        IntegrityError: With every tensor that does not fit the model or is missing; the model is
            untouched then.
    """
    use_names_of(model, adapter)
    changed = check_buffers(adapter.tensors, persistent_buffers(model))
    adapter = replace(adapter, tensors=without_buffers(adapter.tensors, model))
    adapter, rows = split_rows(with_current_names(adapter, model))
    parameters, layers = _parameters(model), layers_of(adapter.type)
    tensors = sort_tensors(adapter.tensors, adapter.type, parameters)
    plain, own = tensors.plain, own_parameters(model, adapter.config, tensors.plain)
    chosen, of_layers = check_layers(tensors.of_layers, model, adapter, layers)
    of_tokens, of_rows = saved_rows(model, rows, adapter)
    problems = [*changed, *tensors.problems, *of_layers, *of_rows]
    frozen = without_trained_rows(tensors.frozen, of_tokens, parameters)
    problems += check_parameters(
        plain, frozen, parameters, own, embedding_names(model), tensors.of_layers
    )
    missing = missing_tensors(adapter, model, parameters, plain, new, drawn)
    if problems or missing:
        raise misfit_error(problems, missing, adapter)
    model.requires_grad_(False)
    give_own_parameters(model, own)
    parameters = _parameters(model)
    with torch.no_grad():
        for name, (target, shapes) in chosen.items():
            use_rslora = bool(adapter.config.get("use_rslora"))
            layer = add_layer(model, target, layers, dropout, use_rslora, shapes)
            for key, tensor in tensors.of_layers[name].items():
                layer.from_peft(key, tensor)
        for saved in of_tokens:
            token_rows = add_token_rows(model, saved.name, saved.token_ids, saved.others)
            token_rows.from_peft("rows", saved.rows)
        for name in sorted(plain, key=own.__contains__):  # a copy, after what it was a copy of
            parameter = parameters[name]
            parameter.data = plain[name].to(parameter.device, torch.float32)
    of_base = [] if not trained else [n for n in parameters if n not in plain and module_of(n, new)]
    for name in of_base:
        parameters[name].data = parameters[name].data.float()
    let_dtypes_meet(model, new)
    _train_alone(model, [parameters[name] for name in [*plain, *of_base]], trained)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by all their names: tied ones have several."""
    return dict(model.named_parameters(remove_duplicate=False))


def _train_alone(model: nn.Module, in_full: list[nn.Parameter], trained: bool) -> None:
    """Let what the adapter holds be trained, or nothing."""
    loaded = {id(parameter) for parameter in in_full}
    loaded |= {id(parameter) for parameter in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(trained and id(parameter) in loaded)


def own_parameters(model: nn.Module, config: dict[str, Any], plain: dict[str, Tensor]) -> list[str]:
    """Return the names of parameters that leave their tie: those of PEFT's `modules_to_save`.

    Where all sides of a tie are named and are equal, it stays one.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    copied = copied_modules(names, config)
    own = []
    for group in tied_groups(model):
        named = [name for name in group if name in plain]
        same = all(torch.equal(plain[name], plain[named[0]]) for name in named)
        if len(named) < len(group) or not same:
            own += [n for n in named if any(n.startswith(f"{top}.") for top in copied)]
    return own


def verify_base(
    adapter: AdapterFolder, base: Fingerprint | None, recipe: Recipe
) -> Fingerprint | None:
    """Reject an adapter of another base, and return what to keep beside what is made of it.

    Args:
        adapter: What `read_adapter` returned.
        base: The fingerprint of the base that it is to be attached to.
        recipe: Names that base, and may allow another.
    """
    return require_base(adapter.base, base, recipe, f"the adapter {adapter.path}", adapter.tensors)


def without_copies(model: nn.Module, adapter: AdapterFolder) -> AdapterFolder:
    """Return an adapter without the weights of the base that PEFT writes besides.

    They are compared here, before another adapter changes the base.

    Raises:
        IntegrityError: If they are not those of the model.
    """
    parameters = _parameters(model)
    frozen = sort_tensors(adapter.tensors, adapter.type, parameters).frozen
    if problems := check_parameters({}, frozen, parameters, [], embedding_names(model)):
        raise misfit_error(problems, [], adapter)
    rest = {n: t for n, t in adapter.tensors.items() if not n.endswith(".base_layer.weight")}
    return replace(adapter, tensors=rest)
