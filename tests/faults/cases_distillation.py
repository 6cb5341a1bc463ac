"""Teachers that cannot teach: they are not there, have other labels or tokens, or no head."""

from __future__ import annotations

import json
import shutil
from typing import Any

import tiny
from cases import CASES, Case, case
from world import TABLE, Printed, World

TRAINED = "../bases/trained"


def _validate(world: World, teacher: str, base: str = "encoder", **task: Any) -> Printed:
    distill = {"train": {"distill": {"teacher": teacher}}}
    return world.lora("validate", world.recipe(base, **distill, task=task))


_RUNS = {
    "not there": lambda world: _validate(world, "./nowhere"),
    "labels without names": lambda world: _validate(world, "../bases/encoder"),
    "a label less": lambda world: _validate(world, TRAINED, labels=["bad", "good", "so so"]),
    "a label more": lambda world: _validate(
        world, tiny.save_encoder(world.folder / "more", ["bad", "good", "so so"]).name
    ),
    "trained for something else": lambda world: _validate(
        world, TRAINED, problem="multi_label", label_separator=";"
    ),
    "pairs of texts": lambda world: _validate(world, TRAINED, text_pair_column="label"),
    "other tokens": lambda world: _validate(
        world, tiny.save_gpt2(world.folder / "other").name, "llama"
    ),
    "no teacher for a number": lambda world: _validate(world, TRAINED, problem="regression"),
    "no teacher for words": lambda world: _validate(world, TRAINED, type="token_classification"),
    "recorded steps": lambda world: world.lora(
        "validate",
        world.recipe(train={"distill": {"teacher": TRAINED}, "kernels": "fused"}),
    ),
}
CASES += [Case("Teachers", name, run) for name, run in _RUNS.items()]


@case("Teachers", "texts that are divided otherwise")
def _divided(world: World) -> Printed:
    shutil.copytree(world.bases / "llama", world.folder / "other")
    file = world.folder / "other" / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(values), encoding="utf-8")
    return _validate(world, "./other", "llama")


@case("Teachers", "no head that was trained")
def _headless(world: World) -> Printed:
    shutil.copytree(world.bases / "encoder", world.folder / "plain")
    file = world.folder / "plain" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    names = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    file.write_text(json.dumps(config | names), encoding="utf-8")
    recipe = world.recipe(train={"distill": {"teacher": "./plain"}}, evaluate={"baseline": False})
    return world.lora("train", recipe, "-o", "out")


@case("Teachers", "an adapter that names no base")
def _no_base(world: World) -> Printed:
    folder = world.folder / world.trained()
    (folder / "recipe.yaml").unlink()
    (folder / "manifest.json").unlink()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["base_model_name_or_path"]
    file.write_text(json.dumps(config), encoding="utf-8")
    return _validate(world, "./trained")


@case("Teachers", "no train row with a label")
def _unlabelled(world: World) -> Printed:
    rows = TABLE.replace(",good", ",").replace(",bad", ",")
    world.write("rows.csv", rows)
    return _validate(world, TRAINED, labels=["bad", "good"])


@case("Teachers", "no row with a label to measure by")
def _none_to_measure(world: World) -> Printed:
    world.write("rows.csv", TABLE.replace(",good", ",").replace(",bad", ","))
    distill = {"train": {"distill": {"teacher": TRAINED, "weight": 1}}}
    drawn = {"train": "rows.csv", "validation": {"from": "train", "fraction": 0.5}}
    recipe = world.recipe("encoder", **distill, data=drawn, task={"labels": ["bad", "good"]})
    return world.lora("validate", recipe, "--data")


@case("Teachers", "an answer of another kind")
def _other_problem(world: World) -> Printed:
    folder = tiny.save_encoder(world.folder / "several", ["bad", "good"])
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["problem_type"] = "multi_label_classification"
    file.write_text(json.dumps(config), encoding="utf-8")
    return _validate(world, "./several")


@case("Teachers", "fewer positions")
def _fewer_positions(world: World) -> Printed:
    shutil.copytree(world.bases / "llama", world.folder / "shorter")
    file = world.folder / "shorter" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"max_position_embeddings": 8}), encoding="utf-8")
    return _validate(world, "./shorter", "llama")
