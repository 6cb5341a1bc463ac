"""Answers to the same few rows before, during and after training, for the report."""

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

MAX_EVALUATIONS = 8  # with answers in the report; beyond that, every second one is dropped


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
    """Add the model's answers to a few rows of a split, on the main process only.

    Args:
        model: The model; it is put into eval mode, and back.
        task: The model's task; tasks that generate no text add no samples.
        split: The rows; None adds no samples.
        accelerator: The precision and the processes.
        samples: A dictionary for each row, which gets the answer as `before`, `after`, or an item
            of `during` with the step.
        when: `before` training, the step, or `after` training.
        best: The best evaluation. Its answers are reused for `after`, if they were recorded.
    """
    count = task.recipe.evaluate.samples
    if split is None or not count or not accelerator.is_main_process:
        return
    if when == "after" and best is not None:
        answers_by_step = [
            {item["step"]: item["text"] for item in s.get("during", [])} for s in samples
        ]
        if answers_by_step and all(best["step"] in texts for texts in answers_by_step):
            for sample, texts in zip(samples, answers_by_step, strict=True):
                sample["after"] = texts[best["step"]]
            return
    chosen = _spread([positions.tolist() for positions in split.rows.sets.values()], count)
    chosen = chosen or list(range(min(count, len(split.rows))))
    with eval_mode(model), accelerator.autocast():
        answers = task.sample(model, [split.rows[i] for i in chosen])
    if not samples:
        for i, (shown, expected, _) in zip(chosen, answers, strict=False):
            is_audio = expected.startswith("data:")  # a data URL cannot be truncated
            reference = expected if is_audio else first_characters(expected, TEXT_LENGTH)
            sample = {"place": split.rows.place(i), "prompt": shown[-4 * TEXT_LENGTH :]}
            samples.append({**sample, "reference": reference})
    for sample, (_, _, text) in zip(samples, answers, strict=True):
        if isinstance(when, str):
            sample[when] = text
        else:
            earlier = [item for item in sample.get("during", []) if item["step"] != when]
            earlier = earlier[1::2] if len(earlier) >= MAX_EVALUATIONS else earlier
            sample["during"] = [*earlier, {"step": when, "text": text}]


def _spread(sets: list[list[int]], count: int) -> list[int]:
    """Return the first rows of each set, `count` rows in all, taken from the sets in turn."""
    rounds = zip_longest(*(positions[:count] for positions in sets))
    return sorted([row for rows in rounds for row in rows if row is not None][:count])
