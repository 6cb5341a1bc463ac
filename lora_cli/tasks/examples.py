"""The data that a task passes on: columns, examples, batches and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.load_rows import Rows

Example = dict[str, Any]
Kind = Literal["text", "messages", "label", "labels", "number", "tags", "boxes", "image", "audio"]
Sample = tuple[str, str, str]
"""The input of a row, its own answer, and the model's answer, as texts."""
MEDIA: tuple[Kind, ...] = ("image", "audio")
MAIN = "loss"  # the only term of most losses
IGNORED = -100  # a label that is not trained, as in torch's cross entropy


@dataclass(frozen=True)
class Field:
    """A column that a task reads.

    Args:
        key: The recipe key that names the column.
        column: The name of the column.
        role: Whether the model reads it, or learns to answer it.
        kind: What it contains.
    """

    key: str
    column: str
    role: Literal["input", "target"]
    kind: Kind


@dataclass
class Batch:
    """A micro-batch of B examples.

    Args:
        inputs: The inputs of `forward`; their first dimension is B, or the number of shared rows.
        targets: The targets of `losses`.
        items: For each term of the loss, the items of each example (B,): rows, tokens, or their
            weights. They stay on the host, so that no step waits for the device.
        cost: The size of the batch in the task's `unit`, such as tokens without padding.
        rows: The position of each example's row in its split.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    items: dict[str, Tensor]
    cost: int
    rows: list[int]

    @property
    def n_items(self) -> float:
        """The number of items of all examples in the first term of the loss."""
        return float(next(iter(self.items.values())).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; its items stay on the host."""
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        targets = {k: v.to(device, non_blocking=True) for k, v in self.targets.items()}
        return Batch(inputs, targets, self.items, self.cost, self.rows)

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU can copy from; the data loader calls this."""
        inputs = {k: v.pin_memory() for k, v in self.inputs.items()}
        targets = {k: v.pin_memory() for k, v in self.targets.items()}
        return Batch(inputs, targets, self.items, self.cost, self.rows)


@dataclass
class Prediction:
    """The model's answer to one example.

    Args:
        row: The position of its row in the split.
        prediction: The answer in the user's terms: the name of a label, a number, a text.
        reference: The answer of the row, in the same form.
        scores: Probabilities by name.
        metric_inputs: For each channel of the metrics, a pair (prediction, reference).
        losses: For each term of the loss, its sum and the number of items of the example.
        details: Further values for the line of the prediction, by name.
        outputs: Outputs of the model by which the rows of the split are compared.
    """

    row: int
    prediction: Any
    reference: Any
    scores: dict[str, float] | None = None
    metric_inputs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None

    def weighted_loss(self, weights: Mapping[str, float]) -> tuple[float, float]:
        """Return the example's loss, and the number of items over which it is summed.

        Terms with different numbers of items cannot be added. So with several terms, the loss is
        the weighted sum of their means, and counts as one item. A term without items is left out.

        Args:
            weights: The weight of each term, as in `Task.loss_weights`.
        """
        if len(weights) == 1:
            (term, weight), *_ = weights.items()
            return weight * self.losses[term][0], self.losses[term][1]
        means = [
            weight * self.losses[term][0] / self.losses[term][1]
            for term, weight in weights.items()
            if self.losses[term][1]
        ]
        return sum(means), float(bool(means))


@dataclass
class Encoded:
    """The examples of a split, encoded and cached on disk.

    `lengths` contains the cost of each example, and `full_lengths` the cost of its row before it
    was truncated to `max_length` or split.
    """

    rows: Rows
    examples: Any  # datasets.Dataset
    lengths: NDArray[np.int64]
    full_lengths: NDArray[np.int64]
    rows_without_example: int = 0  # rows in which nothing is left to train after truncation

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def sets(self) -> NDArray[np.int64]:
        """The index of each example's data set in `rows.sets`; 0 if no data sets are mixed."""
        of_row = np.zeros(len(self.rows), dtype=np.int64)
        for number, positions in enumerate(self.rows.sets.values()):
            of_row[positions] = number
        # [:] reads the whole column at once, unlike iterating over it
        found: NDArray[np.int64] = of_row[np.array(self.examples["row"][:], dtype=np.int64)]
        return found
