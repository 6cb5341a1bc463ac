"""The calls of tasks and adapters that the contract tests make: where these change, only this does.

opened = open_kind(TASKS["prompts"], folder)     a task, its model with an adapter, examples
sums(opened, opened.examples)                    loss, items and gradients of a batch
outcomes(opened, opened.examples)                each example's loss and scores
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from kinds import Json, Site, TaskKind
from torch import Tensor, nn

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import attach, disabled, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.peft_format.adapter_folder import read_adapter, save_adapter
from lora_cli.data.media import with_media
from lora_cli.data.text_lines import RawRow
from lora_cli.evaluation.predict import answer
from lora_cli.files import write_manifest
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Encoded
from lora_cli.training import train
from lora_cli.training.batches import prepared_for
from lora_cli.training.coupled_step import add_coupled_gradients
from lora_cli.training.engine import Engine

CPU = torch.device("cpu")
N_ROWS = 7  # to train; those after them are of validation
GENERATION = {"max_new_tokens": 3}
DRAWING = {"steps": 2}

# --------------------------------------------------------------------------------------- tasks


@dataclass
class Opened:
    """A task with its data read, and its model with an adapter at work."""

    kind: TaskKind
    recipe: Recipe
    task: Task
    model: nn.Module
    head: list[str]
    split: Encoded
    examples: list[Any]
    """What a batch is made of; packs, where the recipe packs."""
    single: list[Any]
    """The same without packs."""


def write_kind(
    kind: TaskKind, folder: Path, adapter: Json | None = None, model: Json | None = None
) -> Path:
    """Write the base, the rows and the recipe of a kind into a folder, and return the recipe."""
    base = kind.save_base(folder / "base")
    write_rows(folder / "train.jsonl", [kind.row(i) for i in range(N_ROWS)])
    write_rows(folder / "validation.jsonl", [kind.row(i) for i in range(N_ROWS, N_ROWS + 3)])
    values = {
        "model": {"name": str(base), **(model or {})},
        "task": kind.task,
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "adapter": {"rank": 2, "alpha": 4, "target_modules": "all-linear", **(adapter or {})},
        "train": {"max_steps": 2, "micro_batch_size": 2, "log_every_steps": 1, **kind.train},
        "evaluate": {
            "baseline": False,
            "every_steps": 2,
            "generation": GENERATION,
            "drawing": DRAWING,
        },
        "checkpoint": {"every_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(tiny.yaml_of(values), encoding="utf-8")
    return path


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def open_kind(kind: TaskKind, folder: Path, model: Json | None = None) -> Opened:
    """Return a kind ready for batches: its model in double precision, all that is trained drawn.

    Args:
        kind: The kind.
        folder: Gets its base, rows and recipe.
        model: More keys of the recipe's `model` section.
    """
    recipe = load_recipe(write_kind(kind, folder, model=model))
    task = build_task(recipe)
    task.load_processor()
    split = load_data(task)["train"]
    base, head = task.load_model(CPU)
    attach(base, recipe, head)
    stir(base)
    precise(base)
    task.fit_to_model(base)
    examples = task.packed(split) if recipe.train.packing else split.examples

    def prepared(some: Any) -> list[Any]:
        if kind.draws_in_training:
            return [prepared_for(task, some[i], 0, 1) for i in range(len(some))]
        return [prepared_for_evaluation(task, some[i]) for i in range(len(some))]

    return Opened(
        kind, recipe, task, base, head, split, prepared(examples), prepared(split.examples)
    )


def precise(model: nn.Module) -> nn.Module:
    """Let a model compute in double precision, unless it has codes, whose scales are float32."""
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        model.double()
    return model


def with_model(opened: Opened, model: nn.Module) -> Opened:
    """Return the same task with another model."""
    return replace(opened, model=model)


def sums(opened: Opened, *parts: Sequence[Any]) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss of a step of several batches, the items of all terms, and the gradients."""
    opened.model.zero_grad()
    batches = [opened.task.collate(examples) for examples in parts]
    engine = Engine(opened.model, opened.task, None, Accelerator())
    weights = {term: torch.tensor(weight) for term, weight in opened.task.loss_weights.items()}
    if opened.task.couples_examples:
        loss = add_coupled_gradients(engine, batches, weights)
    else:
        loss = torch.stack([engine.add_gradients(batch, weights) for batch in batches]).sum()
    parameters = trainable_parameters(opened.model)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    n_items = sum(float(items.sum()) for batch in batches for items in batch.items.values())
    return float(loss), n_items, gradients


