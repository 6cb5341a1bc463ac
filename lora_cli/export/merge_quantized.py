"""Merge an adapter that was trained on a quantised base, into the dequantised or original weights.

Merging into the dequantised weights reproduces the trained model. The original weights are a better
base, but not the one that the adapter has learnt to correct. Both are measured, and the better
model is written: by the metric on the validation split if its rows are available, otherwise by how
close its outputs are to those of the trained model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import best_by, evaluate
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.preprocessing.encode import load_data
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded

BASES = ("dequantised", "original")


@dataclass
class TrainedModel:
    """The trained model, adapter on quantised base, as a reference for merged models.

    Args:
        weights: The dequantised weight of each quantised layer, in the layout of the layer that it
            replaced.
        outputs: The outputs on the task's probe.
        metric: The name of the deciding metric, or None if there are no validation rows.
        lower_is_better: Whether a lower metric is better.
        value: The metric's value.
        rows: The validation split.
    """

    weights: dict[str, Tensor]
    outputs: Tensor
    metric: str | None = None
    lower_is_better: bool = False
    value: float | None = None
    rows: Encoded | None = None


@dataclass
class Candidate:
    """A merged model, compared with the trained one.

    Args:
        base: `dequantised` or `original`.
        difference: The largest difference of an output, relative to the largest output.
        value: The metric's value, or None if there are no validation rows.
    """

    base: str
    difference: float
    value: float | None


@torch.no_grad()
def measure_trained(task: Task, saved: AdapterFolder) -> TrainedModel:
    """Load the quantised base with its adapter; return its outputs, metric and dequantised weights.

    Args:
        task: A task whose recipe's base is quantised, with its processor loaded.
        saved: The adapter.
    """
    model, new = task.load_model(torch.device("cpu"))
    model = model.float().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    weights = {name: stored_weight(layer) for name, layer in layers.items()}
    load_adapter(model, saved, new, drawn=task.drawn)
    result = TrainedModel(weights, task.probed(model, task.probe()))
    if not task.recipe.data.has("validation") or task.recipe.data.streaming:
        return result
    try:
        result.rows = load_data(task, ["validation"])["validation"]
    except LoraError:  # its files are no longer there: outputs decide
        return result
    result.metric, mode = best_by(task.recipe, task)
    result.lower_is_better = mode == "min"
    result.value = metric_of(result, task, model)
    return result


def stored_weight(layer: QuantizedLinear) -> Tensor:
    """Return the float32 weight of a quantised layer as the checkpoint stores it."""
    weight = layer.dequantized()
    return weight.T.contiguous() if layer.transposed else weight


def metric_of(trained: TrainedModel, task: Task, model: nn.Module) -> float | None:
    """Return the deciding metric of a model on the validation rows, if there are any."""
    if trained.rows is None or trained.metric is None:
        return None
    recipe = task.recipe.with_values({"train.precision": "fp32", "model.dtype": None})
    accelerator = start_accelerator(recipe, cpu=True)
    task.fit_to_model(model)
    return evaluate(model, task, trained.rows, accelerator)[trained.metric]


def use_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the layers of a full-precision base to the dequantised weights."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).get_parameter("weight").copy_(weight)


def better_candidate(candidates: list[Candidate], trained: TrainedModel) -> Candidate:
    """Return the candidate with the better metric, or with the closer outputs if equal."""

    def rank(candidate: Candidate) -> tuple[float, float]:
        value = candidate.value or 0.0
        return (value if trained.lower_is_better else -value, candidate.difference)

    return min(candidates, key=rank)


def in_words(candidates: list[Candidate], chosen: Candidate, trained: TrainedModel) -> list[str]:
    """Describe how the candidates compare with the trained model, a line each."""
    lines = []
    if trained.value is not None:
        lines.append(f"trained, on the quantised base: {trained.metric} {trained.value:.4f}")
    for candidate in candidates:
        comparison = f"outputs differ by {candidate.difference:.1e}"
        if candidate.value is not None and trained.value is not None:
            change = candidate.value - trained.value
            comparison = f"{trained.metric} {candidate.value:.4f} ({change:+.4f}), {comparison}"
        mark = "  <- written" if candidate is chosen else ""
        lines.append(f"merged into the {candidate.base} base: {comparison}{mark}")
    return lines
