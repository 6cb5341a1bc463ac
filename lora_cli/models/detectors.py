"""Read the configurations of YOLOS and DETR, which have different names for the same things."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.models.load_errors import require_kind
from lora_cli.recipe import Recipe

ARCHITECTURES = ("yolos", "detr")
NO_TIMM = (
    "use DETR with a backbone of transformers, which is in the revision `no_timm` of "
    "facebook/detr-resnet-50 and -101: `--set model.revision=no_timm`; or YOLOS"
)


def require_detector(auto_class: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Check that a model detects objects and can be trained.

    Raises:
        LoraError: If it has another architecture, or needs torchvision.
    """
    at = recipe.at("model.name")
    require_kind(auto_class, config, recipe)
    if config.model_type not in ARCHITECTURES:
        what = f"a {config.model_type} model cannot be used for `{recipe.task.type}`"
        raise LoraError(what, at, recipe.task.suitable_models)
    backbone = getattr(config, "backbone_config", None)
    is_timm = getattr(backbone, "model_type", None) == "timm_backbone"
    if is_timm or getattr(config, "use_timm_backbone", False):
        what = f"the backbone of `{recipe.model.name}` is one of timm, which needs torchvision"
        raise LoraError(what, at, NO_TIMM)
    if config.model_type == "yolos" and getattr(config, "auxiliary_loss", False):
        what = f"`{recipe.model.name}` has `auxiliary_loss: true`, which YOLOS cannot compute"
        raise LoraError(what, at, "set it to false in the model's config.json")


def max_objects(config: PretrainedConfig) -> int:
    """Return the maximum number of objects that a model can detect in an image."""
    is_yolos = config.model_type == "yolos"
    return int(config.num_detection_tokens if is_yolos else config.num_queries)


def reads_mask(config: PretrainedConfig) -> bool:
    """Return whether a model takes a mask of padded pixels as an input."""
    return bool(config.model_type == "detr")
