"""Which engine computes the steps of a run."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.training.engine import Engine

STEPS_WORTH_COMPILING = 1000  # compiling takes about half a minute, and saves some 3 ms a step


def choose_engine(
    model: nn.Module, task: Task, optimizer: Any, accelerator: Accelerator, total_steps: int
) -> Engine:
    """Return the engine that `train.kernels` asks for.

    Args:
        model: The model, in training mode.
        task: It computes the losses.
        optimizer: Prepared by Accelerate.
        accelerator: Precision and processes.
        total_steps: Of the whole run, so that a resumed one computes the same.
    """
    train = task.recipe.train
    parts = (model, task, optimizer, accelerator, train.max_grad_norm)
    # where texts share rows, an example was seen to be computed in the same way in any batch
    wanted = {"auto": task.same_in_any_batch, "fused": True, "reference": False}[train.kernels]
    if not wanted or train.gradient_checkpointing or accelerator.device.type != "cuda":
        return Engine(*parts)
    from lora_cli.training.graph_engine import GraphEngine

    required = train.kernels == "fused"
    compiled = required or total_steps >= STEPS_WORTH_COMPILING
    return GraphEngine(*parts, compile_layers=compiled, required=required)
