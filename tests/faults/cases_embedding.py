"""Faults of texts to be embedded: their rows, and bases that embed in a way of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny_embedders
import tiny_translators
from cases import CASES, Case
from world import Printed, World

PAIRS: list[dict[str, Any]] = [
    {"anchor": "a warm film", "positive": "great fun"},
    {"anchor": "slow , dull , and far too long", "positive": "a long bore"},
]
LABELLED = [{"anchor": text, "label": label} for text, label in ("ax", "bx", "cy", "dz")]
SCORED = [{**row, "score": score} for row, score in zip(PAIRS, (0.5, 4), strict=True)]


def _validate(
    rows: list[dict[str, Any]], files: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None, **task: Any,
) -> Callable[[World], Printed]:  # fmt: skip
    def run(world: World) -> Printed:
        folder = tiny_embedders.save(world.folder / "base", **(base or {}))
        for name, value in (files or {}).items():
            tiny_embedders.write(folder / name, value)
        world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        recipe = world.recipe(
            model={"name": "./base"}, data={"path": "rows.jsonl"}, evaluate={"baseline": False},
            task={"type": "text_embedding", **task},
        )  # fmt: skip
        return world.lora("validate", recipe)

    return run


MODULES = "modules.json"
_RUNS = {
    ("Embeddings", "rows without a positive, and negatives that are none"): _validate(
        [*PAIRS, {"anchor": "x", "positive": ""}, {"anchor": "x", "positive": "y", "no": ["y"]}],
        negative_columns=["no"],
    ),
    ("Embeddings", "a score that is no cosine"): _validate(
        SCORED, score_column="score", loss="cosine"
    ),
    ("Embeddings", "labels of one text"): _validate(LABELLED, label_column="label"),
    ("Embeddings", "no row with a negative"): _validate(
        [{**row, "no": None} for row in PAIRS], negative_columns=["no"]
    ),
    ("Embeddings", "a text that must not be cut"): _validate(
        PAIRS, max_length=6, truncate="error"
    ),
    ("Embeddings", "a prompt that would be cut off"): _validate(
        PAIRS, truncate="left", anchor_prompt="query: "
    ),
    ("Embeddings", "keys that exclude each other"): _validate(
        PAIRS, label_column="anchor", positive_column="positive", score_scale=5.0, loss="cosent"
    ),
    ("Embeddings", "scored pairs with keys of others"): _validate(
        SCORED, score_column="score", negative_columns=["no"], symmetric=True
    ),
    ("Embeddings", "a pooling that is not known"): _validate(PAIRS, base={"pooling": "max"}),
    ("Embeddings", "a module that is not known"): _validate(
        PAIRS, {MODULES: [{"type": "models.Dense", "path": "2_Dense"}]}
    ),
    ("Embeddings", "a model in a folder of its own"): _validate(
        PAIRS, {MODULES: [{"type": "models.Transformer", "path": "0_Transformer"}]}
    ),
    ("Embeddings", "a list of modules that is damaged"): _validate(PAIRS, {MODULES: [1]}),
    ("Embeddings", "recorded steps, and rows that are streamed"): lambda world: world.lora(
        "validate",
        world.recipe(
            task={"type": "text_embedding", "label_column": "label"},
            data={"path": "rows.csv", "streaming": True}, train={"kernels": "fused"},
        ),
    ),
    ("Embeddings", "labels as an array of numbers"): lambda world: world.lora(
        "predict", "--adapter", world.trained(), "--input", world.write("texts.txt", "a\n"),
        "--output", "labels.npy",
    ),
    ("Embeddings", "an encoder-decoder"): lambda world: world.lora(
        "validate",
        world.recipe(
            model={"name": f"./{tiny_translators.save(world.folder / 'base', 't5').name}"},
            task={"type": "text_embedding"},
        ),
    ),
}  # fmt: skip
CASES += [Case(area, name, run) for (area, name), run in _RUNS.items()]
