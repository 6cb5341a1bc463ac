"""Choose the text column or the text pair of a table, and describe its columns in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import CONVERSATION_NAME, Column, is_blank
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError, counted

COUNTERPARTS = {"1": "2", "a": "b", "first": "second", "left": "right", "one": "two", "x": "y"}
TEXT_NAMES = re.compile(
    r"(?i)(.*[_\W])?(text|sentence|review|message|comment|content|body|tweet|utterance|query|"
    r"question|document|article|post|description|transcript|transcription|文|テキスト|texte?o?)"
)
MESSAGES = "messages.jsonl"
TURN_KEYS = (  # keys of the role and the content of a turn
    ("role", "from", "speaker", "author", "sender", "who", "name"),
    ("content", "value", "text", "message", "utterance", "body"),
)
PAIR_NAMES = [
    ("premise", "hypothesis"), ("question", "passage"), ("question", "sentence"),
    ("question", "context"), ("query", "document"), ("query", "passage"), ("text", "text_pair"),
    ("context", "response"), ("claim", "evidence"), ("question", "answer"), ("query", "answer"),
    ("qtext", "atext"), ("question", "response"), ("query", "response"), ("prompt", "response"),
]  # fmt: skip


def content_of(column: Column) -> str:
    """Describe the content of a column in a few words."""
    return {
        "blank": "nothing in it", "url": "addresses", "date": "dates", "id": "names of rows",
        "number": "numbers", "binary": "two values",
        "category": counted(len(column.counts), "value"),
        "file": "names of files of sound or pictures", "split": "which split a row is of",
        "text": f"text, {_characters(column)} on average",
        "list": "lists", "other": "objects inside rows, which no task reads",
    }.get(column.kind, "another conversation")  # fmt: skip


def _characters(column: Column) -> str:
    return counted(round(column.characters), "character")


def list_columns(columns: Sequence[Column]) -> str:
    """List the columns with their content, for a hint."""
    return "the columns: " + "; ".join(
        f"`{column.name}`: {content_of(column)}" for column in columns[:20]
    )


def unnesting_hint(column: Column, rows: Sequence[dict[str, Any]], place: str) -> str:
    """Return a hint with a command that turns the objects in a column into columns."""
    path = field(column.name)
    value = next(value for row in rows if not is_blank(value := row.get(column.name)))
    turn = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    if isinstance(turn.get("role"), str) and isinstance(turn.get("parts"), list):
        return _gemini_hint(path, rows[0], place)
    role, content = (
        next((k for k in names if isinstance(turn.get(k), str)), "") for names in TURN_KEYS
    )
    if role and content and CONVERSATION_NAME.fullmatch(column.name):
        program = f"{{messages: [{path}[] | {{role: .{role}, content: .{content}}}]}}"
        return f"write the turns as messages: {jq_command(program, place, MESSAGES)}"
    program = f"{path}[]" if isinstance(value, list) else path
    if len(rows) > 1 and not isinstance(value, list):
        deletions = [f"del({path})"] if len(rows[0]) > 1 else []
        program = " + ".join([*deletions, path])
    return f"turn them into columns: {jq_command(program, place)}"


def _turns_hint(path: str, place: str) -> str:
    """Return the hint for lists of texts that two people say by turns."""
    role = 'if .key % 2 == 0 then "user" else "assistant" end'
    turns = f"[{path} | to_entries[] | {{role: ({role}), content: .value}}]"
    command = jq_command(f"{{messages: {turns}}}", place, MESSAGES)
    return f"if two people speak by turns, write the turns as messages: {command}"


def _gemini_hint(path: str, row: dict[str, Any], place: str) -> str:
    """Return the hint for Gemini's format: turns in parts, and a separate system prompt."""
    text = '([.parts[].text] | join(""))'
    role = '(if .role == "model" then "assistant" else .role end)'
    turns = f"[{path}[] | {{role: {role}, content: {text}}}]"
    if system := next((k for k in ("systemInstruction", "system_instruction") if k in row), None):
        turns = f'[{field(system)} | values | {{role: "system", content: {text}}}] + {turns}'
    return f"write the turns as messages: {jq_command(f'{{messages: ({turns})}}', place, MESSAGES)}"


