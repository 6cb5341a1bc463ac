"""Reject rows with nested answers or labels, with a command that flattens them.

If nested values were silently ignored, texts would be learned without their labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.answer_choices import QUESTION_NAME
from lora_cli.data.column_kinds import Column, is_blank
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError

ANSWER_NAME = re.compile(r"(?i)(.*_)?answers?(_spans?)?")
METADATA_NAME = re.compile(r"(?i)_*(meta(data)?|info|attributes|source|provenance|extra|stats)_*")
LABEL_KEYS = {"label", "labels", "type", "tag", "entity", "category", "class", "emotion", "value"}


def require_flat(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, has_label: bool
) -> None:
    """Reject rows whose answers or labels are nested in objects or lists.

    Args:
        columns: The columns, with their kinds.
        rows: The rows.
        place: Name of the file.
        has_label: Whether a label column was found.

    Raises:
        LoraError: If there are such rows; the hint is a command that turns the nested values into
            columns.
    """
    texts = [c.name for c in columns if QUESTION_NAME.fullmatch(c.name) and c.kind == "text"]
    question = next((name for name in texts if name != "context"), texts[0]) if texts else None
    for column in columns:
        value = next((v for row in rows if not is_blank(v := row.get(column.name))), None)
        if column.kind != "other" or METADATA_NAME.fullmatch(column.name):
            continue
        path = _path_of_answer(value) if ANSWER_NAME.fullmatch(column.name) else None
        if question and path:
            contexts = (c.name for c in columns if c.name in ("context", "passage"))
            input_field = "".join(f", input: {field(name)}" for name in list(contexts)[:1])
            answer = f"{field(column.name)}{path}"
            jq = f"{{instruction: {field(question)}{input_field}, output: {answer}}}"
            raise LoraError(
                f"the answers stand inside `{column.name}`, which no task reads",
                place,
                f"write the first one as a column: {jq_command(jq, place)}",
            )
        if not has_label and (path := _path_of_label(value)):
            jq = f". + {{label: {field(column.name)}{path}}}"
            raise LoraError(
                f"`{column.name}` holds objects, in which labels may stand; no task reads them",
                place,
                f"write what is to be learned as a column: {jq_command(jq, place)}; or "
                "name the columns to be read, `--text COLUMN --label COLUMN`, with `--label none` "
                "for text alone",
            )


def _path_of_answer(value: Any) -> str | None:
    """Return the jq path of the first text inside nested answers; None if there is none."""
    if isinstance(value, dict) and isinstance(value.get("spans"), list):  # as in the DROP data set
        return ".spans[0]"
    if isinstance(value, dict) and "text" in value:
        return ".text[0]" if isinstance(value["text"], list) else ".text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "text" in value[0]:
        return "[0].text"
    return None


def _path_of_label(value: Any) -> str | None:
    """Return the jq path of a likely label inside an object or a list of objects."""
    prefix = ""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value, prefix = value[0], "[0]"
    if not isinstance(value, dict) or not value:
        return None
    name = next((name for name in value if name.lower() in LABEL_KEYS), None)
    are_scores = [isinstance(item, int | float) for item in value.values()]
    if name is None and len(are_scores) > 1 and all(are_scores) and not prefix:
        name = next(iter(value))
    return None if name is None else f"{prefix}{field(name)}"
