"""Entities as tags of words: read every tagging scheme, and detect the one of a data set.

An entity is a run of words with one type. Schemes differ in how they mark where it begins:

    words      Alice  met   New    York   Paris  fans
    IOB2       B-PER  O     B-LOC  I-LOC  B-LOC  O        each entity begins with B
    IOB1       I-PER  O     I-LOC  I-LOC  B-LOC  O        B only after an entity of the same type
    IO         I-PER  O     I-LOC  I-LOC  I-LOC  O        adjacent entities merge; also without I-
    IOBES      S-PER  O     B-LOC  E-LOC  S-LOC  O        also BILOU: L for E, U for S

All are read by the rule of conlleval, the evaluation script of CoNLL: an entity begins at a B or S,
after an E or S, where the type changes, and after O. For tags that violate their scheme, the rule
could only guess what was meant, so `tag_error` rejects them.
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
PREFIXES = ("B", "I", "E", "S")  # stand alone as tags in data sets with a single type
ONLY_TYPE = "entity"  # name of that single type
NO_TYPE = re.compile(r"[BIESLUM][-_]\s*")
SAME_PREFIX = {"L": "E", "U": "S", "M": "I"}  # prefixes of BILOU and BMES
BEGINS = ("B", "S")
ENDS = ("E", "S")
ONLY_IN_IOBES = ("E", "S")
MIN_IOB1_SHARE = 0.5  # of informative entities that begin with I; fewer are annotation errors


@dataclass(frozen=True)
class Entity:
    """A run of words with a type: `words[start:end]`."""

    start: int
    end: int
    label: str


def parts_of(tag: str) -> tuple[str, str]:
    """Return the prefix and type of a tag: (B, PER) for `B-PER`, (I, PER) for `PER`, (O, "") for O.

    A prefix alone, as in data sets with a single type (B, I and O), gives the type `entity`. The
    prefixes L, U and M of BILOU and BMES become E, S and I.
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
    entities: list[Entity] = []
    start, kind, before = 0, "", OUTSIDE
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, label = parts_of(tag)
        continues = bool(label) and label == kind and prefix not in BEGINS and before not in ENDS
        if kind and not continues:
            entities.append(Entity(start, i, kind))
        if label and not continues:
            start = i
        kind, before = label, prefix
    return entities


def iob2_tags(entities: Iterable[Entity], count: int) -> list[str]:
    """Return the tags of a sentence of `count` words, in IOB2."""
    tags = [OUTSIDE] * count
    for entity in entities:
        tags[entity.start] = f"B-{entity.label}"
        for i in range(entity.start + 1, entity.end):
            tags[i] = f"I-{entity.label}"
    return tags


def iob2_labels(types: Iterable[str]) -> list[str]:
    """Return the tags that a model predicts for entity types: O, then B and I of each type."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def types_of(tags: Iterable[str]) -> list[str]:
    """Return the distinct types of tags, in order of appearance."""
    return list(dict.fromkeys(kind for tag in tags if (kind := parts_of(tag)[1])))


def types_that_are_tags(types: Iterable[str]) -> tuple[str, str] | None:
    """Return two types that differ only in B and I, such as `b-PER` and `i-PER`; None if none do.

    Such types are tags in an unsupported notation: in lower case, with a separator other than a
    hyphen or underscore or none at all (`BPER`), or with the prefix at the end (`PER-B`).
    """
    distinct = set(types)
    for kind in sorted(distinct):
        may_be_glued = kind.isupper() and kind.isalpha()
        if kind[:1] in ("B", "b") and (may_be_glued or not kind[1:2].isalnum()):
            other = chr(ord(kind[0]) + ord("I") - ord("B")) + kind[1:]
            if other in distinct:
                return kind, other
        if kind[-1:] in ("B", "b") and not kind[-2:-1].isalnum():
            other = kind[:-1] + chr(ord(kind[-1]) + ord("I") - ord("B"))
            if other in distinct:
                return kind, other
    return None


def require_types(types: Iterable[str], location: str, of_spans: bool = False) -> None:
    """Check that entity types are not tags in an unsupported notation.

    Args:
        types: The entity types.
        location: The location to report in an error.
        of_spans: Whether the types are labels of spans instead of words.

    Raises:
        LoraError: If they are such tags.
    """
    if (pair := types_that_are_tags(types)) is None:
        return
    what = f"`{pair[0]}` and `{pair[1]}` would be two types of entities"
    hint = "tags are written `B-PER` and `I-PER`"
    if of_spans:
        hint = "a span has the type alone, and covers the whole entity"
    raise LoraError(what, location, f"{hint}; if they are two types, name `task.labels`")


@dataclass
class Beginnings:
    """Counts of how the entities of a data set begin, from which its scheme is inferred."""

    prefixes: Counter[str]
    """Number of tags with each prefix: O, B, I, E, S, or empty for a type without a prefix."""
    i_begins: int = 0
    """Number of entities whose first tag is an I."""
    needless_b: int = 0
    """Number of entities that begin with B although no entity of their type precedes them."""

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]]) -> Beginnings:
        """Count the tags of sentences."""
        counts = cls(Counter())
        for tags in sentences:
            before = ""
            for tag in tags:
                prefix, kind = parts_of(tag)
                counts.prefixes["" if _is_bare(tag) else prefix] += 1
                counts.i_begins += prefix == "I" and kind != before
                counts.needless_b += prefix == "B" and kind != before
                before = kind
        return counts

    @property
    def scheme(self) -> Scheme:
        """The scheme that the counts suggest; IOB2 if they are inconclusive."""
        if any(self.prefixes[prefix] for prefix in ONLY_IN_IOBES):
            return "iobes"
        if not self.prefixes["B"] and (self.prefixes["I"] or self.prefixes[""]):
            return "io"
        if self.i_begins > MIN_IOB1_SHARE * (self.i_begins + self.needless_b):
            return "iob1"
        return "iob2"

    @property
    def has_outside(self) -> bool:
        """Whether any word is outside of all entities."""
        return bool(self.prefixes[OUTSIDE])


def tag_error(tags: Sequence[str], scheme: Scheme) -> str:
    """Return an error for the first tag that violates the scheme; empty if none does."""
    before, kind = OUTSIDE, ""
    for number, tag in enumerate(tags, 1):
        prefix, label = parts_of(tag)
        continues = bool(label) and label == kind and before in ("B", "I")
        subject = f"tag {number}, `{tag}`,"
        if NO_TYPE.fullmatch(tag):
            return f"{subject} has a prefix, and no type after it"
        if _is_bare(tag) and scheme != "io":
            return f"{subject} is neither O nor a type with a prefix, such as `B-{label}`"
        if scheme != "iobes" and prefix in ONLY_IN_IOBES:
            return f"{subject} has a prefix that only IOBES has, and the scheme is {scheme}"
        if scheme == "io" and prefix == "B":
            return f"{subject} begins with B, which IO does not have"
        if scheme == "iob2" and prefix == "I" and label != kind:
            return f"{subject} continues an entity that no `B-{label}` began"
        if scheme == "iobes":
            if prefix in ("I", "E") and not continues:
                return f"{subject} continues an entity that no `B-{label}` began"
            if kind and before in ("B", "I") and (prefix not in ("I", "E") or label != kind):
                return f"{subject} follows `{before}-{kind}`, which no `E-{kind}` has ended"
        before, kind = prefix, label
    if scheme == "iobes" and kind and before in ("B", "I"):
        return f"the last tag is `{before}-{kind}`, which no `E-{kind}` has ended"
    return ""
