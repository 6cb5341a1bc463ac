"""The teacher of a distillation: its model, and the task that encodes the student's rows for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.find_adapter import CONFIG_FILE, find_adapter_folder
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.errors import LoraError, counted
from lora_cli.models.base_model import load_config
from lora_cli.models.find_base import locate
from lora_cli.paths import expanded
from lora_cli.recipe import RECIPE_FILE, Recipe, load_adapter_recipe
from lora_cli.recipe.spec import AdapterSpec, DistillSpec, ModelSpec
from lora_cli.tasks import build_task
from lora_cli.tasks.cached_tensors import hash_of
from lora_cli.tasks.contract import Task
from lora_cli.tasks.teachers.trained_task import load_adapted

KEY = "train.distill.teacher"
PROBLEM_TYPES = {
    "single_label_classification": "single_label", "multi_label_classification": "multi_label",
    "regression": "regression",
}  # fmt: skip
READING_KEYS = ("max_length", "split_special_tokens", "pad_token")  # settings for encoding texts


@dataclass
class Teacher:
    """A trained model for the student's task.

    Args:
        recipe: The student's recipe.
        task: The teacher's task, with its processor and its labels, for the student's rows.
        folder: The folder of an adapter; None if the teacher is a whole model.
    """

    recipe: Recipe
    task: Task
    folder: Path | None
    _model: nn.Module | None = None
    _fingerprint: str = ""

    @property
    def spec(self) -> DistillSpec:
        """The recipe's section `train.distill`."""
        spec = self.recipe.train.distill
        assert spec is not None
        return spec

    def load_processor(self) -> None:
        """Load the teacher's tokenizer and configuration, but no weights."""
        with errors_of_teacher(self.recipe):
            self.task.load_processor()

    def cache_key(self) -> list[str]:
        """Return what the teacher's answers depend on, besides its tensors and the rows."""
        facts = self.task.base_facts
        return ["taught", *self.task.cache_key(), str(sorted(facts["config"].items()))]

    def model(self) -> nn.Module:
        """Return the teacher in eval mode and without gradients; the first call loads it.

        Raises:
            LoraError: If a part of it is not trained, such as a head that its checkpoint lacks.
        """
        if self._model is None:
            with errors_of_teacher(self.recipe):
                self._model = self._load()
            self._fingerprint = self._fingerprint or hash_of(self._model)
        return self._model

    def _load(self) -> nn.Module:
        accelerator = start_accelerator(self.recipe)
        if self.folder is not None:
            model = load_adapted(self.folder, self.task, accelerator)
        else:
            model, _ = self.task.load_model(accelerator.device)
            if self.task.drawn:
                first = min(self.task.drawn)
                what = f"it has no trained `{first}`, so that its answers would be random"
                hint = "name a model that was tuned for this task, or an adapter of one"
                raise LoraError(what, self.recipe.at("model.name"), hint)
            with accelerator.autocast():
                self.task.fit_to_model(model.eval())
        return model.eval().requires_grad_(False)

    def release(self) -> None:
        """Release the model's memory; a later call of `model` loads it again."""
        self._model = None

    @property
    def facts(self) -> dict[str, Any]:
        """The facts about the teacher, for the report."""
        spec = self.spec
        named = {"name": spec.teacher, "revision": spec.revision, "fingerprint": self._fingerprint}
        return {**named, "temperature": spec.temperature, "weight": spec.weight}


def open_teacher(recipe: Recipe, **task: Any) -> Teacher:
    """Return the recipe's teacher, for which only its configuration is read, not its weights.

    Args:
        recipe: The student's recipe.
        task: Changes to the recipe's `task` section: by key, or the whole section as `task`.

    Raises:
        LoraError: If there is no such model or adapter, or if it was trained for another task.
    """
    spec = recipe.train.distill
    assert spec is not None
    with errors_of_teacher(recipe):
        folder = _adapter_folder(spec, recipe)
        values = {"train.distill": None, "adapter": AdapterSpec(type="none"), **task}
        values["model"] = _model_spec(spec.teacher, recipe, spec.revision)
        teacher_recipe = recipe.with_values(
            values | ({} if folder is None else _settings_of_adapter(folder, recipe))
        )
        if recipe.task.label_columns_by_key and not (folder and _has_recipe(folder)):
            config = load_config(teacher_recipe)
            if folder is None:
                _require_same_problem(config, recipe)
            names: dict[int, str] = config.id2label or {}
            teacher_recipe = teacher_recipe.with_values(
                {"task.labels": [str(names[i]) for i in sorted(names)]}
            )
        teacher_task = build_task(teacher_recipe)
        teacher_task.trained_in = folder
    return Teacher(recipe, teacher_task, folder)


