"""Choose the modules that get an adapter if the recipe has no `adapter.target_modules`.

A task names its usual targets in `default_targets` of its spec (`recipe/spec/`).
"""

from __future__ import annotations

from typing import Literal

import regex
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.match_names import matches

# the names of the query and value projections in encoders of transformers
QUERY_VALUE_NAMES = (
    "query",
    "value",
    "q_proj",
    "v_proj",
    "q_lin",
    "v_lin",
    "q",
    "v",
    "c_attn",
    "query_proj",
    "value_proj",
    "Wqkv",
    "in_proj",
    "query_key_value",
)

GATES = regex.compile(r"(^|\.)(squeeze_excite|squeeze_excitation|se|se_module)(\.|$)")


def default_targets(
    model: nn.Module,
    usual: Literal["attention", "layers"] | tuple[str, ...],
    adaptable: dict[str, nn.Module],
) -> tuple[str | list[str], list[str]]:
    """Return the default value of `adapter.target_modules`, and the modules that it matches.

    Args:
        model: The base model.
        usual: The usual targets of the task: query and value projections (`attention`), all linear
            layers or, without those, convolutions (`layers`), or names.
        adaptable: The modules that an adapter fits, by name.
    """
    linear = linear_names(adaptable)
    if isinstance(usual, tuple):
        names = [name for name in usual if any(matches([name], layer) for layer in linear)]
    elif usual == "layers":
        names = []
        if not linear and (convolutions := default_convolutions(adaptable)):
            return convolutions, convolutions
    else:
        last_names = {name.rpartition(".")[2] for name in linear}
        names = [name for name in QUERY_VALUE_NAMES if name in last_names]
        if output_embedding_name(model) is not None:
            names = []  # a language model: all linear layers are usual
    if not names:
        return "all-linear", all_linear(model, adaptable)
    return names, [name for name in adaptable if matches(names, name)]


def all_linear(model: nn.Module, adaptable: dict[str, nn.Module]) -> list[str]:
    """Return the linear layers of a model, except the one that maps to its vocabulary."""
    output = output_embedding_name(model)
    return [name for name in linear_names(adaptable) if name != output]


def linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the linear layers among modules."""
    return [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]


def default_convolutions(modules: dict[str, nn.Module]) -> list[str]:
    """Return the convolutions of a model that are adapted by default.

    If none has groups (ResNet), return all of them. If some have groups (EfficientNet), return the
    ungrouped 1 x 1 convolutions, which mix channels: a convolution with one channel per group has
    no room for a low-rank update. Squeeze-and-excitation gates are left out, because they only
    rescale the outputs of other layers.

    Args:
        modules: The modules that an adapter fits, by name.
    """
    convolutions = {n: m for n, m in modules.items() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    ungrouped = [name for name, module in convolutions.items() if module.groups == 1]
    if len(ungrouped) == len(convolutions):
        return ungrouped
    return [
        name
        for name in ungrouped
        if set(convolutions[name].kernel_size) == {1} and not GATES.search(name)
    ]


def output_embedding_name(model: nn.Module) -> str | None:
    """Return the name of the layer that maps to the vocabulary, if the model has one."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    return next((name for name, module in model.named_modules() if module is output), None)
