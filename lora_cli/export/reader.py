"""What the module of a reader owes: what it would refuse, what changes, how it is written and read.

A reader is a program that loads adapters. Its module says before anything is written what would not
arrive there, folds what can be folded, and then reads the written file as that program does.
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
    """An adapter that is to be exported.

    Args:
        task: With its processor loaded; its recipe names the base.
        saved: The adapter's folder.
        parts: What it holds; None where it is not a plain LoRA.
        base: The base model in float32, without the adapter.
        outputs: What base + adapter make of the task's probe, in float32.
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
        """The base as the recipe names it."""
        return self.task.recipe.model.name


class Reader(Protocol):
    """A program that loads adapters."""

    def problems(self, source: Source) -> list[Problem]:
        """Return what of the adapter would not arrive there, each with the way out."""

    def changes(self, source: Source) -> list[str]:
        """Return what is written otherwise than in the adapter, and what to mind there."""

    def write(self, source: Source, folder: Path) -> None:
        """Write the files that the program reads into a folder."""

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the written files as the program does; return what was compared, in words.

        Raises:
            IntegrityError: If what is read computes something else.
        """

    def usage(self, source: Source, to: Path) -> str:
        """Return how the result is used there, in Markdown."""


def needs_plain_lora(source: Source, reader: str, takes_parts: bool = False) -> list[Problem]:
    """Return why an adapter is not low-rank matrices alone, which is all that most readers take.

    Args:
        source: The adapter.
        reader: For the messages.
        takes_parts: Whether the reader takes a base of several parts.
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
    """Return in words which scales and ranks are made one."""
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
    """Add updates to the base's weights, and require that it computes what base + adapter do.

    Args:
        source: Its base gets the updates, and loses them again.
        updates: Of each module, as a matrix (out, in * kernel).
        reader: As whom the file was read, for the error.

    Returns:
        The largest difference of an output, relative to the largest output.

    Raises:
        IntegrityError: If it is more than rounding.
    """
    before: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, update in updates.items():
            module = source.base.get_submodule(name)
            weight: Any = module.weight
            before.append((module, weight))
            is_transposed = isinstance(module, Conv1D | nn.Embedding)
            delta = (update.T if is_transposed else update).to(weight.dtype)
            # a parameter of its own: where the weight is tied, the other side stays as it is
            module.weight = nn.Parameter(weight + delta.reshape(weight.shape), requires_grad=False)
        outputs = source.task.probed(source.base, source.task.probe())
    finally:
        for module, parameter in reversed(before):
            module.weight = parameter
    return require_close(outputs, source.outputs, reader)


def require_close(outputs: Tensor, wanted: Tensor, reader: str) -> float:
    """Return the largest difference, relative to the largest output, which has to be rounding.

    Raises:
        IntegrityError: If it is more.
    """
    difference = float((outputs - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE:
        raise IntegrityError(
            f"read as {reader} reads it, the outputs differ by {difference:.1e} of the largest",
            "--to",
            "please report this: an export should change nothing",
        )
    return difference
