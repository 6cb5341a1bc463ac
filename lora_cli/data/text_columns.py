"""Which column is the text, or which two are, and what the columns hold, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.column_kinds import CONVERSATION_NAME, Column, is_blank
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError, counted

SECOND = {"1": "2", "a": "b", "first": "second", "left": "right", "one": "two", "x": "y"}
TEXT_NAMES = re.compile(
    r"(?i)(.*[_\W])?(text|sentence|review|message|comment|content|body|tweet|utterance|query|"
    r"question|document|article|post|description|transcript|transcription|文|テキスト|texte?o?)"
)
MESSAGES = "messages.jsonl"
TURN = (  # how turns of conversations name who speaks, and what is said
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
    """Return in a few words what a column holds."""
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


def listed(columns: Sequence[Column]) -> str:
    """Return the columns with what they hold, for a hint."""
    return "the columns: " + "; ".join(
        f"`{column.name}`: {content_of(column)}" for column in columns[:20]
    )


def flat_name(place: str) -> str:
    """Return a name for the file that a command makes of another, never that file's own.

    A shell empties the file that is written to before the command reads it.
    """
    return "flat.jsonl" if Path(place).name != "flat.jsonl" else "flatter.jsonl"


def unnested(column: Column, rows: Sequence[dict[str, Any]], place: str) -> str:
    """Return the command that makes columns of the objects in a column."""
    own = field(column.name)
    value = next(value for row in rows if not is_blank(value := row.get(column.name)))
    turn = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    if isinstance(turn.get("role"), str) and isinstance(turn.get("parts"), list):
        return _of_gemini(own, rows[0], place)
    who, said = (next((k for k in names if isinstance(turn.get(k), str)), "") for names in TURN)
    if who and said and CONVERSATION_NAME.fullmatch(column.name):
        how = f"{{messages: [{own}[] | {{role: .{who}, content: .{said}}}]}}"
        return f"write the turns as messages: {jq_command(how, place, MESSAGES)}"
    how = f"{own}[]" if isinstance(value, list) else own
    if len(rows) > 1 and not isinstance(value, list):
        deletions = [f"del({own})"] if len(rows[0]) > 1 else []
        how = " + ".join([*deletions, own])
    return f"turn them into columns: {jq_command(how, place, flat_name(place))}"


def _of_gemini(own: str, row: dict[str, Any], place: str) -> str:
    """Return the command for turns as Gemini has them, in parts, with a system prompt apart."""
    said = '([.parts[].text] | join(""))'
    role = '(if .role == "model" then "assistant" else .role end)'
    how = f"[{own}[] | {{role: {role}, content: {said}}}]"
    if system := next((k for k in ("systemInstruction", "system_instruction") if k in row), None):
        how = f'[{field(system)} | values | {{role: "system", content: {said}}}] + {how}'
    return f"write the turns as messages: {jq_command(f'{{messages: ({how})}}', place, MESSAGES)}"


def pair_of(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return two texts that belong together, by their names or for want of names."""
    texts = [column for column in columns if column.kind == "text" or _is_short_text(column)]
    lower = {column.name.strip().lower(): column for column in texts}
    for one, two in PAIR_NAMES:
        if one in lower and two in lower:
            return lower[one], lower[two]
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
    """Return the names that a second text would have: `#2 string` beside `#1 string`."""
    parts = re.findall(r"[^\W\d_]+|\d+|[\W_]+", name)
    found = []
    for i, part in enumerate(parts):
        if part in SECOND:
            found.append("".join([*parts[:i], SECOND[part], *parts[i + 1 :]]))
    return found


def _is_short_text(column: Column) -> bool:
    return column.kind == "category" and column.words >= 1.5


def text_of(
    columns: Sequence[Column],
    place: str,
    label: Any,
    more: str = "",
    rows: Sequence[dict[str, Any]] = (),
) -> Column:
    """Return the column of the text: the longest, unless names or lengths leave a doubt.

    Args:
        columns: Those that may be it.
        place: Name of the file, for the error.
        label: The label, if there is one.
        more: What else the error says of the options.
        rows: Those of the file, to show how a text is taken out of the objects in a column.
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
            raise LoraError(what, place, unnested(nested, rows, place))
        raise LoraError(what, place, f"name it with `--text COLUMN` ({listed(columns)})")
    named = [column for column in texts if TEXT_NAMES.fullmatch(column.name.strip())]
    for some in (named, texts):
        if len(some) == 1 or (some and some[0].characters > 1.3 * some[1].characters):
            return some[0]
    close = " or ".join(f"`{column.name}`" for column in (named or texts)[:6])
    both = "" if label is not None else ", or a prompt and its completion: `--text A --label B`"
    raise LoraError(
        f"which column is the text? It could be {close}",
        place,
        f"name it with `--text COLUMN`{both}{more} ({listed(columns)})",
    )


def text_reason(column: Column, columns: Sequence[Column]) -> str:
    """Return why a column is taken for the text."""
    longer = any(c.kind == "text" and c.characters > column.characters for c in columns)
    what = "text, by its name" if longer else "the longest text"
    return f"{what} (mean {_characters(column)})"
