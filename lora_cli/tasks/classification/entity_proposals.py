"""Rows with entities: words with a tag each, or texts with places that have a type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.data.column_kinds import Column
from lora_cli.data.entity_spans import are_spans, read_spans
from lora_cli.data.entity_tags import (
    Beginnings,
    entities_of,
    iob2_labels,
    require_types,
    tag_error,
    types_of,
)
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.label_lists import list_in_cell
from lora_cli.errors import LoraError, counted
from lora_cli.tasks.classification.entity_rows import require_ends
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed

TAG_NAME = re.compile(r"(?i)(.*_)?(tags?|labels?|entities|ner|bio|iob)")
SPANS_NAME = re.compile(r"(?i)(.*_)?(spans?|entities|entity|labels?|annotations?|ner|tags?)")
OTHER_TAGS = re.compile(r"(?i)(.*_)?(pos|upos|xpos|chunk|dep|morph|lemma)(_.*)?")
WORD_NAME = re.compile(r"(?i)words?|tokens?")
ONE_TAG = re.compile(r"O|[BIESLU]-\S+")
MOSTLY = 0.9  # of the rows
Json = dict[str, Any]


def propose_entities(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which entities a table has; see `Task.propose`."""
    if table.pair is not None:
        return None
    return proposed(
        lambda: tagged(table.columns, table.rows, table.place, table.text, table.label),
        Certainty.BY_FORM,
    )


def tagged(
    columns: Sequence[Column], rows: Sequence[Json], place: str, text: str | None, label: str | None
) -> Proposal | None:
    """Return the task of rows with entities, or None if they are no such rows.

    Args:
        columns: What they hold.
        rows: The rows.
        place: Name of the file, for errors.
        text: The column of the words or the text, if the user names it.
        label: The column of the tags or the spans, if the user names it.

    Raises:
        LoraError: If the tags are numbers without names, or mark beginnings in an unknown way.
    """
    # as a table holds lists
    rows = [{name: _read(value) for name, value in row.items()} for row in rows]
    names = [column.name for column in columns]
    inputs = [name for name in names if text in (None, name)]
    if label is None:
        tags, spans = ([n for n in names if p.fullmatch(n)] for p in (TAG_NAME, SPANS_NAME))
    else:
        tags = spans = [label]
    found = _of_words(inputs, tags, rows, place)
    if of_spans := found is None:
        found = _of_texts(columns, inputs, spans, rows)
    if found is None:
        _require_sentences(inputs, tags, rows, place)
        _require_lists(inputs, tags, rows, place)
        _require_tags(inputs, tags, rows, place)
    else:
        require_types(types_of(found.keys["labels"]), place, of_spans)
    return found


