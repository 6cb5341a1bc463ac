"""Pictures of any shape in tensors of one size, for models that find objects.

A processor of YOLOS or DETR keeps a picture's shape, and fills a batch up to its largest picture.
What the model says of a picture would then depend on the others of its batch, as YOLOS sees the
filling. Here all pictures are filled up to one size, whichever batch they are in.
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
    """Return the base's processor of pictures, which fills all of them up to one size.

    Args:
        recipe: Names the base.
        image_size: Pixels of the longer side; None leaves it to the processor.

    Raises:
        LoraError: If the base has no processor that can do so.
    """
    processor = load_image_processor(recipe)
    given = processor.to_dict()
    if not hasattr(processor, "post_process_object_detection") or "size" not in given:
        what = f"the image processor of `{recipe.model.name}` does not find objects"
        raise LoraError(what, recipe.at("model.name"), recipe.task.suitable_models)
    canvas = _canvas(dict(given["size"] or {}), given.get("pad_size"), image_size)
    if canvas is None:
        what = f"the image processor of `{recipe.model.name}` does not say how large pictures are"
        raise LoraError(what, recipe.at("model.name"), "set it: `--set task.image_size=640`")
    return type(processor).from_dict({**given, **canvas, "do_resize": True})


def _canvas(size: Canvas, pad_size: Canvas | None, image_size: int | None) -> Canvas | None:
    """Return what of a processor's configuration gives all pictures one size."""
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
    """Return the pixels (C, H, W) of a picture, float32, and which of them it fills (H, W)."""
    made = processor(image, return_tensors="np")
    pixels = np.ascontiguousarray(made["pixel_values"][0], dtype=np.float32)
    mask = made.get(MASK)
    filled = np.ones(pixels.shape[-2:], dtype=np.int64) if mask is None else mask[0]
    return pixels, np.ascontiguousarray(filled, dtype=np.int64)
