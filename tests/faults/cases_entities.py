"""Faults of rows with entities: CoNLL files, tags, spans, and what is learned from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES, Case, case
from world import Printed, World

WORDS = {"type": "token_classification"}
TEXTS = {**WORDS, "text_column": "text", "spans_column": "spans"}
GOOD = {"tokens": ["Ada", "met", "Ida"], "tags": ["B-PER", "O", "B-PER"]}
SPANNED = {"text": "Ada met Ida", "spans": [[0, 3, "PER"]]}


def _rows(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _words(tokens: Any, tags: Any) -> dict[str, Any]:
    return {"tokens": tokens, "tags": tags}


def _text(*spans: Any) -> dict[str, Any]:
    return {"text": "Ada met Ida", "spans": list(spans)}


def _validate(name: str, content: str, task: dict[str, Any], *flags: str) -> Callable[..., Printed]:
    def run(world: World) -> Printed:
        world.write(name, content)
        recipe = world.recipe(data={"path": name}, task=task)
        return world.lora("validate", recipe, *flags)

    return run


CONLL = "Ada\tB-PER\nmet\tO\nIda\tB-PER\n\n"
FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a line with other columns": ("rows.conll", CONLL + "Ida\tB-PER\nmet\n\n", WORDS),
    "lists of other lengths": ("rows.jsonl", _rows(GOOD, _words(["a", "b"], ["O"])), WORDS),
    "what is no list of words": (
        "rows.jsonl",
        _rows(GOOD, _words("a b", ["O"]), _words([], []), _words([[]], ["O"]), _words(None, [])),
        WORDS,
    ),
    "what is no list of tags": (
        "rows.jsonl",
        _rows(GOOD, _words(["a"], "O"), _words(["a"], [None]), _words(["a"], [1]),
              _words(["a"], [0.5])),
        WORDS,
    ),
    "numbers beyond the names": (
        "rows.jsonl", _rows(_words(["a"], [1]), _words(["a"], [9])),
        {**WORDS, "tag_names": ["O", "B-PER", "I-PER"]},
    ),
    "an I- that continues nothing": (
        "rows.jsonl", _rows(GOOD, GOOD, _words(["a", "b"], ["O", "I-PER"])), WORDS,
    ),
    "tags of another scheme": (
        "rows.jsonl", _rows(GOOD, _words(["a"], ["S-PER"]), _words(["a"], ["PER"])),
        {**WORDS, "scheme": "iob2"},
    ),
    "a prefix without a type": ("rows.jsonl", _rows(GOOD, _words(["a"], ["B-"])), WORDS),
    "an entity that does not end": (
        "rows.jsonl",
        _rows(_words(["a"], ["S-A"]), _words(["a", "b"], ["B-A", "O"]), _words(["a"], ["B-A"]),
              _words(["a"], ["E-A"])),
        {**WORDS, "scheme": "iobes"},
    ),
    "tags with B in a scheme without": ("rows.jsonl", _rows(GOOD), {**WORDS, "scheme": "io"}),
    "a tag for every word": ("rows.jsonl", _rows(_words(["a", "b"], ["DET", "NOUN"])), WORDS),
    "marks that are not read": ("rows.conll", "Ada\tB.PER\nB\tI.PER\nmet\tO\n", WORDS),
    "spans of tags": ("rows.jsonl", _rows(_text([0, 3, "B-PER"], [8, 11, "I-PER"])), TEXTS),
    "numbers without names in a file of words": ("rows.conll", "Ada\t1\nmet\t0\n", WORDS),
    "a column that counts the words": (
        "rows.conll", "1\tAda\tB-PER\n2\tmet\tO\n3\tIda\tB-PER\n", WORDS,
    ),
    "no entity at all": ("rows.jsonl", _rows(_words(["a"], ["O"])), WORDS),
    "as many types as rows": (
        "rows.jsonl", _rows(*(_words(["a", "b"], [f"B-x{i}", "O"]) for i in range(30))), WORDS,
    ),
    "types that are no labels": (
        "rows.jsonl", _rows(GOOD, _words(["a", "b"], ["B-PRE", "B-LOC"])),
        {**WORDS, "labels": ["O", "B-PER", "I-PER"]},
    ),
    "many types that are no labels": (
        "rows.jsonl", _rows(GOOD, *(_words(["a"], [f"B-x{i}"]) for i in range(12))),
        {**WORDS, "labels": ["O", "B-PER", "I-PER"]},
    ),
    "no room for a word": ("rows.jsonl", _rows(GOOD), {**WORDS, "max_length": 2}),
    "what is no list of spans": (
        "rows.jsonl",
        _rows(SPANNED, {"text": "Ada", "spans": None}, _text(3), _text([0, 3]),
              _text({"start": 0, "end": 3}), _text({"end": 3, "label": "PER"}),
              _text({"start": 0, "end": 3, "labels": ["A", "B"]})),
        TEXTS,
    ),
    "spans in the wrong place": (
        "rows.jsonl",
        _rows(SPANNED, _text([0, 99, "PER"]), _text([3, 4, "PER"]),
              _text([0, 5, "PER"], [4, 7, "LOC"]),
              _text({"start": 1, "end": 4, "text": "Ada", "label": "PER"})),
        TEXTS,
    ),
    "a span that cuts a token": (
        "rows.jsonl", _rows(SPANNED, {"text": "a film", "spans": [[2, 4, "ART"]]}), TEXTS,
    ),
}  # fmt: skip
for _name, (_file, _content, _task) in FILES.items():
    CASES.append(Case("Entities", _name, _validate(_file, _content, _task)))


@case("Entities", "names for another number of columns")
def _(world: World) -> Printed:
    world.write("rows.conll", CONLL)
    data = {"path": "rows.conll", "format": {"columns": ["word", "pos", "tag"]}}
    return world.lora("validate", world.recipe(data=data, task=WORDS))


@case("Entities", "keys that do not go together")
def _(world: World) -> Printed:
    world.write("rows.jsonl", _rows(GOOD))
    task = {**TEXTS, "tags_column": "ner", "scheme": "io", "labels": ["O", "PER", "LOC"]}
    return world.lora("validate", world.recipe(data={"path": "rows.jsonl"}, task=task))


@case("Entities", "half of the keys of spans, and a label twice")
def _(world: World) -> Printed:
    world.write("rows.jsonl", _rows(GOOD))
    task = {**WORDS, "text_column": "text", "labels": ["O", "B-PER", "I-PER", "O"]}
    return world.lora("validate", world.recipe(data={"path": "rows.jsonl"}, task=task))


@case("Entities", "labels that a stream cannot know")
def _(world: World) -> Printed:
    world.write("rows.jsonl", _rows(GOOD))
    data = {"path": "rows.jsonl", "streaming": True}
    return world.lora("train", world.recipe(data=data, task=WORDS))


@case("Entities", "a metric of labels")
def _(world: World) -> Printed:
    world.write("rows.jsonl", _rows(GOOD))
    evaluate = {"metrics": ["accuracy"]}
    return world.lora(
        "validate", world.recipe(data={"path": "rows.jsonl"}, task=WORDS, evaluate=evaluate)
    )


@case("Entities", "an adapter of PEFT without its classifier")
def _(world: World) -> Printed:
    import torch
    from safetensors.torch import save_file

    folder = Path(world.folder) / "made"
    shutil.copytree(world.bases / "trained", folder)
    for name in ("manifest.json", "recipe.yaml", "computation.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": "TOKEN_CLS", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_"
    tensors = {f"{name}A.weight": torch.zeros(4, 32), f"{name}B.weight": torch.zeros(32, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return world.lora("merge", "--adapter", "made", "--to", "merged", "--base", "../bases/encoder")
