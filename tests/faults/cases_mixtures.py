"""Faults of several data sets in one recipe, and of columns that get other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import datasets
import tiny
from cases import CASES, Case, case
from world import Printed, World

Rows = list[dict[str, Any]]
ROWS: Rows = [{"text": t, "label": "good" if i % 2 else "bad"} for i, t in enumerate(tiny.CORPUS)]
OTHER: Rows = [{"said": f"{row['text']} too", "label": row["label"]} for row in ROWS]


def _jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _mixed(mix: dict[str, Any], rows: str = _jsonl(ROWS), **sections: Any) -> Callable[..., Any]:
    def run(world: World) -> Printed:
        world.write("a.jsonl", rows)
        world.write("b.jsonl", _jsonl(OTHER))
        data = {"mix": mix, **sections.pop("data", {})}
        return world.lora("validate", world.recipe(data=data, **sections), "--data")

    return run


A = {"path": "a.jsonl"}
B = {"path": "b.jsonl", "columns": {"said": "text"}}
for _name, _run in {
    "sets beside a file": _mixed({"a": A, "b": B}, data={"path": "a.jsonl", "validation": "dev"}),
    "sets that are streamed": _mixed({"a": A}, data={"streaming": True}),
    "one weight of two": _mixed({"a": {**A, "weight": 2}, "b": B}),
    "a weight of nothing": _mixed({"a": {**A, "weight": 0}}),
    "a weight for no example": _mixed({"a": {**A, "weight": 1}, "b": {**B, "weight": 9999}}),
    "a set without a place": _mixed({"a": A, "b": {"validation": {"fraction": 0.5}}}),
    "a name that cannot stand before a metric": _mixed({"a/b": A}),
    "a key of the whole in a set": _mixed({"a": {**A, "split_seed": 1}}),
    "a file that is not there": _mixed({"a": A, "b": {"path": "c.jsonl"}}),
    "a column that only one set has": _mixed({"a": A, "b": {"path": "b.jsonl"}}),
    "a wrong row": _mixed({"a": A, "b": B}, _jsonl(ROWS) + "{\n"),
    "labels that are numbers in one set and names in another": _mixed(
        {"a": A, "b": B}, _jsonl([{**row, "label": i % 2} for i, row in enumerate(ROWS)])
    ),
    "numbers that the sets write in several ways": _mixed(
        {"a": {**A, "format": {"decimal": ","}}, "b": B}, task={"problem": "regression"}
    ),
    "a label that only one set has": _mixed(
        {"a": A, "b": B}, _jsonl([*ROWS, {"text": "x", "label": "so-so"}]),
        task={"labels": ["bad", "good"]},
    ),
    "the validation of a set that is the train of another": _mixed(
        {"a": A, "b": {**B, "validation": "./a.jsonl"}}
    ),
    "the best by a set that is not there": _mixed(
        {"a": {**A, "validation": {"fraction": 0.5}}}, evaluate={"best": {"metric": "b/loss"}}
    ),
    "the best by a metric that no set has": _mixed(
        {"a": {**A, "validation": {"fraction": 0.5}}}, evaluate={"best": {"metric": "a/bleu"}}
    ),
    "the best by a set without validation": _mixed(
        {"a": {**A, "validation": {"fraction": 0.5}}, "b": B},
        evaluate={"best": {"metric": "b/loss"}},
    ),
    "a column that gets another name and is not there": _mixed(
        {"a": A, "b": {**B, "columns": {"sad": "text"}}}
    ),
    "a column that gets the name of another": _mixed(
        {"a": {**A, "columns": {"label": "text"}}}
    ),
    "two columns that get one name": _mixed(
        {"a": {**A, "columns": {"label": "x", "text": "x"}}}
    ),
}.items():  # fmt: skip
    CASES.append(Case("Mixtures", _name, _run))


@case("Mixtures", "adapters that are compared by a set without such rows")
def _compared(world: World) -> Printed:
    adapter = world.trained()
    world.write("a.jsonl", _jsonl(ROWS))
    world.write("b.jsonl", _jsonl(OTHER))
    mix = json.dumps({"a": A, "b": {**B, "validation": {"fraction": 0.5}}})
    alone = ["data.path=null", "data.train=train", "data.validation=null", "data.test=null"]
    flags = [f"data.mix={mix}", *alone]
    return world.lora(
        "eval", "--adapter", adapter, "--against", adapter, "--metric", "a/loss",
        *(part for flag in flags for part in ("--set", flag)),
    )  # fmt: skip


@case("Mixtures", "pairs that are drawn twice")
def _pairs(world: World) -> Printed:
    task = {"type": "text_embedding", "anchor_column": "text", "positive_column": "label"}
    mix = {"a": {**A, "weight": 2}, "b": {**B, "weight": 1}}
    return world.lora("validate", world.recipe(task=task, data={"mix": mix}))


@case("Mixtures", "a set of which nothing can be trained")
def _nothing(world: World) -> Printed:
    pair = {"prompt_column": "text", "completion_column": "label", "text_column": ...}
    long: Rows = [{"text": "many words and more " * 30, "label": "x"}] * 2
    world.write("a.jsonl", _jsonl(ROWS))
    world.write("b.jsonl", _jsonl(long))
    mix = {"a": {**A, "weight": 2}, "b": {"path": "b.jsonl", "weight": 1}}
    return world.lora("validate", world.recipe("llama", task=pair, data={"mix": mix}), "--data")


@case("Mixtures", "a column of a data set that gets the name of another")
def _hub_columns(world: World) -> Printed:
    folder = world.folder / "set"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    data = {"name": "./set", "columns": {"label": "text"}}
    return world.lora("validate", world.recipe(data=data))
