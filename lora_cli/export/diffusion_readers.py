"""Programs that draw pictures: diffusers itself, and those that read files of kohya's scripts."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.peft_format.diffusion_file import read_diffusion_file, translated
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.adapters.peft_format.write_diffusion_file import (
    TRANSFORMER,
    TYPES,
    layers_of,
    obstacles,
    save_for_diffusers,
    save_for_kohya,
    updates_of,
)
from lora_cli.environment import installed_version
from lora_cli.errors import LoraError, Problem
from lora_cli.export.reader import MERGE, Source, require_close, require_same_outputs
from lora_cli.models.bundle import Bundle
from lora_cli.models.find_base import locate
from lora_cli.not_an_adapter import DIFFUSERS_FILE

KOHYA_FILE = "lora.safetensors"
# what diffusers raises over names and sizes that it takes apart in another way
TAKEN_APART = (ValueError, KeyError, IndexError, RuntimeError, AssertionError)
NO_DORA = "diffusers leaves out DoRA's lengths (`dora_scale`) when it reads such files"


class Diffusers:
    """diffusers: `pipeline.load_lora_weights(folder)`."""

    types: tuple[str, ...] = TYPES
    file, name = DIFFUSERS_FILE, "diffusers"

    def problems(self, source: Source) -> list[Problem]:
        """Reject what is no low-rank update of a part of a diffusion model."""
        found = obstacles(source.saved, self.types)
        what = f"{self.name} has no place for this adapter:"
        return [Problem(f"{what} {reason}", str(source.saved.path), MERGE) for reason in found]

    def changes(self, source: Source) -> list[str]:
        """Return that the scaling is folded."""
        config, updates = source.saved.config, updates_of(source.saved)
        ranks = sorted({update.rank for update in updates})
        how = "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank"
        lines = [f"the scaling, {how}, is multiplied into B, so that it is 1"]
        if len(ranks) > 1:
            shown = ", ".join(map(str, ranks))
            lines.append(f"the ranks differ ({shown}), and each module keeps its own")
        return lines

    def write(self, source: Source, folder: Path) -> None:
        """Write the file."""
        save_for_diffusers(source.saved, folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Load the file by diffusers into a pipeline with the base's parts; compare the outputs."""
        if (
            importlib.util.find_spec("diffusers") is None
            or importlib.util.find_spec("peft") is None
        ):
            return ["diffusers and peft are not both installed, so the file was not loaded there"]
        wanted = {f"{one.part}.{one.name}" for one in updates_of(source.saved)}
        with _pipeline(source) as pipeline:
            try:
                pipeline.load_lora_weights(str(folder), weight_name=self.file)
            except TAKEN_APART:
                pipeline.unload_lora_weights()
            adapted = {
                name for name, module in source.base.named_modules() if hasattr(module, "lora_A")
            }
            if lost := sorted(wanted - adapted):
                more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
                named = ", ".join(f"`{name}`" for name in lost[:3])
                what = f"diffusers does not read the adapters of {named}{more} in such a file"
                hint = "leave these modules out of `adapter.target_modules`, or merge the adapter"
                raise LoraError(what, str(source.saved.path), hint)
            with torch.no_grad():
                outputs: Tensor = source.task.probed(source.base, source.task.probe())
        difference = require_close(outputs, source.outputs, "diffusers")
        return [f"loaded by diffusers {installed_version('diffusers')}: outputs differ by "
                f"{difference:.1e}"]  # fmt: skip

    def usage(self, source: Source, to: Path) -> str:
        """Return how it is used in Python."""
        without = "".join(f", {part}=None" for part in source.task.unused_parts)
        return (
            "With `diffusers`:\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({source.base_name!r}{without})\n"
            f'pipeline.load_lora_weights(".", weight_name="{self.file}")\n'
            'pipeline("a red bicycle").images[0].save("picture.png")\n```'
        )


class Kohya(Diffusers):
    """The format of kohya's scripts, which web interfaces for drawing read."""

    types = ("lora",)
    file, name = KOHYA_FILE, "a file in kohya's format"

    def problems(self, source: Source) -> list[Problem]:
        """Reject DoRA too, and models whose modules have other names there."""
        at = str(source.saved.path)
        if source.saved.parts and source.saved.type == "dora":
            return [Problem(NO_DORA, at, f"use `--for diffusers`, or {MERGE}")]
        if found := super().problems(source):
            return found
        if (transformer := _transformer(source)) is None:
            return []
        named = {name for layer in layers_of(transformer).values() for name in layer.modules}
        without = [one.name for one in updates_of(source.saved)
                   if one.part == TRANSFORMER and one.name not in named]  # fmt: skip
        if without:
            what = f"{self.name} has no name for `{without[0]}` of this transformer"
            return [Problem(what, at, f"use `--for diffusers`, or {MERGE}")]
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Write the file."""
        assert isinstance(source.base, Bundle), "adapters of one model have been rejected"
        has_two = "text_encoder_2" in source.base.parts
        save_for_kohya(source.saved, folder / KOHYA_FILE, has_two, _transformer(source))

    def check(self, source: Source, folder: Path) -> list[str]:
        """Load the file by diffusers, or read it here where diffusers reads no such file."""
        transformer = _transformer(source)
        if transformer is None or hasattr(transformer, "single_transformer_blocks"):  # as Flux
            return super().check(source, folder)
        config, tensors, _ = translated(read_diffusion_file(folder / KOHYA_FILE), source.base)
        updates = {}
        for name, own in sort_tensors(tensors, "lora", ()).of_layers.items():
            a, b = own["lora_A"], own["lora_B"]
            updates[name] = alpha_of(config, name) / len(a) * b.flatten(1) @ a.flatten(1)
        difference = require_same_outputs(source, updates, "lora")
        return [
            "diffusers reads no files in kohya's format for this model, so it was read back by "
            f"this tool alone: outputs differ by {difference:.1e}"
        ]

    def usage(self, source: Source, to: Path) -> str:
        """Return where the file goes."""
        place = (
            f"Web interfaces for drawing read `{KOHYA_FILE}`: copy it into their folder of LoRAs."
        )
        return f"{place}\n\n{super().usage(source, to)}"


def _transformer(source: Source) -> nn.Module | None:
    """Return what draws, if it is a transformer."""
    return source.base.parts.get(TRANSFORMER) if isinstance(source.base, Bundle) else None


@contextmanager
def _pipeline(source: Source) -> Iterator[Any]:
    """Give diffusers' pipeline of the base with the parts that are here, without their adapters.

    What it loads into the parts is taken out at the end.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    before = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    assert isinstance(source.base, Bundle), "adapters of one model have been rejected"
    parts: dict[str, nn.Module] = source.base.parts
    place, pipeline = locate(source.base_name), None
    try:
        for name in before:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT and diffusers, of their own ways
            revision = source.task.recipe.model.revision
            options: dict[str, Any] = {"revision": revision, "safety_checker": None}
            options |= dict.fromkeys(source.task.unused_parts)
            load: Any = diffusers.DiffusionPipeline.from_pretrained
            pipeline = load(place, **options, **parts)
            yield pipeline
    finally:
        if pipeline is not None:
            pipeline.unload_lora_weights()
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