def pair_of(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return two text columns that form a pair; None if there is no such pair.

    They match by name, or are the only two texts in a file without column names.
    """
    texts = [column for column in columns if column.kind == "text" or _is_short_text(column)]
    lower = {column.name.strip().lower(): column for column in texts}
    for first, second in PAIR_NAMES:
        if first in lower and second in lower:
            return lower[first], lower[second]
    for name in sorted(lower, key=len):  # `sentence1` before `sentence1_parse`
        for other in _counterparts(name):
            if other in lower and not name.startswith("column_"):
                return lower[name], lower[other]
    unnamed = [c for c in texts if re.fullmatch(r"column_\d+", c.name) and c.kind == "text"]
    if len(unnamed) == 2:
        short, long = sorted(unnamed, key=lambda column: column.characters)
        if long.characters < 3 * short.characters:
            return unnamed[0], unnamed[1]
    return None


def _counterparts(name: str) -> list[str]:
    """Return possible names of the second text of a pair: `#2 string` for `#1 string`."""
    parts = re.findall(r"[^\W\d_]+|\d+|[\W_]+", name)
    names = []
    for i, part in enumerate(parts):
        if part in COUNTERPARTS:
            names.append("".join([*parts[:i], COUNTERPARTS[part], *parts[i + 1 :]]))
    return names


def _is_short_text(column: Column) -> bool:
    return column.kind == "category" and column.words >= 1.5


def text_of(
    columns: Sequence[Column],
    place: str,
    label: Any,
    more: str = "",
    rows: Sequence[dict[str, Any]] = (),
) -> Column:
    """Return the text column: the one with a typical name, or the longest texts.

    Args:
        columns: The candidates.
        place: Name of the file, for the error.
        label: The label, if there is one.
        more: Further options that the hint mentions.
        rows: The rows of the file, to show how to extract a text from nested objects.

    Raises:
        LoraError: If there is no text column, or the choice is ambiguous.
    """
    texts = sorted(
        (column for column in columns if column.kind == "text"), key=lambda c: -c.characters
    )
    if not texts:
        texts = [c for c in columns if c.kind == "category" and TEXT_NAMES.fullmatch(c.name)]
    if not texts:
        texts = [c for c in columns if c.kind == "category" and c.rows_per_value < 2]
    if not texts and label is not None:
        texts = [c for c in columns if c.kind in ("category", "list") and c.words >= 1.5]
    if not texts:
        what = "no column holds text"
        nested = next((column for column in columns if column.kind == "other"), None)
        if nested is not None and rows:
            what += f", and `{nested.name}` holds objects"
            raise LoraError(what, place, unnesting_hint(nested, rows, place))
        for column in columns:
            if column.kind == "list" and CONVERSATION_NAME.fullmatch(column.name):
                raise LoraError(what, place, _turns_hint(field(column.name), place))
        raise LoraError(what, place, f"name it with `--text COLUMN` ({list_columns(columns)})")
    named = [column for column in texts if TEXT_NAMES.fullmatch(column.name.strip())]
    for candidates in (named, texts):
        if len(candidates) == 1 or (
            candidates and candidates[0].characters > 1.3 * candidates[1].characters
        ):
            return candidates[0]
    options = " or ".join(f"`{column.name}`" for column in (named or texts)[:6])
    pair_option = (
        "" if label is not None else ", or a prompt and its completion: `--text A --label B`"
    )
    raise LoraError(
        f"which column is the text? It could be {options}",
        place,
        f"name it with `--text COLUMN`{pair_option}{more} ({list_columns(columns)})",
    )


def text_reason(column: Column, columns: Sequence[Column]) -> str:
    """Return the reason for choosing a text column."""
    longer = any(c.kind == "text" and c.characters > column.characters for c in columns)
    what = "text, by its name" if longer else "the longest text"
    return f"{what} (mean {_characters(column)})"
