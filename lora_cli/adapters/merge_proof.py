"""An independent reading of an adapter, which a merge has to agree with.

It goes from the tensors of the file and the weights of the base to the weights that the merged
model must have, one parameter at a time and in float64, by PEFT's definition:

    W + s B A                  of an adapted module, s = alpha / rank (rsLoRA: alpha / sqrt(rank))
    W + s D                    of one with LoHa or LoKr, D multiplied out in `whole_update_proof`
    m (W + s B A) / |W + s B A|     of one with DoRA: the length is that of an output's weights
    the tensor of the file     of a module in `modules_to_save`, under each name by itself, and of
                               a bias or another parameter that was trained
    W                          of all others

It shares no code with the layers, with attaching or with merging. Not the weights are kept but
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
    """What the parameters of a merged model must be, by all of their names."""

    products: dict[str, Tensor]

    def disagreement(self, merged: nn.Module) -> str | None:
        """Return the first parameter of a merged model that is not as expected, else None."""
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
    """Return what the merged model must hold.

    Args:
        base: The base model, before the adapter is attached.
        tensors: Of the adapter's file, by names without PEFT's prefix.
        config: What `adapter_config.json` holds.
    """
    # one name for `lora_A.weight` and for `lora_A.default.weight` of raw state dicts
    tensors = {re.sub(ENDS, r"\1", name): tensor for name, tensor in tensors.items()}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    modules = dict(base.named_modules(remove_duplicate=False))
    copies = {name for name in modules if name.endswith(_copied(config))}
    whole: dict[str, Tensor] = {}  # by the name of one place
    shared: dict[int, Tensor] = {}  # by the parameter, in all of its places
    for name, tensor in tensors.items():
        if (module := re.sub(r"\.token_adapter\..*", "", name)) != name:
            whole |= _with_rows(module, tensor, base, tensors, config)
            continue
        is_added = re.search(ENDS, name) or name.endswith(".base_layer.weight")
        if is_added or ".original_module." in name:
            continue
        place = _place(name, parameters)
        if any(place.startswith(f"{module}.") for module in copies):
            whole[place] = tensor
        elif place in parameters:  # what the base lacks is named by `load_adapter`
            shared[id(parameters[place])] = tensor
    products = {}
    experts = _parameter_updates(modules, tensors, config)
    for name, parameter in parameters.items():
        weight = whole.get(name, shared.get(id(parameter), parameter)).detach().double()
        module, _, last = name.rpartition(".")
        if (found := experts.get(name)) is not None:
            weight = weight + found
        elif last == "weight":
            weight = weight + _update(module, modules[module], tensors, config)
            weight = _with_magnitude(weight, module, modules[module], tensors)
        products[name] = _product(weight)
    return ExpectedWeights(products)


def weights_of(model: nn.Module) -> ExpectedWeights:
    """Return what a copy of a model must hold."""
    named = model.named_parameters(remove_duplicate=False)
    return ExpectedWeights({name: _product(parameter) for name, parameter in named})


def _with_rows(
    module: str, rows: Tensor, base: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the weights with trained rows (`trainable_token_indices`), by names of parameters.

    What shares the input embedding's weight, and has no rows of its own, shares the rows too, where
    the model says what is tied.
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
        return {}  # loading says so
    weight = old.detach().clone()
    for token, row in zip(ids, rows, strict=True):
        weight[token] = row
    embedding: Any = getattr(base, "get_input_embeddings", lambda: None)()
    names = [f"{module}.weight"]
    says_ties = isinstance(getattr(base, "_tied_weights_keys", None), dict)
    if says_ties and base.get_submodule(module) is embedding:
        modules = {name.partition(".token_adapter.")[0] for name in tensors}
        # PEFT writes what follows besides, where it writes the whole embedding
        own = {f"{name}.weight" for name in modules if _token_ids(name, config)}
        names += [name for name, p in parameters.items() if p is old and name not in own]
    return dict.fromkeys(names, weight)


def _token_ids(module: str, config: dict[str, Any]) -> list[int] | None:
    """Return the tokens of which a module has trained rows of its own, as a configuration says."""
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((found for end, found in ids.items() if module.endswith(end)), None)
    return ids


def _copied(config: dict[str, Any]) -> tuple[str, ...]:
    heads = HEADS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    return (*(config.get("modules_to_save") or ()), *heads) or ("\0",)


def _place(name: str, parameters: dict[str, nn.Parameter]) -> str:
    name = name.replace(".base_layer.", ".")
    plain = name.replace(".modules_to_save.", ".")
    return plain if plain in parameters else re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _update(name: str, module: nn.Module, tensors: dict[str, Tensor], config: Any) -> Tensor:
    """Return s B A in the layout of a module's weight, or zero where it is not adapted."""
    if (whole := whole_update(name, module, tensors, config)) is not None:
        return whole
    found: dict[str, Tensor] = {}
    for side in "AB":
        for key in (f"{name}.lora_{side}", f"{name}.lora_embedding_{side}"):
            found |= {side: tensors[key].double()} if key in tensors else {}
    if len(found) < 2:
        return torch.zeros((), dtype=torch.float64)
    a, b, rank = found["A"], found["B"], found["A"].shape[0]
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    s = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        groups, per = module.groups, a.shape[1] // module.groups
        rows = a.shape[0] // groups
        blocks = []
        for g, part in enumerate(b.flatten(1).chunk(groups)):
            own = a[g * rows : (g + 1) * rows, g * per : (g + 1) * per]
            blocks.append(torch.tensordot(part, own, dims=1))
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
        own = owner.named_parameters(recurse=False)
        keys = [key for key, _ in own if ends and f".{module}.{key}".endswith(ends)]
        for i, key in enumerate(keys):
            name, shape = f"{module}.{key}", owner.get_parameter(key).shape
            layer = module + ".base_layer" * (len(keys) - 1 - i)
            if f"{layer}.lora_A" not in tensors:
                continue
            a, b = (tensors[f"{layer}.lora_{side}"].double() for side in "AB")
            count = shape[0] if len(shape) == 3 else 1
            rank = a.shape[0] // count
            fits = rank * count == b.shape[1] and len(b) * a.shape[1] * count == math.prod(shape)
            if not fits:  # loading says so
                updates[name] = torch.zeros((), dtype=torch.float64)
                continue
            alpha = first_match(
                config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)
            )
            s = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            of_each = [s * b[:, e::count] @ a[e * rank : (e + 1) * rank] for e in range(count)]
            delta = torch.stack(of_each)
            if len(shape) == 3 and getattr(owner, "is_transposed", False):
                delta = delta.transpose(1, 2)
            updates[name] = delta.reshape(shape)
    return updates


def _with_magnitude(
    weight: Tensor, name: str, module: nn.Module, tensors: dict[str, Tensor]
) -> Tensor:
    """Return a weight whose outputs have DoRA's lengths, or as it is where they are not given."""
    magnitude = tensors.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return weight
    if isinstance(module, nn.Embedding | Conv1D):  # an output is a column
        return weight / (weight**2).sum(0).sqrt() * magnitude.double()
    lengths = torch.einsum("o...->o", weight**2).sqrt()
    return torch.einsum("o...,o->o...", weight, magnitude.double().flatten() / lengths)


def _product(weight: Tensor) -> Tensor:
    """Return a weight's product with a vector that depends on its shape alone."""
    rows = weight.detach().double().reshape(weight.shape[0] if weight.ndim else 1, -1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    vector = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    return rows @ vector.to(rows.device)
