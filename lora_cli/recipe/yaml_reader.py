"""Read YAML 1.2: `2e-5` is a number, `no` is a word, and a key may appear only once.

The line of every value is recorded, so that later errors can name it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from lora_cli.errors import LoraError, Problem
from lora_cli.recipe.yaml_errors import BACKSLASH, TOO_DEEP, explain, line_of, opening_line

# in addition to what the length of the text allows: nested aliases can expand to billions of nodes
MAX_NODES = 10_000
MAX_DEPTH = 30
MAX_NESTING = 60  # of brackets and indentation, checked before values are read
MAX_INTEGER = 2**63 - 1
STANDARD = "tag:yaml.org,2002:"
LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # of YAML 1.1, as PyYAML counts lines

KeyPath = tuple[str | int, ...]

# tag, the pattern of its plain scalars, and their possible first characters
CORE_SCHEMA: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
)


class YamlLoader(yaml.SafeLoader):
    """Loads YAML 1.2's core schema; PyYAML itself reads `no` as false and `2e-5` as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; in PyYAML, only Python's stack limits the nesting."""
        self.nesting += 1
        try:
            if self.nesting > MAX_NESTING:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML's
                raise yaml.composer.ComposerError(None, None, TOO_DEEP, mark)
            return super().compose_node(parent, index)
        finally:
            self.nesting -= 1


class YamlDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would not read as text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so that a value that appears twice is written twice."""
        return True


def _represent_text(dumper: YamlDumper, text: str) -> yaml.ScalarNode:
    # YAML 1.1 folds these line ends, unless they are escaped
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(STANDARD + "str", text, style)


YamlDumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (YamlLoader, YamlDumper):
        _class.add_implicit_resolver(STANDARD + _tag, re.compile(_pattern), list(_first))


class Reader:
    """Turns YAML nodes into Python values, and records the line of each key path.

    Args:
        source: The file, or the `--set` flag, that the text comes from.
        is_file: Whether the places of values include a line.
        length: Number of characters in the text.
    """

    def __init__(self, source: str, is_file: bool, length: int = 0) -> None:
        self.source = source
        self.max_nodes = MAX_NODES + length // 2  # without aliases, a node takes two characters
        self.is_file = is_file
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.invalid_keys: set[str] = set()  # keys whose value could not be read as written
        self.typed: dict[str, str] = {}  # scalar values of `--set` flags, as they were typed
        self.nodes = 0

    def place(self, line: int) -> str:
        """Return the place of a line, counted from 0."""
        return f"{self.source}:{line + 1}" if self.is_file else self.source

    def value(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        """Return the value of a node; add what is invalid to `problems`."""
        self.nodes += 1
        if self.nodes > self.max_nodes or len(path) > MAX_DEPTH:
            raise LoraError(
                "the recipe is too large or too deep",
                self.place(node.start_mark.line),
                "leave out aliases (`*name`) that repeat others or contain themselves",
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
        hint = "write the value without it; a text that begins with `!` needs quotation marks"
        return self._reject(f"`{tag}` is a tag that recipes do not use", node, path, hint)

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: KeyPath) -> Any:
        text: str = node.value
        if kind in ("int", "float") and len(text) > 100:  # Python's own limit is 4,300 digits
            return self._reject("a number is too long", node, path, "write it with fewer digits")
        try:
            match kind:
                case "str":
                    return _decoded(text)
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                    if abs(number) <= MAX_INTEGER:
                        return number
                    hint = f"the largest whole number is {MAX_INTEGER}"
                    return self._reject(f"`{text}` is too large a number", node, path, hint)
                case _:
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except UnicodeError:
            return self._reject(_describe_bad_character(text), node, path, "leave it out")
        except (ValueError, KeyError):
            what = f"`{text}` is not what `!!{kind}` says"
            return self._reject(what, node, path, f"leave `!!{kind}` out, or write such a value")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            try:
                key = _decoded(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            except UnicodeError:
                key = ""
            if not key:
                hint = "a key is written as in `rank: 8`; one with brackets needs quotation marks"
                self._reject("a key must be a word", key_node, path, hint)
                continue
            here = (*path, key)
            if key in result:
                first = self.places[dotted(here)]
                hint = f"the first is at {first}; keep one"
                self._reject(f"`{key}` appears twice", key_node, here, hint)
            elif key == "<<" and key_node.style is None:
                hint = "write the keys out; YAML 1.2 has no `<<`"
                self._reject("recipes do not merge mappings", key_node, here, hint)
            else:
                self.places[dotted(here)] = self.place(key_node.start_mark.line)
                result[key] = self.value(value_node, here)
        return result

    def _reject(self, what: str, node: yaml.Node, path: KeyPath, hint: str | None = None) -> None:
        place = self.place(node.start_mark.line)
        at = f"{dotted(path)} ({place})" if path else place
        self.problems.append(Problem(what, at, hint))
        self.invalid_keys.add(dotted(path))


def _describe_bad_character(text: str) -> str:
    if "\0" in text:
        return "a text contains a NUL, which is not allowed in names of files and columns"
    half = next(letter for letter in text if "\ud800" <= letter <= "\udfff")
    return f"a text contains `\\u{ord(half):04x}`, which is half of a character"


def _decoded(text: str) -> str:
    """Return a text with surrogate pairs joined: JSON writes them, and PyYAML does not join them.

    Raises:
        UnicodeError: If the text contains half of a pair, or a NUL, which paths cannot contain.
    """
    if "\0" in text:
        raise UnicodeError
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def dotted(path: Sequence[str | int]) -> str:
    """Return a key path in dotted notation: `train.optimizer.betas.0`."""
    return ".".join(str(part) for part in path)


def parse(text: str, source: str, path: KeyPath = (), is_file: bool = True) -> tuple[Any, Reader]:
    """Return the value of a YAML text, and the reader with its places and problems.

    Args:
        text: One YAML document.
        source: The file or the flag that the text comes from, for errors.
        path: The key path of the value in the recipe.
        is_file: Whether the places of values include a line.

    Raises:
        LoraError: If the text is not YAML.
    """
    reader = Reader(source, is_file, len(text))
    try:
        loader = YamlLoader(text)
    except yaml.reader.ReaderError as error:
        code = ord(text[error.position])
        is_byte = 0xDC80 <= code <= 0xDCFF  # of the command line, if it is not UTF-8
        raise LoraError(
            f"byte 0x{code - 0xDC00:02x} is not UTF-8 text"
            if is_byte
            else f"character U+{code:04X} is not for text files",
            reader.place(len(LINE_END.findall(text[: error.position]))),
            "delete it; is this a YAML file?" if is_file else "delete it, or write it in UTF-8",
        ) from error
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, reader) from error
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF"
        place = reader.place(loader.get_mark().line)
        what = "not valid YAML: an escape code is not a character"
        raise LoraError(what, place, BACKSLASH) from error
    return (reader.value(node, path) if node is not None else None), reader


def _not_yaml(error: yaml.MarkedYAMLError, reader: Reader) -> LoraError:
    what, hint = explain(error)
    line, opening = line_of(error), opening_line(error)
    if opening is not None and reader.is_file:
        hint = f"the bracket that is not closed is at {reader.place(opening)}"
    at = reader.source if line is None else reader.place(line)
    return LoraError(f"not valid YAML: {what}", at, hint)
