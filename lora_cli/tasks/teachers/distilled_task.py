"""What tasks of all kinds share that are trained with a teacher.

The teacher's answers are a second term of the loss. Validation and test are measured as without a
teacher: by the labels. Train examples alone hold what the teacher reads, or what it answered, by
which `collate` knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MAIN, Batch
from lora_cli.tasks.teachers.teacher import Teacher

TEACHER = "teacher"  # the second term of the loss
READS = "teacher_"  # before the names of what the teacher reads, and of what it answers


class DistilledTask(Task):
    """The part that tasks of all kinds share; it comes before the task's own class."""

    teacher: Teacher
    frozen_splits = ("train",)

    @property
    def train_loss_weights(self) -> Mapping[str, float]:
        """The weights of the labels' part and of the teacher's."""
        weight = self.teacher.spec.weight
        return {MAIN: 1.0 - weight, TEACHER: weight}

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the teacher."""
        return {TEACHER: self.teacher.model()}

    def release_frozen(self) -> None:
        """Let go of the teacher."""
        self.teacher.release()

    @property
    def teacher_identity(self) -> dict[str, str]:
        """The teacher's name and the hash of its tensors."""
        facts = self.teacher.facts
        return {TEACHER: f"{facts['name']} ({facts['fingerprint']})"}

    @property
    def teacher_facts(self) -> dict[str, Any]:
        """What a report says of the teacher."""
        return self.teacher.facts

    def answers(self, batch: Batch) -> Any:
        """Return what the teacher says of a batch, without gradients."""
        raise NotImplementedError
