"""Small pictures, or the sound, of the rows that the report shows, next to the predictions."""

from __future__ import annotations

from pathlib import Path

from lora_cli.files import write_json
from lora_cli.reporting.page_analysis import read_predictions, worst
from lora_cli.reporting.page_answers import CASES, THUMBNAILS
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded


def write_thumbnails(folder: Path, task: Task, data: dict[str, Encoded]) -> None:
    """Write pictures, or the sound, of the worst rows of each split, if its rows have such.

    Args:
        folder: Of the predictions; it gets `thumbnails.json`, by split and by row.
        task: What the rows mean.
        data: The splits.
    """
    found: dict[str, dict[str, str]] = {}
    kind = task.recipe.task.answer_kind
    for name, split in data.items():
        if kind == "text" or name == "train" or task.thumbnail(split.rows[0]) is None:
            continue
        lines = read_predictions(folder / f"{name}.jsonl")
        rows = [line["row"] for line in worst(kind, lines, CASES)]
        made = {str(row): task.thumbnail(split.rows[row]) for row in rows}
        found[name] = {row: picture for row, picture in made.items() if picture is not None}
    if found:
        write_json(folder / THUMBNAILS, found)
