"""`task` for `type: object_detection`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.augmentation import BoxAugmentationSpec
from lora_cli.recipe.spec.section import Conflicts, Probability, Word
from lora_cli.recipe.spec.task_section import (
    AnswerKind,
    MediaKind,
    TaskSection,
    Usage,
    UsualTraining,
)

BoxFormat = Literal["xywh", "xyxy", "cxcywh", "relative_xywh", "relative_xyxy", "relative_cxcywh"]
DETECTING = """\
picture = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(picture, return_tensors="pt"))
sizes = [(picture.height, picture.width)]
found = processor.post_process_object_detection(outputs, {threshold}, target_sizes=sizes)[0]
for label, score, box in zip(found["labels"], found["scores"], found["boxes"]):
    print(model.config.id2label[label.item()], round(score.item(), 3), box.tolist())"""


class ObjectDetectionSpec(TaskSection):
    """Find objects in an image: a box and a label for each."""

    pipeline_tag = "object-detection"
    suitable_models = "use YOLOS, or DETR with a backbone from transformers, such as ResNet"
    default_targets = "attention"
    usual_training = UsualTraining(
        learning_rate=5e-4,
        all_linear=False,
        targets_note="of its attention layers",
        epochs=((500, 40), (5_000, 20), (50_000, 10), (float("inf"), 5)),
        step=8,
    )
    example_input = "picture.jpg"

    type: Literal["object_detection"]
    """The type of task."""

    image_column: Word = "image"
    """Column of the image: a path relative to the file that contains it (csv, JSON), or the encoded
    image itself (parquet, the Hub). COCO files, and folders of images with Pascal VOC or YOLO
    files, are read as such a column and `objects_column`."""

    objects_column: Word = "objects"
    """Column of the objects: `{bbox: [[x, y, width, height], …], category: [cat, …]}`, or a list of
    `{bbox, category}`. Objects with `iscrowd: 1` are regions with many objects: they are not
    trained, and detections in them count neither for nor against the model."""

    labels: Annotated[list[str | int], Field(min_length=1)] | None = None
    """Names of the labels, in order. Integers in the data are read as positions in this list,
    counted from 0. Default: the category names of the data set, or the labels found in the train
    split, sorted."""

    box_format: BoxFormat = "xywh"
    """How the boxes in `objects_column` are written: the upper left corner and the size (`xywh`),
    two corners (`xyxy`), or the centre and the size (`cxcywh`), in pixels; for `relative_…`, as
    shares of the image's width and height. COCO, Pascal VOC and YOLO files have their own formats,
    which are known."""

    clip_boxes: bool = False
    """Clip boxes at the edge of the image. By default, a box that exceeds it by more than a pixel
    is an error."""

    image_size: Annotated[int, Field(ge=32, le=4096)] | None = None
    """Images are resized to fit into a square with this side in pixels, and padded to it. Default:
    the size that the model's own image processor uses. If that depends on the shape of the image,
    images are padded to a square of the longest side, which is slow; name a size in this case."""

    threshold: Probability = 0.5
    """Smallest score of the objects that `lora predict` and the report show. Metrics use all
    objects."""

    augmentation: BoxAugmentationSpec = Field(default_factory=BoxAugmentationSpec)
    """How images are changed in training. Evaluation and prediction use them unchanged."""

    def conflicts(self) -> Conflicts:
        """Yield labels that are blank or appear twice."""
        for label, times in Counter(str(label).strip() for label in self.labels or ()).items():
            if not label:
                yield "labels", "a label of `labels` is blank", "give it a name"
            elif times > 1:
                what = f"the label `{label}` appears {times} times in `labels`"
                yield "labels", what, "list each label once, in the order of the model's outputs"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the image."""
        return {"task.image_column": self.image_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the image."""
        return {self.image_column: "image"}

    @property
    def boxes_column(self) -> str:
        """The column that annotation files fill."""
        return self.objects_column

    @property
    def answer_kind(self) -> AnswerKind:
        """Boxes."""
        return "boxes"

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how to find objects in an image with the model."""
        if not labels:
            return None
        return Usage(
            "AutoModelForObjectDetection",
            DETECTING.format(threshold=self.threshold),
            "import torch\nfrom PIL import Image, ImageOps\n",
            head=", num_labels=len(labels), id2label=dict(enumerate(labels))",
            processor=("processor", "AutoImageProcessor"),
        )
