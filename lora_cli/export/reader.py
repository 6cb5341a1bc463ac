"""The interface of readers: the programs that adapters can be exported for.

A reader's module reports the parts of an adapter that the program could not read before anything
is written, folds scales and ranks as needed, and then reads the written file like the program does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.errors import IntegrityError, Problem
from lora_cli.export.low_rank_pairs import AdapterParts
from lora_cli.tasks.contract import Task

TOLERANCE = 1e-4  # of the largest output, in float32; rounding alone stays below 1e-5
MERGE = "merge it into its base with `lora merge`, and use that model there"


@dataclass
class Source:
    """An adapter to export.

    Args:
        task: The task with its processor loaded; its recipe names the base.
        saved: The adapter's folder.
        parts: The contents of a plain LoRA; None for other adapters.
        base: The base model in float32, without the adapter.
        outputs: The outputs of base + adapter on the task's probe, in float32.
        is_tied: Whether the base's output layer shares its weight with the embedding.
    """

    task: Task
    saved: AdapterFolder
    parts: AdapterParts | None
    base: nn.Module
    outputs: Tensor
    is_tied: bool

    @property
    def lora(self) -> AdapterParts:
        """The parts of a plain LoRA."""
        assert self.parts is not None, "a reader that needs pairs rejects other types"
        return self.parts

    @property
    def base_name(self) -> str:
        """The base's name in the recipe."""
        return self.task.recipe.model.name


class Reader(Protocol):
    """A program that loads adapters."""

    def problems(self, source: Source) -> list[Problem]:
        """Return the parts of the adapter that the program could not read, each with a remedy."""

    def changes(self, source: Source) -> list[str]:
        """Return how the result differs from the adapter, and notes on using it."""

    def write(self, source: Source, folder: Path) -> None:
        """Write the files that the program reads into a folder."""

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the written files like the program does; return what was compared, in words.

        Raises:
            IntegrityError: If the outputs differ.
        """

    def usage(self, source: Source, to: Path) -> str:
        """Return how to use the result in the program, in Markdown."""


def needs_plain_lora(source: Source, reader: str, takes_parts: bool = False) -> list[Problem]:
    """Return why an adapter is not plain LoRA, the only kind that most readers support.

    Args:
        source: The adapter.
        reader: The reader's name for messages.
        takes_parts: Whether the reader supports bases with several parts.
    """
    at, kind = str(source.saved.path), source.saved.type
    if source.saved.parts and not takes_parts:
        named = ", ".join(f"`{part}`" for part in source.saved.parts)
        what = f"{reader} reads the adapter of one model, and this one is of parts of one: {named}"
        return [Problem(what, at, MERGE)]
    if source.saved.config.get("target_parameters"):
        what = f"{reader} reads updates of layers, and this adapter has some of single parameters"
        return [Problem(what, at, MERGE)]
    if source.saved.config.get("trainable_token_indices"):
        what = f"{reader} reads no rows of single tokens, and this adapter has trained some"
        return [Problem(what, at, MERGE)]
    if source.parts is None or not source.parts.pairs:
        what = f"{reader} reads LoRA's matrices, and this adapter is of type `{kind}`"
        return [Problem(what, at, MERGE)]
    problems = []
    if source.parts.in_full:
        tops = sorted({name.rpartition(".")[0] for name in source.parts.in_full})
        shown = ", ".join(f"`{name}`" for name in tops[:3]) + (", …" if len(tops) > 3 else "")
        what = f"{reader} reads no modules that were trained in full, and the adapter has {shown}"
        problems.append(Problem(what, at, MERGE))
    if source.parts.biases:
        what = f"{reader} reads no trained biases or norms, as `{next(iter(source.parts.biases))}`"
        problems.append(Problem(what, at, MERGE))
    for name, pair in source.parts.pairs.items():
        if pair.b.ndim > 2:
            what = f"{reader} adapts no convolutions, as `{name}`"
            return [*problems, Problem(what, at, MERGE)]
    return problems


def scale_changes(source: Source) -> list[str]:
    """Describe how different scales and ranks are unified."""
    config, pairs = source.saved.config, source.lora.pairs
    lines = []
    if config.get("use_rslora"):
        lines.append("rsLoRA's scale, alpha / sqrt(rank), is folded into B")
    if len({pair.scale for pair in pairs.values()}) > 1:
        lines.append("the scales of the modules differ; each is folded into its B")
    ranks = sorted({pair.rank for pair in pairs.values()})
    if len(ranks) > 1:
        shown = ", ".join(map(str, ranks[:-1]))
        lines.append(f"the ranks {shown} and {ranks[-1]} become {ranks[-1]}, by zeros in A and B")
    return lines


@torch.no_grad()
def require_same_outputs(source: Source, updates: Mapping[str, Tensor], reader: str) -> float:
    """Add updates to the base's weights, and compare the outputs with those of base + adapter.

    Args:
        source: The adapter; the updates are added to its base temporarily.
        updates: The update of each module as a matrix (out, in * kernel).
        reader: The reader's name, for errors.

    Returns:
        The largest difference of an output, relative to the largest output.

    Raises:
        IntegrityError: If it exceeds rounding errors.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, update in updates.items():
            module = source.base.get_submodule(name)
            weight: Any = module.weight
            originals.append((module, weight))
            is_transposed = isinstance(module, Conv1D | nn.Embedding)
            delta = (update.T if is_transposed else update).to(weight.dtype)
            # a new parameter, so that tied weights stay unchanged
            module.weight = nn.Parameter(weight + delta.reshape(weight.shape), requires_grad=False)
        outputs = source.task.probed(source.base, source.task.probe())
    finally:
        for module, parameter in reversed(originals):
            module.weight = parameter
    return require_close(outputs, source.outputs, reader)


def require_close(outputs: Tensor, expected: Tensor, reader: str) -> float:
    """Return the largest difference of an output, relative to the largest output.

    Raises:
        IntegrityError: If it exceeds rounding errors.
    """
    difference = float((outputs - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE:
        raise IntegrityError(
            f"read as {reader} reads it, the outputs differ by {difference:.1e} of the largest",
            "--to",
            "please report this: an export should change nothing",
        )
    return difference
