"""Check the data, labels, metrics and adapter targets of a recipe, on a model without weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_cli.adapters.describe_trained import trained_in_words
from lora_cli.adapters.make_trainable import head_in_full, make_trainable
from lora_cli.adapters.parameter_groups import parameter_groups
from lora_cli.adapters.parameter_targets import frozen_experts_note
from lora_cli.adapters.peft_format.adapter_folder import differences_in_peft
from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, Problem, printable, warn
from lora_cli.metrics import MetricSet, known_metrics
from lora_cli.models.gradient_checkpointing import require_gradient_checkpointing
from lora_cli.preprocessing.encode import (
    characters_in,
    check_data,
    encode_located,
    nothing_to_train,
)
from lora_cli.preprocessing.stream import Stream
from lora_cli.recipe import Recipe
from lora_cli.tasks import build_training_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Example
from lora_cli.tasks.texts.tokenize_long_texts import LONG, in_batches

FIRST_ROWS = 1000


def check_recipe(
    recipe: Recipe, all_rows_follow: bool = False, notes: list[str] | None = None
) -> Recipe:
    """Find everything that would stop `lora train` later, and raise all of it together.

    Args:
        recipe: The recipe.
        all_rows_follow: Whether the caller inspects all rows afterwards. Warnings about the first
            rows are then left to that inspection.
        notes: Gets a line that describes the trained parameters.

    Returns:
        The recipe, completed with values from the rows and from the adapter of `adapter.from`.

    Raises:
        LoraError: With every problem of the model, the data, the labels and the targets. If all
            problems come from one subclass, such as `ResourceError`, that subclass is raised.
    """
    task = build_training_task(recipe)
    problems = Problems()
    with _collected(problems):
        task.load_processor()
    has_processor = not problems
    if has_processor and task.length_note is not None:
        warn(task.length_note.removeprefix("warning: "))
    with _collected(problems):
        _check_metrics(task)
    with _collected(problems):
        splits = check_data(task, ("train", "validation", "test"))
        if has_processor:
            _encode_first_rows(task, splits, warns=not all_rows_follow)
    if has_processor:
        with _collected(problems):
            model, new_modules = task.empty_model()
            with _collected(problems):
                if recipe.train.gradient_checkpointing in (True, "offload"):
                    require_gradient_checkpointing(model, recipe)
            make_trainable(model, recipe, new_modules, learned=task.learned)
            completed = task.completed_recipe
            in_full = [*head_in_full(model, new_modules), *completed.adapter.train_modules]
            parameter_groups(model, completed, in_full)
            if notes is not None:
                notes.append(trained_in_words(model))
            if not problems and completed.adapter.low_rank:
                for difference in differences_in_peft(model, completed, in_full):
                    warn(difference)
                if note := frozen_experts_note(model, completed):
                    warn(note)
    problems.raise_them()
    return task.completed_recipe


class Problems(list[Problem]):
    """Collected problems, and the classes of the errors that they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: set[type[LoraError]] = set()

    def raise_them(self) -> None:
        """Raise all problems together, if there are any.

        Raises:
            LoraError: Or its subclass, if all problems come from the same one.
        """
        if self:
            raise (self.classes.pop() if len(self.classes) == 1 else LoraError)(self)


@contextmanager
def _collected(problems: Problems) -> Iterator[None]:
    try:
        yield
    except LoraError as error:
        problems += error.problems
        problems.classes.add(type(error))


def _check_metrics(task: Task) -> None:
    if problems := task.metric_problems():
        raise LoraError(problems)
    if set(task.metric_names) - set(
        known_metrics()
    ):  # other names are loaded by the library `evaluate`
        at = task.recipe.at("evaluate.metrics")
        MetricSet(task.metric_names, task.metric_channel, task.metric_context, at)


def _encode_first_rows(task: Task, splits: dict[str, Rows], warns: bool) -> None:
    """Encode the first rows of each split, so that errors of a chat template show early."""
    has_warned = False
    for name, rows in ((name, part) for name, split in splits.items() for part in split.parts):
        first_rows = next(rows.batches(FIRST_ROWS))
        encoded_rows: list[list[Example]] = []
        lengths = [characters_in(row) for row in first_rows]
        for part in in_batches(lengths):
            if not warns and lengths[part.start] > LONG:
                continue  # slow, and encoded together with all rows afterwards
            place = functools.partial(_place, rows, part.start)
            encoded = encode_located(task, first_rows[part], place, name == "train")
            # a long text has many examples, which are needed for warnings only
            encoded_rows += encoded if warns else (examples[:1] for examples in encoded)
        if not any(encoded_rows) and max(lengths) <= LONG and len(rows) <= FIRST_ROWS:
            raise nothing_to_train(task, rows)
        if warns:
            if not has_warned:  # warn once: the splits have the same language
                has_warned = _warn_of_unknown(task, name, rows, encoded_rows)
            _warn_of_lost_text(task, name, rows, first_rows, encoded_rows)
    if task.recipe.data.streaming:
        Stream(task).check_start()


def _place(rows: Rows, first: int, i: int) -> str:
    return rows.place(first + i)


def _warn_of_unknown(
    task: Task, name: str, rows: Rows, examples: Sequence[Sequence[Example]]
) -> bool:
    """Warn if the processor cannot represent much of the first rows; return whether it did."""
    flat = [
        {**example, "row": row}
        for row, encoded_rows in enumerate(examples)
        for example in encoded_rows
    ]
    split_name = f"{name} (its first {FIRST_ROWS} rows)" if len(rows) > FIRST_ROWS else name
    _, warning = task.unknown_input(split_name, rows, flat)
    if warning is not None:
        warn(warning)
    return warning is not None


def _warn_of_lost_text(
    task: Task,
    name: str,
    rows: Rows,
    first_rows: Sequence[dict[str, Any]],
    encoded_rows: Sequence[Sequence[Example]],
) -> None:
    """Warn if some of the first rows leave nothing to train, or contain control tokens."""
    count = len(first_rows)
    scope = f"of the first {count:,}" if count < len(rows) else f"of {count:,}"
    if empty := sum(not examples for examples in encoded_rows):
        warn(
            f"{empty:,} {scope} {name} rows leave nothing to train within {task.length_limit}, "
            "and are left out: raise `task.max_length`, or see `task.truncate`"
        )
    tokens = map(task.control_token_in, first_rows)
    rows_with_token = [(i, token) for i, token in enumerate(tokens) if token is not None]
    if rows_with_token:
        i, token = rows_with_token[0]
        reading = "tokens: see `task.split_special_tokens`" if task.reads_control_tokens else "text"
        warn(
            f"{len(rows_with_token):,} {scope} {name} rows have control tokens in their text, the "
            f"first is `{printable(token)}` at {rows.place(i)}; they are read as {reading}"
        )


def empty_adapted_model(recipe: Recipe) -> nn.Module:
    """Return the model on the meta device with its adapter attached; only needs its config.

    The data is read only if the recipe does not name the labels.
    """
    task = build_training_task(recipe)
    task.read_config()
    if not task.knows_labels:
        check_data(task, ())
    model, new_modules = task.empty_model()
    make_trainable(model, recipe, new_modules, learned=task.learned)
    return model
