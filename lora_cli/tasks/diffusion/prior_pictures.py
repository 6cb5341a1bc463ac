"""Class images for prior preservation (DreamBooth, https://arxiv.org/abs/2208.12242)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli.data.media import media_hash
from lora_cli.data.media_folder import SUFFIXES
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import PriorSpec
from lora_cli.tasks.diffusion.drawing import ImageGenerator


class PriorPictures:
    """A folder of images of the subject's class, which are trained along with the subject's images.

    Args:
        recipe: The recipe, for the location of the key in messages.
        spec: The folder and the class images' caption.
    """

    def __init__(self, recipe: Recipe, spec: PriorSpec) -> None:
        self.spec, self.at = spec, recipe.at("task.prior.path")
        self.folder = Path(spec.path)
        self.pictures: list[dict[str, Any]] = []

    def files(self) -> list[Path]:
        """Return the image files in the folder, sorted by name."""
        if not self.folder.is_dir():
            return []
        files = (file for file in sorted(self.folder.iterdir()) if not file.name.startswith("."))
        return [f for f in files if f.is_file() and f.name.lower().endswith(SUFFIXES["image"])]

    @property
    def missing(self) -> int:
        """The number of images that the base still has to generate."""
        return max(self.spec.count - len(self.files()), 0)

    def generate_missing(self, generator: ImageGenerator, seed: int) -> None:
        """Generate the missing images, and save them in the folder.

        Args:
            generator: Generates images with the base.
            seed: Plus an image's number, the seed of its noise.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        count, existing = self.missing, {file.name for file in self.files()}
        sys.stderr.write(
            f"the base draws {counted(count, 'picture')} of `{self.spec.caption}` into "
            f"{self.folder}\n"
        )
        names = (name for i in itertools.count() if (name := f"drawn-{i:04d}.png") not in existing)
        for name in itertools.islice(names, count):
            number = int(name.removeprefix("drawn-").removesuffix(".png"))
            (picture,) = generator.generate([self.spec.caption], (seed + number) % 2**32)
            temporary = self.folder / f".{name}.tmp"
            picture.save(temporary, "PNG")
            temporary.replace(self.folder / name)

    def read(self, error_of: Callable[[dict[str, Any]], str]) -> None:
        """List the images and check each.

        Args:
            error_of: Returns what is wrong with an image, or an empty string.

        Raises:
            LoraError: If an image cannot be used, or if there are none and `count` is 0.
        """
        if not self.files() and not self.spec.count:
            what = f"there are no pictures in {self.folder}"
            hint = "put pictures of the class there, or let the base draw them: `prior.count: 100`"
            raise LoraError(what, self.at, hint)
        self.pictures = [{"bytes": None, "path": str(file)} for file in self.files()]
        errors = ((image, error) for image in self.pictures if (error := error_of(image)))
        problems = [
            Problem(error, image["path"], "remove it, or replace it") for image, error in errors
        ]
        if problems:
            raise LoraError(problems)

    def pictures_of(self, position: int, n_subject_images: int) -> list[dict[str, Any]]:
        """Return the class images that the subject image at a position is trained with.

        Every class image and every subject image is used at least once per epoch.
        """
        count = len(self.pictures)
        return [
            self.pictures[i % count]
            for i in range(position, max(count, n_subject_images), n_subject_images)
        ]

    def cache_key(self) -> list[str]:
        """Return what cached examples depend on: the caption and the images."""
        return [self.spec.caption, *map(media_hash, self.pictures)]
