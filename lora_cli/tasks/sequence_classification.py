"""Classify a text or a pair of texts: one label, several labels, or a number."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.data.label_lists import listed_labels
from lora_cli.data.load_rows import Rows
from lora_cli.data.readers import is_blank, text_error
from lora_cli.data.unsupported_rows import several_answers
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.metrics import MetricContext
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Recipe, SequenceClassificationSpec
from lora_cli.tasks.contract import MAIN, Batch, Example, Field, Kind, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.head_rows import arrange_rows
from lora_cli.tasks.labels import Labels
from lora_cli.tasks.long_texts import end_of_text, in_batches, is_long, token_ids
from lora_cli.tasks.padding import fill, positions_of
from lora_cli.tasks.text_task import TRIAL_TEXT, TextTask

ALL_SCORES = 20  # labels up to which a prediction keeps the probability of each; of more:
BEST_SCORES = 10
MOST_COLUMNS = 100  # labels up to which each has a column of its own in what `lora predict` writes


class SequenceClassification(TextTask):
    """`task.type: sequence_classification`."""

    auto_class = AutoModelForSequenceClassification
    has_head = True

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.reader = Labels(recipe, spec)
        if spec.problem == "regression":
            self.metric_channel, self.default_metrics = "value", ("pearson", "spearman", "mse")
        else:
            self.metric_channel, self.default_metrics = "label", ("accuracy", "f1")

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the text, the second text, and the label or labels."""
        spec = self.spec
        kinds: dict[str, Kind] = {"regression": "number", "multi_label": "labels"}
        kind = kinds.get(spec.problem, "label")
        texts = {
            "task.text_column": spec.text_column,
            "task.text_pair_column": spec.text_pair_column,
        }
        found = [Field(key, column, "input", "text") for key, column in texts.items() if column]
        if columns := spec.label_columns:
            keys = (f"task.label_columns.{i}" for i in range(len(columns)))
            return found + [
                Field(key, column, "target", kind)
                for key, column in zip(keys, columns, strict=True)
            ]
        return [*found, Field("task.label_column", spec.label_column, "target", kind)]

    @property
    def knows_labels(self) -> bool:
        """Whether the labels are named, or there are none."""
        return bool(self.labels) or self.spec.problem == "regression"

    @property
    def reads_train(self) -> bool:
        """Whether the labels, or their weights in the loss, are to be found in the train rows."""
        return not self.knows_labels or self.spec.class_weights == "balanced"

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the model's outputs; none with regression."""
        return self.reader.names

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the labels and their weights, and write both into the recipe."""
        if self.spec.problem != "regression":
            self.reader.learn(splits)

    @property
    def metric_context(self) -> MetricContext:
        """The number of labels, and whether a row may have several."""
        several = self.spec.problem == "multi_label"
        return MetricContext(len(self.labels) or None, several, tuple(self.labels))

    @property
    def loss_definition(self) -> str:
        """What the loss measures."""
        weighted = ", weighted by `class_weights`" if self.spec.class_weights else ""
        if self.spec.label_smoothing and self.spec.problem == "single_label":
            weighted += f", with label smoothing {self.spec.label_smoothing:g}"
        match self.spec.problem:
            case "regression":
                return "mean squared error per row"
            case "multi_label":
                return f"mean binary cross-entropy per row and label, in nats{weighted}"
            case "single_label":
                return f"mean cross-entropy per row, in nats{weighted}"

    def labels_of(self, row: dict[str, Any]) -> list[str]:
        """Return the names of a row's labels, in the order of the labels; or its number."""
        if self.spec.problem == "regression":
            return [str(self.reader.number(row))]
        positions = {self.reader.position(value) for value in self.reader.texts_of(row) or ()}
        return [self.labels[i] for i in sorted(p for p in positions if p is not None)]

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label stands in the rows, in the order of the labels."""
        counts: Counter[int | None] = Counter()
        for value, count in self.reader.count(rows).items() if self.labels else ():
            counts[self.reader.position(value)] += count
        return {label: counts[i] for i, label in enumerate(self.labels)}

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the label and the text of an encoded example."""
        value = self._names(example["labels"])
        label = ", ".join(value) if isinstance(value, list) else value
        return [f"label {label}"], super().shown(example, colour)[1]

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the number of labels in the head of an adapter that another tool made."""
        heads = [t.shape[0] for n, t in tensors.items() if ".lora_" not in n and t.ndim == 2]
        if not heads:
            what = "the adapter holds no classifier"
            raise LoraError(what, "--adapter", "give a recipe with `--recipe`, for its labels")
        count = min(heads)  # the last layer's outputs: fewer than any hidden size
        known: dict[int, str] = load_config(self.recipe).id2label
        if count == 1:
            self.spec.problem = "regression"
        elif sorted(known) == list(range(count)):  # a base that has such a classifier already
            self.spec.labels = [known[i] for i in range(count)]
        else:
            self.spec.labels = [f"LABEL_{i}" for i in range(count)]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the texts, or nothing."""
        return text_error(row, filter(None, (self.spec.text_column, self.spec.text_pair_column)))

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return whether the label is a list of answers to be ranked, or of their scores."""
        columns = self.spec.label_columns
        return None if columns else several_answers(row, self.spec.label_column)

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the label, or nothing."""
        column = self.spec.label_column
        value = row.get(column)
        if self.spec.problem == "regression":
            return self.reader.number_error(row)
        if self.reader.texts_of(row) is not None:
            return ""
        if self.spec.label_columns is not None:
            return self.reader.error_of_marks(row, self.spec.label_columns)
        if self.spec.problem == "multi_label":
            if isinstance(value, list):
                return f"column `{column}` holds a list with a blank or a list in it"
            if is_blank(value):
                return f"column `{column}` is blank"
            return f"column `{column}` is no list; `--set task.label_separator=,` divides a text"
        if listed_labels(value) is not None:
            return f"column `{column}` holds a list; `--set task.problem=multi_label` reads it"
        if isinstance(value, list | dict):
            return f"column `{column}` holds {JSON_NAMES[type(value)]}, not one label"
        return f"column `{column}` is blank"

    def skip_reason(self, row: dict[str, Any]) -> str:
        """Return which of `skip_labels` the row has, or nothing."""
        if not self.spec.skip_labels:
            return ""
        label = (self.reader.texts_of(row) or [""])[0]
        skipped = {str(name).strip() for name in self.spec.skip_labels}
        return f"the label `{label}` is one of `skip_labels`" if label in skipped else ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return which value of a streamed row is no label."""
        return None if self.spec.problem == "regression" else self.reader.problem(row, place)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example a row, or none of a row that is too long and to be left out."""
        return [
            self._example(row, inputs)
            for row, inputs in zip(rows, self._encode_checked(rows), strict=True)
        ]

    def _example(self, row: dict[str, Any], inputs: Example) -> list[Example]:
        full = self._full_length(row, inputs)
        if full and self.spec.truncate == "error":
            hint = "raise `task.max_length`, or cut such texts: `task.truncate: right`, or left"
            raise LoraError(self._too_long(full["full_length"]), hint=hint)
        if full and self.spec.truncate == "drop":
            return []
        return [{**inputs, "labels": self._label(row), **full}]

    def _too_long(self, length: int) -> str:
        return f"the row has {counted(length, 'token')}, more than {self.max_length:,}"

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered, or nothing."""
        if reason := super().answer_error(row):
            return reason
        try:
            (inputs,) = self._encode_checked([row])
            self.require_known_tokens(inputs["input_ids"])
        except LoraError as error:
            return error.problems[0].what
        if self.spec.truncate in ("right", "left"):
            return ""
        full = self._full_length(row, inputs)
        return self._too_long(full["full_length"]) if full else ""

    def _full_length(self, row: dict[str, Any], inputs: Example) -> dict[str, int]:
        """Return the tokens that a row has when it is not cut, if it was."""
        if len(inputs["input_ids"]) < self.max_length:
            return {}
        texts = [str(row[column]) for column in self.input_columns().values()]
        tokenizer = self.text_tokenizer
        if any(map(is_long, texts)):
            full = sum(len(token_ids(tokenizer, text, special=False)) for text in texts)
            full += tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        else:
            full = len(tokenizer(*texts, verbose=False)["input_ids"])
        return {"full_length": full} if full > self.max_length else {}

    def _encode_checked(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """Return the inputs of rows, each with as many end-of-text tokens as the model expects.

        Encoder-decoders read their answer at the last one, and need the same number in every row.
        """
        encoded = self._encode_texts(rows)
        end = self.config.eos_token_id
        if not self.config.is_encoder_decoder or not isinstance(end, int):
            return encoded
        wanted = self._ends_of_a_text(end)
        if any(example["input_ids"].count(end) != wanted for example in encoded):
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise LoraError(
                f"the text holds `{token}`, by which this model finds the end of a text",
                hint=f"write `{token}` otherwise in the text, or leave the row out",
            )
        return encoded

    def _ends_of_a_text(self, end: int) -> int:
        """Return how many end-of-text tokens the tokenizer gives a row of ordinary text."""
        row = dict.fromkeys(self.input_columns().values(), TRIAL_TEXT)
        count = int(self._encode_texts([row])[0]["input_ids"].count(end))
        if not count:
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise LoraError(
                f"the tokenizer does not end a text with `{token}`, and this model answers there",
                self.recipe.at("model.name"),
                "copy the model's own tokenizer into its folder",
            )
        return count

    def _encode_texts(
        self, rows: Sequence[dict[str, Any]], max_length: int | None = None
    ) -> list[Example]:
        tokenizer = self.text_tokenizer
        tokenizer.truncation_side = "left" if self.spec.truncate == "left" else "right"
        wanted = max_length or self.max_length
        columns = [self.spec.text_column, *filter(None, [self.spec.text_pair_column])]
        texts = [self._decisive([str(row[c]) for c in columns], wanted) for row in rows]
        examples: list[Example] = []
        for some in in_batches([sum(map(len, row)) for row in texts]):
            encoding = tokenizer(
                *(list(column) for column in zip(*texts[some], strict=True)),
                truncation=True,
                max_length=wanted,
                return_attention_mask=False,
            )
            keys = [key for key in encoding if key == "input_ids" or key in self.features()]
            values = (encoding[key] for key in keys)
            examples += [dict(zip(keys, v, strict=True)) for v in zip(*values, strict=True)]
        return examples

    def _decisive(self, texts: list[str], wanted: int) -> list[str]:
        """Return a row's text, or its pair, without what surely lies behind the cut.

        Tokenizers keep what they cut off in parts, and of a pair every part of one text with every
        part of the other. Of a pair the longer text is cut first, so the longer stays the longer.
        """
        tokenizer, last = self.text_tokenizer, self.spec.truncate == "left"
        ends = [end_of_text(tokenizer, text, wanted, last) for text in texts]
        if len(texts) > 1 and ends != texts:
            full, cut = (
                [len(token_ids(tokenizer, text, special=False)) for text in some]
                for some in (texts, ends)
            )
            if full[0] == full[1]:
                return texts
            longer = int(full[1] > full[0])
            if cut[longer] <= cut[1 - longer]:
                more = cut[1 - longer] + 1
                ends[longer] = end_of_text(tokenizer, texts[longer], more, last)
        return ends

    def _label(self, row: dict[str, Any]) -> float | int | list[int]:
        if self.spec.problem == "regression":
            value = self.reader.number(row)
            assert value is not None
            return value
        positions = [self.reader.position(value) for value in self.reader.texts_of(row) or ()]
        if self.spec.problem == "multi_label":
            return [int(i in positions) for i in range(len(self.labels))]
        assert positions[0] is not None
        return positions[0]

    def features(self) -> dict[str, str]:
        """Return the types of the tokens, the labels, and the segments of a pair."""
        kind = {"regression": "float32", "multi_label": "list<int8>", "single_label": "int64"}
        # some tokenizers make them for models that have no embedding for them
        embedded = getattr(self.config, "type_vocab_size", 0) > 1
        segments = embedded and "token_type_ids" in self.tokenizer.model_input_names
        return {
            "input_ids": "list<int32>",
            "labels": kind[self.spec.problem],
            **({"token_type_ids": "list<int8>"} if segments else {}),
        }

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the configuration with the labels by name."""
        if self.spec.problem == "regression":
            config = load_config(self.recipe, num_labels=1, problem_type="regression")
        else:
            if not self.labels:  # `lora validate` asks for the names of modules all the same
                return load_config(self.recipe)
            kind = f"{self.spec.problem}_classification"
            config = load_config(
                self.recipe,
                num_labels=len(self.labels),
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
                problem_type=kind,
            )
        return config

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model with a head for the labels, and the head's name."""
        model, new = super().load_model(device, dtype)
        assert isinstance(model, PreTrainedModel)
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = self._pad  # decoders find the last token of a text by it
        return model, new

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:
        """Put the rows of a pretrained classifier into the order of the labels, by name."""
        if self.spec.problem == "regression":
            return
        config = (self.config, self.recipe, self.auto_class)
        if note := arrange_rows(model, missing, self.labels, *config):
            self.notes.append(note)

    def _pad_id(self) -> int:
        """Return the padding token's id."""
        name = self.spec.pad_token or self.tokenizer.pad_token or self.tokenizer.eos_token
        token = self.tokenizer.convert_tokens_to_ids(name) if name else None
        if token is None or (
            token == self.tokenizer.unk_token_id and name != self.tokenizer.unk_token
        ):
            raise LoraError(
                f"the tokenizer has no token `{name}`" if name else "the tokenizer has no padding",
                self.recipe.at("task.pad_token"),
                "name a token of its vocabulary that does not occur in the texts",
            )
        self.require_known_tokens([int(token)])
        return int(token)

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""
        columns = self.input_columns().values()
        texts = (TRIAL_TEXT[:13], TRIAL_TEXT * (1 + length // 10))
        label: Any = {"regression": 0.0, "single_label": 0}.get(self.spec.problem)
        if label is None:
            label = [0] * len(self.labels)
        short, long = (
            {**self._encode_texts([dict.fromkeys(columns, text)], length)[0], "labels": label}
            for text in texts
        )
        return {**short, "row": 0}, {**long, "row": 0}

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest; the items are rows, or their weights."""
        ids = [example["input_ids"] for example in examples]
        inputs = self._padded(examples)
        labels = torch.tensor([example["labels"] for example in examples])
        if self.spec.problem != "single_label":
            labels = labels.float()
        items = torch.ones(len(examples))
        if self.spec.problem == "multi_label":
            items *= len(self.labels)
        elif self.reader.weights is not None:
            items = self.reader.weights[labels]
        n_tokens = sum(len(sequence) for sequence in ids)
        rows = [example["row"] for example in examples]
        return Batch(inputs, {"labels": labels}, {MAIN: items}, n_tokens, rows)

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        ones = [[1] * len(sequence) for sequence in ids]
        mask = fill(ones, 0, self.pad_multiple, self.padding)
        inputs = {
            "input_ids": fill(ids, self._pad, self.pad_multiple, self.padding),
            "attention_mask": mask,
        }
        if "token_type_ids" in examples[0]:
            segments = [example["token_type_ids"] for example in examples]
            inputs["token_type_ids"] = fill(segments, 0, self.pad_multiple, self.padding)
        if self.padding.positions:
            inputs["position_ids"] = positions_of(mask)
        return inputs

    @property
    def _pad(self) -> int:
        if not hasattr(self, "_pad_token_id"):
            self._pad_token_id = self._pad_id()
        return self._pad_token_id

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each row: cross entropy, its sum over labels, or the square."""
        return {MAIN: self._losses(output.float(), batch.targets["labels"])}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        weight = None if self.reader.weights is None else self.reader.weights.to(logits.device)
        match self.spec.problem:
            case "regression":
                return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
            case "multi_label":
                return F.binary_cross_entropy_with_logits(
                    logits, labels, weight, reduction="none"
                ).sum(-1)
            case "single_label":
                return F.cross_entropy(
                    logits,
                    labels,
                    weight,
                    reduction="none",
                    label_smoothing=self.spec.label_smoothing,
                )

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the label, or the number, of each row, with the probabilities."""
        readings = self.read(output.float())
        labels = batch.targets["labels"].tolist()
        return [
            Prediction(
                row,
                said,
                self._names(label),
                self._kept_scores(probabilities, label),
                {self.metric_channel: (value, label if isinstance(label, float) else _ints(label))},
            )
            for row, label, (value, said, probabilities) in zip(
                batch.rows, labels, readings, strict=True
            )
        ]

    def read(self, logits: Tensor) -> list[tuple[Any, Any, list[float] | None]]:
        """Return (value for the metrics, what it is called, probabilities of the labels) by row."""
        values: list[Any]
        match self.spec.problem:
            case "regression":
                return [(value, value, None) for value in logits.squeeze(-1).tolist()]
            case "multi_label":
                probabilities = torch.sigmoid(logits)
                values = (probabilities > 0.5).long().tolist()
            case "single_label":
                probabilities = torch.softmax(logits, -1)
                values = probabilities.argmax(-1).tolist()
        return [
            (value, self._names(value), row)
            for value, row in zip(values, probabilities.tolist(), strict=True)
        ]

    def _kept_scores(
        self, probabilities: list[float] | None, label: Any
    ) -> dict[str, float] | None:
        """Return the probabilities that are kept with a prediction: of many labels, the best few.

        Those of the row's own labels are among them.
        """
        if probabilities is None or len(probabilities) <= ALL_SCORES:
            named = None if probabilities is None else zip(self.labels, probabilities, strict=True)
            return None if named is None else dict(named)
        own = [i for i, on in enumerate(label) if on] if isinstance(label, list) else [int(label)]
        return {
            self.labels[i]: probabilities[i] for i in dict.fromkeys([*_best(probabilities), *own])
        }

    def answer_columns(self) -> dict[str, str]:
        """Return `prediction` and, for labels, the probability of each; of many, of the best."""
        kinds = {"regression": "double", "multi_label": "list<string>", "single_label": "string"}
        said = {"prediction": kinds[self.spec.problem]}
        if len(self.labels) > MOST_COLUMNS:
            # the best of many labels are a mapping, which parquet has as JSON
            return said | {"p": "double", "best": "string"}
        return said | {f"p_{label}": "double" for label in self.labels}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the prediction and the probabilities of each row."""
        device = next(model.parameters()).device
        inputs = self._padded(self._encode_texts(rows))
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits = self.logits(model, moved).float()
        require_finite(logits, model, self.recipe)
        return [[said, *self._answered(row or [])] for _, said, row in self.read(logits)]

    def _answered(self, probabilities: list[float]) -> list[Any]:
        """Return the probability of each label; of many, the highest, and the best by name."""
        rounded = [round(p, 6) for p in probabilities]
        if len(rounded) <= MOST_COLUMNS:
            return list(rounded)
        best = {self.labels[i]: rounded[i] for i in _best(probabilities)}
        return [max(rounded), best]

    def _names(self, value: Any) -> Any:
        if isinstance(value, list):
            return [name for name, on in zip(self.labels, value, strict=True) if on]
        return value if self.spec.problem == "regression" else self.labels[value]


def _best(probabilities: list[float]) -> list[int]:
    """Return the positions of the highest, the highest first."""
    return heapq.nlargest(BEST_SCORES, range(len(probabilities)), key=probabilities.__getitem__)


def _ints(label: Any) -> Any:
    return [int(value) for value in label] if isinstance(label, list) else int(label)
