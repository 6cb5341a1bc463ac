"""`Task`, the base class of all tasks: what every task implements.

Only a task knows what a row is. The code that reads rows, trains, evaluates and merges never asks
which task it has, and does not assume tokens, a tokenizer or logits. Whatever differs between tasks
is a method of this class, or of its base classes `TaskRows`, `TaskModel`, `TaskMetrics` and
`TaskAnswers`. The order of calls:

1. `load_processor`, then `learn_from` with the rows of the splits;
2. `encode` makes examples of rows, once; `prepare` and `collate` make a batch of examples;
3. `load_model`, then `fit_to_model`, which tries the model on small batches;
4. `forward`, then `losses` for training, and `predictions` for evaluation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.adapters.frozen_lower_layers import FrozenLayers
from lora_cli.data.load_rows import Rows
from lora_cli.data.row_texts import readable_value
from lora_cli.errors import LoraError, counted
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks.cached_tensors import restored
from lora_cli.tasks.examples import Batch, Encoded, Example, Prediction
from lora_cli.tasks.hidden_states import STATES, has_states, states_of_batch, without_states
from lora_cli.tasks.proposal import BaseFacts, Proposal, Table
from lora_cli.tasks.task_answers import TaskAnswers
from lora_cli.tasks.task_metrics import TaskMetrics
from lora_cli.tasks.task_model import TaskModel


def prepared_for_evaluation(task: Task, example: Example) -> Example:
    """Return an example ready to be collated; its random numbers are the same every time."""
    rng = np.random.default_rng((task.recipe.train.seed, int(example["row"])))
    return task.prepare(restored(example), rng, training=False)


class Task(TaskAnswers, TaskMetrics, TaskModel):
    """A task: how rows become batches, batches a loss, and outputs predictions."""

    unit: str = "token"
    """What `cost` counts."""
    layout: str = "as the examples are"
    """How the examples of a batch are arranged in its tensors, for the report."""
    same_in_any_batch: bool = False
    """Whether an example's outputs are known not to depend on the others in its batch."""
    several_inputs: bool = False
    """Whether an example has several rows in the tensors of a batch, one for each text."""
    waits_for_device: bool = False
    """Whether the loss copies values to the host in every step, for example to assign boxes."""
    couples_examples: bool = False
    """Whether the loss compares the examples of a step with each other (in-batch negatives).

    `forward` then returns a tensor with as many rows as each target. The tensors of several
    micro-batches are joined to one larger batch, and `losses` receives that.
    """
    max_length: int | None = None
    """The length at which examples are truncated or split, in `unit`s; None for no limit."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.learned = Learned()  # such as the labels, learned from the rows
        self.notes: list[str] = []  # printed before training
        self.drawn = frozenset()
        self.trained_in: Path | None = None  # the folder of the adapter that is used, if any
        self.frozen_layers: FrozenLayers | None = None  # of the model that is trained
        self.frozen_facts: dict[str, str] = {}  # what is cached of them, for the report
        self.config: PretrainedConfig

    @classmethod
    def for_base(cls, recipe: Recipe) -> type[Task]:
        """Return the class of the task for the recipe's base, if there are several."""
        return cls

    @property
    def completed_recipe(self) -> Recipe:
        """The recipe, completed by what has been learned so far."""
        return self.learned.completed(self.recipe)

    @property
    def micro_batch(self) -> int:
        """The number of examples of one forward pass in training."""
        return self.learned.micro_batch_of(self.recipe.train)

    # -- the processor: a tokenizer, an image processor, a feature extractor

    @abstractmethod
    def load_processor(self) -> None:
        """Load the processor, which turns rows into inputs, and the model's configuration."""

    def read_config(self) -> None:
        """Read the model's configuration, which is all that `empty_model` needs."""
        self.config = load_config(self.recipe)

    @abstractmethod
    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the processor into a folder, as transformers keeps it.

        Args:
            folder: The folder for its files.
            facts: What `base_facts` returned; receives the identity of the copy, if it differs.
        """

    @property
    @abstractmethod
    def base_facts(self) -> dict[str, Any]:
        """Everything about the base that affects the result, besides its tensors.

        `config` contains the keys of config.json that change the computation. If the base has
        several parts, each key is prefixed with the name of its part (`unet.sample_size`).
        `tokenizer`, `chat_template` and `processor` are included if the base has them.
        """

    @abstractmethod
    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""

    @property
    def length_note(self) -> str | None:
        """A warning if `max_length` is more than the model can read; otherwise None."""
        return None

    @property
    def length_limit(self) -> str:
        """`max_length` in words: `512 tokens`."""
        return counted(self.max_length or 0, self.unit)

    @property
    def length_name(self) -> str:
        """`max_length` for a table: `512`."""
        return str(self.max_length)

    @property
    def longer_hint(self) -> str:
        """A hint for rows that are too long."""
        return "raise `task.max_length`"

    # -- examples

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row. They should be small, since they are cached on disk.

        If a row is longer than `max_length`, its examples have its length as `full_length`.
        """

    @abstractmethod
    def features(self) -> dict[str, str]:
        """Return the type of each key of an example: `list<int32>`, `float32`, `media`."""

    @abstractmethod
    def cost(self, example: Example) -> int:
        """Return what an example costs, in `unit`s."""

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of training rows, which may have more keys than other examples."""
        return self.encode(rows)

    def train_features(self) -> dict[str, str]:
        """Return the type of each key of an example of the train split."""
        return self.features()

    def batch_groups(self, split: Encoded) -> NDArray[np.int64] | None:
        """Return a number for each example, by which batches are grouped if possible, or None.

        A batch of examples with different numbers is computed correctly, but more slowly.
        """
        return None

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check that the model can read the examples.

        Raises:
            LoraError: If it cannot. The caller adds the location of the row.
        """

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint for a row in which nothing is trained."""
        return self.longer_hint

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example ready to be collated: decoded, augmented, with its noise.

        Args:
            example: An example that `encode` returned.
            rng: The only source of random numbers. It is seeded with (seed, step, row) in training,
                and otherwise with (seed, row), so that all evaluations get the same numbers.
            training: Whether to augment.
        """
        return example

    @property
    def prepares(self) -> bool:
        """Whether examples need `prepare`, or have cached tensors."""
        own = type(self)
        keeps_tensors = own.frozen_outputs is not Task.frozen_outputs
        return own.prepare is not Task.prepare or keeps_tensors

    @property
    def augments(self) -> bool:
        """Whether `prepare` changes the inputs of frozen parts at random, so none can be cached."""
        return False

    @staticmethod
    def propose(table: Table, base: BaseFacts) -> Proposal | None:
        """Return what `lora init` would propose for a table, or None if it is not for this task.

        Of the proposals of all tasks, the most certain one is written as a recipe. A proposal may
        be an error instead, which is raised if no other is more certain.

        Args:
            table: The rows, the kinds of their columns, and the columns that the user names.
            base: What is known of the base model, which is not loaded.
        """
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return prepared examples as one batch.

        Lists of numbers in an example may be read-only numpy views of the cache. Copy them before
        changing them (`torch.tensor` does, `torch.from_numpy` warns).
        """

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return prepared examples as one batch, with their cached hidden states, if any."""
        batch = self.collate(examples)
        if has_states(examples):
            batch.inputs |= states_of_batch([one[STATES] for one in examples], batch.inputs)
        return batch

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an encoded example for people to read: some facts, and what the model sees.

        Args:
            example: An example that `encode` returned.
            colour: Whether to mark the trained parts by colour.
        """
        return [], ""

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return what the model reads of a row, for people to read."""
        return readable_value([row.get(column) for column in self.input_columns().values()])

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a small image of a row for the report, or its sound, as a `data:` URL."""
        return None

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the answer of a row for people to read, if its predictions do not have it."""
        return None

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of the examples that the processor cannot represent, and a warning.

        Args:
            name: The name of the rows in the warning.
            rows: The rows.
            examples: Their examples: a data set, or a list.
        """
        return 0.0, None

    def trained_share(self, split: Encoded) -> float | None:
        """Return the share of a split's units that are trained, if only some of them are."""
        return None

    # -- packing

    def packed(self, split: Encoded) -> Any:
        """Return the examples of a split in packs, with the interface of `split.examples`.

        Raises:
            LoraError: If the task has no packing (see `can_pack` of its spec).
        """
        what = f"`train.packing` has no meaning with `task.type: {self.recipe.task.type}`"
        raise LoraError(what, self.recipe.at("train.packing"), "leave it out")

    def check_packing(self, model: nn.Module, split: Encoded) -> None:
        """Check on the model that the examples of a pack do not see each other."""
        self.packed(split)

    def fit_as(self, other: Task) -> None:
        """Adopt the settings that another instance of the task has chosen for the model."""

    # -- loss and predictions

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output for a batch, as `losses` and `predictions` read it."""

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """Return the same as `forward`, but start from the batch's cached hidden states, if any."""
        inputs, states = without_states(batch.inputs)
        if not states:
            return self.forward(model, batch)
        assert self.frozen_layers is not None, "cached states need the model that computed them"
        with self.frozen_layers.skipping(states):
            return self.forward(model, replace(batch, inputs=inputs))

    @abstractmethod
    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Return, for each term of the loss, its sum over the items of each example (B,)."""

    @abstractmethod
    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        """Return a prediction for each example of the batch; `predict` adds the losses."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted sum of all terms over all items of a batch; a scalar."""
        found, own = self.losses(model, self.output(model, batch), batch), self.loss_weights
        weights = own if found.keys() == own.keys() else self.train_loss_weights
        return torch.stack([weights[k] * v.sum() for k, v in found.items()]).sum()

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return a prediction for each example of the batch, with its losses."""
        output = self.output(model, batch)
        predictions = self.predictions(model, output, batch)
        for term, sums in self.losses(model, output, batch).items():
            items = batch.items[term].tolist()
            for found, loss, count in zip(predictions, sums.tolist(), items, strict=True):
                found.losses[term] = (loss, count)
        return predictions

    compares_rows: bool = False
    """Whether a row's prediction depends on all rows of the split, as in `compared`."""

    def compared(self, found: Sequence[Prediction], split: Encoded) -> list[Prediction]:
        """Return the predictions for the rows of a split, each with its losses.

        Args:
            found: What `predict` returned for each row, in the order of the rows.
            split: The rows.
        """
        raise NotImplementedError

    joins_examples: bool = False
    """Whether the examples of a row have one common answer, which `join` returns."""

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the predictions for all examples of a row as one; the losses are added later."""
        raise NotImplementedError
