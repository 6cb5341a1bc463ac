"""What a task owes to everything that reads rows, trains, evaluates and merges.

A task alone knows what a row is. No caller asks which task it has, nor assumes tokens, a tokenizer
or logits: what differs between kinds of work is a method here. The order of calls:

1. `load_processor`, then `learn_from` with the rows of the splits;
2. `encode` makes examples of rows, once; `prepare` and `collate` make a batch of examples;
3. `load_model`, then `fit_to_model`, which tries the model on small batches;
4. `forward`, then `losses` for training, and `predictions` for evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.data.load_rows import Rows
from lora_cli.data.row_texts import shown_value
from lora_cli.data.text_lines import byte_error
from lora_cli.errors import LoraError, Problem, counted, did_you_mean
from lora_cli.metrics import (
    Channel,
    MetricContext,
    check_metric_names,
    definition,
    is_script,
    known_metrics,
    metric_mode,
    result_names,
)
from lora_cli.models.base_model import build_empty, load_config, load_pretrained, new_modules
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks.kept_tensors import restored

Example = dict[str, Any]
Kind = Literal["text", "messages", "label", "labels", "number", "tags", "image", "audio"]
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
        inputs: What `forward` reads, tensors whose first dimension is B.
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
    """

    row: int
    prediction: Any
    reference: Any
    scores: dict[str, float] | None = None
    metric_inputs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

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


def prepared_for_evaluation(task: Task, example: Example) -> Example:
    """Return an example ready to be collated; what is random in it is the same every time."""
    rng = np.random.default_rng((task.recipe.train.seed, int(example["row"])))
    return task.prepare(restored(example), rng, training=False)


