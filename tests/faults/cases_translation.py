"""Faults of sources and targets: their rows, languages, lengths, and models that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny_translators
from cases import CASES, Case, case
from world import Printed, World

PAIRS: list[dict[str, Any]] = [
    {"source": "a warm film", "target": "great fun"},
    {"source": "slow , dull , and far too long", "target": "a long bore"},
]


def _recipe(world: World, kind: str, rows: list[dict[str, Any]], **task: Any) -> str:
    tiny_translators.save(world.folder / "base", kind)
    world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return world.recipe(
        model={"name": "./base"}, data={"path": "rows.jsonl"},
        task={"type": "seq2seq_lm", **task}, evaluate={"baseline": False},
    )  # fmt: skip


def _validate(kind: str, rows: list[dict[str, Any]], **task: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        return world.lora("validate", _recipe(world, kind, rows, **task))

    return run


_RUNS = {
    ("Models", "a decoder for translations"): lambda world: world.lora(
        "validate",
        world.recipe(model={"name": "../bases/llama"}, task={"type": "seq2seq_lm"}),
    ),
    ("Translation", "a list of targets with one that is blank"): _validate(
        "marian", [*PAIRS, {"source": "x", "target": ["y", ""]}, {"source": "x", "target": []}]
    ),
    ("Translation", "a source that is a list"): _validate(
        "marian", [*PAIRS, {"source": ["x"], "target": "y"}]
    ),
    ("Translation", "a source that must not be cut"): _validate(
        "marian", PAIRS, max_source_length=8, truncate_source="error"
    ),
    ("Translation", "a target that must not be cut"): _validate(
        "marian", PAIRS, max_target_length=3, truncate_target="error"
    ),
    ("Translation", "languages for a tokenizer without any"): _validate(
        "marian", PAIRS, source_language="en", target_language="de"
    ),
    ("Translation", "no languages for a tokenizer that needs them"): _validate("nllb", PAIRS),
    ("Translation", "a language that the tokenizer does not have"): _validate(
        "nllb", PAIRS, source_language="eng_Latn", target_language="deu_latn"
    ),
    ("Translation", "one language without the other"): _validate(
        "nllb", PAIRS, source_language="eng_Latn"
    ),
    ("Translation", "one column for both sides"): _validate(
        "marian", PAIRS, target_column="source"
    ),
    ("Translation", "lengths that leave no room for a text"): _validate(
        "nllb", PAIRS, source_language="eng_Latn", target_language="deu_Latn", max_source_length=2
    ),
}  # fmt: skip
CASES += [Case(area, name, run) for (area, name), run in _RUNS.items()]


@case("Translation", "a tokenizer that ends no text")
def _endless(world: World) -> Printed:
    recipe = _recipe(world, "marian", PAIRS)
    file = world.folder / "base" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    return world.lora("validate", recipe)


@case("Translation", "a source that is too long to be answered")
def _too_long(world: World) -> Printed:
    recipe = _recipe(world, "marian", [PAIRS[0]] * 2, max_source_length=8, truncate_source="error")
    world.lora("train", recipe, "-o", "out")
    return world.lora("predict", "--adapter", "out", PAIRS[1]["source"])


@case("lora init", "languages of columns that do not name them")
def _unnamed(world: World) -> Printed:
    _recipe(world, "nllb", [{**row, "source": f"{row['source']} {i}"}
                            for i in range(20) for row in PAIRS])  # fmt: skip
    return world.lora("init", "rows.jsonl", "--model", "./base", "-o", "new.yaml")


@case("lora init", "a translation memory")
def _memory(world: World) -> Printed:
    world.write("rows.tmx", '<?xml version="1.0"?>\n<tmx version="1.4"><body></body></tmx>\n')
    return world.lora("init", "rows.tmx", "--model", "../bases/llama", "-o", "new.yaml")


@case("Keys that do not go together", "beams and a temperature")
def _beams(world: World) -> Printed:
    generation = {"num_beams": 4, "temperature": 0.7}
    return world.lora("validate", world.recipe("llama", evaluate={"generation": generation}))


@case("Keys that do not go together", "a length penalty without beams")
def _penalty(world: World) -> Printed:
    generation = {"length_penalty": 0.7}
    return world.lora("validate", world.recipe("llama", evaluate={"generation": generation}))
