"""A classification that learns from a teacher with the same labels, also where rows have none."""

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
    marks_divergence,
)
from lora_cli.tasks.teachers.distilled_task import READS, TEACHER, DistilledTask
from lora_cli.tasks.teachers.teacher import errors_of_teacher, open_teacher

ANSWER = f"{READS}logits"


class DistilledClassification(DistilledTask, Classification):
    """A classification whose train rows may have no label, and whose teacher has the same labels.

    A row without a label is an item of the teacher's term alone.
    """

    order: Tensor
    """Where each label stands among the teacher's outputs (C,)."""

    def load_processor(self) -> None:
        """Load the student's processor, and the teacher's."""
        super().load_processor()  # type: ignore[safe-super]  # the task's own
        self.teacher.load_processor()

    def is_unlabelled(self, row: dict[str, Any]) -> bool:
        """Return whether no column of a row says anything of its label."""
        return all(is_blank(row.get(column)) for column in self.label_spec.target_columns)

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have; train rows may have no label."""
        return self.input_columns() if training else super().needed_columns()

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row, or nothing."""
        if training and self.is_unlabelled(row):
            return self.input_error(row)
        return super().row_error(row)

    def learn_from(self, splits: dict[str, Any]) -> None:
        """Find the labels, and compare them with the teacher's.

        Raises:
            LoraError: If they differ, or if no train row has one and the recipe wants to learn it.
        """
        super().learn_from(splits)
        with errors_of_teacher(self.recipe):
            self.order = torch.tensor(self._order())
        if "train" not in splits:
            return
        rows = splits["train"]
        unlabelled = sum(map(self.is_unlabelled, rows))
        if unlabelled == len(rows) and self.teacher.spec.weight < 1:
            what = "no train row has a label, so the labels' part of the loss has nothing to learn"
            at = self.recipe.at("task.label_column")
            hint = "is it the right column? To learn from the teacher alone: "
            raise LoraError(what, at, f"{hint}`--set train.distill.weight=1`")
        with_label = f"{counted(len(rows) - unlabelled, 'train row')} with a label"
        note = f"{with_label}, {unlabelled:,} without: those learn from the teacher alone"
        if unlabelled and note not in self.notes:
            self.notes.append(note)

    def _order(self) -> list[int]:
        theirs, ours = self.teacher.task.labels, self.labels
        unnamed = [f"LABEL_{i}" for i in range(len(theirs))] == theirs
        if unnamed and ours == [str(i) for i in range(len(theirs))]:
            return list(range(len(theirs)))
        rows = match_rows(theirs, ours)
        found = [row for row in rows if row is not None]
        if len(found) == len(ours) == len(theirs):
            return found
        missing = [label for label, row in zip(ours, rows, strict=True) if row is None]
        if missing:
            what = f"it has no label `{missing[0]}`; its labels are {_listed(theirs)}"
        else:
            others = [name for i, name in enumerate(theirs) if i not in found]
            what = f"it has the label `{others[0]}`, which the recipe does not have"
        hint = "teacher and student need the same labels, by name: `task.labels` names them"
        if unnamed:
            what = f"its {counted(len(theirs), 'label')} have no names"
            hint = "name them, in the order of its outputs, as `id2label` of its config.json"
        raise LoraError(what, hint=hint)

    def label_of(self, row: dict[str, Any]) -> float | int | list[int]:
        """Return the label of a row as the model learns it; of none, what is ignored."""
        if not self.is_unlabelled(row):
            return super().label_of(row)
        is_one = self.label_spec.problem == "single_label"
        return IGNORED if is_one else [IGNORED] * len(self.labels)

    def labels_and_items(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the labels of examples, and how many items each is; none without a label."""
        known = {**examples[0], "labels": self.trial_label}
        has = torch.tensor([not _is_ignored(example["labels"]) for example in examples])
        some = [e if ok else {**e, **known} for e, ok in zip(examples, has.tolist(), strict=True)]
        labels, items = super().labels_and_items(some)
        shape = (-1,) + (1,) * (labels.ndim - 1)
        return torch.where(has.view(shape), labels, IGNORED), items * has

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the label of an encoded example, if it has one, and what is shown of its input."""
        if not _is_ignored(example["labels"]):
            return super().shown(example, colour)
        labelled = {**example, "labels": self.trial_label}
        return ["without a label"], super().shown(labelled, colour)[1]

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the labels, and in training that of the teacher's answers."""
        labels = batch.targets["labels"]
        has = (labels if labels.ndim == 1 else labels[:, 0]) != IGNORED
        known = {"labels": labels.clamp(min=0)}
        own = Batch(batch.inputs, known, batch.items, batch.cost, batch.rows)
        of_labels = super().losses(model, output, own)[MAIN]
        found = {MAIN: torch.where(has, of_labels, 0.0)}
        if TEACHER in batch.items:
            said = batch.targets.get(ANSWER)
            said = self.answers(batch) if said is None else said
            several = self.label_spec.problem == "multi_label"
            compare = marks_divergence if several else label_divergence
            theirs = said.float()[:, self.order.to(said.device)]
            found[TEACHER] = compare(output.float(), theirs, self.teacher.spec.temperature)
        return found

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the teacher's logits for each example (B, C), in the order of its own labels."""
        return {ANSWER: self.answers(batch)}


class DistilledSequenceClassification(DistilledClassification, SequenceClassification):
    """`task.type: sequence_classification` with a teacher, which has a tokenizer of its own."""

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe, spec)
        self.teacher = open_teacher(recipe)

    @property
    def reader_of_teacher(self) -> SequenceClassification:
        """The task that reads rows as the teacher does."""
        task = self.teacher.task
        assert isinstance(task, SequenceClassification)
        return task

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row: also the teacher's tokenizer."""
        return [*super().cache_key(), *self.teacher.cache_key()]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of rows, with what the teacher reads of each."""
        with errors_of_teacher(self.recipe):
            theirs = self.reader_of_teacher.encode_inputs(rows)
            self.reader_of_teacher.check_examples(theirs)
        return [
            [one | {f"{READS}{key}": value for key, value in read.items()} for one in own]
            for own, read in zip(self.encode(rows), theirs, strict=True)
        ]

    def train_features(self) -> dict[str, str]:
        """Return the types of what student and teacher read."""
        theirs = self.reader_of_teacher.features()
        read = {f"{READS}{key}": kind for key, kind in theirs.items() if key != "labels"}
        return self.features() | read

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch, with what the teacher reads, or has answered."""
        batch = super().collate(examples)
        keys = [key for key in examples[0] if key.startswith(READS)]
        if not keys:
            return batch
        batch.items[TEACHER] = torch.ones(len(examples))
        if self.label_spec.problem == "multi_label":
            batch.items[TEACHER] *= len(self.labels)
        if ANSWER in keys:
            batch.targets[ANSWER] = torch.stack([example[ANSWER] for example in examples])
            return batch
        read = [{key.removeprefix(READS): e[key] for key in keys} for e in examples]
        inputs = self.reader_of_teacher.input_tensors(read)
        batch.targets |= {f"{READS}{key}": value for key, value in inputs.items()}
        return batch

    @torch.no_grad()
    def answers(self, batch: Batch) -> Tensor:
        """Return the teacher's logits (B, C) for what it reads of a batch."""
        model = self.teacher.model()
        inputs = {
            key.removeprefix(READS): value
            for key, value in batch.targets.items()
            if key.startswith(READS)
        }
        return self.reader_of_teacher.logits(model, inputs)


def _is_ignored(labels: Any) -> bool:
    if isinstance(labels, int):
        return labels == IGNORED
    return len(labels) > 0 and int(labels[0]) == IGNORED


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{name}`" for name in names[:5]) + more
