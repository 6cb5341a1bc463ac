"""The state of a run, and checks that it is resumed under the same conditions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, TypeAdapter

from lora_cli.environment import installed_version
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.recipe import Learned, Recipe, flat

FIXED = ("model.", "task.", "adapter.", "train.optimizer.type")  # a change needs a new run
VERSIONS = ("torch", "transformers")
MACHINE = {  # facts that affect the last bits of results, and where they are set
    "device": "the machine",
    "teacher": "train.distill.teacher",
    "processes": "`accelerate launch --num_processes`",
    "threads": "the environment variable `OMP_NUM_THREADS`",
    **dict.fromkeys(VERSIONS, "the installed packages"),
}


@dataclass
class TrainState:
    """The state of a run, as a checkpoint stores it besides tensors."""

    step: int = 0
    seconds: float = 0.0
    """Time in training steps, without evaluations."""
    examples: int = 0
    tokens: int = 0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of validation and test before training."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Inputs with the model's answers before, during and after training."""
    best: dict[str, Any] | None = None
    """Metric, mode, value, step and epoch of the best evaluation."""
    published: str = ""
    """SHA-256 of the manifest of the adapter that was last written to the output folder."""
    without_improvement: int = 0
    """Evaluations since the last improvement, as defined by early stopping."""
    stopped_early: bool = False
    evaluation_due: bool = False
    """Whether the run was stopped before or during the evaluation of this step."""
    skipped_steps: int = 0
    """Steps without an update: bad steps, and steps whose gradients overflowed in fp16."""
    unlogged_steps: int = 0
    """Steps since the last line of the log."""
    unlogged_loss: float = 0.0
    """Sum of their losses."""
    unlogged_terms: dict[str, float] = field(default_factory=dict)
    """Sums of each term of the loss, if there are several, as with a teacher."""
    logs: dict[str, int] = field(default_factory=dict)
    """The size in bytes of each log file; later content is from steps that will be repeated."""
    scaler: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The state of the optimizer besides its tensors."""
    optimizer_tensors: dict[str, str] = field(default_factory=dict)
    """The dtype and shape of each of the optimizer's tensors."""
    sha256: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each safetensors file in the checkpoint."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Facts that affect the result besides the recipe and the data: the weights of a teacher, the
    device, processes, threads and versions."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Memory settings, which affect the last bits too; they may change when a run is resumed."""
    changes: list[str] = field(default_factory=list)
    """Allowed changes when the run was resumed."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split."""
    recipe: dict[str, Any] = field(default_factory=dict)


