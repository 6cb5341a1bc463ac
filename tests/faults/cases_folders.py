"""Faults of folders that somebody else made, or damaged: models, adapters and runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from cases import CASES, Case, case
from safetensors.torch import load_file, save_file
from world import Printed, World

WEIGHTS, MANIFEST = "adapter_model.safetensors", "manifest.json"

# ---------------------------------------------------------------------------------- adapters


def _predicting(change: Callable[[Path], object]) -> Callable[[World], Printed]:
    """Return a case that changes a trained adapter and uses it."""

    def run(world: World) -> Printed:
        change(world.folder / world.trained())
        return world.lora("predict", "--adapter", "trained", "a film")

    return run


def _tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """Return what changes the tensors of an adapter, given the name of one, as another tool."""

    def edit(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in tensors if "lora_A" in name))
        save_file(tensors, folder / WEIGHTS)

    return edit


def _forget_weights(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files[WEIGHTS]
    (folder / MANIFEST).write_text(json.dumps({"files": files}))


def _link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to("../elsewhere")


def _spoil_fingerprint(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "base.json").write_text("{")


for _name, _change in {
    "a tensor of whole numbers": _tensors(lambda t, name: t.update({name: t[name].long()})),
    "a tensor with two names": _tensors(
        lambda t, name: t.update({name.removeprefix("base_model.model."): t[name].clone()})
    ),
    "a manifest without the weights": _forget_weights,
    "a link out of the folder": _link,
    "a fingerprint of the base that cannot be read": _spoil_fingerprint,
}.items():
    CASES.append(Case("Adapters", _name, _predicting(_change)))


@case("Merging", "a quantised base")
def _(world: World) -> Printed:
    world.trained()
    base = Path(shutil.copytree(world.bases / "encoder", world.folder / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    return world.lora("merge", "--base", "base", "--adapter", "trained", "--to", "merged")


@case("Merging", "a key of a recipe that is not there")
def _(world: World) -> Printed:
    (world.folder / world.trained() / "recipe.yaml").unlink()
    arguments = ("merge", "--base", "../bases/encoder", "--adapter", "trained", "--to", "merged")
    return world.lora(*arguments, "--set", "model.allow_other_base=true")


# ------------------------------------------------------------------------------------ models


def _training(change: Callable[[Path], object]) -> Callable[[World], Printed]:
    """Return a case that changes a copy of a base model and trains on it."""

    def run(world: World) -> Printed:
        base = Path(shutil.copytree(world.bases / "encoder", world.folder / "base"))
        change(base)
        recipe = world.recipe(model={"name": "./base"}, task={"labels": ["bad", "good"]})
        return world.lora("train", recipe)

    return run


def _divided(text: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text(text)

    return change


for _name, _change in {
    "an adapter beside its weights": lambda base: (base / "adapter_config.json").touch(),
    "no safetensors": lambda base: (base / "model.safetensors").rename(base / "model.bin"),
    "safetensors of a variant": lambda base: (base / "model.safetensors").rename(
        base / "model.fp16.safetensors"
    ),
    "an index that cannot be read": _divided("{"),
    "an index of a file that is missing": _divided('{"weight_map": {"a": "b.safetensors"}}'),
    "an index of a file elsewhere": _divided('{"weight_map": {"a": "../b.safetensors"}}'),
}.items():
    CASES.append(Case("Models", _name, _training(_change)))


@case("Models", "a folder outside its package")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(model={"name": "package:pytest/../../base"}))


# ---------------------------------------------------------------------------------- training


@case("Training", "a checkpoint under another's name")
def _(world: World) -> Printed:
    out = world.folder / world.trained()
    (out / "report.json").unlink()
    checkpoints = sorted((out / "checkpoints").iterdir())
    for other in checkpoints[:-1]:
        shutil.rmtree(other)
    checkpoints[-1].rename(out / "checkpoints/step-000009")
    recipe = world.recipe(task={"labels": ["bad", "good"]})
    return world.lora("train", recipe, "-o", "trained", "--resume")


@case("Training", "a log that is a link")
def _(world: World) -> Printed:
    recipe, out = world.recipe(task={"labels": ["bad", "good"]}), world.folder / "out"
    assert world.lora("train", recipe).code == 0
    (out / "report.json").unlink()
    (out / "metrics.jsonl").rename(world.folder / "log")
    (out / "metrics.jsonl").symlink_to("../log")
    return world.lora("train", recipe, "--resume")


# ------------------------------------------------------------------- folders that are no adapters


def _folder_of(*files: str) -> Callable[[World], Printed]:
    """Return a case that names a folder of such files as an adapter."""

    def run(world: World) -> Printed:
        for name in files:
            world.write(f"given/{name}", "{}")
        return world.lora("check", "--adapter", "given")

    return run


for _name, _files in {
    "a base model instead": ("config.json", "model.safetensors"),
    "a merged model instead": ("config.json", "merge.json"),
    "a model trained in full instead": ("config.json", "recipe.yaml"),
    "checkpoints instead": ("recipe.yaml", "checkpoints/step-000002/trainer.json"),
}.items():
    CASES.append(Case("Adapters", _name, _folder_of(*_files)))


@case("Adapters", "no recipe")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    for name in (MANIFEST, "recipe.yaml"):
        (folder / name).unlink()
    return world.lora("predict", "--adapter", "trained", "a film")