class Task(ABC):
    """A kind of work: how rows become batches, batches a loss, and outputs predictions."""

    auto_class: Any
    """The transformers class that builds the model."""
    metric_channel: Channel
    """What the task's own metrics read (see `metrics.Channel`)."""
    default_metrics: tuple[str, ...]
    """Metrics that are measured if the recipe names none; the first chooses the best adapter."""
    loss_weights: Mapping[str, float] = {MAIN: 1.0}
    """The terms of the loss, with their weights. A term is the mean over its own items."""
    unit: str = "token"
    """What `cost` counts, one of it."""
    input_name: str = "input"
    """What one thing to be answered is called."""
    answer_hint: str = "name another"
    """What to do where one cannot be answered."""
    has_head: bool = False
    """Whether the task adds a head to the pretrained model."""
    max_length: int | None = None
    """Where examples are cut or divided, in `unit`s; None: nowhere."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.learned = Learned()  # what the rows teach, and others learn on the way
        self.notes: list[str] = []  # what a user should know before training
        self.trained_in: Path | None = None  # the adapter's folder, where one is used
        self.config: PretrainedConfig

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
    def longer_hint(self) -> str:
        """What to do where rows are too long."""
        return "raise `task.max_length`"

    # -- rows

    @abstractmethod
    def fields(self) -> list[Field]:
        """Return the columns that the task reads."""

    def input_columns(self) -> dict[str, str]:
        """Return the columns that the model reads, by the place of the key that names them."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "input"}

    def target_columns(self) -> dict[str, str]:
        """Return the columns that it learns to answer, likewise."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "target"}

    def compared_columns(self) -> list[str]:
        """Return the columns by which rows count as equal: what the model reads."""
        return list(self.input_columns().values())

    @property
    def knows_labels(self) -> bool:
        """Whether the recipe says all that the task has to know of the labels."""
        return True

    @property
    def reads_train(self) -> bool:
        """Whether the task learns something from the train rows whatever split is asked for."""
        return not self.knows_labels

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the model's outputs, if it has labels."""
        return []

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return what a row's answer is called, to count and to compare; None if it has no name."""
        return None

    @property
    def label_names(self) -> list[str]:
        """What `labels_of` and `label_counts` speak of, if that is not each of the `labels`."""
        return self.labels

    def answer_of(self, row: dict[str, Any]) -> str | None:
        """Return a row's answer as text, to find equal inputs with different answers."""
        labels = self.labels_of(row)
        return None if labels is None else ", ".join(labels)

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label stands in the rows, in the order of the labels."""
        return {}

    def learn_form(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn how the rows are written, before `row_error` judges each of them.

        What recipes have a key for goes into `self.learned.task`.
        """

    def learn_from(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn from the rows what the recipe leaves open, such as the labels.

        What recipes have a key for goes into `self.learned.task`.
        """

    @property
    def completed_recipe(self) -> Recipe:
        """The recipe with what has been learnt until now."""
        return self.learned.completed(self.recipe)

    @property
    def micro_batch(self) -> int:
        """Examples of one forward pass in training."""
        return self.learned.micro_batch_of(self.recipe.train)

    @abstractmethod
    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that the model reads, or nothing."""

    @abstractmethod
    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that it learns to answer, or nothing."""

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return what a row holds that no task reads though it changes its meaning, and a hint."""
        return None

    def row_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row, or nothing."""
        return self.input_error(row) or self.target_error(row) or self._byte_error(row)

    def _byte_error(self, row: dict[str, Any]) -> str:
        """Return which column that is read holds bytes that are no text, or nothing."""
        for column in self.target_columns().values():
            value = row.get(column)
            if isinstance(value, str) and (error := byte_error(value, "UTF-8")):
                return f"column `{column}`: {error}"
        return ""

    def skip_reason(self, row: dict[str, Any]) -> str:
        """Return why the recipe leaves a row out, or nothing."""
        return ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return what is wrong with the label of a streamed row, which `learn_from` did not see."""
        return None

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

    def check_examples(self, examples: Sequence[Example]) -> None:  # noqa: B027 - optional
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

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return prepared examples as one batch."""

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
        """Return a small picture of a row for the report, as a `data:` address, if it has one."""
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

    # -- model

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration with the task's changes."""
        return load_config(self.recipe)

    @property
    def is_quantised(self) -> bool:
        """Whether the base keeps codes in the place of weights."""
        return getattr(self.config, "quantization_config", None) is not None

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, and the names of the modules that are new in it.

        Args:
            device: Where the weights go.
            dtype: How they are kept, instead of as the recipe says; `auto` is as the checkpoint.
        """
        model, missing = load_pretrained(
            self.auto_class, self.recipe, self.model_config(), device, dtype, self.has_head
        )
        self.arrange_head(model, missing)
        return model, new_modules(model, missing) if self.has_head else []

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:  # noqa: B027 - optional
        """Put the outputs of a head that the checkpoint holds into the order of the task's own."""

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same without weights."""
        model = build_empty(self.auto_class, self.recipe, self.model_config())
        return model, new_modules(model) if self.has_head else []

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027
        """Try the model on small batches, and choose what depends on it, such as the padding.

        Args:
            model: The model that will be used; it is left as it was.
            longest: Cost of the longest example, if that is known.

        Raises:
            LoraError: If the model is of no use for the task, or if what it says of an example
                depends on the others of the batch.
        """

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return frozen models whose outputs for an example are computed once, and kept.

        They may be parts of the model, or models that the task holds itself, as a teacher. What is
        kept depends on their tensors, and on the example as `prepare` returns it in evaluation.
        """
        return {}

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return what the frozen parts make of each example of a batch, by name.

        The examples that `prepare` and `collate` get hold it then under these names. A batch
        without it is one of new rows, of which it has to be computed in `forward`.

        Returns:
            Tensors (B, …), of which each example gets its own row.
        """
        return {}

    def fit_as(self, other: Task) -> None:  # noqa: B027 - optional
        """Take over what another instance of the task has chosen for the model."""

    def try_training(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027
        """Compute small batches as in training, whose forward pass may ask for more.

        Raises:
            LoraError: If the model cannot compute them.
        """

    @abstractmethod
    def probe(self) -> dict[str, Tensor]:
        """Return inputs of the model to compare outputs on, the same every time."""

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        """Return what is compared of what a model makes of the probe."""
        return self.tensor_of(model(**probe))

    def reloaded(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Return a whole model from a folder that the model's `save_pretrained` wrote."""
        model: nn.Module = self.auto_class.from_pretrained(folder, dtype=dtype)
        return model

    def tensor_of(self, output: Any) -> Tensor:
        """Return what of a model's output is compared."""
        logits: Tensor = output.logits
        return logits

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Learn what the recipe of an adapter that another tool made would say, by its tensors.

        Raises:
            LoraError: If they do not tell what has to be known.
        """

    # -- loss and predictions

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output for a batch, as `losses` and `predictions` read it."""

    @abstractmethod
    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Return, for each term of the loss, its sum over the items of each example (B,)."""

    @abstractmethod
    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        """Return a prediction for each example of the batch; `predict` adds the losses."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted sum of all terms over all items of a batch; a scalar."""
        found = self.losses(model, self.forward(model, batch), batch)
        return torch.stack([self.loss_weights[k] * v.sum() for k, v in found.items()]).sum()

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return a prediction for each example of the batch, with its losses."""
        output = self.forward(model, batch)
        predictions = self.predictions(model, output, batch)
        for term, sums in self.losses(model, output, batch).items():
            items = batch.items[term].tolist()
            for found, loss, count in zip(predictions, sums.tolist(), items, strict=True):
                found.losses[term] = (loss, count)
        return predictions

    joins_examples: bool = False
    """Whether the examples of a row have one answer together, which `join` makes."""

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the predictions for all examples of a row as one; the losses are added later."""
        raise NotImplementedError

    def check_metrics(self, channels: set[str]) -> None:  # noqa: B027 - optional
        """Learn which channels the metrics read, so that `predictions` fills them."""

    @property
    def metric_names(self) -> Sequence[str]:
        """The recipe's metrics, or the task's own."""
        names = self.recipe.evaluate.metrics
        return self.default_metrics if names is None else names

    def metric_problems(self) -> list[Problem]:
        """Return what is wrong with the recipe's metrics, as far as names tell it."""
        names, at = self.metric_names, self.recipe.at("evaluate.metrics")
        problems = check_metric_names(names, self.metric_channel, self.metric_context, at)
        problems += self._untrusted(names, at)
        best = self.recipe.evaluate.best
        if best is None or best.metric == "loss":
            return problems
        at = self.recipe.at("evaluate.best.metric")
        known = ["loss", *(result for name in names for result in result_names(name))]
        builtin = all(name in known_metrics() for name in names)  # what others yield is not known
        if builtin and best.metric not in known:
            what = f"there is no metric `{best.metric}` to choose the best adapter by"
            problems.append(Problem(what, at, did_you_mean(best.metric, known, "measured are")))
        elif best.mode is None and metric_mode(best.metric) is None:
            what = f"is a lower or a higher `{best.metric}` better?"
            problems.append(Problem(what, at, "set it with `evaluate.best.mode: min`, or `max`"))
        return problems

    def _untrusted(self, names: Sequence[str], at: str) -> list[Problem]:
        """Return a problem for each metric whose code the user did not allow to run.

        A script that the user's own recipe names by its path is the user's.
        """
        recipe, problems = self.recipe, []
        if recipe.model.trust_remote_code:
            return []
        allow = "read that code; then `--set model.trust_remote_code=true`"
        for name in names:
            if is_script(name) and recipe.origin.metrics_of_adapter:
                problems.append(Problem(f"metric `{name}` is a Python script", at, allow))
            elif not is_script(name) and name not in known_metrics():
                what = f"metric `{name}` is not built in, and on the Hub metrics are Python code"
                meant = did_you_mean(name, known_metrics(), "built in are")
                problems.append(Problem(what, at, f"{meant}; or {allow}"))
        return problems

    def metric_definitions(self) -> dict[str, str]:
        """Return what the loss and each of the metrics measure, in a line each."""
        lines: dict[str, str] = {}
        for name in self.metric_names:
            lines |= definition(name, self.metric_context)
        lines["loss"] = self.loss_definition
        if len(self.loss_weights) > 1:
            for term, weight in self.loss_weights.items():
                lines[f"loss_{term}"] = f"a term of the loss, of weight {weight:g}: the mean over "
                lines[f"loss_{term}"] += "the items that it counts"
        return lines

    @property
    @abstractmethod
    def loss_definition(self) -> str:
        """What the loss measures: of what it is a mean, and in which unit."""

    @property
    def metric_context(self) -> MetricContext:
        """What the metrics have to know of the task."""
        return MetricContext()

    # -- answers

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row that holds what a user typed.

        Raises:
            LoraError: If the task reads more than one column.
        """
        first, *others = self.input_columns().values()
        if others:
            raise LoraError(
                f"this model reads `{first}` with `{'`, `'.join(others)}`, not one text",
                "the arguments of `lora predict`",
                "write the rows into a file: `--input FILE --output FILE`",
            )
        return {first: typed}

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered, or nothing."""
        return self.input_error(row)

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is spelled out in what the model reads of a row."""
        return None

    @property
    def reads_control_tokens(self) -> bool:
        """Whether a control token that is spelled out in a text is read as the token."""
        return False

    def note_control_tokens(self, rows: Sequence[dict[str, Any]]) -> None:  # noqa: B027
        """Count the rows to be answered in which a control token is spelled out."""

    def take_warnings(self) -> list[str]:
        """Return what a user should know of the answers since the last call, each with a count."""
        return []

    @abstractmethod
    def answer_columns(self) -> dict[str, str]:
        """Return the columns that `answer` adds to a row, with the type of each.

        The types are those of pyarrow: `string`, `double`, `list<string>`.
        """

    @abstractmethod
    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the values of `answer_columns` for rows without targets, as one batch."""

    def answer_line(self, values: Sequence[Any]) -> str:
        """Return in one line what `answer` says of a typed text: the answer, and how sure it is."""
        scores = sorted((p for p in values[1:] if isinstance(p, float)), reverse=True)[:1]
        return f"{values[0]}" + (f"\t{scores[0]:.4f}" if scores else "")

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return what the model makes of rows, to be read before and after training.

        Returns:
            For each row (what was asked, what the row wants, what the model says), in words.
        """
        return []

    @property
    def writer(self) -> Any:
        """The task itself, if its model writes text and can converse; else None."""
        return None
