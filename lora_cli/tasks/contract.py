"""What a task owes to everything that reads rows, trains, evaluates and merges.

A task alone knows what a row is. No caller asks which task it has, nor assumes tokens, a tokenizer
or logits: what differs between kinds of work is a method here, or of `TaskRows`, `TaskModel`,
`TaskMetrics` or `TaskAnswers`, which a task is as well. The order of calls:

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
from lora_cli.data.row_texts import shown_value
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
    """Return an example ready to be collated; what is random in it is the same every time."""
    rng = np.random.default_rng((task.recipe.train.seed, int(example["row"])))
    return task.prepare(restored(example), rng, training=False)


class Task(TaskAnswers, TaskMetrics, TaskModel):
    """A kind of work: how rows become batches, batches a loss, and outputs predictions."""

    unit: str = "token"
    """What `cost` counts."""
    layout: str = "as the examples are"
    """How the examples of a batch lie in its tensors, in words."""
    same_in_any_batch: bool = False
    """Whether an example's outputs surely do not depend on the others of its batch."""
    several_inputs: bool = False
    """Whether an example has several rows in the tensors of a batch, one for each of its texts."""
    waits_for_device: bool = False
    """Whether the loss copies something to the host in every step, such as to assign boxes."""
    couples_examples: bool = False
    """Whether the loss compares the examples of a step with each other (in-batch negatives).

    `forward` then returns a tensor with as many rows as each target. Those of several micro-batches
    make a larger batch, of which `losses` is the loss.
    """
    max_length: int | None = None
    """Where examples are cut or divided, in `unit`s; None: nowhere."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.learned = Learned()  # what the rows teach, and others learn on the way
        self.notes: list[str] = []  # what a user should know before training
        self.drawn = frozenset()
        self.trained_in: Path | None = None  # the adapter's folder, where one is used
        self.frozen_layers: FrozenLayers | None = None  # of the model that is trained
        self.frozen_facts: dict[str, str] = {}  # what is kept of them, for the report
        self.config: PretrainedConfig

    @classmethod
    def for_base(cls, recipe: Recipe) -> type[Task]:
        """Return the class of the task for the recipe's base, where kinds of bases differ."""
        return cls

    @property
    def completed_recipe(self) -> Recipe:
        """The recipe with what has been learnt until now."""
        return self.learned.completed(self.recipe)

    @property
    def micro_batch(self) -> int:
        """Examples of one forward pass in training."""
        return self.learned.micro_batch_of(self.recipe.train)

    # -- the processor: a tokenizer, an image processor, a feature extractor

    @abstractmethod
    def load_processor(self) -> None:
        """Load what turns rows into inputs, and the model's configuration."""

    def read_config(self) -> None:
        """Read the model's configuration, which is all of the base that `empty_model` needs."""
        self.config = load_config(self.recipe)

    @abstractmethod
    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the processor into a folder, as transformers keeps it.

        Args:
            folder: Where its files go.
            facts: What `base_facts` returned; gets what identifies the copy, if that differs.
        """

    @property
    @abstractmethod
    def base_facts(self) -> dict[str, Any]:
        """What of the base decides the computation besides its tensors.

        `config` has the computing keys of config.json, of a base of several parts with the name of
        the part before each (`unet.sample_size`). `tokenizer`, `chat_template` and `processor` are
        there where the base has them.
        """

    @abstractmethod
    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row."""

    @property
    def length_note(self) -> str | None:
        """What to say of a `max_length` that is more than the model can take, if it is."""
        return None

    @property
    def length_limit(self) -> str:
        """`max_length` in words: `512 tokens`."""
        return counted(self.max_length or 0, self.unit)

    @property
    def length_name(self) -> str:
        """`max_length` as it stands in a table: `512`."""
        return str(self.max_length)

    @property
    def longer_hint(self) -> str:
        """What to do where rows are too long."""
        return "raise `task.max_length`"

    # -- examples

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row: small facts, which are kept on the disk.

        An example of a row that is longer than `max_length` has the row's own `full_length`.
        """

    @abstractmethod
    def features(self) -> dict[str, str]:
        """Return the type of each key of an example: `list<int32>`, `float32`, `media`."""

    @abstractmethod
    def cost(self, example: Example) -> int:
        """Return what an example costs, in `unit`s."""

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of train rows, which may hold more than those that are measured."""
        return self.encode(rows)

    def train_features(self) -> dict[str, str]:
        """Return the type of each key of an example that is trained."""
        return self.features()

    def batch_groups(self, split: Encoded) -> NDArray[np.int64] | None:
        """Return a number for each example: batches hold equal ones, as far as they can; or None.

        Other examples in a batch are right too, and slower.
        """
        return None

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check that the model can read the examples.

        Raises:
            LoraError: Without a place; the caller adds the row.
        """

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint, where a row leaves nothing to train."""
        return self.longer_hint

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example ready to be collated: decoded, augmented, with its noise drawn.

        Args:
            example: One of those that `encode` returned.
            rng: It alone may decide what is random. In training it is the generator of (seed,
                step, row), else that of (seed, row), so that every evaluation draws the same.
            training: Whether to augment.
        """
        return example

    @property
    def prepares(self) -> bool:
        """Whether examples are prepared at all, or hold tensors that are kept as bytes."""
        own = type(self)
        keeps_tensors = own.frozen_outputs is not Task.frozen_outputs
        return own.prepare is not Task.prepare or keeps_tensors

    @property
    def augments(self) -> bool:
        """Whether `prepare` draws in training what frozen parts read; then nothing is kept."""
        return False

    @staticmethod
    def propose(table: Table, base: BaseFacts) -> Proposal | None:
        """Return what `lora init` would suggest for a table, or None if it is not for this task.

        The most certain proposal of all task types is drafted. It may hold an error instead, which
        is raised if no other is more certain.

        Args:
            table: The rows, what their columns hold, and which columns the user names.
            base: What is known of the base model; nothing of it is loaded.
        """
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return prepared examples as one batch.

        A list of numbers in an example may be a numpy view of the encoded corpus, which cannot be
        written to: copy it before you change it (`torch.tensor` does, `torch.from_numpy` warns).
        """

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return prepared examples as one batch, with the hidden states that they bring along."""
        batch = self.collate(examples)
        if has_states(examples):
            batch.inputs |= states_of_batch([one[STATES] for one in examples], batch.inputs)
        return batch

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return facts of an encoded example, and what the model sees, in words.

        Args:
            example: One of those that `encode` returned.
            colour: Whether to mark what is trained by colour.
        """
        return [], ""

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return what the model reads of a row, in words."""
        return shown_value([row.get(column) for column in self.input_columns().values()])

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a small picture of a row for the report, or its sound, as a `data:` address."""
        return None

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return what a row wants, in words, where its predictions do not say it."""
        return None

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of the examples that the processor cannot represent, and a warning.

        Args:
            name: What the rows are called in the warning.
            rows: The rows.
            examples: Of the rows: a data set, or a list.
        """
        return 0.0, None

    def trained_share(self, split: Encoded) -> float | None:
        """Return the share of a split's units that are predicted, where not all or none are."""
        return None

    # -- packing

    def packed(self, split: Encoded) -> Any:
        """Return a split with several examples in a row; looks like `split.examples`.

        Raises:
            LoraError: If the task has no such thing (`can_pack` of its spec says so before).
        """
        what = f"`train.packing` has no meaning with `task.type: {self.recipe.task.type}`"
        raise LoraError(what, self.recipe.at("train.packing"), "leave it out")

    def check_packing(self, model: nn.Module, split: Encoded) -> None:
        """Check on the model that what is packed together stays apart."""
        self.packed(split)

    def fit_as(self, other: Task) -> None:
        """Take over what another instance of the task has chosen for the model."""

    # -- loss and predictions

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output for a batch, as `losses` and `predictions` read it."""

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """Return the same; of the frozen layers, what the batch brings along is not computed."""
        inputs, states = without_states(batch.inputs)
        if not states:
            return self.forward(model, batch)
        assert self.frozen_layers is not None, "states of a model that is not known"
        with self.frozen_layers.entering(states):
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
    """Whether a row's prediction depends on those of the whole split, which `compared` gets."""

    def compared(self, found: Sequence[Prediction], split: Encoded) -> list[Prediction]:
        """Return the predictions for the rows of a split, each with its losses.

        Args:
            found: What `predict` made of each, in the order of the rows.
            split: The rows.
        """
        raise NotImplementedError

    joins_examples: bool = False
    """Whether the examples of a row have one answer together, which `join` makes."""

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the predictions for all examples of a row as one; the losses are added later."""
        raise NotImplementedError
