"""Errors of combining and exporting adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, case
from safetensors.torch import load_file, save_file
from world import Printed, World

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED = "trained"


def _other(world: World, config: dict[str, Any] | None = None, **tensors: Any) -> str:
    """Copy the trained adapter as another, with other keys of its configuration, and tensors."""
    folder = world.folder / world.trained("other")
    (folder / "manifest.json").unlink()
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | (config or {})))
    stored = load_file(folder / WEIGHTS)
    change = tensors.get("change")
    if change is not None:
        change(stored)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return "other"


def _combine(world: World, *options: str) -> Printed:
    return world.lora("combine", "trained", "other", "--to", "both", *options)


for _name, _options in {
    "a method that does not exist": ("--method", "tie"),
    "pruning without a share": ("--method", "ties"),
    "a share for a method that keeps all": ("--density", "0.5"),
    "a share above one": ("--method", "ties", "--density", "2"),
    "a rank for a method that has none": ("--rank", "4"),
    "a rank of zero": ("--method", "svd", "--rank", "0"),
    "weights that are no numbers": ("--weights", "1,x"),
    "one weight for two": ("--weights", "1"),
}.items():
    CASES.append(Case("Combining", _name, lambda w, options=_options: _combine(w, *options)))


@case("Combining", "one adapter")
def _(world: World) -> Printed:
    return world.lora("combine", "trained", "--to", "both")


@case("Combining", "adapters of several parts that are of different types")
def _(world: World) -> Printed:
    folder = world.folder / "parts"
    for part, kind in (("unet", {"use_dora": True}), ("text_encoder", {})):
        (world.folder / _other(world, kind)).rename(folder.with_name(part))
        folder.mkdir(exist_ok=True)
        folder.with_name(part).rename(folder / part)
    return world.lora("combine", "parts", "trained", "--to", "both")


LAYER = "lora_unet_mid_block_attentions_0_proj_in"
PAIR = {f"{LAYER}.lora_down.weight": torch.ones(2, 8), f"{LAYER}.lora_up.weight": torch.ones(8, 2)}


def _file(world: World, tensors: dict[str, Any], header: dict[str, str] | None = None) -> str:
    """Write the file of a LoRA as other tools do, and return its name."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, world.folder / "drawn.safetensors", {"format": "pt"} | (header or {}))
    return "drawn.safetensors"


for _name, _tensors, _header in (
    ("without an adapter", {"model.diffusion_model.out.2.weight": torch.ones(2)}, {}),
    ("with a tensor of another kind", PAIR | {f"{LAYER}.diff_b": torch.ones(2)}, {}),
    ("with an alpha of two numbers", PAIR | {f"{LAYER}.alpha": torch.ones(2)}, {}),
    ("with NaN", PAIR | {f"{LAYER}.alpha": torch.tensor(torch.nan)}, {}),
    (
        "of LoHa with DoRA's lengths",
        {f"{LAYER}.hada_w1_a": torch.ones(2, 2), f"{LAYER}.dora_scale": torch.ones(2, 1)},
        {},
    ),
    ("with two kinds of updates", PAIR | {f"{LAYER}_x.hada_w1_a": torch.ones(2, 2)}, {}),
    ("with a header that is cut off", PAIR, {"lora_adapter_metadata": "{"}),
    ("to combine", PAIR, {}),
):
    CASES.append(
        Case(
            "Adapters",
            f"a file {_name}",
            lambda w, tensors=_tensors, header=_header: w.lora(
                "combine", _file(w, tensors, header), w.trained(), "--to", "both"
            ),
        )
    )


@case("Adapters", "one file of an adapter folder")
def _(world: World) -> Printed:
    return world.lora("combine", f"{world.trained()}/{WEIGHTS}", "trained", "--to", "both")


@case("Checking", "a file of another tool")
def _(world: World) -> Printed:
    return world.lora("check", "--adapter", _file(world, PAIR))


@case("Pushing", "a file of another tool")
def _(world: World) -> Printed:
    return world.lora("push", "--adapter", _file(world, PAIR), "--to", "user/name")


