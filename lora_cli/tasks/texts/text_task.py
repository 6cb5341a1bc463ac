"""The base class of tasks that read text: tokenizer, lengths in tokens, padding, control tokens."""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_cli.data.load_rows import Rows
from lora_cli.data.row_texts import text_of
from lora_cli.errors import LoraError, counted
from lora_cli.models.base_facts import base_facts, save_tokenizer, trained_tokenizer
from lora_cli.models.base_model import load_config, load_tokenizer
from lora_cli.models.vocabulary import grow_vocabulary, trained_token_ids
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch, Example
from lora_cli.tasks.texts.control_tokens import ControlTokens
from lora_cli.tasks.texts.encoder_packing import (
    NOT_FOR_THE_MODEL,
    TEXT_OF_TOKEN,
    logits_of_shared_rows,
    row_width,
    share_rows,
)
from lora_cli.tasks.texts.padding import (
    RIGHT,
    Padding,
    fill,
    logits_by_length,
    mask_of,
    positions_of,
)
from lora_cli.tasks.texts.unknown_tokens import MOST_UNKNOWN, count_unknown, unknown_warning

# models whose positions start after the id of the padding token, as in RoBERTa
POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
ENCODING = 5  # version of how rows are encoded; increase it to encode cached rows again
POSITIONS = ("max_position_embeddings", "max_seq_len")  # the second is the name in MPT
CONFIG_KEYS = ("vocab_size", "eos_token_id", "is_encoder_decoder")  # what `encode` checks
TRIAL_TEXT = (
    "the film was not as good as the book , but its music and the cast are worth a second look"
)


class TextSpec(Protocol):
    """The keys that the `task` sections of all text tasks have."""

    max_length: int

    @property
    def split_special_tokens(self) -> bool | None:
        """Whether control tokens written out in a text, such as `</s>`, are read as plain text."""

    @property
    def model_fields_set(self) -> set[str]:
        """The keys that are written in the recipe."""


