"""`task.augmentation`: how images are changed at random in training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Section


class AugmentationSpec(Section):
    """How an image is changed in training: at random, and differently in every step."""

    crop: bool = False
    """Train on a random part of each image, resized to the input size of the model."""

    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The smallest part that `crop` takes, as a share of the image's area."""

    flip: bool = False
    """Mirror half of the images, left to right. Not for letters, digits and other things for which
    left and right matter."""

    def conflicts(self) -> Conflicts:
        """Yield `smallest_crop` without `crop`."""
        default = type(self).model_fields["smallest_crop"].default
        if self.smallest_crop != default and not self.crop:
            what = "`smallest_crop` has no meaning without `crop`"
            yield "smallest_crop", what, "add `crop: true`, or leave it out"


class BoxAugmentationSpec(AugmentationSpec):
    """How an image and its boxes are changed in training: at random, differently in every step."""

    crop: bool = False
    """Train on a random part of each image. Boxes are clipped at its edge; those whose centre lies
    outside are left out. The part contains at least one object, if the image has any."""

    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The smallest part that `crop` takes, as a share of the image's area."""
