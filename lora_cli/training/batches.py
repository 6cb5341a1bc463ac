"""Load the micro-batches of each step for this process, in the order of the batch plan."""

from __future__ import annotations

import functools
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader

from lora_cli.preprocessing.batch_plan import BatchPlan, micro_batches
from lora_cli.preprocessing.mixture import mixture_of
from lora_cli.preprocessing.stream import Stream
from lora_cli.tasks.cached_tensors import restored
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch, Encoded, Example
from lora_cli.tasks.generation.packing import Packed
from lora_cli.training.stop_request import SIGNALS


@dataclass
class PlannedStep:
    """A step: the examples of all processes and their cost, and this process's micro-batches."""

    number: int
    examples: list[int]
    cost: int
    batches: list[Batch]
    places: Callable[[], list[str]]
    """Returns the locations of the examples' rows."""


class Batches:
    """Iterates over the steps of a run.

    Args:
        task: The task, which packs examples and builds batches.
        split: The train rows; None with `data.streaming`.
        accelerator: The rank of this process, and the number of processes.
    """

    def __init__(self, task: Task, split: Encoded | None, accelerator: Accelerator) -> None:
        self.task, self.recipe, self.accelerator = task, task.recipe, accelerator
        self.split = split
        train = self.recipe.train
        self.steps_per_epoch: int | None = None
        if split is None:
            assert train.max_steps is not None, "the recipe's checks ask for it with streaming"
            self.total_steps = train.max_steps
            self.stream = Stream(task)
            return
        self.examples: Any = split.examples
        if train.packing:
            self.examples = task.packed(split)
        self.lengths = self.examples.lengths if train.packing else split.lengths
        self.mixture = mixture_of(self.recipe, split, self.examples)
        groups = self.lengths if train.group_by_length else task.batch_groups(split)
        self.plan = BatchPlan(len(self.examples), train.step_size, train.seed, groups, self.mixture)
        self.steps_per_epoch = self.plan.steps_per_epoch
        epochs = 3.0 if train.epochs is None else train.epochs
        self.total_steps = train.max_steps or math.ceil(epochs * self.steps_per_epoch)

    @property
    def total_cost(self) -> float:
        """The approximate cost of the run in the task's unit, such as tokens; 0 if unknown."""
        if self.steps_per_epoch is None:
            return 0.0
        epoch = float(self.lengths.sum())
        if (mixture := self.mixture) is not None:
            means = [self.lengths[members].mean() for members in mixture.members]
            epoch = float(np.dot(means, mixture.quotas))
        return epoch * self.total_steps / self.steps_per_epoch

    @property
    def note(self) -> str | None:
        """A note about the rows, to print after training."""
        return self.stream.note() if self.steps_per_epoch is None else None

    def epoch_of(self, step: int) -> float:
        """Return how many epochs a number of steps is, to four digits."""
        return round(step / self.steps_per_epoch, 4) if self.steps_per_epoch else 0.0

    def steps(self, done: int) -> Iterator[PlannedStep]:
        """Yield all steps after the first `done` steps."""
        if self.steps_per_epoch is None:
            yield from self._stream(done)
            return
        prepared: Any = self.examples
        if self.task.prepares:
            prepared = _PreparedExamples(self.task, self.examples, self.recipe.train.seed)
        require_shared_memory(self.recipe.train.workers)
        loader: Any = DataLoader(
            prepared,
            batch_sampler=(
                [(step, i) for i in part.tolist()] if self.task.prepares else part.tolist()
                for step, examples in self.plan.steps(done, self.total_steps)
                for part in self._own_part(examples)
            ),
            collate_fn=self.task.batch,
            num_workers=self.recipe.train.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_run,
        )
        batches = iter(loader)
        for step, examples in self.plan.steps(done, self.total_steps):
            yield PlannedStep(
                step,
                examples.tolist(),
                int(self.lengths[examples].sum()),
                list(islice(batches, len(self._own_part(examples)))),
                functools.partial(self._places, examples.tolist()),
            )

    def from_the_start(self) -> Iterator[Batch]:
        """Yield micro-batches of all train rows in the order of training, epoch after epoch.

        All processes get the same ones.
        """
        for step, examples in self.plan.steps(0, sys.maxsize):
            for part in micro_batches(examples, self.task.micro_batch):
                rows = [self.examples[i] for i in part.tolist()]
                if self.task.prepares:
                    seed = self.recipe.train.seed
                    rows = [prepared_for(self.task, row, seed, step) for row in rows]
                yield self.task.batch(rows)

    def _places(self, examples: list[int]) -> list[str]:
        assert self.split is not None
        packs = self.examples.packs if isinstance(self.examples, Packed) else None
        members = [m for i in examples for m in (packs[i] if packs else [i])]
        rows = self.split.examples[members]["row"]
        return [self.split.rows.place(row) for row in dict.fromkeys(rows)]

    def _own_part(self, examples: Any) -> list[Any]:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return micro_batches(examples, self.task.micro_batch, rank, processes)

    def _stream(self, done: int) -> Iterator[PlannedStep]:
        size = self.recipe.train.step_size
        examples = islice(self.stream, done * size, None)
        for step in range(done + 1, self.total_steps + 1):
            chunk = list(islice(examples, size))
            if self.task.prepares:
                seed = self.recipe.train.seed
                chunk = [prepared_for(self.task, row, seed, step) for row in chunk]
            parts = self._own_part(np.arange(len(chunk)))
            yield PlannedStep(
                step,
                [example["row"] for example in chunk],
                sum(map(self.task.cost, chunk)),
                [self.task.batch([chunk[i] for i in part]) for part in parts],
                [example["place"] for example in chunk].copy,
            )


class _PreparedExamples:
    """A data set that prepares (augments) examples when a worker of the data loader reads them.

    A key is (step, index of the example): the random numbers of an example depend only on the
    seed, the step and the row, not on the worker or on earlier examples.
    """

    def __init__(self, task: Task, examples: Any, seed: int) -> None:
        self.task, self.examples, self.seed = task, examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        step, position = key
        (example,) = self.examples.__getitems__([position])
        return prepared_for(self.task, example, self.seed, step)


def prepared_for(task: Task, example: Example, seed: int, step: int) -> Example:
    """Prepare an example for a training step, so that it can be collated."""
    rng = np.random.default_rng((seed, step, int(example["row"])))
    return task.prepare(restored(example), rng, training=True)


def require_shared_memory(workers: int) -> None:
    """Check that the semaphores for workers and their queues can be created.

    Otherwise torch would leave an incomplete data loader behind, which prints a traceback.

    Raises:
        OSError: If the shared memory is full, or cannot be used.
    """
    context = multiprocessing.get_context()
    try:
        semaphores = [context.Semaphore() for _ in range(8 + 3 * workers if workers else 0)]
        del semaphores
    except OSError as error:
        raise OSError(error.errno, error.strerror, "/dev/shm") from error


def _leave_signals_to_the_run(_: int) -> None:
    """Let a worker ignore signals to its process group, as the run needs it until it stops."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
