"""From a YAML file and `--set` overrides to a checked `Recipe`, and back.

YAML is read as its version 1.2 means it: `2e-5` is a number, `no` is a word, a key stands once.
Every value remembers its line, so that an error, however late, can name it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_cli.errors import LoraError, Problem, did_you_mean, nearest
from lora_cli.recipe.spec import Recipe, is_file

MAX_NODES = 10_000  # a recipe has a hundred; aliases inside aliases have billions
MAX_BYTES = 1_000_000

KeyPath = tuple[str | int, ...]


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: PyYAML's own reads `no` as false and `2e-5` as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Reader:
    """Turns YAML nodes into Python values, and notes the line of each key path."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.nodes = 0

    def value(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > 30:
            raise LoraError(
                "the recipe is too large or too deep",
                self.file,
                "aliases that repeat or contain themselves are not for recipes",
            )
        self.places.setdefault(_dotted(path), f"{self.file}:{node.start_mark.line + 1}")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            match kind:
                case "str":
                    return node.value
                case "null":
                    return None
                case "bool":
                    return node.value.lower() == "true"
                case "int":
                    return int(node.value[:400].replace("_", ""))
                case "float":
                    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
        self.problems.append(
            Problem(f"`{node.tag}` is a tag that recipes do not use", self._at(node, path))
        )
        return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem("a key must be a word", self._at(key_node, path)))
                continue
            key = key_node.value
            here = (*path, key)
            if key in result:
                first = self.places[_dotted(here)]
                self.problems.append(
                    Problem(
                        f"`{key}` stands twice",
                        self._at(key_node, here),
                        f"the first is at {first}; keep one",
                    )
                )
                continue
            self.places[_dotted(here)] = f"{self.file}:{key_node.start_mark.line + 1}"
            result[key] = self.value(value_node, here)
        return result

    def _at(self, node: yaml.Node, path: KeyPath) -> str:
        place = f"{self.file}:{node.start_mark.line + 1}"
        return f"{_dotted(path)} ({place})" if path else place


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _parse(text: str, file: str) -> tuple[Any, _Reader]:
    try:
        node = yaml.compose(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "it cannot be read"
        at = f"{file}:{mark.line + 1}" if mark else file
        hint = "indent with spaces; YAML does not take tabs" if "\\t" in str(what) else None
        raise LoraError(f"not valid YAML: {what}", at, hint) from error
    except RecursionError as error:
        raise LoraError("the recipe is too deep", file) from error
    reader = _Reader(file)
    return (reader.value(node) if node is not None else None), reader


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check it against the schema.

    Args:
        path: The YAML file.
        overrides: `key=value` each, the key with dots (`train.epochs=1`), the value in YAML.

    Returns:
        The recipe. Paths of data and local models in it are absolute: those written in the file
        were relative to the file, those of an override to the working directory.

    Raises:
        LoraError: With every problem that the schema finds, each with its line.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        reason = "there is no such file" if not file.exists() else (error.strerror or str(error))
        others = [str(other) for other in file.parent.glob("*.y*ml")]
        close = nearest(str(file), others)
        raise LoraError(
            f"cannot read the recipe: {reason}",
            str(path),
            f"did you mean `{close}`?" if close else None,
        ) from error
    if len(raw) > MAX_BYTES:
        raise LoraError("this is too large for a recipe", str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise LoraError(
            "the recipe is not UTF-8 text", f"{path}:{line}", "save it as UTF-8"
        ) from error
    data, reader = _parse(text, str(path))
    places, problems = reader.places, reader.problems
    if not isinstance(data, dict):
        raise LoraError("a recipe is a mapping with the keys `model`, `task` and `data`", str(path))
    for override in overrides:
        problems += _override(data, places, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise LoraError(problems + _explain(error, data, places)) from None
    if problems:
        raise LoraError(problems)
    recipe._places = places
    _make_paths_absolute(recipe, file.parent)
    return recipe


def _override(data: dict[str, Any], places: dict[str, str], override: str) -> list[Problem]:
    key, equals, text = override.partition("=")
    flag = f"--set {override}"
    if not equals or not all(key.split(".")):
        raise LoraError(
            "an override is written `key=value`", flag, "for example `--set train.epochs=1`"
        )
    value, reader = _parse(text, flag)
    parts = key.strip().split(".")
    section: Any = data
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise LoraError(
                f"`{part}` is not a section in this recipe, so `{key}` cannot be set", flag
            )
    section[parts[-1]] = value
    for place in [p for p in places if p == key or p.startswith(key + ".")]:
        del places[place]
    places[key] = flag
    return reader.problems


def _make_paths_absolute(recipe: Recipe, folder: Path) -> None:
    def absolute(key: str, value: str) -> str:
        base = Path.cwd() if recipe._places.get(key, "").startswith("--set") else folder
        return str((base / Path(value).expanduser()).absolute())

    name = recipe.model.name
    if name.startswith((".", "/", "~")) or Path(absolute("model.name", name)).is_dir():
        recipe.model.name = absolute("model.name", name)
    data = recipe.data
    if data.path is not None:
        data.path = absolute("data.path", data.path)
    for split in ("train", "validation", "test"):
        value = getattr(data, split)
        # with a Hub data set, `train` may be anything but a file
        if not data.name and is_file(value):
            setattr(data, split, absolute(f"data.{split}", value))
    if recipe.task.type == "causal_lm" and recipe.task.chat_template:
        recipe.task.chat_template = absolute("task.chat_template", recipe.task.chat_template)


# ---------------------------------------------------------------- what the schema says of a fault


def _explain(error: ValidationError, data: Any, places: dict[str, str]) -> list[Problem]:
    """Turn pydantic's errors into problems: one a key, with its line and the field's own text."""
    by_key: dict[str, list[tuple[KeyPath, Any]]] = {}
    for fault in error.errors(include_url=False):
        path = _path_in(data, fault["loc"])
        by_key.setdefault(_dotted(path), []).append((path, fault))
    problems = []
    for key, faults in by_key.items():
        path, fault = faults[0]
        section = _dotted(path[:-1])
        place = places.get(key) or places.get(section) or places.get("")
        at = " ".join(filter(None, (key, f"({place})" if place else "")))
        schema = _schema_at(path[:-1], data)
        name = str(path[-1]) if path else ""
        match fault["type"]:
            case "extra_forbidden":
                problems.append(Problem(f"unknown key `{name}`", at, _where_else(name, schema)))
            case "missing":
                text = _description(schema.get("properties", {}).get(name, {}))
                what = f"`{name}` is missing" + (f" from `{section}`" if section else "")
                problems.append(Problem(what, at, text))
            case "conflict" | "split":
                problems.append(Problem(fault["msg"], at))
            case "union_tag_invalid" | "union_tag_not_found":
                tags = re.findall(r"'(\w+)'", fault["ctx"].get("expected_tags", ""))
                given = str(fault["ctx"].get("tag", ""))
                what = f"unknown type `{given}`" if given else "`type` is missing"
                problems.append(Problem(what, at, did_you_mean(given, tags)))
            case "literal_error":
                options = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
                problems.append(
                    Problem(
                        f"`{fault['input']}` is not a choice here",
                        at,
                        did_you_mean(str(fault["input"]), options),
                    )
                )
            case _:
                wanted = " or ".join(dict.fromkeys(_wanted(f["msg"]) for _, f in faults))
                text = _description(schema.get("properties", {}).get(name, {}))
                given = json.dumps(fault["input"], default=str, ensure_ascii=False)
                problems.append(Problem(f"`{given}` should be {wanted}", at, text))
    return problems


def _wanted(message: str) -> str:
    for beginning in ("Input should be ", "Value should be ", "Input should "):
        message = message.removeprefix(beginning)
    names = {
        "a valid string": "text",
        "a valid integer": "a whole number",
        "a valid number": "a number",
        "a valid boolean": "true or false",
        "a valid list": "a list",
        "a valid dictionary": "a section with keys",
        "String should match pattern": "of another form",
    }
    for pydantic_name, name in names.items():
        if message.startswith(pydantic_name):
            return name
    return message


def _path_in(data: Any, location: Sequence[str | int]) -> KeyPath:
    """Drop from pydantic's location what is not in the recipe: names of union members."""
    path: list[str | int] = []
    node = data
    for i, part in enumerate(location):
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]  # narrowed just above
            path.append(part)
        elif i == len(location) - 1 and isinstance(node, dict) and part not in _MEMBER_NAMES:
            path.append(part)  # the key that is missing
    return tuple(path)


_MEMBER_NAMES = (
    "str",
    "int",
    "float",
    "bool",
    "list[str]",
    "list[int]",
    "none",
    "named",
    "held_out",
    "constrained-str",
    "dict[str,float]",
    "[key]",
)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora recipe",
        **{key: value for key, value in _one_line(schema).items() if key != "title"},
    }


def _one_line(node: Any) -> Any:
    """Join descriptions that were broken over lines, and drop titles that repeat the key."""
    if isinstance(node, dict):
        return {
            key: " ".join(value.split())
            if key == "description" and isinstance(value, str)
            else _one_line(value)
            for key, value in node.items()
            if key != "title" or isinstance(value, dict)
        }
    return [_one_line(child) for child in node] if isinstance(node, list) else node


def _schema_at(path: KeyPath, data: Any) -> dict[str, Any]:
    """Return the schema of the section at `path`; of a union, the member that `type` names."""
    root = recipe_schema()

    def resolve(node: dict[str, Any], value: Any) -> dict[str, Any]:
        if "$ref" in node:
            return resolve(root["$defs"][node["$ref"].rsplit("/", 1)[-1]], value)
        members = [resolve(member, value) for member in node.get("anyOf", node.get("oneOf", []))]
        members = [member for member in members if "properties" in member]
        given = value.get("type") if isinstance(value, dict) else None
        for member in members:
            if member["properties"].get("type", {}).get("const") == given:
                return member
        return members[0] if members else node

    node, value = resolve(root, data), data
    for part in path:
        value = value[part] if isinstance(value, dict | list) else None  # type: ignore[index]
        child = node.get("properties", {}).get(part) or node.get("additionalProperties")
        if not isinstance(child, dict):
            return {}
        node = resolve(child, value)
    return node


def _description(field: dict[str, Any]) -> str | None:
    text = field.get("description")
    return str(text) if text else None


def _where_else(name: str, section: dict[str, Any]) -> str:
    """Return a hint for an unknown key: the nearest one here, or the section it belongs to."""
    here = list(section.get("properties", {}))
    if nearest(name, here):
        return f"did you mean `{nearest(name, here)}`?"
    for path in _all_keys():
        if path.rsplit(".", 1)[-1] == name:
            return f"did you mean `{path}`?"
    return "known keys here: " + ", ".join(here)


def _all_keys() -> Iterator[str]:
    root = recipe_schema()

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        for member in node.get("anyOf", node.get("oneOf", [])):
            yield from walk(member, prefix)
        for key, child in node.get("properties", {}).items():
            yield prefix + key
            yield from walk(child, f"{prefix}{key}.")

    return walk(root, "")


class _Dumper(yaml.SafeDumper):
    """Block style, in the order of the schema."""


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: defaults written out, paths absolute."""
    values = _without_unset_nulls(recipe)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _without_unset_nulls(section: BaseModel) -> dict[str, Any]:
    """Return the values of a section; a null stays where it says more than the default does."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None and field.default is None:
            continue
        if isinstance(value, BaseModel):
            value = _without_unset_nulls(value)
        elif isinstance(value, dict):
            value = {
                key: _without_unset_nulls(item) if isinstance(item, BaseModel) else item
                for key, item in value.items()
            }
        if value not in ({}, []):
            values[field.alias or name] = value
    return values
