"""Complete `--set` in the shell: the keys of a recipe, and their values.

They are read from the source text of `recipe/spec/`, where the docstring of each key is below it.
Importing it, and with it pydantic, would take too long for completion.
"""

from __future__ import annotations

import ast
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPEC = Path(__file__).parents[1] / "recipe" / "spec"
ROOT = "Recipe"
PREFIX_VARIABLE = "_LORA_DIVIDED"
HELP_WIDTH = 68
Offer = tuple[str, str]  # the text to insert, and its description


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    help: str
    sections: tuple[str, ...]
    """The classes of its value, if that is a section."""
    values: tuple[str, ...]
    """Known values: the choices, or the default."""
    plain: bool
    """Whether its value may be something other than a section."""


def offer_overrides(incomplete: str) -> list[Offer]:
    """Return completions for `--set`: keys, level by level, then the values of a key.

    A key is offered with `=`, and again with each known value, so that the shell adds no space.
    """
    prefix_of_word = os.environ.get(PREFIX_VARIABLE, "")
    incomplete = prefix_of_word + incomplete
    path, assigned, _ = incomplete.partition("=")
    above, _, last = path.rpartition(".")
    classes = _classes(file.read_text(encoding="utf-8") for file in SPEC.glob("*.py"))
    keys = _keys_of(classes, [ROOT])
    for name in filter(None, above.split(".")):
        keys = _keys_of(classes, keys[name].sections) if name in keys else {}
    prefix = f"{above}." if above else ""
    if assigned:
        offers = _assignments(prefix, keys[last]) if last in keys else []
    else:
        found = [key for key in keys.values() if key.name.startswith(last)]
        offers = [offer for key in found for offer in _names(prefix, key)]
        while len(offers) == 1 and offers[0][0].endswith("."):  # the only choice: descend at once
            prefix, keys = offers[0][0], _keys_of(classes, found[0].sections)
            found = list(keys.values())
            offers = [offer for key in found for offer in _names(prefix, key)]
        if len(found) == 1 and found[0].plain:
            offers += _assignments(prefix, found[0])
    offers = [offer for offer in dict.fromkeys(offers) if offer[0].startswith(incomplete)]
    return [(text.removeprefix(prefix_of_word), about) for text, about in offers]


def offer_splits(incomplete: str) -> list[str]:
    """Return the splits whose names begin with the typed text."""
    return [name for name in ("train", "validation", "test") if name.startswith(incomplete)]


def _names(prefix: str, key: Key) -> Iterator[Offer]:
    if key.plain:
        yield f"{prefix}{key.name}=", key.help
    if key.sections:
        yield f"{prefix}{key.name}.", key.help


def _assignments(prefix: str, key: Key) -> list[Offer]:
    return [(f"{prefix}{key.name}={value}", key.help) for value in key.values]


# -------------------------------------------------------------------------- reading the text


Definitions = dict[str, ast.ClassDef | ast.expr]


def _classes(texts: Iterable[str]) -> Definitions:
    """Return the sections of the recipe, and the type aliases that stand for several of them."""
    found: Definitions = {}
    for node in (node for text in texts for node in ast.parse(text).body):
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _keys_of(classes: Definitions, names: list[str] | tuple[str, ...]) -> dict[str, Key]:
    """Return the keys of a section, which may have one of several classes."""
    keys: dict[str, Key] = {}
    for name in names:
        body = _body(classes, name)
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            if node.target.id.startswith("_") or "ClassVar" in ast.unparse(node.annotation):
                continue
            key = _key(classes, node, after)
            if other := keys.get(key.name):
                values = tuple(dict.fromkeys(other.values + key.values))
                key = Key(key.name, other.help, other.sections, values, other.plain)
            keys[key.name] = key
    return keys


def _body(classes: Definitions, name: str) -> list[ast.stmt]:
    """Return the statements of a class, preceded by those of its base classes."""
    section = classes[name]
    assert isinstance(section, ast.ClassDef)
    bases = [base.id for base in section.bases if isinstance(base, ast.Name)]
    inherited = [node for base in bases if base in classes for node in _body(classes, base)]
    return [*inherited, *section.body]


def _key(classes: Definitions, node: ast.AnnAssign, after: ast.stmt | None) -> Key:
    assert isinstance(node.target, ast.Name)
    name, default = node.target.id, node.value
    if isinstance(default, ast.Call):  # `Field(…)`
        named = {word.arg: word.value for word in default.keywords}
        alias, default = named.get("alias"), next(iter(default.args), named.get("default"))
        name = str(alias.value) if isinstance(alias, ast.Constant) else name
    known = _Type()
    known.read(classes, node.annotation)
    if isinstance(default, ast.Constant):
        known.values.append(_word(default.value))
    about = ""
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        about = re.split(r"(?<=[.;])\s", str(after.value.value), maxsplit=1)[0].rstrip(".;")
    # without characters that are special for a shell or for rich
    about = textwrap.shorten(re.sub(r"[^\w\s.,;%/-]", "", about), HELP_WIDTH, placeholder="")
    values = tuple(dict.fromkeys(known.values))
    return Key(name, about, tuple(known.sections), values, known.plain)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Type:
    """The values that a type annotation allows."""

    def __init__(self) -> None:
        self.sections: list[str] = []
        self.values: list[str] = []
        self.plain = False

    def read(self, classes: Definitions, node: ast.expr) -> None:
        match node:
            case ast.BinOp(left=left, right=right):
                self.read(classes, left)
                self.read(classes, right)
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[of, *_])):
                self.read(classes, of)
            case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
                self.plain = True
                constants = [c for c in ast.walk(choices) if isinstance(c, ast.Constant)]
                self.values += [_word(c.value) for c in constants]
            case ast.Constant(value=None):
                self.values.append("null")
            case ast.Name(id=name) if isinstance(found := classes.get(name), ast.ClassDef):
                self.sections.append(found.name)
            case ast.Name(id=name) if isinstance(found := classes.get(name), ast.expr):
                self.read(classes, found)
            case ast.Name(id="bool"):
                self.plain = True
                self.values += ["true", "false"]
            case _:
                self.plain = True


def join_split_words() -> None:
    """Join the words that bash has split at `=`, before they are read.

    Bash splits `train.precision=f` into three words and only replaces the last one, so the text
    before it is kept in an environment variable.
    """
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", 0))
    joined: list[str] = []
    for i, word in enumerate(words[: at + 1]):
        if joined and (word == "=" or (i and words[i - 1] == "=")):
            joined[-1] += word
        else:
            joined.append(word)
    key, assigned, value = joined[-1].partition("=")
    if assigned and not key.startswith("-"):
        os.environ[PREFIX_VARIABLE], joined[-1] = key + assigned, value
    os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}
