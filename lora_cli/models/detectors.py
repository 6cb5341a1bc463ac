"""What the configurations of YOLOS and DETR say, which name the same things otherwise."""

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
    """Check that a model finds objects, and can be trained here.

    Raises:
        LoraError: If it is of another architecture, or needs a package that is not used.
    """
    at = recipe.at("model.name")
    require_kind(auto_class, config, recipe)
    if config.model_type not in ARCHITECTURES:
        what = f"a {config.model_type} model cannot be used for `{recipe.task.type}`"
        raise LoraError(what, at, recipe.task.suitable_models)
    backbone = getattr(config, "backbone_config", None)
    of_timm = getattr(backbone, "model_type", None) == "timm_backbone"
    if of_timm or getattr(config, "use_timm_backbone", False):
        what = f"the backbone of `{recipe.model.name}` is one of timm, which needs torchvision"
        raise LoraError(what, at, NO_TIMM)
    if config.model_type == "yolos" and getattr(config, "auxiliary_loss", False):
        what = f"`{recipe.model.name}` has `auxiliary_loss: true`, which YOLOS cannot compute"
        raise LoraError(what, at, "set it to false in the model's config.json")


def most_objects(config: PretrainedConfig) -> int:
    """Return how many objects a model can find in a picture."""
    is_yolos = config.model_type == "yolos"
    return int(config.num_detection_tokens if is_yolos else config.num_queries)


def reads_mask(config: PretrainedConfig) -> bool:
    """Return whether a model is given which pixels are filled up."""
    return bool(config.model_type == "detr")