@contextmanager
def errors_of_teacher(recipe: Recipe) -> Iterator[None]:
    """Within the context, mark errors as those of the teacher, at its location in the recipe."""
    try:
        yield
    except LoraError as error:
        at = recipe.at(KEY)
        problems = [
            replace(p, what=p.what if p.at == at else f"the teacher: {p.what}", at=at)
            for p in error.problems
        ]
        raise type(error)(problems) from error


def _model_spec(name: str, recipe: Recipe, revision: str = "main") -> ModelSpec:
    trusted = recipe.model.trust_remote_code
    return ModelSpec(name=name, revision=revision, trust_remote_code=trusted)


def _has_recipe(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def _require_same_problem(config: PretrainedConfig, recipe: Recipe) -> None:
    """Check that a whole model predicts the same as the student: one label, several or a number.

    Raises:
        LoraError: If its config.json says otherwise, so that its outputs would be misinterpreted.
    """
    named, ours = getattr(config, "problem_type", None), getattr(recipe.task, "problem", None)
    theirs = PROBLEM_TYPES.get(str(named), ours)
    if theirs != ours:
        what = f"its config.json says `problem_type: {named}`, and the recipe `problem: {ours}`"
        raise LoraError(what, hint=f"name a teacher for the same task, or set `problem: {theirs}`")


def _adapter_folder(spec: DistillSpec, recipe: Recipe) -> Path | None:
    """Return the folder of a teacher that is an adapter, or None if it is a whole model."""
    name, at = spec.teacher, recipe.at(KEY)
    path = Path(expanded(name))
    if name.startswith("package:"):
        return None
    if path.is_absolute():
        if not path.is_dir():
            locate(str(path), at)  # raises an error that says what is there instead
        if (path / "config.json").is_file() and not (path / CONFIG_FILE).is_file():
            return None
        return find_adapter_folder(str(path), at)
    revision = "" if spec.revision == "main" or "@" in name else f"@{spec.revision}"
    if "@" in name or name.startswith("hf:"):
        return find_adapter_folder(name + revision, at)
    if find_adapter_config_file(name, revision=spec.revision) is None:
        return None
    return find_adapter_folder(name + revision, at)


def _settings_of_adapter(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the model and labels of an adapter, from its recipe or PEFT's configuration.

    Raises:
        LoraError: If it was trained for another task.
    """
    if not _has_recipe(folder):
        base = read_adapter(folder).config.get("base_model_name_or_path")
        if not base:
            raise LoraError(f"{folder} does not name its base", hint="name a whole model")
        return {"model": _model_spec(str(base), recipe)}
    trained = load_adapter_recipe(folder)
    for key in ("type", "problem"):
        theirs, ours = (getattr(r.task, key, None) for r in (trained, recipe))
        if theirs != ours:
            what = f"it was trained with `task.{key}: {theirs}`, and the recipe says `{ours}`"
            raise LoraError(what, hint="name a teacher for the same task")
    trusted = recipe.model.trust_remote_code
    changes = {"model.dtype": None, "model.attention": None, "model.trust_remote_code": trusted}
    values = {"model": trained.with_values(changes).model, "adapter": trained.adapter}
    if labels := getattr(trained.task, "labels", None):
        _require_same_texts(trained, recipe)
        values |= {"task.labels": labels, **_reading_settings(trained)}
    return values


def _require_same_texts(trained: Recipe, recipe: Recipe) -> None:
    """Check that teacher and student read the same number of texts per row.

    Raises:
        LoraError: If one of them reads pairs and the other does not.
    """
    theirs, ours = (r.task.input_columns_by_key for r in (trained, recipe))
    if len(theirs) != len(ours):
        what = f"it was trained on {counted(len(theirs), 'text')} a row, and the recipe names "
        hint = "set `task.text_pair_column` as it was for the teacher, or name another teacher"
        raise LoraError(f"{what}{len(ours)}", hint=hint)


def _reading_settings(trained: Recipe) -> dict[str, Any]:
    """Return how an adapter's recipe encodes texts, which may differ from the student's."""
    task = trained.task
    keys = {f"task.{key}": getattr(task, key) for key in READING_KEYS if hasattr(task, key)}
    cut = getattr(task, "truncate", "right")  # `drop` and `error` must not apply here
    return keys | {"task.truncate": cut if cut == "left" else "right"}
