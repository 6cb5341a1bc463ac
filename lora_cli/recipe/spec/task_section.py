"""What all task sections share: facts about a task that need no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lora_cli.patterns import regex_error
from lora_cli.recipe.spec.section import Conflicts, Section

Truncation = Literal["right", "left", "drop", "error"]
MediaKind = Literal["image", "audio"]
AnswerKind = Literal[
    "single_label",
    "multi_label",
    "regression",
    "text",
    "spans",
    "transcript",
    "retrieval",
    "boxes",
    "other",
]


def pattern_conflicts(pattern: str | None) -> Conflicts:
    """Yield what is wrong with the regular expression of `answer_pattern`, if there is one."""
    if pattern is not None and (error := regex_error(pattern)):
        what = f"`{pattern}` is not a regular expression: {error}"
        yield "answer_pattern", what, 'for example `"#### (-?[0-9.,]+)"`, in quotation marks'


@dataclass(frozen=True)
class Usage:
    """How the code on a model card uses the model without this tool.

    Args:
        auto_class: The class of transformers that loads the model.
        code: Python that runs `model` on an input and prints its answer.
        imports: Import lines, placed first.
        setup: Lines that follow the loading of the processor.
        head: Further arguments that create the model's head, each after a comma.
        processor: The variable and the class of transformers that prepare the inputs.
        has_own_processor: Whether the processor is saved with the adapter, because the base has
            none or a different one.
    """

    auto_class: str
    code: str
    imports: str = ""
    setup: str = ""
    head: str = ""
    processor: tuple[str, str] = ("tokenizer", "AutoTokenizer")
    has_own_processor: bool = False


@dataclass(frozen=True)
class UsualTraining:
    """What `lora init` writes for a task unless the rows or the base model decide it.

    Args:
        writes: Whether the model generates text: then the settings for language models are used,
            and an encoder is not accepted.
        longest: Maximum length of an example in tokens. Longer ones are slow even if they fit.
        epochs: Pairs of a number of rows and a number of epochs. The first pair with more rows
            than the data decides.
        learning_rate: Learning rate of an adapter; None chooses it by the size of the model.
        rate_scale: Factor of that learning rate.
        all_linear: Whether the draft names all linear layers as targets. Otherwise it names none,
            and the task's default applies.
        targets_note: Why these modules are adapted; if empty, the usual note is written.
        metrics: Metrics to measure, if they are not just the task's default.
        step: Examples per step, for a model that does not generate text.
    """

    writes: bool = False
    longest: int = 512
    epochs: tuple[tuple[float, int], ...] = ((500, 10), (5_000, 5), (50_000, 3), (math.inf, 1))
    learning_rate: float | None = None
    rate_scale: float = 1.0
    all_linear: bool = True
    targets_note: str = ""
    metrics: tuple[str, ...] = ()
    step: int = 16


class TaskSection(Section):
    """What all task sections have."""

    peft_task_type: ClassVar[str | None] = None
    """PEFT's name for the task."""
    pipeline_tag: ClassVar[str]
    """The Hub's name for the task."""
    example_input: ClassVar[str] = "Some text"
    """The input in the `lora predict` command of a model card."""
    suitable_models: ClassVar[str]
    """A hint for users whose model cannot be used for the task."""
    generates_images: ClassVar[bool] = False
    """Whether the model generates images."""
    can_pack: ClassVar[bool] = False
    """Whether several examples can share a row (`train.packing`)."""
    can_distill: ClassVar[bool] = False
    """Whether the model can learn from a teacher (`train.distill`)."""
    default_targets: ClassVar[Literal["attention", "layers"] | tuple[str, ...]] = "attention"
    """Which modules are adapted unless the recipe names them: the queries and values of attention,
    or every linear layer; in a model without them, the most similar modules. Or a tuple of names,
    of which those that the model has are adapted."""
    baselines: ClassVar[frozenset[str]] = frozenset({"base"})
    """The values of `evaluate.baselines` that the task supports."""
    usual_training: ClassVar[UsualTraining] = UsualTraining()
    """How a drafted recipe trains, unless the rows or the model decide it."""
    frozen_hint: ClassVar[str] = "remove it"
    """A hint for users who name a module in a part of the model that is not adapted."""
    packing_hint: ClassVar[str] = "leave it out"
    length_keys: ClassVar[tuple[str, ...]] = ("max_length",)
    """The keys that limit the length of an example. A section need not have all of them."""

    @property
    def couples_examples(self) -> bool:
        """Whether the loss compares the examples of a step with each other."""
        return False

    @property
    def answer_kind(self) -> AnswerKind:
        """The kind of answers that the model gives, which decides how the report shows them."""
        return "other"

    @property
    def label_columns_by_key(self) -> dict[str, str]:
        """The columns with labels whose proportions a split can keep, by their recipe keys."""
        return {}

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The columns whose content must not be on both sides of a split, by their recipe keys."""
        return {}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The columns that contain images or audio, and which of the two."""
        return {}

    @property
    def transcript_column(self) -> str | None:
        """The column that is read from text files next to recordings or images, if any."""
        return None

    @property
    def local_folders(self) -> list[str]:
        """The keys whose values are folders, relative to the recipe."""
        return []

    @property
    def models_by_key(self) -> dict[str, str]:
        """Other models that the task uses, by recipe key: local folders or Hub ids."""
        return {}

    @property
    def sample_prompts(self) -> list[str]:
        """The prompts for which images are generated during training."""
        return []

    @property
    def boxes_column(self) -> str | None:
        """The column that annotation files fill, if the task reads boxes in images."""
        return None

    @property
    def local_files(self) -> list[str]:
        """The keys whose values are files, relative to the recipe."""
        return []

    def own_code(self, base: str, options: str, parts: tuple[str, ...], drawing: Any) -> str:
        """Return Python that uses the model without this tool, if transformers has no class for it.

        Args:
            base: The base, as Python code.
            options: Further arguments for loading it.
            parts: The parts of the model with an adapter, each in a folder with its name; empty if
                the weights of the model are complete.
            drawing: The recipe's `evaluate.drawing`.
        """
        return ""

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how to use the model without this tool, or None if there is no simple way.

        Args:
            labels: Names of the labels, in the order of the model's outputs.
            settings: The recipe's `evaluate.generation`.
        """
        return None
