"""Show encoded examples to a person, as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_cli.errors import counted
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded


def shown_rows(task: Task, data: dict[str, Encoded], count: int, colour: bool) -> Iterator[str]:
    """Yield the first example of each of the first rows of each split, as text.

    Args:
        task: The task, which formats an example.
        data: The encoded splits.
        count: The number of rows of each split, or of each set if several are mixed.
        colour: Show trained tokens in green; otherwise they are enclosed in ⟦ and ⟧.
    """
    for name, split in data.items():
        row_of_example = np.array(split.examples["row"][:])
        rows, first, examples = np.unique(row_of_example, return_index=True, return_counts=True)
        by_set = [
            np.flatnonzero(np.isin(rows, positions))[:count]
            for positions in split.rows.sets.values()
        ]
        chosen = np.concatenate(by_set) if by_set else np.arange(len(rows))[:count]
        for row, i, n_examples in zip(
            *(values[chosen].tolist() for values in (rows, first, examples)), strict=True
        ):
            example = split.examples[i]
            description, text = task.shown(example, colour)
            facts = [f"{name}  {split.rows.place(row)}", *description]
            tokens = counted(example["length"], task.unit)
            if n_examples > 1:
                tokens += f", the first of {n_examples} examples"
            elif example["full_length"] > example["length"]:
                tokens += f", cut from {example['full_length']}"
            yield f"{'  '.join(facts)}  {tokens}\n{text}\n"
