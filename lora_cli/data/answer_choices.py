"""Rows with a question, its choices and which is right: named, with a command that helps.

The choices stand in a list, in an object, or in columns of their own (`ending0` to `ending3`). A
classifier would learn the number of the right one, which says nothing without the choices.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import Column, is_blank, label_text
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.text_columns import flat_name
from lora_cli.errors import LoraError

CHOICES = re.compile(r"(?i)(.*_)?(choices|options|endings|alternatives)")
ASKED = re.compile(r"(?i)question|query|prompt|ctx|context|stem|instruction|startphrase|problem")
TOLD = re.compile(r"(?i)premise|goal|sentence|passage|article|story|scenario")
KEY = re.compile(r"(?i)answer[_ ]?key|answer([_ ]?(idx|index|id))?|label|correct([_ ]?answer)?")
NUMBER_KEY = re.compile(
    r"(?i)(.*[_\W])?(answers?|ans|labels?|correct|gold|cop|target|key|winner|"
    r"better|preferred|preference)([_\W].*)?"
)
NUMBERED = re.compile(
    r"(?i)(?P<stem>(.*[_\W])?(choice|opt(ion)?|op|sol(ution)?|ans(wer)?|ending|alternative|"
    r"candidate|hyp(othesis)?|resp(onse)?|completion|output|summary|ref(erence)?)[_ ]?|)"
    r"(?P<mark>\d|[a-hjk])"
)
ANSWERS = re.compile(r"(?i)(.*[_\W])?(ans(wer)?|resp(onse)?|completion|output|summary|ref)[_ ]?")
LETTERS = "ABCDEFGH"
MARKS = f"{LETTERS} JK 0123456789 12345678"


def require_no_choices(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str
) -> None:
    """Reject rows whose label is the number of a choice.

    Args:
        columns: What the columns hold.
        rows: The rows.
        place: Name of the file.

    Raises:
        LoraError: If there are such; its hint makes prompts and completions of them.
    """
    texts = [c.name for c in columns if c.kind == "text"]
    for column in columns:
        if CHOICES.fullmatch(column.name) and column.kind in ("other", "list"):
            asked = [name for name in texts if ASKED.fullmatch(name)]
            asked = [name for name in asked if name != "context"] or asked
            key = next((c for c in columns if KEY.fullmatch(c.name) and c.kind != "other"), None)
            if asked and key:
                value = next((v for row in rows if not is_blank(v := row.get(column.name))), None)
                raise _error(asked[:1], f"`{column.name}`", key, _listed(column, value, key), place)
    for names in _numbered(columns):
        among = {c.name for c in columns} - {*names}
        key = next((c for c in columns if c.name in among and _is_key(c, len(names))), None)
        asked = [n for n in texts if n in among and (ASKED.fullmatch(n) or TOLD.fullmatch(n))]
        asked = asked or [name for name in texts if name in among][:1]
        if key and asked:
            shown = f"`{names[0]}` to `{names[-1]}`"
            inside = "[" + ", ".join(map(field, names)) + "]"
            raise _error(asked, shown, key, (inside, _at(inside, key, len(names))), place)


def require_one_answer_column(columns: Sequence[Column], used: Sequence[str], place: str) -> None:
    """Reject rows with several answers in columns of their own, of which a task reads none.

    Args:
        columns: What the columns hold.
        used: The columns that the task reads; the text or the prompt is the first.
        place: Name of the file.

    Raises:
        LoraError: If there are such, as in collections of preferences.
    """
    texts = {column.name for column in columns if column.kind == "text"}
    for names in _numbered(columns):
        stem = NUMBERED.fullmatch(names[0].strip())
        if stem and ANSWERS.fullmatch(stem["stem"]) and texts.issuperset(names):
            asked = used[0] if used else "COLUMN"
            if not set(names) & set(used):
                raise LoraError(
                    f"the rows have several answers (`{'`, `'.join(names)}`): they are there to be "
                    "ranked, which no task learns",
                    place,
                    f"name the one that is learned: `--text {shlex.quote(asked)} --label "
                    f"{shlex.quote(names[0])}`; or `--text {shlex.quote(asked)} --label none`",
                )


def _error(
    asked: Sequence[str], choices: str, key: Column, found: tuple[str, str], place: str
) -> LoraError:
    listed, right = found
    told = ' + "\\n" + '.join(map(field, asked))
    start = f"{field(key.name)} as $key | "
    how = f'{start}{{prompt: ({told} + "\\n" + ({listed} | join("\\n"))), completion: ({right})}}'
    question = "`, `".join(asked)
    return LoraError(
        f"each row has a question (`{question}`) and its choices ({choices}), and no task chooses "
        "among texts",
        place,
        f"write them as prompt and completion: {jq_command(how, place, flat_name(place))}; or name "
        f"what is learned: `--text {shlex.quote(asked[-1])} --label {shlex.quote(key.name)}`",
    )


def _listed(column: Column, value: Any, key: Column) -> tuple[str, str]:
    """Return the expressions of jq for the choices in a column, and for the right one."""
    own = field(column.name)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        mark = next((name for name in ("label", "key", "id") if name in value[0]), "label")
        return f"[{own}[].text]", f"{own}[] | select({field(mark)} == $key).text"
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        if "label" in value:
            return f"{own}.text", f"{own} | .text[.label | index($key)]"
        return f"{own}.text", _at(f"{own}.text", key, len(value["text"]))
    if isinstance(value, dict):
        keyed = set(key.counts) <= {*value}
        return f"[{own}[]]", f"{own}[$key]" if keyed else "$key | tostring"
    count = len(value) if isinstance(value, list) else 0
    return own, _at(own, key, count)


def _at(choices: str, key: Column, count: int) -> str:
    """Return the expression of jq for the choice that a key names: by number, letter or itself."""
    keys = set(key.counts)
    if keys <= set(map(str, range(count))):
        return f"{choices}[$key | tonumber]"
    if keys <= set(map(str, range(1, count + 1))):
        return f"{choices}[($key | tonumber) - 1]"
    if {one.upper() for one in keys} <= {*LETTERS}:
        return f'{choices}["{LETTERS}" | index($key | ascii_upcase)]'
    return "$key | tostring"


def _numbered(columns: Sequence[Column]) -> list[list[str]]:
    """Return the names of columns that differ by a number or a letter alone, as choices do."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for column in columns:
        found = NUMBERED.fullmatch(column.name.strip())
        if found and column.kind in ("text", "category", "id"):
            groups[found["stem"].lower()].append((found["mark"].upper(), column.name))
    good = []
    for stem, members in groups.items():
        marks = "".join(mark for mark, _ in sorted(members))
        if len(marks) > (1 if stem else 2) and marks in MARKS:
            good.append([name for _, name in sorted(members)])
    return good


def _is_key(column: Column, count: int) -> bool:
    """Return whether a column says which of so many choices is right."""
    if not NUMBER_KEY.fullmatch(column.name.strip()) or len(column.counts) < 2:
        return False
    keys = {label_text(value).upper() for value in column.counts}
    numbers = [set(map(str, range(first, first + count))) for first in (0, 1)]
    return any(keys <= known for known in (*numbers, {*LETTERS[:count]}))
