"""Which examples form which step: a pure function of (seed, data, recipe).

Nothing here depends on how many processes or workers there are, or on an interruption: a run that
resumes at step k asks for the batches from step k on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
WINDOW_STEPS = 50  # steps whose examples are sorted together when grouping by length


@dataclass(frozen=True)
class BatchPlan:
    """The order of training.

    Args:
        n_examples: Examples (or packs) of an epoch.
        examples_per_step: Examples of one optimizer step; the last step of an epoch may have fewer.
        seed: Decides the order; each epoch has its own.
        lengths: Length of each example, to put similar lengths into a batch; None to leave that.
    """

    n_examples: int
    examples_per_step: int
    seed: int
    lengths: NDArray[np.int64] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.n_examples / self.examples_per_step)

    def epoch(self, epoch: int) -> Iterator[Indices]:
        """Yield the examples of each step of an epoch, counted from 0."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.n_examples)
        size = self.examples_per_step
        if self.lengths is None:
            yield from (order[i : i + size] for i in range(0, len(order), size))
            return
        steps: list[Indices] = []
        for i in range(0, len(order), size * WINDOW_STEPS):
            window = order[i : i + size * WINDOW_STEPS]
            window = window[np.argsort(-self.lengths[window], kind="stable")]
            steps += [window[j : j + size] for j in range(0, len(window), size)]
        # the longest first shows at once whether the memory suffices; then any order
        yield from [steps[0], *(steps[1 + i] for i in random.permutation(len(steps) - 1))]

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, Indices]]:
        """Yield (step, its examples) for `start < step <= stop`, across epochs."""
        step = start
        while step < stop:
            epoch, done = divmod(step, self.steps_per_epoch)
            for position, examples in enumerate(self.epoch(epoch)):
                if position < done:
                    continue
                step += 1
                yield step, examples
                if step == stop:
                    return


def micro_batches(
    examples: Indices, micro_batch_size: int, rank: int = 0, processes: int = 1
) -> list[Indices]:
    """Return this process's share of a step, cut into micro-batches.

    The step's examples are divided evenly among the processes, in order, so that every example is
    seen once; a process has no micro-batch where a short step has fewer examples than processes.
    """
    share = np.array_split(examples, processes)[rank]
    return [share[i : i + micro_batch_size] for i in range(0, len(share), micro_batch_size)]
