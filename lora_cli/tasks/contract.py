"""What a task owes the loop."""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_cli.data.load_rows import Rows
from lora_cli.data.text_lines import byte_fault
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
from lora_cli.models.base_facts import base_facts, trained_tokenizer
from lora_cli.models.base_model import (
    build_empty,
    load_config,
    load_pretrained,
    load_tokenizer,
    new_modules,
)
from lora_cli.recipe import Recipe
from lora_cli.tasks.control_tokens import ControlTokens
from lora_cli.tasks.padding import RIGHT, Padding, logits_by_length

Example = dict[str, Any]
# RoBERTa and its kin count positions from behind the padding token's id
POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
ENCODING = 2  # of rows into examples; a change of it makes what is kept on the disk useless
POSITIONS = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
IGNORED = -100  # a label that is not trained, as in torch's cross entropy
CONFIG_KEYS = ("vocab_size", "eos_token_id", "is_encoder_decoder")  # what `encode` checks
TRIAL_TEXT = (
    "the film was not as good as the book , but its music and the cast are worth a second look"
)


@dataclass
class Batch:
    """A micro-batch.

    Args:
        inputs: What the model's forward takes, (B, T) each.
        labels: What it should have answered.
        n_items: How many items the loss is a sum over: rows, or tokens.
        n_tokens: Tokens that are not padding.
        rows: Position of each example's row in its split.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    n_items: float
    n_tokens: int
    rows: list[int]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=True)
        return Batch(inputs, labels, self.n_items, self.n_tokens, self.rows)

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU can copy from; the data loader calls this."""
        inputs = {k: v.pin_memory() for k, v in self.inputs.items()}
        return Batch(inputs, self.labels.pin_memory(), self.n_items, self.n_tokens, self.rows)


@dataclass
class Prediction:
    """What the model says of one example.

    `metric_inputs` holds, by the metrics' channel, a pair (prediction, reference).
    """

    row: int
    loss: float  # summed over the example's items
    n_items: float
    prediction: Any
    reference: Any
    scores: dict[str, float] | None = None
    metric_inputs: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass
class Encoded:
    """The examples of a split, encoded and kept on the disk.

    `lengths` are the tokens of each example, `full_lengths` those that its row had before it was
    cut at `max_length`, or divided.
    """

    rows: Rows
    examples: Any  # datasets.Dataset
    lengths: NDArray[np.int64]
    full_lengths: NDArray[np.int64]
    rows_without_example: int = 0  # nothing trained is left of them, after the cut at `max_length`

    def __len__(self) -> int:
        return len(self.examples)


