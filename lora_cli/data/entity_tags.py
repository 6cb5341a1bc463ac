"""Entities as tags of words: how schemes write them, and which scheme a data set uses.

An entity is a run of words with one type. Schemes differ in how they mark where it begins:

    words      Alice  met   New    York   Paris  fans
    IOB2       B-PER  O     B-LOC  I-LOC  B-LOC  O        each entity begins with B
    IOB1       I-PER  O     I-LOC  I-LOC  B-LOC  O        B only after an entity of the same type
    IO         I-PER  O     I-LOC  I-LOC  I-LOC  O        two neighbours are one; also without I-
    IOBES      S-PER  O     B-LOC  E-LOC  S-LOC  O        also BILOU: L for E, U for S

All are read by the rule of conlleval, CoNLL's own script of evaluation: an entity begins at a B or
an S, after an E or an S, and where the type changes or there was none before. What the rule reads
from tags that break their scheme is a guess about a mistake, so `tag_error` rejects such tags.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_cli.errors import LoraError

Scheme = Literal["iob1", "iob2", "io", "iobes"]
OUTSIDE = "O"
TAG = re.compile(r"(?P<prefix>[BIESLUM])[-_](?P<kind>\S.*)", re.DOTALL)
PREFIXES = ("B", "I", "E", "S")  # which are whole tags where all entities are of one type
ONLY_TYPE = "entity"  # what that is called
NO_TYPE = re.compile(r"[BIESLUM][-_]\s*")
SAME_PREFIX = {"L": "E", "U": "S", "M": "I"}  # of BILOU and BMES
BEGINS = ("B", "S")
ENDS = ("E", "S")
ONLY_IN_IOBES = ("E", "S")
MANY = 0.5  # of the entities: more begin otherwise, so that it is the scheme and no mistake


@dataclass(frozen=True)
class Entity:
    """A run of words with a type: `words[start:end]`."""

    start: int
    end: int
    label: str


def parts_of(tag: str) -> tuple[str, str]:
    """Return the prefix and the type of a tag: of `B-PER` B and PER, of `PER` I and PER, of O "".

    Of a prefix alone, as in data sets of one type (B, I and O), the type is `entity`.

    L, U and M, as BILOU and BMES have them, are returned as E, S and I.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if tag in PREFIXES:
        return tag, ONLY_TYPE
    match = TAG.fullmatch(tag)
    if match is None:
        return "I", tag
    return SAME_PREFIX.get(match["prefix"], match["prefix"]), match["kind"]


def _is_bare(tag: str) -> bool:
    """Return whether a tag is a type without a prefix."""
    return tag != OUTSIDE and tag not in PREFIXES and TAG.fullmatch(tag) is None


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence by conlleval's rule, which reads every scheme."""
    found: list[Entity] = []
    start, kind, before = 0, "", OUTSIDE
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, label = parts_of(tag)
        goes_on = bool(label) and label == kind and prefix not in BEGINS and before not in ENDS
        if kind and not goes_on:
            found.append(Entity(start, i, kind))
        if label and not goes_on:
            start = i
        kind, before = label, prefix
    return found


def iob2_tags(entities: Iterable[Entity], count: int) -> list[str]:
    """Return the tags of a sentence of `count` words, in IOB2."""
    tags = [OUTSIDE] * count
    for entity in entities:
        tags[entity.start] = f"B-{entity.label}"
        for i in range(entity.start + 1, entity.end):
            tags[i] = f"I-{entity.label}"
    return tags


