"""What flows between the steps of a task: columns, examples, batches and predictions."""

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
"""What was asked, what the row wants, and what the model says, in words."""
MEDIA: tuple[Kind, ...] = ("image", "audio")
MAIN = "loss"  # the only term of most losses
IGNORED = -100  # a label that is not trained, as in torch's cross entropy


@dataclass(frozen=True)
class Field:
    """A column that a task reads.

    Args:
        key: The recipe key that names it.
        column: Its name.
        role: Whether the model reads it, or learns to answer it.
        kind: What it holds.
    """

    key: str
    column: str
    role: Literal["input", "target"]
    kind: Kind


@dataclass
class Batch:
    """A micro-batch of B examples.

    Args:
        inputs: What `forward` reads; the first dimension is B, or that of rows which texts share.
        targets: What `losses` reads.
        items: For each term of the loss, the items of each example (B,): rows, tokens, or their
            weights. They stay on the host, so that no step has to wait for the device.
        cost: What the batch costs, in the task's `unit`: tokens that are not padding, or pictures.
        rows: Position of each example's row in its split.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    items: dict[str, Tensor]
    cost: int
    rows: list[int]

    @property
    def n_items(self) -> float:
        """Items of the first term of the loss, of all examples."""
        return float(next(iter(self.items.values())).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the items stay where they are."""
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
    """What the model says of one example.

    Args:
        row: Position of its row in the split.
        prediction: In the user's terms: a label's name, a number, a text.
        reference: What the row says, likewise.
        scores: Probabilities by name.
        metric_inputs: By the metrics' channel, a pair (prediction, reference).
        losses: For each term of the loss, (sum, items) of the example.
        details: What else stands in its line among the predictions, by name.
        outputs: What of the model's outputs the other rows of the split are compared with.
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
        """Return the example's loss and the items that it is a sum over.

        Terms of different denominators cannot be added up over items: of several terms it is the
        weighted sum of the terms' means, over one item. A term without items counts nothing.

        Args:
            weights: Of each term, as in `Task.loss_weights`.
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
    """The examples of a split, encoded and kept on the disk.

    `lengths` is what each example costs; `full_lengths` what its row cost before it was cut at
    `max_length`, or divided.
    """

    rows: Rows
    examples: Any  # datasets.Dataset
    lengths: NDArray[np.int64]
    full_lengths: NDArray[np.int64]
    rows_without_example: int = 0  # nothing trained is left of them, after the cut at `max_length`

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def sets(self) -> NDArray[np.int64]:
        """The number of each example's set, in the order of `rows.sets`; 0 if nothing is mixed."""
        of_row = np.zeros(len(self.rows), dtype=np.int64)
        for number, positions in enumerate(self.rows.sets.values()):
            of_row[positions] = number
        found: NDArray[np.int64] = of_row[np.asarray(self.examples["row"], dtype=np.int64)]
        return found
