"""The sections of a recipe, one class each; a field is documented once, beneath it.

The JSON schema, the reference in the docs and the hints in error messages are made from these
docstrings. Units: a *step* is an optimizer step, a *micro-batch* is one forward pass.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lora_cli.errors import counted

Conflicts = Iterator[tuple[str, str, str]]  # of each: the key, what is wrong, how to mend it
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Word], Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes
LayerNumber = Annotated[int, Field(ge=0)]
LayerRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the recipe: unknown keys are refused, values are not converted."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )

    def conflicts(self) -> Conflicts:
        """Yield what is wrong between keys that are each right by themselves."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.conflicts()):
            raise PydanticCustomError("conflict", "{found}", {"found": found})
        return self


class ModelSpec(Section):
    """The pretrained base model."""

    name: Word
    """A Hub id, a local folder (relative to the recipe), or `package:NAME/FOLDER`, a folder inside
    an installed Python package."""

    revision: Word = "main"
    """Branch, tag or commit of the model on the Hub."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Storage of the frozen base's weights. Default: that of `train.precision`; `float32` with
    `adapter.type: full`. Precision `fp32` needs `float32`. Trained weights are float32 always."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Implementation of the attention. Default: the one transformers chooses."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a metric of the Hub. Leave it off unless
    you have read that code."""

    allow_other_base: bool = False
    """Use an adapter, or go on with a run, on a base whose weights are not those that it was
    trained on. A warning says so, and it is written down."""


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

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    """One label a row, any number of labels a row, or one number a row."""

    label_separator: Word | None = None
    """What stands between the labels of a row, where a multi-label column is text."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each label in the loss: by name, or `balanced` (rows / (labels x rows of the
    label), from the train split)."""

    label_smoothing: Probability = 0.0
    """Share of the target probability that is spread over all labels."""

    max_length: Positive = 512
    """Longest input in tokens; longer texts are cut. Never more than the model can take."""

    pad_token: Word | None = None
    """The padding token, where the tokenizer has none of its own."""

    def conflicts(self) -> Conflicts:
        """Yield the keys that do not go with `problem`, and labels that stand twice."""
        if self.problem != "single_label" and self.label_smoothing:
            what = f"`label_smoothing` has no meaning with `problem: {self.problem}`"
            yield "label_smoothing", what, "leave it out, or set `problem: single_label`"
        if self.problem == "regression":
            for key in ("labels", "class_weights"):
                if getattr(self, key):
                    yield key, f"`{key}` has no meaning with `problem: regression`", "leave it out"
        if self.label_separator is not None and self.problem != "multi_label":
            what = f"`label_separator` has no meaning with `problem: {self.problem}`"
            yield "label_separator", what, "leave it out, or set `problem: multi_label`"
        if self.label_columns is not None:
            yield from self._column_conflicts(self.label_columns)
        for label, times in Counter(str(label).strip() for label in self.labels or ()).items():
            if not label:
                yield "labels", "a label of `labels` is blank", "give it a name"
            elif times > 1:
                what = f"the label `{label}` stands {times} times in `labels`"
                yield "labels", what, "each label stands once, in the order of the model's outputs"

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
                what = f"the column `{column}` stands {times} times in `label_columns`"
                yield "label_columns", what, "each column stands once"

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

    def conflicts(self) -> Conflicts:
        """Yield what keeps a row from being read in exactly one way."""
        pair = self.prompt_column is not None or self.completion_column is not None
        if (self.prompt_column is None) != (self.completion_column is None):
            given = "prompt_column" if self.prompt_column else "completion_column"
            other = "completion_column" if self.prompt_column else "prompt_column"
            what = f"`{given}` stands without `{other}`"
            yield given, what, f"name both columns: add `{other}: …`"
        if self.is_chat + pair + (self.text_column is not None) > 1:
            yield (
                "",
                "the rows can be read in more than one way",
                "keep one of `text_column`, `prompt_column` with `completion_column`, "
                "`messages_column`, or `format: alpaca` (or `self_instruct`)",
            )
        if self.format == "sharegpt" and self.messages_column is None:
            what = "`format: sharegpt` stands without `messages_column`"
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


