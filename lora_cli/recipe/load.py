"""Load a YAML file and `--set` overrides as a validated `Recipe`, and write it as YAML."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_cli.errors import LoraError, Problem, nearest
from lora_cli.files import read_bounded
from lora_cli.format_version import require_format
from lora_cli.paths import expanded, path_problem
from lora_cli.recipe.computing_keys import check_recipe_file
from lora_cli.recipe.schema_errors import explain
from lora_cli.recipe.set_values import parse_value
from lora_cli.recipe.spec import Origin, Recipe, SourceSpec, is_file
from lora_cli.recipe.spec.train import READ_BY
from lora_cli.recipe.yaml_reader import Reader, YamlDumper, parse
from lora_cli.redaction import redacted

MAX_BYTES = 200_000  # takes a second to parse; recipes are about a hundred times smaller
MAX_ADAPTER_RECIPE_BYTES = 5_000_000  # a recipe saved with an adapter lists all labels
RECIPE_FILE = "recipe.yaml"  # in the folder of an adapter
MAX_PROBLEMS = 20
FORMAT_HINT = (
    "leave it out (`task.format` and `data.format` are other keys); if a newer lora wrote the "
    "recipe, upgrade: `pip install --upgrade lora-cli`"
)
# A recipe may contain only one key of each pair. A key of `--set` replaces the other in the file.
NEUTRAL_VALUES = (None, False, "exact", "openai")  # with these values, a key excludes no other
EXCLUSIVE_KEYS = [
    ("train.epochs", "train.max_steps"),
    ("train.gradient_accumulation_steps", "train.examples_per_step"),
    ("train.scheduler.warmup_steps", "train.scheduler.warmup_ratio"),
    ("train.packing", "train.group_by_length"),
    ("data.name", "data.path"),
    ("data.config", "data.path"),
    ("data.name", "data.split_column"),
    *itertools.product(["data.mix"], ["data.name", "data.path"]),
    ("data.validation.group_by", "data.validation.disjoint"),
    ("data.test.group_by", "data.test.disjoint"),
    ("task.label_columns", "task.label_separator"),
    *itertools.product(["task.text_column"], ["task.prompt_column", "task.completion_column"]),
    *itertools.product(
        ["task.messages_column", "task.format"],
        ["task.text_column", "task.prompt_column", "task.completion_column"],
    ),
]


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    trained: bool = False,
) -> Recipe:
    """Read a recipe, apply overrides, and check it against the schema.

    Args:
        path: The YAML file.
        overrides: Texts of the form `key=value`. Keys have dots (`train.epochs=1`); values are
            plain text, numbers, or lists and mappings in brackets.
        max_bytes: Largest allowed size of the file.
        trained: Whether an adapter was already trained with the recipe. Keys without effect are
            then no errors, since earlier versions allowed them.

    Returns:
        The recipe, with absolute paths of data and local models. Paths in the file are relative to
        the file, paths in an override to the working directory.

    Raises:
        LoraError: With every problem in the recipe, each with its line.
    """
    file = Path(path)
    data, reader = parse(_text_of(file, max_bytes), str(path))
    if not isinstance(data, dict):
        raise LoraError(
            "the recipe is empty" if data is None else "a recipe is a mapping of keys to values",
            f"{path}:1",
            "it needs the sections `model`, `task` and `data`",
        )
    for override in overrides:
        _override(data, reader, override)
    _drop_replaced_keys(data, reader, overrides)
    if trained:
        _drop_unread_keys(data)
    # first, since another version of the format may have other keys
    if "format" not in reader.invalid_keys:
        place = reader.places.get("format", str(path))
        require_format(data, f"format ({place})", FORMAT_HINT)
    try:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            if not _restore_texts(data, reader.typed, error):
                raise
            recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = explain(error, data, reader.places, reader.invalid_keys)
        raise LoraError(_limited(reader.problems + found)) from None
    if reader.problems:
        raise LoraError(_limited(reader.problems))
    return _with_absolute_paths(recipe.with_origin(Origin(reader.places)), file.parent)


def _restore_texts(data: dict[str, Any], typed: dict[str, str], error: ValidationError) -> bool:
    """Restore the typed text of `--set` values that look like numbers, for keys that need text.

    Args:
        data: The recipe's values, which are changed in place.
        typed: Values of flags as they were typed, by key.
        error: The errors of validating `data`.

    Returns:
        Whether any value was restored.
    """
    wanted = [found["loc"] for found in error.errors() if found["type"] == "string_type"]
    restored = False
    for key, text in typed.items():
        *sections, last = key.split(".")
        # between the names of sections, a location also contains names of union members
        if not any(loc[0] == (*sections, last)[0] and last in loc for loc in wanted):
            continue
        section: Any = data
        for name in sections:
            section = section[name]
        if isinstance(section[last], bool | int | float):
            section[last] = text
            restored = True
    return restored


def load_adapter_recipe(adapter: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe saved with an adapter, which may come from anybody.

    Only an override by the user can allow running code or using another base: in the file, these
    keys are ignored. The origin of the metrics is recorded, since a metric may be code as well.

    Raises:
        IntegrityError: If edits contradict what the adapter was trained with.
    """
    file = adapter / RECIPE_FILE
    check_recipe_file(adapter, load_recipe(file, (), MAX_ADAPTER_RECIPE_BYTES, trained=True), file)
    recipe = load_recipe(file, overrides, MAX_ADAPTER_RECIPE_BYTES, trained=True)
    overridden = {override.partition("=")[0].strip() for override in overrides}
    for key in ("model.trust_remote_code", "model.allow_other_base"):
        if not overridden & {"model", key}:
            recipe = recipe.with_values({key: False})
    of_adapter = not overridden & {"evaluate", "evaluate.metrics"}
    return recipe.with_origin(replace(recipe.origin, metrics_of_adapter=of_adapter))


