"""A recipe never changes; what is learnt on the way is a value of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lora_cli.evaluation.compare import compare
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter, with_test_file
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.check_recipe import check_recipe, empty_adapted_model
from lora_cli.recipe import AdapterSpec, Learned, Recipe, TrainSpec, dump_recipe, load_recipe
from lora_cli.recipe.spec import section
from lora_cli.tasks import build_task
from lora_cli.training import run as training_run
from lora_cli.training import train
from tests import tiny

ROWS = [("a fine film", "good"), ("a dull film", "bad")] * 8
FEW_STEPS = {"max_steps": 1, "log_every_steps": 1}


def sections_of(cls: type[BaseModel]) -> set[type[BaseModel]]:
    return {cls}.union(*map(sections_of, cls.__subclasses__()))


SECTIONS = sorted(sections_of(section.Section), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_sections_are_immutable(cls: type[BaseModel]) -> None:
    made = cls.model_construct()
    for name in cls.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, name, None)
        with pytest.raises(ValidationError, match="frozen"):
            delattr(made, name)


def test_sections_have_no_other_attributes_than_their_keys() -> None:
    kept = {cls.__name__: set(cls.__private_attributes__) for cls in SECTIONS}
    assert {name: found for name, found in kept.items() if found} == {"Recipe": {"_origin"}}


def test_with_values_returns_a_new_recipe() -> None:
    recipe = tiny.recipe_of()
    before = recipe.model_copy(deep=True)
    other = recipe.with_values({"adapter.rank": 3, "train.optimizer.groups.head.weight_decay": 0.5})
    assert recipe == before
    assert other.adapter.rank == 3
    assert other.train.optimizer.groups.head.weight_decay == 0.5
    assert other.with_values({"adapter": recipe.adapter, "train": recipe.train}) == recipe
    with pytest.raises(AssertionError, match="AdapterSpec has no `ranc`"):
        recipe.with_values({"adapter.ranc": 3})


def test_a_recipe_with_other_values_keeps_the_places_of_keys(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path / "base", tmp_path, adapter={"rank": 3})
    recipe = load_recipe(path, ["train.seed=4"])
    other = recipe.with_values({"adapter.rank": 5})
    assert other.at("adapter.rank") == recipe.at("adapter.rank")
    assert other.is_overridden("train.seed")
    assert not other.is_overridden("train.epochs")
    assert not recipe.is_overridden("adapter.rank")


def test_learned_values_complete_a_copy_of_the_recipe() -> None:
    recipe = tiny.recipe_of()
    before = recipe.model_copy(deep=True)
    assert Learned().completed(recipe) == recipe
    learned = Learned({"labels": ["x", "y"]}, AdapterSpec(rank=7))
    completed = learned.completed(recipe)
    assert recipe == before
    assert completed.task.labels == ["x", "y"]  # type: ignore[union-attr]
    assert completed.adapter.rank == 7
    assert completed.train is recipe.train


@pytest.mark.parametrize(
    ("train", "found", "wanted"),
    [
        ({"micro_batch_size": 3}, None, 3),
        ({"micro_batch_size": 3}, 6, 6),
        ({"micro_batch_size": "auto", "examples_per_step": 64}, 5, 5),
        ({"micro_batch_size": "auto", "examples_per_step": 64}, None, 8),
        ({"micro_batch_size": "auto", "examples_per_step": 4}, None, 4),
    ],
)
def test_the_size_of_micro_batches(train: dict[str, Any], found: int | None, wanted: int) -> None:
    spec = TrainSpec.model_validate(train)
    assert Learned(micro_batch=found).micro_batch_of(spec) == wanted


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_encoder(tmp_path_factory.mktemp("base") / "base")
    return folder


def recipe_in(folder: Path, base: Path, *overrides: str, **sections: Any) -> Recipe:
    """Return a recipe without labels and their weights, which are found in the rows."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sections = {
        "task": {"labels": None, "class_weights": "balanced"},
        "data": {"train": "all.jsonl", "validation": "all.jsonl", "check": {"max_overlap": 1}},
        "train": FEW_STEPS,
        **sections,
    }
    path = tiny.recipe(base, folder, **sections)
    return load_recipe(path, [*overrides, f"output_dir={folder / 'out'}"])


@pytest.mark.slow
def test_no_command_changes_its_recipe(base: Path, tmp_path: Path) -> None:
    """Training, also from an adapter, resuming, evaluating, comparing, checking, merging."""
    auto = ["train.micro_batch_size=auto", "train.examples_per_step=4"]
    recipe = recipe_in(tmp_path / "a", base, *auto, evaluate={"baselines": ["majority"]})
    started = json.dumps({"from": str(tmp_path / "a/out")})
    further = recipe_in(tmp_path / "b", base, f"adapter={started}")
    full = recipe_in(tmp_path / "c", base, adapter={"type": "full"})
    recipes = [recipe, further, full]
    before = [one.model_copy(deep=True) for one in recipes]

    checked = check_recipe(recipe)
    assert checked.task.labels == ["bad", "good"]  # type: ignore[union-attr]
    for one in recipes:
        train(one)
        assert recipes == before
    for one in recipes:
        train(one.with_values({"checkpoint.allow_changes": True}), resume=True)
        evaluate_adapter(one.output_path, one, "validation")
        with_test_file(one, tmp_path / "a/all.jsonl")
    empty_adapted_model(further)
    a, b, c = (one.output_path for one in recipes)
    compare(b, a, further)
    compare(c, a, full)
    compare(a, c, recipe)
    merge_adapter(None, a, tmp_path / "merged")
    assert recipes == before

    resolved = load_recipe(b / "recipe.yaml")
    assert resolved.task.labels == ["bad", "good"]  # type: ignore[union-attr]
    assert resolved.task.class_weights == {"bad": 1.0, "good": 1.0}  # type: ignore[union-attr]
    assert resolved.adapter.rank == load_recipe(a / "recipe.yaml").adapter.rank
    assert load_recipe(a / "recipe.yaml").train.micro_batch_size == "auto"


def test_a_run_passes_on_its_learned_values(base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "a", base)
    learned = Learned()
    training_run.train(recipe, learned=learned)
    assert learned.task == {"labels": ["bad", "good"], "class_weights": {"bad": 1.0, "good": 1.0}}
    written = (recipe.output_path / "recipe.yaml").read_text(encoding="utf-8")
    assert written == dump_recipe(learned.completed(recipe))
    assert build_task(recipe, learned).completed_recipe == learned.completed(recipe)
