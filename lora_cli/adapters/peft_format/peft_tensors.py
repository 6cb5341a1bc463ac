"""What the tensors of PEFT's file are: the layers' own, whole parameters, or copies of the base."""

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

TOGETHER = f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together: copy both again"


@dataclass
class SortedTensors:
    """The tensors of an adapter's file, by what they are."""

    of_layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What each adapted module's layer adds, by the names of modules and the layer's own names."""
    plain: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the model that are trained, by the model's names."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the base, which PEFT writes besides."""
    problems: list[Problem] = field(default_factory=list)


def sort_tensors(
    tensors: dict[str, Tensor], kind: AdapterType, parameters: Collection[str]
) -> SortedTensors:
    """Return the tensors of a file by what they are, with a problem for each that is not known.

    Args:
        tensors: By names without PEFT's prefix.
        kind: The type of the adapter, by its configuration.
        parameters: Names of the model's parameters.
    """
    own_names, found = _own_names(kind), SortedTensors()
    other_names = {name for other in LOW_RANK_TYPES for name in _own_names(other)}
    for name, tensor in tensors.items():
        added, module = ADDED.fullmatch(name), adapted_module(name)
        copied = ".original_module." in name or ".modules_to_save." in name
        if module is not None and copied:
            what = f"`{name}`: a module is both adapted and trained in full"
            found.problems.append(Problem(what, hint="train it again with only one of the two"))
        elif added and added[2] in own_names:
            found.of_layers.setdefault(added[1], {})[own_names[added[2]]] = tensor
        elif added and added[2] in other_names:
            what = f"`{name}` does not belong to an adapter of type `{kind}`, as the configuration "
            found.problems.append(Problem(f"{what}says it is", hint=TOGETHER))
        elif module is not None:
            what = f"`{name}` is of a kind that this tool does not support"
            hint = f"it reads what an adapter of type `{kind}` has: merge the rest in PEFT"
            found.problems.append(Problem(what, hint=hint))
        elif name.endswith(".base_layer.weight"):  # of an embedding: PEFT writes it besides
            owner = name.removesuffix(".base_layer.weight").removesuffix(".token_adapter")
            found.frozen[f"{owner}.weight"] = tensor
        elif ".original_module." not in name:  # the head before training: PEFT's `bias: all`
            short = _parameter_name(name, parameters)
            if short in found.plain and not torch.equal(found.plain[short], tensor):
                what = f"`{short}` has two values in it"
                found.problems.append(Problem(what, hint=TOGETHER))
            found.plain[short] = tensor
    some = {name for layer in layers_of(kind) for name in layer.sometimes}
    needed = set(own_names.values()) - some
    for module, own in list(found.of_layers.items()):
        if not needed <= set(own):
            what = f"`{module}` has only {', '.join(sorted(own))}"
            found.problems.append(Problem(what, hint=TOGETHER))
            del found.of_layers[module]
    return found


def _own_names(kind: AdapterType) -> dict[str, str]:
    """Return the layers' names of what a type of adapter adds, by PEFT's, without `.weight`."""
    return {
        peft.removesuffix(".weight"): own
        for layer in layers_of(kind)
        for own, peft in layer.peft_names.items()
    }


def _parameter_name(name: str, parameters: Collection[str]) -> str:
    """Return the model's name of a parameter that PEFT trained as it is.

    PEFT's `bias: all` writes a copied module's biases under its own names besides:
    `classifier.modules_to_save.bias`, and `classifier.modules_to_save.default.dense.bias` with the
    adapter's name where the module has children.
    """
    name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
    module, is_copy, rest = name.partition(".modules_to_save.")
    if not is_copy:
        return name
    without = f"{module}.{rest.partition('.')[2]}"
    return without if without in parameters else f"{module}.{rest}"
