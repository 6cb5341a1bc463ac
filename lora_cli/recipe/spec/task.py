"""`task`: what the model should learn to do; each type has its own module and class."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from lora_cli.recipe.spec.causal_lm_spec import CausalLMSpec
from lora_cli.recipe.spec.image_classification_spec import ImageClassificationSpec
from lora_cli.recipe.spec.object_detection_spec import ObjectDetectionSpec
from lora_cli.recipe.spec.seq2seq_lm_spec import Seq2SeqLMSpec
from lora_cli.recipe.spec.sequence_classification_spec import SequenceClassificationSpec
from lora_cli.recipe.spec.speech_recognition_spec import SpeechRecognitionSpec
from lora_cli.recipe.spec.task_section import TaskSection
from lora_cli.recipe.spec.text_embedding_spec import TextEmbeddingSpec
from lora_cli.recipe.spec.text_to_image_spec import TextToImageSpec
from lora_cli.recipe.spec.text_to_speech_spec import TextToSpeechSpec
from lora_cli.recipe.spec.token_classification_spec import TokenClassificationSpec

TaskSpec = Annotated[
    SequenceClassificationSpec
    | TokenClassificationSpec
    | CausalLMSpec
    | Seq2SeqLMSpec
    | ImageClassificationSpec
    | ObjectDetectionSpec
    | SpeechRecognitionSpec
    | TextEmbeddingSpec
    | TextToImageSpec
    | TextToSpeechSpec,
    Field(discriminator="type"),
]

UNION, _ = get_args(TaskSpec)
TASKS: dict[str, type[TaskSection]] = {
    get_args(spec.model_fields["type"].annotation)[0]: spec for spec in get_args(UNION)
}
"""The class of each type of task, by its name."""
