"""Turn the rows of a recipe into examples: read, check, encode once, and cache on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from lora_cli.data.bad_rows import drop_bad_rows
from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.data.file_formats import require_columns
from lora_cli.data.load_rows import Rows, load_rows
from lora_cli.errors import LoraError, Problem
from lora_cli.preprocessing.encoded_table import EncodedTable
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded, Example
from lora_cli.tasks.texts.tokenize_long_texts import in_batches
from lora_cli.unexpected_errors import own_words


def load_data(
    task: Task, splits: Sequence[str] = ("train", "validation", "test")
) -> dict[str, Encoded]:
    """Read, check and encode the splits.

    Raises:
        LoraError: With the missing columns, or the invalid rows and their locations.
    """
    if problems := task.metric_problems():
        raise LoraError(problems)
    return {
        name: encode_rows(task, rows, name == "train")
        for name, rows in check_data(task, splits).items()
        if name in splits
    }


def check_data(task: Task, splits: Sequence[str]) -> dict[str, Rows]:
    """Read the splits, check every row, and let the task learn what it needs from them."""
    recipe = task.recipe
    needed = (*splits, "train") if task.reads_train else splits
    rows = load_rows(recipe, needed)
    for name, split in rows.items():
        for part in split.parts:
            require_columns(task.needed_columns(name == "train"), part.columns, part.source)
    task.learn_names(rows)
    _reject_unsupported(task, rows)
    rows = {name: _without_skipped(task, name, split) for name, split in rows.items()}
    task.learn_form(rows)
    for name, split in rows.items():
        row_errors = (task.row_error(row, name == "train") for row in split)
        errors = {i: error for i, error in enumerate(row_errors) if error}
        if len(errors) == len(split) and recipe.data.on_bad_row == "skip":
            what = f"no row of the {name} split can be used: {errors[0]}"
            hint = "is the column named correctly? `data.on_bad_row: skip` leaves no row here"
            raise LoraError(what, split.place(0), hint)
        rows[name] = drop_bad_rows(split, errors, recipe)
    task.learn_from(rows)
    return rows


def _reject_unsupported(task: Task, splits: dict[str, Rows]) -> None:
    """Reject splits with rows of a kind that no task reads, even if bad rows are skipped.

    Raises:
        LoraError: With the number of such rows in each split, and the location of the first.
    """
    problems = []
    for name, split in splits.items():
        first, count = None, 0
        for i, row in enumerate(split):
            if (finding := task.unsupported(row)) is not None:
                first, count = first or (i, finding), count + 1
        if first is not None:
            i, (what, hint) = first
            were = "it is" if count == 1 else "they are"
            share = f"{count:,} of {len(split):,} {name} rows cannot be read as {were} meant"
            problems.append(Problem(f"{share}; the first has {what}", split.place(i), hint))
    if problems:
        raise LoraError(problems)


def _without_skipped(task: Task, name: str, split: Rows) -> Rows:
    """Return a split without the rows that the recipe excludes; they count as skipped.

    Raises:
        LoraError: If no row is left.
    """
    reasons = [task.skip_reason(row, name) for row in split]
    left_out = [f"{split.place(i)}: {reason}" for i, reason in enumerate(reasons) if reason]
    if not left_out:
        return split
    if len(left_out) == len(split):
        what = f"no row of the {name} split is left, for each is left out"
        raise LoraError(what, split.place(0), f"the first: {next(filter(None, reasons))}")
    remaining = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=np.int64)
    return split.select(remaining, left_out)


def encode_rows(task: Task, rows: Rows, training: bool = False) -> Encoded:
    """Encode the rows of a split, or read them from the cache if they were encoded before.

    Args:
        task: The task, which encodes the rows.
        rows: The rows.
        training: Whether the rows are for training, not for evaluation.

    Raises:
        LoraError: With the location of a row that cannot be encoded, or if no row yields an
            example.
    """
    import datasets

    def examples() -> Iterator[Example]:
        first = count = 0
        for batch in _bounded(rows.batches(1000)):
            place = functools.partial(_place, rows, first)
            for offset, encoded in enumerate(encode_located(task, batch, place, training)):
                count += len(encoded)
                for example in encoded:
                    length = task.cost(example)
                    example = {"full_length": length, **example}
                    yield {**example, "row": first + offset, "length": length}
            first += len(batch)
        if not count:
            raise nothing_to_train(task, rows)

    def feature(text: str) -> Any:
        if text == "media":  # encoded bytes, or a path
            return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        if text.startswith("list<"):
            return datasets.List(datasets.Value(text[5:-1]))
        return datasets.Value(text)

    features = datasets.Features({name: feature(t) for name, t in _types(task, training).items()})
    dataset = cached_dataset(examples, cache_key(task, rows, training), features)
    rows_of_examples, lengths, full = (
        dataset.data.column(name).to_numpy().astype(np.int64)
        for name in ("row", "length", "full_length")
    )
    without_example = len(rows) - len(np.unique(rows_of_examples))
    return Encoded(rows, EncodedTable(dataset), lengths, full, without_example)


def _types(task: Task, training: bool) -> dict[str, str]:
    """Return the type of each key of an encoded example."""
    types = {**(task.train_features() if training else task.features()), "row": "int64"}
    return types | {"length": "int32", "full_length": "int32"}


def cache_key(task: Task, rows: Rows, training: bool = False) -> list[str]:
    """Return everything that the encoded examples of rows depend on."""
    return [
        *task.cache_key(),
        json.dumps(task.learned.task, sort_keys=True),  # such as labels that come from other splits
        rows.sha256,
        rows.source,
        hashlib.sha256(rows.indices.tobytes()).hexdigest(),
        str(sorted(_types(task, training).items())),
        task.recipe.data.format.model_dump_json(),
        str(sorted(task.recipe.data.columns.items())),
        task.recipe.data.on_bad_row,
    ]


def _bounded(batches: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in batches with a bounded amount of text, which bounds the memory for tokens."""
    for batch in batches:
        for part in in_batches([characters_in(row) for row in batch]):
            yield batch[part]


