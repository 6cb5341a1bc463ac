"""Reads rows with entities: words with tags, or texts with spans; and finds their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.entity_spans import (
    END_AFTER,
    Span,
    end_inside_words,
    read_spans,
    words_of,
)
from lora_cli.data.entity_tags import (
    OUTSIDE,
    Beginnings,
    Entity,
    Scheme,
    entities_of,
    iob2_labels,
    require_types,
    tag_error,
    types_of,
)
from lora_cli.data.file_formats import is_blank, text_error
from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.data.label_lists import list_in_cell
from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, Problem, counted, did_you_mean, printable
from lora_cli.recipe import Recipe, TokenClassificationSpec
from lora_cli.tasks.texts.word_windows import Place

N_ROWS_CHECKED = 200  # rows that are examined for how the ends of spans are counted
MAX_SHOWN = 60  # characters of a value in a message
MAX_PROBLEMS = 10  # listed for each split
UNKNOWN_NUMBERS = "what they stand for is not known"
TAG_NAMES_HINT = "name the tags in order, `--set 'task.tag_names=[O, B-PER, I-PER]'`"
IOB1_HINT = "`--set task.scheme=iob1` reads it as a beginning"


@dataclass(frozen=True)
class RowText:
    """The text of a row and the positions of its words, for the model and for people.

    The two texts differ if a user typed a text for a model that is trained on lists of words. The
    model then reads the words with `word_separator` between them, as in training.

    Args:
        text: The text that the model reads.
        places: The start and end of each word in it.
        shown: The text that is shown to people.
        shown_places: The start and end of each word in that.
    """

    text: str
    places: list[Place]
    shown: str
    shown_places: list[Place]


class EntityRows:
    """Reads the rows of a recipe, and learns the scheme of their tags and the types of entities."""

    def __init__(self, recipe: Recipe, spec: TokenClassificationSpec) -> None:
        self.recipe, self.spec = recipe, spec
        self.labels = list(spec.labels or ())
        self.scheme: Scheme = "iob2" if spec.scheme == "auto" else spec.scheme
        self.knows_scheme = spec.scheme != "auto"
        self.hub_names: list[str] = []  # names of numbered tags, from a data set of the Hub

    @property
    def types(self) -> list[str]:
        """The types of the entities, in the order of the labels."""
        return types_of(self.labels)

    @property
    def names(self) -> list[str]:
        """The names of the tags that are numbers in the data."""
        return self.spec.tag_names or self.hub_names or self.labels

    # -- contents of a row

    def words(self, row: dict[str, Any]) -> list[str] | None:
        """Return the words of a row, or None if its column does not contain a list of words."""
        items = list_in_cell(row.get(self.spec.tokens_column))
        if items is None or any(isinstance(x, bool | list | dict | None) for x in items):
            return None
        return [str(item) for item in items]

    def tags(self, row: dict[str, Any]) -> list[str] | str:
        """Return the names of a row's tags, in the data's scheme; or what is wrong, as text."""
        column = self.spec.tags_column
        items = list_in_cell(row.get(column))
        if items is None:
            return f"column `{column}` {_describe_cell(row.get(column))}, not a list of tags"
        found = []
        for number, item in enumerate(items, 1):
            if isinstance(item, str) and item.strip():
                name = item.strip()
                if name.isdecimal() and self.names:
                    item = int(name)  # numbers in a csv file are texts
                else:
                    found.append(name)
                    continue
            if isinstance(item, bool) or not isinstance(item, int):
                description = _describe_cell(item)
                return (
                    f"column `{column}`: tag {number} {description}, not a name or a whole number"
                )
            if not self.names:
                return f"column `{column}` holds numbers, and {UNKNOWN_NUMBERS}: {TAG_NAMES_HINT}"
            if not 0 <= item < len(self.names):
                last = len(self.names) - 1
                return f"column `{column}`: tag {number} is {item}, and there are tags 0 to {last}"
            found.append(self.names[item])
        return found

    def spans(self, row: dict[str, Any]) -> list[Span] | str:
        """Return the spans of a row's entities; or what is wrong with them, as text."""
        column = str(self.spec.spans_column)
        value = row.get(column)
        items = list_in_cell(value)
        text = str(row.get(str(self.spec.text_column)))
        found = read_spans(value if items is None else items, text)
        return f"column `{column}`: {found}" if isinstance(found, str) else found

    def entities(self, row: dict[str, Any]) -> list[Entity]:
        """Return the entities of a row of words for which `target_error` found no error."""
        tags = self.tags(row)
        assert not isinstance(tags, str), tags
        return entities_of(tags)

    def types_in(self, row: dict[str, Any]) -> list[str]:
        """Return the distinct types of a row's entities."""
        if self.spec.has_spans:
            spans = self.spans(row)
            return [] if isinstance(spans, str) else list(dict.fromkeys(s.label for s in spans))
        tags = self.tags(row)
        return [] if isinstance(tags, str) else types_of(tags)

    def text(self, row: dict[str, Any]) -> RowText:
        """Return the text of a row of words; a typed text is split into words by a rule."""
        value = row.get(self.spec.tokens_column)
        words = self.words(row)
        typed = str(value) if words is None else ""
        shown_places = words_of(typed)
        words = words or [typed[start:end] for start, end in shown_places]
        separator, places, at = self.spec.word_separator, [], 0
        for word in words:
            places.append((at, at + len(word)))
            at += len(word) + len(separator)
        text = separator.join(words)
        if typed:
            return RowText(text, places, typed, shown_places)
        return RowText(text, places, text, places)

    # -- errors in a row

    def input_error(self, row: dict[str, Any], may_be_typed: bool = False) -> str:
        """Return what is wrong with the words or the text of a row; empty if nothing is.

        Args:
            row: The row.
            may_be_typed: Whether a text is accepted instead of a list of words.
        """
        if self.spec.has_spans:
            return text_error(row, [str(self.spec.text_column)])
        column = self.spec.tokens_column
        value = row.get(column)
        if isinstance(value, str) and list_in_cell(value) is None and may_be_typed:
            return text_error(row, [column])
        words = self.words(row)
        if words is None:
            if isinstance(value, list):
                return f"column `{column}` holds a list with something else than words in it"
            return f"column `{column}` {_describe_cell(value)}, not a list of words"
        if not words:
            return f"column `{column}` holds no words"
        return ""

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the tags or the spans of a row; empty if nothing is."""
        if self.spec.has_spans:
            spans = self.spans(row)
            return spans if isinstance(spans, str) else ""
        tags = self.tags(row)
        if isinstance(tags, str):
            return tags
        words = self.words(row) or []
        if len(words) != len(tags):
            return (
                f"{counted(len(words), 'word')} in `{self.spec.tokens_column}`, and "
                f"{counted(len(tags), 'tag')} in `{self.spec.tags_column}`"
            )
        error = tag_error(tags, self.scheme)
        message_part = {"iob2": "continues an entity", "io": "begins with B"}.get(self.scheme)
        if message_part is not None and message_part in error:
            error += f" ({IOB1_HINT})"
        return f"column `{self.spec.tags_column}`: {error}" if error else ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return the problem of a row with an unknown type of entity, if it has one."""
        types = self.types
        for kind in self.types_in(row):
            if kind not in types:
                hint = did_you_mean(kind, types, "the types are")
                hint += "; fix the rows, or name it in `task.labels`"
                return Problem(
                    f"`{printable(kind, MAX_SHOWN)}` is not a type of entity", place, hint
                )
        return None

    # -- what is learned from the rows

    def learn_form(self, splits: dict[str, Rows]) -> None:
        """Find the scheme of the tags.

        Raises:
            LoraError: If the tags do not mark entities, or the spans exclude their last characters.
        """
        for rows in splits.values():
            self.hub_names = rows.label_names.get(self.spec.tags_column, self.hub_names)
        labelled = [splits["train"]] if "train" in splits else list(splits.values())
        if self.spec.has_spans:
            self.scheme, self.knows_scheme = "iob2", True
            for rows in labelled:
                first = [row for _, row in zip(range(N_ROWS_CHECKED), rows, strict=False)]
                texts = [
                    (str(row.get(str(self.spec.text_column))), self.spans(row)) for row in first
                ]
                require_ends(texts, self.recipe.at("task.spans_column"))
            return
        if self.knows_scheme or not labelled:
            return
        prefixes = Beginnings.of(self._readable_tags(labelled))
        if not prefixes.has_outside and prefixes.prefixes[""]:
            if all(tag.isdecimal() for tags in self._readable_tags(labelled) for tag in tags):
                what = f"the tags are numbers, and {UNKNOWN_NUMBERS}"
                raise LoraError(what, self.recipe.at("task.tags_column"), TAG_NAMES_HINT)
            raise LoraError(
                f"no word has the tag `{OUTSIDE}`, and the tags have no prefixes such as B-",
                self.recipe.at("task.tags_column"),
                "this task finds entities among other words; a tag for every word (a part of "
                "speech) is none. Is it the right column?",
            )
        self.scheme, self.knows_scheme = prefixes.scheme, True

    def _readable_tags(self, splits: Sequence[Rows]) -> Iterator[list[str]]:
        """Yield the tags of each row whose tags can be read."""
        for tags in (self.tags(row) for rows in splits for row in rows):
            if not isinstance(tags, str):
                yield tags

    def learn(self, splits: dict[str, Rows]) -> None:
        """Find the types of the entities, and so the labels.

        Raises:
            LoraError: If there are none, or if types in the data are not among the labels.
        """
        if not self.labels:
            self.labels = self._infer(splits)
        problems = []
        for name, rows in splits.items():
            unknown: dict[str, Problem] = {}
            for i, row in enumerate(rows):
                problem = self.label_problem(row, "")
                if problem is not None and problem.what not in unknown:
                    unknown[problem.what] = Problem(problem.what, rows.place(i), problem.hint)
            problems += list(unknown.values())[:MAX_PROBLEMS]
            if len(unknown) > MAX_PROBLEMS:
                what = f"{len(unknown) - MAX_PROBLEMS} more types of {name} are not labels"
                problems.append(Problem(what, rows.source, "is it the right column?"))
        if problems:
            raise LoraError(problems)

    def _infer(self, splits: dict[str, Rows]) -> list[str]:
        at = self.recipe.at("task.labels")
        if "train" not in splits:
            hint = "name them in order: `--set 'task.labels=[O, B-PER, I-PER]'`"
            raise LoraError("the labels are not known", at, hint)
        rows = splits["train"]
        if named := types_of(self.spec.tag_names or self.hub_names):
            require_types(named, self.recipe.at("task.tags_column"))
            return iob2_labels(named)
        at_column = self.recipe.at(
            "task.spans_column" if self.spec.has_spans else "task.tags_column"
        )
        types = {kind for row in rows for kind in self.types_in(row)}
        if not types:
            column = self.spec.spans_column or self.spec.tags_column
            what = f"no row of the train split has an entity in `{column}`"
            raise LoraError(what, rows.source, "is it the right column?")
        if len(types) > 20 and len(types) > len(rows) / 2:
            what = f"{counted(len(types), 'type')} of entities in {counted(len(rows), 'row')}"
            raise LoraError(what, at_column, "is it the right column? If it is, name `task.labels`")
        require_types(types, at_column, self.spec.has_spans)
        return iob2_labels(sorted(types))


