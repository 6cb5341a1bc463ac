"""Count the parameters of a model, in total and trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lora_cli.models.quantized_linear import QuantizedLinear


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
    """Return a row for every parameter of the model; a shared parameter is counted once.

    A quantised layer is counted by its original weights.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rows = []
    for name, parameter in model.named_parameters():
        layer, last = layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        shape = tuple(parameter.shape)
        if layer is not None and last != "bias":
            if last != "weight":
                continue  # the quantisation scales
            shape = (layer.out_features, layer.in_features)
        rows.append(ParameterRow(name, shape, parameter.requires_grad))
    return rows


def group_rows(rows: Iterable[ParameterRow]) -> list[tuple[str, int, bool, int]]:
    """Join the rows of parameters that differ only in the number of their layer.

    Returns:
        For each group: its name with `*` for the number, the number of parameters, whether they
        are trained, and their total number of entries.
    """
    groups: dict[tuple[str, bool], list[ParameterRow]] = {}
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
        groups.setdefault((name, row.trainable), []).append(row)
    return [
        (name, len(members), trainable, sum(row.count for row in members))
        for (name, trainable), members in groups.items()
    ]