@case("Adapters", "a text file as an adapter")
def _(world: World) -> Printed:
    world.write("notes.txt", "a note")
    return world.lora("combine", "notes.txt", world.trained(), "--to", "both")


@case("Adapters", "a folder of several files")
def _(world: World) -> Printed:
    for name in ("a", "b"):
        world.write(f"drawn/{name}.safetensors", "")
    return world.lora("combine", "drawn", world.trained(), "--to", "both")


@case("Adapters", "an adapter that draws, on a model of texts")
def _(world: World) -> Printed:
    return world.lora(
        "merge", "--adapter", _file(world, PAIR), "--recipe", world.recipe(), "--to", "merged"
    )


@case("Adapters", "an adapter of a text model for diffusers")
def _(world: World) -> Printed:
    return world.lora("export", "--adapter", world.trained(), "--for", "diffusers", "--to", "to")


@case("Combining", "a head of each")
def _(world: World) -> Printed:
    world.trained()
    _other(world, change=lambda t: [t[n].add_(1) for n in t if "classifier" in n])
    return _combine(world)


@case("Combining", "a head of neither")
def _(world: World) -> Printed:
    world.trained()
    _other(world)
    return _combine(world, "--head", "third")


@case("Combining", "other labels")
def _(world: World) -> Printed:
    world.trained()
    recipe = world.folder / _other(world) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("- bad\n", "- poor\n"))
    (recipe.parent / "computation.json").unlink()
    return _combine(world)


@case("Combining", "another task")
def _(world: World) -> Printed:
    world.trained()
    _other(world, {"task_type": "TOKEN_CLS"})
    return _combine(world)


@case("Combining", "another base")
def _(world: World) -> Printed:
    world.trained()
    folder = world.folder / _other(world, {"base_model_name_or_path": "org/other"})
    (folder / "base.json").unlink()
    return _combine(world)


@case("Combining", "a base with other weights")
def _(world: World) -> Printed:
    from lora_cli.models.fingerprint import Fingerprint, read_fingerprint

    world.trained()
    folder = world.folder / _other(world)
    base = read_fingerprint(folder)
    assert base is not None
    Fingerprint("org/other", "main", dict.fromkeys(base.tensors, "0")).write(folder)
    return _combine(world)


@case("Combining", "another tokenizer")
def _(world: World) -> Printed:
    world.trained()
    file = world.folder / _other(world) / "computation.json"
    facts = json.loads(file.read_text())
    facts["base"]["tokenizer"] = "0"
    file.write_text(json.dumps(facts))
    return _combine(world)


@case("Combining", "a model of other dimensions")
def _(world: World) -> Printed:
    world.trained()

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_A" in name:
                tensors[name] = torch.ones(len(tensors[name]), 7)

    _other(world, change=widen)
    return _combine(world)


@case("Combining", "other ranks, added")
def _(world: World) -> Printed:
    world.trained()

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "lora_A" in name:
                tensors[name] = tensor[:4].clone()
            elif "lora_B" in name:
                tensors[name] = tensor[:, :4].contiguous()

    _other(world, {"r": 4}, change=halve)
    return _combine(world, "--method", "linear")


@case("Combining", "an adapter with biases")
def _(world: World) -> Printed:
    world.trained()
    _other(world, {"bias": "all"})
    return _combine(world)


@case("Combining", "a convolution of groups")
def _(world: World) -> Printed:
    world.trained()

    def group(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name] = torch.ones(8, 4, 1, 1)

    _other(world, change=group)
    return _combine(world)


@case("Combining", "a matrix without the other")
def _(world: World) -> Printed:
    world.trained()
    _other(world, change=lambda t: t.pop(next(name for name in t if "lora_B" in name)))
    return _combine(world)


@case("Combining", "DoRA")
def _(world: World) -> Printed:
    world.trained()
    _other(world, {"use_dora": True})
    return _combine(world)


@case("Combining", "weights beyond float32")
def _(world: World) -> Printed:
    world.trained()
    _other(world, change=lambda t: [t[n].fill_(1.0) for n in t if "lora" in n])
    return _combine(world, "--weights", "1e300,1e300")


