"""Distillation of a classifier from a teacher with the same labels, also for unlabelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.data.file_formats import is_blank
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import Recipe, SequenceClassificationSpec
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.classification.head_rows import match_rows
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.tasks.teachers.distillation_loss import (
    label_divergence,
    multi_label_divergence,
)
from lora_cli.tasks.teachers.distilled_task import TEACHER, TEACHER_PREFIX, DistilledTask
from lora_cli.tasks.teachers.teacher import errors_of_teacher, open_teacher

TEACHER_LOGITS = f"{TEACHER_PREFIX}logits"


class DistilledClassification(DistilledTask, Classification):
    """A classification with a teacher that has the same labels; train rows may have no label.

    A row without a label counts only in the teacher's term of the loss.
    """

    teacher_positions: Tensor
    """The position of each label among the teacher's outputs (C,)."""

    def load_processor(self) -> None:
        """Load the processors of the student and the teacher."""
        super().load_processor()  # type: ignore[safe-super]  # the task's own
        self.teacher.load_processor()

    def is_unlabelled(self, row: dict[str, Any]) -> bool:
        """Return whether all label columns of a row are blank."""
        return all(is_blank(row.get(column)) for column in self.label_spec.target_columns)

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have; train rows may have no label."""
        return self.input_columns() if training else super().needed_columns()

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row; empty if nothing is."""
        if training and self.is_unlabelled(row):
            return self.input_error(row)
        return super().row_error(row)

    def learn_from(self, splits: dict[str, Any]) -> None:
        """Find the labels, and compare them with the teacher's.

        Raises:
            LoraError: If they differ, or if no train row has a label but its weight is not 0.
        """
        super().learn_from(splits)
        with errors_of_teacher(self.recipe):
            self.teacher_positions = torch.tensor(self._find_teacher_positions())
        if "train" not in splits:
            return
        rows = splits["train"]
        n_unlabelled = sum(map(self.is_unlabelled, rows))
        if n_unlabelled == len(rows) and self.teacher.spec.weight < 1:
            what = "no train row has a label, so the labels' part of the loss has nothing to learn"
            at = self.recipe.at("task.label_column")
            hint = "is it the right column? To learn from the teacher alone: "
            raise LoraError(what, at, f"{hint}`--set train.distill.weight=1`")
        with_label = f"{counted(len(rows) - n_unlabelled, 'train row')} with a label"
        note = f"{with_label}, {n_unlabelled:,} without: those learn from the teacher alone"
        if n_unlabelled and note not in self.notes:
            self.notes.append(note)

    def _find_teacher_positions(self) -> list[int]:
        teacher_labels, student_labels = self.teacher.task.labels, self.labels
        unnamed = [f"LABEL_{i}" for i in range(len(teacher_labels))] == teacher_labels
        if unnamed and student_labels == [str(i) for i in range(len(teacher_labels))]:
            return list(range(len(teacher_labels)))
        rows = match_rows(teacher_labels, student_labels)
        found = [row for row in rows if row is not None]
        if len(found) == len(student_labels) == len(teacher_labels):
            return found
        missing = [label for label, row in zip(student_labels, rows, strict=True) if row is None]
        if missing:
            what = f"it has no label `{missing[0]}`; its labels are {_list_names(teacher_labels)}"
        else:
            others = [name for i, name in enumerate(teacher_labels) if i not in found]
            what = f"it has the label `{others[0]}`, which the recipe does not have"
        hint = "teacher and student need the same labels, by name: `task.labels` names them"
        if unnamed:
            what = f"its {counted(len(teacher_labels), 'label')} have no names"
            hint = "name them, in the order of its outputs, as `id2label` of its config.json"
        raise LoraError(what, hint=hint)

    def label_of(self, row: dict[str, Any]) -> float | int | list[int]:
        """Return the target of a row; `IGNORED` if it has no label."""
        if not self.is_unlabelled(row):
            return super().label_of(row)
        is_one = self.label_spec.problem == "single_label"
        return IGNORED if is_one else [IGNORED] * len(self.labels)

    def labels_and_items(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the targets of examples, and the items of each (B,), which are 0 without label."""
        replacement = {**examples[0], "labels": self.trial_label}
        has_label = torch.tensor([not _is_ignored(example["labels"]) for example in examples])
        filled = [
            e if is_labelled else {**e, **replacement}
            for e, is_labelled in zip(examples, has_label.tolist(), strict=True)
        ]
        labels, items = super().labels_and_items(filled)
        shape = (-1,) + (1,) * (labels.ndim - 1)
        return torch.where(has_label.view(shape), labels, IGNORED), items * has_label

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an encoded example for people to read: its label, if any, and its input."""
        if not _is_ignored(example["labels"]):
            return super().shown(example, colour)
        labelled = {**example, "labels": self.trial_label}
        return ["without a label"], super().shown(labelled, colour)[1]

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the labels, and in training the divergence from the teacher (B,)."""
        labels = batch.targets["labels"]
        has_label = (labels if labels.ndim == 1 else labels[:, 0]) != IGNORED
        safe_labels = {"labels": labels.clamp(min=0)}
        labelled_batch = Batch(batch.inputs, safe_labels, batch.items, batch.cost, batch.rows)
        label_losses = super().losses(model, output, labelled_batch)[MAIN]
        found = {MAIN: torch.where(has_label, label_losses, 0.0)}
        if TEACHER in batch.items:
            kept_logits = batch.targets.get(TEACHER_LOGITS)
            kept_logits = self.answers(batch) if kept_logits is None else kept_logits
            is_multi_label = self.label_spec.problem == "multi_label"
            compare = multi_label_divergence if is_multi_label else label_divergence
            teacher_logits = kept_logits.float()[:, self.teacher_positions.to(kept_logits.device)]
            found[TEACHER] = compare(output.float(), teacher_logits, self.teacher.spec.temperature)
        return found

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the teacher's logits for each example (B, C), in the order of its labels."""
        return {TEACHER_LOGITS: self.answers(batch)}


class DistilledSequenceClassification(DistilledClassification, SequenceClassification):
    """`task.type: sequence_classification` with a teacher, which may have another tokenizer."""

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe, spec)
        self.teacher = open_teacher(recipe)

    @property
    def teacher_task(self) -> SequenceClassification:
        """The task of the teacher."""
        task = self.teacher.task
        assert isinstance(task, SequenceClassification)
        return task

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row and the cached answers of the teacher depend on."""
        return [*super().cache_key(), *self.teacher.cache_key()]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of training rows, with the inputs of the teacher."""
        with errors_of_teacher(self.recipe):
            teacher_inputs = self.teacher_task.encode_inputs(rows)
            self.teacher_task.check_examples(teacher_inputs)
        return [
            [
                example | {f"{TEACHER_PREFIX}{key}": value for key, value in teacher_input.items()}
                for example in own_examples
            ]
            for own_examples, teacher_input in zip(self.encode(rows), teacher_inputs, strict=True)
        ]

    def train_features(self) -> dict[str, str]:
        """Return the type of each key of a training example."""
        teacher_features = self.teacher_task.features()
        prefixed = {
            f"{TEACHER_PREFIX}{key}": kind
            for key, kind in teacher_features.items()
            if key != "labels"
        }
        return self.features() | prefixed

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch, with the teacher's inputs or its cached logits."""
        batch = super().collate(examples)
        keys = [key for key in examples[0] if key.startswith(TEACHER_PREFIX)]
        if not keys:
            return batch
        batch.items[TEACHER] = torch.ones(len(examples))
        if self.label_spec.problem == "multi_label":
            batch.items[TEACHER] *= len(self.labels)
        if TEACHER_LOGITS in keys:
            batch.targets[TEACHER_LOGITS] = torch.stack(
                [example[TEACHER_LOGITS] for example in examples]
            )
            return batch
        teacher_inputs = [
            {key.removeprefix(TEACHER_PREFIX): e[key] for key in keys} for e in examples
        ]
        inputs = self.teacher_task.input_tensors(teacher_inputs)
        batch.targets |= {f"{TEACHER_PREFIX}{key}": value for key, value in inputs.items()}
        return batch

    @torch.no_grad()
    def answers(self, batch: Batch) -> Tensor:
        """Return the teacher's logits for a batch (B, C)."""
        model = self.teacher.model()
        inputs = {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in batch.targets.items()
            if key.startswith(TEACHER_PREFIX)
        }
        return self.teacher_task.logits(model, inputs)


def _is_ignored(labels: Any) -> bool:
    if isinstance(labels, int):
        return labels == IGNORED
    return len(labels) > 0 and int(labels[0]) == IGNORED


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{name}`" for name in names[:5]) + more
