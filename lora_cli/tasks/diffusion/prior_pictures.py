"""The pictures of the class that a subject belongs to: where they are, and which go with which."""

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
from lora_cli.tasks.diffusion.drawing import Drawing


class PriorPictures:
    """The pictures of a folder, each of which is trained with a picture of the subject.

    Args:
        recipe: Says where the key stands.
        spec: The folder, and what its pictures show.
    """

    def __init__(self, recipe: Recipe, spec: PriorSpec) -> None:
        self.spec, self.at = spec, recipe.at("task.prior.path")
        self.folder = Path(spec.path)
        self.pictures: list[dict[str, Any]] = []

    def files(self) -> list[Path]:
        """Return the pictures that there are, by name."""
        if not self.folder.is_dir():
            return []
        found = (file for file in sorted(self.folder.iterdir()) if not file.name.startswith("."))
        return [f for f in found if f.is_file() and f.name.lower().endswith(SUFFIXES["image"])]

    @property
    def missing(self) -> int:
        """How many pictures the base has to draw."""
        return max(self.spec.count - len(self.files()), 0)

    def draw(self, drawing: Drawing, seed: int) -> None:
        """Draw the pictures that are missing, and keep them in the folder.

        Args:
            drawing: Draws them with the base.
            seed: With the number of a picture it decides the noise.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        count, taken = self.missing, {file.name for file in self.files()}
        sys.stderr.write(
            f"the base draws {counted(count, 'picture')} of `{self.spec.caption}` into "
            f"{self.folder}\n"
        )
        names = (name for i in itertools.count() if (name := f"drawn-{i:04d}.png") not in taken)
        for name in itertools.islice(names, count):
            number = int(name.removeprefix("drawn-").removesuffix(".png"))
            (picture,) = drawing.draw([self.spec.caption], (seed + number) % 2**32)
            part = self.folder / f".{name}.tmp"
            picture.save(part, "PNG")
            part.replace(self.folder / name)

    def read(self, error_of: Callable[[dict[str, Any]], str]) -> None:
        """Read the names of the pictures, and check each.

        Args:
            error_of: Says what is wrong with a picture, or nothing.

        Raises:
            LoraError: If one cannot be used, or there are none and none are to be drawn.
        """
        if not self.files() and not self.spec.count:
            what = f"there are no pictures in {self.folder}"
            hint = "put pictures of the class there, or let the base draw them: `prior.count: 100`"
            raise LoraError(what, self.at, hint)
        self.pictures = [{"bytes": None, "path": str(file)} for file in self.files()]
        errors = ((one, error) for one in self.pictures if (error := error_of(one)))
        problems = [
            Problem(error, one["path"], "remove it, or replace it") for one, error in errors
        ]
        if problems:
            raise LoraError(problems)

    def pictures_of(self, position: int, of: int) -> list[dict[str, Any]]:
        """Return the pictures that one of `of` pictures of the subject is trained with.

        An epoch has every picture of the class, and every one of the subject, at least once.
        """
        count = len(self.pictures)
        return [self.pictures[i % count] for i in range(position, max(count, of), of)]

    def cache_key(self) -> list[str]:
        """Return what the examples of rows depend on."""
        return [self.spec.caption, *map(media_hash, self.pictures)]
