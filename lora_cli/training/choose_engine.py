"""Which engine computes the steps of a run."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.training.batches import Batches
from lora_cli.training.engine import Engine

STEPS_WORTH_COMPILING = 1000  # compiling takes about half a minute, and saves some 3 ms a step,
WORK_WORTH_COMPILING = 6e16  # or a fifth: of 200 s, where a GPU makes 3e14 operations a second


def choose_engine(
    model: nn.Module, task: Task, optimizer: Any, accelerator: Accelerator, batches: Batches
) -> Engine:
    """Return the engine that `train.kernels` asks for.

    Args:
        model: The model, in training mode.
        task: It computes the losses.
        optimizer: Prepared by Accelerate.
        accelerator: Precision and processes.
        batches: Those of the whole run, so that a resumed one computes the same.
    """
    train = task.recipe.train
    parts = (model, task, optimizer, accelerator, train.max_grad_norm)
    # where texts share rows, an example was seen to be computed in the same way in any batch; a
    # language model's attention is slower in a graph, where transformers gives it a mask
    records = task.same_in_any_batch and not task.learned.checkpointing_of(train)
    records = records and not task.waits_for_device
    required = train.kernels == "fused"
    compiled = required or _compiling_pays(model, batches)
    plain = train.kernels == "reference" or train.distill is not None  # a teacher may compute too
    if plain or accelerator.device.type != "cuda":
        return Engine(*parts)
    if not (records or compiled):
        return Engine(*parts)
    from lora_cli.training.compiled_layers import CompiledLayers
    from lora_cli.training.graph_engine import GraphEngine

    layers = CompiledLayers(model, task.same_in_any_batch) if compiled else None
    layers = layers if layers and layers.layers else None
    return GraphEngine(*parts, layers=layers, records=records, required=required)


def _compiling_pays(model: nn.Module, batches: Batches) -> bool:
    """Return whether a run is long enough for compiled layers to save more than they cost."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    work = 6 * n_parameters * batches.total_cost  # 2 operations forward, 4 backward
    return batches.total_steps >= STEPS_WORTH_COMPILING or work >= WORK_WORTH_COMPILING
