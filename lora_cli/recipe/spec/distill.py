"""`train.distill`: a teacher, whose answers are learned besides the labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Section, Word


class DistillSpec(Section):
    """Learn from a teacher: a larger model, or one that was tuned on more labels.

    The loss is `weight` * temperature² * KL(teacher || student) + (1 - `weight`) * the task's own
    loss, each a mean over its own items. Train rows without a label count in the first part alone.
    """

    teacher: Word
    """A trained model for the same task: a Hub id, a local folder (relative to the recipe), or
    `package:NAME/FOLDER`; or an adapter of one, by its folder or its Hub id. A classifier has the
    same labels, by name; a language model has the tokens of the base model."""

    revision: Word = "main"
    """Branch, tag or commit of the teacher on the Hub."""

    temperature: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Teacher and student are compared by softmax(logits / temperature): higher ones show more of
    what the teacher thinks of unlikely answers."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teacher's part of the loss; the labels' part weighs what is left. 1 reads no
    labels."""
