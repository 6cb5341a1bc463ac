"""A teacher: the model whose answers are learned, and how it reads the student's rows."""

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
PROBLEMS = {
    "single_label_classification": "single_label", "multi_label_classification": "multi_label",
    "regression": "regression",
}  # fmt: skip
READING = ("max_length", "split_special_tokens", "pad_token")  # how a classifier reads its texts


@dataclass
class Teacher:
    """A trained model for the student's task.

    Args:
        recipe: The student's.
        task: Reads the student's rows as the teacher does: its processor, its labels.
        folder: Of an adapter; None of a whole model.
    """

    recipe: Recipe
    task: Task
    folder: Path | None
    _model: nn.Module | None = None
    _fingerprint: str = ""

    @property
    def spec(self) -> DistillSpec:
        """The recipe's section."""
        spec = self.recipe.train.distill
        assert spec is not None
        return spec

    def load_processor(self) -> None:
        """Load the teacher's tokenizer and configuration, but no weights."""
        with errors_of_teacher(self.recipe):
            self.task.load_processor()

    def cache_key(self) -> list[str]:
        """Return what the teacher's answers depend on besides its tensors and the rows."""
        facts = self.task.base_facts
        return ["taught", *self.task.cache_key(), str(sorted(facts["config"].items()))]

    def model(self) -> nn.Module:
        """Return the teacher in eval mode, loaded the first time, without gradients.

        Raises:
            LoraError: If a part of it is not trained, as the head of a plain language model.
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
        """Let go of the model, whose answers are kept."""
        self._model = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        spec = self.spec
        named = {"name": spec.teacher, "revision": spec.revision, "fingerprint": self._fingerprint}
        return {**named, "temperature": spec.temperature, "weight": spec.weight}


def open_teacher(recipe: Recipe, **task: Any) -> Teacher:
    """Return the recipe's teacher; its configuration is read, and no weights.

    Args:
        recipe: The student's.
        task: What differs in its `task` section: by key, or the whole section as `task`.

    Raises:
        LoraError: If there is no such model or adapter, or if it was trained for something else.
    """
    spec = recipe.train.distill
    assert spec is not None
    with errors_of_teacher(recipe):
        folder = _adapter_folder(spec, recipe)
        values = {"train.distill": None, "adapter": AdapterSpec(type="none"), **task}
        values["model"] = _model(spec.teacher, recipe, spec.revision)
        own = recipe.with_values(values | ({} if folder is None else _of_adapter(folder, recipe)))
        if recipe.task.label_columns_by_key and not (folder and _has_recipe(folder)):
            config = load_config(own)
            if folder is None:
                _require_same_problem(config, recipe)
            names: dict[int, str] = config.id2label or {}
            own = own.with_values({"task.labels": [str(names[i]) for i in sorted(names)]})
        found = build_task(own)
        found.trained_in = folder
    return Teacher(recipe, found, folder)


@contextmanager
def errors_of_teacher(recipe: Recipe) -> Iterator[None]:
    """Let errors within the context say that they are about the teacher, and where it is named."""
    try:
        yield
    except LoraError as error:
        at = recipe.at(KEY)
        found = [
            replace(p, what=p.what if p.at == at else f"the teacher: {p.what}", at=at)
            for p in error.problems
        ]
        raise type(error)(found) from error


def _model(name: str, recipe: Recipe, revision: str = "main") -> ModelSpec:
    trusted = recipe.model.trust_remote_code
    return ModelSpec(name=name, revision=revision, trust_remote_code=trusted)


def _has_recipe(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def _require_same_problem(config: PretrainedConfig, recipe: Recipe) -> None:
    """Check that a whole model answers as the student does: with one label, or several.

    Raises:
        LoraError: If its config.json says otherwise: its outputs would be read as something else.
    """
    named, ours = getattr(config, "problem_type", None), getattr(recipe.task, "problem", None)
    theirs = PROBLEMS.get(str(named), ours)
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
            locate(str(path), at)  # which says what is there instead
        if (path / "config.json").is_file() and not (path / CONFIG_FILE).is_file():
            return None
        return find_adapter_folder(str(path), at)
    revision = "" if spec.revision == "main" or "@" in name else f"@{spec.revision}"
    if "@" in name or name.startswith("hf:"):
        return find_adapter_folder(name + revision, at)
    if find_adapter_config_file(name, revision=spec.revision) is None:
        return None
    return find_adapter_folder(name + revision, at)


def _of_adapter(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what an adapter's own recipe, or PEFT's configuration, says of its model and labels.

    Raises:
        LoraError: If it was trained for another task.
    """
    if not _has_recipe(folder):
        base = read_adapter(folder).config.get("base_model_name_or_path")
        if not base:
            raise LoraError(f"{folder} does not name its base", hint="name a whole model")
        return {"model": _model(str(base), recipe)}
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
        values |= {"task.labels": labels, **_reading(trained)}
    return values


def _require_same_texts(trained: Recipe, recipe: Recipe) -> None:
    """Check that a teacher was trained on as many texts a row as the student reads.

    Raises:
        LoraError: If one of them reads pairs, and the other does not.
    """
    theirs, ours = (r.task.input_columns_by_key for r in (trained, recipe))
    if len(theirs) != len(ours):
        what = f"it was trained on {counted(len(theirs), 'text')} a row, and the recipe names "
        hint = "set `task.text_pair_column` as it was for the teacher, or name another teacher"
        raise LoraError(f"{what}{len(ours)}", hint=hint)


def _reading(trained: Recipe) -> dict[str, Any]:
    """Return how an adapter's recipe cuts and divides texts; the student may do it otherwise."""
    task = trained.task
    keys = {f"task.{key}": getattr(task, key) for key in READING if hasattr(task, key)}
    cut = getattr(task, "truncate", "right")  # what was left out or rejected then is cut now
    return keys | {"task.truncate": cut if cut == "left" else "right"}
