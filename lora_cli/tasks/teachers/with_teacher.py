"""The tasks that can be trained with a teacher."""

from __future__ import annotations

from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.contract import Task
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.tasks.teachers.distilled_causal_lm import DistilledCausalLM
from lora_cli.tasks.teachers.distilled_classification import DistilledSequenceClassification
from lora_cli.tasks.teachers.distilled_task import DistilledTask

WITH_TEACHER: dict[type[Task], type[DistilledTask]] = {
    SequenceClassification: DistilledSequenceClassification,
    CausalLM: DistilledCausalLM,
}
"""The class of each task in training with a teacher; the specs of these tasks set `can_distill`."""
