"""Plan which examples form each step, as a function of only the seed, the data and the recipe.

The plan depends neither on the number of processes or workers, nor on interruptions: a run that is
resumed after step k continues with the examples of step k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
WINDOW_STEPS = 50  # steps whose examples are sorted by length together


@dataclass(frozen=True)
class Mixture:
    """Chooses the examples of each epoch from several data sets.

    The examples of a set are taken in order from an endless sequence of its permutations, so none
    is repeated before all others were used. The choice depends only on the seed, and on the set's
    position among the sets, its size and its quota.

    Args:
        members: The examples of each set.
        quotas: The number of examples of each set in an epoch.
    """

    members: tuple[Indices, ...]
    quotas: tuple[int, ...]

    def epoch(self, seed: int, epoch: int) -> Indices:
        """Return the examples of an epoch, set after set."""
        chunks = [np.empty(0, dtype=np.int64)]
        for number, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True)):
            size, start = len(members), epoch * quota
            for cycle in range(start // size, math.ceil((start + quota) / size)):
                order = np.random.default_rng((seed, number, cycle)).permutation(size)
                first, last = (
                    min(max(end - cycle * size, 0), size) for end in (start, start + quota)
                )
                chunks.append(members[order[first:last]])
        return np.concatenate(chunks)


def quotas_of(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return how many of `total` examples come from each set, in proportion to the weights.

    Counts are rounded down; the remaining examples go to the sets with the largest remainders. Ties
    go to the earlier set.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: total - int(quotas.sum())]] += 1
    return tuple(quotas.tolist())


@dataclass(frozen=True)
class BatchPlan:
    """The order of the examples in training.

    Args:
        n_examples: The number of examples (or packs) in an epoch.
        examples_per_step: The number of examples in a step; the last step of an epoch may have
            fewer.
        seed: Determines the order, which differs from epoch to epoch.
        lengths: The length of each example, or the number of its group. Examples with similar
            values are put into the same step; None to ignore it.
        mixture: The examples of an epoch, unless it has each example once.
    """

    n_examples: int
    examples_per_step: int
    seed: int
    lengths: NDArray[np.int64] | None = None
    mixture: Mixture | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.n_examples / self.examples_per_step)

    def epoch(self, epoch: int) -> Iterator[Indices]:
        """Yield the examples of each step of an epoch, counted from 0."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.n_examples)
        if self.mixture is not None:
            order = self.mixture.epoch(self.seed, epoch)[order]
        size = self.examples_per_step
        if self.lengths is None:
            yield from (order[i : i + size] for i in range(0, len(order), size))
            return
        steps: list[Indices] = []
        for i in range(0, len(order), size * WINDOW_STEPS):
            window = order[i : i + size * WINDOW_STEPS]
            window = window[np.argsort(-self.lengths[window], kind="stable")]
            steps += [window[j : j + size] for j in range(0, len(window), size)]
        # the step with the longest examples comes first, so that a lack of memory shows at once
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
    """Return one process's share of a step, split into micro-batches.

    The examples of a step are split evenly among the processes. Some processes have no micro-batch
    if the step has fewer examples than there are processes.

    Args:
        examples: The indices of the examples of the step.
        micro_batch_size: The number of examples in one forward pass.
        rank: The rank of this process.
        processes: The number of processes.
    """
    share = np.array_split(examples, processes)[rank]
    return [share[i : i + micro_batch_size] for i in range(0, len(share), micro_batch_size)]
