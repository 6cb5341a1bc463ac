"""Rows that hold an image and its caption: checks, and their encoding into examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.file_formats import is_blank, text_error
from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_error, media_hash, media_name
from lora_cli.data.media_folder import text_file_of
from lora_cli.data.picture_sizes import (
    COARSE,
    LEAST_COARSE,
    nearest_size,
    sizes_for,
)
from lora_cli.data.pictures import PictureError, picture_facts, thumbnail_url
from lora_cli.errors import counted
from lora_cli.models.diffusion_base import DiffusionBase, processor_hash
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import TextToImageSpec
from lora_cli.tasks.contract import Task
from lora_cli.tasks.diffusion.diffusion_noise import DiffusionNoise
from lora_cli.tasks.diffusion.flow_noise import FlowNoise
from lora_cli.tasks.diffusion.prior_pictures import PriorPictures
from lora_cli.tasks.examples import Encoded, Example, Field
from lora_cli.tasks.pictures.odd_pictures import (
    ODD_FEATURES,
    odd_facts,
    odd_pictures,
    positions_where,
)

ENCODING = 1  # version of the encoding of rows; increasing it invalidates cached examples


class CaptionRows(Task):
    """The part of a text-to-image task that handles rows of images and captions."""

    unit = "picture"
    input_name = "text"
    answer_hint = "write what the picture should show"
    base: DiffusionBase
    noise: DiffusionNoise | FlowNoise
    tokenizers: list[Any]

    def __init__(self, recipe: Recipe, spec: TextToImageSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.prior = None if spec.prior is None else PriorPictures(recipe, spec.prior)
        self.n_cut_prompts = 0  # for generated images, since the last warning
        self.positions: dict[str, int] = {}  # train images by hash, with a prior

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the fields of the caption (the input) and of the image (the target)."""
        return [
            Field("task.caption_column", self.spec.caption_column, "input", "text"),
            Field("task.image_column", self.spec.image_column, "target", "image"),
        ]

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have; no caption column if all share one caption."""
        columns = super().needed_columns(training)
        if self.spec.caption is not None:
            del columns[self.recipe.at("task.caption_column")]
        return columns

    def compared_columns(self) -> list[str]:
        """Return the image column alone, as many images may share a caption."""
        return [self.spec.image_column]

    def caption_of(self, row: dict[str, Any]) -> str:
        """Return a row's caption on one line."""
        shared = self.spec.caption
        text = row[self.spec.caption_column] if shared is None else shared
        return " ".join(str(text).split())

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row, or an empty string."""
        if self.spec.caption is not None:
            return self.target_error(row)
        return self.target_error(row) or self._caption_error(row)

    def _caption_error(self, row: dict[str, Any]) -> str:
        value, picture = row.get(self.spec.caption_column), row[self.spec.image_column]
        if is_blank(value) and picture["path"]:
            name = Path(picture["path"])
            is_empty = value is not None and text_file_of(name) is not None
            wrong = "an empty caption" if is_empty else "no caption"
            return (
                f"`{name.name}` has {wrong}: write one into `{name.stem}.txt` next to it, or "
                "into a table, or set `task.caption` for all"
            )
        return self.input_error(row)

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a prompt or caption, or an empty string."""
        return text_error(row, [self.spec.caption_column])

    def target_error(self, row: dict[str, Any]) -> str:
        """Decode the image; return why it cannot be trained on, or an empty string."""
        column = self.spec.image_column
        return media_error(row, [column]) or self.picture_error(row[column])

    def picture_error(self, value: dict[str, Any]) -> str:
        """Return why an image cannot be read or is too small, or an empty string."""
        facts = picture_facts(value)
        if facts.error:
            return f"`{media_name(value)}` {facts.error}"
        width, height = self.size_of(facts.width, facts.height)
        if self.spec.upscale or (facts.width >= width and facts.height >= height):
            return ""
        return (
            f"`{media_name(value)}` has {facts.width} x {facts.height} pixels, and is seen as "
            f"{width} x {height}: lower `task.resolution`, or `task.upscale: true` enlarges it"
        )

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height to which an image of the given size is resized."""
        return nearest_size(width, height, self.sizes())

    def sizes(self) -> list[tuple[int, int]]:
        """Return the widths and heights to which images are resized."""
        spec = self.spec
        if not spec.aspect_ratios:
            return [(spec.resolution, spec.resolution)]
        step = COARSE if spec.resolution >= LEAST_COARSE else self.divisor
        return sizes_for(spec.resolution, step, spec.max_aspect_ratio)

    @property
    def divisor(self) -> int:
        """The number of which image sides must be multiples; 8 before the model is known."""
        return self.base.family.divisor if hasattr(self, "base") else 8

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Read the class images, and number the train images to pair them with class images."""
        if self.prior is not None and "train" in splits:
            self.prior.read(self.picture_error)
            hashes = [media_hash(row[self.spec.image_column]) for row in splits["train"]]
            self.positions = {key: i for i, key in enumerate(dict.fromkeys(hashes))}

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return a row's caption."""
        return self.caption_of(row)

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a thumbnail of a row's image as a `data:` URL."""
        try:
            return thumbnail_url(row[self.spec.image_column])
        except PictureError:
            return None

    # -------------------------------------------------------------------------- examples

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row itself."""
        keys = {
            "image_column", "caption_column", "caption", "validation_draws", "resolution",
            "aspect_ratios", "max_aspect_ratio",
        }  # fmt: skip
        settings = f"{self.spec.model_dump_json(include=keys)} {self.divisor}"
        prior = [] if self.prior is None else self.prior.cache_key()
        return [f"captioned pictures {ENCODING}", settings, processor_hash(self.tokenizers), *prior]

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return `validation_draws` examples for each row, which differ in their noise."""
        draws = range(self.spec.validation_draws)
        return [[{**self._example(row), "draw": i} for i in draws] for row in rows]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example for each row, or one for each class image that it is paired with."""
        if self.prior is None or not self.prior.pictures:
            return [[self._example(row)] for row in rows]
        examples = []
        for row in rows:
            example = self._example(row)
            position = self.positions[media_hash(row[self.spec.image_column])]
            class_images = self.prior.pictures_of(position, len(self.positions))
            examples.append(
                [{**example, "prior_image": class_image} for class_image in class_images]
            )
        return examples

    def _example(self, row: dict[str, Any]) -> Example:
        value, caption = row[self.spec.image_column], self.caption_of(row)
        facts = picture_facts(value)
        width, height = self.size_of(facts.width, facts.height)
        ids_per_encoder = self.ids_of(caption)
        fields = {"width": width, "height": height, "is_cut": self.is_cut(caption), "draw": 0}
        token_ids = {f"ids_{i}": ids for i, ids in enumerate(ids_per_encoder)}
        return {"image": value, "caption": caption, **token_ids, **fields, **odd_facts(facts)}

    def features(self) -> dict[str, str]:
        """Return the types of an example's fields."""
        ids = {f"ids_{i}": "list<int32>" for i in range(len(self.tokenizers))}
        sizes = dict.fromkeys(("width", "height", "draw"), "int32")
        return {
            "image": "media", "caption": "string", **ids, **sizes, "is_cut": "bool", **ODD_FEATURES,
        }  # fmt: skip

    def train_features(self) -> dict[str, str]:
        """Return the types of a training example's fields."""
        has_prior = self.prior is not None and self.prior.pictures
        return {**self.features(), **({"prior_image": "media"} if has_prior else {})}

    def ids_of(self, caption: str) -> list[list[int]]:
        """Return a caption's token ids for each text encoder, padded and truncated to its limit."""
        options = {"padding": "max_length", "truncation": True}
        return [
            list(tokenizer(caption, max_length=limit, **options)["input_ids"])
            for tokenizer, limit in zip(self.tokenizers, self.token_limits, strict=True)
        ]

    @property
    def token_limits(self) -> list[int]:
        """The maximum number of tokens that each text encoder reads."""
        pairs = zip(self.base.text_encoders, self.tokenizers, strict=True)
        return [self.base.family.token_limit(name, tokenizer) for name, tokenizer in pairs]

    def is_cut(self, caption: str) -> bool:
        """Return whether every text encoder truncates a caption."""
        return all(
            len(tokenizer(caption, verbose=False)["input_ids"]) > limit
            for tokenizer, limit in zip(self.tokenizers, self.token_limits, strict=True)
        )

    def cut_note_of(self, count: int, what: str) -> str:
        """Say that a number of texts are longer than any text encoder reads."""
        longest = max(self.token_limits)
        too_long = f"{'has' if count == 1 else 'have'} more than {longest} tokens"
        return f"{counted(count, what)} {too_long}, of which the model reads the first"

    def note_cut_prompts(self) -> None:
        """Add a note about prompts in the recipe that are longer than any text encoder reads."""
        numbered = enumerate(self.spec.validation_prompts or ())
        prompts = {f"task.validation_prompts.{i}": text for i, text in numbered}
        if self.spec.prior is not None:
            prompts["task.prior.caption"] = self.spec.prior.caption
        truncated = [key for key, text in prompts.items() if self.is_cut(text)]
        if truncated:
            self.notes.append(
                f"warning: {self.cut_note_of(len(truncated), 'text')}: {', '.join(truncated)}"
            )

    def take_warnings(self) -> list[str]:
        """Return the warnings about generated images since the last call."""
        lines = super().take_warnings()
        if self.n_cut_prompts:
            lines.append(self.cut_note_of(self.n_cut_prompts, "text"))
            self.n_cut_prompts = 0
        return lines

    def batch_groups(self, split: Encoded) -> NDArray[np.int64] | None:
        """Return the index of each example's image size; None if all sizes are equal."""
        if not self.spec.aspect_ratios:
            return None
        columns = (split.examples.data.column(name).to_numpy() for name in ("width", "height"))
        sizes = np.stack(list(columns), axis=1)
        return np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def cost(self, example: Example) -> int:
        """Return the number of images: 1, or 2 with a class image."""
        return 2 if "prior_image" in example else 1

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return a description of an example's images, and its caption."""
        facts = picture_facts(example["image"])
        size = f"seen as {example['width']} x {example['height']}"
        description = (
            f"{media_name(example['image'])}: {facts.width} x {facts.height} pixels, {size}"
        )
        if "prior_image" in example:
            assert self.prior is not None
            description += (
                f"; with {media_name(example['prior_image'])} ({self.prior.spec.caption})"
            )
        return [], f"{description}\n{example['caption']}"

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning about unusual images and captions that are too long."""
        warnings = [odd_pictures(name, rows, examples)]
        truncated = list(
            dict.fromkeys(int(examples[i]["row"]) for i in positions_where(examples, "is_cut"))
        )
        if truncated:
            what = self.cut_note_of(len(truncated), f"{name} caption")
            warnings.append(f"{what}: {rows.place(truncated[0])}")
        return 0.0, "; ".join(filter(None, warnings)) or None
