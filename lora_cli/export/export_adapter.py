"""Export an adapter for another program, and verify it by reading it like that program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lora_cli.adapters.attach import remove_layers
from lora_cli.adapters.find_adapter import shown_name
from lora_cli.adapters.load_adapter import load_adapter, verify_base
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, weight_files
from lora_cli.adapters.tied_weights import tied_groups
from lora_cli.errors import LoraError
from lora_cli.evaluation.open_adapter import check_use
from lora_cli.export.adapter_task import adapter_task
from lora_cli.export.diffusion_readers import Diffusers, Kohya
from lora_cli.export.gguf_reader import LlamaCpp
from lora_cli.export.low_rank_pairs import is_plain_lora, parts_of
from lora_cli.export.mlx_reader import Mlx
from lora_cli.export.peft_readers import Peft, Plain, Vllm
from lora_cli.export.reader import Reader, Source
from lora_cli.export.reader_names import LIBRARIES, READERS
from lora_cli.export.target_folder import locked_target
from lora_cli.files import new_folder
from lora_cli.models.fingerprint import fingerprint_of
from lora_cli.reporting.model_card import write_derived_card
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task


def reader_named(name: str) -> Reader:
    """Return a reader by its name, one of `READERS`."""
    match name:
        case "vllm":
            return Vllm()
        case "gguf":
            return LlamaCpp()
        case "mlx":
            return Mlx()
        case "plain":
            return Plain()
        case "diffusers":
            return Diffusers()
        case "kohya":
            return Kohya()
    return Peft()


def export_adapter(
    adapter: Path,
    to: Path,
    name: str,
    base: str | None = None,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Export an adapter for a reader.

    Args:
        adapter: The adapter's folder.
        to: The folder to create; it must not exist, or be empty.
        name: The reader, one of `READERS`.
        base: Hub id or folder of the base model; None for the base that the adapter names.
        recipe_file: A recipe for an adapter that another tool made.
        overrides: `key=value` strings that override keys of the recipe.
        say: Called with a line about each change before anything is written.

    Returns:
        What was compared after writing, in words.

    Raises:
        LoraError: If the reader cannot read all of the adapter, with all reasons.
        IntegrityError: If the base is not the adapter's, or the written adapter's outputs differ.
    """
    with locked_target(to):
        task, saved = adapter_task(adapter, recipe_file, base, overrides)
        reader = reader_named(name)
        task = build_task(task.recipe.with_values({"model.quantization": None}), task.learned)
        task.trained_in = adapter
        task.load_processor()
        check_use(adapter, task)
        source = _source(task, saved)
        if problems := reader.problems(source):
            raise LoraError(problems)
        for line in reader.changes(source):
            say(line)
        with new_folder(to) as folder:
            reader.write(source, folder)
            compared = reader.check(source, folder)
            intro = f"Made from the adapter `{Path(shown_name(adapter)).name}` for {READERS[name]}."
            text = "\n\n".join(filter(None, [intro, reader.usage(source, to), *compared]))
            recipe = task.completed_recipe
            library = (
                "peft" if (folder / weight_files(folder)[0]).is_file() else LIBRARIES.get(name)
            )
            write_derived_card(folder, recipe, f"For {name}", text, True, library)
    return compared


def _source(task: Task, saved: AdapterFolder) -> Source:
    """Load the base, and compute the outputs of base + adapter on the task's probe.

    The base is loaded once and restored afterwards, since two copies would take twice the memory.
    """
    model, new = task.load_model(torch.device("cpu"), dtype=torch.float32)
    verify_base(saved, fingerprint_of(task.recipe, model, new), task.recipe)
    is_tied = bool(tied_groups(model))
    base_weights = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
    load_adapter(model, saved, new, drawn=task.drawn)
    with torch.no_grad():
        outputs = task.probed(model.eval(), task.probe())
    remove_layers(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = base_weights[name]
    parts = parts_of(saved) if is_plain_lora(saved) else None
    return Source(task, saved, parts, model, outputs, is_tied)
