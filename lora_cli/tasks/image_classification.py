"""Classifies images: predicts one label, several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_name
from lora_cli.data.pictures import (
    picture_facts,
    require_pillow,
    resampling,
)
from lora_cli.errors import LoraError, warn
from lora_cli.models.base_facts import config_facts
from lora_cli.models.base_model import load_config
from lora_cli.models.image_processor import (
    load_image_processor,
    output_size,
    pixels_of,
    processor_hash,
    save_processor,
)
from lora_cli.models.load_errors import require_kind
from lora_cli.recipe import ImageClassificationSpec, Recipe
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.classification.labelled_picture_proposals import propose_pictures
from lora_cli.tasks.examples import MAIN, Batch, Example, Field
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.pictures.odd_pictures import ODD_FEATURES, odd_facts
from lora_cli.tasks.pictures.picture_task import PictureTask, dtype_of_base
from lora_cli.unexpected_errors import own_words

ENCODING = 2  # version of how rows are encoded; increase it to encode cached rows again
RATIO = 4 / 3  # the largest aspect ratio of a random crop; the smallest is its inverse
CROP_TRIALS = 10


class ImageClassification(PictureTask, Classification):
    """`task.type: image_classification`."""

    propose = staticmethod(propose_pictures)
    auto_class = AutoModelForImageClassification

    def __init__(self, recipe: Recipe, spec: ImageClassificationSpec) -> None:
        super().__init__(recipe, spec)
        self.spec = spec
        self.processor: Any

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the image processor and the model's configuration."""
        require_pillow()
        self.config = load_config(self.recipe)
        require_kind(self.auto_class, self.config, self.recipe)
        self.channels = self.read_channels()
        self.processor = load_image_processor(self.recipe)
        self.size = output_size(self.processor, self.channels, self.recipe)

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write `preprocessor_config.json` into a folder."""
        save_processor(self.processor, folder)

    @property
    def base_facts(self) -> dict[str, Any]:
        """The keys of config.json that change the computation, and a hash of the processor."""
        return {"config": config_facts(self.config), "processor": processor_hash(self.processor)}

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
        task = self.spec.model_dump_json(exclude={"augmentation"})
        return [f"pictures {ENCODING}", task]

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the image, and of the label or labels."""
        return [
            Field("task.image_column", self.spec.image_column, "input", "image"),
            *self.label_fields(),
        ]

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the labels and their weights; warn if numbered labels are sorted as text."""
        was_known = bool(self.labels)
        super().learn_from(splits)
        names = self.labels
        numbers = [int(name) for name in names if name.isdecimal()]
        if not was_known and len(numbers) == len(names) and numbers != sorted(numbers):
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            warn(
                f"the labels are numbers and stand in the order of text: {shown}; for another "
                "order, name them in `task.labels`"
            )

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example for each row: its encoded image and its target."""
        examples = []
        for row in rows:
            value = row[self.spec.image_column]
            facts = picture_facts(value)
            own = {"image": value, "labels": self.label_of(row)}
            examples.append([{**own, **odd_facts(facts)}])
        return examples

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        return {"image": "media", "labels": self.label_feature, **ODD_FEATURES}

    def cost(self, example: Example) -> int:
        """Return 1, since all images are resized to the same size."""
        return 1

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an example for people to read: its label, and the size of its image."""
        lines, _ = super().shown(example, colour)
        facts, (height, width) = picture_facts(example["image"]), self.size
        return lines, (
            f"{media_name(example['image'])}: {facts.width} x {facts.height} pixels, "
            f"read as {width} x {height}"
        )

    # ---------------------------------------------------------------------------- pixels

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with its image decoded and, in training, augmented."""
        return {**example, "pixels": self._pixels(example["image"], rng if training else None)}

    def _pixels(self, value: dict[str, Any], rng: np.random.Generator | None) -> Tensor:
        """Return the pixels (C, H, W) of an image, augmented if there is an `rng`."""
        image = self.opened(value)
        options: dict[str, Any] = {}
        augmentation = self.spec.augmentation
        if rng is not None and augmentation.crop:
            height, width = self.size
            filter_ = resampling(int(getattr(self.processor, "resample", None) or 2))
            whole: tuple[int, int] = image.size
            box = random_box(*whole, augmentation.smallest_crop, rng)
            image = image.resize((width, height), filter_, box=box)
            options = {"do_resize": False, "do_center_crop": False}
        if rng is not None and augmentation.flip and rng.random() < 0.5:
            from PIL import Image

            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(pixels_of(self.processor, image, **options))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, whose items are rows or their weights."""
        pixels = torch.stack([example["pixels"] for example in examples])
        labels, items = self.labels_and_items(examples)
        rows = [example["row"] for example in examples]
        inputs, targets = {"pixel_values": pixels}, {"labels": labels}
        return Batch(inputs, targets, {MAIN: items}, len(examples), rows)

    # ----------------------------------------------------------------------------- model

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the model without weights.

        Raises:
            LoraError: If it cannot read images of the processor's size.
        """
        model, new = super().empty_model()
        if hasattr(self, "size"):
            shape = (1, self.channels, *self.size)
            try:
                model.eval()(pixel_values=torch.zeros(shape, device="meta"))
            except ValueError as error:
                raise self._unreadable(error) from error
            except Exception:
                pass
        return model, new

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:
        """Try the model on two images.

        Raises:
            LoraError: If it cannot read images of the processor's size.
        """
        was_training = model.training
        parameter = next(model.parameters())
        try:
            with torch.no_grad():
                inputs = self.probe()["pixel_values"][:2].to(parameter.device)
                outputs = self.logits(model.eval(), inputs)
        except ValueError as error:
            raise self._unreadable(error) from error
        finally:
            model.train(was_training)
        assert outputs.shape[0] == 2

    def _unreadable(self, error: Exception) -> LoraError:
        height, width = self.size
        name = self.recipe.model.name
        what = f"`{name}` cannot read the pictures of {width} x {height} pixels that its own image "
        what += f"processor makes: {own_words(error)}"
        hint = "correct `size` and `crop_size` in preprocessor_config.json, or download it again"
        return LoraError(what, self.recipe.at("model.name"), hint)

    def probe(self) -> dict[str, Tensor]:
        """Return fixed random pixels."""
        generator = torch.Generator().manual_seed(0)
        shape = (4, self.channels, *self.size)
        return {"pixel_values": torch.randn(shape, generator=generator)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (B, C)."""
        return self.logits(model, batch.inputs["pixel_values"])

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return the model's logits (B, labels) for pixels (B, C, H, W) of any dtype."""
        if not torch.is_autocast_enabled(pixels.device.type):
            pixels = pixels.to(dtype_of_base(model))
        logits: Tensor = model(pixel_values=pixels).logits
        return logits

    # --------------------------------------------------------------------------- answers

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the prediction and the probabilities of each row."""
        device = next(model.parameters()).device
        pixels = [self._pixels(row[self.spec.image_column], None) for row in rows]
        logits = self.logits(model, torch.stack(pixels).to(device)).float()
        require_finite(logits, model, self.recipe)
        return self.answers_of(logits)


def random_box(
    width: int, height: int, smallest: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return a random crop of an image as (left, upper, right, lower), in pixels.

    Its share of the image's area is uniform between `smallest` and 1, and the logarithm of its
    aspect ratio is uniform between 3:4 and 4:3 (Szegedy et al. 2014,
    https://arxiv.org/abs/1409.4842). If an image is too narrow for this, the result is the largest
    crop in its centre.
    """
    for _ in range(CROP_TRIALS):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(-math.log(RATIO), math.log(RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, height * RATIO), min(height, width * RATIO)
    left, upper = (width - w) / 2, (height - h) / 2
    return left, upper, left + w, upper + h
