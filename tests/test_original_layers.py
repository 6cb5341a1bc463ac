"""Files with the names of the original checkpoints of Flux and Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from closeness import assert_close, assert_different
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from test_diffusion_file import bundle, in_diffusers, kept, loaded, outputs, save
from torch import Tensor, nn

from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.adapters.peft_format.diffusion_file import translated
from lora_cli.adapters.peft_format.original_layers import original_layers
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.errors import LoraError
from lora_cli.models.bundle import Bundle

Sizes = dict[str, tuple[int, int]]  # (out, in) of each layer
WIDTH, MLP = 16, 64  # of the tiny transformer of Flux


def double(i: int, width: int, mlp: int) -> Sizes:
    """Return the layers of a block of Flux that has separate weights for the text."""
    layers = {}
    for side in ("img", "txt"):
        layers |= {
            f"{side}_attn.qkv": (3 * width, width), f"{side}_attn.proj": (width, width),
            f"{side}_mlp.0": (mlp, width), f"{side}_mlp.2": (width, mlp),
            f"{side}_mod.lin": (6 * width, width),
        }  # fmt: skip
    return {f"double_blocks.{i}.{name}": size for name, size in layers.items()}


def single(i: int, width: int, mlp: int) -> Sizes:
    """Return the layers of a block of Flux that has the same weights for image and text."""
    return {
        f"single_blocks.{i}.linear1": (3 * width + mlp, width),
        f"single_blocks.{i}.linear2": (width, width + mlp),
        f"single_blocks.{i}.modulation.lin": (3 * width, width),
    }


def updates(sizes: Sizes, seed: int = 0) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and alpha for each layer; the ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, (n_out, n_in)) in enumerate(sizes.items()):
        rank = 2 + i % 3
        a = 0.3 * torch.randn(rank, n_in, generator=generator)
        b = 0.3 * torch.randn(n_out, rank, generator=generator)
        found[name] = (a, b, 1.0 + i % 4)
    return found


TEXT = {f"text_model.encoder.layers.0.self_attn.{name}_proj": (8, 8) for name in ("q", "out")}


def of_kohya(sizes: Sizes, with_alpha: bool = True) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b, alpha) in updates(sizes).items():
        start = "lora_te1" if name.startswith("text_model") else "lora_unet"
        before = f"{start}_{name.replace('.', '_')}"
        tensors |= {f"{before}.lora_down.weight": a, f"{before}.lora_up.weight": b}
        tensors |= {f"{before}.alpha": torch.tensor(alpha)} if with_alpha else {}
    return tensors


def of_comfy(sizes: Sizes) -> dict[str, Tensor]:
    """Names with their dots, and CLIP among the text encoders of a checkpoint."""
    tensors = {}
    for name, (a, b, alpha) in updates(sizes).items():
        start = "diffusion_model."
        start = "text_encoders.clip_l.transformer." if name.startswith("text_model") else start
        tensors |= {f"{start}{name}.lora_down.weight": a, f"{start}{name}.lora_up.weight": b}
        tensors[f"{start}{name}.alpha"] = torch.tensor(alpha)
    return tensors


def of_onetrainer(sizes: Sizes) -> dict[str, Tensor]:
    """The names of diffusers, without their dots."""
    tensors = of_kohya({name: size for name, size in sizes.items() if name.startswith("text_")})
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_out.0", "add_k_proj")]
    names += ["single_transformer_blocks.0.attn.to_v", "context_embedder"]
    wide = {"context_embedder": 24}
    for name, (a, b, alpha) in updates({n: (WIDTH, wide.get(n, WIDTH)) for n in names}).items():
        before = f"lora_transformer_{name.replace('.', '_')}"
        tensors |= {f"{before}.lora_down.weight": a, f"{before}.lora_up.weight": b}
        tensors[f"{before}.alpha"] = torch.tensor(alpha)
    return tensors


XLABS: Sizes = {
    "double_blocks.0.processor.qkv_lora1": (3 * WIDTH, WIDTH),
    "double_blocks.0.processor.qkv_lora2": (3 * WIDTH, WIDTH),
    "double_blocks.0.processor.proj_lora1": (WIDTH, WIDTH),
    "double_blocks.0.processor.proj_lora2": (WIDTH, WIDTH),
    "single_blocks.0.processor.qkv_lora": (3 * WIDTH, WIDTH),
    "single_blocks.0.processor.proj_lora": (WIDTH, WIDTH + MLP),
}


def of_xlabs(start: str = "") -> dict[str, Tensor]:
    return {
        f"{start}{name}.{side}.weight": matrix
        for name, pair in updates(XLABS).items()
        for side, matrix in zip(("down", "up"), pair[:2], strict=True)
    }


# diffusers splits `linear1` at Flux's own sizes, so a tiny file does not contain it
OF_FLUX = {**double(0, WIDTH, MLP), **TEXT}
OF_FLUX |= {k: v for k, v in single(0, WIDTH, MLP).items() if not k.endswith("linear1")}
FLUX_FILES = {
    "kohya": of_kohya(OF_FLUX),
    "kohya without alpha": of_kohya(OF_FLUX, with_alpha=False),
    "kohya in half": {name: t.half() for name, t in of_kohya(OF_FLUX).items()},
    "kohya in bfloat16": {name: t.bfloat16() for name, t in of_kohya(OF_FLUX).items()},
    "comfy": of_comfy(OF_FLUX),
    "onetrainer": of_onetrainer(OF_FLUX),
    "xlabs": of_xlabs(),
    "xlabs of comfy": of_xlabs("diffusion_model."),
}


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", FLUX_FILES)
def test_files_of_flux_are_read_as_diffusers_reads_them(name: str, tmp_path: Path) -> None:
    file = save(tmp_path, FLUX_FILES[name])
    expected, base = in_diffusers(file, "flux"), outputs(bundle("flux"), "flux")
    found = outputs(loaded(file, "flux"), "flux")
    # diffusers multiplies by alpha in the precision of the file
    tolerance = {"kohya in half": 1e-3, "kohya in bfloat16": 1e-2}.get(name, 1e-5)
    for part, output in expected.items():
        assert_close(found[part], output, tolerance)
    assert_different(found["transformer"], base["transformer"])
    if "xlabs" not in name:
        assert_different(found["text_encoder"], base["text_encoder"])


# ------------------------------------------------------------------ at the sizes of Flux and of SD3


def test_every_layer_of_flux_is_split_as_in_diffusers(tmp_path: Path) -> None:
    width, mlp = 3072, 4 * 3072
    sizes = {**double(0, width, mlp), **single(0, width, mlp),
             "final_layer.linear": (64, width),
             "final_layer.adaLN_modulation.1": (2 * width, width)}  # fmt: skip
    tensors = {n: t for n, t in of_kohya(sizes).items()
               if not (n.startswith("lora_unet_final") and n.endswith("alpha"))}  # fmt: skip
    expected = FluxPipeline.lora_state_dict(dict(tensors))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    file = save(tmp_path, tensors)
    config, found, _ = translated(read_adapter(file).file, Bundle({"transformer": transformer}))  # type: ignore[arg-type]
    of_final = ("norm_out.linear", "proj_out")
    expected = {n if n.startswith("transformer.") else f"transformer.{n}": t
              for n, t in expected.items()}  # fmt: skip
    assert found.keys() == expected.keys()
    assert {f"transformer.{name}.lora_A.weight" for name in of_final} <= found.keys()
    for name in [n.removesuffix(".lora_A.weight") for n in found if n.endswith("lora_A.weight")]:
        a, b = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
        alpha = alpha_of(config, name)
        x = torch.linspace(-1, 1, a.shape[1])
        theirs = expected[f"{name}.lora_B.weight"] @ (expected[f"{name}.lora_A.weight"] @ x)
        assert_close(alpha / len(a) * (b @ (a @ x)), theirs, 1e-5)


def joint(i: int, width: int, is_last: bool, is_dual: bool) -> Sizes:
    """Return the layers of a block of Stable Diffusion 3."""
    layers = {
        "context_block.attn.qkv": (3 * width, width), "x_block.attn.qkv": (3 * width, width),
        "x_block.attn.proj": (width, width), "x_block.mlp.fc1": (4 * width, width),
        "x_block.mlp.fc2": (width, 4 * width),
        "x_block.adaLN_modulation.1": ((9 if is_dual else 6) * width, width),
        "context_block.adaLN_modulation.1": ((2 if is_last else 6) * width, width),
    }  # fmt: skip
    if not is_last:
        layers |= {
            "context_block.attn.proj": (width, width), "context_block.mlp.fc1": (4 * width, width),
            "context_block.mlp.fc2": (width, 4 * width),
        }  # fmt: skip
    if is_dual:
        layers |= {"x_block.attn2.qkv": (3 * width, width), "x_block.attn2.proj": (width, width)}
    return {f"joint_blocks.{i}.{name}": size for name, size in layers.items()}


def of_first_checkpoint(sizes: Sizes, own: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return diffusers' conversion of a checkpoint of Stable Diffusion 3 with given changes."""
    generator = torch.Generator().manual_seed(seed)
    whole = {"pos_embed": torch.zeros(1, 256, WIDTH), "x_embedder.proj.bias": torch.zeros(WIDTH)}
    for name, (n_out, n_in) in sizes.items():
        whole[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator)
        whole[f"{name}.bias"] = torch.zeros(n_out)
    patches = whole["x_embedder.proj.weight"]
    whole["x_embedder.proj.weight"] = patches.reshape(WIDTH, 4, 2, 2)
    for name, update in own.items():
        whole[f"{name}.weight"] += update.reshape(whole[f"{name}.weight"].shape)
    for block in (0, 1):
        for side in ("x", "context"):
            for which in "qk":
                whole[f"joint_blocks.{block}.{side}_block.attn.ln_{which}.weight"] = torch.ones(8)
    whole |= {f"joint_blocks.0.x_block.attn2.ln_{which}.weight": torch.ones(8) for which in "qk"}
    found: dict[str, Tensor] = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    return found


