"""Sort the tensors of PEFT's file: of adapter layers, full parameters, or copies of the base."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_cli.adapters.peft_format.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from lora_cli.adapters.peft_format.tensor_names import ADDED, adapted_module
from lora_cli.adapters.variants import layers_of
from lora_cli.errors import Problem
from lora_cli.recipe import LOW_RANK_TYPES, AdapterType

MISMATCH_HINT = f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together: copy both again"


@dataclass
class SortedTensors:
    """The tensors of an adapter's file by kind."""

    by_layer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The parameters of adapter layers, by module name and by the layer's parameter names."""
    full_parameters: dict[str, Tensor] = field(default_factory=dict)
    """Trained parameters of the model, by the model's names."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies of base parameters, which PEFT also writes."""
    problems: list[Problem] = field(default_factory=list)


def sort_tensors(
    tensors: dict[str, Tensor], kind: AdapterType, parameters: Collection[str]
) -> SortedTensors:
    """Sort the tensors of a file by kind, with a problem for each unknown tensor.

    Args:
        tensors: The tensors by names without PEFT's prefix.
        kind: The adapter's type according to its configuration.
        parameters: Names of the model's parameters.
    """
    own_names, result = _names_by_peft(kind), SortedTensors()
    other_names = {name for other_kind in LOW_RANK_TYPES for name in _names_by_peft(other_kind)}
    for name, tensor in tensors.items():
        added, module = ADDED.fullmatch(name), adapted_module(name)
        copied = ".original_module." in name or ".modules_to_save." in name
        if module is not None and copied:
            what = f"`{name}`: a module is both adapted and trained in full"
            result.problems.append(Problem(what, hint="train it again with only one of the two"))
        elif added and added[2] in own_names:
            result.by_layer.setdefault(added[1], {})[own_names[added[2]]] = tensor
        elif added and added[2] in other_names:
            what = f"`{name}` does not belong to an adapter of type `{kind}`, as the configuration "
            result.problems.append(Problem(f"{what}says it is", hint=MISMATCH_HINT))
        elif module is not None:
            what = f"`{name}` is of a kind that this tool does not support"
            hint = f"it reads what an adapter of type `{kind}` has: merge the rest in PEFT"
            result.problems.append(Problem(what, hint=hint))
        elif name.endswith(".base_layer.weight"):  # PEFT also writes the weights of embeddings
            owner = name.removesuffix(".base_layer.weight").removesuffix(".token_adapter")
            result.base_copies[f"{owner}.weight"] = tensor
        elif ".original_module." not in name:  # PEFT's `bias: all` writes the untrained head too
            parameter = _parameter_name(name, parameters)
            if parameter in result.full_parameters and not torch.equal(
                result.full_parameters[parameter], tensor
            ):
                what = f"`{parameter}` has two values in it"
                result.problems.append(Problem(what, hint=MISMATCH_HINT))
            result.full_parameters[parameter] = tensor
    optional = {name for layer in layers_of(kind) for name in layer.optional_parameters}
    required = set(own_names.values()) - optional
    for module, present in list(result.by_layer.items()):
        if not required <= set(present):
            what = f"`{module}` has only {', '.join(sorted(present))}"
            result.problems.append(Problem(what, hint=MISMATCH_HINT))
            del result.by_layer[module]
    return result


def _names_by_peft(kind: AdapterType) -> dict[str, str]:
    """Map PEFT's parameter names, without `.weight`, to those of a type's layers."""
    return {
        peft_name.removesuffix(".weight"): name
        for layer in layers_of(kind)
        for name, peft_name in layer.peft_names.items()
    }


def _parameter_name(name: str, parameters: Collection[str]) -> str:
    """Return the model's name of a parameter that PEFT trained in full.

    PEFT's `bias: all` also writes the biases of a copied module under its own names:
    `classifier.modules_to_save.bias`, or `classifier.modules_to_save.default.dense.bias` with the
    adapter's name if the module has children.
    """
    name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
    module, is_copy, rest = name.partition(".modules_to_save.")
    if not is_copy:
        return name
    without = f"{module}.{rest.partition('.')[2]}"
    return without if without in parameters else f"{module}.{rest}"
