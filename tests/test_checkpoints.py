"""Tests of checkpoints: their disk space, which are kept, which is read, and restoring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.errors import IntegrityError
from lora_cli.files import write_manifest
from lora_cli.models.bundle import Bundle
from lora_cli.recipe import Learned, Recipe, load_recipe
from lora_cli.training import checkpoints as module
from lora_cli.training import published_adapter
from lora_cli.training.checkpoints import (
    adopt_adapter,
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    optimizer_bytes,
    peek_state,
    require_space_for_checkpoints,
    restore_checkpoint,
    restore_parameters,
    save_checkpoint,
)
from lora_cli.training.optimizers import build_optimizer
from lora_cli.training.published_adapter import publish_adapter, restore_published
from lora_cli.training.train_state import TrainState, recipe_facts

HEAD = ["classifier"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folder = tmp_path / "base"
    folder.mkdir()
    return load_recipe(tiny.recipe(folder, tmp_path, checkpoint={"keep": 2}))


def trained(recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer after one step."""
    model = tiny.encoder(2)
    attach(model, recipe, HEAD)
    optimizer = build_optimizer(model, recipe, HEAD)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(recipe: Recipe, *steps: int, best: int | None = None) -> list[int]:
    """Save a checkpoint after each of these steps, and return the steps that are kept."""
    model, optimizer = trained(recipe)
    for step in steps:
        state = TrainState(step=step, best=None if best is None else {"step": best})
        save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    return [step for step, _ in checkpoints(recipe.output_path)]