@torch.no_grad()
def outcomes(opened: Opened, examples: Sequence[Any], size: int | None = None) -> Tensor:
    """Return what the task says of each example: loss, items, terms and scores.

    They are computed `size` at a time, or all together.
    """
    predictions = []
    for start in range(0, len(examples), size or len(examples)):
        batch = opened.task.collate(examples[start : start + (size or len(examples))])
        predictions += opened.task.predict(opened.model, batch)
    if opened.task.compares_rows:
        predictions = opened.task.compared(predictions, opened.split)
    weights = opened.task.loss_weights
    rows = []
    for p in predictions:
        loss = sum(weights[term] * total for term, (total, _) in p.losses.items())
        terms = [value for pair in p.losses.values() for value in pair]
        n_items = sum(count for _, count in p.losses.values())
        rows.append([loss, n_items, *terms, *(p.scores or {}).values()])
    return torch.tensor(rows, dtype=torch.float64)


def answers(opened: Opened, rows: Sequence[Json]) -> list[Json]:
    """Return what `lora predict` adds to rows."""
    accelerator = start_accelerator(opened.recipe)
    media = opened.recipe.task.media_columns
    rows = [with_media(RawRow(row, ""), Path(), media).columns or {} for row in rows]
    columns = opened.task.answer_columns()
    opened.task.answer_folder = Path(opened.recipe.model.name).with_name("drawn")
    values = answer(opened.model, opened.task, rows, accelerator)
    return [dict(zip(columns, row, strict=True)) for row in values]


def saved_and_loaded(opened: Opened, folder: Path) -> Opened:
    """Return the task with the base as it was, and the adapter read from where it was saved."""
    folder.mkdir()
    save_adapter(folder, copy.deepcopy(opened.model).float(), opened.recipe, opened.head)
    model, head = opened.task.load_model(CPU)
    load_adapter(model, read_adapter(folder), head)
    return with_model(opened, precise(model).eval())


def merged(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its adapter merged into the weights."""
    model = copy.deepcopy(model)
    merge(model)
    return model


def run(recipe: Path, output: Path, resume: bool = False) -> None:
    """Train as `lora train` does."""
    with contextlib.redirect_stderr(io.StringIO()):
        train(load_recipe(recipe, [f"output_dir={output}"]), resume)


def stopped_copy(whole: Path, copied: Path) -> None:
    """Copy the folder of a complete run as if the machine had gone down after the first step."""
    later = shutil.ignore_patterns("report.*", "README.md", "predictions", "step-000002")
    shutil.copytree(whole, copied, ignore=later)


def drafted(kind: TaskKind, folder: Path) -> Json:
    """Return the `task` section that `lora init` writes for rows of a kind, having checked it."""
    base = kind.save_base(folder / "base")
    write_rows(folder / "rows.jsonl", [kind.row(i) for i in range(40)])
    target = folder / "recipe.yaml"
    draft = draft_recipe(folder / "rows.jsonl", str(base), target)
    write_recipe(target, draft.text(), draft.extra_files)
    check_recipe(load_recipe(target))
    written = load_recipe(target).task
    return dict(
        written.model_dump(exclude_defaults=True, exclude={"max_length", *written.length_keys})
    )


# ------------------------------------------------------------------------------------ adapters


def recipe_of(site: Site, adapter: Json) -> Recipe:
    """Return a recipe with an adapter section for the modules of a site."""
    return Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "causal_lm"},
            "data": {"path": "rows.csv"},
            "adapter": {
                "target_modules": site.targets,
                "target_parameters": site.parameters,
                **adapter,
            },
        }
    )


def attached(site: Site, base: nn.Module, adapter: Json) -> nn.Module:
    """Return a copy of a base that is ready for training."""
    model = copy.deepcopy(base)
    attach(model, recipe_of(site, adapter), site.head)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained."""
    return trainable_parameters(model)


def stir(model: nn.Module) -> nn.Module:
    """Redraw everything that is trained, as if a training had been."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.25)
    return model.eval()


def loaded(site: Site, base: nn.Module, model: nn.Module, adapter: Json, folder: Path) -> nn.Module:
    """Return a copy of a base with a model's adapter, which is saved in a folder and read again."""
    save_adapter(folder, model, recipe_of(site, adapter), site.head)
    write_manifest(folder)
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(folder), site.head)
    return again.eval()


def outputs(model: nn.Module) -> Tensor:
    """Return what a model of a site makes of a fixed input."""
    generator = torch.Generator().manual_seed(5)
    if hasattr(model, "config"):
        result = model(input_ids=torch.randint(4, 200, (4, 9), generator=generator)).logits
    else:
        result = model(torch.randn(4, 3, 12, 12, generator=generator))
    assert isinstance(result, Tensor)
    return result


turned_off = disabled
