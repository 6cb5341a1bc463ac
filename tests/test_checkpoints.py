"""Checkpoints: the room that they need, which are kept, which is read, and what is put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.errors import IntegrityError
from lora_cli.files import write_manifest
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.training import checkpoints as module
from lora_cli.training.checkpoints import (
    checkpoints,
    load_checkpoint,
    optimizer_bytes,
    publish_adapter,
    require_space_for_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from lora_cli.training.optimizers import build_optimizer
from lora_cli.training.train_state import TrainState

HEAD = ["classifier"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folder = tmp_path / "base"
    folder.mkdir()
    return load_recipe(tiny.recipe(folder, tmp_path, checkpoint={"keep": 2}))


def trained(recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model after a step of its optimizer."""
    model = tiny.encoder(2)
    attach(model, recipe, HEAD)
    optimizer = build_optimizer(model, recipe, HEAD)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(recipe: Recipe, *steps: int, best: int | None = None) -> list[int]:
    """Save a checkpoint after each of these steps, and return which are left."""
    model, optimizer = trained(recipe)
    for step in steps:
        state = TrainState(step=step, best=None if best is None else {"step": best})
        save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    return [step for step, _ in checkpoints(recipe.output_path)]


@pytest.mark.parametrize(
    ("kind", "share"), [("adamw", 2.0), ("sgd", 1.0), ("adafactor", 0.1), ("adamw_8bit", 0.6)]
)
def test_the_room_is_that_of_all_that_is_on_the_disk_at_once(
    kind: str, share: float, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_values(
        {"train.optimizer.type": kind, "checkpoint.keep": 3, "adapter.rank": 1}
    )
    model = tiny.encoder(2)
    attach(model, recipe, HEAD)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = int(share * trained)
    assert optimizer_bytes(model, recipe) == kept
    asked: list[int] = []
    monkeypatch.setattr(module, "require_space", lambda _, size, at: asked.append(size))
    require_space_for_checkpoints(model, recipe)
    # three, that of the best evaluation, and a new one; the adapter in two versions; a MiB
    assert asked == [5 * (trained + kept) + 2 * trained + 2**20]
    there = recipe.output_path / "checkpoints" / "step-000001"
    there.mkdir(parents=True)
    (there / "file").write_bytes(b"x" * 1000)
    require_space_for_checkpoints(model, recipe)
    assert asked[1] == asked[0] - 1000


def test_a_model_of_parts_also_needs_room_for_the_file_of_diffusers(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.encoder(2)
    attach(model, recipe, HEAD)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    asked: list[int] = []
    monkeypatch.setattr(module, "require_space", lambda _, size, at: asked.append(size))
    for parts in ([], ["unet"]):
        monkeypatch.setattr(module, "part_names", lambda _, parts=parts: parts)
        require_space_for_checkpoints(model, recipe)
    assert asked[1] - asked[0] == 2 * trained  # old and new


def test_what_decides_the_computation_is_kept_beside_what_is_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(recipe)
    facts, written = {"attention": "sdpa"}, []
    monkeypatch.setattr(module, "write_computation", lambda *given: written.append(given))
    state, out = TrainState(step=1), recipe.output_path
    save_checkpoint(out, state, optimizer, model, recipe, HEAD, None, facts)
    ((folder, *rest),) = written
    assert (folder.parent.name, rest) == ("checkpoints", [recipe, facts])
    processors: list[Any] = []
    publish_adapter(out, model, recipe, HEAD, None, lambda *given: processors.append(given), facts)
    ((folder, given),) = processors
    assert (folder.parent, given) == (out, facts)
    assert written[1] == (folder, recipe, facts)
    assert (out / "adapter_model.safetensors").is_file()
    save_checkpoint(out, TrainState(step=2), optimizer, model, recipe, HEAD, None)
    publish_adapter(out, model, recipe, HEAD, None, None)
    assert (len(written), len(processors)) == (2, 1)


def test_of_several_tensors_that_are_missing_the_last_says_how_to_go_on(recipe: Recipe) -> None:
    model, optimizer = trained(recipe)
    state = TrainState(step=1)
    folder = save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    file = folder / "optimizer.safetensors"
    tensors = load_file(file)
    missing = sorted(tensors)[:3]
    save_file({n: t for n, t in tensors.items() if n not in missing}, file)
    with pytest.raises(IntegrityError) as caught:
        restore_checkpoint(folder, state, model, optimizer)
    problems = caught.value.problems
    assert [problem.what for problem in problems] == [f"`{name}` is missing" for name in missing]
    assert [bool(problem.hint) for problem in problems] == [False, False, True]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_keeps_as_much_as_was_expected(kind: str, recipe: Recipe) -> None:
    values: dict[str, Any] = {"train.optimizer.type": kind}
    if kind == "sgd":
        values["train.optimizer.momentum"] = 0.9
    recipe = recipe.with_values(values)
    model, optimizer = trained(recipe)
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    assert optimizer_bytes(model, recipe) == kept


@pytest.mark.parametrize(
    ("steps", "best", "left"),
    [
        ((1,), None, [1]),
        ((1, 2), None, [1, 2]),
        ((1, 2, 3, 4), None, [3, 4]),
        ((1, 2, 3, 4), 1, [1, 3, 4]),
        ((1, 2, 3, 4), 4, [3, 4]),
        ((5, 9, 6, 7), None, [6, 7, 9]),  # one of a later step is left alone
    ],
)
def test_the_newest_are_kept_and_the_best(
    steps: tuple[int, ...], best: int | None, left: list[int], recipe: Recipe
) -> None:
    assert save(recipe, *steps, best=best) == left
    names = {path.name for path in (recipe.output_path / "checkpoints").iterdir()}
    assert names == {f"step-{step:06d}" for step in left}


def test_the_newest_whole_checkpoint_is_read_and_damage_is_named(recipe: Recipe) -> None:
    assert load_checkpoint(recipe.output_path) is None
    assert save(recipe, 2, 4) == [2, 4]
    said: list[str] = []
    folder, state = load_checkpoint(recipe.output_path, said.append) or (None, None)
    assert folder is not None
    assert (folder.name, state and state.step, said) == ("step-000004", 4, [])

    (folder / "optimizer.safetensors").write_bytes(b"cut")
    found = load_checkpoint(recipe.output_path, said.append)
    assert found is not None
    assert (found[0].name, found[1].step) == ("step-000002", 2)
    assert "optimizer.safetensors" in said[0]
    assert said[1:] == ["continuing from the one before, step-000002"]

    (found[0] / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="the manifest is missing") as caught:
        load_checkpoint(recipe.output_path)
    assert "no checkpoint is whole" in str(caught.value)


def test_a_checkpoint_of_another_step_than_its_name_is_damaged(recipe: Recipe) -> None:
    save(recipe, 2)
    folder = recipe.output_path / "checkpoints" / "step-000002"
    folder.rename(folder.with_name("step-000003"))
    with pytest.raises(IntegrityError, match="it is the checkpoint of step 2"):
        load_checkpoint(recipe.output_path)


def test_parameters_and_the_optimizer_are_put_back(recipe: Recipe) -> None:
    model, optimizer = trained(recipe)
    state = TrainState(step=1)
    folder = save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    assert json.loads((folder / "trainer.json").read_text())["sha256"] == state.sha256
    torch.manual_seed(7)
    again, other = trained(recipe)
    _, read = load_checkpoint(recipe.output_path) or (None, None)
    assert read == state
    restore_checkpoint(folder, state, again, other)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(again.get_parameter(name), parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[again.get_parameter(name)][key], value)


def test_another_file_of_the_same_shapes_is_no_part_of_the_checkpoint(recipe: Recipe) -> None:
    model, optimizer = trained(recipe)
    states = [TrainState(step=step) for step in (2, 3)]
    folders = []
    for state in states:
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        folders.append(
            save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
        )
    name = "adapter_model.safetensors"
    (folders[1] / name).write_bytes((folders[0] / name).read_bytes())
    write_manifest(folders[1])
    with pytest.raises(IntegrityError, match=f"`{name}` is not the file that was written"):
        restore_checkpoint(folders[1], states[1], model, optimizer)
