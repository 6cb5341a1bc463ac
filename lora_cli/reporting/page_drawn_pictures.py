"""The part of the page with generated images from before, during and after training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_cli.errors import counted
from lora_cli.reporting.page_elements import esc, own, scroller, section

DRAWINGS = "drawings.json"  # in `samples`: small copies of the pictures
PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")
MOST_COLUMNS = 8


def drawing_section(folder: Path) -> str:
    """Return the section of generated images in a run's folder; empty if there are none."""
    try:
        found = json.loads((folder / "samples" / DRAWINGS).read_text(encoding="utf-8"))
        prompts = [str(prompt) for prompt in found["prompts"]]
        drawn = [_column(one, len(prompts)) for one in found["drawn"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    columns = _evenly([one for one in drawn if one is not None])
    if not prompts or not columns:
        return ""
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name, _ in columns)
    body = "".join(
        f'<tr><th scope="row">{own(prompt)}</th>'
        + "".join(f"<td>{_picture(pictures[i], prompt, name)}</td>" for name, pictures in columns)
        + "</tr>"
        for i, prompt in enumerate(prompts)
    )
    inner = f'<table class="drawn"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
    note = f"{counted(len(prompts), 'text')}, each drawn from the same noise every time. The "
    note += "pictures in their full size are in <code>samples/</code>."
    return section("drawings", "Drawn", note, scroller(f"{inner}</table>", "Drawn pictures"))


def _column(value: Any, count: int) -> tuple[str, list[str]] | None:
    """Return when images were generated, and the images; None if some are incomplete."""
    pictures = [str(picture) for picture in value["pictures"]]
    if len(pictures) != count or not all(PICTURE.fullmatch(picture) for picture in pictures):
        return None
    when = str(value["when"])
    if when == "best":
        return "with the best adapter", pictures
    step = int(when.removeprefix("step-"))
    return ("before training" if step == 0 else f"step {step:,}"), pictures


def _evenly(columns: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return as many evenly spaced columns as there is room for, with the first and the last."""
    last = len(columns) - 1
    if last < MOST_COLUMNS:
        return columns
    return [columns[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]


def _picture(data: str, prompt: str, when: str) -> str:
    return f'<img src="{data}" alt="{esc(f"{prompt}, {when}")}">'
