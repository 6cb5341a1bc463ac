"""Detects objects in images with YOLOS or DETR: a box, a label and a score for each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PretrainedConfig

from lora_cli.data.boxes import BoxError, Objects, annotated_size, read_objects
from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_name
from lora_cli.data.pictures import picture_facts, require_pillow
from lora_cli.errors import Problem, counted
from lora_cli.metrics import MetricContext
from lora_cli.models.base_facts import config_facts
from lora_cli.models.base_model import load_config
from lora_cli.models.detectors import max_objects, reads_mask, require_detector
from lora_cli.models.image_processor import output_size, processor_hash, save_processor
from lora_cli.models.picture_canvas import load_canvas_processor, on_canvas
from lora_cli.recipe import ObjectDetectionSpec, Recipe
from lora_cli.tasks.classification.head_rows import arrange_rows, rows_of_heads
from lora_cli.tasks.detection.box_augmentation import AnnotatedImage, augment
from lora_cli.tasks.detection.detection_labels import DetectionLabels
from lora_cli.tasks.detection.detection_loss import (
    BOXES,
    CLASS,
    GIOU,
    Detections,
    MatchingCosts,
    corners,
    detection_losses,
)
from lora_cli.tasks.detection.detection_proposals import propose_objects
from lora_cli.tasks.detection.odd_boxes import IS_TURNED, may_be_turned, odd_boxes
from lora_cli.tasks.examples import Batch, Example, Field, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.pictures.odd_pictures import ODD_FEATURES, odd_facts
from lora_cli.tasks.pictures.picture_task import PictureTask, dtype_of_base

ENCODING = 2  # version of how rows are encoded; increase it to encode cached rows again
NO_OBJECT = "no object"  # the output after those of the labels
PADDING_BOX = [0.5, 0.5, 1.0, 1.0]  # pads the boxes of a batch; a box must not be empty
DIGITS = 2  # decimal digits of pixel coordinates in answers


class ObjectDetection(PictureTask):
    """`task.type: object_detection`."""

    propose = staticmethod(propose_objects)
    auto_class = AutoModelForObjectDetection
    has_head = True
    waits_for_device = True
    metric_channel = "boxes"
    default_metrics = ("coco",)
    thumbnail_size = 320

    def __init__(self, recipe: Recipe, spec: ObjectDetectionSpec) -> None:
        super().__init__(recipe)
        self.spec: ObjectDetectionSpec = spec
        self.reader = DetectionLabels(recipe, spec)
        self.processor: Any

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the image processor and the model's configuration."""
        require_pillow()
        self.read_config()
        self.channels = self.read_channels()
        self.processor = load_canvas_processor(self.recipe, self.spec.image_size)
        self.size = output_size(self.processor, self.channels, self.recipe)

    def read_config(self) -> None:
        """Read the model's configuration.

        Raises:
            LoraError: If the model's architecture is not supported.
        """
        super().read_config()
        require_detector(self.auto_class, self.config, self.recipe)

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write `preprocessor_config.json` into a folder."""
        save_processor(self.processor, folder)

    @property
    def base_facts(self) -> dict[str, Any]:
        """The keys of config.json that change the computation, and a hash of the processor."""
        return {"config": config_facts(self.config), "processor": processor_hash(self.processor)}

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
        left_out = {"augmentation", "threshold", "image_size", "labels"}
        return [
            f"boxes {ENCODING}", self.spec.model_dump_json(exclude=left_out),
            json.dumps([self.labels, self.reader.category_names]),
        ]  # fmt: skip

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the image and of the objects."""
        return [
            Field("task.image_column", self.spec.image_column, "input", "image"),
            Field("task.objects_column", self.spec.objects_column, "target", "boxes"),
        ]

    @property
    def knows_labels(self) -> bool:
        """Whether the labels are known."""
        return bool(self.labels)

    @property
    def labels(self) -> list[str]:
        """The names of the labels, in the order of the model's outputs."""
        return self.reader.names

    def labels_of(self, row: dict[str, Any]) -> list[str]:
        """Return the distinct labels of a row's objects."""
        return self.reader.names_in(row)

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how many rows have an object of each label."""
        counts = Counter(name for row in rows for name in self.reader.names_in(row))
        return {name: counts[name] for name in self.labels}

    def answer_of(self, row: dict[str, Any]) -> str:
        """Return the objects of a row as text, to compare rows with equal images."""
        facts = picture_facts(row[self.spec.image_column])
        objects = self._objects(row, (facts.width, facts.height))
        named = sorted(
            f"{self.reader.name_of(category)} at {', '.join(f'{n:.0f}' for n in box)}"
            for category, box in zip(objects.categories, objects.boxes.tolist(), strict=True)
        )
        return "; ".join(named) or "without objects"

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the labels."""
        self.reader.learn(splits)
        self.learned.task["labels"] = list(self.labels)

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return the problem of a streamed row with an unknown category, if it has one."""
        return self.reader.problem(row, place)

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the objects; empty if nothing is."""
        facts = picture_facts(row[self.spec.image_column])
        try:
            self._objects(row, (facts.width, facts.height))
        except BoxError as error:
            goes_on = str(error).startswith(("is ", "holds "))
            return f"column `{self.spec.objects_column}`{'' if goes_on else ':'} {error}"
        return ""

    def _objects(self, row: dict[str, Any], size: tuple[int, int]) -> Objects:
        spec = self.spec
        value = row.get(spec.objects_column)
        written = annotated_size(row, spec.objects_column)
        return read_objects(value, size, spec.box_format, spec.clip_boxes, written)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example for each row: its encoded image and its objects."""
        examples = []
        for row in rows:
            value = row[self.spec.image_column]
            facts = picture_facts(value)
            objects = self._objects(row, (facts.width, facts.height))
            classes = [self.reader.position(category) for category in objects.categories]
            assert None not in classes, "unknown categories are rejected before"
            examples.append([{
                "image": value, "width": facts.width, "height": facts.height,
                "boxes": objects.boxes.ravel().tolist(), "classes": classes,
                "crowd": objects.crowd.astype(int).tolist(),
                IS_TURNED: may_be_turned(facts, row, self.spec.objects_column), **odd_facts(facts),
            }])  # fmt: skip
        return examples

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        sizes = {"width": "int32", "height": "int32"}
        objects = {"boxes": "list<float64>", "classes": "list<int32>", "crowd": "list<int8>"}
        return {"image": "media", **sizes, **objects, IS_TURNED: "bool", **ODD_FEATURES}

    def cost(self, example: Example) -> int:
        """Return 1, since all images are resized to the same size."""
        return 1

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an example for people to read: its objects, and the size of its image."""
        (height, width), crowd = self.size, list(example["crowd"])
        boxes = np.array(example["boxes"]).reshape(-1, 4)
        objects = [
            f"{self.labels[label]} at {', '.join(f'{n:.0f}' for n in box)}"
            + " (crowd)" * int(is_crowd)
            for label, box, is_crowd in zip(example["classes"], boxes.tolist(), crowd, strict=True)
        ]
        text = f"{media_name(example['image'])}: {example['width']} x {example['height']} pixels, "
        text += f"read within {width} x {height}; {'; '.join(objects) or 'without objects'}"
        return [counted(len(objects), "object")], text

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning about unusual images, and about boxes that may be wrong."""
        share, warning = super().unknown_input(name, rows, examples)
        odd = odd_boxes(name, rows, examples, self.spec, self.n_queries)
        warning = "; ".join(part for part in (warning, odd) if part) or None
        return share, warning

    # ---------------------------------------------------------------------------- pixels

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with its image decoded; in training, image and boxes are augmented."""
        image = self.opened(example["image"])
        boxes = np.array(example["boxes"], dtype=np.float64).reshape(-1, 4)
        classes = np.array(example["classes"], dtype=np.int64)
        crowd = np.array(example["crowd"], dtype=bool)
        truth = np.column_stack([boxes, classes, crowd])
        trained = AnnotatedImage(image, boxes[~crowd], classes[~crowd])
        if training:
            trained = augment(trained, self.spec.augmentation, rng)
        pixels, mask = on_canvas(self.processor, trained.image)
        return {
            **example, "pixels": torch.from_numpy(pixels), "mask": torch.from_numpy(mask),
            "truth": torch.from_numpy(truth).float(), "trained": trained.relative_boxes(),
            "trained_classes": torch.from_numpy(trained.classes),
        }  # fmt: skip

    @property
    def augments(self) -> bool:
        """Whether images are augmented in training."""
        return self.spec.augmentation.crop or self.spec.augmentation.flip

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, whose items are objects and weights of queries."""
        counts = torch.tensor([len(example["trained"]) for example in examples])
        max_count, truths = max(1, int(counts.max())), [example["truth"] for example in examples]
        boxes = torch.tensor(PADDING_BOX).repeat(len(examples), max_count, 1)
        labels = torch.zeros(len(examples), max_count, dtype=torch.int64)
        truth = torch.full((len(examples), max(map(len, truths)), 6), -1.0)
        for i, example in enumerate(examples):
            boxes[i, : counts[i]] = example["trained"]
            labels[i, : counts[i]] = example["trained_classes"]
            truth[i, : len(truths[i])] = truths[i]
        inputs = {"pixel_values": torch.stack([example["pixels"] for example in examples])}
        if reads_mask(self.config):
            inputs["pixel_mask"] = torch.stack([example["mask"] for example in examples])
        sizes = torch.tensor([[example["width"], example["height"]] for example in examples])
        n_matched = counts.clamp(max=self.n_queries)
        weights = n_matched + self.matching_costs.no_object * (self.n_queries - n_matched)
        items = {CLASS: weights.float(), BOXES: counts.float(), GIOU: counts.float()}
        rows = [example["row"] for example in examples]
        targets = {"labels": labels, "boxes": boxes, "truth": truth, "sizes": sizes}
        return Batch(inputs, targets, items, len(examples), rows)

    # ----------------------------------------------------------------------------- model

    @property
    def n_queries(self) -> int:
        """The maximum number of objects that the model can detect in an image."""
        return max_objects(self.config)

    @property
    def matching_costs(self) -> MatchingCosts:
        """The costs of matching, and the weight of "no object", from the model's configuration."""
        config = self.config
        return MatchingCosts(
            float(config.class_cost), float(config.bbox_cost), float(config.giou_cost),
            float(config.eos_coefficient),
        )  # fmt: skip

    @property
    def loss_weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms of the loss, from the model's configuration."""
        config = getattr(self, "config", None)
        boxes = float(getattr(config, "bbox_loss_coefficient", 5))
        return {CLASS: 1.0, BOXES: boxes, GIOU: float(getattr(config, "giou_loss_coefficient", 2))}

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, with the names of the labels."""
        if not self.labels:  # `lora validate` needs the module names before labels are known
            config = load_config(self.recipe)
        else:
            config = load_config(
                self.recipe,
                num_labels=len(self.labels),
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
            )
        require_detector(self.auto_class, config, self.recipe)
        return config

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:
        """Arrange the rows of a pretrained classifier by the names of the labels."""
        config = (self.config, self.recipe, self.auto_class)
        if note := arrange_rows(model, missing, self.labels, *config, extra_outputs=(NO_OBJECT,)):
            self.notes.append(note)

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the labels for an adapter from another tool: the base's, if there are as many."""
        outputs = {name: t for name, t in tensors.items() if "class_labels_classifier" in name}
        heads = rows_of_heads(outputs, self.empty_model()[1])
        known: dict[int, str] = load_config(self.recipe).id2label
        names = [known[i] for i in sorted(known)]
        count = min(heads) - 1 if heads else len(names)
        if len(names) != count:
            names = [f"LABEL_{i}" for i in range(count)]
        self.learned.task["labels"] = names

    def probe(self) -> dict[str, Tensor]:
        """Return fixed random pixels."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn((2, self.channels, *self.size), generator=generator)
        mask = torch.ones((2, *self.size), dtype=torch.int64)
        mask[1, :, self.size[1] // 2 :] = 0
        return {"pixel_values": pixels} | ({"pixel_mask": mask} if reads_mask(self.config) else {})

    def tensor_of(self, output: Any) -> Tensor:
        """Return the logits of the labels and the boxes, concatenated (B, Q, C + 5)."""
        return torch.cat([output.logits, output.pred_boxes], -1)

    def forward(self, model: nn.Module, batch: Batch) -> Detections:
        """Return the detections of the last layer, or of all layers with auxiliary losses."""
        return self._detections(model, batch.inputs)

    def _detections(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Detections:
        model_inputs, pixels = dict(inputs), inputs["pixel_values"]
        if not torch.is_autocast_enabled(pixels.device.type):
            model_inputs["pixel_values"] = pixels.to(dtype_of_base(model))
        if not getattr(self.config, "auxiliary_loss", False):
            output = model(**model_inputs)
            return Detections(output.logits[None], output.pred_boxes[None])
        body: Any = model
        found = body.model(**model_inputs)
        # the last state is replaced by the model's output, which has passed a final norm
        states = torch.cat([found.intermediate_hidden_states[:-1], found.last_hidden_state[None]])
        boxes = body.bbox_predictor(states).sigmoid()
        return Detections(body.class_labels_classifier(states), boxes)

    # ------------------------------------------------------------- loss and predictions

    @property
    def loss_definition(self) -> str:
        """The definition of the loss, for the report."""
        weights = self.loss_weights
        return (
            f"DETR's: {weights[CLASS]:g} x cross-entropy per query in nats + {weights[BOXES]:g} x "
            f"distance of boxes (sum of four shares of the picture) + {weights[GIOU]:g} x "
            "(1 - generalized overlap), the latter two per object"
        )

    @property
    def metric_context(self) -> MetricContext:
        """The labels, which metrics need."""
        return MetricContext(len(self.labels) or None, labels=tuple(self.labels))

    def losses(self, model: nn.Module, output: Detections, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the loss of each image (B,): labels, boxes and their overlap."""
        counts = [int(count) for count in batch.items[BOXES].tolist()]
        labels, boxes = batch.targets["labels"], batch.targets["boxes"]
        return detection_losses(output, labels, boxes, counts, self.matching_costs)

    def predictions(self, model: nn.Module, output: Detections, batch: Batch) -> list[Prediction]:
        """Return the detected objects of each image, with its true objects as the reference."""
        sizes, found = batch.targets["sizes"], []
        boxes_of_pictures = self._boxes_in_pixels(output, sizes)
        truths = batch.targets["truth"].tolist()
        for row, size, boxes, truth in zip(
            batch.rows, sizes.tolist(), boxes_of_pictures, truths, strict=True
        ):
            true_boxes = [box for box in truth if box[4] >= 0]
            reference = [
                self._object(box[:4], int(box[4])) | ({"crowd": True} if box[5] else {})
                for box in true_boxes
            ]
            inputs: dict[str, tuple[Any, Any]] = {self.metric_channel: (boxes, true_boxes)}
            details = {"size": size}
            found.append(
                Prediction(row, self._named(boxes), reference, None, inputs, details=details)
            )
        return found

    def _boxes_in_pixels(self, output: Detections, sizes: Tensor) -> list[list[list[float]]]:
        """Return (x0, y0, x1, y1, score, label) for each query of each image, in pixels."""
        scores, labels = output.logits[-1].float().softmax(-1)[..., :-1].max(-1)
        boxes = corners(output.boxes[-1].float()) * sizes.repeat(1, 2).unsqueeze(1)
        together = torch.cat([boxes, scores.unsqueeze(-1), labels.unsqueeze(-1).float()], -1)
        found: list[list[list[float]]] = together.tolist()
        return found

    def _named(self, boxes: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Return the objects whose score reaches the threshold, by falling score."""
        kept = sorted((b for b in boxes if b[4] >= self.spec.threshold), key=lambda b: -b[4])
        return [self._object(b[:4], int(b[5])) | {"score": round(b[4], 6)} for b in kept]

    def _object(self, box: Sequence[float], label: int) -> dict[str, Any]:
        return {"label": self.labels[label], "box": [round(n, DIGITS) for n in box]}

    # --------------------------------------------------------------------------- answers

    def answer_columns(self) -> dict[str, str]:
        """Return the column `prediction`: a list of objects, as JSON in tables."""
        return {"prediction": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the detected objects of each image."""
        device = next(model.parameters()).device
        images = [self.opened(row[self.spec.image_column]) for row in rows]
        pixels, masks = zip(*(on_canvas(self.processor, image) for image in images), strict=True)
        inputs = {"pixel_values": torch.from_numpy(np.stack(pixels)).to(device)}
        if reads_mask(self.config):
            inputs["pixel_mask"] = torch.from_numpy(np.stack(masks)).to(device)
        output = self._detections(model, inputs)
        require_finite(output.logits[-1].float(), model, self.recipe)
        sizes = torch.tensor([image.size for image in images], device=device)
        return [[self._named(boxes)] for boxes in self._boxes_in_pixels(output, sizes)]

    def answer_line(self, values: Sequence[Any]) -> str:
        """Return the objects of an image as JSON."""
        return json.dumps(values[0], ensure_ascii=False)
