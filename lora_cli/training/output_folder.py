"""Manage the output folder of a run: open it before training, and complete it afterwards."""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli import __version__
from lora_cli.adapters.count_parameters import parameter_table
from lora_cli.adapters.peft_format.adapter_folder import differences_in_peft
from lora_cli.data.load_rows import SPLITS
from lora_cli.environment import installed_version
from lora_cli.errors import LoraError, Problem, ResourceError, warn
from lora_cli.files import is_leftover, write_atomically
from lora_cli.folder_lock import FolderLock
from lora_cli.recipe import RECIPE_FILE, Recipe, dump_recipe, load_adapter_recipe
from lora_cli.reporting import plot_learning_curve, write_model_card, write_page, write_report
from lora_cli.reporting.report import part
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.checkpoints import checkpoints, peek_state
from lora_cli.training.run_log import peak_memory_bytes, rate_key
from lora_cli.training.train_state import (
    VERSIONS,
    TrainState,
    changed_keys,
    recipe_facts,
    reject_changes,
)

REPORT = "report.json"
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "safetensors")


def finished_report(recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Return the report of the run to resume if it is complete, otherwise None.

    A run is not complete if the recipe has changed in an allowed way, such as to more steps or
    other metrics. Nothing is written.

    Raises:
        LoraError: If the folder is not empty and the run is not to be resumed, or if the folder
            contains no run, or a complete run of another recipe.
    """
    folder = recipe.output_path
    _reject_foreign(recipe, resume)
    if not (folder / REPORT).exists():
        return None
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    state = _state_of(folder)
    if not state.step:  # restored without its checkpoints, or they are damaged
        try:
            changes = [Problem(what, str(folder)) for what in reject_changes(state, recipe)]
        except LoraError as error:  # its hint is how to continue
            changes = error.problems
        if changes:
            why = "its checkpoints are damaged" if checkpoints(folder) else "it has no checkpoints"
            raise LoraError(
                [
                    *changes[:-1],
                    Problem(
                        f"the run is complete, and {why}, so it cannot go on: {changes[-1].what}",
                        changes[-1].at,
                        "start a new run in another folder with `-o DIR`; `adapter.from` takes "
                        "this one's adapter as its start",
                    ),
                ]
            )
    return None if reject_changes(state, recipe) else report


def _state_of(folder: Path) -> TrainState:
    """Return the state of a run; without checkpoints, a state with only the recipe."""
    return peek_state(folder) or TrainState(recipe=recipe_facts(load_adapter_recipe(folder)))


def reject_other_rows(recipe: Recipe, report: dict[str, Any], data: dict[str, Encoded]) -> None:
    """Reject the results of a complete run if its rows, or values learned from them, have changed.

    Args:
        recipe: The recipe, completed with values from the data.
        report: The report of the run.
        data: The current rows.

    Raises:
        LoraError: With the splits that differ.
    """
    hint = "start a new run in another folder with `-o DIR`, or restore the rows"
    saved = {split: part(report, "data", split).get("sha256") for split in report["data"]}
    now = {split: encoded.rows.content_sha256() for split, encoded in data.items()}
    problems = [
        Problem(
            f"the run is complete, and the rows of {split} are not those it was trained with",
            recipe.at(f"data.{split}"),
            hint,
        )
        for split in SPLITS
        if saved.get(split) != now.get(split)
    ]
    if not problems:
        changes = changed_keys(_state_of(recipe.output_path).recipe, recipe, data_is_read=True)
        problems = [problem for key, problem in changes.items() if key.startswith("task.")]
    if problems:
        raise LoraError(problems)


def warn_of_other_versions(report: dict[str, Any]) -> None:
    """Warn about packages whose versions have changed since a complete run."""
    saved = part(report, "versions")
    for name in VERSIONS:
        now = installed_version(name)
        if name in saved and saved[name] != now:
            warn(
                f"the run is complete; it was made with `{name}: {saved[name]}`, and now it is "
                f"`{now}`: these are the results of then"
            )


def _reject_foreign(recipe: Recipe, resume: bool) -> None:
    """Reject an output folder with content that this run must not overwrite."""
    folder, at = recipe.output_path, recipe.at("output_dir")
    if folder.exists() and not folder.is_dir():
        raise LoraError(f"{folder} is a file", at, "choose another with `-o DIR`")
    has_content = folder.exists() and any(not is_leftover(path) for path in folder.iterdir())
    if has_content and not resume:
        raise LoraError(
            f"the output folder {folder} is not empty",
            at,
            "continue its run with `--resume`, or choose another with `-o DIR`",
        )
    if has_content and not (folder / "recipe.yaml").exists():
        what = f"the output folder {folder} contains other things, and no run"
        raise LoraError(what, at, "choose another with `-o DIR`")


@contextmanager
def locked_output(recipe: Recipe, resume: bool) -> Iterator[None]:
    """Create the output folder, and lock it against other processes within the context.

    Raises:
        LoraError: If another process is writing to it, or has written to it in the meantime.
        ResourceError: If it cannot be written.
    """
    folder = recipe.output_path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, recipe.at("output_dir"))
    except OSError as error:
        raise _cannot_write(recipe, error) from error
    try:
        _reject_foreign(recipe, resume)
        yield
    finally:
        lock.release()


def write_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe into the output folder, which marks it as the folder of a run.

    An earlier report, after fewer steps, is removed, as it would mark the run as complete.
    """
    try:
        (recipe.output_path / REPORT).unlink(missing_ok=True)
        write_atomically(recipe.output_path / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise _cannot_write(recipe, error) from error


def require_output(recipe: Recipe) -> None:
    """Check that the output folder still exists.

    Otherwise it would be created again, without the log, the recipe and the checkpoints.

    Raises:
        FileNotFoundError: If it was removed, by another program or by hand.
    """
    file = recipe.output_path / RECIPE_FILE
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def _cannot_write(recipe: Recipe, error: OSError) -> LoraError:
    what = f"cannot write to {recipe.output_path}: {error.strerror}"
    hint = "choose another folder with `-o DIR`"
    return ResourceError(what, recipe.at("output_dir"), hint)


def start_report(
    recipe: Recipe,
    task: Task,
    data: dict[str, Encoded],
    hashes: dict[str, str],
    model: nn.Module,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the part of the report that is known before training."""
    rows = parameter_table(model)
    trainable = sum(row.count for row in rows if row.trainable)
    total = sum(row.count for row in rows)
    device = accelerator.device
    on_gpu = device.type == "cuda"
    return {
        "lora_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["lora", *sys.argv[1:]]),
        "task": recipe.task.type,
        "answers": recipe.task.answer_kind,
        "unit": task.unit,
        "metric_definitions": task.metric_definitions(),
        "base_model": recipe.model.name,
        "adapter": _adapter_facts(recipe),
        **({"teacher": facts} if (facts := task.teacher_facts) else {}),
        "parameters": {
            "total": total,
            "trainable": trainable,
            "trainable_percent": round(100 * trainable / total, 4),
        },
        "data": {name: _facts(task, split, hashes[name]) for name, split in data.items()},
        "training": {
            "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
            "processes": accelerator.num_processes,
            "precision": recipe.train.precision,
            "examples_per_step": recipe.train.step_size,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in LIBRARIES},
        },
    }


def _adapter_facts(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.adapter
    if not spec.low_rank:
        return {"type": spec.type}
    chosen = spec.model_dump(exclude_defaults=True, by_alias=True)
    return {"type": spec.type, "rank": spec.rank, "alpha": spec.alpha} | chosen


def _facts(task: Task, split: Encoded, sha256: str) -> dict[str, Any]:
    rows = split.rows
    facts: dict[str, Any] = {
        "rows": len(rows),
        "examples": len(split),
        "source": rows.source,
        "sha256": sha256,
        "skipped_rows": len(rows.skipped),
        "dropped_rows": rows.dropped,
        "rows_without_example": split.rows_without_example,
    }
    max_answers = task.metric_context.max_answers
    if rows.sets:
        parts = dict(zip(rows.sets, rows.parts, strict=True))
        facts["sets"] = {
            name: {"rows": len(part), "source": part.source} for name, part in parts.items()
        }
    if max_answers is not None:
        of_sets = list(facts.get("sets", {}).values())
        for name in of_sets:
            name["answered_rows"] = min(max_answers, name["rows"])
        answered = [name["answered_rows"] for name in of_sets] or [min(max_answers, len(rows))]
        facts["answered_rows"] = sum(answered)
    if task.max_length is not None:
        facts[f"max_{task.unit}s"] = int(split.lengths.max())
    if counts := task.label_counts(rows):
        facts["labels"] = counts
    return facts


def add_results(
    report: dict[str, Any],
    state: TrainState,
    after: dict[str, dict[str, float]],
    epochs: float,
    device: torch.device,
) -> None:
    """Add the results of training to the report.

    Args:
        report: The result of `start_report`.
        state: The state of the run at its end.
        after: The metrics of validation and test with the best adapter.
        epochs: The number of epochs.
        device: The device of the training.
    """
    seconds = max(state.seconds, 1e-9)
    report["metrics"] = {"before": state.before, "after": after}
    if state.samples:
        report["samples"] = state.samples
    if state.best is not None:
        report["best"] = state.best
    report["training"] |= {
        "steps": state.step,
        "epochs": epochs,
        "seconds": round(state.seconds, 2),
        "examples_per_s": round(state.examples / seconds, 2),
        rate_key(report["unit"]): round(state.tokens / seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(device),
        "stopped_early": state.stopped_early,
        "skipped_steps": state.skipped_steps,
        "changes": state.changes,
    }


def compare_with_peft(
    report: dict[str, Any],
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    say: Callable[[str], object],
) -> None:
    """Warn about differences between the adapter as PEFT would load it and as it was trained.

    Args:
        report: Gets the differences too.
        model: The model of the run.
        recipe: The recipe of the run.
        in_full: The names of the modules that are trained in full.
        say: Prints a line.
    """
    if not recipe.adapter.low_rank:
        return
    differences = differences_in_peft(model, recipe, in_full, recipe.output_path)
    for difference in differences:
        say(f"warning: {difference}")
    if differences:
        report["differences_in_peft"] = differences


def finish(recipe: Recipe, report: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Write the plot, the model card, the HTML page, and finally the report."""
    folder = recipe.output_path
    if accelerator.is_main_process:
        require_output(recipe)
        plot_learning_curve(folder, report)
        write_model_card(folder, recipe, report)
        write_page(folder, report)
        write_report(folder, report)
    accelerator.wait_for_everyone()
    return report