def _require_sentences(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Reject a table with a row for each word, as Kaggle's corpus of entities.

    Raises:
        LoraError: If it is one: a column of words beside one of tags such as `B-geo`.
    """
    words = next((name for name in inputs if WORD_NAME.fullmatch(name)), None)
    for tags in targets if words is not None else ():
        values = [row[tags] for row in rows if isinstance(row.get(tags), str)]
        tagged = sum(ONE_TAG.fullmatch(value.strip()) is not None for value in values)
        if tagged >= MOSTLY * len(rows) and any(value[:2] == "B-" for value in values):
            what = f"each row is one word (`{words}`) with its tag (`{tags}`), and no sentence"
            hint = "write a line for each word, the word, a tab and the tag, and a blank line "
            raise LoraError(what, place, f"{hint}between sentences, into a file `.conll`")


def _require_lists(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Reject tags that belong to the words of a text, one to each word that spaces divide.

    Raises:
        LoraError: If they do; its hint divides both.
    """
    for text in inputs:
        words = [row[text].split() if isinstance(row.get(text), str) else [] for row in rows]
        for tags in (name for name in targets if name != text and any(words)):
            cells = [row.get(tags) for row in rows]
            several = [cell.split() if isinstance(cell, str) else cell for cell in cells]
            pairs = [(w, t) for w, t in zip(words, several, strict=True) if isinstance(t, list)]
            good = [t for w, t in pairs if len(w) == len(t) > 1 and all(map(_is_tag, t))]
            if len(good) < MOSTLY * len(rows) or not any(t[:2] == "B-" for g in good for t in g):
                continue
            how = f'. + {{tokens: [{field(text)} | scan("\\\\S+")]}}'
            if any(isinstance(cell, str) for cell in cells):
                divided = (f'[{field(name)} | scan("\\\\S+")]' for name in (text, tags))
                how = "{{tokens: {}, tags: {}}}".format(*divided)
            what = (
                f"each word of the text `{text}` has a tag in `{tags}`, and no list has the words"
            )
            hint = f"write the words as a list: {jq_command(how, place)}"
            raise LoraError(what, place, hint)


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and ONE_TAG.fullmatch(value) is not None


def _require_tags(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Reject places that count words, as those of GLiNER: `[[0, 1, person]]`.

    Raises:
        LoraError: If they are such; its hint writes a tag for each word.
    """
    for tokens in (name for name in inputs if _are_words(name, rows)):
        for places in (name for name in targets if name != tokens):
            found = [(row.get(places), _lengths(row, tokens)) for row in rows]
            spans = [(one, size) for some, size in found if isinstance(some, list) for one in some]
            if not spans or not all(_counts_words(span, size) for span, size in spans):
                continue
            last = "$one[1]" if any(span[1] == size for span, size in spans) else "$one[1] + 1"
            words, of = field(tokens), field(places)
            prefix = '(if $i == $one[0] then "B-" else "I-" end)'
            inner = f"reduce range($one[0]; {last}) as $i (.; .[$i] = {prefix} + $one[2])"
            tags = f'reduce ({of} // [])[] as $one ([{words}[] | "O"]; {inner})'
            how = f"{{tokens: {words}, tags: ({tags})}}"
            what = f"the places in `{places}` count words, and no task reads such"
            hint = f"write a tag for each word: {jq_command(how, place)}"
            raise LoraError(what, place, hint)


def _counts_words(span: Any, size: int) -> bool:
    """Return whether a value is the first word, the last (or the one behind it), and a type."""
    if not isinstance(span, list) or len(span) != 3 or not isinstance(span[2], str):
        return False
    return all(type(n) is int for n in span[:2]) and 0 <= span[0] <= span[1] <= size


def _of_words(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> Proposal | None:
    """Return the task of rows with a list of words and a list of tags."""
    able = [name for name in targets if _are_lists(name, rows)]
    ranked = sorted(able, key=lambda name: (bool(OTHER_TAGS.fullmatch(name)), "ner" not in name))
    for tags in ranked:
        of_words = [name for name in inputs if name != tags and _are_words(name, rows)]
        if len(inputs) > 1:  # parts of speech are no words, unless the user says so
            of_words = [name for name in of_words if not OTHER_TAGS.fullmatch(name)]
        for tokens in of_words:
            even = sum(_lengths(row, tokens) == _lengths(row, tags) for row in rows)
            several = sum(_lengths(row, tags) for row in rows) > len(rows)
            if several and even >= MOSTLY * len(rows):
                return _words_chosen(tokens, tags, rows, place)
    return None


def _words_chosen(tokens: str, column: str, rows: Sequence[Json], place: str) -> Proposal | None:
    values = [row[column] for row in rows if isinstance(row.get(column), list)]
    if any(isinstance(tag, bool) for tags in values for tag in tags):
        return None
    if any(isinstance(tag, int) for tags in values for tag in tags):
        what = f"`{column}` holds the numbers of tags, one for each word in `{tokens}`"
        hint = "write the tags' names into the file, or write the recipe by hand: "
        hint += "`task: {type: token_classification, tag_names: [O, B-PER, I-PER]}`"
        raise LoraError(f"{what}, and no names of them", place, hint)
    sentences = [[str(tag).strip() for tag in tags] for tags in values]
    found = Beginnings.of(sentences)
    if not found.has_outside:
        return None
    scheme = found.scheme
    good = [tags for tags in sentences if not tag_error(tags, scheme)]
    counts = Counter(entity.label for tags in good for entity in entities_of(tags))
    if not counts:
        return None

    def error(row: Json) -> str:
        row = {name: _read(row.get(name)) for name in (tokens, column)}
        if _lengths(row, tokens) != _lengths(row, column) or not _lengths(row, tokens):
            return "words and tags differ in number"
        return tag_error([str(tag).strip() for tag in row[column]], scheme)

    keys = {"tokens_column": tokens, "tags_column": column, "scheme": scheme}
    prefixes = ", ".join(sorted(p or "none" for p in found.prefixes if p != "O"))
    why = {"scheme": f"by the prefixes of the tags: {prefixes}", "tokens_column": "lists of words"}
    why["tags_column"] = "a tag for each word"
    return _chosen(keys, why, tokens, counts, error)


def _of_texts(
    columns: Sequence[Column], inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json]
) -> Proposal | None:
    """Return the task of rows with a text and a list of places in it."""
    texts = [c.name for c in columns if c.name in inputs and c.kind in ("text", "category", "id")]
    for spans in targets:
        if not are_spans([row.get(spans) for row in rows]):
            continue
        for text in sorted(texts, key=lambda name: name != "text"):
            read = [read_spans(row.get(spans), str(row.get(text))) for row in rows]
            good = [found for found in read if not isinstance(found, str)]
            counts = Counter(span.label for found in good for span in found)
            if len(good) < MOSTLY * len(rows) or not counts:
                continue

            pairs = zip((str(row.get(text)) for row in rows), read, strict=True)
            require_ends(list(pairs), f"`{spans}`")

            def error(row: Json, text: str = text, spans: str = spans) -> str:
                found = read_spans(_read(row.get(spans)), str(row.get(text)))
                return found if isinstance(found, str) else ""

            why = {"text_column": "the text that the places are of", "spans_column": "places in it"}
            keys = {"text_column": text, "spans_column": spans}
            return _chosen(keys, why, text, counts, error)
    return None


def _chosen(
    keys: Json, why: dict[str, str], read: str, counts: Counter[str], error: Callable[[Json], str]
) -> Proposal:
    rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    spread = f"{counts[rarest]:,} (`{rarest}`) to {counts[commonest]:,} (`{commonest}`)"
    why = {"": "entities in texts", "labels": f"{counted(len(counts), 'type')}: {spread}", **why}
    labels = iob2_labels(sorted(counts))
    whole = {"type": "token_classification", **keys, "labels": labels}
    return Proposal(whole, why, [read], row_error=error)


def _read(value: Any) -> Any:
    items = list_in_cell(value)
    return value if items is None else items


def _are_lists(name: str, rows: Sequence[Json]) -> bool:
    plain = sum(_is_plain(row.get(name)) for row in rows)
    return bool(rows) and plain >= MOSTLY * len(rows)


def _are_words(name: str, rows: Sequence[Json]) -> bool:
    return _are_lists(name, rows) and all(
        isinstance(item, str) for row in rows[:100] for item in row.get(name) or ()
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(v, list | dict | None) for v in value)


def _lengths(row: Json, name: str) -> int:
    value = row.get(name)
    return len(value) if isinstance(value, list) else 0
