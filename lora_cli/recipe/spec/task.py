"""`task`: what the model should do, a class for each type."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.errors import counted
from lora_cli.recipe.spec.section import Conflicts, Positive, Probability, Section, Word

Truncation = Literal["right", "left", "drop", "error"]


class SequenceClassificationSpec(Section):
    """Classify a text, or a pair of texts."""

    type: Literal["sequence_classification"]
    """Which task."""

    text_column: Word = "text"
    """Column of the text."""

    text_pair_column: Word | None = None
    """Column of the second text, for pairs."""

    label_column: Word = "label"
    """Column of the label: a word, an integer, a number (regression), or several labels."""

    label_columns: Annotated[list[Word], Field(min_length=2)] | None = None
    """Columns of 0 and 1 (or false and true), one for each label, instead of `label_column`. Their
    names are the labels, unless `labels` gives others. With `single_label`, each row has one 1."""

    labels: Annotated[list[str | int], Field(min_length=1)] | None = None
    """Names of the labels, in order. Integers in the data are read as positions in this list.
    Default: the values found in the train split, sorted."""

    skip_labels: list[str | int] = Field(default_factory=list)
    """Labels that mark a row without an answer, such as `-` in SNLI: rows with one of them are left
    out of every split, and counted."""

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    """One label a row, any number of labels a row, or one number a row."""

    label_separator: Word | None = None
    """The separator between the labels of a row, where a multi-label column is text."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each label in the loss: by name, or `balanced` (rows / (labels x rows of the
    label), from the train split)."""

    label_smoothing: Probability = 0.0
    """Share of the target probability that is spread over all labels."""

    max_length: Positive = 512
    """Longest input in tokens; longer texts are cut. Never more than the model can take."""

    truncate: Truncation = "right"
    """What happens to a longer text: it loses its end (`right`) or its beginning (`left`), its row
    is left out (`drop`), or it is an error (`error`)."""

    split_special_tokens: bool = False
    """Read a control token that is spelled out in a text, such as `</s>` or `[SEP]`, as its letters
    and not as the token."""

    pad_token: Word | None = None
    """The padding token, where the tokenizer has none of its own."""

    def conflicts(self) -> Conflicts:
        """Yield the keys that do not go with `problem`, and labels that appear twice."""
        if self.problem != "single_label" and self.label_smoothing:
            what = f"`label_smoothing` has no meaning with `problem: {self.problem}`"
            yield "label_smoothing", what, "leave it out, or set `problem: single_label`"
        if self.problem == "regression":
            for key in ("labels", "class_weights"):
                if getattr(self, key):
                    yield key, f"`{key}` has no meaning with `problem: regression`", "leave it out"
        if self.skip_labels and (self.problem != "single_label" or self.label_columns):
            what = "`skip_labels` is for one label a row, in `label_column`"
            yield "skip_labels", what, "leave it out, or set `problem: single_label`"
        for label in {str(label).strip() for label in self.skip_labels}:
            if label in {str(name).strip() for name in self.labels or ()}:
                what = f"`{label}` is in `labels`, and in `skip_labels`"
                yield "skip_labels", what, "leave it in one of the two"
        if self.label_separator is not None and self.problem != "multi_label":
            what = f"`label_separator` has no meaning with `problem: {self.problem}`"
            yield "label_separator", what, "leave it out, or set `problem: multi_label`"
        if self.label_columns is not None:
            yield from self._column_conflicts(self.label_columns)
        for label, times in Counter(str(label).strip() for label in self.labels or ()).items():
            if not label:
                yield "labels", "a label of `labels` is blank", "give it a name"
            elif times > 1:
                what = f"the label `{label}` appears {times} times in `labels`"
                yield "labels", what, "list each label once, in the order of the model's outputs"

    def _column_conflicts(self, columns: list[str]) -> Conflicts:
        if self.problem == "regression":
            what = "`label_columns` has no meaning with `problem: regression`"
            yield "label_columns", what, "name the column of the number as `label_column`"
        if self.label_separator is not None:
            what = "`label_separator` divides one column, not `label_columns`"
            yield "label_separator", what, "leave one of the two out"
        if self.labels is not None and len(self.labels) != len(columns):
            names = counted(len(self.labels), "name")
            what = f"{names} in `labels` for {len(columns)} `label_columns`"
            yield "labels", what, "name each column's label, in the same order, or leave them out"
        for column, times in Counter(columns).items():
            if times > 1:
                what = f"the column `{column}` appears {times} times in `label_columns`"
                yield "label_columns", what, "list each column once"

    @property
    def target_columns(self) -> list[str]:
        """The columns that hold the label, or a label each."""
        return self.label_columns or [self.label_column]


class CausalLMSpec(Section):
    """Continue a text: language modelling, prompt and completion, or chat."""

    type: Literal["causal_lm"]
    """Which task."""

    text_column: Word | None = None
    """Column of plain text. Every token is trained; texts longer than `max_length` are divided
    into several examples. `text` if no column is named."""

    prompt_column: Word | None = None
    """Column of the prompt, which is read but not trained."""

    completion_column: Word | None = None
    """Column of the completion, which is trained."""

    separator: str = ""
    """Text between the prompt and the completion, counted to the prompt."""

    messages_column: Word | None = None
    """Column of a conversation, written with the model's chat template."""

    format: Literal["openai", "sharegpt", "alpaca", "self_instruct"] = "openai"
    """How a conversation is stored: `openai` (role, content), `sharegpt` (from, value), `alpaca`
    (the columns instruction, input, output), or `self_instruct` (the columns instruction and
    instances, a list of input and output). The last two do not use `messages_column`."""

    chat_template: Word | None = None
    """File of a Jinja chat template, where the model has none or another is wanted."""

    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Which turns of a conversation are trained: the assistant's, all, or the assistant's last."""

    pad_token: Word | None = None
    """The padding token, where the tokenizer has none of its own."""

    max_length: Positive = 1024
    """Longest example in tokens. Never more than the model can take."""

    truncate: Truncation = "right"
    """What happens to a longer row of a prompt or a conversation: it loses its end (`right`; where
    the prompt alone is as long, nothing is left to train), or its beginning (`left`; a token that
    begins every text stays), it is left out (`drop`), or it is an error (`error`). Plain texts are
    divided, not cut. With `left`, a prompt that leaves no room for an answer loses its beginning
    too, also where plain texts are trained."""

    split_special_tokens: bool | None = None
    """Read a control token that is spelled out in a text, such as `</s>`, as its letters and not as
    the token. Default: not in plain texts, prompts and completions, as transformers does it; always
    in conversations, where only the chat template writes control tokens."""

    def conflicts(self) -> Conflicts:
        """Yield what keeps a row from being read in exactly one way."""
        pair = self.prompt_column is not None or self.completion_column is not None
        if (self.prompt_column is None) != (self.completion_column is None):
            given = "prompt_column" if self.prompt_column else "completion_column"
            other = "completion_column" if self.prompt_column else "prompt_column"
            what = f"`{given}` needs `{other}`"
            yield given, what, f"name both columns: add `{other}: …`"
        if self.is_chat + pair + (self.text_column is not None) > 1:
            yield (
                "",
                "the rows can be read in more than one way",
                "keep one of `text_column`, `prompt_column` with `completion_column`, "
                "`messages_column`, or `format: alpaca` (or `self_instruct`)",
            )
        if self.is_chat and self.split_special_tokens is False:
            what = "in a conversation, control tokens in a text are always read as letters"
            yield "split_special_tokens", what, "leave it out: else a text could forge a turn"
        if self.truncate in ("drop", "error") and not (self.is_chat or pair):
            what = f"`truncate: {self.truncate}` has no meaning with a text column"
            yield "truncate", what, "leave it out: plain texts are divided into several examples"
        if self.format == "sharegpt" and self.messages_column is None:
            what = "`format: sharegpt` needs `messages_column`"
            yield "format", what, "name the column: often `messages_column: conversations`"

    @property
    def instruction_columns(self) -> list[str]:
        """The columns that the format itself names."""
        columns = {
            "alpaca": ["instruction", "input", "output"],
            "self_instruct": ["instruction", "instances"],
        }
        return columns.get(self.format, [])

    @property
    def is_chat(self) -> bool:
        """Whether a row is a conversation."""
        return self.messages_column is not None or bool(self.instruction_columns)


TaskSpec = Annotated[
    SequenceClassificationSpec | CausalLMSpec,
    Field(discriminator="type"),
]
