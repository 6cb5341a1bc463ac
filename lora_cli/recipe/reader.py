"""YAML as its version 1.2 means it: `2e-5` is a number, `no` is a word, a key stands once.

Every value remembers its line, so that an error, however late, can name it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from lora_cli.errors import LoraError, Problem

MAX_NODES = 10_000  # a recipe has a hundred; aliases inside aliases have billions
MAX_DEPTH = 30
MAX_INTEGER = 2**63 - 1
STANDARD = "tag:yaml.org,2002:"

KeyPath = tuple[str | int, ...]

# tag, what a plain scalar of it looks like, and the characters that it begins with
CORE_SCHEMA: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
)


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: PyYAML's own reads `no` as false and `2e-5` as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class YamlDumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as anything but text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that a value that stands twice is written twice."""
        return True


def _represent_text(dumper: YamlDumper, text: str) -> yaml.ScalarNode:
    # these are line ends to YAML 1.1, which folds them unless they are escaped
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(STANDARD + "str", text, style)


YamlDumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (YamlLoader, YamlDumper):
        _class.add_implicit_resolver(STANDARD + _tag, re.compile(_pattern), list(_first))


class Reader:
    """Turns YAML nodes into Python values, and notes the line of each key path.

    Args:
        source: The file, or the `--set` flag, that the text is from.
        is_file: Whether places name a line.
    """

    def __init__(self, source: str, is_file: bool) -> None:
        self.source = source
        self.is_file = is_file
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.faulty: set[str] = set()  # keys whose value is not what was written
        self.nodes = 0

    def place(self, line: int) -> str:
        """Return the place of a line, counted from 0."""
        return f"{self.source}:{line + 1}" if self.is_file else self.source

    def value(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        """Return what a node means; what it cannot mean goes to `problems`."""
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise LoraError(
                "the recipe is too large or too deep",
                self.source,
                "aliases that repeat or contain themselves are not for recipes",
            )
        self.places.setdefault(dotted(path), self.place(node.start_mark.line))
        kind = node.tag.removeprefix(STANDARD)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "null", "bool", "int", "float"):
            return self._scalar(node, kind, path)
        tag = "!!" + kind if node.tag.startswith(STANDARD) else node.tag
        return self._fault(f"`{tag}` is a tag that recipes do not use", node, path)

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: KeyPath) -> Any:
        text: str = node.value
        if kind in ("int", "float") and len(text) > 100:  # Python's own limit is 4,300 digits
            return self._fault("a number is too long", node, path)
        try:
            match kind:
                case "str":
                    return _characters(text)
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                    if abs(number) <= MAX_INTEGER:
                        return number
                    return self._fault(f"`{text}` is too large a number", node, path)
                case _:
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except UnicodeError:
            return self._fault("a text holds a character that is none", node, path)
        except (ValueError, KeyError):
            return self._fault(f"`{text}` is not what `!!{kind}` says", node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            try:
                key = _characters(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            except UnicodeError:
                key = ""
            if not key:
                self._fault("a key must be a word", key_node, path)
                continue
            here = (*path, key)
            if key in result:
                first = self.places[dotted(here)]
                hint = f"the first is at {first}; keep one"
                self._fault(f"`{key}` stands twice", key_node, here, hint)
            elif key == "<<" and key_node.style is None:
                hint = "write the keys out; YAML 1.2 has no `<<`"
                self._fault("recipes do not merge mappings", key_node, here, hint)
            else:
                self.places[dotted(here)] = self.place(key_node.start_mark.line)
                result[key] = self.value(value_node, here)
        return result

    def _fault(self, what: str, node: yaml.Node, path: KeyPath, hint: str | None = None) -> None:
        place = self.place(node.start_mark.line)
        at = f"{dotted(path)} ({place})" if path else place
        self.problems.append(Problem(what, at, hint))
        self.faulty.add(dotted(path))


def _characters(text: str) -> str:
    """Return a text whose surrogate pairs are joined: JSON writes them, and PyYAML leaves them.

    Raises:
        UnicodeError: If half of a pair, or a NUL that no path can hold, is in it.
    """
    if "\0" in text:
        raise UnicodeError
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def dotted(path: Sequence[str | int]) -> str:
    """Return a key path as it is written: `train.optimizer.betas.0`."""
    return ".".join(str(part) for part in path)


def parse(text: str, source: str, path: KeyPath = (), is_file: bool = True) -> tuple[Any, Reader]:
    """Return the value of a YAML text, and the reader that knows its places and problems.

    Args:
        text: One YAML document.
        source: The file or the flag it is from, for errors.
        path: Where the value stands in the recipe.
        is_file: Whether places name a line.

    Raises:
        LoraError: If the text is not YAML.
    """
    reader = Reader(source, is_file)
    try:
        node = yaml.compose(text, Loader=YamlLoader)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, reader) from error
    except yaml.reader.ReaderError as error:
        place = reader.place(text[: error.position].count("\n"))
        raise LoraError(
            f"character U+{ord(text[error.position]):04X} is not for text files", place
        ) from error
    except RecursionError as error:
        raise LoraError("the recipe is too deep", source) from error
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF"
        raise LoraError(f"not valid YAML: {error}", source) from error
    return (reader.value(node, path) if node is not None else None), reader


def _not_yaml(error: yaml.MarkedYAMLError, reader: Reader) -> LoraError:
    what = str(error.problem or error.context or "it cannot be read")
    what = what.replace("'<stream end>'", "the end")
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    at = reader.place(mark.line) if mark else reader.source
    if "another document" in what:
        return LoraError("a recipe is one YAML document, and a second begins here", at)
    hint = None
    if "'\\t'" in what:
        hint = "indent with spaces; YAML does not take tabs"
    elif mark and opened and opened.line != mark.line and reader.is_file:
        hint = f"what is not complete here begins at {reader.place(opened.line)}"
    elif "mapping values are not allowed" in what or "':'" in what:
        hint = "a text with a colon needs quotation marks"
    elif "cannot start any token" in what or "expected alphabetic" in what:
        hint = "a text that begins with a special character needs quotation marks"
    return LoraError(f"not valid YAML: {what}", at, hint)