@pytest.mark.slow
def test_files_of_stable_diffusion_3_change_the_weights_of_its_original_checkpoint(
    tmp_path: Path,
) -> None:
    sizes = {
        **joint(0, WIDTH, False, True), **joint(1, WIDTH, True, False),
        "x_embedder.proj": (WIDTH, 16), "context_embedder": (WIDTH, 24),
        "t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH),
        "y_embedder.mlp.0": (WIDTH, 16), "y_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (16, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }  # fmt: skip
    tensors = of_kohya(sizes)
    patches = "lora_unet_x_embedder_proj"
    down, up = (tensors[f"{patches}.lora_{side}.weight"] for side in ("down", "up"))
    tensors[f"{patches}.lora_down.weight"] = down.reshape(-1, 4, 2, 2)
    tensors[f"{patches}.lora_up.weight"] = up.reshape(*up.shape, 1, 1)
    changes = {n: alpha / len(a) * (b @ a) for n, (a, b, alpha) in updates(sizes).items()}
    model = Bundle({"transformer": bundle("sd3").parts["transformer"]})
    model.parts["transformer"].load_state_dict(of_first_checkpoint(sizes, {}, 3))
    load_adapter(model, read_adapter(save(tmp_path, tensors)), [])
    merge(model)
    for name, weight in of_first_checkpoint(sizes, changes, 3).items():
        assert_close(model.parts["transformer"].get_parameter(name)
                     if name != "pos_embed.pos_embed" else weight, weight, 1e-5)  # fmt: skip


# ---------------------------------------------------------------------- what cannot be used, named


def test_loha_and_dora_of_several_modules_are_split_by_rows(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(size, generator=generator)
                  for size in ((48, 3), (3, 16), (48, 3), (3, 16)))  # fmt: skip
    ends = ("w1_a", "w1_b", "w2_a", "w2_b")
    file = save(
        tmp_path, {f"{name}.hada_{end}": t for end, t in zip(ends, (a, b, c, d), strict=True)}
    )
    model, base = loaded(file, "flux"), kept("flux").transformer
    merge(model)
    update = (a @ b) * (c @ d)
    joined = [f"transformer_blocks.0.attn.to_{which}.weight" for which in "qkv"]
    before = torch.cat([base.get_parameter(one) for one in joined])
    after = torch.cat([model.parts["transformer"].get_parameter(one) for one in joined])
    assert_close(after, before + update, 1e-5)

    scale = torch.rand(48, 1, generator=generator) + 0.5
    tensors = {
        f"{name}.lora_down.weight": b,
        f"{name}.lora_up.weight": a,
        f"{name}.dora_scale": scale,
    }
    model = loaded(save(tmp_path, tensors), "flux")
    merge(model)
    after = torch.cat([model.parts["transformer"].get_parameter(one) for one in joined])
    changed = before + a @ b
    assert_close(after, scale * changed / changed.norm(dim=1, keepdim=True), 1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(47, 2)},
         "has 47 rows, and its layer has 48"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(4, 4),
          "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": torch.ones(12, 4)},
         "Kronecker factor of a layer that is several modules"),
        ({"lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight": torch.ones(48, 2)},
         "double_blocks_7_img_attn_qkv.lora_up.weight` names no module"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, 16),
          "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 16)},
         "is the second `lora_A` of `transformer.transformer_blocks.0.attn.to_k`"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(2, 8)},
         "names no module"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_split_are_reported(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match=message):
        loaded(save(tmp_path, tensors), "flux")


