"""Thumbnails, or recordings, of the rows that the report shows next to their predictions."""

from __future__ import annotations

from pathlib import Path

from lora_cli.files import write_json
from lora_cli.reporting.page_analysis import read_predictions, worst
from lora_cli.reporting.page_answers import CASES, THUMBNAILS
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded


def write_thumbnails(folder: Path, task: Task, data: dict[str, Encoded]) -> None:
    """Write thumbnails, or recordings, of the rows of each split with the worst predictions.

    Splits without images and recordings are skipped.

    Args:
        folder: The folder of the predictions; gets `thumbnails.json`, by split and row.
        task: The task, which makes the thumbnail of a row.
        data: The splits.
    """
    thumbnails: dict[str, dict[str, str]] = {}
    kind = task.recipe.task.answer_kind
    for name, split in data.items():
        if kind == "text" or name == "train" or task.thumbnail(split.rows[0]) is None:
            continue
        lines = read_predictions(folder / f"{name}.jsonl")
        rows = [line["row"] for line in worst(kind, lines, CASES)]
        of_split = {str(row): task.thumbnail(split.rows[row]) for row in rows}
        thumbnails[name] = {
            row: picture for row, picture in of_split.items() if picture is not None
        }
    if thumbnails:
        write_json(folder / THUMBNAILS, thumbnails)
