"""Which model teaches: an adapter or a whole model, of this machine or of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_folders
import peft
import pytest
import tiny
import torch
from closeness import assert_close, assert_different
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.accelerator import start_accelerator
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.recipe import Learned, Recipe, load_adapter_recipe, load_recipe
from lora_cli.tasks.teachers import teacher as module
from lora_cli.tasks.teachers.teacher import open_teacher
from lora_cli.tasks.teachers.trained_task import check_use, load_adapted, open_task

TEXTS = ["a warm film", "the plot is dull and slow"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("teacher") / "base", ["bad", "good"])


def adapter(folder: Path, base: Path, **task: Any) -> Path:
    folder.mkdir()
    return adapter_folders.make(
        folder, "adapter", base, seed=4,
        task={"type": "sequence_classification", "labels": ["good", "bad"], **task},
    )  # fmt: skip


def student(folder: Path, base: Path, teacher: str, *sets: str, **distill: Any) -> Recipe:
    path = tiny.recipe(base, folder, train={"distill": {"teacher": teacher, **distill}})
    return load_recipe(path, list(sets))


# ---------------------------------------------------------------------------- what a name means


@pytest.mark.parametrize(
    ("name", "revision", "on_hub", "asked"),
    [
        ("package:some/folder", "main", True, None),
        ("user/name", "main", False, None), ("user/name", "v2", False, None),
        ("user/name", "main", True, "user/name"), ("user/name", "v2", True, "user/name@v2"),
        ("user/name@v1", "main", False, "user/name@v1"),
        ("user/name@v1", "v2", False, "user/name@v1"),
        ("hf:user/name", "main", False, "hf:user/name"),
        ("hf:user/name", "v2", False, "hf:user/name@v2"),
    ],
)  # fmt: skip
def test_a_hub_name_is_an_adapter_if_marked_or_if_it_has_its_config(
    name: str, revision: str, on_hub: bool, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_file(of: str, revision: str) -> str | None:
        assert (of, revision) == (name, given.revision)
        return "adapter_config.json" if on_hub else None

    def find(of: str, at: str) -> Path:
        assert at == "at train.distill.teacher"
        return Path("found", of)

    monkeypatch.setattr(module, "find_adapter_config_file", config_file)
    monkeypatch.setattr(module, "find_adapter_folder", find)
    given: Any = SimpleNamespace(teacher=name, revision=revision)
    recipe: Any = SimpleNamespace(at=lambda key: f"at {key}")
    found = module._adapter_folder(given, recipe)
    assert found == (None if asked is None else Path("found", asked))


@pytest.mark.parametrize(
    ("files", "is_adapter"),
    [(["config.json"], False), (["config.json", "adapter_config.json"], True),
     (["adapter_config.json"], True), ([], True)],
)  # fmt: skip
def test_a_folder_is_a_whole_model_if_it_has_no_file_of_an_adapter(
    files: list[str], is_adapter: bool, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    given: Any = SimpleNamespace(teacher=str(tmp_path), revision="main")
    recipe: Any = SimpleNamespace(at=lambda key: key)
    assert module._adapter_folder(given, recipe) == (tmp_path if is_adapter else None)


def test_a_missing_folder_is_reported_with_its_location(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as caught:
        open_teacher(student(tmp_path, base, str(tmp_path / "nothing")))
    (problem,) = caught.value.problems
    assert problem.what == f"there is no folder {tmp_path / 'nothing'}"
    assert (problem.at or "").startswith("train.distill.teacher (")


# --------------------------------------------------------------------------------- its answers


def test_an_adapter_answers_as_in_peft_and_without_gradients(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "first", base)
    recipe = student(tmp_path, base, str(folder), temperature=3.0, weight=0.25)
    teacher = open_teacher(recipe)
    assert teacher.facts["fingerprint"] == ""
    teacher.load_processor()
    model = teacher.model()
    assert teacher.model() is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    plain = AutoModelForSequenceClassification.from_pretrained(base).eval()
    read = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = plain(**read).logits
        theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
        assert_close(model(**read).logits, theirs(**read).logits)
    assert_different(model(**read).logits, alone)
    found = teacher.facts
    assert (found["name"], found["temperature"], found["weight"]) == (str(folder), 3.0, 0.25)
    teacher.release()
    again = teacher.model()
    assert again is not model
    assert teacher.facts["fingerprint"] == found["fingerprint"] != ""


def test_a_model_that_was_trained_whole_answers_as_in_transformers(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    folder = adapter_folders.make(
        tmp_path / "first", "whole", base, seed=4, std=0.1, adapter={"type": "full"},
        task={"type": "sequence_classification", "labels": ["bad", "good"]},
    )  # fmt: skip
    teacher = open_teacher(student(tmp_path, base, str(folder)))
    teacher.load_processor()
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    read = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert_close(teacher.model()(**read).logits, plain(**read).logits)
    task = open_task(folder, load_adapter_recipe(folder))
    assert task.recipe.model.name == str(folder)
    assert task.trained_in == folder
    model = load_adapted(folder, task, start_accelerator(task.recipe))
    with torch.no_grad():
        assert_close(model(**read).logits, plain(**read).logits)
    task = open_task(folder, task.recipe.with_values({"task.labels": ["good", "bad"]}))
    with pytest.raises(IntegrityError, match=r"task\.labels"):
        load_adapted(folder, task, start_accelerator(task.recipe))


def test_facts_learned_from_the_data_are_passed_on(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "first", base)
    learned = Learned(task={"labels": ["good", "bad"]})
    task = open_task(folder, load_adapter_recipe(folder), learned)
    assert task.learned is learned
    assert task.recipe.model.name == str(base)


def test_an_adapter_reads_texts_as_it_was_trained_to(base: Path, tmp_path: Path) -> None:
    folder = adapter(
        tmp_path / "first", base, truncate="drop", max_length=6, split_special_tokens=True
    )
    recipe = student(tmp_path, base, str(folder), "model.dtype=float32", "adapter.rank=9")
    found = open_teacher(recipe).task.recipe
    task: Any = found.task
    assert (task.max_length, task.split_special_tokens) == (6, True)
    assert task.truncate == "right"  # what was left out then is cut now
    assert task.labels == ["good", "bad"]
    assert (found.adapter.rank, found.train.distill) == (4, None)
    assert found.model.dtype is None
    assert found.model.name == str(base)
    recipe = student(tmp_path, base, str(adapter(tmp_path / "left", base, truncate="left")))
    task = open_teacher(recipe).task.recipe.task
    assert task.truncate == "left"


def test_a_base_that_was_changed_since_the_training_is_rejected(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base", ["bad", "good"])
    folder = adapter(tmp_path / "first", base)
    task = open_task(folder, load_adapter_recipe(folder))
    task.load_processor()
    check_use(folder, task)
    config = json.loads((base / "config.json").read_text())
    changed = {**config, "layer_norm_eps": 0.5}
    (base / "config.json").write_text(json.dumps(changed))
    task = open_task(folder, load_adapter_recipe(folder))
    task.load_processor()
    said = rf"`layer_norm_eps` in config\.json is 0\.5, and was {config['layer_norm_eps']}"
    with pytest.raises(IntegrityError, match=rf"when the adapter {folder} was trained: {said}"):
        check_use(folder, task)


def test_the_labels_of_a_peft_adapter_are_those_of_its_base(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "first", base)
    for name in ("recipe.yaml", "manifest.json", "computation.json"):
        (folder / name).unlink(missing_ok=True)
    found = open_teacher(student(tmp_path, base, str(folder))).task.recipe
    assert found.task.labels == ["bad", "good"]  # type: ignore[union-attr]
    assert found.model.name == str(base)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(LoraError, match=r"the teacher: .* does not name its base"):
        open_teacher(student(tmp_path, base, str(folder)))


# ------------------------------------------------------------------------------ the same task


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"problem": "multi_label"}, [], "`task.problem: multi_label`, and the recipe says `sing"),
        ({"text_pair_column": "other"}, [], "was trained on 2 texts a row, and the recipe na"),
        ({}, ["task.text_pair_column=other"], "was trained on 1 text a row, and the recipe na"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_task_is_rejected(
    theirs: dict[str, Any], ours: list[str], said: str, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "first", base, **theirs)
    with pytest.raises(LoraError) as caught:
        open_teacher(student(tmp_path, base, str(folder), *ours))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "problem", "is_right"),
    [
        ("single_label_classification", "single_label", True), (None, "single_label", True),
        (None, "multi_label", True), ("multi_label_classification", "multi_label", True),
        ("multi_label_classification", "single_label", False),
        ("regression", "single_label", False),
    ],
)  # fmt: skip
def test_a_whole_model_needs_the_student_s_problem_type(
    kind: str | None, problem: str, is_right: bool
) -> None:
    config: Any = SimpleNamespace(problem_type=kind)
    recipe: Any = SimpleNamespace(task=SimpleNamespace(problem=problem))
    if is_right:
        module._require_same_problem(config, recipe)
        return
    with pytest.raises(LoraError) as caught:
        module._require_same_problem(config, recipe)
    (found,) = caught.value.problems
    assert f"`problem_type: {kind}`, and the recipe `problem: {problem}`" in found.what