def characters_in(value: Any) -> int:
    """Return the number of characters and bytes in a row, including nested lists and objects."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(characters_in, value)) if isinstance(value, list) else 0


def nothing_to_train(task: Task, rows: Rows) -> LoraError:
    """Return the error for a split in which no row leaves anything to train."""
    what = f"no row leaves anything to train within {task.length_limit}"
    return LoraError(what, rows.source, task.why_nothing(rows[0]))


def _place(rows: Rows, first: int, i: int) -> str:
    return rows.place(first + i)


def encode_located(
    task: Task,
    batch: Sequence[dict[str, Any]],
    place: Callable[[int], str],
    training: bool = False,
) -> list[list[Example]]:
    """Return the examples of each row of a batch.

    Rows are encoded together; if that fails, one by one, to find the row that cannot be encoded.

    Args:
        task: The task, which encodes the rows.
        batch: The rows.
        place: Returns the location of a row, by its position in the batch.
        training: Whether the rows are for training, not for evaluation.

    Raises:
        LoraError: With the location of the row, unless bad rows are skipped.
    """
    try:
        return _encoded(task, batch, training)
    except LoraError:
        encoded = []
        for i, row in enumerate(batch):
            try:
                encoded += _encoded(task, [row], training)
            except LoraError as error:
                if task.recipe.data.on_bad_row == "error":
                    raise LoraError([replace(p, at=place(i)) for p in error.problems]) from error
                encoded.append([])
        return encoded


def _encoded(task: Task, rows: Sequence[dict[str, Any]], training: bool) -> list[list[Example]]:
    """Return the examples of rows.

    Raises:
        LoraError: If the tokenizer fails on them, or returns a token that the model does not have.
    """
    try:
        encoded = task.encode_to_train(rows) if training else task.encode(rows)
    except (LoraError, MemoryError):
        raise
    except Exception as error:  # tokenizers raise plain exceptions of many kinds
        what = f"the tokenizer cannot encode this row: {own_words(error)}"
        raise LoraError(what, hint="leave the row out, or change its text") from error
    task.check_examples(list(chain.from_iterable(encoded)))
    return encoded
