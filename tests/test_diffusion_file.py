"""Single-file adapters of diffusion models have the same effect here as in diffusers."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny_diffusion
import torch
from closeness import assert_close, assert_different
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, lora_layers, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import read_adapter, save_adapter
from lora_cli.adapters.peft_format.diffusion_file import (
    _in_peft_shapes,
    _is_valid_shape,
    _kronecker_config,
    _rank,
)
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.write_diffusion_file import save_for_kohya, write_diffusers_file
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export.export_adapter import reader_named
from lora_cli.export.reader import Source
from lora_cli.models.bundle import Bundle
from lora_cli.recipe import Recipe
from lora_cli.training.published_adapter import publish_adapter

Factors = dict[tuple[str, str], tuple[Tensor, Tensor, float]]  # A, B and alpha by part and module
Tensors = dict[str, Tensor]
NAMES = {
    "sd": ("unet", "text_encoder"),
    "xl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
ATTENTION = re.compile(r".*(attn[12]?\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)")
MORE = re.compile(
    ATTENTION.pattern + r"|.*(ff\.net\.(0\.proj|2)|proj_in|proj_out|mlp\.fc[12])"
    r"|.*(conv1|conv2|conv_shortcut|time_emb_proj|samplers\.0\.conv)"
)


@functools.cache
def kept(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_diffusion.pipeline(kind)


def pipeline(kind: str) -> Any:
    """Return a copy, since loading changes it."""
    made = kept(kind)
    own = {name: copy.deepcopy(getattr(made, name)) for name in NAMES[kind]}
    return type(made)(**{**made.components, **own})


def bundle(kind: str) -> Bundle:
    return Bundle({name: copy.deepcopy(getattr(kept(kind), name)) for name in NAMES[kind]})


def factors(kind: str, targets: re.Pattern[str], alphas: tuple[float, ...] = (3.0,)) -> Factors:
    """Return matrices of two ranks for all modules whose names match."""
    found: Factors = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part in NAMES[kind]:
            for name, module in getattr(kept(kind), part).named_modules():
                if not targets.fullmatch(name):
                    continue
                rank = 2 + len(found) % 2
                n_out, n_in, *kernel = module.weight.shape
                a = 0.3 * torch.randn(rank, n_in, *kernel)
                b = 0.3 * torch.randn(n_out, rank, *(1 for _ in kernel))
                found[part, name] = (a, b, alphas[len(found) % len(alphas)])
    return found


@torch.no_grad()
def outputs(parts: Any, kind: str) -> dict[str, Tensor]:
    """Return the outputs of the parts of a pipeline or a bundle."""
    ids = torch.arange(10).reshape(1, 10) * 3
    found: dict[str, Tensor] = {}
    texts = [getattr(parts, name).eval()(ids)[0] for name in NAMES[kind][1:]]
    found |= dict(zip(NAMES[kind][1:], texts, strict=True))
    if kind == "flux":
        given = torch.linspace(-1, 1, 12 * tiny_diffusion.T5_WIDTH).reshape(1, 12, -1)
        noise = torch.linspace(-2, 2, 4 * 16).reshape(1, 4, 16)
        places = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
        found["transformer"] = parts.transformer.eval()(
            noise, given, parts.text_encoder(ids).pooler_output, torch.tensor([0.7]),
            img_ids=places, txt_ids=torch.zeros(12, 3), guidance=torch.tensor([3.5]),
        )[0]  # fmt: skip
        return found
    if kind == "sd3":
        given = torch.linspace(-1, 1, 12 * tiny_diffusion.T5_WIDTH).reshape(1, 12, -1)
        noise = torch.linspace(-2, 2, 4 * 64).reshape(1, 4, 8, 8)
        found["transformer"] = parts.transformer.eval()(
            noise, given, torch.cat(texts, -1), torch.tensor([7.0])
        )[0]
        return found
    if kind == "xl":
        last = parts.text_encoder_2(ids, output_hidden_states=True)
        found["text_encoder_2"] = last[0]
        given = torch.cat([texts[0], last.hidden_states[-2]], -1)
        more = {"text_embeds": last[0], "time_ids": torch.arange(6.0)[None]}
    else:
        given, more = texts[0], None
    noise = torch.linspace(-2, 2, 4 * 64).reshape(1, 4, 8, 8)
    found["unet"] = parts.unet.eval()(noise, 7, given, added_cond_kwargs=more)[0]
    return found


def loaded(file: Path, kind: str) -> Bundle:
    model = bundle(kind)
    load_adapter(model, read_adapter(file), [])
    return model


def in_diffusers(file: Path, kind: str) -> dict[str, Tensor]:
    built = pipeline(kind)
    built.load_lora_weights(str(file.parent), weight_name=file.name)
    return outputs(built, kind)


# ---------------------------------------------------------------------------- how others write it


def of_peft(made: Factors, kind: str) -> Tensors:
    return {
        f"{part}.{name}.lora_{side}.weight": matrix
        for (part, name), pair in made.items()
        for side, matrix in zip("AB", pair[:2], strict=True)
    }


def of_diffusers(made: Factors, kind: str) -> Tensors:
    """Names that diffusers wrote before it used PEFT's."""
    result = {}
    for (part, name), pair in made.items():
        middle = "lora_linear_layer" if part.startswith("text") else "lora"
        name = with_text_model(part, name)
        for side, matrix in zip(("down", "up"), pair[:2], strict=True):
            result[f"{part}.{name}.{middle}.{side}.weight"] = matrix
    return result


