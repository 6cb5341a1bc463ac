"""Detect multiple-choice questions, and reject them with a command that converts them.

The choices are in a list, an object, or columns of their own (`ending0` to `ending3`). A classifier
would learn the index of the correct choice, which means nothing without the choices.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import Column, is_blank, label_text
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError

CHOICES_NAME = re.compile(r"(?i)(.*_)?(choices|options|endings|alternatives)")
QUESTION_NAME = re.compile(
    r"(?i)question|query|prompt|ctx|context|stem|instruction|startphrase|problem"
)
CONTEXT_NAME = re.compile(r"(?i)premise|goal|sentence|passage|article|story|scenario")
KEY_NAME = re.compile(
    r"(?i)answer[_ ]?key|answer([_ ]?(idx|index|id))?|label|correct([_ ]?answer)?"
)
INDEX_KEY_NAME = re.compile(
    r"(?i)(.*[_\W])?(answers?|ans|labels?|correct|gold|cop|target|key|winner|"
    r"better|preferred|preference)([_\W].*)?"
)
NUMBERED_NAME = re.compile(
    r"(?i)(?P<stem>(.*[_\W])?(choice|opt(ion)?|op|sol(ution)?|ans(wer)?|ending|alternative|"
    r"candidate|hyp(othesis)?|resp(onse)?|completion|output|summary|ref(erence)?)[_ ]?|)"
    r"(?P<mark>\d|[a-hjk])"
)
ANSWER_STEM = re.compile(
    r"(?i)(.*[_\W])?(ans(wer)?|resp(onse)?|completion|output|summary|ref)[_ ]?"
)
LETTERS = "ABCDEFGH"
MARKS = f"{LETTERS} JK 0123456789 12345678"


def require_no_choices(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str
) -> None:
    """Reject rows whose label is the index of a choice.

    Args:
        columns: The columns, with their kinds.
        rows: The rows.
        place: Name of the file.

    Raises:
        LoraError: If the rows are multiple-choice questions. The hint is a command that turns them
            into prompts and completions.
    """
    texts = [c.name for c in columns if c.kind == "text"]
    for column in columns:
        if CHOICES_NAME.fullmatch(column.name) and column.kind in ("other", "list"):
            questions = [name for name in texts if QUESTION_NAME.fullmatch(name)]
            questions = [name for name in questions if name != "context"] or questions
            key = next(
                (c for c in columns if KEY_NAME.fullmatch(c.name) and c.kind != "other"), None
            )
            if questions and key:
                value = next((v for row in rows if not is_blank(v := row.get(column.name))), None)
                raise _error(
                    questions[:1],
                    f"`{column.name}`",
                    key,
                    _choices_in_column(column, value, key),
                    place,
                )
    for names in _numbered_columns(columns):
        remaining = {c.name for c in columns} - {*names}
        key = next((c for c in columns if c.name in remaining and _is_key(c, len(names))), None)
        questions = [
            n
            for n in texts
            if n in remaining and (QUESTION_NAME.fullmatch(n) or CONTEXT_NAME.fullmatch(n))
        ]
        questions = questions or [name for name in texts if name in remaining][:1]
        if key and questions:
            column_range = f"`{names[0]}` to `{names[-1]}`"
            choices = "[" + ", ".join(map(field, names)) + "]"
            raise _error(
                questions, column_range, key, (choices, _choice_at(choices, key, len(names))), place
            )


def require_one_answer_column(columns: Sequence[Column], used: Sequence[str], place: str) -> None:
    """Reject rows with several answer columns, none of which the task reads.

    Args:
        columns: The columns, with their kinds.
        used: The columns that the task reads, the text or prompt first.
        place: Name of the file.

    Raises:
        LoraError: If there are such columns, as in preference data sets.
    """
    texts = {column.name for column in columns if column.kind == "text"}
    for names in _numbered_columns(columns):
        match = NUMBERED_NAME.fullmatch(names[0].strip())
        if match and ANSWER_STEM.fullmatch(match["stem"]) and texts.issuperset(names):
            prompt = used[0] if used else "COLUMN"
            if not set(names) & set(used):
                raise LoraError(
                    f"the rows have several answers (`{'`, `'.join(names)}`): they are there to be "
                    "ranked, which no task learns",
                    place,
                    f"name the one that is learned: `--text {shlex.quote(prompt)} --label "
                    f"{shlex.quote(names[0])}`; or `--text {shlex.quote(prompt)} --label none`",
                )


def _error(
    questions: Sequence[str], choices: str, key: Column, expressions: tuple[str, str], place: str
) -> LoraError:
    options, right = expressions
    prompt = ' + "\\n" + '.join(map(field, questions))
    start = f"{field(key.name)} as $key | "
    jq = f'{start}{{prompt: ({prompt} + "\\n" + ({options} | join("\\n"))), completion: ({right})}}'
    question = "`, `".join(questions)
    return LoraError(
        f"each row has a question (`{question}`) and its choices ({choices}), and no task chooses "
        "among texts",
        place,
        f"write them as prompt and completion: {jq_command(jq, place)}; or name "
        f"what is learned: `--text {shlex.quote(questions[-1])} --label {shlex.quote(key.name)}`",
    )


def _choices_in_column(column: Column, value: Any, key: Column) -> tuple[str, str]:
    """Return jq expressions for the choices in a column, and for the correct choice."""
    path = field(column.name)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        key_field = next((name for name in ("label", "key", "id") if name in value[0]), "label")
        return f"[{path}[].text]", f"{path}[] | select({field(key_field)} == $key).text"
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        if "label" in value:
            return f"{path}.text", f"{path} | .text[.label | index($key)]"
        return f"{path}.text", _choice_at(f"{path}.text", key, len(value["text"]))
    if isinstance(value, dict):
        has_all_keys = set(key.counts) <= {*value}
        return f"[{path}[]]", f"{path}[$key]" if has_all_keys else "$key | tostring"
    count = len(value) if isinstance(value, list) else 0
    return path, _choice_at(path, key, count)


def _choice_at(choices: str, key: Column, count: int) -> str:
    """Return the jq expression for the choice that a key names by number, letter or text."""
    keys = set(key.counts)
    if keys <= set(map(str, range(count))):
        return f"{choices}[$key | tonumber]"
    if keys <= set(map(str, range(1, count + 1))):
        return f"{choices}[($key | tonumber) - 1]"
    if {letter.upper() for letter in keys} <= {*LETTERS}:
        return f'{choices}["{LETTERS}" | index($key | ascii_upcase)]'
    return "$key | tostring"


def _numbered_columns(columns: Sequence[Column]) -> list[list[str]]:
    """Return groups of columns whose names differ only in a number or letter, as choices do."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for column in columns:
        match = NUMBERED_NAME.fullmatch(column.name.strip())
        if match and column.kind in ("text", "category", "id"):
            groups[match["stem"].lower()].append((match["mark"].upper(), column.name))
    choice_columns = []
    for stem, members in groups.items():
        marks = "".join(mark for mark, _ in sorted(members))
        if len(marks) > (1 if stem else 2) and marks in MARKS:
            choice_columns.append([name for _, name in sorted(members)])
    return choice_columns


def _is_key(column: Column, count: int) -> bool:
    """Return whether a column says which of `count` choices is correct."""
    if not INDEX_KEY_NAME.fullmatch(column.name.strip()) or len(column.counts) < 2:
        return False
    keys = {label_text(value).upper() for value in column.counts}
    ranges = [set(map(str, range(first, first + count))) for first in (0, 1)]
    return any(keys <= candidates for candidates in (*ranges, {*LETTERS[:count]}))
