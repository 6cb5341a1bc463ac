"""Base class of the tasks whose rows hold images: checks, loading and thumbnails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_error, media_name, media_value
from lora_cli.data.pictures import PictureError, open_picture, picture_facts, thumbnail_url
from lora_cli.errors import LoraError
from lora_cli.tasks.contract import Task
from lora_cli.tasks.pictures.odd_pictures import odd_pictures


class PictureTask(Task):
    """A task whose input is an image."""

    spec: Any
    channels: int
    unit = "picture"
    input_name = "picture"
    thumbnail_size = 96
    """The longer side of an image in the report, in pixels."""

    def read_channels(self) -> int:
        """Return the number of image channels that the model reads.

        Raises:
            LoraError: If it is neither 3 nor 1.
        """
        channels = int(getattr(self.config, "num_channels", None) or 3)
        if channels not in (1, 3):
            what = f"`{self.recipe.model.name}` reads pictures of {channels} channels"
            hint = "use a model that reads 3 (red, green and blue) or 1 (grey)"
            raise LoraError(what, self.recipe.at("model.name"), hint)
        return channels

    def input_error(self, row: dict[str, Any]) -> str:
        """Decode the image; return why it cannot be read, or an empty string."""
        column = self.spec.image_column
        if error := media_error(row, [column]):
            return error
        value = row[column]
        error = picture_facts(value).error
        return f"`{media_name(value)}` {error}" if error else ""

    def opened(self, value: dict[str, Any]) -> Any:
        """Load an image with the model's channels, as a Pillow image.

        Raises:
            LoraError: If the file has become unreadable since the rows were checked.
        """
        try:
            return open_picture(value, self.channels)
        except PictureError as error:  # the file was intact when the rows were checked
            what = f"`{media_name(value)}` {error}; it was whole when the run began"
            hint = "put the file back; a run that was interrupted goes on with `--resume`"
            raise LoraError(what, str(value["path"] or ""), hint) from error

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning about images that are animated or partly transparent."""
        return 0.0, odd_pictures(name, rows, examples)

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row that holds the image of a path."""
        return {self.spec.image_column: media_value(typed, Path.cwd())}

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a thumbnail of a row's image as a `data:` URL."""
        try:
            return thumbnail_url(row[self.spec.image_column], self.thumbnail_size)
        except PictureError:
            return None


def dtype_of_base(model: nn.Module) -> torch.dtype:
    """Return the dtype of the base's (frozen) weights, in which it expects pixel values."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in parameters if not p.requires_grad), parameters[0].dtype)