def of_processors(made: Factors, kind: str) -> Tensors:
    """Names of its first version, which saved only attention layers."""
    old = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
           "out_proj": "to_out"}  # fmt: skip
    result = {}
    for (part, name), pair in made.items():
        head, last = re.fullmatch(r"(.*?)\.(to_out\.0|\w+)", with_text_model(part, name)).groups()  # type: ignore[union-attr]
        head += ".processor" if part == "unet" else ""
        for side, matrix in zip(("down", "up"), pair[:2], strict=True):
            result[f"{part}.{head}.{old.get(last, last)}_lora.{side}.weight"] = matrix
    return result


def of_kohya(made: Factors, kind: str) -> Tensors:
    result = {}
    for (part, name), (a, b, alpha) in made.items():
        start = kohya_start(part, kind)
        flat = with_text_model(part, name).replace(".", "_")
        result[f"{start}_{flat}.lora_down.weight"] = a
        result[f"{start}_{flat}.lora_up.weight"] = b
        result[f"{start}_{flat}.alpha"] = torch.tensor(alpha)
    return result


def kohya_start(part: str, kind: str) -> str:
    if part == "unet":
        return "lora_unet"
    return "lora_te" if kind == "sd" else {"text_encoder": "lora_te1"}.get(part, "lora_te2")


def with_text_model(part: str, name: str) -> str:
    return f"text_model.{name}" if name.startswith("encoder.layers") else name


WRITERS: dict[str, Callable[[Factors, str], Tensors]] = {
    "peft": of_peft,
    "diffusers": of_diffusers,
    "processors": of_processors,
    "kohya": of_kohya,
}


def save(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    file = folder / "adapter.safetensors"
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, file, {"format": "pt"} | (metadata or {}))
    return file


@pytest.mark.parametrize(
    ("writer", "kind"),
    [
        *((name, "sd") for name in WRITERS),
        *((name, "xl") for name in ("diffusers", "kohya")),
        *((name, kind) for name in ("peft", "diffusers") for kind in ("sd3", "flux")),
    ],
)
def test_files_are_read_as_diffusers_reads_them(writer: str, kind: str, tmp_path: Path) -> None:
    targets = ATTENTION if writer == "processors" else MORE
    made = factors(kind, targets)
    file = save(tmp_path, WRITERS[writer](made, kind))
    model = loaded(file, kind)
    assert len(lora_layers(model)) == len(made)
    found, wanted, base = (
        outputs(model, kind),
        in_diffusers(file, kind),
        outputs(bundle(kind), kind),
    )
    for part, output in wanted.items():
        assert_close(found[part], output, 1e-5)
        assert_different(output, base[part])


# ------------------------------------------------------------------------------- what is written


def adapter(top: Path, kind: str, recipe: dict[str, Any]) -> tuple[Path, Bundle]:
    """Write a random adapter like a training does, and return its folder and the model."""
    model = bundle(kind)
    values = {"model": {"name": "base"}, "task": {"type": "sequence_classification"}}
    own = {"rank": 3, "alpha": 5, **recipe}
    made = Recipe.model_validate({**values, "data": {"path": "none.csv"}, "adapter": own})
    attach(model, made, [])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    folder = top / "out"
    folder.mkdir()
    save_adapter(folder, model, made, list(made.adapter.train_modules))
    return folder, model


ADAPTERS: dict[str, dict[str, Any]] = {
    "usual": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj"]},
    "one part": {"target_modules": ["to_q", "unet.conv_in", "conv1", "time_emb_proj"]},
    "text encoder alone": {"target_modules": ["fc1"]},
    "uneven": {
        "target_modules": ["to_q", "to_v", "q_proj", "fc2", "proj_in"],
        "rank_pattern": {"to_q": 2, "text_encoder.*": 4},
        "alpha_pattern": {"to_v": 1.5, "fc2": 7},
        "use_rslora": True,
    },
    "dora": {"type": "dora", "target_modules": ["to_q", "to_v", "q_proj", "conv1"]},
}


OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "every attention": {
        "target_modules": [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            "proj_out",
            "context_embedder",
            "q_proj",
            "out_proj",
        ],
    },
    "uneven": {
        **ADAPTERS["uneven"],
        "target_modules": ["to_q", "to_v", "q_proj", "fc2", "proj"],
    },
    "dora": {"type": "dora", "target_modules": ["to_q", "to_v", "q_proj", "linear"]},
    "text encoder alone": ADAPTERS["text encoder alone"],
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "sd") for name in ADAPTERS),
        ("uneven", "xl"),
        *((name, "sd3") for name in OF_TRANSFORMERS),
    ],
)
def test_diffusers_reads_what_is_written(name: str, kind: str, tmp_path: Path) -> None:
    known = OF_TRANSFORMERS if kind == "sd3" else ADAPTERS
    folder, model = adapter(tmp_path, kind, known[name])
    wanted = outputs(model, kind)
    assert write_diffusers_file(folder) is None
    file = folder / "pytorch_lora_weights.safetensors"
    built = pipeline(kind)
    built.load_lora_weights(str(folder))  # by its usual name
    for part, output in outputs(built, kind).items():
        assert_close(output, wanted[part], 1e-5)
    again = loaded(shutil.copyfile(file, tmp_path / "a.safetensors"), kind)
    assert lora_layers(again).keys() == lora_layers(model).keys()
    for part, output in outputs(again, kind).items():
        assert_close(output, wanted[part], 1e-5)
    if name != "dora" and kind != "sd3":
        save_for_kohya(read_adapter(folder), tmp_path / "kohya.safetensors", kind == "xl")
        for found in (in_diffusers(tmp_path / "kohya.safetensors", kind),
                      outputs(loaded(tmp_path / "kohya.safetensors", kind), kind)):  # fmt: skip
            for part, output in found.items():
                assert_close(output, wanted[part], 1e-4)


def test_one_adapter_is_written_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path, "sd", ADAPTERS["uneven"])
    saved = read_adapter(folder)
    files: tuple[set[bytes], set[bytes]] = (set(), set())
    for _ in range(8):  # safetensors orders the metadata at random
        assert write_diffusers_file(folder) is None
        files[0].add((folder / "pytorch_lora_weights.safetensors").read_bytes())
        save_for_kohya(saved, tmp_path / "kohya.safetensors", False)
        files[1].add((tmp_path / "kohya.safetensors").read_bytes())
    assert [len(one) for one in files] == [1, 1]
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


# --------------------------------------------------------------------------- LyCORIS, and what else


def test_each_module_has_its_own_alpha(tmp_path: Path) -> None:
    made = factors("xl", MORE, alphas=(1.0, 3.0, 8.0))
    file = save(tmp_path, of_kohya(made, "xl"))
    assert_weights(
        file, "xl", {p: alpha / len(a) * product(a, b) for p, (a, b, alpha) in made.items()}
    )


def test_original_names_of_the_unet_are_read(tmp_path: Path) -> None:
    made = {place: pair for place, pair in factors("xl", MORE).items() if place[0] == "unet"}
    made |= {
        ("unet", name): pair
        for (_, name), pair in factors(
            "xl", re.compile(r"conv_in|conv_out|(time|add)_embedding\.linear_\d")
        ).items()
    }
    tensors, renamed = of_kohya(made, "xl"), {}
    first = {n.replace(".", "_"): sgm(n).replace(".", "_") for _, n in made}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{first[module]}.{kind}"] = tensor
    assert not any("down_blocks" in name for name in renamed)
    found = outputs(loaded(save(tmp_path, renamed), "xl"), "xl")
    assert_close(found["unet"], outputs(loaded(save(tmp_path, tensors), "xl"), "xl")["unet"], 1e-6)
    # diffusers numbers layers as the U-Net of the file says
    built = pipeline("xl")
    attention = {n: t for n, t in renamed.items() if "attn" in n or "in_layers" in n}
    file = save(tmp_path, attention)
    built.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert_close(outputs(loaded(file, "xl"), "xl")["unet"], outputs(built, "xl")["unet"], 1e-5)


def sgm(name: str) -> str:
    """Return the name in the original U-Net, written out for two blocks of one layer each."""
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0": "input_blocks.2.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0": "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
             "conv_shortcut": "skip_connection"}  # fmt: skip
    start = next(start for start in blocks if name == start or name.startswith(f"{start}."))
    rest = name.removeprefix(start).removeprefix(".")
    if "downsamplers" in start:
        rest = "op"
    return ".".join(filter(None, [blocks[start], inner.get(rest, rest)]))


