"""What the specs of all tasks share: facts of a task that need no torch."""

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
    """Yield what is wrong with the regular expression of `answer_pattern`, if it is one."""
    if pattern is not None and (error := regex_error(pattern)):
        what = f"`{pattern}` is not a regular expression: {error}"
        yield "answer_pattern", what, 'for example `"#### (-?[0-9.,]+)"`, in quotation marks'


@dataclass(frozen=True)
class Usage:
    """How a model card uses the model without this tool.

    Args:
        auto_class: The class of transformers that loads the model.
        code: Python that runs `model` on an input and prints its answer.
        imports: Lines above the others.
        setup: Lines after the processor is loaded.
        head: Arguments that give the model its head, each with a comma before it.
        processor: The name of the variable and the class of transformers that prepare inputs.
        has_own_processor: It lies beside the adapter, and the base has none or another.
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
    """What `lora init` writes for a task where the rows and the base model do not decide it.

    Args:
        writes: The model learns to continue texts: settings of language models are taken, and an
            encoder is of no use.
        longest: Tokens of an example; more is slow, whatever fits.
        epochs: Pairs (rows, passes over them): of the first that has more rows than the data.
        learning_rate: Of an adapter; None: by the size of the model.
        rate_scale: What that is multiplied by.
        all_linear: Whether the draft names all linear layers as targets. Else it names none, and
            the task's own are taken.
        targets_note: Why these are adapted; empty: what is said of all models.
        metrics: What a draft measures, if that is more than the task's own metrics.
        step: Examples of a step, of a model that does not write.
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
    """What every task has."""

    peft_task_type: ClassVar[str | None] = None
    """PEFT's name of the task."""
    pipeline_tag: ClassVar[str]
    """The Hub's name of the task."""
    example_input: ClassVar[str] = "Some text"
    """What a model card gives `lora predict`."""
    suitable_models: ClassVar[str]
    """What to say to a user whose model cannot be used for the task."""
    draws: ClassVar[bool] = False
    """Whether the model draws pictures."""
    can_pack: ClassVar[bool] = False
    """Whether several examples can share a row (`train.packing`)."""
    can_distill: ClassVar[bool] = False
    """Whether a teacher's answers can be learned (`train.distill`)."""
    default_targets: ClassVar[Literal["attention", "layers"] | tuple[str, ...]] = "attention"
    """What is adapted if the recipe does not say: the queries and values of attention, or every
    linear layer; where a model has none of either, what comes nearest. Or names, of which the
    model's own are taken."""
    baselines: ClassVar[frozenset[str]] = frozenset({"base"})
    """Which of `evaluate.baselines` have a meaning."""
    usual_training: ClassVar[UsualTraining] = UsualTraining()
    """What a draft of a recipe says of the training, where the rows and the model do not."""
    frozen_hint: ClassVar[str] = "remove it"
    """What to say to a user who names a module in a part of the model that is used as it is."""
    packing_hint: ClassVar[str] = "leave it out"
    length_keys: ClassVar[tuple[str, ...]] = ("max_length",)
    """The keys that limit an example's length, of those that the section has."""

    @property
    def couples_examples(self) -> bool:
        """Whether the loss compares the examples of a step with each other."""
        return False

    @property
    def answer_kind(self) -> AnswerKind:
        """What sort of answers the model gives, by which the report presents them."""
        return "other"

    @property
    def label_columns_by_key(self) -> dict[str, str]:
        """The columns of labels whose proportions a drawn split can keep, by their keys."""
        return {}

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The columns whose content must not be on both sides of a split, by their keys."""
        return {}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The columns that hold pictures or sound, and which of the two."""
        return {}

    @property
    def transcript_column(self) -> str | None:
        """The column that text files next to recordings fill, where the task reads recordings."""
        return None

    @property
    def local_folders(self) -> list[str]:
        """The keys whose values are folders, as seen from the recipe."""
        return []

    @property
    def models_by_key(self) -> dict[str, str]:
        """Other models that the task uses, by the keys that name them: folders, or Hub ids."""
        return {}

    @property
    def sample_prompts(self) -> list[str]:
        """What a model that draws is asked to draw while it is trained."""
        return []

    @property
    def boxes_column(self) -> str | None:
        """The column that annotation files fill, where the task reads boxes in pictures."""
        return None

    @property
    def local_files(self) -> list[str]:
        """The keys whose values are files, as seen from the recipe."""
        return []

    def own_code(self, base: str, options: str, parts: tuple[str, ...], drawing: Any) -> str:
        """Return Python that uses the model without this tool, where transformers has no class.

        Args:
            base: The base, as Python code.
            options: How it is loaded, as further arguments.
            parts: The parts that have an adapter, each in a folder of its name; none, if the model
                is whole.
            drawing: The recipe's `evaluate.drawing`.
        """
        return ""

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how the model is used without this tool, or None if that cannot be said.

        Args:
            labels: Names of the labels, in the order of the model's outputs.
            settings: The recipe's `evaluate.generation`.
        """
        return None
