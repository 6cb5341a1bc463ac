"""Tests of what may change before a run is resumed, and which learned values are adopted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lora_cli.environment import installed_version
from lora_cli.errors import LoraError
from lora_cli.recipe import Learned, Recipe
from lora_cli.training.train_state import (
    TrainState,
    changed_keys,
    clear_changed_early_stop,
    machine_facts,
    memory_facts,
    read_state,
    recipe_facts,
    reject_changes,
    reject_fewer_steps,
)

FOUND = {"bad": 0.5, "good": 2.0}
MACHINE = {"device": "cpu", "processes": 1, "threads": 2, "torch": "2", "transformers": "5"}


def recipe(task: dict[str, Any] | None = None, **values: Any) -> Recipe:
    """Return a classification recipe, with values of its task and others by `section__key`."""
    sections: dict[str, Any] = {
        "model": {"name": "base"},
        "task": {"type": "sequence_classification", **(task or {})},
        "data": {"train": "rows.csv"},
        "adapter": {"rank": 2, "target_modules": ["query"]},
    }
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            sections[section] = value
    return Recipe.model_validate(sections)


def saved(of: Recipe, **fields: Any) -> TrainState:
    """Return the state of a run of a recipe, as read from disk."""
    facts = json.loads(json.dumps(recipe_facts(of)))
    return TrainState(**{"recipe": facts, "data": {"train": "1"}, "machine": MACHINE, **fields})


def test_the_output_folder_is_not_part_of_the_facts() -> None:
    facts = recipe_facts(recipe())
    assert "output_dir" not in facts
    assert "checkpoint" not in facts
    assert recipe_facts(recipe(output_dir="elsewhere")) == facts


# ---------------------------------------------------------------------------------- what it found


def test_values_learned_from_the_data_are_no_change() -> None:
    ran = saved(recipe({"labels": ["bad", "good"], "class_weights": FOUND}))
    assert reject_changes(ran, recipe({"labels": None, "class_weights": "balanced"})) == []
    assert reject_changes(ran, recipe({"labels": ["bad", "good"], "class_weights": FOUND})) == []


@pytest.mark.parametrize(
    ("ran", "now", "key"),
    [
        ({"class_weights": FOUND}, {"class_weights": None}, "class_weights.bad"),
        ({"class_weights": FOUND}, {"class_weights": {"bad": 0.5}}, "class_weights.good"),
        ({"class_weights": None}, {"class_weights": "balanced"}, "class_weights"),
        ({"labels": ["a", "b"]}, {"labels": ["b", "a"]}, "labels"),
    ],
)
def test_a_recipe_that_contradicts_learned_values_is_a_change(
    ran: dict[str, Any], now: dict[str, Any], key: str
) -> None:
    before = saved(recipe(ran)).recipe
    assert any(f.startswith(f"task.{key}") for f in changed_keys(before, recipe(now), True))
    early = changed_keys(before, recipe(now), data_is_read=False)
    assert bool(early) == (
        None not in now.values()
    )  # values that the recipe does not set are not known yet


def test_nothing_is_adopted_once_the_data_is_read() -> None:
    ran = saved(recipe({"labels": ["bad", "good"]}))
    with pytest.raises(LoraError, match=r"`task\.labels: \['bad', 'good'\]`, .* says `None`"):
        reject_changes(ran, recipe({"labels": None}), saved(recipe()))


@pytest.mark.parametrize("now", [None, ["f1"], ["f1", "accuracy"], ["accuracy", "f1", "mcc"]])
def test_another_list_or_a_missing_one_is_a_change(now: list[str] | None) -> None:
    ran = saved(recipe(evaluate__metrics=["accuracy", "f1"]))
    assert reject_changes(ran, recipe(evaluate__metrics=["accuracy", "f1"])) == []
    with pytest.raises(LoraError, match=r"`evaluate\.metrics"):
        reject_changes(ran, recipe(evaluate__metrics=now))


@pytest.mark.parametrize(
    ("ran", "now"),
    [({"a": 2}, {"a": 2, "b": 3}), ({"a": 2, "b": 3}, {"a": 2}), ({"a": 2}, {"a": 4})],
)
def test_added_or_removed_patterns_are_changes(ran: dict[str, int], now: dict[str, int]) -> None:
    assert reject_changes(saved(recipe(adapter__rank_pattern=ran)),
                          recipe(adapter__rank_pattern=ran)) == []  # fmt: skip
    with pytest.raises(LoraError) as caught:
        reject_changes(saved(recipe(adapter__rank_pattern=ran)), recipe(adapter__rank_pattern=now))
    key = "b" if len(ran) + len(now) == 3 else "a"
    (problem,) = caught.value.problems
    said = f"`adapter.rank_pattern.{key}: {ran.get(key)}`, the recipe now says `{now.get(key)}`"
    assert said in problem.what


# ------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    "values",
    [
        {"output_dir": "elsewhere"},
        {"checkpoint__keep": 7},
        {"train__workers": 3},
        {"train__max_hours": 2.0},
        {"train__gradient_checkpointing": True},
        {"evaluate__baselines": []},
        {"model__allow_other_base": True},
    ],
)
def test_the_output_folder_and_memory_settings_may_change(values: dict[str, Any]) -> None:
    assert reject_changes(saved(recipe()), recipe(**values), saved(recipe(**values))) == []


def test_micro_batches_may_change_but_not_the_examples_of_a_step() -> None:
    sizes = {"train__micro_batch_size": 8, "train__gradient_accumulation_steps": 2}
    other = {"train__micro_batch_size": 4, "train__gradient_accumulation_steps": 4}
    more = {"train__micro_batch_size": 8, "train__gradient_accumulation_steps": 4}
    ran = saved(recipe(**sizes))
    assert recipe_facts(recipe(**sizes))["train"]["examples_per_step"] == 16
    assert reject_changes(ran, recipe(**other)) == []
    with pytest.raises(LoraError, match=r"`train\.examples_per_step: 16`, .* says `32`"):
        reject_changes(ran, recipe(**more))


def test_changed_memory_settings_are_reported_if_known() -> None:
    ran = saved(recipe(), memory={"micro_batch_size": 8})
    now = saved(recipe(), memory={"micro_batch_size": 4, "gradient_checkpointing": True})
    said = "the run was started with `micro_batch_size: 8`, and now it is `4`"
    assert reject_changes(ran, recipe(), now) == [said]
    assert reject_changes(ran, recipe()) == []


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a key": ({"train__seed": 9}, {}, "`train.seed: 0`, the recipe now says `9`"),
    "rows": ({}, {"data": {"train": "2"}}, "the rows of train are not those"),
    "a split more": ({}, {"data": {"train": "1", "test": "3"}}, "the rows of test are not"),
    "the device": ({}, {"machine": MACHINE | {"device": "cuda"}}, "`device: cpu`, and now it is"),
    "a version": ({}, {"machine": MACHINE | {"torch": "3"}}, "`torch: 2`, and now it is `3`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_rejected_unless_changes_are_allowed(kind: str) -> None:
    values, facts, said = CHANGES[kind]
    ran = saved(recipe())
    with pytest.raises(LoraError, match="allow_changes=true") as caught:
        reject_changes(ran, recipe(**values), saved(recipe(**values), **facts))
    (problem,) = caught.value.problems
    assert said in problem.what
    allowed = recipe(checkpoint__allow_changes=True, **values)
    (change,) = reject_changes(ran, allowed, saved(allowed, **facts))
    assert said in change


@pytest.mark.parametrize(
    "values",
    [
        {"adapter__rank": 3},
        {"model__name": "other"},
        {"task": {"max_length": 7}},
        {"train__optimizer": {"type": "sgd"}},
    ],
)
@pytest.mark.parametrize("allow", [True, False])
def test_another_model_is_rejected_even_if_changes_are_allowed(
    values: dict[str, Any], allow: bool
) -> None:
    now = recipe(**values, checkpoint__allow_changes=allow)
    with pytest.raises(LoraError, match="start a new run in another folder") as caught:
        reject_changes(saved(recipe()), now)
    assert "allow_changes" not in str(caught.value)


def test_only_the_last_of_several_changes_has_the_hint() -> None:
    with pytest.raises(LoraError) as caught:
        reject_changes(saved(recipe()), recipe(train__seed=9, train__max_steps=7))
    first, last = caught.value.problems
    assert first.hint is None
    assert "start a new run" in str(last.hint)


def test_unknown_facts_of_the_machine_are_no_change() -> None:
    ran = saved(recipe(), machine={"device": "cpu"})
    assert reject_changes(ran, recipe(), saved(recipe())) == []


# -------------------------------------------------------------------------------------- the facts


def test_the_machine_s_facts_are_those_that_affect_the_last_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Accelerator(cpu=True)
    versions = {name: installed_version(name) for name in ("torch", "transformers")}
    wanted = {"device": "cpu", "processes": 1, "threads": torch.get_num_threads(), **versions}
    assert machine_facts(accelerator) == wanted
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    del wanted["threads"]
    assert machine_facts(accelerator) == wanted | {"device": "cuda"}


def test_the_chosen_micro_batch_is_among_the_facts() -> None:
    facts = memory_facts(
        recipe(train__micro_batch_size="auto", train__examples_per_step=12), Learned(micro_batch=6)
    )
    assert facts == {
        "micro_batch_size": 6,
        "asked": "auto",
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("found", [None, False, True, "offload"])
@pytest.mark.parametrize("asked", [False, True, "offload", "auto"])
def test_gradient_checkpointing_is_among_the_facts(asked: bool | str, found: Any) -> None:
    facts = memory_facts(recipe(train__gradient_checkpointing=asked), Learned(checkpointing=found))
    assert facts["gradient_checkpointing"] == (found or False if asked == "auto" else asked)


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("steps", [4, 5])
def test_a_recipe_may_have_as_many_steps_as_were_made(steps: int) -> None:
    reject_fewer_steps(TrainState(step=4), steps, recipe())


@pytest.mark.parametrize(
    ("values", "key"),
    [({"train__max_steps": 3}, "train.max_steps"), ({"train__epochs": 2}, "train.epochs")],
)
def test_fewer_steps_are_rejected_by_their_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(LoraError, match=r"has made 4 steps, and .* asks for 3") as caught:
        reject_fewer_steps(TrainState(step=4), 3, recipe(**values))
    assert caught.value.problems[0].at.startswith(key)


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("same_rule", [True, False])
def test_an_early_stop_is_only_undone_by_other_settings(stopped: bool, same_rule: bool) -> None:
    rules = [
        recipe(data__validation="dev.csv", evaluate__early_stopping={"patience": patience})
        for patience in (2, 2 if same_rule else 3)
    ]
    state = saved(rules[0], stopped_early=stopped, step=3)
    said: list[str] = []
    clear_changed_early_stop(state, saved(rules[1]), said.append)
    assert state.stopped_early == (stopped and same_rule)
    assert [text[:34] for text in said] == (
        ["the run stopped early at step 3, s"] if stopped and same_rule else []
    )


# ---------------------------------------------------------------------------------- on the disk


@pytest.mark.parametrize(
    ("values", "is_state"),
    [
        ({}, True),
        ({"step": 0, "examples": 0, "tokens": 0, "skipped_steps": 0}, True),
        ({"step": -1}, False),
        ({"examples": -1}, False),
        ({"tokens": -1}, False),
        ({"skipped_steps": -1}, False),
        ({"unknown": 1}, False),
        ({"step": "two"}, False),
    ],
)
def test_only_valid_states_are_read(values: dict[str, Any], is_state: bool, tmp_path: Path) -> None:
    file = tmp_path / "trainer.json"
    file.write_text(json.dumps({"step": 3, "best": {"step": 2}, **values}))
    if is_state:
        assert read_state(file) == TrainState(**{"step": 3, "best": {"step": 2}, **values})
        return
    with pytest.raises(ValueError):  # noqa: PT011 - the caller says what to do
        read_state(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="of another version"):
        read_state(file)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(step=3, examples=12, best={"step": 2}, logs={"metrics.jsonl": 7})
    (tmp_path / "trainer.json").write_text(json.dumps(asdict(state)))  # all of its keys
    assert read_state(tmp_path / "trainer.json") == state


def test_only_defaults_may_be_missing_in_the_state_of_an_earlier_version() -> None:
    def changes(now: Recipe) -> list[str]:
        before = recipe_facts(recipe())
        del before["train"]["max_grad_norm"]  # as in a version without this key
        del before["adapter"]["dropout"]
        try:
            return reject_changes(saved(recipe(), recipe=before), now)
        except LoraError as error:
            return [problem.what for problem in error.problems]

    assert changes(recipe()) == []
    (said,) = changes(recipe(adapter__dropout=0.3))
    assert "`adapter.dropout: None`, the recipe now says `0.3`" in said
    (said,) = changes(recipe(train__max_grad_norm=0.25))
    assert "`train.max_grad_norm: None`, the recipe now says `0.25`" in said


def test_a_new_run_has_an_empty_state() -> None:
    state = TrainState()
    counts = (state.step, state.examples, state.tokens, state.skipped_steps, state.unlogged_steps)
    assert counts == (0, 0, 0, 0, 0)
    assert (state.seconds, state.unlogged_loss, state.without_improvement) == (0.0, 0.0, 0)
    assert (state.stopped_early, state.evaluation_due) == (False, False)