def product(a: Tensor, b: Tensor) -> Tensor:
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def assert_weights(file: Path, kind: str, updates: dict[tuple[str, str], Tensor]) -> None:
    """Require that a file adds these updates to the weights, and nothing else."""
    before = {name: p.clone() for name, p in bundle(kind).named_parameters()}
    saved, model = read_adapter(file), bundle(kind)
    load_adapter(model, saved, [])
    expected = expected_weights(bundle(kind), saved.tensors, saved.config)
    merge(model)
    assert expected.disagreement(model) is None
    for name, parameter in model.named_parameters():
        place = tuple(name.removesuffix(".weight").split(".", 1))
        update = updates.get(place) if name.endswith(".weight") else None  # type: ignore[call-overload]
        if update is None:
            assert torch.equal(parameter, before[name]), name
        else:
            assert_close(parameter, before[name] + update.reshape(parameter.shape), 1e-5)


CONVOLUTION, MATRIX = ("unet", "mid_block.resnets.0.conv1"), ("unet", "time_embedding.linear_1")
LYCORIS = ("lycoris_mid_block_resnets_0_conv1", "lora_unet_time_embed_0")


def weight_of(place: tuple[str, str]) -> Tensor:
    return kept("sd").unet.get_submodule(place[1]).weight


def test_a_kernel_between_the_two_matrices_is_read(tmp_path: Path) -> None:
    n_out, n_in, *kernel = weight_of(CONVOLUTION).shape
    torch.manual_seed(0)
    down, up = torch.randn(2, n_in, 1, 1), torch.randn(n_out, 2, 1, 1)
    mid = torch.randn(2, 2, *kernel)
    names = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
    tensors = dict(zip(names, (down, up, mid, torch.tensor(1.0)), strict=True))
    file = save(tmp_path, {f"{LYCORIS[0]}.{name}": t for name, t in tensors.items()})
    whole = torch.einsum("or,rphw,pi->oihw", up.flatten(1), mid, down.flatten(1)) / 2
    assert_weights(file, "sd", {CONVOLUTION: whole})


