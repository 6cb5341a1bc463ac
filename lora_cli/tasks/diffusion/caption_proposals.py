"""Proposal of a text-to-image task for `lora init`, from rows of images with captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed

CAPTION_NAME = re.compile(
    r"(?i)text|captions?|prompts?|descriptions?|title|tags|(additional_|image_)?(feature|caption)"
)
DEFAULT_COLUMNS = {"image_column": "image", "caption_column": "text"}


def propose_captions(table: Table, base: BaseFacts) -> Proposal | None:
    """Propose text-to-image training if the base is a diffusion model; see `Task.propose`."""
    if not base.generates_images:
        return None
    return proposed(lambda: _propose_task(table, base), Certainty.ONLY)


def _propose_task(table: Table, base: BaseFacts) -> Proposal:
    """Propose the task of rows that hold an image and its caption.

    Raises:
        LoraError: If no column holds images, or no column can be told to hold captions.
    """
    place, names = table.place, [column.name for column in table.columns]
    listed = f"the columns are {', '.join(names)}"
    image = next((n for n in names if are_media([row.get(n) for row in table.rows[:SAMPLE]])), None)
    if image is None or table.media == "audio":
        what = f"`{base.name}` learns to draw pictures, and no column of {place} holds any"
        raise LoraError(what, place, f"{listed}; a picture is named by its path")
    caption = table.text or _caption_column([name for name in names if name != image])
    if caption is None and table.media is not None:
        what = f"the pictures of {place} have no captions next to them"
        hint = "write what `a.png` shows into `a.txt`, or list all in metadata.csv: file_name,text"
        raise LoraError(what, place, f"{hint}; or write a recipe with one `task.caption` for all")
    if caption is None:
        what = "no column has the name of a caption column"
        raise LoraError(what, place, f"name it: `--text COLUMN`; {listed}")
    keys = {"type": "text_to_image", "image_column": image, "caption_column": caption}
    reasons = {
        "image_column": "the pictures" if table.media else "pictures, or paths of such",
        "caption_column": "chosen by you" if table.text else "by its name",
    }
    if table.media is not None:
        reasons["caption_column"] = "the text files next to them"
    for key, default in DEFAULT_COLUMNS.items():
        if keys[key] == default:
            del keys[key]
    if base.picture_side is not None:
        keys["resolution"] = base.picture_side  # type: ignore[assignment]
        reasons["resolution"] = "the size that the model was trained for"
    left_out = {name: "not needed" for name in names if name not in (image, caption)}
    return Proposal(keys, reasons, [image, caption], None, left_out, limits={})


def _caption_column(names: Sequence[str]) -> str | None:
    """Return the column with a caption's name, or else the only column."""
    named = [name for name in names if CAPTION_NAME.fullmatch(name)]
    if named:
        return named[0]
    return names[0] if len(names) == 1 and names[0] != "label" else None