def _limited(problems: list[Problem]) -> list[Problem]:
    """Return the first problems, and one more that says how many are not shown."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = f"{len(problems) - MAX_PROBLEMS + 1:,} more problems are not shown"
    first = problems[: MAX_PROBLEMS - 1]
    return [*first, Problem(more, first[-1].at, "fix those above first")]


def _text_of(file: Path, max_bytes: int) -> str:
    try:
        raw = read_bounded(file, max_bytes)
    except OSError as error:
        if error.errno == errno.EFBIG:
            what = f"the recipe has more than {max_bytes:,} bytes"
            raise LoraError(what, str(file), "is this a data file, or a device?") from error
        if error.errno == errno.ETIMEDOUT:
            what = "nothing is written into this pipe"
            raise LoraError(what, str(file), "name a file, or write `<(COMMAND)`") from error
        raise _cannot_read(file, error) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise LoraError(
            "the recipe is not UTF-8 text", f"{file}:{line}", "save it as UTF-8"
        ) from error


def _cannot_read(file: Path, error: OSError) -> LoraError:
    if file.is_dir():
        inside = file / "recipe.yaml"
        known = inside.is_file()
        meant = f"did you mean `{inside}`?" if known else "name the YAML file in it"
        return LoraError("this is a folder, not a recipe", str(file), meant)
    missing = isinstance(error, FileNotFoundError)
    reason = "there is no such file" if missing else (error.strerror or str(error))
    recipes = {other.name: other for other in file.parent.glob("*.y*ml")}
    close = nearest(file.name, recipes)
    hint = (
        f"did you mean `{recipes[close]}`?" if close else "`lora init DATA --model NAME` writes one"
    )
    if not missing:
        hint = f"check it with `ls -l {shlex.quote(str(file))}`"
    return LoraError(f"cannot read the recipe: {reason.lower()}", str(file), hint)


def _override(data: dict[str, Any], reader: Reader, override: str) -> None:
    """Put the value of a `--set` flag into the recipe; add problems to the reader."""
    key, equals, text = override.partition("=")
    key = key.strip()
    *sections, last = key.split(".")
    flag = f"--set {override}"
    if not equals or not last or not all(sections):
        hint = "for example `--set train.epochs=1`"
        reader.problems.append(Problem("an override is written `key=value`", flag, hint))
        return
    section: Any = data
    for i, name in enumerate(sections):
        if section.get(name) is None:
            section[name] = {}
            reader.places[".".join(sections[: i + 1])] = flag
        section = section[name]
        if not isinstance(section, dict):
            what = f"`{name}` is not a section in this recipe, so `{key}` cannot be set"
            whole = ".".join(sections[: i + 1])
            hint = f"set the whole of it: `--set {whole}=…`"
            reader.problems.append(Problem(what, flag, hint))
            return
    try:
        section[last], flag_reader = parse_value(text, flag, (*sections, last))
    except LoraError as error:
        reader.problems += error.problems
        return
    for known in (reader.places, reader.invalid_keys):
        for old in [k for k in known if k == key or k.startswith(key + ".")]:
            known.pop(old) if isinstance(known, dict) else known.discard(old)
    reader.places |= flag_reader.places | {key: flag}
    reader.invalid_keys |= flag_reader.invalid_keys
    reader.problems += flag_reader.problems
    for old in [k for k in reader.typed if k == key or k.startswith(key + ".")]:
        del reader.typed[old]
    reader.typed |= flag_reader.typed


def _drop_replaced_keys(data: dict[str, Any], reader: Reader, overrides: Sequence[str]) -> None:
    """Drop each key of the file that excludes a key which is set by an override.

    If both keys are in the file, or both in overrides, they stay and fail validation.
    """
    overridden = {override.partition("=")[0].strip() for override in overrides}
    for one, other in EXCLUSIVE_KEYS:
        for new, old in ((one, other), (other, one)):
            if _is_set(data, new, overridden) and not _is_set(data, old, overridden):
                *sections, last = old.split(".")
                section = _section(data, sections)
                if section is not None and section.pop(last, None) is not None:
                    reader.places.pop(old, None)
                    reader.invalid_keys.discard(old)


def _drop_unread_keys(data: dict[str, Any]) -> None:
    """Drop each key that the chosen optimizer or `adapter.init` does not read."""
    optimizer = _section(data, ["train", "optimizer"]) or {}
    for key, type_ in READ_BY.items():
        if not str(optimizer.get("type", "adamw")).startswith(type_):
            optimizer.pop(key, None)
    adapter = _section(data, ["adapter"]) or {}
    if adapter.get("init", "default") != "eva":
        adapter.pop("eva_rho", None)


def _section(data: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the section at the end of a path of names, or None if there is none."""
    section: Any = data
    for name in names:
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _is_set(data: dict[str, Any], key: str, overridden: Collection[str]) -> bool:
    """Return whether an override sets a key, or a section around it, to a value that excludes."""
    *sections, last = key.split(".")
    around = {".".join([*sections, last][:depth]) for depth in range(1, len(sections) + 2)}
    value = (_section(data, sections) or {}).get(last)
    return bool(around & set(overridden)) and value not in NEUTRAL_VALUES