def test_dora_of_lycoris_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors, updates = {}, {}
    for place, name in zip((CONVOLUTION, MATRIX), LYCORIS, strict=True):
        weight = weight_of(place)
        n_out, n_in, *kernel = weight.shape
        a, b = torch.randn(2, n_in, *kernel), torch.randn(n_out, 2, *(1 for _ in kernel))
        scale = torch.rand(n_out, *(1 for _ in weight.shape[1:])) + 0.5
        changed = weight + 2 * product(a, b)
        norm = changed.flatten(1).norm(dim=1).reshape(scale.shape)
        updates[place] = scale * changed / norm - weight
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors |= {f"{name}.alpha": torch.tensor(4.0), f"{name}.dora_scale": scale}
    model = bundle("sd")
    load_adapter(model, read_adapter(save(tmp_path, tensors)), [])
    merge(model)
    for place, update in updates.items():
        assert_close(model.get_submodule(".".join(place)).weight, weight_of(place) + update, 1e-5)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_of_lycoris_is_read(tucker: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors, updates = {}, {}
    for place, name in zip((CONVOLUTION, MATRIX), LYCORIS, strict=True):
        n_out, n_in, *kernel = weight_of(place).shape
        sides = []
        for i in (1, 2):
            if kernel and tucker:
                t, a, b = torch.randn(3, 3, *kernel), torch.randn(3, n_out), torch.randn(3, n_in)
                tensors[f"{name}.hada_t{i}"] = t
                sides.append(torch.einsum("pqhw,po,qi->oihw", t, a, b))
            else:
                a, b = torch.randn(n_out, 3), torch.randn(3, n_in * torch.Size(kernel).numel())
                sides.append((a @ b).reshape(n_out, n_in, *kernel))
            tensors |= {f"{name}.hada_w{i}_a": a, f"{name}.hada_w{i}_b": b}
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
        updates[place] = 0.5 * sides[0] * sides[1]
    assert_weights(save(tmp_path, tensors), "sd", updates)


@pytest.mark.parametrize("factor", [-1, 4])
def test_lokr_of_lycoris_is_read(factor: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors, updates = {}, {}
    sizes = (
        {16: (4, 4), 32: (4, 8), 8: (2, 4)} if factor == -1 else {16: (4, 4), 32: (4, 8), 8: (4, 2)}
    )
    for place, name in zip((CONVOLUTION, MATRIX), LYCORIS, strict=True):
        n_out, n_in, *kernel = weight_of(place).shape
        (a, b), (c, d) = sizes[n_out], sizes[n_in]
        w1 = torch.randn(a, c)
        tensors[f"{name}.lokr_w1"] = w1
        tensors[f"{name}.alpha"] = torch.tensor(7.0)
        if kernel:
            w2, scale = torch.randn(b, d, *kernel), 1.0  # alpha applies only to products
            tensors[f"{name}.lokr_w2"] = w2
        else:
            left, right = torch.randn(b, 1), torch.randn(1, d)
            w2, scale = left @ right, 7.0
            tensors |= {f"{name}.lokr_w2_a": left, f"{name}.lokr_w2_b": right}
        flat = torch.stack([torch.kron(w1, x) for x in w2.reshape(b, d, -1).unbind(-1)], -1)
        updates[place] = scale * flat.reshape(n_out, n_in, *kernel)
    assert_weights(save(tmp_path, tensors), "sd", updates)


@pytest.mark.parametrize("kept", [[], ["lokr_w1_a"], ["lokr_w1_b"]])
def test_lokr_without_its_first_factor_is_rejected(kept: list[str], tmp_path: Path) -> None:
    factors = {"lokr_w2": torch.ones(8, 4), **{key: torch.ones(2, 2) for key in kept}}
    file = save(tmp_path, {f"{LYCORIS[1]}.{key}": tensor for key, tensor in factors.items()})
    has = ", ".join([*kept, "lokr_w2"])
    with pytest.raises(
        IntegrityError, match=f"`unet.{MATRIX[1]}` has {has}, and such an update needs lokr_w1"
    ):
        loaded(file, "sd")


def test_every_name_is_used_or_reported(tmp_path: Path) -> None:
    made = factors("sd", ATTENTION)
    good = of_kohya(made, "sd")
    name, other = next(iter(good)).partition(".")[0], next(iter(of_peft(made, "sd")))
    for extra, error, message in (
        ({"lora_te2_text_model_x.lora_down.weight": torch.ones(1, 1)}, IntegrityError,
         r"`lora_te2_text_model_x.lora_down.weight` names no module[\s\S]*no `text_encoder_2`"),
        ({"lora_unet_down_blocks_9_x.alpha": torch.tensor(1.0)}, IntegrityError, "names no module"),
        ({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}, IntegrityError,
         "has an alpha and no matrices"),
        ({f"{name}.diff_b": torch.ones(1)}, LoraError, "diff_b` is a tensor of a kind that is not"),
        ({f"{name}.hada_w1_a": torch.ones(1, 1)}, LoraError, "several kinds: LOHA, LORA"),
        ({f"{name}.lora_up.weight": torch.full((8, 2), torch.nan)}, IntegrityError, "NaN"),
        ({other: next(iter(good.values()))}, IntegrityError, "is the second `lora_A`"),
        ({f"{name}.dora_scale": torch.ones(1, 8)}, IntegrityError, "magnitude|has only"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            loaded(save(tmp_path, good | extra), "sd")
    whole = save(tmp_path, {"model.diffusion_model.out.2.weight": torch.ones(2)})
    with pytest.raises(LoraError, match="holds no adapter of a diffusion model"):
        read_adapter(whole)
    lone = {n: t for n, t in good.items() if not n.startswith(f"{name}.lora_up")}
    with pytest.raises(IntegrityError, match="has only lora_A"):
        loaded(save(tmp_path, lone), "sd")
    with pytest.raises(LoraError, match="the base is another model"):
        load_adapter(nn.Linear(2, 2), read_adapter(save(tmp_path, good)), [])
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3})}
    with pytest.raises(LoraError, match="alpha stands twice"):
        loaded(save(tmp_path, good, metadata), "sd")
    for header, error in (
        ({"unet.r": 9}, "says 9"),
        ({"unet.r": 2, "unet.use_dora": True}, "DoRA"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(header)}
        tensors = {n: t[:, :2] if "_B" in n else t[:2] for n, t in of_peft(made, "sd").items()}
        with pytest.raises(IntegrityError, match=error):
            loaded(save(tmp_path, tensors, metadata), "sd")
    for odd in ({f"{name}.alpha": torch.ones(2)}, {f"{name}.lora_down.weight": torch.tensor(1.0)}):
        with pytest.raises(IntegrityError, match="which such a tensor never has"):
            loaded(save(tmp_path, good | odd), "sd")
    with pytest.raises(IntegrityError, match="no JSON object"):
        read_adapter(save(tmp_path, good, {"lora_adapter_metadata": "{"}))


def test_alphas_in_the_header_are_those_of_diffusers(tmp_path: Path) -> None:
    made = factors("sd", MORE)
    metadata = {
        f"{part}.{key}": value
        for part in NAMES["sd"]
        for key, value in {
            "r": 2, "lora_alpha": 3,
            "rank_pattern": {n: 3 for (p, n), pair in made.items()
                             if p == part and len(pair[0]) == 3},
            "alpha_pattern": {n: 1.5 for (p, n) in made if p == part and "to_q" in n},
            "target_modules": [n for p, n in made if p == part], "use_rslora": part == "unet",
        }.items()
    }  # fmt: skip
    tensors = {n: t for n, t in of_peft(made, "sd").items() if n.startswith("unet")}
    tensors |= {n: t for n, t in of_diffusers(made, "sd").items() if n.startswith("text")}
    file = save(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    wanted = in_diffusers(file, "sd")
    for part, output in outputs(loaded(file, "sd"), "sd").items():
        assert_close(output, wanted[part], 1e-5)


def test_a_file_of_a_single_model_has_its_scale_in_the_header(tmp_path: Path) -> None:
    """`save_lora_adapter` names no part, neither before the tensors nor before the keys."""
    theirs = pipeline("sd")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "conv1"], alpha_pattern={"mid_block.*to_q": 1},
        init_lora_weights=False,
    )  # fmt: skip
    theirs.unet.add_adapter(config)
    theirs.unet.save_lora_adapter(tmp_path)
    ours = loaded(tmp_path / "pytorch_lora_weights.safetensors", "sd")
    wanted = outputs(theirs, "sd")["unet"]
    assert_close(outputs(ours, "sd")["unet"], wanted, 1e-5)
    assert_different(wanted, outputs(bundle("sd"), "sd")["unet"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_matrices_of_8_bits_are_read_as_diffusers_reads_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = of_kohya(factors("sd", ATTENTION), "sd")
    stored = {n: t if n.endswith("alpha") else t.to(dtype) for n, t in tensors.items()}
    file = save(tmp_path, stored)
    wanted = in_diffusers(file, "sd")
    for part, output in outputs(loaded(file, "sd"), "sd").items():
        assert_close(output, wanted[part], 1e-5)


@pytest.mark.parametrize("change", [
    lambda name: name.removeprefix("unet."),
    lambda name: name.replace(".weight", ".default_0.weight"),
    lambda name: f"base_model.model.{name}",
    lambda name: f"base_model.model.{name.removeprefix('unet.')}",
    lambda name: name.replace("unet.", "unet._orig_mod."),
    lambda name: "diffusion_model." + ".lora_".join([sgm(name[5:].split(".lora_")[0]), name[-8:]]),
])  # fmt: skip
def test_other_spellings_of_names_are_read(change: Callable[[str], str], tmp_path: Path) -> None:
    made = {p: pair for p, pair in factors("sd", ATTENTION).items() if p[0] == "unet"}
    tensors = of_peft(made, "sd")
    wanted = read_names(save(tmp_path, tensors))
    assert read_names(save(tmp_path, {change(n): t for n, t in tensors.items()})) == wanted


def read_names(file: Path) -> list[str]:
    saved = read_adapter(file)
    use_names_of(bundle("sd"), saved)
    return list(saved.tensors)


def test_a_folder_with_such_a_file_is_an_adapter(tmp_path: Path) -> None:
    file = save(tmp_path, of_kohya(factors("sd", ATTENTION), "sd"))
    assert read_adapter(tmp_path).tensors.keys() == read_adapter(file).tensors.keys()
    assert not read_adapter(file).verified  # no manifest vouches for it
    file.rename(tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert loaded(tmp_path, "sd").parts.keys() == set(NAMES["sd"])
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="holds 2 safetensors files"):
        read_adapter(tmp_path)


# --------------------------------------------------------------------------------------- exporting


@dataclass
class Drawing:
    """The part of an image generation task that an export uses."""

    base: str
    kind: str = "sd"
    unused_parts: tuple[str, ...] = ()

    @property
    def recipe(self) -> Any:
        model = SimpleNamespace(name=self.base, revision="main")
        return SimpleNamespace(model=model)

    def probe(self) -> dict[str, Tensor]:
        return {}

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        return torch.cat([output.flatten() for output in outputs(model, self.kind).values()])


def source_of(top: Path, recipe: dict[str, Any], kind: str = "sd") -> Source:
    folder, model = adapter(top, kind, recipe)
    task: Any = Drawing(str(tiny_diffusion.save(top / "base", kind)), kind)
    wanted = task.probed(model, {})
    return Source(task, read_adapter(folder), None, bundle(kind), wanted, False)


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_an_export_is_checked_by_loading_it_in_diffusers(name: str, tmp_path: Path) -> None:
    source, reader = source_of(tmp_path, ADAPTERS["uneven"]), reader_named(name)
    assert reader.problems(source) == []
    assert "sqrt(rank)" in reader.changes(source)[0]
    to = tmp_path / "to"
    to.mkdir()
    reader.write(source, to)
    before = {n: p.clone() for n, p in source.base.named_parameters()}
    (line,) = reader.check(source, to)
    assert re.fullmatch(r"loaded by diffusers [\d.]+: outputs differ by \d\.\de-\d\d", line)
    assert "load_lora_weights" in reader.usage(source, to)
    for n, parameter in source.base.named_parameters():  # which is as it was
        assert torch.equal(parameter, before[n])
    source.outputs = source.outputs + 0.1
    with pytest.raises(IntegrityError, match="read as diffusers reads it, the outputs differ"):
        reader.check(source, to)


def test_modules_that_diffusers_does_not_read_are_reported(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"target_modules": ["to_q", "add_embedding.linear_1"]}, "xl")
    reader = reader_named("kohya")
    reader.write(source, tmp_path)
    with pytest.raises(LoraError, match=r"does not read the adapters of `unet\.add_embedding"):
        reader.check(source, tmp_path)
    before = outputs(bundle("xl"), "xl")["unet"]
    assert torch.equal(outputs(source.base, "xl")["unet"], before)
    # which other readers, and this tool, do
    assert len(lora_layers(loaded(tmp_path / "lora.safetensors", "xl"))) == len(
        lora_layers(loaded(source.saved.path, "xl"))
    )


@pytest.mark.parametrize("name", ["uneven", "text encoder alone"])
def test_an_export_of_stable_diffusion_3_is_checked(name: str, tmp_path: Path) -> None:
    source, reader = source_of(tmp_path, OF_TRANSFORMERS[name], "sd3"), reader_named("diffusers")
    assert reader.problems(source) == []
    to = tmp_path / "to"
    to.mkdir()
    reader.write(source, to)
    (line,) = reader.check(source, to)
    assert re.fullmatch(r"loaded by diffusers [\d.]+: outputs differ by \d\.\de-\d\d", line)


OF_ALL = ["to_q", "to_v", "to_out.0", "add_k_proj", "proj_out", "linear", "context_embedder",
          "linear_1", "net.2", "q_proj"]  # fmt: skip


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_files_of_transformers_in_kohyas_format_hold_all_of_an_adapter(
    kind: str, tmp_path: Path
) -> None:
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 1.5}, "use_rslora": True}
    targets = [*OF_ALL, *(["proj_mlp"] if kind == "flux" else [])]
    folder, model = adapter(tmp_path, kind, {"target_modules": targets, **patterns})
    file, transformer = tmp_path / "kohya.safetensors", bundle(kind).parts["transformer"]
    save_for_kohya(read_adapter(folder), file, True, transformer)
    wanted = outputs(model, kind)
    for part, output in outputs(loaded(file, kind), kind).items():
        assert_close(output, wanted[part], 1e-4)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_an_export_of_a_transformer_for_kohya_is_checked(kind: str, tmp_path: Path) -> None:
    # diffusers splits the layers of single blocks only at Flux's own sizes
    targets = [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_v", "ff.net.2")]
    source = source_of(tmp_path, {"target_modules": [*targets, "q_proj"]}, kind)
    reader, to = reader_named("kohya"), tmp_path / "to"
    assert reader.problems(source) == []
    to.mkdir()
    reader.write(source, to)
    (line,) = reader.check(source, to)
    assert re.search(r": outputs differ by \d\.\de-\d\d$", line)
    assert line.startswith("loaded by diffusers" if kind == "flux" else "diffusers reads no files")
    source.outputs = source.outputs + 0.1
    with pytest.raises(IntegrityError, match="the outputs differ"):
        reader.check(source, to)


def test_a_layer_without_a_name_in_kohyas_format_is_reported(tmp_path: Path) -> None:
    source: Any = source_of(tmp_path, {"target_modules": ["pos_embed.proj", "to_q"]}, "sd3")
    reader = reader_named("kohya")
    assert reader.problems(source) == []
    source.base.parts["transformer"].pos_embed = nn.Identity()
    (problem,) = reader.problems(source)
    assert "has no name for `pos_embed.proj`" in problem.what


def test_what_the_format_cannot_express_is_reported(tmp_path: Path) -> None:
    for i, (recipe, diffusers, kohya) in enumerate((
        ({"type": "dora", "target_modules": ["to_q"]}, None, "DoRA's lengths"),
        ({"type": "loha", "target_modules": ["to_q"]}, "of type `loha`", "of type `loha`"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "in full", "in full"),
        ({"target_modules": ["to_q"], "train_modules": ["unet.conv_in"]}, "conv_in", "conv_in"),
        ({"target_modules": ["token_embedding"]}, "the embedding `text_enc", "the embedding"),
        ({"type": "bitfit"}, "of type `bitfit`", "of type `bitfit`"),
    )):  # fmt: skip
        (tmp_path / str(i)).mkdir()
        folder, model = adapter(tmp_path / str(i), "sd", recipe)
        source = Source(None, read_adapter(folder), None, model, torch.ones(1), False)  # type: ignore[arg-type]
        for reader, wanted in (("diffusers", diffusers), ("kohya", kohya)):
            found = reader_named(reader).problems(source)
            assert (wanted is None and not found) or wanted in found[0].what  # type: ignore[operator]
        reason = write_diffusers_file(folder)
        assert (reason is None) == (diffusers is None)
        assert (folder / "pytorch_lora_weights.safetensors").exists() == (diffusers is None)


def test_training_also_writes_the_file_for_diffusers(tmp_path: Path) -> None:
    made = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "sequence_classification"},
            "data": {"path": "none.csv"},
            "adapter": {"target_modules": ["to_q"]},
        }
    )
    model = bundle("sd")
    attach(model, made, [])
    publish_adapter(tmp_path, model, made, [], None, None)
    listed = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert "pytorch_lora_weights.safetensors" in listed
    assert read_adapter(tmp_path).parts == ("unet",)