class HeldOutSpec(Section):
    """Rows drawn from another split, and taken away from it."""

    from_: Word = Field("train", alias="from")
    """The split that the rows are drawn from."""

    fraction: Share
    """Share of the rows. (Where `test` is drawn from the same split, of those that it leaves.)"""

    disjoint: Literal["exact", "substring"] | None = "exact"
    """`exact`: a text is never on both sides. `substring`: nor is a drawn text inside a longer
    text that stays, nor the reverse; such rows are dropped from the larger side."""

    stratify: bool = False
    """Keep the proportions of the labels."""

    group_by: Word | None = None
    """Rows with the same value in this column stay on one side (a customer, a document)."""

    def conflicts(self) -> Conflicts:
        """Yield the two ways of keeping rows together that exclude each other."""
        if self.group_by is not None and self.disjoint == "substring":
            what = "`group_by` and `disjoint: substring` cannot be combined"
            yield "group_by", what, "leave one of the two out"


def _split_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "named"
    return "held_out" if isinstance(value, dict | HeldOutSpec) else None


SplitSpec = Annotated[
    Annotated[Word, Tag("named")] | Annotated[HeldOutSpec, Tag("held_out")],
    Discriminator(
        _split_form,
        custom_error_type="split",
        custom_error_message="a name (`validation`), a slice (`train[:80%]`), a file (`dev.csv`), "
        "or rows drawn from another: `{from: train, fraction: 0.1}`",
    ),
]


class FormatSpec(Section):
    """How a data file is read, where its name does not say."""

    type: Literal["csv", "json", "parquet", "text"] | None = None
    """Kind of file. Default: by its suffix; `json` covers JSON lines."""

    encoding: Word = "utf-8"
    """Encoding of the text (utf-8, latin-1, cp1252, utf-16); a byte order mark is dropped."""

    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = None
    """The one character between the columns of a csv file; a tab is written `"\\t"`, with the
    quotation marks. Default: a tab in `.tsv`, a comma elsewhere."""

    header: bool = True
    """The first line of a csv file names the columns."""

    columns: Words | None = None
    """Names of the columns, instead of those in the header; the name of a text file's column."""

    skip_lines: Annotated[int, Field(ge=0)] = 0
    """Lines of a csv file before its header, or before its rows, that are neither: a title, a
    remark."""

    decimal: Literal[".", ","] = "."
    """What stands before the fraction of a number that is text: `0,5` is a half with `","`."""

    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What is one row of a text file."""

    def conflicts(self) -> Conflicts:
        """Yield an encoding that does not exist, and columns that are named twice."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)
        except (LookupError, ValueError):
            hint = "for example utf-8, latin-1, cp1252, cp932, utf-16"
            yield "encoding", f"`{self.encoding}` is not an encoding of text", hint
        for name, times in Counter(self.columns or ()).items():
            if times > 1:
                what = f"the column `{name}` stands {times} times in `columns`"
                yield "columns", what, "give each column a name of its own"


