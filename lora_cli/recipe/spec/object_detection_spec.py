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
    """Find objects in a picture: a box and a label for each."""

    pipeline_tag = "object-detection"
    suitable_models = "take YOLOS, or DETR with a backbone of transformers, such as ResNet"
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
    """Which task."""

    image_column: Word = "image"
    """Column of the picture: a path relative to the file that names it (csv, JSON), or the encoded
    picture itself (parquet, the Hub). COCO files, and folders of pictures with Pascal VOC or YOLO
    files, are read as such a column and `objects_column`."""

    objects_column: Word = "objects"
    """Column of the objects: `{bbox: [[x, y, width, height], …], category: [cat, …]}`, or a list of
    `{bbox, category}`. Objects with `iscrowd: 1` are regions of many objects: they are not trained,
    and finding something there counts neither for nor against the model."""

    labels: Annotated[list[str | int], Field(min_length=1)] | None = None
    """Names of the labels, in order. Integers in the data are read as positions in this list.
    Default: the names that the data set gives its categories, else those found in the train split,
    sorted."""

    box_format: BoxFormat = "xywh"
    """How the boxes in `objects_column` are written: the upper left corner and the size (`xywh`),
    two corners (`xyxy`), or the centre and the size (`cxcywh`), in pixels; `relative_…` in shares
    of the picture's width and height. COCO, Pascal VOC and YOLO files have their own."""

    clip_boxes: bool = False
    """Cut boxes at the edge of the picture. Else a box that leaves it by more than a pixel is an
    error."""

    image_size: Annotated[int, Field(ge=32, le=4096)] | None = None
    """Pictures are made as large as fits into a square of so many pixels, and filled up to it.
    Default: as the model's own image processor has it; one that gives pictures of other shapes
    other sizes fills up to a square of its longest edge, which is slow: name a size then."""

    threshold: Probability = 0.5
    """What `lora predict` and the report show has at least this score. Metrics see all."""

    augmentation: BoxAugmentationSpec = Field(default_factory=BoxAugmentationSpec)
    """How pictures are changed in training. Evaluation and prediction read them as they are."""

    def conflicts(self) -> Conflicts:
        """Yield labels that are blank, or appear twice."""
        for label, times in Counter(str(label).strip() for label in self.labels or ()).items():
            if not label:
                yield "labels", "a label of `labels` is blank", "give it a name"
            elif times > 1:
                what = f"the label `{label}` appears {times} times in `labels`"
                yield "labels", what, "list each label once, in the order of the model's outputs"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the picture."""
        return {"task.image_column": self.image_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the picture."""
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
        """Return how objects are found in a picture."""
        if not labels:
            return None
        return Usage(
            "AutoModelForObjectDetection",
            DETECTING.format(threshold=self.threshold),
            "import torch\nfrom PIL import Image, ImageOps\n",
            head=", num_labels=len(labels), id2label=dict(enumerate(labels))",
            processor=("processor", "AutoImageProcessor"),
        )
