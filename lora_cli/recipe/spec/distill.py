"""`train.distill`: a teacher model to learn from, in addition to the labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Section, Word


class DistillSpec(Section):
    """Learn from a teacher: a larger model, or one that was tuned on more labels.

    The loss is `weight` * temperature² * KL(teacher || student) + (1 - `weight`) * the task's own
    loss, where each term is a mean over its items. Train rows without a label count only in the
    first term.
    """

    teacher: Word
    """A trained model for the same task: a Hub id, a local folder (relative to the recipe), or
    `package:NAME/FOLDER`; or an adapter for such a model, by its folder or Hub id. A classifier
    must have the same label names, a language model the same tokens as the base model."""

    revision: Word = "main"
    """Branch, tag or commit of the teacher on the Hub."""

    temperature: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Teacher and student are compared by softmax(logits / temperature). A higher temperature gives
    more weight to the teacher's probabilities of unlikely answers."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teacher's term of the loss; the term of the labels gets the rest. With 1,
    labels are not read."""
