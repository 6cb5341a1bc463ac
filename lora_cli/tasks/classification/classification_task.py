"""What tasks share that answer with a label, several labels, or a number, whatever they read."""

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

ALL_SCORES = 20  # labels up to which a prediction keeps the probability of each; of more:
BEST_SCORES = 10
MOST_COLUMNS = 100  # labels up to which each has a column of its own in what `lora predict` writes


class Classification(Task):
    """A task whose model gives an input a label, several labels, or a number."""

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
        """Return the column of the label, or those of the labels."""
        spec = self.label_spec
        kinds: dict[str, Kind] = {"regression": "number", "multi_label": "labels"}
        kind = kinds.get(spec.problem, "label")
        columns = spec.label_columns_by_key or {"task.label_column": spec.label_column}
        return [Field(key, column, "target", kind) for key, column in columns.items()]

    @property
    def knows_labels(self) -> bool:
        """Whether the labels are named, or there are none."""
        return bool(self.labels) or self.label_spec.problem == "regression"

    @property
    def reads_train(self) -> bool:
        """Whether the labels, or their weights in the loss, are to be found in the train rows."""
        return not self.knows_labels or self.label_spec.class_weights == "balanced"

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the model's outputs; none with regression."""
        return self.reader.names

    def learn_names(self, splits: dict[str, Rows]) -> None:
        """Find the names that a data set gives its numbered labels."""
        self.reader.learn_classes(splits)

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the labels and their weights."""
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
        """What the loss measures."""
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
        """Return the names of a row's labels, in the order of the labels; or its number.

        None of a train row without a label, as a teacher may have.
        """
        if self.label_spec.problem == "regression":
            return [str(self.reader.number(row))]
        if (texts := self.reader.texts_of(row)) is None:
            return None
        positions = {self.reader.position(value) for value in texts}
        return [self.labels[i] for i in sorted(p for p in positions if p is not None)]

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label stands in the rows, in the order of the labels."""
        counts: Counter[int | None] = Counter()
        for value, count in self.reader.count(rows).items() if self.labels else ():
            counts[self.reader.position(value)] += count
        return {label: counts[i] for i, label in enumerate(self.labels)}

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the number of labels in the head of an adapter that another tool made.

        Without one in the adapter, they are those of the base's own head.
        """
        heads = rows_of_heads(tensors, self.empty_model()[1])
        base = load_config(self.recipe)
        known: dict[int, str] = base.id2label
        # the last layer's outputs are fewer than any hidden size
        count = min(heads) if heads else len(known)
        if base.problem_type == "multi_label_classification" and count == len(known):
            self.learned.task["problem"] = "multi_label"
        if count == 1:
            self.learned.task["problem"] = "regression"
        elif sorted(known) == list(range(count)):  # a base that has such a classifier already
            self.learned.task["labels"] = [known[i] for i in range(count)]
        else:
            self.learned.task["labels"] = [f"LABEL_{i}" for i in range(count)]

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the label, or nothing."""
        column = self.label_spec.label_column
        value = row.get(column)
        if self.label_spec.problem == "regression":
            return self.reader.number_error(row)
        if self.reader.texts_of(row) is not None:
            return ""
        if self.label_spec.label_columns is not None:
            return self.reader.error_of_marks(row, self.label_spec.label_columns)
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
        """Return which of `skip_labels` the row has, or nothing."""
        if not self.label_spec.skip_labels:
            return ""
        label = self.reader.skipped_label(row)
        return f"the label `{label}` is one of `skip_labels`" if label else ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return which value of a streamed row is no label."""
        return None if self.label_spec.problem == "regression" else self.reader.problem(row, place)

    def label_of(self, row: dict[str, Any]) -> float | int | list[int]:
        """Return the label of a row as the model learns it: a number, or numbers."""
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
        """A label, to try the model on."""
        found: Any = {"regression": 0.0, "single_label": 0}.get(self.label_spec.problem)
        return [0] * len(self.labels) if found is None else found

    def labels_and_items(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the labels of examples, and how many items each is: rows, or their weights."""
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
        """Return the label of an encoded example, and what is shown of its input."""
        value = self._names(example["labels"])
        label = ", ".join(value) if isinstance(value, list) else value
        return [f"label {label}"], super().shown(example, colour)[1]

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the configuration with the labels by name."""
        if self.label_spec.problem == "regression":
            config = load_config(self.recipe, num_labels=1, problem_type="regression")
        else:
            if not self.labels:  # `lora validate` asks for the names of modules all the same
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
        """Put the rows of a pretrained classifier into the order of the labels, by name."""
        if self.label_spec.problem == "regression":
            return
        config = (self.config, self.recipe, self.auto_class)
        if note := arrange_rows(model, missing, self.labels, *config):
            self.notes.append(note)

    # ------------------------------------------------------------- loss and predictions

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each row: cross entropy, its sum over labels, or the square."""
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
        """Return the weights of the labels on a device, where they are copied once."""
        if self.reader.weights is None or self.reader.weights.device == device:
            return self.reader.weights
        if self._moved_weights is None or self._moved_weights.device != device:
            self._moved_weights = self.reader.weights.to(device)
        return self._moved_weights

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the label, or the number, of each row, with the probabilities."""
        readings = self.read(output.float())
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
                batch.rows, labels, readings, strict=True
            )
        ]

    def read(self, logits: Tensor) -> list[tuple[Any, Any, list[float] | None]]:
        """Return (value for the metrics, what it is called, probabilities of the labels) by row."""
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
        columns = {"prediction": kinds[self.label_spec.problem]}
        if len(self.labels) > MOST_COLUMNS:
            # the best of many labels are a mapping, which parquet has as JSON
            return columns | {"p": "double", "best": "string"}
        return columns | {f"p_{label}": "double" for label in self.labels}

    def answers_of(self, logits: Tensor) -> list[list[Any]]:
        """Return the values of `answer_columns` for each row of the model's outputs."""
        return [
            [prediction, *self._answered(row or [])] for _, prediction, row in self.read(logits)
        ]

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
        return value if self.label_spec.problem == "regression" else self.labels[value]


def _best(probabilities: list[float]) -> list[int]:
    """Return the positions of the highest, the highest first."""
    return heapq.nlargest(BEST_SCORES, range(len(probabilities)), key=probabilities.__getitem__)


def _ints(label: Any) -> Any:
    return [int(value) for value in label] if isinstance(label, list) else int(label)