class CheckSpec(Section):
    """What is looked for in the rows before a model is loaded."""

    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of the validation or test rows whose text also stands in train; more is an
    error, for their metrics would measure memory. Case and spaces do not count. (Honest data sets
    share short texts by chance: SST-2's test rows 0.1 %, Banking77's 0.2 %. A copied or
    overlapping split shares far more.)"""

    near_duplicates: bool = True
    """Look for texts that are nearly equal too, within and between the splits, and warn of them;
    about a second for 100,000 short texts."""


class DataSpec(Section):
    """Where the rows come from, and which are held out."""

    name: Word | None = None
    """A data set on the Hub."""

    config: Word | None = None
    """Configuration of the data set on the Hub (`sst2` of `nyu-mll/glue`)."""

    revision: Word = "main"
    """Branch, tag or commit of the data set on the Hub."""

    path: Word | None = None
    """A file, a folder, or a pattern of files (csv, tsv, json lines, parquet, txt; also .gz). Text
    files that belong together line by line are named at once: `train.{en,de}.txt` has the columns
    `en` and `de`."""

    split_column: Word | None = None
    """Column of the files in `path` that says which split a row is of. `train`, `validation` and
    `test` then name its values, such as `dev`."""

    train: Word = "train"
    """The rows to train on: a split, a slice, or a file."""

    validation: SplitSpec | None = None
    """The rows to choose the best adapter by."""

    test: SplitSpec | None = None
    """The rows that are looked at once, at the end."""

    split_seed: Seed = 0
    """Seed of the draw of held-out rows; `train.seed` does not change them."""

    format: FormatSpec = Field(default_factory=FormatSpec)
    """How the files are read."""

    streaming: bool = False
    """Read the train rows as they come, for data larger than the disk. Needs `train.max_steps`."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read: stop, or skip and count it."""

    check: CheckSpec = Field(default_factory=CheckSpec)
    """What is looked for in the rows before a model is loaded."""

    def conflicts(self) -> Conflicts:
        """Yield what keeps the rows from having exactly one source."""
        if self.name and self.path:
            what = "`name` and `path` exclude each other"
            yield "path", what, "keep `name` for a data set on the Hub, `path` for files"
        if not self.name and not self.path and not is_file(self.train):
            yield (
                "",
                "the recipe does not say where the rows are",
                "add `path: FILE` (or a folder), `train: FILE`, or `name:` with a Hub id",
            )
        if self.config and not self.name:
            what = "`config` is of a data set on the Hub, and `name` is missing"
            yield "config", what, "leave it out, or add `name:` with the Hub id"
        if self.split_column and not self.path:
            what = "`split_column` divides the rows of files, and `path` is missing"
            yield "split_column", what, "name the file or folder: `path: FILE`"
        if self.streaming and self.train.endswith("]"):
            what = "`streaming` reads all of `train`, so it cannot be a slice"
            yield "streaming", what, "leave the brackets out, or set `streaming: false`"
        for split in ("validation", "test"):
            spec = getattr(self, split)
            if self.streaming and isinstance(spec, HeldOutSpec) and spec.from_ == "train":
                what = f"`streaming` cannot draw `{split}` from `train`"
                yield split, what, f"name another split or a file: `{split}: FILE`"


DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".text")


def is_file(split: SplitSpec | None) -> bool:
    """Return whether a split is given as a file: it has a folder, a known suffix, or a pattern."""
    if not isinstance(split, str):
        return False
    name = re.sub(r"\[[^\[\]/]*\]$", "", split).lower().removesuffix(".gz")
    return "/" in name or name.endswith(DATA_SUFFIXES)


class AdapterSpec(Section):
    """What is trained. Keys of `lora` are passed over by the other types."""

    type: Literal["lora", "full", "none", "bitfit"] = "lora"
    """`lora`: low-rank adapters. `full`: every weight. `none`: the task's head alone.
    `bitfit`: the biases. The last three are the baselines of the first, in the same loop."""

    from_: Word | None = Field(default=None, alias="from")
    """A trained adapter to start from: a folder (relative to the recipe), or a Hub id. Its rank,
    alpha, targets, biases and head are trained further; the optimizer starts anew."""

    rank: Positive = 8
    """Rank of the update: the inner dimension of B A."""

    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The update is scaled by alpha / rank."""

    dropout: Probability = 0.0
    """Dropout on the input of the low-rank path."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that large ranks keep learning."""

    target_modules: Word | list[Word] | None = None
    """Which modules get an adapter: a list of name suffixes, a regular expression that matches
    whole names, or `all-linear`. Default: `all-linear` for language models, the attention's query
    and value for encoders."""

    exclude_modules: Word | list[Word] | None = None
    """Modules that get none, written in the same way."""

    layers: LayerRange | list[LayerNumber] | None = None
    """Only these layers: `0-11`, or a list of numbers."""

    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Other ranks for some modules: name suffix or regular expression, and rank."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some modules: name suffix or regular expression, and alpha."""

    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained besides: none, those of adapted modules, or all."""

    train_modules: list[Word] = Field(default_factory=list)
    """Modules trained in full and saved with the adapter, besides the task's new head."""

    def conflicts(self) -> Conflicts:
        """Yield a start from an adapter for what has none."""
        if self.from_ is not None and self.type == "full":
            what = "`from` starts from an adapter, and `type: full` has none"
            yield "from", what, "name the model to start from as `model.name`"

    @property
    def low_rank(self) -> bool:
        """Whether low-rank layers are attached."""
        return self.type == "lora"


