"""Proposes token classification for `lora init`: words with tags, or texts with typed spans."""

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
OTHER_ANNOTATION = re.compile(r"(?i)(.*_)?(pos|upos|xpos|chunk|dep|morph|lemma)(_.*)?")
WORD_NAME = re.compile(r"(?i)words?|tokens?")
TAG = re.compile(r"O|[BIESLU]-\S+")
MOST_ROWS = 0.9  # the share of the rows that must fit
Json = dict[str, Any]


def propose_entities(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to find the entities of a table; see `Task.propose`."""
    if table.pair is not None:
        return None
    return proposed(
        lambda: entity_proposal(table.columns, table.rows, table.place, table.text, table.label),
        Certainty.BY_FORM,
    )


def entity_proposal(
    columns: Sequence[Column], rows: Sequence[Json], place: str, text: str | None, label: str | None
) -> Proposal | None:
    """Return the proposal for rows with entities, or None if the rows have none.

    Args:
        columns: The columns of the rows.
        rows: The rows.
        place: The name of the file, for errors.
        text: The column of the words or the text, if the user names it.
        label: The column of the tags or the spans, if the user names it.

    Raises:
        LoraError: If the tags are numbers without names, or the rows have another format, which is
            named.
    """
    # lists in csv files are texts
    rows = [{name: _as_list(value) for name, value in row.items()} for row in rows]
    names = [column.name for column in columns]
    inputs = [name for name in names if text in (None, name)]
    if label is None:
        tags, spans = ([n for n in names if p.fullmatch(n)] for p in (TAG_NAME, SPANS_NAME))
    else:
        tags = spans = [label]
    found = _words_proposal(inputs, tags, rows, place)
    if has_spans := found is None:
        found = _spans_proposal(columns, inputs, spans, rows)
    if found is None:
        _require_sentences(inputs, tags, rows, place)
        _require_lists(inputs, tags, rows, place)
        _require_tags(inputs, tags, rows, place)
    else:
        require_types(types_of(found.keys["labels"]), place, has_spans)
    return found


def _require_sentences(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Check that rows are sentences, not single words as in a well-known corpus on Kaggle.

    Raises:
        LoraError: If a column has single words, and another one tags such as `B-geo`.
    """
    words = next((name for name in inputs if WORD_NAME.fullmatch(name)), None)
    for tags in targets if words is not None else ():
        values = [row[tags] for row in rows if isinstance(row.get(tags), str)]
        n_tagged = sum(TAG.fullmatch(value.strip()) is not None for value in values)
        if n_tagged >= MOST_ROWS * len(rows) and any(value[:2] == "B-" for value in values):
            what = f"each row is one word (`{words}`) with its tag (`{tags}`), and no sentence"
            hint = "write a line for each word, the word, a tab and the tag, and a blank line "
            raise LoraError(what, place, f"{hint}between sentences, into a file `.conll`")


def _require_lists(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Check that tags do not belong to the words of a text that is not split into a list.

    Raises:
        LoraError: If there is a tag for each word between spaces; its hint splits the text.
    """
    for text in inputs:
        words = [row[text].split() if isinstance(row.get(text), str) else [] for row in rows]
        for tags in (name for name in targets if name != text and any(words)):
            cells = [row.get(tags) for row in rows]
            tag_lists = [cell.split() if isinstance(cell, str) else cell for cell in cells]
            pairs = [(w, t) for w, t in zip(words, tag_lists, strict=True) if isinstance(t, list)]
            fitting = [t for w, t in pairs if len(w) == len(t) > 1 and all(map(_is_tag, t))]
            if len(fitting) < MOST_ROWS * len(rows) or not any(
                t[:2] == "B-" for g in fitting for t in g
            ):
                continue
            program = f'. + {{tokens: [{field(text)} | scan("\\\\S+")]}}'
            if any(isinstance(cell, str) for cell in cells):
                splits = (f'[{field(name)} | scan("\\\\S+")]' for name in (text, tags))
                program = "{{tokens: {}, tags: {}}}".format(*splits)
            what = (
                f"each word of the text `{text}` has a tag in `{tags}`, and no list has the words"
            )
            hint = f"write the words as a list: {jq_command(program, place)}"
            raise LoraError(what, place, hint)


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and TAG.fullmatch(value) is not None


def _require_tags(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> None:
    """Check that spans do not count words, as in GLiNER's data: `[[0, 1, person]]`.

    Raises:
        LoraError: If they do; its hint converts them to a tag for each word.
    """
    for tokens in (name for name in inputs if _is_word_column(name, rows)):
        for places in (name for name in targets if name != tokens):
            found = [(row.get(places), _length(row, tokens)) for row in rows]
            spans = [
                (span, n_words)
                for places_in_row, n_words in found
                if isinstance(places_in_row, list)
                for span in places_in_row
            ]
            if not spans or not all(_counts_words(span, n_words) for span, n_words in spans):
                continue
            last = (
                "$one[1]" if any(span[1] == n_words for span, n_words in spans) else "$one[1] + 1"
            )
            words, spans_field = field(tokens), field(places)
            prefix = '(if $i == $one[0] then "B-" else "I-" end)'
            inner = f"reduce range($one[0]; {last}) as $i (.; .[$i] = {prefix} + $one[2])"
            tags = f'reduce ({spans_field} // [])[] as $one ([{words}[] | "O"]; {inner})'
            program = f"{{tokens: {words}, tags: ({tags})}}"
            what = f"the places in `{places}` count words, and no task reads such"
            hint = f"write a tag for each word: {jq_command(program, place)}"
            raise LoraError(what, place, hint)


def _counts_words(span: Any, size: int) -> bool:
    """Return whether a value is a span of words: the first, the last (or the next), and a type."""
    if not isinstance(span, list) or len(span) != 3 or not isinstance(span[2], str):
        return False
    return all(type(n) is int for n in span[:2]) and 0 <= span[0] <= span[1] <= size


def _words_proposal(
    inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json], place: str
) -> Proposal | None:
    """Return the proposal for rows with a list of words and a list of tags."""
    candidates = [name for name in targets if _is_list_column(name, rows)]
    ranked = sorted(
        candidates, key=lambda name: (bool(OTHER_ANNOTATION.fullmatch(name)), "ner" not in name)
    )
    for tags in ranked:
        word_columns = [name for name in inputs if name != tags and _is_word_column(name, rows)]
        if len(inputs) > 1:  # a column of parts of speech is used only if the user names it
            word_columns = [name for name in word_columns if not OTHER_ANNOTATION.fullmatch(name)]
        for tokens in word_columns:
            n_matching = sum(_length(row, tokens) == _length(row, tags) for row in rows)
            has_sentences = sum(_length(row, tags) for row in rows) > len(rows)
            if has_sentences and n_matching >= MOST_ROWS * len(rows):
                return _tags_proposal(tokens, tags, rows, place)
    return None


def _tags_proposal(tokens: str, column: str, rows: Sequence[Json], place: str) -> Proposal | None:
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
        row = {name: _as_list(row.get(name)) for name in (tokens, column)}
        if _length(row, tokens) != _length(row, column) or not _length(row, tokens):
            return "words and tags differ in number"
        return tag_error([str(tag).strip() for tag in row[column]], scheme)

    keys = {"tokens_column": tokens, "tags_column": column, "scheme": scheme}
    prefixes = ", ".join(sorted(p or "none" for p in found.prefixes if p != "O"))
    why = {"scheme": f"by the prefixes of the tags: {prefixes}", "tokens_column": "lists of words"}
    why["tags_column"] = "a tag for each word"
    return _proposal(keys, why, tokens, counts, error)


def _spans_proposal(
    columns: Sequence[Column], inputs: Sequence[str], targets: Sequence[str], rows: Sequence[Json]
) -> Proposal | None:
    """Return the proposal for rows with a text and a list of spans in it."""
    texts = [c.name for c in columns if c.name in inputs and c.kind in ("text", "category", "id")]
    for spans in targets:
        if not are_spans([row.get(spans) for row in rows]):
            continue
        for text in sorted(texts, key=lambda name: name != "text"):
            read = [read_spans(row.get(spans), str(row.get(text))) for row in rows]
            good = [found for found in read if not isinstance(found, str)]
            counts = Counter(span.label for found in good for span in found)
            if len(good) < MOST_ROWS * len(rows) or not counts:
                continue

            pairs = zip((str(row.get(text)) for row in rows), read, strict=True)
            require_ends(list(pairs), f"`{spans}`")

            def error(row: Json, text: str = text, spans: str = spans) -> str:
                found = read_spans(_as_list(row.get(spans)), str(row.get(text)))
                return found if isinstance(found, str) else ""

            why = {"text_column": "the text that the places are of", "spans_column": "places in it"}
            keys = {"text_column": text, "spans_column": spans}
            return _proposal(keys, why, text, counts, error)
    return None


def _proposal(
    keys: Json,
    why: dict[str, str],
    input_column: str,
    counts: Counter[str],
    error: Callable[[Json], str],
) -> Proposal:
    rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    range_of_counts = f"{counts[rarest]:,} (`{rarest}`) to {counts[commonest]:,} (`{commonest}`)"
    why = {
        "": "entities in texts",
        "labels": f"{counted(len(counts), 'type')}: {range_of_counts}",
        **why,
    }
    labels = iob2_labels(sorted(counts))
    all_keys = {"type": "token_classification", **keys, "labels": labels}
    return Proposal(all_keys, why, [input_column], row_error=error)


def _as_list(value: Any) -> Any:
    items = list_in_cell(value)
    return value if items is None else items


def _is_list_column(name: str, rows: Sequence[Json]) -> bool:
    plain = sum(_is_flat_list(row.get(name)) for row in rows)
    return bool(rows) and plain >= MOST_ROWS * len(rows)


def _is_word_column(name: str, rows: Sequence[Json]) -> bool:
    return _is_list_column(name, rows) and all(
        isinstance(item, str) for row in rows[:100] for item in row.get(name) or ()
    )


def _is_flat_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(v, list | dict | None) for v in value)


def _length(row: Json, name: str) -> int:
    value = row.get(name)
    return len(value) if isinstance(value, list) else 0
