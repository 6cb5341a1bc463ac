"""Classify a text or a pair of texts: one label, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_cli.data.sources import Rows
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.models import load_config
from lora_cli.recipe import Recipe, SequenceClassificationSpec
from lora_cli.tasks.base import Batch, Example, Prediction, Task, pad


class SequenceClassification(Task):
    """`task.type: sequence_classification`."""

    auto_class = AutoModelForSequenceClassification
    has_head = True

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.labels = [str(label) for label in spec.labels or []]
        self.weights: Tensor | None = None
        if spec.problem == "regression":
            self.metric_channel, self.default_metrics = "value", ("pearson", "spearman", "mse")
        else:
            self.metric_channel, self.default_metrics = "label", ("accuracy", "f1")

    # ------------------------------------------------------------------------------ rows

    def input_columns(self) -> dict[str, str]:
        """Return the columns of the text and the second text."""
        named = {"task.text_column": self.spec.text_column}
        if self.spec.text_pair_column:
            named["task.text_pair_column"] = self.spec.text_pair_column
        return {self.recipe.at(key): column for key, column in named.items()}

    def target_columns(self) -> dict[str, str]:
        """Return the column of the label."""
        return {self.recipe.at("task.label_column"): self.spec.label_column}

    @property
    def knows_labels(self) -> bool:
        """Whether the labels are named, or there are none."""
        return bool(self.labels) or self.spec.problem == "regression"

    def prepare(self, splits: dict[str, Rows]) -> None:
        """Find the labels, and write them into the recipe; weigh them if that is asked for."""
        if self.spec.problem == "regression":
            return
        column = self.spec.label_column
        found = {name: self._values(rows) for name, rows in splits.items()}
        if not self.labels:
            if "train" not in splits:
                raise LoraError(
                    "the labels are not known",
                    self.recipe.at("task.labels"),
                    "name them, in the order of the model's outputs",
                )
            self.labels = splits["train"].label_names.get(column) or _sorted(found["train"])
        n_rows = sum(found.get("train", {}).values())
        if len(self.labels) > 20 and len(self.labels) > n_rows / 2 and "train" in found:
            raise LoraError(
                f"column `{column}` has {len(self.labels)} values in {n_rows} rows",
                self.recipe.at("task.label_column"),
                "is it the label? For numbers set `task.problem: regression`",
            )
        self.spec.labels = list(self.labels)
        self._refuse_unknown_labels(splits, found)
        if len(self.labels) < 2 and self.spec.problem == "single_label":
            raise LoraError(
                f"there is one label only, `{self.labels[0]}`",
                self.recipe.at("task.label_column"),
                "nothing can be learned from it",
            )
        if "train" in found:
            self.weights = self._weights(found["train"])

    def _values(self, rows: Rows) -> Counter[str]:
        return Counter(value for row in rows for value in self._texts_of(row) or ())

    def _texts_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return the labels of a row as text, or None where they cannot be read."""
        value = row.get(self.spec.label_column)
        if self.spec.problem == "multi_label":
            if isinstance(value, str) and self.spec.label_separator is not None:
                parts = [part.strip() for part in value.split(self.spec.label_separator)]
                return [part for part in parts if part]
            return [_text(item) for item in value] if isinstance(value, list) else None
        if value is None or isinstance(value, list | dict) or not _text(value):
            return None
        return [_text(value)]

    def _refuse_unknown_labels(
        self, splits: dict[str, Rows], found: dict[str, Counter[str]]
    ) -> None:
        problems = []
        for name, values in found.items():
            for value in [v for v in _sorted(values) if self._position(v) is None][:10]:
                at = next(
                    rows.place(i)
                    for rows in [splits[name]]
                    for i, row in enumerate(rows)
                    if value in (self._texts_of(row) or ())
                )
                problems.append(
                    Problem(
                        f"`{value}` is not a label ({values[value]} rows of {name})",
                        at,
                        did_you_mean(value, self.labels, "the labels are"),
                    )
                )
        if problems:
            raise LoraError(problems)

    def _position(self, value: str) -> int | None:
        """Return the index of a label given by name, or by position."""
        if value in self.labels:
            return self.labels.index(value)
        if value.isdecimal() and int(value) < len(self.labels):
            # names in the recipe, positions in the data, as in GLUE
            return None if any(label.isdecimal() for label in self.labels) else int(value)
        return None

    def _weights(self, values: Counter[str]) -> Tensor | None:
        wanted = self.spec.class_weights
        if wanted is None:
            return None
        if wanted == "balanced":
            counts = torch.zeros(len(self.labels))
            for value, count in values.items():
                position = self._position(value)
                assert position is not None
                counts[position] += count
            return counts.sum() / (len(self.labels) * counts.clamp(min=1))
        unknown = [name for name in wanted if name not in self.labels]
        if unknown:
            raise LoraError(
                f"`{unknown[0]}` is not a label",
                self.recipe.at(f"task.class_weights.{unknown[0]}"),
                did_you_mean(unknown[0], self.labels, "the labels are"),
            )
        return torch.tensor([float(wanted.get(label, 1.0)) for label in self.labels])

    def input_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the texts, or nothing."""
        for column in filter(None, (self.spec.text_column, self.spec.text_pair_column)):
            value = row.get(column)
            if value is None or (isinstance(value, str) and not value.strip()):
                return f"column `{column}` is blank"
            if not isinstance(value, str | int | float):
                return f"column `{column}` holds a {type(value).__name__}, not text"
        return ""

    def target_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the label, or nothing."""
        column = self.spec.label_column
        if self.spec.problem == "regression":
            return (
                ""
                if _number(row.get(column)) is not None
                else (f"column `{column}` holds `{row.get(column)}`, not a number")
            )
        if self._texts_of(row) is None:
            if self.spec.problem == "multi_label":
                return f"column `{column}` is not a list; set `task.label_separator` for text"
            return f"column `{column}` is blank"
        return ""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example a row."""
        return [
            [{**inputs, "labels": self._label(row)}]
            for row, inputs in zip(rows, self._encode_texts(rows), strict=True)
        ]

    def _encode_texts(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        pairs = self.spec.text_pair_column
        encoding = self.tokenizer(
            [str(row[self.spec.text_column]) for row in rows],
            [str(row[pairs]) for row in rows] if pairs else None,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
        )
        keys = [key for key in encoding if key == "input_ids" or key in self.features()]
        return [{key: encoding[key][i] for key in keys} for i in range(len(rows))]

    def _label(self, row: dict[str, Any]) -> float | int | list[int]:
        if self.spec.problem == "regression":
            number = _number(row.get(self.spec.label_column))
            assert number is not None
            return number
        positions = [self._position(value) for value in self._texts_of(row) or ()]
        if self.spec.problem == "multi_label":
            return [int(i in positions) for i in range(len(self.labels))]
        assert positions[0] is not None
        return positions[0]

    def features(self) -> dict[str, str]:
        """Return the types of the labels, and of the segments of a pair."""
        kind = {"regression": "float32", "multi_label": "list<int8>", "single_label": "int64"}
        segments = "token_type_ids" in self.tokenizer.model_input_names
        pair = {"token_type_ids": "list<int8>"} if segments and self.spec.text_pair_column else {}
        return {"labels": kind[self.spec.problem], **pair}

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the configuration with the labels by name."""
        if self.spec.problem == "regression":
            config = load_config(self.recipe, num_labels=1, problem_type="regression")
        else:
            if not self.labels:
                raise LoraError("the labels are not known", self.recipe.at("task.labels"))
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
        model.config.pad_token_id = self._pad  # decoders find the last token of a text by it
        return model, new

    def _pad_id(self) -> int:
        """Return the padding token's id."""
        name = self.spec.pad_token or self.tokenizer.pad_token or self.tokenizer.eos_token
        token = self.tokenizer.convert_tokens_to_ids(name) if name else None
        if token is None or (
            token == self.tokenizer.unk_token_id and name != self.tokenizer.unk_token
        ):
            raise LoraError(
                f"the tokenizer has no token `{name}`",
                self.recipe.at("task.pad_token"),
                "name a token of its vocabulary that texts do not hold",
            )
        return int(token)

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest; `n_items` is rows, or their weights."""
        ids = [example["input_ids"] for example in examples]
        inputs = self._padded(examples)
        labels = torch.tensor([example["labels"] for example in examples])
        if self.spec.problem != "single_label":
            labels = labels.float()
        n_items = float(len(examples))
        if self.spec.problem == "multi_label":
            n_items = float(labels.numel())
        elif self.weights is not None:
            n_items = float(self.weights[labels].sum())
        n_tokens = sum(len(sequence) for sequence in ids)
        return Batch(inputs, labels, n_items, n_tokens, [e["row"] for e in examples])

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        inputs = {
            "input_ids": pad(ids, self._pad),
            "attention_mask": pad([[1] * len(sequence) for sequence in ids], 0),
        }
        if "token_type_ids" in examples[0]:
            inputs["token_type_ids"] = pad([e["token_type_ids"] for e in examples], 0)
        return inputs

    @property
    def _pad(self) -> int:
        if not hasattr(self, "_pad_token_id"):
            self._pad_token_id = self._pad_id()
        return self._pad_token_id

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed loss of the batch."""
        return self._losses(model(**batch.inputs).logits, batch.labels).sum()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row (B,): cross entropy, its sum over labels, or the square."""
        logits = logits.float()
        weight = None if self.weights is None else self.weights.to(logits.device)
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

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the label, or the number, of each row, with the probabilities."""
        logits = model(**batch.inputs).logits.float()
        losses = self._losses(logits, batch.labels).tolist()
        labels = batch.labels.tolist()
        n_items = [batch.n_items / len(losses)] * len(losses)
        if self.spec.problem == "single_label" and self.weights is not None:
            n_items = self.weights[batch.labels.cpu()].tolist()
        readings = self.read(logits)
        return [
            Prediction(
                row,
                loss,
                items,
                said,
                self._names(label),
                scores,
                {self.metric_channel: (value, label if isinstance(label, float) else _ints(label))},
            )
            for row, loss, items, label, (value, said, scores) in zip(
                batch.rows, losses, n_items, labels, readings, strict=True
            )
        ]

    def read(self, logits: Tensor) -> list[tuple[Any, Any, dict[str, float] | None]]:
        """Return (value for the metrics, what it is called, probabilities by label) of each row."""
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
            (value, self._names(value), dict(zip(self.labels, row, strict=True)))
            for value, row in zip(values, probabilities.tolist(), strict=True)
        ]

    def answer_columns(self) -> list[str]:
        """Return `prediction` and, for labels, the probability of each."""
        return ["prediction", *(f"p_{label}" for label in self.labels)]

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the prediction and the probabilities of each row."""
        device = next(model.parameters()).device
        inputs = self._padded(self._encode_texts(rows))
        logits = model(**{key: value.to(device) for key, value in inputs.items()}).logits.float()
        return [
            [said, *(round(p, 6) for p in (scores or {}).values())]
            for _, said, scores in self.read(logits)
        ]

    def _names(self, value: Any) -> Any:
        if isinstance(value, list):
            return [name for name, on in zip(self.labels, value, strict=True) if on]
        return value if self.spec.problem == "regression" else self.labels[value]


def _text(value: Any) -> str:
    """Return a label as text: 1, 1.0 and " 1" are the same label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None  # not NaN, not infinite


def _sorted(values: Counter[str]) -> list[str]:
    """Return labels in order: by value where all are numbers, else by name."""
    numeric = all(_number(value) is not None for value in values)
    return sorted(values, key=(lambda v: (float(v), v)) if numeric else None)


def _ints(label: Any) -> Any:
    return [int(value) for value in label] if isinstance(label, list) else int(label)


def label_counts(rows: Rows, task: SequenceClassification) -> dict[str, int]:
    """Return how often each label stands in the rows, in the order of the labels."""
    counts: Counter[int | None] = Counter()
    for value, count in task._values(rows).items():
        counts[task._position(value)] += count
    return {label: counts[i] for i, label in enumerate(task.labels)}