class Task(ABC):
    """A kind of work: how rows become batches, batches a loss, and outputs predictions.

    The order of calls: `load_processor`, `prepare` (with the rows of all splits), then any of the
    others.
    """

    auto_class: Any
    """The transformers class that builds the model."""
    metric_channel: Channel
    """What the task's own metrics read (see `metrics.Channel`)."""
    default_metrics: tuple[str, ...]
    """Metrics that are measured if the recipe names none; the first chooses the best adapter."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.n_control_rows = 0  # answered since the last warning, with a control token in them
        self.notes: list[str] = []  # what a user should know before training
        self.trained_in: Path | None = None  # the adapter's folder, where one is used
        self.tokenizer: PreTrainedTokenizerBase
        self.config: PretrainedConfig

    def load_processor(self) -> None:
        """Load the tokenizer and the model's configuration."""
        if self.trained_in is None:
            self.tokenizer = load_tokenizer(self.recipe)
        else:
            self.tokenizer = trained_tokenizer(self.trained_in, self.recipe)
        self.control_tokens = ControlTokens(self.tokenizer)
        self.config = load_config(self.recipe)

    @property
    def reads_control_tokens(self) -> bool:
        """Whether a control token that is spelled out in a text is read as the token."""
        return not self.recipe.task.split_special_tokens

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """What reads the texts of rows: the tokenizer, or a copy that knows no control tokens."""
        return self.tokenizer if self.reads_control_tokens else self.control_tokens.plain

    @property
    def base_facts(self) -> dict[str, Any]:
        """What of the base decides the computation besides its tensors."""
        return base_facts(self.config, self.tokenizer)

    @property
    def max_length(self) -> int:
        """The recipe's `max_length`, or what the model can take if that is less."""
        limits = [self.recipe.task.max_length, int(self.tokenizer.model_max_length)]
        return min(limits + ([] if self.positions is None else [self.positions]))

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for, if that is limited."""
        config = self.config.get_text_config()
        count = next((c for key in POSITIONS if (c := getattr(config, key, None))), None)
        if count is None or count < 0:
            return None
        if config.model_type in POSITIONS_AFTER_PADDING:
            return max(int(count) - int(config.pad_token_id) - 1, 1)
        return int(count)

    @property
    def length_note(self) -> str | None:
        """What to say of a `max_length` that is more than the model can take, if it is."""
        asked = self.recipe.task.max_length
        if self.max_length == asked or "max_length" not in self.recipe.task.model_fields_set:
            return None
        whose = "the model has positions for"
        if self.positions is None or self.max_length < self.positions:
            whose = "the tokenizer allows"
        return (
            f"warning: `task.max_length` is {asked}, and {whose} {self.max_length} tokens: longer "
            "texts are cut there"
        )

    @property
    def longer_hint(self) -> str:
        """What to do where texts are too long: raise `max_length`, if the model allows it."""
        if self.max_length < self.recipe.task.max_length:
            most = counted(self.max_length, "token")
            return f"the model takes no more than {most}: shorten the texts"
        limits = [self.positions, int(self.tokenizer.model_max_length)]
        if self.max_length in limits:
            most = counted(self.max_length, "token")
            return f"the model takes no more than {most}: shorten the texts"
        return "raise `task.max_length`"

    def require_known_tokens(self, ids: Sequence[int]) -> None:
        """Reject token ids that the model's embedding does not have.

        Raises:
            LoraError: With the first such token; the caller adds the row.
        """
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        if size is None or not ids or max(ids) < size:
            return
        odd = next(token for token in ids if token >= size)
        raise LoraError(
            f"the token `{self.tokenizer.convert_ids_to_tokens(odd)}` has the id {odd}, and the "
            f"model's embedding ends at {size - 1}",
            self.recipe.at("model.name"),
            "the tokenizer and the model do not belong together: copy or download both again",
        )

    # -- rows

    @abstractmethod
    def input_columns(self) -> dict[str, str]:
        """Return the columns that the model reads, by the recipe key that names them."""

    @abstractmethod
    def target_columns(self) -> dict[str, str]:
        """Return the columns that it learns to answer, likewise."""

    @property
    def knows_labels(self) -> bool:
        """Whether the recipe says all that the task has to know of the labels."""
        return True

    @property
    def reads_train(self) -> bool:
        """Whether the task learns something from the train rows whatever split is asked for."""
        return not self.knows_labels

    def prepare(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn from the rows what the recipe leaves open, such as the labels."""

    @abstractmethod
    def input_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that the model reads, or nothing."""

    @abstractmethod
    def target_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that it learns to answer, or nothing."""

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return what a row holds that no task reads though it changes its meaning, and a hint."""
        return None

    def fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row, or nothing."""
        return self.input_fault(row) or self.target_fault(row) or self._byte_fault(row)

    def _byte_fault(self, row: dict[str, Any]) -> str:
        """Return which column that is read holds bytes that are no text, or nothing."""
        for column in self.target_columns().values():
            value = row.get(column)
            if isinstance(value, str) and (fault := byte_fault(value, "UTF-8")):
                return f"column `{column}`: {fault}"
        return ""

    def skip_reason(self, row: dict[str, Any]) -> str:
        """Return why the recipe leaves a row out, or nothing."""
        return ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return what is wrong with the label of a streamed row, which `prepare` did not see."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row, `input_ids` and `labels` among their keys.

        An example of a row that is longer than `max_length` has the row's own `full_length`.
        """

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint, where a row leaves nothing to train."""
        return self.longer_hint

    @abstractmethod
    def features(self) -> dict[str, str]:
        """Return the type of each key of an example but `input_ids`: `list<int32>`, `float32`."""

    # -- model

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration with the task's changes."""
        return load_config(self.recipe)

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
        # attention plans and picks its kernels again for every new length
        self.pad_multiple = 8 if device.type == "cuda" else 1
        return model, new_modules(model, missing) if self.has_head else []

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:  # noqa: B027 - optional
        """Put the outputs of a head that the checkpoint holds into the order of the task's own."""

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same without weights."""
        model = build_empty(self.auto_class, self.recipe, self.model_config())
        return model, new_modules(model) if self.has_head else []

    has_head: bool = False
    """Whether the task adds a head to the pretrained model."""
    forward_options: dict[str, Any] = {}
    """What the model's forward is given besides a batch, if it takes it."""
    padding: Padding = RIGHT
    """How rows of different lengths become one batch; `batch_check` chooses it by the model."""
    can_fill_left: bool = True
    """Whether rows may be filled on the left."""
    pad_multiple: int = 1
    """Batches are padded to a multiple of this many tokens."""

    # -- batches

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, padded to the longest."""

    @abstractmethod
    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""

    def check_trial(self, model: nn.Module, example: Example, logits: Tensor) -> None:  # noqa: B027
        """Check what the task needs of the model's outputs for one example, if anything.

        Raises:
            LoraError: If the model is of no use for the task.
        """

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the model's outputs for the inputs of a batch: (B, C), or (B, T, V)."""
        takes = _parameters(type(model).forward)
        options = {key: value for key, value in self.forward_options.items() if key in takes}
        if self.padding.side == "none" and "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(-1)
            return logits_by_length(model, self._taken(inputs, takes), lengths, options)
        logits: Tensor = model(**self._taken(inputs, takes), **options).logits
        return logits

    @staticmethod
    def _taken(inputs: dict[str, Tensor], takes: frozenset[str]) -> dict[str, Tensor]:
        """Return the inputs without a mask that the model would not know."""
        if "attention_mask" in takes or "**" in takes:
            return inputs
        return {key: value for key, value in inputs.items() if key != "attention_mask"}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's `n_items`; a scalar with a gradient."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return a prediction for each example of the batch, with its own loss."""

    def check_metrics(self, channels: set[str]) -> None:  # noqa: B027 - optional
        """Learn which channels the metrics read, so that `predict` fills them."""

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
            if is_script(name) and recipe._found:
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
        return {**lines, "loss": self.loss_definition}

    @property
    @abstractmethod
    def loss_definition(self) -> str:
        """What the loss measures: of what it is a mean, and in which unit."""

    @property
    def metric_context(self) -> MetricContext:
        """What the metrics have to know of the task."""
        return MetricContext()

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a row that holds a user's text.

        Raises:
            LoraError: If the task reads more than one text.
        """
        first, *others = self.input_columns().values()
        if others:
            raise LoraError(
                f"this model reads `{first}` with `{'`, `'.join(others)}`, not one text",
                "the arguments of `lora predict`",
                "write the rows into a file: `--input FILE --output FILE`",
            )
        return {first: text}

    def answer_fault(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered, or nothing."""
        return self.input_fault(row)

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is spelled out in what the model reads of a row."""
        columns = [*self.input_columns().values(), *self.more_text_columns()]
        return self.control_tokens.first_in([row.get(column) for column in columns])

    def more_text_columns(self) -> list[str]:
        """Return other columns whose texts the model reads or writes, where a row has them."""
        return []

    def note_control_tokens(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count the rows to be answered in which a control token is spelled out."""
        self.n_control_rows += sum(self.control_token_in(row) is not None for row in rows)

    def take_warnings(self) -> list[str]:
        """Return what a user should know of the answers since the last call, each with a count."""
        count, self.n_control_rows = self.n_control_rows, 0
        how = "as tokens: `--set task.split_special_tokens=true` reads them as text"
        how = how if self.reads_control_tokens else "as text"
        what = f"{counted(count, 'row')} with control tokens in the text; they are read {how}"
        return [what] if count else []

    @abstractmethod
    def answer_columns(self) -> list[str]:
        """Return the columns that `answer` adds to a row."""

    @abstractmethod
    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the values of `answer_columns` for rows without targets, as one batch."""

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else str(tokenizer.get_vocab())
        template = str(getattr(tokenizer, "chat_template", None))
        digest = hashlib.sha256(f"{state}{template}".encode()).hexdigest()
        how = f"encoding {ENCODING}"
        known = [getattr(self.config.get_text_config(), key, None) for key in CONFIG_KEYS]
        task = self.recipe.task.model_dump_json()
        return [how, task, digest, str(self.max_length), str(known)]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of what a model's forward takes, and `**` if it takes any other too."""
    parameters = inspect.signature(forward).parameters.values()
    any_other = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return frozenset({p.name for p in parameters} | ({"**"} if any_other else set()))
