"""Tests of diffusion families, one rule at a time: matching parts, sizes, texts and patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.models.diffusion_family import (
    Conditions,
    Family,
    StableDiffusion,
    StableDiffusionXL,
    clip_texts,
    latents_differ,
    tokenizer_of,
)
from lora_cli.models.flux import Flux, latents_of, patches_of
from lora_cli.models.stable_diffusion_3 import StableDiffusion3

VAE = {"block_out_channels": [1, 2, 3, 4], "latent_channels": 4}
UNET = {
    "in_channels": 4, "cross_attention_dim": 6, "addition_embed_type": None,
    "class_embed_type": None, "sample_size": 64,
}  # fmt: skip
SD3 = {
    "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 10,
    "patch_size": 2, "pos_embed_max_size": 96, "sample_size": 128,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": None, "patch_size": 1, "joint_attention_dim": 12,
    "pooled_projection_dim": 5, "guidance_embeds": True,
}  # fmt: skip


def family(kind: str, **changes: dict[str, Any]) -> Family:
    """Return a family whose parts fit together, except for changes by the name of the part."""
    clip = {"hidden_size": 5, "projection_dim": 5}
    build: Any
    build, configs = {
        "sd": (StableDiffusion, {"unet": UNET, "text_encoder": {"hidden_size": 6}}),
        "xl": (StableDiffusionXL, {
            "unet": {**UNET, "addition_embed_type": "text_time", "cross_attention_dim": 11},
            "text_encoder": {"hidden_size": 6}, "text_encoder_2": {"hidden_size": 5},
        }),
        "sd3": (StableDiffusion3, {"transformer": SD3, "text_encoder": clip,
                                   "text_encoder_2": clip, "text_encoder_3": {"d_model": 12}}),
        "flux": (Flux, {"transformer": FLUX, "text_encoder": {"hidden_size": 5},
                        "text_encoder_2": {"d_model": 12}}),
    }[kind]  # fmt: skip
    every: dict[str, Any] = {"vae": VAE, "scheduler": {}, **configs}
    for part, values in changes.items():
        every[part] = {**every[part], **values}
    return build([name for name in configs if name.startswith("text_encoder")], every)


KINDS = ["sd", "xl", "sd3", "flux"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_one_family_fit(kind: str) -> None:
    assert family(kind).mismatches() == []


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("sd", {"unet": {"in_channels": 9}}, "its U-Net reads 9 channels (it fills in parts of "
         "pictures), and its autoencoder makes 4"),
        ("sd", {"unet": {"in_channels": 8}}, "its U-Net reads 8 channels (it changes pictures), "
         "and its autoencoder makes 4"),
        ("sd", {"unet": {"in_channels": 5}}, "its U-Net reads 5 channels, and its autoencoder "
         "makes 4"),
        ("sd", {"vae": {"latent_channels": 16}}, "its U-Net reads 4 channels, and its autoencoder "
         "makes 16"),
        ("sd", {"unet": {"cross_attention_dim": 7}}, "its U-Net reads texts of 7 numbers a token, "
         "and its text encoders make 6"),
        ("xl", {"text_encoder_2": {"hidden_size": 4}}, "its U-Net reads texts of 11 numbers a "
         "token, and its text encoders make 6 and 4"),
        ("sd", {"unet": {"addition_embed_type": "text_time"}}, "its U-Net is told more of a "
         "picture than that of Stable Diffusion"),
        ("sd", {"unet": {"class_embed_type": "timestep"}}, "its U-Net is told more of a picture "
         "than that of Stable Diffusion"),
        ("xl", {"unet": {"addition_embed_type": None}}, "its U-Net is told more of a picture than "
         "that of Stable Diffusion XL"),
        ("xl", {"unet": {"class_embed_type": "timestep"}}, "its U-Net is told more of a picture "
         "than that of Stable Diffusion XL"),
        ("sd", {"scheduler": {"prediction_type": "sample"}}, "its scheduler has `prediction_type: "
         "sample`, and `epsilon` and `v_prediction` train"),
        ("sd3", {"vae": {"latent_channels": 16}}, "its transformer reads 4 channels, and its "
         "autoencoder makes 16"),
        ("sd3", {"transformer": {"out_channels": 8}}, "its transformer returns 8 channels"),
        ("sd3", {"text_encoder": {"hidden_size": 8}}, "its transformer reads 12 numbers a token, "
         "and its CLIP encoders make 13"),
        ("sd3", {"text_encoder_3": {"d_model": 9}}, "its transformer reads 12 numbers a token, and "
         "its T5 encoder makes 9"),
        ("sd3", {"text_encoder_2": {"projection_dim": 3}}, "its transformer reads 10 numbers of a "
         "whole text, and its CLIP encoders make 8"),
        ("flux", {"transformer": {"in_channels": 8, "out_channels": 16}}, "its transformer reads 8 "
         "channels a patch, and its autoencoder makes 16"),
        ("flux", {"transformer": {"out_channels": 8}}, "its transformer returns other patches than "
         "it reads"),
        ("flux", {"transformer": {"patch_size": 2}}, "its transformer returns other patches than "
         "it reads"),
        ("flux", {"text_encoder_2": {"d_model": 9}}, "its transformer reads 12 numbers a token, "
         "and its `text_encoder_2` makes 9"),
        ("flux", {"text_encoder": {"hidden_size": 9}}, "its transformer reads 5 numbers of a whole "
         "text, and its `text_encoder` makes 9"),
    ],
)  # fmt: skip
def test_mismatches_are_named(kind: str, changes: dict[str, Any], said: str) -> None:
    found = family(kind, **changes).mismatches()
    assert said in found
    if "latent_channels" not in str(changes):  # by which two things may not fit
        assert found == [said]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd", {"scheduler": {"prediction_type": "epsilon"}}),
        ("sd", {"scheduler": {"prediction_type": "v_prediction"}}),
        ("sd3", {"transformer": {"out_channels": None}}),
        ("sd3", {"text_encoder": {"hidden_size": 7}}),  # zero-padded to T5's width
        ("sd3", {"text_encoder": {"hidden_size": 2}}),
        ("flux", {"transformer": {"out_channels": 16, "guidance_embeds": False}}),
        ("sd3", {"scheduler": {"invert_sigmas": False, "stochastic_sampling": False}}),
    ],
)
def test_usual_configurations_fit(kind: str, changes: dict[str, Any]) -> None:
    assert family(kind, **changes).mismatches() == []


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("key", ["invert_sigmas", "stochastic_sampling"])
def test_unsupported_flow_schedulers_are_named(kind: str, key: str) -> None:
    said = f"its scheduler has `{key}`, with which it draws in another way"
    assert family(kind, scheduler={key: True}).mismatches() == [said]


def test_without_t5_only_the_clip_encoders_have_to_fit() -> None:
    with_t5 = family("sd3", text_encoder_3={"d_model": 9})
    without = StableDiffusion3(["text_encoder", "text_encoder_2"], with_t5.configs)
    assert without.mismatches() == []
    assert len(with_t5.mismatches()) == 1


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("kind", "changes", "pixels", "divisor", "longest", "usual"),
    [
        ("sd", {}, 8, 8, None, 512),
        ("sd", {"vae": {"block_out_channels": [1, 2]}}, 2, 8, None, 128),
        ("sd", {"vae": {"block_out_channels": [1] * 5}, "unet": {"sample_size": None}}, 16, 16,
         None, None),
        ("sd", {"vae": {"block_out_channels": [1]}, "unet": {"sample_size": [64, 32]}}, 1, 8, None,
         None),
        ("sd3", {}, 8, 16, 1536, 1024),
        ("sd3", {"vae": {"block_out_channels": [1, 2]}}, 2, 4, 384, 256),
        ("flux", {}, 8, 16, None, 1024),
        ("flux", {"vae": {"block_out_channels": [1, 2]}}, 2, 4, None, 256),
    ],
)  # fmt: skip
def test_sides_are_multiples_of_what_a_latent_or_a_patch_covers(
    kind: str,
    changes: dict[str, Any],
    pixels: int,
    divisor: int,
    longest: int | None,
    usual: int | None,
) -> None:
    found = family(kind, **changes)
    assert (found.pixels_per_latent, found.divisor) == (pixels, divisor)
    assert (found.longest_side, found.usual_side) == (longest, usual)


def test_the_token_limit_of_each_text_encoder() -> None:
    tokenizer = SimpleNamespace(model_max_length=77)
    of = {"sd": [77], "xl": [77, 77], "sd3": [77, 77, 256], "flux": [77, 512]}
    for kind, wanted in of.items():
        found = family(kind)
        assert [found.token_limit(e, tokenizer) for e in found.encoders] == wanted
        assert [tokenizer_of(e) for e in found.encoders] == [
            "tokenizer", "tokenizer_2", "tokenizer_3",
        ][: len(wanted)]  # fmt: skip


def test_supported_classes_of_each_part() -> None:
    clip = "CLIPTextModelWithProjection"
    assert StableDiffusion3.classes["text_encoder"] == (clip,)
    assert StableDiffusion3.classes["text_encoder_2"] == (clip,)
    assert StableDiffusionXL.classes["text_encoder_2"] == (clip,)
    assert StableDiffusionXL.classes["text_encoder"] == ("CLIPTextModel",)
    for kind in KINDS:
        found = family(kind)
        assert {found.denoiser, "vae", *found.encoders} <= set(found.classes)


def test_inputs_and_targets_of_each_family() -> None:
    flags = {k: (family(k).has_sizes, family(k).uses_flow_matching, family(k).reads_guidance,
                 family(k).has_negative_prompt) for k in KINDS}  # fmt: skip
    assert flags == {
        "sd": (False, False, False, True), "xl": (True, False, False, True),
        "sd3": (False, True, False, True), "flux": (False, True, True, False),
    }  # fmt: skip
    assert not family("flux", transformer={"guidance_embeds": False}).reads_guidance
    assert [family(k).optional for k in KINDS] == [(), (), ("text_encoder_3",), ()]
    assert [family(k).never_adapted for k in KINDS] == [
        (), (), ("text_encoder_3",), ("text_encoder_2",),
    ]  # fmt: skip


def test_sampling_defaults_are_those_of_each_pipeline() -> None:
    assert {kind: family(kind).sampling_defaults for kind in KINDS} == {
        "sd": {}, "xl": {"guidance_scale": 5.0}, "sd3": {"steps": 28, "guidance_scale": 7.0},
        "flux": {"steps": 28, "guidance_scale": 3.5},
    }  # fmt: skip
    schnell = family("flux", transformer={"guidance_embeds": False})
    assert schnell.sampling_defaults == {"steps": 4, "guidance_scale": 0.0}


def test_equal_channels_are_no_mismatch() -> None:
    assert latents_differ("U-Net", 4, 4, " a patch") == []
    assert latents_differ("U-Net", 4, 5, " a patch") == [
        "its U-Net reads 4 channels a patch, and its autoencoder makes 5"
    ]


def test_pipelines_omit_the_safety_checker_and_watermark() -> None:
    assert family("sd").pipeline_options({"safety_checker": ["a", "b"]}) == {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    for index, zeros in (({}, True), ({"force_zeros_for_empty_prompt": False}, False)):
        assert family("xl").pipeline_options(index) == {
            "force_zeros_for_empty_prompt": zeros, "add_watermarker": False,
        }  # fmt: skip
    assert family("sd3").pipeline_options({}) == {}


# ------------------------------------------------------------------------------------------ texts


class Encoder(nn.Module):
    """A text encoder with distinguishable outputs."""

    def __init__(self, width: int, base: float, projected: bool = False) -> None:
        super().__init__()
        self.width, self.base, self.projected = width, base, projected

    def forward(self, ids: Tensor, output_hidden_states: bool = False) -> Any:
        states = [
            (ids[..., None] + self.base + 10 * i).float().expand(-1, -1, self.width)
            for i in range(5)
        ]
        whole = states[0][:, 0] + 0.5
        first = whole if self.projected else states[-1]

        class Output(tuple):  # type: ignore[type-arg]
            hidden_states = tuple(states) if output_hidden_states else None
            pooler_output = whole

        return Output((first,))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MORE = torch.tensor([[7, 8], [9, 6]])
PARTS: dict[str, nn.Module] = {
    "text_encoder": Encoder(2, 0.0, True), "text_encoder_2": Encoder(3, 100.0, True),
    "text_encoder_3": Encoder(12, 200.0),
}  # fmt: skip


def before_last(ids: Tensor, base: float, width: int) -> Tensor:
    return (ids[..., None] + base + 30).float().expand(-1, -1, width)


def test_clip_states_before_the_last_layer_are_concatenated() -> None:
    states, whole = clip_texts(PARTS, ("text_encoder", "text_encoder_2"), [IDS, IDS + 1, MORE])
    wanted = torch.cat([before_last(IDS, 0, 2), before_last(IDS + 1, 100, 3)], -1)
    assert torch.equal(states, wanted)
    assert [w.tolist() for w in whole] == [
        [[1.5] * 2, [4.5] * 2], [[102.5] * 3, [105.5] * 3],
    ]  # fmt: skip


def test_texts_of_each_kind() -> None:
    states, whole = family("sd").texts({"text_encoder": Encoder(6, 0.0)}, [IDS])
    assert whole is None
    assert torch.equal(states, (IDS[..., None] + 40).float().expand(-1, -1, 6))

    states, whole = family("xl").texts(PARTS, [IDS, IDS])
    assert states.shape == (2, 3, 5)
    assert whole is not None
    assert whole.tolist() == [[101.5] * 3, [104.5] * 3]  # of the second

    states, whole = family("sd3").texts(PARTS, [IDS, IDS, MORE])
    assert whole is not None
    assert whole.tolist() == [[1.5] * 2 + [101.5] * 3, [4.5] * 2 + [104.5] * 3]
    assert states.shape == (2, 5, 12)
    assert bool((states[:, :3, 5:] == 0).all())
    assert torch.equal(states[:, :3, :2], before_last(IDS, 0, 2))
    assert torch.equal(states[:, 3:], (MORE[..., None] + 240).float().expand(-1, -1, 12))
    without = {name: part for name, part in PARTS.items() if name != "text_encoder_3"}
    states, _ = family("sd3").texts(without, [IDS, IDS])
    assert states.shape == (2, 3, 5)

    parts = {"text_encoder": Encoder(5, 0.0), "text_encoder_2": Encoder(12, 50.0)}
    states, whole = family("flux").texts(parts, [IDS, MORE])
    assert torch.equal(states, (MORE[..., None] + 90).float().expand(-1, -1, 12))
    assert whole is not None
    assert whole.tolist() == [[1.5] * 5, [4.5] * 5]


# --------------------------------------------------------------------------------------- denoiser


class Denoiser(nn.Module):
    """Records its inputs, and returns the first one plus one."""

    def forward(self, *given: Any, **named: Any) -> tuple[Tensor]:
        self.given, self.named = given, named
        assert named["return_dict"] is False
        first = given[0] if given else named["hidden_states"]
        return (first + 1,)


NOISY = torch.arange(2 * 4 * 4 * 6.0).reshape(2, 4, 4, 6)
TIMES = torch.tensor([250.0, 1000.0])


def test_inputs_of_a_u_net_and_of_xl() -> None:
    texts, sizes = [torch.ones(2, 3, 6), torch.zeros(2, 5)], torch.ones(2, 6)
    unet = Denoiser()
    found = family("sd").denoised(unet, NOISY, TIMES, Conditions(texts[:1]))
    assert torch.equal(found, NOISY + 1)
    assert unet.given[0] is NOISY
    assert unet.given[1] is TIMES
    assert unet.named == {"encoder_hidden_states": texts[0], "return_dict": False}
    family("xl").denoised(unet, NOISY, TIMES, Conditions(texts, sizes))
    assert unet.named["added_cond_kwargs"] == {"text_embeds": texts[1], "time_ids": sizes}


def test_stable_diffusion_3_without_t5_gets_zeros() -> None:
    whole, transformer = torch.zeros(2, 5), Denoiser()
    states = torch.ones(2, 3, 12)
    found = family("sd3").denoised(transformer, NOISY, TIMES, Conditions([states, whole]))
    assert torch.equal(found, NOISY + 1)
    assert transformer.named["encoder_hidden_states"] is states
    assert transformer.named["pooled_projections"] is whole
    assert transformer.named["timestep"] is TIMES
    without = StableDiffusion3(["text_encoder", "text_encoder_2"], family("sd3").configs)
    without.denoised(transformer, NOISY, TIMES, Conditions([torch.ones(2, 3, 5), whole]))
    read = transformer.named["encoder_hidden_states"]
    assert read.shape == (2, 3 + 256, 12)
    assert float(read.sum()) == 2 * 3 * 5
    assert bool((read[:, :3, :5] == 1).all())


@pytest.mark.parametrize("reads", [True, False])
def test_flux_gets_patches_with_positions_and_guidance(reads: bool) -> None:
    found = family("flux", transformer={"guidance_embeds": reads})
    transformer, states, whole = Denoiser(), torch.ones(2, 7, 12), torch.zeros(2, 5)
    given = Conditions([states, whole], guidance=3.5)
    assert torch.equal(found.denoised(transformer, NOISY, TIMES, given), NOISY + 1)
    named = transformer.named
    assert torch.equal(named["timestep"], TIMES / 1000)
    if reads:
        assert named["guidance"].tolist() == [3.5, 3.5]
    else:
        assert named["guidance"] is None
    assert named["pooled_projections"] is whole
    assert named["encoder_hidden_states"] is states
    assert named["txt_ids"].tolist() == [[0, 0, 0]] * 7
    assert named["img_ids"].tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert torch.equal(named["hidden_states"], patches_of(NOISY))


def test_a_patch_is_two_by_two_latents_of_each_channel() -> None:
    patches = patches_of(NOISY)
    assert patches.shape == (2, 6, 16)
    for row in range(2):
        for column in range(3):
            square = NOISY[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[:, 3 * row + column], square.flatten(1))
    assert torch.equal(latents_of(patches, 2, 3), NOISY)
    square = torch.arange(2 * 4 * 6 * 6.0).reshape(2, 4, 6, 6)
    assert torch.equal(family("flux").unpack_latents(patches_of(square), 48), square)
    assert family("sd3").unpack_latents(square, 48) is square
