"""The value of a `--set` flag.

A shell's argument is no YAML file: it has no comments, no anchors and no tags, and a text needs no
quotation marks. A value that begins with `[` or `{` is a list or a mapping, one that begins with a
quotation mark is a quoted text; every other value is taken as a whole. It is a number, `true`,
`false` or `null` if all of it looks like one, and else text as it was typed.
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

# what YAML gives a meaning that no value on a command line has: comments, anchors, aliases, tags …
INDICATORS = "#&*!%@`|>?"
PRIVATE_USE = range(0x100000, 0x10FFFE)  # letters that no font and no text has


def parse_value(text: str, source: str, path: KeyPath) -> tuple[Any, Reader]:
    """Return what was typed after `--set key=`, and the reader that knows its places and problems.

    Args:
        text: The value.
        source: The flag, for errors.
        path: Where the value belongs in the recipe.

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
    value = stripped or text  # spaces or a tab alone are meant: a separator, a delimiter
    mark = yaml.Mark(source, 0, 0, 0, None, 0)
    reader.typed[dotted(path)] = value
    node = yaml.ScalarNode(tag if stripped else YamlLoader.DEFAULT_SCALAR_TAG, value, mark, mark)
    return reader.value(node, path), reader


def _structured(text: str, source: str, path: KeyPath) -> tuple[Any, Reader]:
    """Return a list, a mapping or a quoted text; YAML's indicators are ordinary letters in it."""
    unused = (code for code in PRIVATE_USE if chr(code) not in text)
    letters = {ord(sign): next(unused) for sign in INDICATORS}
    signs = {code: chr(sign) for sign, code in letters.items()}
    try:
        value, reader = parse(text.translate(letters), source, path, is_file=False)
    except LoraError as error:
        key = dotted(path)
        quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
        what = error.problems[0].what.translate(signs)
        if what.endswith(DIRECTIVE):  # PyYAML's words for what follows a whole value
            what = "more text follows the closing bracket or quotation mark"
        raise LoraError(what, source, f"to give the text as it is: `--set {quoted}`") from error
    reader.problems = [
        replace(p, what=p.what.translate(signs), at=(p.at or source).translate(signs))
        for p in reader.problems
    ]
    reader.places = {place.translate(signs): at for place, at in reader.places.items()}
    reader.faulty = {place.translate(signs) for place in reader.faulty}
    return _restored(value, signs, reader, path), reader


def _restored(value: Any, signs: dict[int, str], reader: Reader, path: KeyPath) -> Any:
    """Return a value with the indicators that were replaced in its texts."""
    if isinstance(value, str):
        return value.translate(signs)
    if isinstance(value, list):
        return [_restored(item, signs, reader, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        key = key.translate(signs)
        if item is None and ":" in key:
            what = f"`{key}` is a key without a value"
            hint = f"put a space after the colon: `{key.replace(':', ': ', 1)}`"
            reader.problems.append(Problem(what, reader.source, hint))
            reader.faulty.add(dotted((*path, key)))
        result[key] = _restored(item, signs, reader, (*path, key))
    return result
