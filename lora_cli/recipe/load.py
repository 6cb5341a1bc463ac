"""From a YAML file and `--set` overrides to a checked `Recipe`, and back."""

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

MAX_BYTES = 200_000  # a second of reading; a recipe has a hundredth of it
MAX_OWN_BYTES = 5_000_000  # beside an adapter, where all labels are named that were found
RECIPE_FILE = "recipe.yaml"  # beside an adapter
MAX_PROBLEMS = 20
OTHER_FORMAT = (
    "leave it out (`task.format` and `data.format` are other keys); if a newer lora wrote the "
    "recipe, upgrade: `pip install --upgrade lora-cli`"
)
# Of each pair, a recipe has at most one. A key of `--set` replaces the other one of the file.
EXCLUDES_NOTHING = (None, False, "exact", "openai")  # values of these keys that go with the other
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
    most_bytes: int = MAX_BYTES,
    trained: bool = False,
) -> Recipe:
    """Read a recipe, apply overrides, and check it against the schema.

    Args:
        path: The YAML file.
        overrides: `key=value` each, the key with dots (`train.epochs=1`), the value a text as it
            is, a number, or a list or a mapping in brackets.
        most_bytes: Largest size of the file.
        trained: The recipe was trained by, so that a setting without effect is no error: earlier
            versions allowed it.

    Returns:
        The recipe. Paths of data and local models in it are absolute: those written in the file
        were relative to the file, those of an override to the working directory.

    Raises:
        LoraError: With every problem that the schema finds, each with its line.
    """
    file = Path(path)
    data, reader = parse(_text_of(file, most_bytes), str(path))
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
    if "format" not in reader.faulty:  # before its keys are read, which may be others
        place = reader.places.get("format", str(path))
        require_format(data, f"format ({place})", OTHER_FORMAT)
    try:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            if not _restore_texts(data, reader.typed, error):
                raise
            recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = explain(error, data, reader.places, reader.faulty)
        raise LoraError(_first(reader.problems + found)) from None
    if reader.problems:
        raise LoraError(_first(reader.problems))
    return _with_absolute_paths(recipe.with_origin(Origin(reader.places)), file.parent)


def _restore_texts(data: dict[str, Any], typed: dict[str, str], error: ValidationError) -> bool:
    """Put back what was typed where text is wanted and a flag's value looked like a number.

    Args:
        data: The recipe's values, which are changed.
        typed: Values of flags as they were typed, by key.
        error: What the schema finds wrong.

    Returns:
        Whether any value was put back.
    """
    wanted = [found["loc"] for found in error.errors() if found["type"] == "string_type"]
    restored = False
    for key, text in typed.items():
        *sections, last = key.split(".")
        # a location has the names of alternatives between those of the sections
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
    """Read the recipe beside an adapter, which may be anybody's.

    What only the user may allow, to run code and to take another base, counts in an override alone.
    Metrics that are code of their own count as code too.

    Raises:
        IntegrityError: If it was edited, and says otherwise what the adapter was trained with.
    """
    file = adapter / RECIPE_FILE
    check_recipe_file(adapter, load_recipe(file, (), MAX_OWN_BYTES, trained=True), file)
    recipe = load_recipe(file, overrides, MAX_OWN_BYTES, trained=True)
    said = {override.partition("=")[0].strip() for override in overrides}
    for key in ("model.trust_remote_code", "model.allow_other_base"):
        if not said & {"model", key}:
            recipe = recipe.with_values({key: False})
    of_adapter = not said & {"evaluate", "evaluate.metrics"}
    return recipe.with_origin(replace(recipe.origin, metrics_of_adapter=of_adapter))


