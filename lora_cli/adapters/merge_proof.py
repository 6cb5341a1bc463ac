"""An independent computation of merged weights, to check merges against.

From the tensors of the adapter's file and the weights of the base, it computes the weights that
the merged model must have, one parameter at a time and in float64, by PEFT's definition:

    W + s B A                  an adapted module; s = alpha / rank (rsLoRA: alpha / sqrt(rank))
    W + s D                    a module with LoHa or LoKr; `whole_update_proof` multiplies D out
    m (W + s B A) / |W + s B A|     a module with DoRA; the norm is over each output's weights
    the tensor of the file     a module in `modules_to_save`, under each of its names separately,
                               and a bias or another trained parameter
    W                          all other parameters

It shares no code with the layers, with attaching or with merging. Instead of the weights, it keeps
their products with a random vector (Freivalds' check): a wrong entry changes the product.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.whole_update_proof import whole_update

HEADS = ("classifier", "score")
ENDS = r"(\.(?:lora|hada|lokr)_\w+?)(?:\.default)?(?:\.weight)?$"
TOLERANCE = 1e-4  # of the largest entry of a product; float32 alone stays below 1e-5


@dataclass
class ExpectedWeights:
    """The expected parameters of a merged model, as products by each parameter name."""

    products: dict[str, Tensor]

    def disagreement(self, merged: nn.Module) -> str | None:
        """Return the first parameter of a merged model that differs from the expected, or None."""
        actual = dict(merged.named_parameters(remove_duplicate=False))
        for name, expected in self.products.items():
            if name not in actual:
                return name
            product = _product(actual[name])
            scale = max(float(expected.abs().max()), 1e-30)
            if not float((product - expected).abs().max()) <= TOLERANCE * scale:
                return name
        return None


@torch.no_grad()
def expected_weights(
    base: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
) -> ExpectedWeights:
    """Return the weights that the merged model must have.

    Args:
        base: The base model, before the adapter is attached.
        tensors: The adapter's tensors, by names without PEFT's prefix.
        config: The contents of `adapter_config.json`.
    """
    # raw state dicts have `lora_A.default.weight` for `lora_A.weight`
    tensors = {re.sub(ENDS, r"\1", name): tensor for name, tensor in tensors.items()}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    modules = dict(base.named_modules(remove_duplicate=False))
    copies = {name for name in modules if name.endswith(_copied_modules(config))}
    own_tensors: dict[str, Tensor] = {}  # by one parameter name
    tied_tensors: dict[int, Tensor] = {}  # by the parameter's id, for all of its names
    for name, tensor in tensors.items():
        if (module := re.sub(r"\.token_adapter\..*", "", name)) != name:
            own_tensors |= _with_rows(module, tensor, base, tensors, config)
            continue
        is_added = re.search(ENDS, name) or name.endswith(".base_layer.weight")
        if is_added or ".original_module." in name:
            continue
        parameter_name = _parameter_name(name, parameters)
        if any(parameter_name.startswith(f"{module}.") for module in copies):
            own_tensors[parameter_name] = tensor
        elif parameter_name in parameters:  # `load_adapter` reports parameters that the base lacks
            tied_tensors[id(parameters[parameter_name])] = tensor
    products = {}
    experts = _parameter_updates(modules, tensors, config)
    for name, parameter in parameters.items():
        weight = own_tensors.get(name, tied_tensors.get(id(parameter), parameter)).detach().double()
        module, _, last = name.rpartition(".")
        if (update := experts.get(name)) is not None:
            weight = weight + update
        elif last == "weight":
            weight = weight + _update(module, modules[module], tensors, config)
            weight = _with_magnitude(weight, module, modules[module], tensors)
        products[name] = _product(weight)
    return ExpectedWeights(products)


def weights_of(model: nn.Module) -> ExpectedWeights:
    """Return a model's own weights as the expected ones, to check a copy of it."""
    parameters = model.named_parameters(remove_duplicate=False)
    return ExpectedWeights({name: _product(parameter) for name, parameter in parameters})


