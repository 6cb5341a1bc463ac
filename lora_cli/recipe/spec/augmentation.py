"""`task.augmentation`: how pictures are changed at random in training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Section


class AugmentationSpec(Section):
    """How a picture is changed in training, another way in every step."""

    crop: bool = False
    """Train on a random part of each picture, stretched to the size that the model reads."""

    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The smallest part that `crop` takes, as a share of the picture's area."""

    flip: bool = False
    """Mirror half of the pictures, left to right. Not for letters, digits and whatever else has a
    left and a right."""

    def conflicts(self) -> Conflicts:
        """Yield a size of crops without crops."""
        default = type(self).model_fields["smallest_crop"].default
        if self.smallest_crop != default and not self.crop:
            what = "`smallest_crop` has no meaning without `crop`"
            yield "smallest_crop", what, "add `crop: true`, or leave it out"


class BoxAugmentationSpec(AugmentationSpec):
    """How a picture and its boxes are changed in training, another way in every step."""

    crop: bool = False
    """Train on a random part of each picture. Boxes are cut at its edge; those whose centre lies
    outside are left out. A part holds at least one object, if the picture has any."""

    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The smallest part that `crop` takes, as a share of the picture's area."""
