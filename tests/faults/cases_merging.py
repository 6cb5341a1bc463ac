"""Errors of merging several adapters, and of merging tensor by tensor."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch
from cases import CASES, Case, case
from safetensors.torch import load_file, save_file
from world import Printed, World

WEIGHTS, BASE = "adapter_model.safetensors", "../bases/encoder"


def _merge(world: World, *options: str) -> Printed:
    """Merge a trained adapter that another tool might have made."""
    if not (world.folder / "trained").exists():
        folder = world.folder / world.trained()
        for name in ("manifest.json", "base.json"):
            (folder / name).unlink()
    return world.lora("merge", "--adapter", "trained", "--to", "merged", *options)


for _name, _options in {
    "a weight that is no finite number": ("--adapter", "trained:inf"),
    "a head of one adapter": ("--head", "trained"),
}.items():
    CASES.append(Case("Merging", _name, lambda w, options=_options: _merge(w, *options)))


@case("Merging", "two adapters of two kinds")
def _(world: World) -> Printed:
    folder = world.folder / world.trained("other")
    (folder / "manifest.json").unlink()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    return _merge(world, "--adapter", "other")


@case("Merging", "two adapters with heads of their own")
def _(world: World) -> Printed:
    folder = world.folder / world.trained("other")
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t + ("classifier" in n) for n, t in tensors.items()}, folder / WEIGHTS)
    return _merge(world, "--adapter", "other:0.5")


def _changed_base(world: World, change: Any) -> None:
    """Copy the base, and change its tensors."""
    shutil.copytree(world.bases / "encoder", world.folder / "base")
    file = world.folder / "base/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@case("Merging", "tensor by tensor, weights that are stored as codes")
def _(world: World) -> Printed:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("query.weight"):
                tensors[name] = tensors[name].to(torch.int8)

    _changed_base(world, store)
    return _merge(world, "--base", "base", "--low-memory")


@case("Merging", "tensor by tensor, another embedding than PEFT wrote")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    for name in ("manifest.json", "base.json"):
        (folder / name).unlink()
    tensors = load_file(folder / WEIGHTS)
    name = "roberta.embeddings.word_embeddings"
    embedding = load_file(world.bases / "encoder/model.safetensors")[f"{name}.weight"]
    tensors[f"base_model.model.{name}.base_layer.weight"] = embedding + 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return _merge(world, "--low-memory")
