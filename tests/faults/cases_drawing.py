"""Error cases of text-to-image training: captioned images and diffusion models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import tiny_diffusion
import tiny_pictures
import torch
from cases import CASES, Case, case
from safetensors.torch import save_file
from world import Printed, World

AREA = "Drawing"
SIDE = tiny_diffusion.SIDE


def _recipe(world: World, data: Any = None, kind: str = "sd", **task: Any) -> str:
    """Write a base, captioned images, and a recipe for them."""
    if not (world.folder / "base").exists():
        tiny_diffusion.save(world.folder / "base", kind)
    if not (world.folder / "art").exists():
        tiny_diffusion.write_folder(world.folder / "art", {"train": 2})
    return world.recipe(
        model={"name": "./base"}, data=data or {"path": "art"},
        task={"type": "text_to_image", "resolution": SIDE, "max_length": ..., **task},
        evaluate={"baseline": False, "drawing": {"steps": 1}},
    )  # fmt: skip


def _flow(kind: str = "sd3 without t5", *options: str, **task: Any) -> Callable[[World], Printed]:
    """Return a run with a flow matching base."""

    def run(world: World) -> Printed:
        tiny_diffusion.save(world.folder / "base", kind)
        return world.lora("validate", _recipe(world, **task), *options)

    return run


def _validate(**task: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("validate", _recipe(world, **task))


def _file(name: str, content: bytes | None, **task: Any) -> Callable[[World], Printed]:
    """Return a run on a folder in which one file is replaced or missing."""

    def run(world: World) -> Printed:
        recipe = _recipe(world, **task)
        file = world.folder / "art/train" / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        return world.lora("validate", recipe)

    return run


def _config(part: str, kind: str = "sd", **values: Any) -> Callable[[World], Printed]:
    """Return a run with changes of one configuration file of the base; `...` removes a key."""

    def run(world: World) -> Printed:
        recipe = _recipe(world, kind=kind)
        file = world.folder / "base" / part
        found = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
        return world.lora("validate", recipe)

    return run


PNG = tiny_pictures.encoded(tiny_pictures.picture(1))
INDEX, UNET = "model_index.json", "unet/config.json"
_RUNS = {
    "a picture that is cut off": _file("0.png", PNG[:200]),
    "a picture that is smaller than it is seen": _validate(resolution=32),
    "a picture without a caption": _file("0.txt", None),
    "a caption that is blank": _file("0.txt", b" \n"),
    "a caption in another encoding": _file("0.txt", b"caf\xe9"),
    "a resolution in which the model does not draw": _validate(resolution=15),
    "one column for picture and caption": _validate(caption_column="image"),
    "a caption for all, and a column of captions": _validate(caption="a", caption_column="said"),
    "tags that stay where none change places": _validate(keep_tags=2),
    "a shape of pictures that are all squares": _validate(max_aspect_ratio=3.0),
    "one tag that is to change its place": _validate(caption="a film", shuffle_tags=True),
    "a class without pictures": _validate(prior={"path": "cl", "caption": "a one", "count": 0}),
    "a pipeline that is not trained": _config(INDEX, _class_name="KandinskyPipeline"),
    "a part that is missing": _config(INDEX, text_encoder=[None, None]),
    "a part of another kind": _config(INDEX, vae=["diffusers", "AutoencoderTiny"]),
    "a scheduler that there is not": _config(INDEX, scheduler=["diffusers", "NoScheduler"]),
    "a U-Net that fills in parts of pictures": _config(UNET, in_channels=9),
    "a U-Net for another text encoder": _config(UNET, cross_attention_dim=16),
    "a scheduler that learns something else": _config(
        "scheduler/scheduler_config.json", prediction_type="sample"
    ),
    "weights for noise on a model that learns by flow matching": _flow(
        snr_gamma=5.0, noise_offset=0.1
    ),
    "a flow on a model that learns noise": _validate(flow={"weighting": "cosmap"}),
    "T5 left out where there is none": _validate(without_t5=True),
    "a mean of steps that are drawn evenly": _flow(flow={"timesteps": "uniform", "mean": 0.5}),
    "a picture that is larger than the positions of a model": _flow(resolution=128),
    "a usual size that is larger than the positions of a model": _flow(
        resolution=..., upscale=True
    ),
    "pictures that are longer than the positions of a model": _flow(
        resolution=64, aspect_ratios=True
    ),
    "a scheduler of noise for a model that learns by flow matching": _config(
        INDEX, "sd3", scheduler=["diffusers", "DDPMScheduler"]
    ),
    "parts of Stable Diffusion 3 that do not fit together": _config(
        "transformer/config.json", "sd3", in_channels=8, out_channels=8, joint_attention_dim=8,
        pooled_projection_dim=8,
    ),
    "a transformer that returns more than it reads": _config(
        "transformer/config.json", "sd3", out_channels=8
    ),
    "a scheduler that draws backwards": _config(
        "scheduler/scheduler_config.json", "sd3", invert_sigmas=True
    ),
    "a guidance that the model does not read": _flow(flow={"guidance": 1.0}),
    "a negative prompt for a model that reads one text": _flow(
        "flux", "--set", "evaluate.drawing.negative_prompt=a blur"
    ),
    "parts of Flux that do not fit together": _config(
        "transformer/config.json", "flux", in_channels=4, joint_attention_dim=8,
        pooled_projection_dim=4,
    ),
    "an adapter on T5": _flow(
        "sd3", "--set", "adapter.target_modules=[SelfAttention.q]", train_text_encoder=True
    ),
    "an adapter on a part that is frozen": lambda world: world.lora(
        "validate", _recipe(world), "--set", "adapter.target_modules=[q_proj]"
    ),
    "a module of a part that is frozen": lambda world: world.lora(
        "validate", _recipe(world), "--set", "adapter.train_modules=[encoder.conv_norm_out]"
    ),
    "a base of several parts in 8 bits": lambda world: world.lora(
        "validate", _recipe(world), "--set", "model.quantization=int8"
    ),
    "a metric of pictures": lambda world: world.lora(
        "validate", _recipe(world), "--set", "evaluate.metrics=[accuracy]"
    ),
}  # fmt: skip
CASES += [Case(AREA, name, run) for name, run in _RUNS.items()]


@case(AREA, "a picture of the class that is broken")
def _broken_prior(world: World) -> Printed:
    world.write("cl/0.png", PNG[:200])
    recipe = _recipe(world, prior={"path": "cl", "caption": "a one", "count": 1})
    return world.lora("validate", recipe)


@case(AREA, "a model of texts")
def _texts(world: World) -> Printed:
    _recipe(world)
    task = {"type": "text_to_image", "max_length": ..., "text_column": ...}
    return world.lora("validate", world.recipe("llama", task=task, data={"path": "art"}))


@case(AREA, "a tokenizer without words")
def _tokenizer(world: World) -> Printed:
    recipe = _recipe(world)
    shutil.rmtree(world.folder / "base/tokenizer")
    (world.folder / "base/tokenizer").mkdir()
    return world.lora("validate", recipe)


@case(AREA, "weights that are not those of the configuration")
def _weights(world: World) -> Printed:
    recipe = _recipe(world)
    file = world.folder / "base/vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_per_block": 2}))
    return world.lora("train", recipe, "-o", "out")


@case(AREA, "a picture that is not finite")
def _not_finite(world: World) -> Printed:
    import torch
    from safetensors.torch import load_file, save_file

    recipe = _recipe(world, prior={"path": "cl", "caption": "a one", "count": 1})
    file = world.folder / "base/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"] = torch.full_like(tensors["decoder.conv_in.bias"], torch.nan)
    save_file(tensors, file, {"format": "pt"})
    return world.lora("train", recipe, "-o", "out")


@case("lora init", "pictures without captions for a model that draws")
def _without_captions(world: World) -> Printed:
    _recipe(world)
    for file in (world.folder / "art").rglob("*.txt"):
        file.unlink()
    return world.lora("init", "art", "--model", "./base", "-o", "new.yaml")


@case("lora init", "a table without pictures for a model that draws")
def _no_pictures(world: World) -> Printed:
    _recipe(world)
    world.write("rows.csv", "text,label\na,x\nb,y\n")
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")


@case("lora init", "pictures whose caption has no name that says so")
def _unnamed(world: World) -> Printed:
    _recipe(world)
    lines = [f"art/train/{i}.png,{i},{i}\n" for i in range(2)]
    world.write("rows.csv", "".join(["image,one,two\n", *lines]))
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")


# ------------------------------------------------------------------------ files of other tools

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"
WIDTH = 16  # of the module
PAIR = {
    f"{KOHYA}.lora_down.weight": torch.ones(2, WIDTH),
    f"{KOHYA}.lora_up.weight": torch.ones(WIDTH, 2),
}
TWICE = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
JOINED = "lora_unet_double_blocks_0_img_attn_qkv"  # 48 rows
UNKNOWN = {f"lora_te2_text_model_{i}.alpha": torch.tensor(1.0) for i in range(10)}


def _merge(tensors: dict[str, Any], header: dict[str, str] | None = None, kind: str = "sd") -> Any:
    return lambda world: _with_file(world, tensors, header or {}, "merge", kind=kind)


def _export(reader: str, tensors: dict[str, Any]) -> Any:
    return lambda world: _with_file(world, tensors, {}, "export", "--for", reader)


def _with_file(
    world: World, tensors: dict[str, Any], header: dict[str, str], *command: str, kind: str = "sd"
) -> Printed:
    tiny_diffusion.save(world.folder / "base", kind)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, world.folder / "drawn.safetensors", {"format": "pt"} | header)
    adapter = ("--adapter", "drawn.safetensors", "--base", "./base", "--to", "to")
    return world.lora(*command, *adapter)


for _name, _run in {
    "an adapter file with names that the base lacks": _merge(PAIR | UNKNOWN),
    "an adapter file with a matrix twice": _merge(
        PAIR | {f"unet.{QUERY}.lora_A.weight": torch.ones(2, WIDTH)}
    ),
    "an adapter file with an alpha alone": _merge(
        PAIR | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}
    ),
    "an adapter file with alphas in two places": _merge(
        PAIR | {f"{KOHYA}.alpha": torch.tensor(1.0)}, TWICE
    ),
    "an adapter file of another rank than its header's": _merge(
        PAIR, {"lora_adapter_metadata": json.dumps({"unet.r": 4})}
    ),
    "an adapter file of another base": _merge({n: torch.ones(3, 3) for n in PAIR}),
    "an adapter file of Flux whose query, key and value have too few rows": _merge(
        {
            f"{JOINED}.lora_down.weight": torch.ones(2, WIDTH),
            f"{JOINED}.lora_up.weight": torch.ones(WIDTH, 2),
        },
        kind="flux",
    ),
    "Kronecker factors of query, key and value": _merge(
        {f"{JOINED}.lokr_w1": torch.ones(4, 4), f"{JOINED}.lokr_w2": torch.ones(12, 4)},
        kind="flux",
    ),
    "a control adapter of Flux": _merge(
        {
            "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, WIDTH),
            "double_blocks.0.img_attn.qkv.lora_B.bias": torch.ones(48),
            "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8),
        },
        kind="flux",
    ),
    "an adapter file of Flux for another model": _merge(
        {
            f"{JOINED}.lora_down.weight": torch.ones(2, WIDTH),
            f"{JOINED}.lora_up.weight": torch.ones(48, 2),
        },
    ),
    "DoRA in kohya's format": _export(
        "kohya", PAIR | {f"{KOHYA}.dora_scale": torch.ones(WIDTH, 1)}
    ),
    "an adapter of a part for vLLM": _export("vllm", PAIR),
}.items():
    CASES.append(Case(AREA, _name, _run))
