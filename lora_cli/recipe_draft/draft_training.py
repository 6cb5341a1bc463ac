"""Choose the adapter and training settings from the task, number of rows and GPU memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.errors import counted
from lora_cli.recipe import TASKS
from lora_cli.recipe_draft.base_model_info import Base
from lora_cli.recipe_draft.draft_values import Draft
from lora_cli.recipe_draft.memory_budget import (
    LARGE,
    SMALL,
    Card,
    Fit,
    Shape,
    fit_to,
    gib,
    in_words,
)


def add_training(
    draft: Draft, base: Base, count: int, card: Card | None, limits: Sequence[str]
) -> None:
    """Choose the adapter and training settings from the task, number of rows and GPU memory.

    Args:
        draft: The draft with its task; `adapter`, `train` and `memory` are added in place.
        base: The base model.
        count: Number of rows.
        card: The GPU to train on; None if unknown.
        limits: The keys of the task that limit a length in tokens.
    """
    is_large = base.shape is not None and base.shape.parameters > LARGE
    defaults = TASKS[draft.values["task"]["type"]].usual_training
    is_generative = defaults.writes or (
        base.can_write and (base.hidden_size is not None or is_large)
    )
    is_small = base.hidden_size is not None and base.hidden_size <= 512
    if is_generative:
        adapter: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.05}
        why, rate, batch, accumulation = "usual for language models", 2e-4, 4, 4
    else:
        adapter = {"rank": 8, "alpha": 16, "dropout": 0.1}
        why = "better than query and value alone where it was measured"
        rate, batch, accumulation = (1e-3 if is_small else 5e-4), defaults.step, 1
    if defaults.all_linear:
        adapter["target_modules"] = "all-linear"
    draft.values["adapter"] = adapter
    draft.why["adapter"] = defaults.targets_note or why
    rate = defaults.rate_scale * (defaults.learning_rate or rate)
    if count < 200:
        batch, accumulation = min(batch, 8), 1
    epochs = next(epochs for max_rows, epochs in defaults.epochs if count < max_rows)
    task = draft.values["task"]
    length = sum(task[key] for key in limits) or 1
    shape = base.shape or Shape(0)
    fit = fit_to(shape, card, batch, accumulation, length)
    if fit.length < length:
        reason = f"more does not fit into {card.name if card else 'the memory'}"
        for key in limits:
            fitting = task[key] * fit.length // length
            draft.put("task", key, fitting, f"{reason}; {draft.why[f'task.{key}']}")
    draft.put("train", "epochs", epochs, f"for {counted(count, 'row')}")
    _add_memory_savings(draft, fit, card)
    draft.put("train", "optimizer", {"type": "adamw", "learning_rate": rate})
    kind = "cosine" if is_generative else "linear"
    draft.put("train", "scheduler", {"type": kind, "warmup_ratio": 0.06})
    draft.put("train", "precision", fit.precision, _precision_reason(fit, shape, card))
    _add_evaluation(draft, base, defaults.metrics)
    draft.memory = _memory_finding(fit, base, card)


def _add_memory_savings(draft: Draft, fit: Fit, card: Card | None) -> None:
    """Add the settings that make training fit into memory."""
    why = "halve it, and double the next, if memory runs out"
    draft.put("train", "micro_batch_size", fit.micro_batch, why)
    draft.put("train", "gradient_accumulation_steps", fit.accumulation)
    if fit.four_bit:
        why = f"in 16 bits it does not fit into {card.name if card else 'the memory'}"
        draft.put("model", "quantization", "nf4", why)
    if fit.checkpointing:
        why = "much less memory, for about a third more time"
        draft.put("train", "gradient_checkpointing", True, why)


def _add_evaluation(draft: Draft, base: Base, metrics: Sequence[str]) -> None:
    if base.drawing:
        why = "usual for this model, as in diffusers"
        draft.put("evaluate", "drawing", dict(base.drawing), why)
    if metrics:
        why = "each answer is compared with its reference, at every evaluation"
        draft.put("evaluate", "metrics", list(metrics), why)


def _precision_reason(fit: Fit, shape: Shape, card: Card | None) -> str:
    if fit.precision == "fp16":
        return f"half the memory of fp32; {card.name if card else 'the GPU'} has no bf16"
    if fit.precision == "bf16":
        return "half the memory of fp32, and faster; fp16 on GPUs without bf16 (T4, V100)"
    return "bf16 is faster, on a GPU" if not card else "the model is small"


def _memory_finding(fit: Fit, base: Base, card: Card | None) -> str:
    """Describe the memory that training needs, and the GPU."""
    if base.shape is None:
        unknown = "the model's size is not known"
        return f"{unknown}, so memory is not either: `--memory` has no effect" if card else unknown
    size = f"{in_words(base.shape.parameters)} parameters, {base.size_from}"
    settings = fit.precision + (" on a base in 4 bits" if fit.four_bit else "")
    settings += ", gradient checkpointing" if fit.checkpointing else ""
    if (
        base.reads_images
        or base.reads_audio
        or base.generates_images
        or base.speaker_size is not None
    ):
        return f"{size}; {settings}"
    if not base.shape.is_known:
        return f"{size}; {settings}; what a step takes is not known without its configuration"
    needed = f"about {gib(fit.needed)} GiB in {settings}"
    if card is not None:
        return f"{size}: {needed}, of {gib(card.memory)} GiB on {card.name}"
    advice = "; there is no GPU here: `--memory 24` drafts for one of 24 GiB"
    return f"{size}: {needed}{advice if base.shape.parameters > SMALL else ''}"