CONTROL = {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 16),
           "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(48, 2),
           "double_blocks.0.img_attn.qkv.lora_B.bias": torch.ones(48),
           "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8)}  # fmt: skip


def test_a_control_adapter_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(
        LoraError, match=r"query_norm.scale` is a tensor[\s\S]*lora_B.bias"
    ) as found:
        read_adapter(save(tmp_path, CONTROL))
    assert "FluxControlPipeline" in str(found.value)


def test_updates_without_effect_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = FLUX_FILES["kohya"]
    idle = {
        "lora_te1_text_projection.lora_down.weight": torch.ones(2, 8),  # which Flux does not read
        "lora_te1_text_projection.lora_up.weight": torch.ones(8, 2),
        "lora_te1_text_projection.alpha": torch.tensor(2.0),
        "lora_unet_new_layer.lora_down.weight": torch.ones(2, 8),
        "lora_unet_new_layer.lora_up.weight": torch.zeros(8, 2),
        "lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.zeros(16),
    }
    found = outputs(loaded(save(tmp_path, {**tensors, **idle}), "flux"), "flux")
    printed = capsys.readouterr().err
    assert "1 tensor of a kind which is not read, and adds zeros: `lora_unet_double" in printed
    assert "5 tensors would change nothing in this base" in printed
    for part, output in outputs(loaded(save(tmp_path, tensors), "flux"), "flux").items():
        assert torch.equal(found[part], output)
    for name, tensor in (
        ("lora_unet_new_layer.lora_up.weight", torch.ones(8, 2)),
        ("lora_unet_double_blocks_0_img_attn_proj.diff_b", torch.ones(16)),
        ("bundle_emb.x.clip_l", torch.zeros(1, 8)),
    ):
        with pytest.raises(LoraError, match=name):
            loaded(save(tmp_path, {**tensors, **idle, name: tensor}), "flux")


def test_layers_are_those_that_the_model_has() -> None:
    names = [n for n, _ in kept("flux").transformer.named_modules()]
    layers = original_layers(names)
    assert "double_blocks.0.img_attn.qkv" in layers
    assert "double_blocks.1.img_attn.qkv" not in layers
    assert not any(name.startswith("joint") for name in layers)
    of_sd3 = original_layers([n for n, _ in kept("sd3").transformer.named_modules()])
    assert not any(name.startswith("double") for name in of_sd3)
    assert original_layers([n for n, _ in nn.Linear(1, 1).named_modules()]) == {}
