"""`task` for `type: image_classification`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.augmentation import AugmentationSpec
from lora_cli.recipe.spec.classification_section import ANSWERS, ClassificationSection, head_of
from lora_cli.recipe.spec.section import Word
from lora_cli.recipe.spec.task_section import MediaKind, Usage, UsualTraining

CLASSIFYING = """\
picture = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")
with torch.no_grad():
    scores = model(**processor(picture, return_tensors="pt")).logits[0]
print({answer})"""


class ImageClassificationSpec(ClassificationSection):
    """Classify images."""

    pipeline_tag = "image-classification"
    suitable_models = (
        "use a model for which transformers has an image classifier, such as ViT, Swin, ConvNeXt, "
        "ResNet or EfficientNet"
    )
    default_targets = "layers"
    usual_training = UsualTraining(
        learning_rate=1e-3,
        all_linear=False,
        targets_note="of its linear layers; without any, of its convolutions",
    )
    example_input = "picture.jpg"

    type: Literal["image_classification"]
    """The type of task."""

    image_column: Word = "image"
    """Column of the image: a path relative to the file that contains it (csv, JSON), or the encoded
    image itself (parquet, the Hub). In a folder of images (`data.path`), each file is a row, and
    the name of its folder is its `label`."""

    augmentation: AugmentationSpec = Field(default_factory=AugmentationSpec)
    """How images are changed in training. Evaluation and prediction use them unchanged."""

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the image."""
        return {"task.image_column": self.image_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the image."""
        return {self.image_column: "image"}

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how to classify an image with the model."""
        if self.problem != "regression" and not labels:
            return None
        return Usage(
            "AutoModelForImageClassification",
            CLASSIFYING.format(answer=ANSWERS[self.problem]),
            "import torch\nfrom PIL import Image, ImageOps\n",
            head=head_of(labels),
            processor=("processor", "AutoImageProcessor"),
        )
