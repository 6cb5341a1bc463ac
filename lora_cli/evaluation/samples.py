"""What the model says of the same few rows before, during and after training, for the report."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.characters import first_characters
from lora_cli.evaluation.evaluate_split import TEXT_LENGTH, eval_mode
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded

MOST_EVALUATIONS = 8  # that are kept; of more, every second is left out


@torch.no_grad()
def add_samples(
    model: nn.Module,
    task: Task,
    split: Encoded | None,
    accelerator: Accelerator,
    samples: list[dict[str, Any]],
    when: str | int,
    best: dict[str, Any] | None = None,
) -> None:
    """Let the model answer a few rows of a split in words, on the main process alone.

    Args:
        model: The model; it is put into eval mode, and back.
        task: Of the model; one whose answers are no text leaves no samples.
        split: The rows; None leaves no samples.
        accelerator: Precision and processes.
        samples: A dictionary for each row, which gets the answer: `before` and `after`, and
            `during` with the steps of evaluations.
        when: `before` training, at which step, or `after` it.
        best: The best evaluation: what was said at its step is said after training too.
    """
    count = task.recipe.evaluate.samples
    if split is None or not count or not accelerator.is_main_process:
        return
    if when == "after" and best is not None:
        said = [{one["step"]: one["text"] for one in s.get("during", [])} for s in samples]
        if said and all(best["step"] in texts for texts in said):
            for sample, texts in zip(samples, said, strict=True):
                sample["after"] = texts[best["step"]]
            return
    chosen = _spread([positions.tolist() for positions in split.rows.sets.values()], count)
    chosen = chosen or list(range(min(count, len(split.rows))))
    with eval_mode(model), accelerator.autocast():
        found = task.sample(model, [split.rows[i] for i in chosen])
    if not samples:
        for i, (shown, wanted, _) in zip(chosen, found, strict=False):
            is_sound = wanted.startswith("data:")  # which is whole, or nothing
            reference = wanted if is_sound else first_characters(wanted, TEXT_LENGTH)
            sample = {"place": split.rows.place(i), "prompt": shown[-4 * TEXT_LENGTH :]}
            samples.append({**sample, "reference": reference})
    for sample, (_, _, text) in zip(samples, found, strict=True):
        if isinstance(when, str):
            sample[when] = text
        else:
            kept = [one for one in sample.get("during", []) if one["step"] != when]
            kept = kept[1::2] if len(kept) >= MOST_EVALUATIONS else kept
            sample["during"] = [*kept, {"step": when, "text": text}]


def _spread(sets: list[list[int]], count: int) -> list[int]:
    """Return the first rows of each set in turn, so many in all."""
    turns = zip_longest(*(positions[:count] for positions in sets))
    return sorted([row for turn in turns for row in turn if row is not None][:count])