def read_state(file: Path) -> TrainState:
    """Read the state of a run from a checkpoint.

    Raises:
        ValueError: If a value is missing, unknown or has another type.
        OSError: If the file cannot be read.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    known = {state_field.name for state_field in fields(TrainState)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise ValueError("it is the state of another version")
    state = TypeAdapter(TrainState).validate_python(values)
    if min(state.step, state.examples, state.tokens, state.skipped_steps) < 0:
        raise ValueError("it counts less than nothing")
    return state


def machine_facts(accelerator: Accelerator) -> dict[str, Any]:
    """Return the facts of the machine that affect the last bits of results."""
    device = accelerator.device.type
    facts = {"device": device, "processes": accelerator.num_processes}
    facts |= {name: installed_version(name) for name in VERSIONS}
    # the number of threads changes the order of sums on a CPU, not on a GPU
    return facts | ({"threads": torch.get_num_threads()} if device == "cpu" else {})


def memory_facts(recipe: Recipe, learned: Learned) -> dict[str, Any]:
    """Return the memory settings of a run."""
    train = recipe.train
    return {
        "micro_batch_size": learned.micro_batch_of(train),
        "asked": train.micro_batch_size,
        "gradient_checkpointing": learned.checkpointing_of(train),
    }


def reject_changes(saved: TrainState, recipe: Recipe, now: TrainState | None = None) -> list[str]:
    """Reject resuming with another recipe or other data, or on another machine.

    The output folder and memory settings may change; with `checkpoint.allow_changes`, everything
    that does not change the model.

    Args:
        saved: The saved state of the run.
        recipe: The current recipe.
        now: A state with the current data and machine; None to compare only the recipe.

    Returns:
        A message for each allowed change.

    Raises:
        LoraError: With all changes that are not allowed.
    """
    problems = changed_keys(saved.recipe, recipe, now is not None)
    if now is not None:
        problems |= _changed_facts(saved, now)
    allowed = recipe.checkpoint.allow_changes
    fixed = [p for key, p in problems.items() if not allowed or key.startswith(FIXED)]
    if not fixed:
        memory_changes = {} if now is None else _changed(saved.memory, now.memory)
        return [problem.what for problem in problems.values()] + list(memory_changes.values())
    hint = "start a new run in another folder with `-o DIR`, or restore what it was started with"
    if not allowed and not any(key.startswith(FIXED) for key in problems):
        hint += "; `--set checkpoint.allow_changes=true` continues anyway"
    raise LoraError([*fixed[:-1], Problem(fixed[-1].what, fixed[-1].at, hint)])


def clear_changed_early_stop(
    state: TrainState, fresh: TrainState, say: Callable[[str], None]
) -> None:
    """Let a run that stopped early continue if the settings of early stopping have changed.

    Args:
        state: The state of the run, with the old recipe.
        fresh: The state of a new run, with the current recipe.
        say: Called with an explanation if the run does not continue.
    """
    if not state.stopped_early:
        return
    key = "early_stopping"
    if state.recipe["evaluate"].get(key) != fresh.recipe["evaluate"].get(key):
        state.stopped_early = False
    else:
        say(
            f"the run stopped early at step {state.step}, so it makes no more steps; "
            "`--set evaluate.early_stopping=null` lets it go on"
        )


def evaluation_changed(saved: TrainState, now: TrainState) -> bool:
    """Return whether validation now has other rows, or other generation settings.

    Args:
        saved: The state of the run, with the old recipe and data.
        now: The state of a new run, with the current recipe and data.
    """
    before, after = saved.recipe["evaluate"], now.recipe["evaluate"]
    other_answers = before.get("generation") != after.get("generation")
    return other_answers or saved.data.get("validation") != now.data.get("validation")


def reject_fewer_steps(state: TrainState, total_steps: int, recipe: Recipe) -> None:
    """Reject a recipe with fewer steps than the run has made.

    Raises:
        LoraError: If it has fewer steps.
    """
    if state.step > total_steps:
        key = "train.max_steps" if recipe.train.max_steps else "train.epochs"
        raise LoraError(
            f"the run has made {counted(state.step, 'step')}, and the recipe now asks "
            f"for {total_steps}",
            recipe.at(key),
            "ask for more, or start a new run in another folder with `-o DIR`",
        )


def changed_keys(before: dict[str, Any], recipe: Recipe, data_is_read: bool) -> dict[str, Problem]:
    """Return a problem for each recipe key whose value differs from that at the start of the run.

    Args:
        before: The `recipe_facts` at the start of the run.
        recipe: The current recipe.
        data_is_read: Whether the recipe was completed with values from the data; if not, such
            values are not compared.
    """
    facts = recipe_facts(recipe)
    if not data_is_read:
        _adopt_learned_values(facts["task"], before["task"], recipe.task)
    old_facts, now = flat(_with_new_defaults(before, recipe, facts)), flat(facts)
    return {
        key: Problem(
            f"the run was started with `{key}: {old_facts.get(key)}`, the recipe now says "
            f"`{now.get(key)}`",
            recipe.at(key),
        )
        for key in sorted(old_facts.keys() | now.keys())
        if old_facts.get(key) != now.get(key)
    }


def _with_new_defaults(saved: Any, now: Any, facts: Any) -> Any:
    """Return saved facts with the defaults of recipe keys that an earlier version did not have.

    Such keys are missing in the saved facts; if they have their default now, nothing has changed.

    Args:
        saved: The facts at the start of the run, or a part of them.
        now: The same part of the current recipe.
        facts: The same part of the current recipe's facts.
    """
    if isinstance(now, BaseModel) and isinstance(saved, dict) and isinstance(facts, dict):
        result = dict(saved)
        for name, key in type(now).model_fields.items():
            alias, value = key.alias or name, getattr(now, name)
            if alias not in facts:
                continue
            if alias in saved:
                result[alias] = _with_new_defaults(saved[alias], value, facts[alias])
            elif not key.is_required() and value == key.get_default(call_default_factory=True):
                result[alias] = facts[alias]
        return result
    if isinstance(now, dict) and isinstance(saved, dict) and isinstance(facts, dict):
        common_keys = saved.keys() & now.keys() & facts.keys()
        return saved | {k: _with_new_defaults(saved[k], now[k], facts[k]) for k in common_keys}
    lists = (saved, now, facts)
    if all(isinstance(part, list) for part in lists) and len(set(map(len, lists))) == 1:
        return [_with_new_defaults(*parts) for parts in zip(*lists, strict=True)]
    return saved


def _changed_facts(saved: TrainState, now: TrainState) -> dict[str, Problem]:
    """Return a problem for each split, and each fact of the machine, that has changed."""
    problems = {
        f"rows of {split}": Problem(
            f"the rows of {split} are not those the run was started with", f"data.{split}"
        )
        for split in sorted(saved.data.keys() | now.data.keys())
        if saved.data.get(split) != now.data.get(split)
    }
    changed = _changed(saved.machine, now.machine)
    return problems | {key: Problem(what, MACHINE[key]) for key, what in changed.items()}


def _changed(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {
        key: f"the run was started with `{key}: {saved.get(key)}`, and now it is `{value}`"
        for key, value in now.items()
        if key in saved and saved[key] != value
    }


def _adopt_learned_values(facts: dict[str, Any], saved: dict[str, Any], spec: BaseModel) -> None:
    """Copy values that a run may have learned from its data or base, for keys not in the recipe.

    Args:
        facts: The facts of the current task section, changed in place.
        saved: The facts of the task section at the start of the run.
        spec: The current task section.
    """
    for name, key in type(spec).model_fields.items():
        alias, open_values = key.alias or name, (None, key.get_default(call_default_factory=True))
        if alias in facts and alias in saved and getattr(spec, name) in open_values:
            facts[alias] = saved[alias]
    if facts.get("class_weights") == "balanced" and isinstance(saved.get("class_weights"), dict):
        facts["class_weights"] = saved["class_weights"]


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe that must not change when a run is resumed.

    Memory settings are excluded, as they affect only the last bits.
    """
    facts = recipe.model_dump(
        mode="json",
        by_alias=True,
        exclude={
            "output_dir": True,
            "model": {"allow_other_base"},
            "data": {"cache_limit"},
            "train": {
                *("workers", "trackers", "max_hours"),
                *("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
            },
            "evaluate": {"baselines"},
            "checkpoint": True,
        },
    )
    facts["train"]["examples_per_step"] = recipe.train.step_size
    return facts
