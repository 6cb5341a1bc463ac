"""Readers for image generation: diffusers, and programs that read kohya's format."""

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
# errors that diffusers raises for names and shapes that it does not expect
LOADING_ERRORS = (ValueError, KeyError, IndexError, RuntimeError, AssertionError)
NO_DORA = "diffusers leaves out DoRA's lengths (`dora_scale`) when it reads such files"


class Diffusers:
    """diffusers: `pipeline.load_lora_weights(folder)`."""

    types: tuple[str, ...] = TYPES
    file, name = DIFFUSERS_FILE, "diffusers"

    def problems(self, source: Source) -> list[Problem]:
        """Reject adapters other than low-rank updates of the parts of a diffusion model."""
        reasons = obstacles(source.saved, self.types)
        what = f"{self.name} has no place for this adapter:"
        return [Problem(f"{what} {reason}", str(source.saved.path), MERGE) for reason in reasons]

    def changes(self, source: Source) -> list[str]:
        """Return notes on the folded scaling and on different ranks."""
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
        """Load the file with diffusers into a pipeline of the base's parts; compare the outputs."""
        if (
            importlib.util.find_spec("diffusers") is None
            or importlib.util.find_spec("peft") is None
        ):
            return ["diffusers and peft are not both installed, so the file was not loaded there"]
        expected = {f"{update.part}.{update.name}" for update in updates_of(source.saved)}
        with _pipeline(source) as pipeline:
            try:
                pipeline.load_lora_weights(str(folder), weight_name=self.file)
            except LOADING_ERRORS:
                pipeline.unload_lora_weights()
            adapted = {
                name for name, module in source.base.named_modules() if hasattr(module, "lora_A")
            }
            if lost := sorted(expected - adapted):
                more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
                names = ", ".join(f"`{name}`" for name in lost[:3])
                what = f"diffusers does not read the adapters of {names}{more} in such a file"
                hint = "leave these modules out of `adapter.target_modules`, or merge the adapter"
                raise LoraError(what, str(source.saved.path), hint)
            with torch.no_grad():
                outputs: Tensor = source.task.probed(source.base, source.task.probe())
        difference = require_close(outputs, source.outputs, "diffusers")
        return [f"loaded by diffusers {installed_version('diffusers')}: outputs differ by "
                f"{difference:.1e}"]  # fmt: skip

    def usage(self, source: Source, to: Path) -> str:
        """Return how to use the file in Python."""
        without = "".join(f", {part}=None" for part in source.task.unused_parts)
        return (
            "With `diffusers`:\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({source.base_name!r}{without})\n"
            f'pipeline.load_lora_weights(".", weight_name="{self.file}")\n'
            'pipeline("a red bicycle").images[0].save("picture.png")\n```'
        )


class Kohya(Diffusers):
    """The format of kohya's scripts, which web interfaces for image generation read."""

    types = ("lora",)
    file, name = KOHYA_FILE, "a file in kohya's format"

    def problems(self, source: Source) -> list[Problem]:
        """Reject DoRA too, and modules for which the format has no name."""
        at = str(source.saved.path)
        if source.saved.parts and source.saved.type == "dora":
            return [Problem(NO_DORA, at, f"use `--for diffusers`, or {MERGE}")]
        if problems := super().problems(source):
            return problems
        if (transformer := _transformer(source)) is None:
            return []
        known = {name for layer in layers_of(transformer).values() for name in layer.modules}
        unnamed = [u.name for u in updates_of(source.saved)
                   if u.part == TRANSFORMER and u.name not in known]  # fmt: skip
        if unnamed:
            what = f"{self.name} has no name for `{unnamed[0]}` of this transformer"
            return [Problem(what, at, f"use `--for diffusers`, or {MERGE}")]
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Write the file."""
        assert isinstance(source.base, Bundle), "adapters of one model have been rejected"
        has_two = "text_encoder_2" in source.base.parts
        save_for_kohya(source.saved, folder / KOHYA_FILE, has_two, _transformer(source))

    def check(self, source: Source, folder: Path) -> list[str]:
        """Load the file with diffusers, or with this tool if diffusers does not support it."""
        transformer = _transformer(source)
        if transformer is None or hasattr(transformer, "single_transformer_blocks"):  # e.g. Flux
            return super().check(source, folder)
        config, tensors, _ = translated(read_diffusion_file(folder / KOHYA_FILE), source.base)
        updates = {}
        for name, pair in sort_tensors(tensors, "lora", ()).by_layer.items():
            a, b = pair["lora_A"], pair["lora_B"]
            updates[name] = alpha_of(config, name) / len(a) * b.flatten(1) @ a.flatten(1)
        difference = require_same_outputs(source, updates, "lora")
        return [
            "diffusers reads no files in kohya's format for this model, so it was read back by "
            f"this tool alone: outputs differ by {difference:.1e}"
        ]

    def usage(self, source: Source, to: Path) -> str:
        """Return where to copy the file, and how to use it."""
        place = (
            f"Web interfaces for drawing read `{KOHYA_FILE}`: copy it into their folder of LoRAs."
        )
        return f"{place}\n\n{super().usage(source, to)}"


def _transformer(source: Source) -> nn.Module | None:
    """Return the denoiser if it is a transformer."""
    return source.base.parts.get(TRANSFORMER) if isinstance(source.base, Bundle) else None


@contextmanager
def _pipeline(source: Source) -> Iterator[Any]:
    """Provide diffusers' pipeline with the base's parts, without their adapters.

    Adapters that the pipeline loads into the parts are removed at the end.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    log_levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    assert isinstance(source.base, Bundle), "adapters of one model have been rejected"
    parts: dict[str, nn.Module] = source.base.parts
    place, pipeline = locate(source.base_name), None
    try:
        for name in log_levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT and diffusers warn about their own behaviour
            revision = source.task.recipe.model.revision
            options: dict[str, Any] = {"revision": revision, "safety_checker": None}
            options |= dict.fromkeys(source.task.unused_parts)
            load: Any = diffusers.DiffusionPipeline.from_pretrained
            pipeline = load(place, **options, **parts)
            yield pipeline
    finally:
        if pipeline is not None:
            pipeline.unload_lora_weights()
        for name, level in log_levels.items():
            logging.getLogger(name).setLevel(level)
