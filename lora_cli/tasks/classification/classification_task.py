"""The base class of tasks that predict a label, several labels or a number, from any input."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.data.file_formats import is_blank
from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.data.label_lists import listed_labels
from lora_cli.data.load_rows import Rows
from lora_cli.errors import Problem
from lora_cli.metrics import MetricContext
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec.classification_section import ClassificationSection
from lora_cli.tasks.classification.head_rows import arrange_rows, rows_of_heads
from lora_cli.tasks.classification.labels import Labels, has_scores, is_multi_hot
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MAIN, Batch, Example, Field, Kind, Prediction

MAX_FULL_SCORES = 20  # the most labels with which a prediction keeps every probability
N_BEST_SCORES = 10  # the probabilities that a prediction keeps otherwise
MAX_SCORE_COLUMNS = 100  # the most labels with which `lora predict` writes a column for each


class Classification(Task):
    """A task whose model predicts a label, several labels, or a number."""

    has_head = True

    def __init__(self, recipe: Recipe, spec: ClassificationSection) -> None:
        super().__init__(recipe)
        self.label_spec = spec
        self.reader = Labels(recipe, spec)
        self._moved_weights: Tensor | None = None
        if spec.problem == "regression":
            self.metric_channel, self.default_metrics = "value", ("pearson", "spearman", "mse")
        else:
            self.metric_channel, self.default_metrics = "label", ("accuracy", "f1")

    # ---------------------------------------------------------------------------- labels

    def label_fields(self) -> list[Field]:
        """Return the column of the label, or the columns of the labels."""
        spec = self.label_spec
        kinds: dict[str, Kind] = {"regression": "number", "multi_label": "labels"}
        kind = kinds.get(spec.problem, "label")
        columns = spec.label_columns_by_key or {"task.label_column": spec.label_column}
        return [Field(key, column, "target", kind) for key, column in columns.items()]

    @property
    def knows_labels(self) -> bool:
        """Whether the names of the labels are known, or not needed (regression)."""
        return bool(self.labels) or self.label_spec.problem == "regression"

    @property
    def reads_train(self) -> bool:
        """Whether the labels, or their weights in the loss, are learned from the train rows."""
        return not self.knows_labels or self.label_spec.class_weights == "balanced"

    @property
    def labels(self) -> list[str]:
        """The names of the labels, in the order of the model's outputs; empty for regression."""
        return self.reader.names

    def learn_names(self, splits: dict[str, Rows]) -> None:
        """Read the names of numbered labels from a data set of the Hub."""
        self.reader.learn_classes(splits)

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the labels and their weights in the loss."""
        if self.label_spec.problem == "regression":
            return
        self.reader.learn(splits)
        self.learned.task["labels"] = list(self.labels)
        if self.reader.class_weights is not None:
            self.learned.task["class_weights"] = self.reader.class_weights

    @property
    def metric_context(self) -> MetricContext:
        """The number of labels, and whether a row may have several."""
        several = self.label_spec.problem == "multi_label"
        return MetricContext(len(self.labels) or None, several, tuple(self.labels))

    @property
    def loss_definition(self) -> str:
        """The definition of the loss, for the report."""
        weighted = ", weighted by `class_weights`" if self.label_spec.class_weights else ""
        if self.label_spec.label_smoothing and self.label_spec.problem == "single_label":
            weighted += f", with label smoothing {self.label_spec.label_smoothing:g}"
        match self.label_spec.problem:
            case "regression":
                return "mean squared error per row"
            case "multi_label":
                return f"mean binary cross-entropy per row and label, in nats{weighted}"
            case "single_label":
                return f"mean cross-entropy per row, in nats{weighted}"

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return the names of a row's labels, in the order of the labels; or its number as text.

        The result is None for a row without a label, which a teacher labels in training.
        """
        if self.label_spec.problem == "regression":
            return [str(self.reader.number(row))]
        if (texts := self.reader.texts_of(row)) is None:
            return None
        positions = {self.reader.position(value) for value in texts}
        return [self.labels[i] for i in sorted(p for p in positions if p is not None)]

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label occurs in the rows, in the order of the labels."""
        counts: Counter[int | None] = Counter()
        for value, count in self.reader.count(rows).items() if self.labels else ():
            counts[self.reader.position(value)] += count
        return {label: counts[i] for i, label in enumerate(self.labels)}

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the labels for an adapter from another tool, by the number of outputs of its head.

        If the adapter has no head, the labels are those of the base's head.
        """
        heads = rows_of_heads(tensors, self.empty_model()[1])
        base = load_config(self.recipe)
        base_labels: dict[int, str] = base.id2label
        # the last layer of the head has the fewest outputs
        count = min(heads) if heads else len(base_labels)
        if base.problem_type == "multi_label_classification" and count == len(base_labels):
            self.learned.task["problem"] = "multi_label"
        if count == 1:
            self.learned.task["problem"] = "regression"
        elif sorted(base_labels) == list(range(count)):  # a base that has such a classifier already
            self.learned.task["labels"] = [base_labels[i] for i in range(count)]
        else:
            self.learned.task["labels"] = [f"LABEL_{i}" for i in range(count)]

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the label; empty if nothing is."""
        column = self.label_spec.label_column
        value = row.get(column)
        if self.label_spec.problem == "regression":
            return self.reader.number_error(row)
        if self.reader.texts_of(row) is not None:
            return ""
        if self.label_spec.label_columns is not None:
            return self.reader.mark_error(row, self.label_spec.label_columns)
        if self.label_spec.problem == "multi_label":
            if is_multi_hot(value, self.label_spec.label_separator):
                return (
                    f"column `{column}` has a 0 or 1 for each label, not the labels: write those "
                    "that are 1, or a column for each label (`task.label_columns`)"
                )
            if has_scores(value):
                return f"column `{column}` has fractions such as scores, not the labels"
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

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why a row is skipped: it has one of `skip_labels`; otherwise empty."""
        if not self.label_spec.skip_labels:
            return ""
        label = self.reader.skipped_label(row)
        return f"the label `{label}` is one of `skip_labels`" if label else ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return the problem of a streamed row with an unknown label, if it has one."""
        return None if self.label_spec.problem == "regression" else self.reader.problem(row, place)

    def label_of(self, row: dict[str, Any]) -> float | int | list[int]:
        """Return the target of a row: a number, the position of its label, or a 0 or 1 for each."""
        if self.label_spec.problem == "regression":
            value = self.reader.number(row)
            assert value is not None
            return value
        positions = [self.reader.position(value) for value in self.reader.texts_of(row) or ()]
        if self.label_spec.problem == "multi_label":
            return [int(i in positions) for i in range(len(self.labels))]
        assert positions[0] is not None
        return positions[0]

    @property
    def label_feature(self) -> str:
        """The type of the label of an example."""
        kinds = {"regression": "float32", "multi_label": "list<int8>", "single_label": "int64"}
        return kinds[self.label_spec.problem]

    @property
    def trial_label(self) -> Any:
        """A target for the examples on which the model is tried."""
        label: Any = {"regression": 0.0, "single_label": 0}.get(self.label_spec.problem)
        return [0] * len(self.labels) if label is None else label

    def labels_and_items(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the targets of examples, (B,) or (B, labels), and the items of each (B,).

        An example is one item of the loss, or as many as its class weight. With several labels in a
        row, each label is an item.
        """
        labels = torch.from_numpy(np.array([example["labels"] for example in examples]))
        if self.label_spec.problem != "single_label":
            labels = labels.float()
        items = torch.ones(len(examples))
        if self.label_spec.problem == "multi_label":
            items *= len(self.labels)
        elif self.reader.weights is not None:
            items = self.reader.weights[labels]
        return labels, items

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an encoded example for people to read: its label, and its input."""
        value = self._names(example["labels"])
        label = ", ".join(value) if isinstance(value, list) else value
        return [f"label {label}"], super().shown(example, colour)[1]

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, with the names of the labels."""
        if self.label_spec.problem == "regression":
            config = load_config(self.recipe, num_labels=1, problem_type="regression")
        else:
            if (
                not self.labels
            ):  # `lora validate` needs the names of modules before the labels are known
                return load_config(self.recipe)
            kind = f"{self.label_spec.problem}_classification"
            config = load_config(
                self.recipe,
                num_labels=len(self.labels),
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
                problem_type=kind,
            )
        return config

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:
        """Arrange the rows of a pretrained classifier by the names of the labels."""
        if self.label_spec.problem == "regression":
            return
        config = (self.config, self.recipe, self.auto_class)
        if note := arrange_rows(model, missing, self.labels, *config):
            self.notes.append(note)

    # ------------------------------------------------------------- loss and predictions

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each row (B,): cross-entropy, summed over labels, or squared error."""
        return {MAIN: self._losses(output.float(), batch.targets["labels"])}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        weight = self._weights_on(logits.device)
        match self.label_spec.problem:
            case "regression":
                return F.mse_loss(logits.squeeze(1), labels, reduction="none")
            case "multi_label":
                return F.binary_cross_entropy_with_logits(
                    logits, labels, weight, reduction="none"
                ).sum(1)
            case "single_label":
                return F.cross_entropy(
                    logits,
                    labels,
                    weight,
                    reduction="none",
                    label_smoothing=self.label_spec.label_smoothing,
                )

    def _weights_on(self, device: torch.device) -> Tensor | None:
        """Return the weights of the labels on a device, to which they are copied only once."""
        if self.reader.weights is None or self.reader.weights.device == device:
            return self.reader.weights
        if self._moved_weights is None or self._moved_weights.device != device:
            self._moved_weights = self.reader.weights.to(device)
        return self._moved_weights

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the predicted labels or number of each row, with the probabilities."""
        decoded = self.decode_logits(output.float())
        labels = batch.targets["labels"].tolist()
        return [
            Prediction(
                row,
                prediction,
                self._names(label),
                self._kept_scores(probabilities, label),
                {self.metric_channel: (value, label if isinstance(label, float) else _ints(label))},
            )
            for row, label, (value, prediction, probabilities) in zip(
                batch.rows, labels, decoded, strict=True
            )
        ]

    def decode_logits(self, logits: Tensor) -> list[tuple[Any, Any, list[float] | None]]:
        """Return the predictions for logits (B, labels), or (B, 1) for a regression.

        Returns:
            For each row, the value for the metrics, the same as names of labels, and the
            probabilities of all labels; None for a regression.
        """
        values: list[Any]
        match self.label_spec.problem:
            case "regression":
                return [(value, value, None) for value in logits.squeeze(1).tolist()]
            case "multi_label":
                probabilities = torch.sigmoid(logits)
                values = (probabilities > 0.5).long().tolist()
            case "single_label":
                probabilities = torch.softmax(logits, 1)
                values = probabilities.argmax(1).tolist()
        return [
            (value, self._names(value), row)
            for value, row in zip(values, probabilities.tolist(), strict=True)
        ]

    def _kept_scores(
        self, probabilities: list[float] | None, label: Any
    ) -> dict[str, float] | None:
        """Return the probabilities that are kept with a prediction, by label.

        If there are many labels, these are the highest ones and those of the row's own labels.
        """
        if probabilities is None or len(probabilities) <= MAX_FULL_SCORES:
            by_name = (
                None if probabilities is None else zip(self.labels, probabilities, strict=True)
            )
            return None if by_name is None else dict(by_name)
        row_labels = (
            [i for i, on in enumerate(label) if on] if isinstance(label, list) else [int(label)]
        )
        return {
            self.labels[i]: probabilities[i]
            for i in dict.fromkeys([*_best(probabilities), *row_labels])
        }

    def answer_columns(self) -> dict[str, str]:
        """Return the columns that `lora predict` writes: the prediction and the probabilities.

        If there are many labels, only the highest probabilities are written.
        """
        kinds = {"regression": "double", "multi_label": "list<string>", "single_label": "string"}
        columns = {"prediction": kinds[self.label_spec.problem]}
        if len(self.labels) > MAX_SCORE_COLUMNS:
            # `best` is a mapping, which parquet stores as JSON
            return columns | {"p": "double", "best": "string"}
        return columns | {f"p_{label}": "double" for label in self.labels}

    def answers_of(self, logits: Tensor) -> list[list[Any]]:
        """Return the values of `answer_columns` for each row of logits (B, labels)."""
        return [
            [prediction, *self._probability_values(row or [])]
            for _, prediction, row in self.decode_logits(logits)
        ]

    def _probability_values(self, probabilities: list[float]) -> list[Any]:
        """Return each probability; if there are many, the highest one, and the best by label."""
        rounded = [round(p, 6) for p in probabilities]
        if len(rounded) <= MAX_SCORE_COLUMNS:
            return list(rounded)
        best = {self.labels[i]: rounded[i] for i in _best(probabilities)}
        return [max(rounded), best]

    def _names(self, value: Any) -> Any:
        if isinstance(value, list):
            return [name for name, on in zip(self.labels, value, strict=True) if on]
        return value if self.label_spec.problem == "regression" else self.labels[value]


def _best(probabilities: list[float]) -> list[int]:
    """Return the positions of the highest probabilities, in falling order."""
    return heapq.nlargest(N_BEST_SCORES, range(len(probabilities)), key=probabilities.__getitem__)


def _ints(label: Any) -> Any:
    return [int(value) for value in label] if isinstance(label, list) else int(label)