class ParameterGroupSpec(Section):
    """Other settings for some of the trained parameters."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the group."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the group."""


class GroupsSpec(Section):
    """Groups of trained parameters; what a group leaves out is as in the optimizer."""

    head: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The modules that are trained in full."""

    adapter: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The low-rank matrices."""

    layers: dict[Annotated[str, Field(pattern=r"^\d+(-\d+)?$")], ParameterGroupSpec] = Field(
        default_factory=dict
    )
    """Ranges of layers, such as `0-5`; they come before `head` and `adapter`."""


class OptimizerSpec(Section):
    """How the trained weights are updated."""

    type: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"
    """`adamw` is fused on a GPU; `adamw_8bit` needs bitsandbytes."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate of the schedule."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; biases and normalisation weights are spared."""

    betas: list[Probability] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay of AdamW's running means."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term against division by zero."""

    momentum: Probability = 0.0
    """Momentum of SGD."""

    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: learning rate of `lora_B` over that of `lora_A`."""

    groups: GroupsSpec = Field(default_factory=GroupsSpec)
    """Other settings for some of the parameters."""


class SchedulerSpec(Section):
    """How the learning rate moves: up over the warm-up, then along the named curve."""

    type: Literal["linear", "cosine", "constant"] = "linear"
    """`linear` and `cosine` end at zero."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of all steps."""

    def conflicts(self) -> Conflicts:
        """Yield the two ways of saying how long the warm-up is."""
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            what = "`warmup_steps` and `warmup_ratio` exclude each other"
            yield "warmup_ratio", what, "keep one of the two"


