"""Other tools' names of the modules of a diffusion model, name by name."""

from __future__ import annotations

import pytest
from torch import nn

from lora_cli.adapters.peft_format.diffusion_names import (
    Blocks,
    ModuleNames,
    original_name,
    split_name,
)
from lora_cli.adapters.peft_format.original_layers import Layer


def model(*names: str) -> nn.Module:
    """Return a model with a linear layer of each of these names."""
    top = nn.Module()
    for name in names:
        inner = top
        *way, last = name.split(".")
        for part in way:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(last, nn.Linear(1, 1))
    return top


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (".lora_A.weight", "lora_A"),
        (".lora_A.default.weight", "lora_A"),
        (".lora_B.default_0.weight", "lora_B"),
        (".lora.down.weight", "lora_A"),
        ("_lora.up.weight", "lora_B"),
        (".lora_linear_layer.down.weight", "lora_A"),
        (".lora_down.weight", "lora_A"),
        (".lora_up.weight", "lora_B"),
        ("_lora.down.weight", "lora_A"),
        (".lora_mid.weight", "lora_mid"),
        (".lora_magnitude_vector", "lora_magnitude_vector"),
        (".lora_magnitude_vector.weight", "lora_magnitude_vector"),
        (".dora_scale", "lora_magnitude_vector"),
        (".alpha", "alpha"),
        (".hada_w1_a", "hada_w1_a"),
        (".hada_t2", "hada_t2"),
        (".lokr_w2", "lokr_w2"),
        (".lokr_w1_b", "lokr_w1_b"),
        (".lokr_t2", "lokr_t2"),
    ],
)
def test_the_end_of_a_name_says_what_the_tensor_is(end: str, kind: str) -> None:
    assert split_name(f"unet.a.to_q{end}") == ("unet.a.to_q", kind)


def test_layers_of_xlabs_keep_their_number() -> None:
    for end, kind in (("down", "lora_A"), ("up", "lora_B")):
        assert split_name(f"a.qkv_lora2.{end}.weight") == ("a.qkv_lora2", kind)


@pytest.mark.parametrize("name", ["unet.a.weight", "unet.a.lora_C.weight", "unet.a.hada_w3_a"])
def test_other_ends_belong_to_no_adapter(name: str) -> None:
    assert split_name(name) is None


# Stable Diffusion 1.5: blocks of two layers, of which the first three down and the last three up
# attend to the text. The names on the right are those of its original checkpoint.
FIRST_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    ),
    "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
    "down_blocks.3.resnets.1.time_emb_proj": "input_blocks.11.0.emb_layers.1",
    "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.0.conv1": "output_blocks.0.0.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.3.resnets.2.conv2": "output_blocks.11.0.out_layers.3",
    "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
    "conv_norm_out": None,
    "down_blocks.0": None,
}
SECOND = "text_model.encoder.layers.0.fc1"  # of a text encoder that has kept CLIP's `text_model`
SD = Blocks(3, frozenset({"up_blocks.1", "up_blocks.2", "up_blocks.3"}))


@pytest.mark.parametrize(("name", "first"), FIRST_NAMES.items())
def test_modules_have_the_names_of_the_original_checkpoint(name: str, first: str | None) -> None:
    assert original_name(name, SD) == first


def test_the_structure_of_blocks_is_read_from_names() -> None:
    names = [f"down_blocks.0.resnets.{i}.conv1" for i in (0, 0, 1)]
    names += [f"down_blocks.1.resnets.{i}.conv1" for i in range(5)]
    names += [f"up_blocks.{i}.attentions.0.proj_in" for i in (1, 2, 3)]
    assert Blocks.of([*names, "x.down_blocks.0.resnets.9.conv1"]) == SD
    assert Blocks.of(["encoder.layers.0.mlp.fc1"]) == Blocks(1, frozenset())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("unet.mid_block.attn.to_q", ("unet", "mid_block.attn.to_q")),
        ("base_model.model.unet.mid_block.attn.to_q", ("unet", "mid_block.attn.to_q")),
        ("unet.mid_block.attn.processor.to_q", ("unet", "mid_block.attn.to_q")),
        ("unet.mid_block.attn.to_out", ("unet", "mid_block.attn.to_out.0")),
        ("mid_block.attn.to_q", ("unet", "mid_block.attn.to_q")),
        ("lora_unet_mid_block_attn_to_q", ("unet", "mid_block.attn.to_q")),
        ("lycoris_mid_block_attn_to_q", ("unet", "mid_block.attn.to_q")),
        ("diffusion_model.input_blocks.0.0", ("unet", "conv_in")),
        ("lora_te_text_model_encoder_layers_0_q_proj", ("text_encoder", "encoder.layers.0.q_proj")),
        ("lora_te1_encoder_layers_0_q_proj", ("text_encoder", "encoder.layers.0.q_proj")),
        ("text_encoder.encoder.layers.0.to_q", ("text_encoder", "encoder.layers.0.q_proj")),
        ("text_encoder_2.encoder.layers.0.fc1", ("text_encoder_2", SECOND)),
        ("lora_te2_text_model_encoder_layers_0_fc1", ("text_encoder_2", SECOND)),
        ("lora_te3_encoder_layers_0_fc1", None),  # the base has no T5
        ("text_encoders.clip_g.transformer.encoder.layers.0.fc1", ("text_encoder_2", SECOND)),
        ("lora_te_encoder_layers_0_fc1", None),  # of the second alone
        ("unet.encoder.layers.0.q_proj", None),
        ("lora_unet_a_b_c", None),  # the name of two modules
        ("unet.mid_block", None),  # no layer
    ],
)  # fmt: skip
def test_a_name_matches_one_module_of_one_part(name: str, place: tuple[str, str] | None) -> None:
    of_unet = ("mid_block.attn.to_q", "mid_block.attn.to_out.0", "conv_in", "a.b_c", "a_b.c")
    names = ModuleNames({
        "unet": model(*of_unet),
        "text_encoder": model("encoder.layers.0.q_proj"),
        "text_encoder_2": model(SECOND),
    })  # fmt: skip
    assert names.find(name) == (place and (place[0], Layer((place[1],))))


def test_the_third_text_encoder_has_its_own_prefix() -> None:
    names = ModuleNames({f"text_encoder{end}": model("a.fc1") for end in ("", "_2", "_3")})
    for start, part in (("te", ""), ("te1", ""), ("te2", "_2")):
        assert names.find(f"lora_{start}_a_fc1") == (f"text_encoder{part}", Layer(("a.fc1",)))
    lacks_second = {one: model("a.fc1") for one in ("text_encoder", "text_encoder_3")}
    assert ModuleNames(lacks_second).find("lora_te2_a_fc1") is None
    with_t5 = {"text_encoder_2": model("encoder.block.0.q")}
    with_both = {**with_t5, "text_encoder_3": model("encoder.block.0.q")}
    for parts, part in ((with_t5, "text_encoder_2"), (with_both, "text_encoder_3")):
        for start in (
            "lora_te3_encoder_block_0_q",
            "text_encoders.t5xxl.transformer.encoder.block.0.q",
        ):
            assert ModuleNames(parts).find(start) == (part, Layer(("encoder.block.0.q",)))
