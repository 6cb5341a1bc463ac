"""Which engine computes the steps of a run."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.training.batches import Batches
from lora_cli.training.engine import Engine
from lora_cli.training.fused_modules import FusedModules

# To compile layers takes about half a minute. It saves some 3 ms of a short step, and a fifth of a
# long one, or a tenth beside fused modules: half a minute of 200 or 700 s, in which a GPU makes so
# many operations (3e14 a second)
STEPS_WORTH_COMPILING = 1000
WORK_WORTH_COMPILING = 6e16
WORK_BESIDE_KERNELS = 2e17


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
    if not may_use_kernels(task, accelerator):
        return Engine(*parts)
    from lora_cli.training.compiled_layers import CompiledLayers
    from lora_cli.training.graph_engine import GraphEngine

    layers: CompiledLayers | FusedModules = fused_modules(model, accelerator)
    least_work = WORK_BESIDE_KERNELS if layers.layers else WORK_WORTH_COMPILING
    if required or _compiling_pays(model, batches, least_work):
        layers = CompiledLayers(model, task.same_in_any_batch)
    if not (records or layers.layers):
        return Engine(*parts)
    found = layers if layers.layers else None
    return GraphEngine(*parts, layers=found, records=records, required=required)


def may_use_kernels(task: Task, accelerator: Accelerator) -> bool:
    """Return whether steps may be computed otherwise than by the model's own code."""
    train = task.recipe.train
    plain = train.kernels == "reference" or train.distill is not None  # a teacher may compute too
    return accelerator.device.type == "cuda" and not plain


def fused_modules(model: nn.Module, accelerator: Accelerator) -> FusedModules:
    """Return the modules that kernels compute in this precision."""
    return FusedModules(model, autocast=accelerator.mixed_precision != "no")


def _compiling_pays(model: nn.Module, batches: Batches, least_work: float) -> bool:
    """Return whether a run is long enough for compiled layers to save more than they cost."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    work = 6 * n_parameters * batches.total_cost  # 2 operations forward, 4 backward
    return batches.total_steps >= STEPS_WORTH_COMPILING or work >= least_work
