"""Encoded rows in words, with the tokens that are trained marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.errors import counted
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.contract import IGNORED, Encoded, Example, Task
from lora_cli.tasks.sequence_classification import SequenceClassification

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def shown_rows(task: Task, data: dict[str, Encoded], count: int, colour: bool) -> Iterator[str]:
    """Yield the first examples of the first rows of each split, as the model sees them.

    Args:
        task: What the rows mean.
        data: The encoded splits.
        count: Rows of each split.
        colour: Whether trained tokens are green; otherwise they stand between ⟦ and ⟧.
    """
    for name, split in data.items():
        of_row = np.array(split.examples["row"])
        rows, first, examples = np.unique(of_row, return_index=True, return_counts=True)
        for row, i, n_examples in zip(
            rows[:count].tolist(), first[:count].tolist(), examples[:count].tolist(), strict=True
        ):
            example = split.examples[i]
            facts = [f"{name}  {split.rows.place(row)}", *_label(task, example)]
            tokens = counted(example["length"], "token")
            if n_examples > 1:
                tokens += f", the first of {n_examples} examples"
            elif example["full_length"] > example["length"]:
                tokens += f", cut from {example['full_length']}"
            yield f"{'  '.join(facts)}  {tokens}\n{_text(task, example, colour)}\n"


def _label(task: Task, example: Example) -> list[str]:
    """Return what a classified row's label is called."""
    if not isinstance(task, SequenceClassification):
        return []
    value: Any = example["labels"]
    if isinstance(value, list):
        value = ", ".join(name for name, on in zip(task.labels, value, strict=True) if on)
    elif task.labels:
        value = task.labels[value]
    return [f"label {value}"]


def _text(task: Task, example: Example, colour: bool) -> str:
    ids = example["input_ids"]
    if not isinstance(task, CausalLM):
        return str(task.tokenizer.decode(ids))
    # the first token is predicted from nothing
    trained = [i > 0 and label != IGNORED for i, label in enumerate(example["labels"])]
    opening, closing = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    return "".join(
        f"{opening}{text}{closing}" if on else text
        for on, text in pieces(task.tokenizer, ids, trained)
    )


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[tuple[bool, str]]:
    """Yield the runs of tokens that are all trained, or all not, as text.

    A run is what it adds to the text before it: decoded alone it might lose a space.
    """
    before, end = "", 0
    for on, run in groupby(trained):
        start, end = end, end + len(list(run))
        whole = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        alone = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        yield on, whole[len(before) :] if whole.startswith(before) else alone
        before = whole