def iob2_labels(types: Iterable[str]) -> list[str]:
    """Return the tags that a model learns for types of entities: O, then B and I of each."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def types_of(tags: Iterable[str]) -> list[str]:
    """Return the types that tags name, each once, in their order."""
    return list(dict.fromkeys(kind for tag in tags if (kind := parts_of(tag)[1])))


def marked_otherwise(types: Iterable[str]) -> tuple[str, str] | None:
    """Return two types that differ in a B and an I alone, as `b-PER` and `i-PER`, or None.

    They are tags that mark where an entity begins in a way that is not read: in small letters,
    with another sign than a hyphen or an underscore, without one (`BPER`), or at the end (`PER-B`).
    """
    found = set(types)
    for kind in sorted(found):
        glued = kind.isupper() and kind.isalpha()
        if kind[:1] in ("B", "b") and (glued or not kind[1:2].isalnum()):
            other = chr(ord(kind[0]) + ord("I") - ord("B")) + kind[1:]
            if other in found:
                return kind, other
        if kind[-1:] in ("B", "b") and not kind[-2:-1].isalnum():
            other = kind[:-1] + chr(ord(kind[-1]) + ord("I") - ord("B"))
            if other in found:
                return kind, other
    return None


def require_types(types: Iterable[str], at: str, of_spans: bool = False) -> None:
    """Check that types are not tags that mark beginnings in a way that is not read.

    Args:
        types: Of the entities.
        at: Where they are from.
        of_spans: They are labels of spans, and not of words.

    Raises:
        LoraError: If they are.
    """
    if (pair := marked_otherwise(types)) is None:
        return
    what = f"`{pair[0]}` and `{pair[1]}` would be two types of entities"
    hint = "tags are written `B-PER` and `I-PER`"
    if of_spans:
        hint = "a span has the type alone, and covers the whole entity"
    raise LoraError(what, at, f"{hint}; if they are two types, name `task.labels`")


@dataclass
class Beginnings:
    """How the entities of a data set begin, by which its scheme is known."""

    prefixes: Counter[str]
    """Of the tags: O, B, I, E, S, or nothing for a type without a prefix."""
    i_begins: int = 0
    """Entities whose first tag is an I."""
    needless_b: int = 0
    """Entities that begin with B although nothing of the same type stands before them."""

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]]) -> Beginnings:
        """Count the tags of sentences."""
        found = cls(Counter())
        for tags in sentences:
            before = ""
            for tag in tags:
                prefix, kind = parts_of(tag)
                found.prefixes["" if _is_bare(tag) else prefix] += 1
                found.i_begins += prefix == "I" and kind != before
                found.needless_b += prefix == "B" and kind != before
                before = kind
        return found

    @property
    def scheme(self) -> Scheme:
        """The scheme: what is seen of it, or IOB2 where that decides nothing."""
        if any(self.prefixes[prefix] for prefix in ONLY_IN_IOBES):
            return "iobes"
        if not self.prefixes["B"] and (self.prefixes["I"] or self.prefixes[""]):
            return "io"
        if self.i_begins > MANY * (self.i_begins + self.needless_b):
            return "iob1"
        return "iob2"

    @property
    def has_outside(self) -> bool:
        """Whether any word is outside of all entities."""
        return bool(self.prefixes[OUTSIDE])


def tag_error(tags: Sequence[str], scheme: Scheme) -> str:
    """Return which tag of a sentence breaks a scheme, or nothing."""
    before, kind = OUTSIDE, ""
    for number, tag in enumerate(tags, 1):
        prefix, label = parts_of(tag)
        goes_on = bool(label) and label == kind and before in ("B", "I")
        where = f"tag {number}, `{tag}`,"
        if NO_TYPE.fullmatch(tag):
            return f"{where} has a prefix, and no type after it"
        if _is_bare(tag) and scheme != "io":
            return f"{where} is neither O nor a type with a prefix, such as `B-{label}`"
        if scheme != "iobes" and prefix in ONLY_IN_IOBES:
            return f"{where} has a prefix that only IOBES has, and the scheme is {scheme}"
        if scheme == "io" and prefix == "B":
            return f"{where} begins with B, which IO does not have"
        if scheme == "iob2" and prefix == "I" and label != kind:
            return f"{where} continues an entity that no `B-{label}` began"
        if scheme == "iobes":
            if prefix in ("I", "E") and not goes_on:
                return f"{where} continues an entity that no `B-{label}` began"
            if kind and before in ("B", "I") and (prefix not in ("I", "E") or label != kind):
                return f"{where} follows `{before}-{kind}`, which no `E-{kind}` has ended"
        before, kind = prefix, label
    if scheme == "iobes" and kind and before in ("B", "I"):
        return f"the last tag is `{before}-{kind}`, which no `E-{kind}` has ended"
    return ""