@pytest.mark.parametrize(
    ("kind", "share"), [("adamw", 2.0), ("sgd", 1.0), ("adafactor", 0.1), ("adamw_8bit", 0.6)]
)
def test_the_required_space_covers_all_files_on_the_disk_at_once(
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
    # three checkpoints, the best and a new one; the adapter in two versions; 1 MiB
    assert asked == [5 * (trained + kept) + 2 * trained + 2**20]
    there = recipe.output_path / "checkpoints" / "step-000001"
    there.mkdir(parents=True)
    (there / "file").write_bytes(b"x" * 1000)
    require_space_for_checkpoints(model, recipe)
    assert asked[1] == asked[0] - 1000


def test_only_the_adapter_layers_own_buffers_are_counted(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.encoder(2)
    attach(model, recipe, HEAD)
    asked: list[int] = []
    monkeypatch.setattr(module, "require_space", lambda _, size, at: asked.append(size))
    require_space_for_checkpoints(model, recipe)
    layer = next(iter(module.lora_layers(model).values()))
    layer.base.register_buffer("table", torch.zeros(1000))  # of the frozen base
    require_space_for_checkpoints(model, recipe)
    layer.register_buffer("lengths", torch.zeros(50, dtype=torch.float64))
    require_space_for_checkpoints(model, recipe)
    # in the four checkpoints, and in the adapter in two versions
    assert [size - asked[0] for size in asked] == [0, 0, (4 + 2) * 400]


def test_a_model_of_parts_also_needs_space_for_the_diffusers_file(
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


def test_facts_of_the_computation_are_saved_with_the_parameters(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(recipe)
    facts, written = {"attention": "sdpa"}, []
    for writer in (module, published_adapter):
        monkeypatch.setattr(writer, "write_computation", lambda *given: written.append(given))
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


def test_the_last_of_several_missing_tensors_has_the_hint(recipe: Recipe) -> None:
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
def test_the_size_of_an_optimizer_s_state_is_as_estimated(kind: str, recipe: Recipe) -> None:
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
        ((5, 9, 6, 7), None, [6, 7, 9]),  # later checkpoints are not deleted
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(
    steps: tuple[int, ...], best: int | None, left: list[int], recipe: Recipe
) -> None:
    assert save(recipe, *steps, best=best) == left
    names = {path.name for path in (recipe.output_path / "checkpoints").iterdir()}
    assert names == {f"step-{step:06d}" for step in left}


def test_the_newest_complete_checkpoint_is_read_and_damage_is_reported(recipe: Recipe) -> None:
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


def test_a_checkpoint_whose_name_has_another_step_is_damaged(recipe: Recipe) -> None:
    save(recipe, 2)
    folder = recipe.output_path / "checkpoints" / "step-000002"
    folder.rename(folder.with_name("step-000003"))
    with pytest.raises(IntegrityError, match="it is the checkpoint of step 2"):
        load_checkpoint(recipe.output_path)


def test_parameters_and_the_optimizer_are_restored(recipe: Recipe) -> None:
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


def test_a_replaced_file_with_the_same_shapes_is_rejected(recipe: Recipe) -> None:
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


def test_peeking_reads_the_newest_readable_state(recipe: Recipe) -> None:
    out = recipe.output_path
    assert peek_state(out) is None
    save(recipe, 2, 4)
    for step in (4, 2):
        state = peek_state(out)
        assert state is not None
        assert state.step == step
        (out / "checkpoints" / f"step-{step:06d}" / "trainer.json").write_text("[]")
    assert peek_state(out) is None


def test_checkpoints_are_ordered_by_number_and_other_names_ignored(recipe: Recipe) -> None:
    folder = recipe.output_path / "checkpoints"
    assert checkpoints(recipe.output_path) == []
    for name in ("step-000010", "step-9", "step-000002", ".step-000003.old", "step-x", "best"):
        (folder / name).mkdir(parents=True)
    assert checkpoints(recipe.output_path) == [
        (2, folder / "step-000002"), (9, folder / "step-9"), (10, folder / "step-000010"),
    ]  # fmt: skip


def test_leftovers_of_a_killed_process_are_cleared_in_both_folders(recipe: Recipe) -> None:
    save(recipe, 2)
    out = recipe.output_path
    for folder in (out, out / "checkpoints"):
        (folder / ".part.7.tmp").mkdir()
        (folder / ".gone.7.old").mkdir()
    clear_leftovers(out)
    for folder in (out, out / "checkpoints"):
        assert not (folder / ".part.7.tmp").exists()
        assert (folder / "gone").is_dir()
    assert [step for step, _ in checkpoints(out)] == [2]


# -------------------------------------------------------------------------- a run that is resumed


def test_a_new_run_adopts_nothing(recipe: Recipe) -> None:
    learned = Learned()
    adopt_adapter(recipe, learned)
    assert learned == Learned()


def test_a_resumed_run_continues_with_the_adapter_of_its_checkpoint(recipe: Recipe) -> None:
    started = recipe.with_values({"adapter.rank": 3, "adapter.alpha": 5.0, "adapter.dropout": 0.5})
    model, optimizer = trained(started)
    state = TrainState(step=1, recipe=json.loads(json.dumps(recipe_facts(started))))
    save_checkpoint(recipe.output_path, state, optimizer, model, started, HEAD, None)
    learned = Learned()
    adopt_adapter(started, learned)
    assert learned == Learned(in_checkpoint=True)
    # the recipe names an adapter, and one of its settings differs from the run's
    section = {"from": "old", "dropout": 0.25, "target_modules": ["query"]}
    spec = type(recipe.adapter).model_validate(section)
    now = recipe.with_values({"adapter": spec})
    adopt_adapter(now, learned)
    found = learned.adapter
    assert found is not None
    assert (found.rank, found.alpha, found.dropout, found.from_) == (3, 5.0, 0.25, "old")
    assert found.target_modules == started.adapter.target_modules  # not the recipe's
    assert learned.ranks == {}


def test_ranks_are_those_of_the_newest_readable_checkpoint(
    recipe: Recipe,
) -> None:
    for step, rank in ((1, 5), (2, 3)):
        model, optimizer = trained(recipe.with_values({"adapter.rank": rank}))
        state = TrainState(step=step)
        save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    names = set(module.lora_layers(model))
    newest = recipe.output_path / "checkpoints" / "step-000002"
    for rank in (3, 5):
        learned = Learned()
        adopt_adapter(recipe.with_values({"adapter.init": "eva"}), learned)
        assert learned.ranks == dict.fromkeys(names, rank)
        (newest / "adapter_model.safetensors").write_bytes(b"cut")
    (newest.with_name("step-000001") / "adapter_model.safetensors").unlink()
    learned = Learned()
    adopt_adapter(recipe.with_values({"adapter.init": "eva"}), learned)
    assert learned == Learned(in_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", "is of shape [3, 32], and should be of shape [4, 32]"),
        ("missing", "is not there, and should be of shape [4, 32]"),
        ("more", "is of shape [4, 32], and should be not there"),
    ],
)
def test_parameters_of_another_run_are_rejected_before_any_is_restored(
    change: str, said: str, recipe: Recipe
) -> None:
    model, optimizer = trained(recipe)
    state = TrainState(step=1)
    folder = save_checkpoint(recipe.output_path, state, optimizer, model, recipe, HEAD, None)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    plain = name.removeprefix("base_model.model.")
    if change == "more":
        plain = f"x.{plain}"
        tensors[f"base_model.model.{plain}"] = tensors[name].clone()
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, file)
    other, _ = trained(recipe)
    before = {n: p.detach().clone() for n, p in trainable_parameters(other).items()}
    with pytest.raises(IntegrityError) as caught:
        restore_parameters(folder, other)
    (problem,) = caught.value.problems
    assert problem.what == f"`{plain}` {said}"
    assert problem.at == str(file)
    assert f"remove {folder}" in str(problem.hint)
    assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(other).items())


def test_an_error_names_the_file_of_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["text_encoder/adapter_model.safetensors", "unet/adapter_model.safetensors"]
    monkeypatch.setattr(module, "weight_files", lambda _: files)
    monkeypatch.setattr(module, "read_tensors", lambda _: {})
    for name, file in (("unet.a", files[1]), ("text_encoder.a", files[0]), ("vae.a", files[0])):
        wanted = {f"base_model.model.{name}": torch.zeros(2)}
        monkeypatch.setattr(module, "adapter_tensors", lambda _, wanted=wanted: wanted)
        with pytest.raises(IntegrityError) as caught:
            restore_parameters(tmp_path, nn.Linear(1, 1))
        assert caught.value.problems[0].at == str(tmp_path / file)


# ---------------------------------------------------------------------- what stands in the output


class Part(nn.Module):
    """A model of another library than transformers."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "part.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> Part:
        cls.asked.append(options)
        part = cls()
        part.load_state_dict(load_file(folder / "part.safetensors"))
        return part


@pytest.mark.parametrize("kind", ["lora", "full", "bundle"])
def test_the_published_adapter_is_restored(kind: str, recipe: Recipe) -> None:
    if kind != "lora":
        recipe = recipe.with_values({"adapter.type": "full"})

    def built() -> nn.Module:
        if kind == "bundle":
            return Bundle({"unet": Part(), "encoder": tiny.encoder(2)})
        model: nn.Module = tiny.encoder(2)
        attach(model, recipe, HEAD)
        return model

    model, other = built(), built()
    for seed, one in enumerate((model, other)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in [p for p in one.parameters() if p.requires_grad] + [
                b for n, b in one.named_buffers() if n.endswith("seen")
            ]:
                tensor.normal_()
    recipe.output_path.mkdir(parents=True)
    publish_adapter(recipe.output_path, model, recipe, HEAD, None, None)
    Part.asked.clear()
    restore_published(recipe.output_path, other, recipe)
    wanted = model.state_dict()
    assert other.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())
    assert Part.asked == ([{"torch_dtype": torch.float32}] if kind == "bundle" else [])