class TrainSpec(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the train rows. 3 if `max_steps` is not given either."""

    max_steps: Positive | None = None
    """Steps in all, instead of `epochs`."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop in time before so many hours have passed since the command started, with everything
    saved; `--resume` goes on. For machines that are lent for a while."""

    micro_batch_size: Positive | Literal["auto"] = 8
    """Examples (packs, with `packing`) of one forward pass; what memory allows. `auto`: the largest
    that fits is found before the first step, and a step sees `examples_per_step` all the same."""

    gradient_accumulation_steps: Positive = 1
    """Micro-batches of a step. A step sees micro_batch_size x gradient_accumulation_steps examples
    however many processes share them."""

    examples_per_step: Positive | None = None
    """Examples of a step, instead of `gradient_accumulation_steps`."""

    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """How the weights are updated."""

    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec)
    """How the learning rate moves."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the computation; fp16 has its loss scaled, and needs a GPU."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longer gradients are shortened to this norm; null leaves them."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    packing: bool = False
    """Put several short examples into one row of `max_length` tokens; none sees another."""

    group_by_length: bool = False
    """Put examples of similar length into a batch, so that less is padding."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches; they do not change the order."""

    seed: Seed = 0
    """Seed of the initial weights, the order and the dropout."""

    log_every_steps: Positive = 10
    """Steps between two lines of the log."""

    trackers: list[Literal["tensorboard", "trackio"]] = Field(default_factory=list)
    """Where else the log goes."""

    _found_micro_batch: int | None = PrivateAttr(default=None)

    def conflicts(self) -> Conflicts:
        """Yield the keys that exclude each other."""
        if self.epochs is not None and self.max_steps is not None:
            what = "`epochs` and `max_steps` exclude each other"
            hint = "keep one: `--set train.epochs=null` or `--set train.max_steps=null`"
            yield "max_steps", what, hint
        if self.packing and self.group_by_length:
            what = "`packing` leaves no padding for `group_by_length` to save"
            yield "group_by_length", what, "leave one of the two out"
        if self.examples_per_step is not None and self.gradient_accumulation_steps > 1:
            what = "`gradient_accumulation_steps` and `examples_per_step` exclude each other"
            yield "examples_per_step", what, "keep one of the two"
        if self.micro_batch_size == "auto" and self.examples_per_step is None:
            what = "`auto` does not say how many examples a step shall see"
            yield "micro_batch_size", what, "say it: `--set train.examples_per_step=64`"

    @property
    def step_size(self) -> int:
        """Examples (or packs) that one optimizer step sees."""
        return self.examples_per_step or self.micro_batch * self.gradient_accumulation_steps

    @property
    def micro_batch(self) -> int:
        """Examples of one forward pass; where they are to be found, what was found, or 8."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        return self._found_micro_batch or min(8, self.examples_per_step or 8)


class BestSpec(Section):
    """How the best adapter is chosen."""

    metric: Word = "loss"
    """A metric of the validation split, or `loss`."""

    mode: Literal["min", "max"] | None = None
    """Whether less or more is better. Default: as the metric is known to be."""


class EarlyStoppingSpec(Section):
    """Stop when validation has ceased to improve."""

    patience: Positive
    """Evaluations without improvement before stopping."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement."""


class GenerationSpec(Section):
    """How a language model writes its answers when it is evaluated or asked."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token every time."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that make up this probability."""


class EvaluateSpec(Section):
    """When validation is measured, by what, and what follows from it."""

    every_steps: Positive | None = None
    """Steps between two evaluations. Default: once an epoch."""

    metrics: list[Word] | None = None
    """Metrics: accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse,
    perplexity, exact_match, bleu, rouge; or any other name or script that `evaluate` can load."""

    best: BestSpec | None = None
    """How the best adapter is chosen. Default: by the task's main metric."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop when validation has ceased to improve."""

    micro_batch_size: Positive | None = None
    """Examples of one forward pass. Default: twice `train.micro_batch_size`."""

    baseline: bool = True
    """Measure validation and test before training too."""

    baselines: list[Literal["majority", "none", "base"]] = Field(default_factory=list)
    """What the adapter has to beat: `majority`, the commonest label of train (or the mean of its
    numbers); `none`, the head alone, trained by this recipe; `base`, the model before training."""

    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    """How a language model writes its answers."""


class CheckpointSpec(Section):
    """When the state of training is saved, so that it can be resumed."""

    every_steps: Positive | None = None
    """Steps between two checkpoints. Default: once an epoch."""

    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which there is a checkpoint besides: what a crash costs at most."""

    keep: Positive = 2
    """How many are kept; the newest and the best always are."""

    mirror: Word | None = None
    """Where each checkpoint is copied to, so that `--resume` can go on after this machine and its
    disk are gone: a folder (relative to the recipe), or an address that fsspec knows
    (`s3://bucket/run`, with `pip install s3fs`)."""

    allow_changes: bool = False
    """Let `--resume` go on though the recipe, the data or the machine are not those that the run
    was started with. The report lists what changed, and the result is no longer that of one run.
    (Model, task and adapter cannot change.)"""


class Recipe(Section):
    """A fine-tuning run: which model, on which data, how."""

    model: ModelSpec
    """The pretrained base model."""

    task: TaskSpec
    """What the model shall do."""

    data: DataSpec
    """Where the rows come from."""

    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    """What is trained."""

    train: TrainSpec = Field(default_factory=TrainSpec)
    """The training loop."""

    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    """How the result is measured."""

    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """What is saved on the way."""

    output_dir: Word = "out"
    """Folder of the result, relative to the working directory."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    _found: bool = PrivateAttr(default=False)  # beside an adapter, and so not the user's own
    _started: bool = PrivateAttr(default=False)  # `adapter.from` has been read, by an earlier run

    def conflicts(self) -> Conflicts:
        """Yield what is wrong between sections."""
        data, task, train = self.data, self.task, self.train
        if train.precision == "fp32" and self.model.dtype not in (None, "float32"):
            dtype = self.model.dtype
            what = f"a base that is kept in {dtype} cannot compute in `train.precision: fp32`"
            other = "bf16" if dtype == "bfloat16" else "fp16"
            yield "model.dtype", what, f"`--set train.precision={other}`, or leave `dtype` out"
        if data.streaming and train.max_steps is None:
            what = "`data.streaming` does not know how many rows there are"
            yield "data.streaming", what, "say how long to train: `--set train.max_steps=1000`"
        if data.streaming and getattr(task, "class_weights", None) == "balanced":
            what = "`balanced` counts all rows, which `data.streaming` does not have"
            yield "task.class_weights", what, "give each label its weight: `{good: 1, bad: 2.5}`"
        for key in ("packing", "group_by_length"):
            if data.streaming and getattr(train, key):
                what = f"`train.{key}` needs all rows, which `data.streaming` does not have"
                yield f"train.{key}", what, "leave one of the two out"
        if data.streaming and train.micro_batch_size == "auto":
            what = "`auto` tries the longest rows, and `data.streaming` does not know them"
            yield "train.micro_batch_size", what, "name a number: `--set train.micro_batch_size=8`"
        if train.packing and task.type != "causal_lm":
            what = f"`train.packing` has no meaning with `task.type: {task.type}`"
            hint = "leave it out; `train.group_by_length: true` saves padding here"
            yield "train.packing", what, hint
        if data.validation is None and self.evaluate.early_stopping is not None:
            what = "`evaluate.early_stopping` looks at `data.validation`, and there is none"
            hint = "name one, `data.validation: {from: train, fraction: 0.1}`, or leave it out"
            yield "evaluate.early_stopping", what, hint
        yield from self._baseline_conflicts()
        labels = task.type == "sequence_classification" and task.problem != "regression"
        for split in ("validation", "test"):
            spec = getattr(data, split)
            if isinstance(spec, HeldOutSpec) and spec.stratify and not labels:
                key = f"data.{split}.stratify"
                what = f"`{key}` keeps the proportions of labels, and this task has none"
                yield key, what, "leave it out"

    def _baseline_conflicts(self) -> Conflicts:
        key, named = "evaluate.baselines", self.evaluate.baselines
        for name in named:
            if name != "base" and self.task.type != "sequence_classification":
                what = f"`{name}` has no meaning with `task.type: {self.task.type}`"
                yield key, what, f"leave `{name}` out"
        if "base" in named and not self.evaluate.baseline:
            what = "`base` is what `evaluate.baseline` measures, and it is off"
            yield key, what, "set `evaluate.baseline: true`, or leave `base` out"
        if "base" in named and self.adapter.from_ is not None:
            what = "before training, `adapter.from` is the old adapter, and not `base`"
            yield key, what, "leave `base` out"
        if "none" in named and self.adapter.type == "none":
            yield key, "`none` is what `adapter.type: none` trains itself", "leave `none` out"
        if self.data.streaming and {"majority", "none"} & set(named):
            what = "`majority` and `none` need all rows, which `data.streaming` does not have"
            yield key, what, "leave them out"
        if named and self.data.validation is None and self.data.test is None:
            what = "`evaluate.baselines` are measured on held-out rows, and there are none"
            hint = "name some, `data.validation: {from: train, fraction: 0.1}`, or leave it out"
            yield key, what, hint

    def at(self, key: str) -> str:
        """Return where a key stands, for an error: `adapter.rank (recipe.yaml:14)`.

        A key that the recipe leaves out is placed where its section stands.
        """
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            place = self._places.get(".".join(parts[:length]))
            if place:
                return f"{key} ({place})"
        return key

    @property
    def output_path(self) -> Path:
        """The folder of the result."""
        return Path(self.output_dir)
