"""Rows whose answers or labels stand inside objects: named, with a command that helps.

Left out in silence, a text would be learned without its labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.answer_choices import QUESTION_NAME
from lora_cli.data.column_kinds import Column, is_blank
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.text_columns import flat_name
from lora_cli.errors import LoraError

ANSWERS = re.compile(r"(?i)(.*_)?answers?(_spans?)?")
ABOUT = re.compile(r"(?i)_*(meta(data)?|info|attributes|source|provenance|extra|stats)_*")
LABEL_KEYS = {"label", "labels", "type", "tag", "entity", "category", "class", "emotion", "value"}


def require_flat(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, has_label: bool
) -> None:
    """Reject rows of which a part that matters stands inside objects or lists.

    Args:
        columns: What the columns hold.
        rows: The rows.
        place: Name of the file.
        has_label: A label was found among the columns.

    Raises:
        LoraError: If there are such; its hint makes columns of them.
    """
    texts = [c.name for c in columns if QUESTION_NAME.fullmatch(c.name) and c.kind == "text"]
    asked = next((name for name in texts if name != "context"), texts[0]) if texts else None
    target = flat_name(place)
    for column in columns:
        value = next((v for row in rows if not is_blank(v := row.get(column.name))), None)
        if column.kind != "other" or ABOUT.fullmatch(column.name):
            continue
        path = _answer_in(value) if ANSWERS.fullmatch(column.name) else None
        if asked and path:
            others = (c.name for c in columns if c.name in ("context", "passage"))
            context = "".join(f", input: {field(name)}" for name in list(others)[:1])
            answer = f"{field(column.name)}{path}"
            new = f"{{instruction: {field(asked)}{context}, output: {answer}}}"
            raise LoraError(
                f"the answers stand inside `{column.name}`, which no task reads",
                place,
                f"write the first one as a column: {jq_command(new, place, target)}",
            )
        if not has_label and (path := _label_in(value)):
            new = f". + {{label: {field(column.name)}{path}}}"
            raise LoraError(
                f"`{column.name}` holds objects, in which labels may stand; no task reads them",
                place,
                f"write what is to be learned as a column: {jq_command(new, place, target)}; or "
                "name the columns to be read, `--text COLUMN --label COLUMN`, with `--label none` "
                "for text alone",
            )


def _answer_in(value: Any) -> str | None:
    """Return where the first text stands inside answers, as jq writes it."""
    if isinstance(value, dict) and isinstance(value.get("spans"), list):  # of DROP
        return ".spans[0]"
    if isinstance(value, dict) and "text" in value:
        return ".text[0]" if isinstance(value["text"], list) else ".text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "text" in value[0]:
        return "[0].text"
    return None


def _label_in(value: Any) -> str | None:
    """Return where something like a label stands inside an object, or a list of them."""
    start = ""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value, start = value[0], "[0]"
    if not isinstance(value, dict) or not value:
        return None
    name = next((name for name in value if name.lower() in LABEL_KEYS), None)
    marks = [isinstance(item, int | float) for item in value.values()]
    if name is None and len(marks) > 1 and all(marks) and not start:
        name = next(iter(value))
    return None if name is None else f"{start}{field(name)}"
