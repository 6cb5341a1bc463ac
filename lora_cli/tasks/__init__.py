"""Tasks: everything that differs between kinds of work. Each `task.type` has a file of that name.

Tasks need torch, so each is imported only when it is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from lora_cli.recipe import (
    TASKS,
    CausalLMSpec,
    ImageClassificationSpec,
    Learned,
    ObjectDetectionSpec,
    Recipe,
    Seq2SeqLMSpec,
    SequenceClassificationSpec,
    SpeechRecognitionSpec,
    TaskSpec,
    TextEmbeddingSpec,
    TextToImageSpec,
    TextToSpeechSpec,
    TokenClassificationSpec,
)

if TYPE_CHECKING:
    from lora_cli.tasks.contract import Task


def build_task(recipe: Recipe, learned: Learned | None = None) -> Task:
    """Return the task that the recipe names.

    Args:
        recipe: The recipe.
        learned: Where the task stores what it learns from its rows; None for a new object.
    """
    return _built(_type_of(recipe.task), recipe, learned)


def build_training_task(recipe: Recipe, learned: Learned | None = None) -> Task:
    """Return the task that the recipe names for training, with its teacher if it has one.

    Args:
        recipe: The recipe.
        learned: Where the task stores what it learns from its rows; None for a new object.

    Raises:
        LoraError: If the teacher does not exist, or was trained for something else.
    """
    if recipe.train.distill is None:
        return build_task(recipe, learned)
    from lora_cli.tasks.teachers.with_teacher import WITH_TEACHER

    return _built(WITH_TEACHER[_type_of(recipe.task)], recipe, learned)


def _built(kind: Any, recipe: Recipe, learned: Learned | None) -> Task:
    task: Task = kind.for_base(recipe)(recipe, recipe.task)
    if learned is not None:
        task.learned = learned
    return task


def task_types() -> list[type[Task]]:
    """Return all task types, in the order in which a recipe lists them."""
    specs: Any = TASKS.values()
    return [_type_of(spec.model_construct()) for spec in specs]


def _type_of(spec: TaskSpec) -> type[Task]:
    match spec:
        case SequenceClassificationSpec():
            from lora_cli.tasks.sequence_classification import SequenceClassification

            return SequenceClassification
        case TokenClassificationSpec():
            from lora_cli.tasks.token_classification import TokenClassification

            return TokenClassification
        case CausalLMSpec():
            from lora_cli.tasks.causal_lm import CausalLM

            return CausalLM
        case Seq2SeqLMSpec():
            from lora_cli.tasks.seq2seq_lm import Seq2SeqLM

            return Seq2SeqLM
        case ImageClassificationSpec():
            from lora_cli.tasks.image_classification import ImageClassification

            return ImageClassification
        case ObjectDetectionSpec():
            from lora_cli.tasks.object_detection import ObjectDetection

            return ObjectDetection
        case SpeechRecognitionSpec():
            from lora_cli.tasks.speech_recognition import SpeechRecognition

            return SpeechRecognition
        case TextEmbeddingSpec():
            from lora_cli.tasks.text_embedding import TextEmbedding

            return TextEmbedding
        case TextToImageSpec():
            from lora_cli.tasks.text_to_image import TextToImage

            return TextToImage
        case TextToSpeechSpec():
            from lora_cli.tasks.text_to_speech import TextToSpeech

            return TextToSpeech
        case _:
            assert_never(spec)


__all__ = ["build_task", "build_training_task", "task_types"]