def _describe_cell(value: Any) -> str:
    """Return a description of a cell for a message."""
    if is_blank(value):
        return "is blank"
    if isinstance(value, str):
        return f"holds `{printable(value, MAX_SHOWN)}`"
    return f"holds {JSON_NAMES.get(type(value), 'something else')}"


def require_ends(texts: Sequence[tuple[str, list[Span] | str]], where: str) -> None:
    """Check that the end of a span is the position after its last character.

    Args:
        texts: Texts with their spans, or with an error instead.
        where: The location of the spans, for the error.

    Raises:
        LoraError: If nearly all spans lack the last letter of a word.
    """
    if end_inside_words([(text, spans) for text, spans in texts if not isinstance(spans, str)]):
        what = f"nearly all spans lack the last letter of a word: {END_AFTER}"
        raise LoraError(what, where, "add 1 to each end")


def spans_in_words(spans: Sequence[Span], places: Sequence[Place], text: str) -> list[Entity]:
    """Return spans of characters as entities, whose positions count words.

    Args:
        spans: The spans in the text.
        places: The start and end of each word, or token, in the text.
        text: The text.

    Raises:
        LoraError: If a span begins or ends inside a word.
    """
    starts = {start: i for i, (start, _) in enumerate(places)}
    ends = {end: i for i, (_, end) in enumerate(places)}
    entities = []
    for span in spans:
        first, last = starts.get(span.start), ends.get(span.end)
        if first is None or last is None:
            boundary = span.start if first is None else span.end
            token_place = next(
                (p for p in places if p[0] < boundary < p[1]), (span.start, span.end)
            )
            entity = f"`{printable(text[span.start : span.end], 40)}` ({span.label})"
            token = (
                f"the token `{printable(text[slice(*token_place)], 40)}` of this model's tokenizer"
            )
            raise LoraError(
                f"the span {span.start} to {span.end}, {entity}, cuts {token}",
                hint="let it begin and end where a word does, or take a base with shorter tokens",
            )
        entities.append(Entity(first, last + 1, span.label))
    return entities
