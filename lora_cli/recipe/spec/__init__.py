"""The sections of a recipe, one module for each; the docstring of a field is below it.

The JSON schema, the reference in the docs and the hints in error messages come from these
docstrings. Units: a *step* is an optimizer step, a *micro-batch* is one forward pass.
"""

from lora_cli.recipe.spec.adapter import ADAPTER_TITLES, LOW_RANK_TYPES, AdapterSpec, AdapterType
from lora_cli.recipe.spec.causal_lm_spec import CausalLMSpec
from lora_cli.recipe.spec.checkpoint import CheckpointSpec
from lora_cli.recipe.spec.data import (
    CheckSpec,
    DataSpec,
    FormatSpec,
    HeldOutSpec,
    MixedSpec,
    SourceSpec,
    SplitSpec,
    is_file,
)
from lora_cli.recipe.spec.distill import DistillSpec
from lora_cli.recipe.spec.evaluate import DrawingSpec, EvaluateSpec, GenerationSpec
from lora_cli.recipe.spec.image_classification_spec import ImageClassificationSpec
from lora_cli.recipe.spec.model import ModelSpec
from lora_cli.recipe.spec.object_detection_spec import ObjectDetectionSpec
from lora_cli.recipe.spec.recipe import Origin, Recipe
from lora_cli.recipe.spec.seq2seq_lm_spec import Seq2SeqLMSpec
from lora_cli.recipe.spec.sequence_classification_spec import SequenceClassificationSpec
from lora_cli.recipe.spec.speech_recognition_spec import SpeechRecognitionSpec
from lora_cli.recipe.spec.task import TASKS, TaskSpec
from lora_cli.recipe.spec.text_embedding_spec import TextEmbeddingSpec
from lora_cli.recipe.spec.text_to_image_spec import FlowSpec, PriorSpec, TextToImageSpec
from lora_cli.recipe.spec.text_to_speech_spec import TextToSpeechSpec
from lora_cli.recipe.spec.token_classification_spec import TokenClassificationSpec
from lora_cli.recipe.spec.train import OptimizerSpec, ParameterGroupSpec, SchedulerSpec, TrainSpec

__all__ = [
    "ModelSpec",
    "CausalLMSpec",
    "ImageClassificationSpec",
    "ObjectDetectionSpec",
    "Seq2SeqLMSpec",
    "SequenceClassificationSpec",
    "SpeechRecognitionSpec",
    "TextEmbeddingSpec",
    "TextToImageSpec",
    "TextToSpeechSpec",
    "FlowSpec",
    "PriorSpec",
    "TokenClassificationSpec",
    "TaskSpec",
    "TASKS",
    "CheckSpec",
    "DataSpec",
    "FormatSpec",
    "HeldOutSpec",
    "MixedSpec",
    "SourceSpec",
    "SplitSpec",
    "is_file",
    "AdapterSpec",
    "AdapterType",
    "LOW_RANK_TYPES",
    "ADAPTER_TITLES",
    "OptimizerSpec",
    "ParameterGroupSpec",
    "SchedulerSpec",
    "TrainSpec",
    "DistillSpec",
    "EvaluateSpec",
    "GenerationSpec",
    "DrawingSpec",
    "CheckpointSpec",
    "Recipe",
    "Origin",
]
