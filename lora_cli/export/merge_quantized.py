"""Merge an adapter that was trained on a quantised base: which weights does it belong to?

What was trained is the adapter on the numbers that the codes stand for. It can be merged into those
numbers, which computes what was trained, or into the weights that the codes were made from, which
are the better base, but not the one that the adapter has learnt to correct. Both are measured, and
the better one is written: by the metric of the validation split where its rows are at hand, else by
the outputs.
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
class Trained:
    """What was trained: the adapter on the quantised base, and what it is measured by.

    Args:
        weights: The numbers that the codes of each quantised layer stand for, in the layout of the
            layer that it replaced.
        outputs: On the task's probe.
        metric: Name of the metric that decides, or None where there are no rows.
        value: The metric.
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
    """A merged model beside what was trained.

    Args:
        base: `dequantised` or `original`.
        difference: Largest difference of an output, of the largest output.
        value: The metric, where there are rows.
    """

    base: str
    difference: float
    value: float | None


@torch.no_grad()
def what_was_trained(task: Task, saved: AdapterFolder) -> Trained:
    """Return the quantised base's numbers, and what base + adapter make of the probe and the rows.

    Args:
        task: Of a recipe whose base is quantised; its processor is loaded.
        saved: The adapter.
    """
    model, new = task.load_model(torch.device("cpu"))
    model = model.float().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    weights = {name: numbers_of(layer) for name, layer in layers.items()}
    load_adapter(model, saved, new, drawn=task.drawn)
    found = Trained(weights, task.probed(model, task.probe()))
    if not task.recipe.data.has("validation") or task.recipe.data.streaming:
        return found
    try:
        found.rows = load_data(task, ["validation"])["validation"]
    except LoraError:  # its files are elsewhere now: the outputs decide
        return found
    found.metric, mode = best_by(task.recipe, task)
    found.lower_is_better = mode == "min"
    found.value = measured(found, task, model)
    return found


def numbers_of(layer: QuantizedLinear) -> Tensor:
    """Return the float32 weight of a quantised layer as the checkpoint stores it."""
    weight = layer.dequantized()
    return weight.T.contiguous() if layer.transposed else weight


def measured(trained: Trained, task: Task, model: nn.Module) -> float | None:
    """Return the deciding metric of a model on the validation rows, if there are any."""
    if trained.rows is None or trained.metric is None:
        return None
    recipe = task.recipe.with_values({"train.precision": "fp32", "model.dtype": None})
    accelerator = start_accelerator(recipe, cpu=True)
    task.fit_to_model(model)
    return evaluate(model, task, trained.rows, accelerator)[trained.metric]


def use_numbers(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the layers of a full-precision base the numbers that their codes stand for."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).get_parameter("weight").copy_(weight)


def better(candidates: list[Candidate], trained: Trained) -> Candidate:
    """Return the candidate with the better metric; of equal ones, that with the nearer outputs."""

    def rank(candidate: Candidate) -> tuple[float, float]:
        value = candidate.value or 0.0
        return (value if trained.lower_is_better else -value, candidate.difference)

    return min(candidates, key=rank)


def in_words(candidates: list[Candidate], chosen: Candidate, trained: Trained) -> list[str]:
    """Return lines that say how the candidates compare with what was trained."""
    lines = []
    if trained.value is not None:
        lines.append(f"trained, on the quantised base: {trained.metric} {trained.value:.4f}")
    for candidate in candidates:
        by = f"outputs differ by {candidate.difference:.1e}"
        if candidate.value is not None and trained.value is not None:
            change = candidate.value - trained.value
            by = f"{trained.metric} {candidate.value:.4f} ({change:+.4f}), {by}"
        mark = "  <- written" if candidate is chosen else ""
        lines.append(f"merged into the {candidate.base} base: {by}{mark}")
    return lines
