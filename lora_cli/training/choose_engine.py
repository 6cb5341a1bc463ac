"""Which engine computes the steps of a run."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.training.batches import Batches
from lora_cli.training.engine import Engine
from lora_cli.training.fused_modules import FusedModules

# Compiling the layers takes about half a minute. It saves some 3 ms of a short step. Of a long step
# it saves a fifth, or a tenth if fused modules are the alternative, so it pays in runs of more than
# 200 or 700 s. The limits on work are the operations of a GPU in that time, at 3e14 a second.
STEPS_WORTH_COMPILING = 1000
WORK_WORTH_COMPILING = 6e16
WORK_WORTH_COMPILING_FUSED_MODULES = 2e17


def choose_engine(
    model: nn.Module, task: Task, optimizer: Any, accelerator: Accelerator, batches: Batches
) -> Engine:
    """Return the engine that `train.kernels` asks for.

    Args:
        model: The model, in training mode.
        task: The task, which computes the losses.
        optimizer: The optimizer as prepared by Accelerate.
        accelerator: The precision and the processes.
        batches: All batches of the run, so that a resumed run gets the same engine.
    """
    train = task.recipe.train
    parts = (model, task, optimizer, accelerator, train.max_grad_norm)
    # The outputs of packed encoders do not depend on the batch. Language models are not recorded:
    # inside a graph, transformers passes their attention a mask, which makes it slower.
    records = task.same_in_any_batch and not task.learned.checkpointing_of(train)
    records = records and not task.waits_for_device
    required = train.kernels == "fused"
    if not may_use_kernels(task, accelerator):
        return Engine(*parts)
    from lora_cli.training.compiled_layers import CompiledLayers
    from lora_cli.training.graph_engine import GraphEngine

    layers: CompiledLayers | FusedModules = fused_modules(model, accelerator)
    least_work = WORK_WORTH_COMPILING_FUSED_MODULES if layers.layers else WORK_WORTH_COMPILING
    if required or _compiling_pays(model, batches, least_work):
        layers = CompiledLayers(model, task.same_in_any_batch)
    if not (records or layers.layers):
        return Engine(*parts)
    used_layers = layers if layers.layers else None
    return GraphEngine(*parts, layers=used_layers, records=records, required=required)


def may_use_kernels(task: Task, accelerator: Accelerator) -> bool:
    """Return whether steps may use anything but the model's own code."""
    train = task.recipe.train
    plain = train.kernels == "reference" or train.distill is not None  # a teacher may run as well
    return accelerator.device.type == "cuda" and not plain


def fused_modules(model: nn.Module, accelerator: Accelerator) -> FusedModules:
    """Return the modules that have a fused kernel in this precision."""
    return FusedModules(model, autocast=accelerator.mixed_precision != "no")


def _compiling_pays(model: nn.Module, batches: Batches, least_work: float) -> bool:
    """Return whether a run is long enough for compiled layers to save more than they cost."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    work = 6 * n_parameters * batches.total_cost  # 2 operations forward, 4 backward
    return batches.total_steps >= STEPS_WORTH_COMPILING or work >= least_work
