"""The state of a run, and what must not change before it is resumed."""

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
MACHINE = {  # what changes the last bits of results, and where it is set
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
    """Time in training steps, evaluations not counted."""
    examples: int = 0
    tokens: int = 0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of validation and test before training."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Inputs with the model's answers before, during and after training."""
    best: dict[str, Any] | None = None
    """Metric, mode, value, step and epoch of the best evaluation."""
    published: str = ""
    """SHA-256 of the manifest of the adapter that was put into the output folder last."""
    without_improvement: int = 0
    """Evaluations since the last that early stopping counts as an improvement."""
    stopped_early: bool = False
    evaluation_due: bool = False
    """Whether the run was stopped before or during the evaluation of this step."""
    skipped_steps: int = 0
    """Steps without an update: bad ones, or those whose gradients overflowed in fp16."""
    unlogged_steps: int = 0
    """Steps since the last line of the log."""
    unlogged_loss: float = 0.0
    """Sum of their losses."""
    unlogged_terms: dict[str, float] = field(default_factory=dict)
    """The same of each term of the loss, where a teacher adds one."""
    logs: dict[str, int] = field(default_factory=dict)
    """The size in bytes of each log file; what follows it is of steps that are made again."""
    scaler: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The state of the optimizer besides its tensors."""
    optimizer_tensors: dict[str, str] = field(default_factory=dict)
    """The dtype and shape of each of the optimizer's tensors."""
    sha256: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each file of tensors in the checkpoint."""
    machine: dict[str, Any] = field(default_factory=dict)
    """What decides the result besides the recipe and the data: the weights of a teacher, and of the
    machine the device, processes, threads and versions."""
    memory: dict[str, Any] = field(default_factory=dict)
    """How memory is saved, which changes the last bits too; `--resume` may change it."""
    changes: list[str] = field(default_factory=list)
    """What had changed when the run was resumed, and was allowed to."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split."""
    recipe: dict[str, Any] = field(default_factory=dict)


def read_state(file: Path) -> TrainState:
    """Read the state of a run from a checkpoint.

    Raises:
        ValueError: If a value is missing, unknown or of another type.
        OSError: If the file cannot be read.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    known = {of_state.name for of_state in fields(TrainState)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise ValueError("it is the state of another version")
    state = TypeAdapter(TrainState).validate_python(values)
    if min(state.step, state.examples, state.tokens, state.skipped_steps) < 0:
        raise ValueError("it counts less than nothing")
    return state


def machine_facts(accelerator: Accelerator) -> dict[str, Any]:
    """Return what of the machine changes the last bits of results."""
    device = accelerator.device.type
    facts = {"device": device, "processes": accelerator.num_processes}
    facts |= {name: installed_version(name) for name in VERSIONS}
    # the number of threads changes the order of sums on a CPU, not on a GPU
    return facts | ({"threads": torch.get_num_threads()} if device == "cpu" else {})


def memory_facts(recipe: Recipe, learned: Learned) -> dict[str, Any]:
    """Return how memory is saved."""
    train = recipe.train
    return {
        "micro_batch_size": learned.micro_batch_of(train),
        "asked": train.micro_batch_size,
        "gradient_checkpointing": learned.checkpointing_of(train),
    }


def reject_changes(saved: TrainState, recipe: Recipe, now: TrainState | None = None) -> list[str]:
    """Reject a resumption with another recipe, other data, or on another machine.

    Where the result lies may change, and how memory is saved; with `checkpoint.allow_changes`
    whatever does not change the model.

    Args:
        saved: The state of the run.
        recipe: The recipe now.
        now: What there is now of data and machine; None if that does not matter.

    Returns:
        What changed, and is allowed to.
    """
    problems = changed_keys(saved.recipe, recipe, now is not None)
    if now is not None:
        problems |= _changed_facts(saved, now)
    allowed = recipe.checkpoint.allow_changes
    fixed = [p for key, p in problems.items() if not allowed or key.startswith(FIXED)]
    if not fixed:
        cut = {} if now is None else _changed(saved.memory, now.memory)
        return [problem.what for problem in problems.values()] + list(cut.values())
    hint = "start a new run in another folder with `-o DIR`, or restore what it was started with"
    if not allowed and not any(key.startswith(FIXED) for key in problems):
        hint += "; `--set checkpoint.allow_changes=true` continues anyway"
    raise LoraError([*fixed[:-1], Problem(fixed[-1].what, fixed[-1].at, hint)])


def let_stopping_go_on(state: TrainState, fresh: TrainState, say: Callable[[str], None]) -> None:
    """Let a run that stopped early continue if the rule of early stopping has changed.

    Args:
        state: The state of the run, with the recipe of before.
        fresh: The state of a new run, with the recipe now.
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


def measured_otherwise(saved: TrainState, now: TrainState) -> bool:
    """Return whether validation is measured on other rows than before, or by other answers.

    Args:
        saved: The state of the run, with the recipe and the data of before.
        now: The state of a new run, with those of now.
    """
    before, after = saved.recipe["evaluate"], now.recipe["evaluate"]
    other_answers = before.get("generation") != after.get("generation")
    return other_answers or saved.data.get("validation") != now.data.get("validation")


def reject_fewer_steps(state: TrainState, total_steps: int, recipe: Recipe) -> None:
    """Reject a recipe with fewer steps than the run has made.

    Raises:
        LoraError: If there are fewer.
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
    """Return the keys that differ from those with which a run was started.

    Args:
        before: `recipe_facts` of then.
        recipe: The recipe now.
        data_is_read: Whether it is completed by what the data say; else that is not compared.
    """
    facts = recipe_facts(recipe)
    if not data_is_read:
        _adopt_findings(facts["task"], before["task"], recipe.task)
    then, now = flat(_with_new_defaults(before, recipe, facts)), flat(facts)
    return {
        key: Problem(
            f"the run was started with `{key}: {then.get(key)}`, the recipe now says "
            f"`{now.get(key)}`",
            recipe.at(key),
        )
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    }


def _with_new_defaults(saved: Any, now: Any, facts: Any) -> Any:
    """Return saved facts with the recipe keys that an earlier version did not know.

    Such a key was not in what that version saved. A default asks for nothing, so it is no change.

    Args:
        saved: What the run was started with.
        now: The recipe now, or a part of it.
        facts: The same part as facts.
    """
    if isinstance(now, BaseModel) and isinstance(saved, dict) and isinstance(facts, dict):
        result = dict(saved)
        for name, key in type(now).model_fields.items():
            shown, value = key.alias or name, getattr(now, name)
            if shown not in facts:
                continue
            if shown in saved:
                result[shown] = _with_new_defaults(saved[shown], value, facts[shown])
            elif not key.is_required() and value == key.get_default(call_default_factory=True):
                result[shown] = facts[shown]
        return result
    if isinstance(now, dict) and isinstance(saved, dict) and isinstance(facts, dict):
        known = saved.keys() & now.keys() & facts.keys()
        return saved | {k: _with_new_defaults(saved[k], now[k], facts[k]) for k in known}
    lists = (saved, now, facts)
    if all(isinstance(part, list) for part in lists) and len(set(map(len, lists))) == 1:
        return [_with_new_defaults(*parts) for parts in zip(*lists, strict=True)]
    return saved


def _changed_facts(then: TrainState, now: TrainState) -> dict[str, Problem]:
    """Return what of the data and of the machine is not as it was."""
    problems = {
        f"rows of {split}": Problem(
            f"the rows of {split} are not those the run was started with", f"data.{split}"
        )
        for split in sorted(then.data.keys() | now.data.keys())
        if then.data.get(split) != now.data.get(split)
    }
    changed = _changed(then.machine, now.machine)
    return problems | {key: Problem(what, MACHINE[key]) for key, what in changed.items()}


def _changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {
        key: f"the run was started with `{key}: {then.get(key)}`, and now it is `{value}`"
        for key, value in now.items()
        if key in then and then[key] != value
    }


def _adopt_findings(facts: dict[str, Any], saved: dict[str, Any], spec: BaseModel) -> None:
    """Take over what a run may have found in its data or its base: keys that the recipe leaves out.

    Args:
        facts: The task section now; it is changed in place.
        saved: The task section with which the run was started.
        spec: The task section of the recipe.
    """
    for name, key in type(spec).model_fields.items():
        shown, open_values = key.alias or name, (None, key.get_default(call_default_factory=True))
        if shown in facts and shown in saved and getattr(spec, name) in open_values:
            facts[shown] = saved[shown]
    if facts.get("class_weights") == "balanced" and isinstance(saved.get("class_weights"), dict):
        facts["class_weights"] = saved["class_weights"]


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe must not change when a run is resumed.

    How memory is saved is not among it: of that only the last bits depend.
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
