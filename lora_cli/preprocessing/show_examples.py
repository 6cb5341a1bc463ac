"""Encoded rows in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_cli.errors import counted
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded


def shown_rows(task: Task, data: dict[str, Encoded], count: int, colour: bool) -> Iterator[str]:
    """Yield the first examples of the first rows of each split, as the model sees them.

    Args:
        task: What the rows mean.
        data: The encoded splits.
        count: Rows of each split, and of each set where several are mixed.
        colour: Whether trained tokens are green; otherwise they stand between ⟦ and ⟧.
    """
    for name, split in data.items():
        of_row = np.array(split.examples["row"][:])
        rows, first, examples = np.unique(of_row, return_index=True, return_counts=True)
        of_sets = [np.flatnonzero(np.isin(rows, at))[:count] for at in split.rows.sets.values()]
        chosen = np.concatenate(of_sets) if of_sets else np.arange(len(rows))[:count]
        for row, i, n_examples in zip(
            *(values[chosen].tolist() for values in (rows, first, examples)), strict=True
        ):
            example = split.examples[i]
            about, text = task.shown(example, colour)
            facts = [f"{name}  {split.rows.place(row)}", *about]
            tokens = counted(example["length"], task.unit)
            if n_examples > 1:
                tokens += f", the first of {n_examples} examples"
            elif example["full_length"] > example["length"]:
                tokens += f", cut from {example['full_length']}"
            yield f"{'  '.join(facts)}  {tokens}\n{text}\n"
