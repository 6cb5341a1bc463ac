"""Files for tests of `lora init`, and what their recipes say."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe

SHARED = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout
OPINIONS = [
    "a warm and funny film", "the plot is dull and slow", "what a great story it tells",
    "this film is a bore from the first minute", "great fun, and a great cast; see it",
    "slow, dull, and far too long", "the cast is warm and the story is funny",
    "a long and boring plot without an end",
]  # fmt: skip


Init = Callable[..., Recipe]


def initialiser(folder: Path, bases: dict[str, Path]) -> Init:
    """Return a function that writes a file, infers its recipe, and checks both."""

    def run(name: str, content: str | bytes | Path, model: str = "encoder", **given: Any) -> Recipe:
        source = content if isinstance(content, Path) else folder / name
        if not isinstance(content, Path):
            source.write_bytes(content.encode() if isinstance(content, str) else content)
        target = folder / "recipe.yaml"
        draft = draft_recipe(source, str(bases.get(model, model)), target, **given)
        write_recipe(target, draft.text(), draft.extra_files)
        recipe = load_recipe(target)
        check_recipe(load_recipe(target))
        return recipe

    return run


def save_bases(folder: Path) -> dict[str, Path]:
    """Save a model of each kind."""
    return {
        "encoder": tiny.save_encoder(folder / "encoder"),
        "llama": tiny.save_llama(folder / "llama"),
    }


def texts(count: int, seed: int = 0) -> list[str]:
    """Return different sentences."""
    draw = random.Random(seed)
    return [f"{draw.choice(OPINIONS)} {' '.join(draw.choices(WORDS, k=4))}" for _ in range(count)]


WORDS = "film plot cast story music light colour scene end voice".split()  # noqa: SIM905 - shorter


def table(header: Sequence[str] | None, rows: Sequence[Sequence[Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows] if header else rows)
    return out.getvalue()


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def labelled(count: int, labels: Sequence[Any]) -> list[list[Any]]:
    return [[text, labels[i % len(labels)]] for i, text in enumerate(texts(count))]


def said(recipe: Recipe) -> dict[str, Any]:
    """Return the task of a recipe without its defaults, and without what the model decides."""
    return recipe.task.model_dump(exclude_defaults=True, exclude={"max_length"})


def classification(
    text: str, label: str, labels: Sequence[Any] | None, **more: Any
) -> dict[str, Any]:
    default = {"text_column": "text", "label_column": "label", "labels": None}
    keys = {"text_column": text, "label_column": label, "labels": labels and list(labels), **more}
    changed = {k: v for k, v in keys.items() if default.get(k, ...) != v}
    return {"type": "sequence_classification", **changed}


needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


def run_hint(error: LoraError, folder: Path) -> str:
    """Run the command in the hint of an error, where the file lies; return the hint."""
    hint = error.problems[0].hint or ""
    found = re.search(r"`((?:python|zcat|jq|sed)[^`]*)`", hint)
    assert found is not None, hint
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    subprocess.run(found[1], shell=True, check=True, cwd=folder, env=environment)
    return hint
