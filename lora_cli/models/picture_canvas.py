"""Pad images of any shape to tensors of one size, for object detection.

The processors of YOLOS and DETR keep the aspect ratio of an image, and pad a batch to its largest
image. YOLOS does not mask the padding, so its outputs for an image would depend on the other images
of the batch. Here all images are padded to one size, whichever batch they are in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.errors import LoraError
from lora_cli.models.image_processor import load_image_processor
from lora_cli.recipe import Recipe

MASK = "pixel_mask"
Canvas = dict[str, Any]


def load_canvas_processor(recipe: Recipe, image_size: int | None) -> Any:
    """Return the base's image processor, configured to pad all images to one size.

    Args:
        recipe: Names the base.
        image_size: The longer side in pixels; None uses the processor's setting.

    Raises:
        LoraError: If the base has no processor that can do this.
    """
    processor = load_image_processor(recipe)
    config = processor.to_dict()
    if not hasattr(processor, "post_process_object_detection") or "size" not in config:
        what = f"the image processor of `{recipe.model.name}` does not find objects"
        raise LoraError(what, recipe.at("model.name"), recipe.task.suitable_models)
    canvas = _canvas(dict(config["size"] or {}), config.get("pad_size"), image_size)
    if canvas is None:
        what = f"the image processor of `{recipe.model.name}` does not say how large pictures are"
        raise LoraError(what, recipe.at("model.name"), "set it: `--set task.image_size=640`")
    return type(processor).from_dict({**config, **canvas, "do_resize": True})


def _canvas(size: Canvas, pad_size: Canvas | None, image_size: int | None) -> Canvas | None:
    """Return settings with which a processor gives all images one size, or None."""
    size = {name: value for name, value in size.items() if value}
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        size = {"max_height": image_size, "max_width": image_size}
        return {"size": size, "pad_size": square, "do_pad": True}
    if size.keys() >= {"height", "width"}:
        return {"size": size}
    if pad_size and all(pad_size.get(side) for side in ("height", "width")):
        return {"size": size, "pad_size": dict(pad_size), "do_pad": True}
    if size.keys() >= {"max_height", "max_width"}:
        pad_size = {"height": size["max_height"], "width": size["max_width"]}
        return {"size": size, "pad_size": pad_size, "do_pad": True}
    if longest := size.get("longest_edge"):
        return {"size": size, "pad_size": {"height": longest, "width": longest}, "do_pad": True}
    return None


def on_canvas(processor: Any, image: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the pixel values (C, H, W) of an image, float32, and the mask of its area (H, W)."""
    output = processor(image, return_tensors="np")
    pixels = np.ascontiguousarray(output["pixel_values"][0], dtype=np.float32)
    mask = output.get(MASK)
    filled = np.ones(pixels.shape[-2:], dtype=np.int64) if mask is None else mask[0]
    return pixels, np.ascontiguousarray(filled, dtype=np.int64)