class _PathResolver:
    """Makes the paths of a recipe absolute, and collects the problems of invalid paths."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.problems: list[Problem] = []

    def start_of(self, key: str) -> Path:
        return Path.cwd() if self.recipe.is_overridden(key) else self.folder

    def check(self, key: str, value: str, start: Path) -> None:
        problem = path_problem(value, self.recipe.at(key), start)
        self.problems.extend([problem] if problem is not None else [])

    def absolute(self, key: str, value: str) -> str:
        start = self.start_of(key)
        self.check(key, value, start)
        return str((start / expanded(value)).absolute())

    def folder_or_name(self, key: str, value: str) -> str:
        """Return the absolute path of a folder; other names, such as Hub ids, unchanged."""
        start = self.start_of(key)
        if value.startswith((".", "/", "~")) or os.path.isdir(start / expanded(value)):
            return self.absolute(key, value)
        self.check(key, value, start)
        return value

    def source_paths(self, source: SourceSpec, section: str) -> dict[str, str]:
        """Return the absolute paths from which a source reads rows, by key."""
        found = {}
        if source.path is not None:
            found["path"] = self.absolute(f"{section}.path", source.path)
        if source.name is not None:
            found["name"] = self.folder_or_name(f"{section}.name", source.name)
        for key in ("train", "validation", "test"):
            value = getattr(source, key)
            # in a Hub data set, `train` is a split, even if it looks like a file
            if not source.name and isinstance(value, str) and is_file(value.strip()):
                found[key] = self.absolute(f"{section}.{key}", value)
        return found


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with absolute paths; in `output_dir`, only `~` is expanded.

    Raises:
        LoraError: With every invalid path.
    """
    resolver = _PathResolver(recipe, folder)
    paths = {"model.name": resolver.folder_or_name("model.name", recipe.model.name)}
    if recipe.adapter.from_:
        paths["adapter.from_"] = resolver.folder_or_name("adapter.from", recipe.adapter.from_)
    if recipe.train.distill is not None:
        key = "train.distill.teacher"
        paths[key] = resolver.folder_or_name(key, recipe.train.distill.teacher)
    mirror = recipe.checkpoint.mirror
    if mirror and "://" not in mirror:
        paths["checkpoint.mirror"] = resolver.absolute("checkpoint.mirror", mirror)
    paths |= {
        f"data.{key}": path for key, path in resolver.source_paths(recipe.data, "data").items()
    }
    mix = recipe.data.mix.items()
    sets = {
        name: one.with_values(resolver.source_paths(one, f"data.mix.{name}")) for name, one in mix
    }
    for key in recipe.task.local_files:
        paths[f"task.{key}"] = resolver.absolute(f"task.{key}", getattr(recipe.task, key))
    for key, name in recipe.task.models_by_key.items():
        paths[f"task.{key}"] = resolver.folder_or_name(f"task.{key}", name)
    for key in recipe.task.local_folders:
        section, name = key.split(".")
        value = getattr(getattr(recipe.task, section), name)
        paths[f"task.{key}"] = resolver.absolute(f"task.{key}", value)
    resolver.check("output_dir", recipe.output_dir, Path.cwd())
    paths["output_dir"] = expanded(recipe.output_dir)
    if resolver.problems:
        raise LoraError(resolver.problems)
    return recipe.with_values({**paths, "data.mix": sets})


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with defaults, absolute paths and masked secrets."""
    values = _without_unset(recipe)
    text = yaml.dump(values, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, width=1000)
    return redacted(text)


def _without_unset(section: BaseModel) -> dict[str, Any]:
    """Return the values of a section without those that are empty, unless the default is not."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None and field.default is None:
            continue
        if isinstance(value, BaseModel):
            value = _without_unset(value)
        elif isinstance(value, dict):
            value = {
                key: _without_unset(item) if isinstance(item, BaseModel) else item
                for key, item in value.items()
            }
        if value not in ({}, []) or field.default_factory is None:
            values[field.alias or name] = value
    return values
