"""Read the value of a `--set` flag.

The argument of a shell command is not a YAML file: it has no comments, anchors or tags, and text
needs no quotation marks. A value that begins with `[` or `{` is a list or a mapping, and a value
that begins with a quotation mark is quoted text. Every other value is read as a whole: as a number,
`true`, `false` or `null` if all of it looks like one, otherwise as text.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import yaml

from lora_cli.errors import LoraError, Problem
from lora_cli.recipe.yaml_errors import DIRECTIVE
from lora_cli.recipe.yaml_reader import KeyPath, Reader, YamlLoader, dotted, parse

# characters that have a meaning in YAML but not here: comments, anchors, aliases, tags …
INDICATORS = "#&*!%@`|>?"
PRIVATE_USE = range(0x100000, 0x10FFFE)  # code points that no text should contain


def parse_value(text: str, source: str, path: KeyPath) -> tuple[Any, Reader]:
    """Return the value of a `--set` flag, and the reader with its places and problems.

    Args:
        text: The text after `--set key=`.
        source: The flag, for errors.
        path: The key path of the value in the recipe.

    Raises:
        LoraError: If there is no value, or a list, a mapping or a quoted text is not well formed.
    """
    key = dotted(path)
    if not text:
        hint = f"write the value after `=`: `--set '{key}=\"\"'` is an empty text, "
        hint += f"`--set {key}=null` no value; without the flag, the recipe's own value is used"
        raise LoraError("the value is empty", source, hint)
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        return parse(text, source, path, is_file=False)  # which says which byte is not UTF-8
    stripped = text.strip()
    if stripped.startswith(("[", "{", '"', "'")):
        return _structured(stripped, source, path)
    reader = Reader(source, is_file=False)
    resolve = YamlLoader("").resolve
    tag = resolve(yaml.ScalarNode, stripped, (True, False))  # type: ignore[no-untyped-call]  # PyYAML's
    value = stripped or text  # only spaces or a tab may be intended, as a separator or delimiter
    mark = yaml.Mark(source, 0, 0, 0, None, 0)
    reader.typed[dotted(path)] = value
    node = yaml.ScalarNode(tag if stripped else YamlLoader.DEFAULT_SCALAR_TAG, value, mark, mark)
    return reader.value(node, path), reader


def _structured(text: str, source: str, path: KeyPath) -> tuple[Any, Reader]:
    """Return a list, a mapping or a quoted text, in which YAML's indicators are plain text."""
    unused = (code for code in PRIVATE_USE if chr(code) not in text)
    placeholders = {ord(character): next(unused) for character in INDICATORS}
    originals = {code: chr(character) for character, code in placeholders.items()}
    try:
        value, reader = parse(text.translate(placeholders), source, path, is_file=False)
    except LoraError as error:
        key = dotted(path)
        quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
        what = error.problems[0].what.translate(originals)
        if what.endswith(DIRECTIVE):  # PyYAML says this of text after a complete value
            what = "more text follows the closing bracket or quotation mark"
        raise LoraError(what, source, f"to give the text as it is: `--set {quoted}`") from error
    reader.problems = [
        replace(p, what=p.what.translate(originals), at=(p.at or source).translate(originals))
        for p in reader.problems
    ]
    reader.places = {place.translate(originals): at for place, at in reader.places.items()}
    reader.invalid_keys = {place.translate(originals) for place in reader.invalid_keys}
    return _restored(value, originals, reader, path), reader


def _restored(value: Any, originals: dict[int, str], reader: Reader, path: KeyPath) -> Any:
    """Return a value whose texts contain the original indicators again."""
    if isinstance(value, str):
        return value.translate(originals)
    if isinstance(value, list):
        return [_restored(item, originals, reader, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        key = key.translate(originals)
        if item is None and ":" in key:
            what = f"`{key}` is a key without a value"
            hint = f"put a space after the colon: `{key.replace(':', ': ', 1)}`"
            reader.problems.append(Problem(what, reader.source, hint))
            reader.invalid_keys.add(dotted((*path, key)))
        result[key] = _restored(item, originals, reader, (*path, key))
    return result
