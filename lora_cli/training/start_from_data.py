"""Initialise an adapter from the train rows, before the first step (`init: eva`)."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.eva import MAX_BATCHES, find_starts, set_ranks, set_starts
from lora_cli.errors import counted
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, Batch, Encoded
from lora_cli.training.batches import Batches


def start_from_data(model: nn.Module, task: Task, split: Encoded, accelerator: Accelerator) -> None:
    """Set the ranks and initial weights of the adapter layers from the train rows, by EVA.

    All processes read the same rows, and compute the same result.

    Args:
        model: The model, with its adapter attached.
        task: The task; its notes get a line. In a resumed run, `task.learned` has the ranks.
        split: The train rows.
        accelerator: The precision and the device.
    """
    spec = task.completed_recipe.adapter
    if task.learned.in_checkpoint:
        if task.learned.ranks:  # otherwise no checkpoint is readable, which is reported later
            set_ranks(model, task.learned.ranks, spec)
        return
    configured_ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    batches = Batches(task, split, accelerator).from_the_start()
    with accelerator.autocast():
        forward_passes = (
            partial(_run_batch, model, task, batch.to(accelerator.device)) for batch in batches
        )
        starts, changing = find_starts(model, forward_passes, spec.eva_rho)
    set_starts(model, starts, spec)
    changed_ranks = {
        name: len(start) for name, start in starts.items() if len(start) != configured_ranks[name]
    }
    note = f"EVA: {counted(len(starts), 'module')} start at the main directions of their inputs"
    if changed_ranks:
        ranks = [len(start) for start in starts.values()]
        note += f", with ranks from {min(ranks)} to {max(ranks)}"
    if n_dropped := sum(not rank for rank in changed_ranks.values()):
        note += f"; {n_dropped} have none, and no adapter"
    if changing:
        note += f"; {changing} were still changing after {MAX_BATCHES} batches"
    task.notes.append(note)


def _run_batch(model: nn.Module, task: Task, batch: Batch) -> Tensor | None:
    """Run a forward pass; return the mask of tokens that are not padding, and are trained on."""
    task.forward(model, batch)
    mask, labels = batch.inputs.get("attention_mask"), batch.targets.get("labels")
    counted_tokens = None if mask is None or mask.ndim != 2 else mask.bool()
    if labels is not None and labels.shape == batch.inputs.get("input_ids", torch.empty(0)).shape:
        trained = labels != IGNORED
        counted_tokens = trained if counted_tokens is None else counted_tokens & trained
    return counted_tokens