def _first(problems: list[Problem]) -> list[Problem]:
    """Return so many problems as a person reads, and how many more there are."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = f"{len(problems) - MAX_PROBLEMS + 1:,} more problems are not shown"
    first = problems[: MAX_PROBLEMS - 1]
    return [*first, Problem(more, first[-1].at, "fix those above first")]


def _text_of(file: Path, most_bytes: int) -> str:
    try:
        raw = read_bounded(file, most_bytes)
    except OSError as error:
        if error.errno == errno.EFBIG:
            what = f"the recipe has more than {most_bytes:,} bytes"
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
    """Put the value of a `--set` flag into the recipe; what is wrong goes to the reader."""
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
    for known in (reader.places, reader.faulty):
        for old in [k for k in known if k == key or k.startswith(key + ".")]:
            known.pop(old) if isinstance(known, dict) else known.discard(old)
    reader.places |= flag_reader.places | {key: flag}
    reader.faulty |= flag_reader.faulty
    reader.problems += flag_reader.problems
    for old in [k for k in reader.typed if k == key or k.startswith(key + ".")]:
        del reader.typed[old]
    reader.typed |= flag_reader.typed


def _drop_replaced_keys(data: dict[str, Any], reader: Reader, overrides: Sequence[str]) -> None:
    """Drop each key of the file that excludes a key which an override sets.

    Two such keys in the file, or in the overrides, stay, and are an error of the schema.
    """
    said = {override.partition("=")[0].strip() for override in overrides}
    for one, other in EXCLUSIVE_KEYS:
        for new, old in ((one, other), (other, one)):
            if _is_set(data, new, said) and not _is_set(data, old, said):
                *sections, last = old.split(".")
                section = _section(data, sections)
                if section is not None and section.pop(last, None) is not None:
                    reader.places.pop(old, None)
                    reader.faulty.discard(old)


def _drop_unread_keys(data: dict[str, Any]) -> None:
    """Drop each key that the optimizer or the start of the adapter does not read."""
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


def _is_set(data: dict[str, Any], key: str, said: Collection[str]) -> bool:
    """Return whether an override gives a key, or the section around it, a value that counts."""
    *sections, last = key.split(".")
    around = {".".join([*sections, last][:depth]) for depth in range(1, len(sections) + 2)}
    value = (_section(data, sections) or {}).get(last)
    return bool(around & set(said)) and value not in EXCLUDES_NOTHING


class _Paths:
    """Makes the paths of a recipe absolute, and collects those that are not what they should be."""

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

    def named(self, key: str, value: str) -> str:
        """Return a folder, or what has another meaning, such as a Hub id."""
        start = self.start_of(key)
        if value.startswith((".", "/", "~")) or os.path.isdir(start / expanded(value)):
            return self.absolute(key, value)
        self.check(key, value, start)
        return value

    def of_rows(self, source: SourceSpec, section: str) -> dict[str, str]:
        """Return the absolute paths of where rows come from, by key."""
        found = {}
        if source.path is not None:
            found["path"] = self.absolute(f"{section}.path", source.path)
        if source.name is not None:
            found["name"] = self.named(f"{section}.name", source.name)
        for key in ("train", "validation", "test"):
            value = getattr(source, key)
            # with a Hub data set, `train` may be anything but a file
            if not source.name and isinstance(value, str) and is_file(value.strip()):
                found[key] = self.absolute(f"{section}.{key}", value)
        return found


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe whose paths are absolute; that of the output stays as it is, but for `~`.

    Raises:
        LoraError: With every path that is not what its author means.
    """
    own = _Paths(recipe, folder)
    paths = {"model.name": own.named("model.name", recipe.model.name)}
    if recipe.adapter.from_:
        paths["adapter.from_"] = own.named("adapter.from", recipe.adapter.from_)
    if recipe.train.distill is not None:
        key = "train.distill.teacher"
        paths[key] = own.named(key, recipe.train.distill.teacher)
    mirror = recipe.checkpoint.mirror
    if mirror and "://" not in mirror:
        paths["checkpoint.mirror"] = own.absolute("checkpoint.mirror", mirror)
    paths |= {f"data.{key}": path for key, path in own.of_rows(recipe.data, "data").items()}
    mix = recipe.data.mix.items()
    sets = {name: one.with_values(own.of_rows(one, f"data.mix.{name}")) for name, one in mix}
    for key in recipe.task.local_files:
        paths[f"task.{key}"] = own.absolute(f"task.{key}", getattr(recipe.task, key))
    for key, name in recipe.task.models_by_key.items():
        paths[f"task.{key}"] = own.named(f"task.{key}", name)
    for key in recipe.task.local_folders:
        section, name = key.split(".")
        value = getattr(getattr(recipe.task, section), name)
        paths[f"task.{key}"] = own.absolute(f"task.{key}", value)
    own.check("output_dir", recipe.output_dir, Path.cwd())
    paths["output_dir"] = expanded(recipe.output_dir)
    if own.problems:
        raise LoraError(own.problems)
    return recipe.with_values({**paths, "data.mix": sets})


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: defaults written out, paths absolute, secrets masked."""
    values = _without_unset(recipe)
    text = yaml.dump(values, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, width=1000)
    return redacted(text)


def _without_unset(section: BaseModel) -> dict[str, Any]:
    """Return the values of a section; what is empty stays where it is not so by default."""
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