class TextTask(Task):
    """A task whose model reads the tokens of texts."""

    spec: TextSpec
    """The recipe's `task` section."""
    input_name = "text"
    answer_hint = "write another text"
    forward_options: dict[str, Any] = {}
    """Arguments for the model's forward besides a batch, if it accepts them."""
    padding: Padding = RIGHT
    """How texts of different lengths are padded to a batch; `fit_to_model` chooses it."""
    looks_back_only: bool = False
    """Whether tokens must not see the tokens after them."""
    can_fill_left: bool = True
    """Whether texts may be padded on the left."""
    length_key: str = "task.max_length"
    """The recipe key of the longest text."""
    pad_multiple: int = 1
    """The lengths of batches are multiples of this number of tokens."""
    first_position: int | None = None
    """The first position of a text, if texts share rows; `fit_to_model` finds out if they can."""
    can_share_rows: bool = False
    """Whether texts may share rows, provided that the model's answers stay the same."""
    answers_tokens: bool = False
    """Whether each token gets an answer, rather than the text as a whole."""
    _positions: tuple[Any, int | None] | None = None
    """A configuration, and the number of positions of its model."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.n_control_rows = 0  # answered ones with control tokens, since the last warning
        self.tokenizer: PreTrainedTokenizerBase

    def load_processor(self) -> None:
        """Load the tokenizer and the model's configuration."""
        self.tokenizer = self.read_tokenizer()
        self.control_tokens = ControlTokens(self.tokenizer)
        self.config = load_config(self.recipe)
        self.learned.token_ids = trained_token_ids(self.tokenizer, self.recipe)
        if self.recipe.model.add_tokens:
            text_config = self.config.get_text_config()
            text_config.vocab_size = max(text_config.vocab_size, len(self.tokenizer))

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer, or the one that the adapter was trained with."""
        if self.trained_in is None:
            return load_tokenizer(self.recipe)
        return trained_tokenizer(self.trained_in, self.recipe)

    def read_config(self) -> None:
        """Read the model's configuration, and the tokenizer if the recipe names tokens."""
        if self.recipe.model.add_tokens or self.recipe.adapter.train_tokens:
            self.load_processor()
        else:
            super().read_config()

    @property
    def reads_control_tokens(self) -> bool:
        """Whether a control token written out in a text is read as the token."""
        return not self.spec.split_special_tokens

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer for the texts of rows; it may be a copy that knows no control tokens."""
        return self.tokenizer if self.reads_control_tokens else self.control_tokens.plain

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer and its chat template into a folder."""
        save_tokenizer(folder, self.tokenizer, self.recipe, facts)

    @property
    def base_facts(self) -> dict[str, Any]:
        """Everything about the base that affects the computation, besides its tensors."""
        return base_facts(self.config, self.tokenizer)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The recipe's `max_length`, or what the model can take if that is less."""
        limits = [self.spec.max_length, int(self.tokenizer.model_max_length)]
        return min(limits + ([] if self.positions is None else [self.positions]))

    @property
    def positions(self) -> int | None:
        """The number of positions of the model; None if it has no limit."""
        known = self._positions
        if known is None or known[0] is not self.config:  # cached, because each row needs it
            self._positions = known = (self.config, _positions_in(self.config))
        return known[1]

    @property
    def length_note(self) -> str | None:
        """A warning if `max_length` is more than the model can read; otherwise None."""
        requested = self.spec.max_length
        if self.max_length == requested or "max_length" not in self.spec.model_fields_set:
            return None
        whose = "the model has positions for"
        if self.positions is None or self.max_length < self.positions:
            whose = "the tokenizer allows"
        return (
            f"warning: `task.max_length` is {requested}, and {whose} "
            f"{counted(self.max_length, 'token')}: longer texts are cut there"
        )

    @property
    def longer_hint(self) -> str:
        """A hint for texts that are too long: raise `max_length`, if the model can read more."""
        if self.max_length < self.spec.max_length:
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
            LoraError: With the first such token. The caller adds the place of the row.
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

    @property
    def own_padding(self) -> int | None:
        """The id of the tokenizer's padding; None if it has none that the embedding has.

        A padding that was added to the tokenizer alone is common, and masked like any other.
        """
        token = self.tokenizer.pad_token_id
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        return None if token is None or (size is not None and token >= size) else int(token)

    @property
    def layout(self) -> str:  # type: ignore[override]
        """How the texts of a batch are arranged in its tensors, for the report."""
        if self.first_position is not None:
            return "texts share rows"
        return str(self.padding) if self.padding.side == "none" else f"filled {self.padding}"

    @property
    def same_in_any_batch(self) -> bool:  # type: ignore[override]
        """Whether texts may share rows, which was tried on the model."""
        return self.first_position is not None

    # -- examples

    def cost(self, example: Example) -> int:
        """Return the tokens of an example."""
        return len(example["input_ids"])

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Reject tokens that the model's embedding does not have."""
        # only the highest id of each example, because checking each token would take long
        self.require_known_tokens([max(e["input_ids"], default=0) for e in examples])

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the text of an encoded example."""
        return [], str(self.tokenizer.decode(example["input_ids"]))

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of unknown tokens, and a warning if it is large."""
        if hasattr(examples, "data"):  # without converting them to Python lists
            chunks = examples.data.column("input_ids").chunks
            ids = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
            lengths = examples.data.column("length").to_numpy()
        else:
            ids = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
            lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
        if not len(lengths):
            return 0.0, None
        found = count_unknown(self.tokenizer, np.concatenate(ids), np.cumsum(lengths))
        if found.first is None or found.share <= MOST_UNKNOWN:
            return found.share, None
        row = int(examples[found.first]["row"])
        texts = [text_of(rows[row], self.compared_columns())]
        place = rows.place(row)
        return found.share, unknown_warning(self.tokenizer, name, found.share, place, texts)

    # -- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, and the names of the modules that the task added to it."""
        # cuDNN's attention would plan its kernels again for each new length
        self.pad_multiple = 8 if device.type == "cuda" else 1
        model, new = super().load_model(device, dtype)
        grow_vocabulary(model, self.tokenizer, self.recipe)
        return model, new

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same as `load_model`, but without weights."""
        model, new = super().empty_model()
        if self.recipe.model.add_tokens:
            grow_vocabulary(model, self.tokenizer, self.recipe)
        return model, new

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:
        """Choose how texts of different lengths are padded, by trying it on the model."""
        from lora_cli.tasks.texts.padding_check import choose_padding

        choose_padding(self, model, longest)

    def fit_as(self, other: Task) -> None:
        """Use the padding that another instance of the task has chosen."""
        assert isinstance(other, TextTask)
        self.padding, self.first_position = other.padding, other.first_position

    def try_training(self, model: nn.Module, longest: int | None = None) -> None:
        """Compute a short and a long text as in training, to find errors early."""
        from lora_cli.tasks.texts.padding_check import check_training

        check_training(self, model, longest)

    @abstractmethod
    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""

    def output_length(self, example: Example) -> int:
        """Return the number of tokens of an example for which the model gives scores."""
        return len(example["input_ids"])

    def check_trial(self, model: nn.Module, example: Example, logits: Tensor) -> None:
        """Check the model's outputs for one example, if the task has requirements.

        Raises:
            LoraError: If the model does not meet them.
        """

    def probe(self) -> dict[str, Tensor]:
        """Return random tokens, the same every time.

        Each row has one end-of-text token, at its end, because encoder-decoders classify there.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(32, self.max_length)
        size = getattr(self.config.get_text_config(), "vocab_size", None)  # CANINE has none
        vocabulary = min(len(self.tokenizer), int(size or len(self.tokenizer)))
        end = getattr(self.config, "eos_token_id", None)  # MobileBERT has none
        ends = {end} if isinstance(end, int) else set(end or ())
        ends = {i for i in ends if i < vocabulary}  # a tiny GPT-2 may name the end of the large one
        others = torch.tensor([i for i in range(vocabulary) if i not in ends])
        ids = others[torch.randint(len(others), (4, length), generator=generator)]
        if ends:
            ids[:, -1] = min(ends)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def inputs_of(
        self,
        texts: Mapping[str, Sequence[Sequence[int] | NDArray[Any]]],
        fill_with: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """Return the texts of a batch as tensors: padded, or in shared rows.

        Args:
            texts: One sequence for each text, for `input_ids` and other values of tokens.
            fill_with: The value for padding of each of them.
        """
        ids = texts["input_ids"]
        if self.first_position is not None:
            lengths = [len(text) for text in ids]
            width = row_width(lengths, self.positions, self.pad_multiple)
            n_answers = -(-max(lengths) // self.pad_multiple) * self.pad_multiple
            answers = n_answers if self.answers_tokens else None
            return share_rows(texts, fill_with, width, self.first_position, answers)
        options = (self.pad_multiple, self.padding)
        inputs = {key: fill(rows, fill_with[key], *options) for key, rows in texts.items()}
        inputs["attention_mask"] = mask_of(ids, *options)
        if self.padding.positions:
            inputs["position_ids"] = positions_of(inputs["attention_mask"])
        return inputs

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits: (B, C), or (B, T, V)."""
        return self.logits(model, batch.inputs)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the model's outputs for the inputs of a batch: (B, C), or (B, T, V)."""
        takes = forward_parameters(type(model).forward)
        # those that a class does not name, it passes on (GraniteMoE)
        options = {k: v for k, v in self.forward_options.items() if k in takes or "**" in takes}
        if TEXT_OF_TOKEN in inputs:
            if "**" not in takes:
                inputs = {k: v for k, v in inputs.items() if k in takes or k in NOT_FOR_THE_MODEL}
            return logits_of_shared_rows(model, inputs, options)
        if self.padding.side == "none" and "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(-1)
            return logits_by_length(model, self._taken(inputs, takes), lengths, options)
        logits: Tensor = model(**self._taken(inputs, takes), **options).logits
        return logits

    @staticmethod
    def _taken(inputs: dict[str, Tensor], takes: frozenset[str]) -> dict[str, Tensor]:
        """Return the inputs without the attention mask if the model accepts none."""
        if "attention_mask" in takes or "**" in takes:
            return inputs
        return {key: value for key, value in inputs.items() if key != "attention_mask"}

    # -- answers

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is written out in the texts of a row, or None."""
        columns = [*self.input_columns().values(), *self.more_text_columns()]
        return self.control_tokens.first_in([row.get(column) for column in columns])

    def more_text_columns(self) -> list[str]:
        """Return other columns whose texts the model reads or writes, if a row has them."""
        return []

    def note_control_tokens(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count the rows to be answered in which a control token is written out."""
        self.n_control_rows += sum(self.control_token_in(row) is not None for row in rows)

    def take_warnings(self) -> list[str]:
        """Return warnings about the answers since the last call."""
        count, self.n_control_rows = self.n_control_rows, 0
        how = "as tokens: `--set task.split_special_tokens=true` reads them as text"
        how = how if self.reads_control_tokens else "as text"
        what = f"{counted(count, 'row')} with control tokens in the text; they are read {how}"
        return [what] if count else []

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
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
def forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the parameters of a model's forward, with `**` if it accepts any others."""
    parameters = inspect.signature(forward).parameters.values()
    any_other = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return frozenset({p.name for p in parameters} | ({"**"} if any_other else set()))


def _positions_in(config: Any) -> int | None:
    """Return the number of positions of a model; None if it has no limit."""
    config = config.get_text_config()
    count = next((c for key in POSITIONS if (c := getattr(config, key, None))), None)
    if count is None or count < 0:
        return None
    if config.model_type in POSITIONS_AFTER_PADDING:
        return max(int(count) - int(config.pad_token_id) - 1, 1)
    return int(count)