# ------------------------------------------------------------------------------ single decisions


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("alpha", [(), (1,), (1, 1)], [(2,), (0,)]),
        ("lora_A", [(2, 3), (2, 3, 1, 1), (1, 1)], [(), (6,), (0, 3), (2, 0)]),
        ("lora_magnitude_vector", [(3,), (3, 1), (1, 3, 1, 1)], [(), (0,)]),
    ],
)
def test_a_tensor_of_a_kind_has_a_shape_of_the_kind(
    kind: str, good: list[tuple[int, ...]], bad: list[tuple[int, ...]]
) -> None:
    assert all(_is_valid_shape(kind, shape) for shape in good)
    assert not any(_is_valid_shape(kind, shape) for shape in bad)


def test_the_rank_is_read_from_a_low_rank_factor() -> None:
    for name in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        assert _rank({name: torch.ones(3, 5), "lokr_w2": torch.ones(7, 9)}) == (3, False)
    # full factors have none: a rank for which PEFT would store a full factor
    assert _rank({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 6, 9, 9)}) == (6, True)
    assert _rank({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 6)}) == (8, True)
    assert _rank({"lokr_w2": torch.ones(8)}) == _rank({}) == (1, True)


def test_matrices_get_the_dimensions_of_their_layer() -> None:
    a, b, kernel = torch.randn(2, 5, 1, 1), torch.randn(3, 2, 1, 1), torch.randn(2, 5, 3, 3)
    linear, convolution = nn.Linear(5, 3), nn.Conv2d(5, 3, 3)
    given = {"lora_A": a, "lora_B": b}
    # a linear layer that was a 1 x 1 convolution, and the reverse
    for name, tensor in _in_peft_shapes(given, linear).items():
        assert torch.equal(tensor, given[name].flatten(1))
    flat = {"lora_A": a.flatten(1), "lora_B": b.flatten(1)}
    for name, tensor in _in_peft_shapes(flat, nn.Conv2d(5, 3, 1)).items():
        assert torch.equal(tensor, given[name])
    given = {"lora_A": kernel, "lora_B": b}
    assert all(torch.equal(t, given[n]) for n, t in _in_peft_shapes(given, convolution).items())
    lengths = torch.rand(3)
    for stored, module, shape in (
        (lengths[:, None], linear, (3,)), (lengths, linear, (3,)),
        (lengths[:, None, None, None], convolution, (1, 3, 1, 1)),
        (lengths.reshape(1, 3, 1, 1), convolution, (1, 3, 1, 1)),
    ):  # fmt: skip
        found = _in_peft_shapes({"lora_magnitude_vector": stored}, module)["lora_magnitude_vector"]
        assert found.shape == shape
        assert torch.equal(found.flatten(), lengths)


@pytest.mark.parametrize(
    ("first", "factor"), [((6, 8), -1), ((4, 4), 4), ((2, 2), 2), ((5, 5), -1)]
)
def test_the_factors_of_lokr_show_how_sizes_were_factorised(
    first: tuple[int, int], factor: int
) -> None:
    part = nn.Sequential(nn.Linear(64, 36))  # 36 = 6 x 6 outputs, and 64 = 8 x 8 inputs
    found = _kronecker_config(part, {"0": {"lokr_w1": torch.ones(first)}})
    # (5, 5) is of no factor: the shapes that are missing are named when it is loaded
    assert found == {
        "decompose_both": False, "use_effective_conv2d": False, "decompose_factor": factor
    }  # fmt: skip
    products = {"lokr_w1_a": torch.ones(first[0], 2), "lokr_w1_b": torch.ones(2, first[1])}
    found = _kronecker_config(part, {"0": {**products, "lokr_t2": torch.ones(2, 2, 3, 3)}})
    assert found == {
        "decompose_both": True, "use_effective_conv2d": True, "decompose_factor": factor
    }  # fmt: skip
