"""Load the image processor of a base, which turns an image into a tensor, with Pillow.

transformers has two back ends that give different pixels, and prefers torchvision's if it is
installed. Here it is always Pillow's, so that results do not depend on installed packages.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.errors import LoraError
from lora_cli.models.find_base import source_of
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe
from lora_cli.unexpected_errors import own_words

# keys of a configuration that do not affect pixels
NO_PIXEL_KEYS = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
PROCESSOR_FILE = "preprocessor_config.json"


def load_image_processor(recipe: Recipe) -> Any:
    """Return the base's image processor, with the Pillow back end.

    Raises:
        LoraError: If the base has none, or none that works without torchvision.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto import image_processing_auto

    has_backend = hasattr(image_processing_auto, "_resolve_backend")
    options: dict[str, Any] = {"backend": "pil"} if has_backend else {"use_fast": False}
    with explained(recipe, "image processor"):
        processor = AutoImageProcessor.from_pretrained(**source_of(recipe), **options)
    if getattr(processor, "backend", "pil") != "pil" or getattr(processor, "is_fast", False):
        what = f"`{recipe.model.name}` has an image processor that needs torchvision"
        hint = "use a model whose image processor transformers has for Pillow too, such as ViT's"
        raise LoraError(what, recipe.at("model.name"), hint)
    return processor


def processor_hash(processor: Any) -> str:
    """Return a hash of all settings that affect pixels."""
    config = json.loads(json.dumps(processor.to_dict(), default=str))
    relevant = {k: v for k, v in config.items() if k not in NO_PIXEL_KEYS and v is not None}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]


def output_size(processor: Any, channels: int, recipe: Recipe) -> tuple[int, int]:
    """Return the height and width of a processor's outputs, which must be the same for all images.

    Args:
        processor: The processor.
        channels: The number of channels of the images.
        recipe: Names the model.

    Raises:
        LoraError: If the processor fails, or its output size depends on the image.
    """
    from PIL import Image

    sizes, at = set(), recipe.at("model.name")
    for size in ((64, 41), (41, 64)):
        image = Image.new("RGB" if channels == 3 else "L", size)
        try:
            sizes.add(tuple(pixels_of(processor, image).shape))
        except Exception as error:  # a wrong configuration may raise anything
            what = f"the image processor of `{recipe.model.name}` fails: {own_words(error)}"
            raise LoraError(what, at, f"correct {PROCESSOR_FILE} in the model's folder") from error
    if len(sizes) > 1:
        shown = " and ".join(f"{shape[-2]} x {shape[-1]}" for shape in sorted(sizes))
        raise LoraError(
            f"the image processor of `{recipe.model.name}` makes tensors of {shown} of pictures "
            "of other shapes, which cannot be one batch",
            at,
            f"set `size: {{height: …, width: …}}` or `do_center_crop: true` in {PROCESSOR_FILE}",
        )
    shape = sizes.pop()
    return int(shape[-2]), int(shape[-1])


def pixels_of(processor: Any, image: Any, **options: Any) -> np.ndarray[Any, Any]:
    """Return the pixel values of an image for the model (C, H, W), float32."""
    output = processor(image, return_tensors="np", **options)["pixel_values"]
    return np.ascontiguousarray(output[0], dtype=np.float32)


def save_processor(processor: Any, folder: Path) -> None:
    """Write `preprocessor_config.json` into a folder."""
    processor.save_pretrained(folder)
