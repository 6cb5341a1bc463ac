"""Proposes image classification for `lora init`, for rows of an image with a label."""

from __future__ import annotations

import re
from collections import Counter

from lora_cli.data.boxes import are_objects
from lora_cli.data.media import FILE_NAME
from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import DETECTORS, BaseFacts, Certainty, Proposal, Table, proposed

LABEL_NAME = re.compile(r"(?i)labels?|class(es)?|categor(y|ies)|target|species|breed|type")


def propose_pictures(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to classify the images of a table; see `Task.propose`."""
    rows = table.rows[:SAMPLE]
    if any(are_objects([row.get(column.name) for row in rows]) for column in table.columns):
        return None
    if table.media == "audio" or base.generates_images or not (table.media or base.reads_images):
        return None
    return proposed(lambda: _of_pictures(table, base), Certainty.ONLY)


def _of_pictures(table: Table, base: BaseFacts) -> Proposal:
    """Return the proposal for rows with an image and a label.

    Raises:
        LoraError: If no column contains images, or none is a label, or the model reads texts.
    """
    place, label, names = table.place, table.label, [column.name for column in table.columns]
    is_folder = table.media is not None
    if is_folder and len(names) < 2:
        what = f"the pictures of {place} have no labels: no folder in it names a class"
        hint = "move those of each class into a folder of its name, or list them in metadata.csv: "
        raise LoraError(what, place, f"{hint}file_name,label")
    if base.reads_images is False:
        what = f"`{base.name}` reads texts, and {place} holds pictures"
        raise LoraError(what, "--model", "use a model that reads pictures, such as ViT or ResNet")
    if base.model_type in DETECTORS:
        what = f"`{base.name}` finds objects, and {place} holds no boxes that are read"
        hint = "write the boxes as COCO, Pascal VOC or YOLO; for labels of whole pictures, use a "
        raise LoraError(what, "--model", hint + "classifier such as ViT or ResNet")
    image = next((name for name in names if is_folder or _holds_media(table, name)), None)
    listed = f"the columns are {', '.join(names)}"
    if image is None:
        what = "no column holds pictures, which the model reads"
        raise LoraError(
            what,
            place,
            f"{listed}; a picture is named by its path, with its ending: `images/a.png`",
        )
    found = [name for name in names if name != image and LABEL_NAME.fullmatch(name)]
    chosen = label or next(iter(found), None)
    if chosen is None:
        raise LoraError("no column is a label", place, f"name it: `--label COLUMN`; {listed}")
    counts = Counter(str(row.get(chosen)).strip() for row in table.rows)
    if len(counts) < 2:
        hint = "nothing can be learned from it; name another with `--label COLUMN`"
        raise LoraError(f"`{chosen}` has one value only", place, hint)
    keys = {"type": "image_classification", "label_column": chosen, "problem": "single_label"}
    why = {
        "label_column": "chosen by you" if label else f"by its name and its {len(counts):,} values"
    }
    if is_folder:
        why["label_column"] = "the names of the folders"
    if image != FILE_NAME:
        keys = {"type": keys.pop("type"), "image_column": image, **keys}
        why["image_column"] = "the picture itself" if is_folder else "paths of pictures"
    left_out = {name: "not needed" for name in names if name not in (image, chosen)}
    return Proposal(keys, why, [image], counts, left_out, labels_are_folders=is_folder)


def _holds_media(table: Table, name: str) -> bool:
    return are_media([row.get(name) for row in table.rows[:SAMPLE]])