def _with_rows(
    module: str, rows: Tensor, base: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the weights with trained rows (`trainable_token_indices`), by names of parameters.

    Modules tied to the input embedding that have no rows of their own get the same rows, if the
    model declares its ties.
    """
    ids = _token_ids(module, config)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    old = parameters.get(f"{module}.weight")
    if (
        old is None
        or old.ndim != 2
        or not ids
        or rows.shape != (len(ids), old.shape[1])
        or max(ids) >= len(old)
    ):
        return {}  # `load_adapter` reports it
    weight = old.detach().clone()
    for token, row in zip(ids, rows, strict=True):
        weight[token] = row
    embedding: Any = getattr(base, "get_input_embeddings", lambda: None)()
    names = [f"{module}.weight"]
    declares_ties = isinstance(getattr(base, "_tied_weights_keys", None), dict)
    if declares_ties and base.get_submodule(module) is embedding:
        modules = {name.partition(".token_adapter.")[0] for name in tensors}
        # PEFT also writes the rows of tied modules if it writes the whole embedding
        with_own_rows = {f"{name}.weight" for name in modules if _token_ids(name, config)}
        names += [name for name, p in parameters.items() if p is old and name not in with_own_rows]
    return dict.fromkeys(names, weight)


def _token_ids(module: str, config: dict[str, Any]) -> list[int] | None:
    """Return the tokens whose rows a module trains according to the configuration."""
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((tokens for end, tokens in ids.items() if module.endswith(end)), None)
    return ids


def _copied_modules(config: dict[str, Any]) -> tuple[str, ...]:
    heads = HEADS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    return (*(config.get("modules_to_save") or ()), *heads) or ("\0",)


def _parameter_name(name: str, parameters: dict[str, nn.Parameter]) -> str:
    name = name.replace(".base_layer.", ".")
    plain = name.replace(".modules_to_save.", ".")
    return plain if plain in parameters else re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _update(name: str, module: nn.Module, tensors: dict[str, Tensor], config: Any) -> Tensor:
    """Return s B A in the layout of a module's weight, or zero if it is not adapted."""
    if (update := whole_update(name, module, tensors, config)) is not None:
        return update
    factors: dict[str, Tensor] = {}
    for side in "AB":
        for key in (f"{name}.lora_{side}", f"{name}.lora_embedding_{side}"):
            factors |= {side: tensors[key].double()} if key in tensors else {}
    if len(factors) < 2:
        return torch.zeros((), dtype=torch.float64)
    a, b, rank = factors["A"], factors["B"], factors["A"].shape[0]
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    s = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        groups, group_channels = module.groups, a.shape[1] // module.groups
        rows = a.shape[0] // groups
        blocks = []
        for g, part in enumerate(b.flatten(1).chunk(groups)):
            group_a = a[g * rows : (g + 1) * rows, g * group_channels : (g + 1) * group_channels]
            blocks.append(torch.tensordot(part, group_a, dims=1))
        return s * torch.cat(blocks)
    delta = s * (b @ a)
    return delta.T if isinstance(module, nn.Embedding | Conv1D) else delta


def _parameter_updates(
    modules: dict[str, nn.Module], tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the updates of single parameters (`target_parameters`), by their full names.

    A row of A belongs to expert row // rank, and a column of B to expert column % experts.
    """
    ends = tuple(f".{entry}" for entry in config.get("target_parameters") or ())
    updates = {}
    for module, owner in modules.items():
        parameters = owner.named_parameters(recurse=False)
        keys = [key for key, _ in parameters if ends and f".{module}.{key}".endswith(ends)]
        for i, key in enumerate(keys):
            name, shape = f"{module}.{key}", owner.get_parameter(key).shape
            layer = module + ".base_layer" * (len(keys) - 1 - i)
            if f"{layer}.lora_A" not in tensors:
                continue
            a, b = (tensors[f"{layer}.lora_{side}"].double() for side in "AB")
            count = shape[0] if len(shape) == 3 else 1
            rank = a.shape[0] // count
            fits = rank * count == b.shape[1] and len(b) * a.shape[1] * count == math.prod(shape)
            if not fits:  # `load_adapter` reports it
                updates[name] = torch.zeros((), dtype=torch.float64)
                continue
            alpha = first_match(
                config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)
            )
            s = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            deltas = [s * b[:, e::count] @ a[e * rank : (e + 1) * rank] for e in range(count)]
            delta = torch.stack(deltas)
            if len(shape) == 3 and getattr(owner, "is_transposed", False):
                delta = delta.transpose(1, 2)
            updates[name] = delta.reshape(shape)
    return updates


def _with_magnitude(
    weight: Tensor, name: str, module: nn.Module, tensors: dict[str, Tensor]
) -> Tensor:
    """Rescale a weight to DoRA's magnitudes, or return it unchanged if there are none."""
    magnitude = tensors.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return weight
    if isinstance(module, nn.Embedding | Conv1D):  # an output is a column
        return weight / (weight**2).sum(0).sqrt() * magnitude.double()
    lengths = torch.einsum("o...->o", weight**2).sqrt()
    return torch.einsum("o...,o->o...", weight, magnitude.double().flatten() / lengths)


def _product(weight: Tensor) -> Tensor:
    """Return a weight's product with a random vector that depends only on its shape."""
    rows = weight.detach().double().reshape(weight.shape[0] if weight.ndim else 1, -1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    vector = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    return rows @ vector.to(rows.device)