# ---------------------------------------------------------------------------------------- export


def _export(world: World, reader: str, adapter: str = TRAINED) -> Printed:
    if not (world.folder / TRAINED).exists():
        world.trained()
    return world.lora("export", "--adapter", adapter, "--for", reader, "--to", "exported")


for _reader in ("vlm", "vllm", "gguf", "mlx"):
    CASES.append(
        Case("Exporting", f"a classifier for {_reader}", lambda w, r=_reader: _export(w, r))
    )


@case("Exporting", "biases")
def _(world: World) -> Printed:
    recipe = world.recipe(task={"labels": ["bad", "good"]}, adapter={"bias": "lora_only"})
    assert world.lora("train", recipe, "-o", "biased").code == 0
    return _export(world, "plain", "biased")


@case("Exporting", "a head alone, for PEFT")
def _(world: World) -> Printed:
    recipe = world.recipe(task={"labels": ["bad", "good"]}, adapter={"type": "none"})
    assert world.lora("train", recipe, "-o", "head").code == 0
    return _export(world, "peft", "head")


@case("Exporting", "a head alone, for vLLM")
def _(world: World) -> Printed:
    recipe = world.recipe(task={"labels": ["bad", "good"]}, adapter={"type": "none"})
    assert world.lora("train", recipe, "-o", "head").code == 0
    return _export(world, "vllm", "head")


@case("Exporting", "a rank that vLLM does not take")
def _(world: World) -> Printed:
    recipe = world.recipe("llama", adapter={"rank": 513, "target_modules": ["q_proj"]})
    assert world.lora("train", recipe, "-o", "large").code == 0
    return _export(world, "vllm", "large")


for _reader in ("gguf", "mlx"):

    @case("Exporting", f"one end of tied weights for {_reader}")
    def _(world: World, reader: str = _reader) -> Printed:
        recipe = world.recipe("llama", adapter={"target_modules": ["embed_tokens"]})
        assert world.lora("train", recipe, "-o", "tied").code == 0
        return _export(world, reader, "tied")


# ----------------------------------------------------------------------------------------- check


def _probed(world: World, change: Any = None, *options: str) -> Printed:
    """Check a copy of the trained adapter whose probe was changed."""
    file = world.folder / world.trained() / "probe.json"
    (file.parent / "manifest.json").unlink()
    if change is not None:
        change(file)
    return world.lora("check", "--adapter", "trained", *options)


def _rewritten(change: Any) -> Any:
    """Return what changes the values of a file of JSON."""

    def edit(file: Path) -> None:
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return edit


def _equal(values: dict[str, Any]) -> None:
    values["outputs"]["base"] = values["outputs"]["adapted"]


def _exchanged(values: dict[str, Any]) -> None:
    found = values["outputs"]
    found["base"], found["adapted"] = found["adapted"], found["base"]


def _shifted(values: dict[str, Any]) -> None:
    for side in ("base", "adapted"):
        values["outputs"][side] = [x + 5 for x in values["outputs"][side]]


def _without_server(values: dict[str, Any]) -> None:
    tokens = [["a", -1.0]]
    values["next_tokens"] = [{"prompt": "The", "base": tokens, "adapted": tokens}]


for _name, _change, _options in (
    ("no probe", Path.unlink, ()),
    ("a probe that cannot be read", lambda file: file.write_text("{"), ()),
    ("a probe that tells nothing", _rewritten(_equal), ()),
    ("the outputs of the base", _rewritten(_exchanged), ()),
    ("the outputs of neither", _rewritten(_shifted), ()),
    ("a server for a classifier", None, ("--url", "http://localhost:1")),
    ("an address that is none", _rewritten(_without_server), ("--url", "localhost:1")),
    ("a name without a server", None, ("--served-name", "a")),
    ("a key for a server", None, ("--url", "http://localhost:1", "--set", "train.precision=fp32")),
):
    CASES.append(
        Case("Checking", _name, lambda w, change=_change, o=_options: _probed(w, change, *o))
    )


@case("Checking", "no folder")
def _(world: World) -> Printed:
    return world.lora("check", "--adapter", "nowhere")
