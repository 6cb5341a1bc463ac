"""The base class of tasks that are trained with a teacher.

The divergence from the teacher's answers is a second term of the loss. Validation and test are
evaluated by their labels, as without a teacher. `collate` recognises train examples because only
they contain the teacher's inputs, or its cached answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MAIN, Batch
from lora_cli.tasks.teachers.teacher import Teacher

TEACHER = "teacher"  # the name of the second term of the loss
TEACHER_PREFIX = "teacher_"  # of the keys of its inputs and answers in an example or a batch


class DistilledTask(Task):
    """A task with a teacher; this class comes before the task itself in the order of bases."""

    teacher: Teacher
    frozen_splits = ("train",)

    @property
    def train_loss_weights(self) -> Mapping[str, float]:
        """The weights of the labels' term and of the teacher's term of the loss."""
        weight = self.teacher.spec.weight
        return {MAIN: 1.0 - weight, TEACHER: weight}

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the teacher, whose answers can be cached."""
        return {TEACHER: self.teacher.model()}

    def release_frozen(self) -> None:
        """Release the teacher's memory."""
        self.teacher.release()

    @property
    def teacher_identity(self) -> dict[str, str]:
        """The teacher's name and the hash of its tensors."""
        facts = self.teacher.facts
        return {TEACHER: f"{facts['name']} ({facts['fingerprint']})"}

    @property
    def teacher_facts(self) -> dict[str, Any]:
        """The facts about the teacher, for the report."""
        return self.teacher.facts

    def answers(self, batch: Batch) -> Any:
        """Return the teacher's answers for a batch, without gradients."""
        raise NotImplementedError
