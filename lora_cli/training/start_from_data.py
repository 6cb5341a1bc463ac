"""Let an adapter start from the run's own train rows, before its first step (`init: eva`)."""

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
    """Give the layers the ranks and the starts that the train rows ask for, and say so.

    Every process reads the same rows, and finds the same.

    Args:
        model: With its adapter attached.
        task: Its notes get a line; of a run that is resumed, it knows the ranks.
        split: The train rows.
        accelerator: Where the model computes.
    """
    spec = task.completed_recipe.adapter
    if task.learned.in_checkpoint:
        if task.learned.ranks:  # else no checkpoint can be read, which is said when it is needed
            set_ranks(model, task.learned.ranks, spec)
        return
    before = {name: layer.rank for name, layer in lora_layers(model).items()}
    batches = Batches(task, split, accelerator).from_the_start()
    with accelerator.autocast():
        looks = (partial(_look, model, task, batch.to(accelerator.device)) for batch in batches)
        starts, changing = find_starts(model, looks, spec.eva_rho)
    set_starts(model, starts, spec)
    moved = {name: len(start) for name, start in starts.items() if len(start) != before[name]}
    note = f"EVA: {counted(len(starts), 'module')} start at the main directions of their inputs"
    if moved:
        ranks = [len(start) for start in starts.values()]
        note += f", with ranks from {min(ranks)} to {max(ranks)}"
    if without := sum(not rank for rank in moved.values()):
        note += f"; {without} have none, and no adapter"
    if changing:
        note += f"; {changing} were still changing after {MAX_BATCHES} batches"
    task.notes.append(note)


def _look(model: nn.Module, task: Task, batch: Batch) -> Tensor | None:
    """Put a batch through the model; return which tokens count: no padding, and what is trained."""
    task.forward(model, batch)
    mask, labels = batch.inputs.get("attention_mask"), batch.targets.get("labels")
    counted_tokens = None if mask is None or mask.ndim != 2 else mask.bool()
    if labels is not None and labels.shape == batch.inputs.get("input_ids", torch.empty(0)).shape:
        trained = labels != IGNORED
        counted_tokens = trained if counted_tokens is None else counted_tokens & trained
    return counted_tokens
