"""Which examples form which step: a pure function of (seed, data, recipe).

Nothing here depends on how many processes or workers there are, or on an interruption: a run that
resumes at step k asks for the batches from step k on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
WINDOW_STEPS = 50  # steps whose examples are sorted together when grouping by length


@dataclass(frozen=True)
class Mixture:
    """How many examples of each of several sets form an epoch, and which.

    The examples of a set are drawn from an endless row of its permutations: an epoch takes the next
    ones. So none is drawn again before all were, and what is drawn of a set depends on the seed,
    its place among the sets, its size and its quota alone.

    Args:
        members: The examples of each set.
        quotas: How many of an epoch are of each.
    """

    members: tuple[Indices, ...]
    quotas: tuple[int, ...]

    def epoch(self, seed: int, epoch: int) -> Indices:
        """Return the examples of an epoch, set after set."""
        drawn = [np.empty(0, dtype=np.int64)]
        for number, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True)):
            size, start = len(members), epoch * quota
            for turn in range(start // size, math.ceil((start + quota) / size)):
                order = np.random.default_rng((seed, number, turn)).permutation(size)
                first, last = (min(max(at - turn * size, 0), size) for at in (start, start + quota))
                drawn.append(members[order[first:last]])
        return np.concatenate(drawn)


def quotas_of(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return how many of `total` examples are of each set: shares by weight, to the nearest.

    What rounding down leaves goes to the largest remainders, the first of equal ones.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    found = np.floor(exact).astype(np.int64)
    order = np.argsort(found - exact, kind="stable")
    found[order[: total - int(found.sum())]] += 1
    return tuple(found.tolist())


@dataclass(frozen=True)
class BatchPlan:
    """The order of training.

    Args:
        n_examples: Examples (or packs) of an epoch.
        examples_per_step: Examples of one optimizer step; the last step of an epoch may have fewer.
        seed: Decides the order; each epoch has its own.
        lengths: Length of each example (or the number of a group that it belongs to), to put
            similar ones into a batch; None to leave that.
        mixture: Which examples an epoch has, where not each of them once.
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
