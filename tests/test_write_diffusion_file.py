"""The contents of adapter files for diffusers and kohya's scripts, entry by entry."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.adapters.peft_format.write_diffusion_file import (
    Update,
    _save,
    _with_out_proj,
    obstacles,
    save_for_diffusers,
    save_for_kohya,
    updates_of,
    write_diffusers_file,
)

UNET, TEXT = "unet.a.to_q", "text_encoder.encoder.layers.0.self_attn.q_proj"
RANKS = {UNET: 4, TEXT: 2}


def adapter(kind: str = "lora", ranks: dict[str, int] | None = None, **config: Any) -> Any:
    """Return an adapter of two parts with matrices drawn at random, of 5 inputs and 3 outputs."""
    tensors: dict[str, Tensor] = {}
    for name, rank in (ranks or RANKS).items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 5)
        tensors[f"{name}.lora_B.weight"] = torch.randn(3, rank)
        if kind == "dora":
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(3)
    parts = tuple(dict.fromkeys(name.partition(".")[0] for name in ranks or RANKS))
    values = {"peft_type": "LORA", "lora_alpha": 6, **config}
    return SimpleNamespace(type=kind, parts=parts, tensors=tensors, config=values)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize(("use_rslora", "scales"), [(False, (1.5, 3.0)), (True, (3.0, 18**0.5))])
def test_the_scale_of_an_update_is_folded_into_b(
    use_rslora: bool, scales: tuple[float, float]
) -> None:
    saved = adapter(use_rslora=use_rslora)
    for update, name, scale in zip(updates_of(saved), RANKS, scales, strict=True):
        assert f"{update.part}.{update.name}" == name
        assert update.rank == RANKS[name]
        assert update.magnitude is None
        assert torch.equal(update.a, saved.tensors[f"{name}.lora_A.weight"])
        assert_close(update.b, scale * saved.tensors[f"{name}.lora_B.weight"], 1e-6)


@pytest.mark.parametrize(
    ("part", "name", "old"),
    [
        ("text_encoder", "encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "final_layer_norm", "text_model.final_layer_norm"),
        ("text_encoder", "text_model.final_layer_norm", "text_model.final_layer_norm"),
        ("text_encoder_2", "text_projection", "text_projection"),
        ("unet", "embeddings.a", "embeddings.a"),
    ],
)  # fmt: skip
def test_names_of_clip_contain_text_model(part: str, name: str, old: str) -> None:
    assert Update(part, name, torch.ones(1), torch.ones(1), None).old_name == old


def test_reasons_why_no_file_can_be_written() -> None:
    saved = adapter()
    assert obstacles(saved) == []
    saved.parts = ()
    assert obstacles(saved) == ["the base is one model, and not the parts of a diffusion model"]
    saved.parts = ("unet", "vae", "safety_checker")
    assert obstacles(saved) == ["it adapts `vae`, and such a file has no name for it"]
    assert obstacles(adapter("dora")) == []
    assert obstacles(adapter("dora"), ("lora",)) == ["it is of type `dora`"]
    for key in ("target_parameters", "trainable_token_indices"):
        assert obstacles(adapter(**{key: ["x"]})) == [f"it has `{key}`"]
        assert obstacles(adapter(**{key: None})) == []
    saved = adapter()
    saved.tensors |= {"unet.z.weight": torch.ones(1), "unet.b.weight": torch.ones(1)}
    assert obstacles(saved) == ["it has trained `unet.b.weight` in full"]
    saved = adapter()
    for side in "AB":
        for name in ("text_encoder.embed", "text_encoder.other"):
            saved.tensors[f"{name}.lora_embedding_{side}"] = torch.ones(2, 2)
    assert obstacles(saved) == ["it adapts the embedding `text_encoder.embed`"]


def test_diffusers_file_has_its_names_and_a_configuration_of_scale_one(tmp_path: Path) -> None:
    ranks = {**RANKS, "unet.b.to_q": 4, "unet.c.to_q": 3}
    saved = adapter("dora", ranks)
    save_for_diffusers(saved, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    text = f"text_encoder.text_model.{TEXT.removeprefix('text_encoder.')}"
    of_unet = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    of_text = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight",
               "lora_magnitude_vector.weight")  # fmt: skip
    names = {f"{name}.{end}" for name in ranks if name != TEXT for end in of_unet}
    tensors = load_file(file)
    assert tensors.keys() == names | {f"{text}.{end}" for end in of_text}
    assert torch.equal(tensors[f"{text}.{of_text[0]}"], saved.tensors[f"{TEXT}.lora_A.weight"])
    assert torch.equal(tensors[f"{UNET}.{of_unet[2]}"], saved.tensors[f"{UNET}.{of_unet[2]}"])
    assert_close(tensors[f"{text}.{of_text[1]}"], 3 * saved.tensors[f"{TEXT}.lora_B.weight"], 1e-6)

    common = {"lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": True,
              "init_lora_weights": True}  # fmt: skip
    text_config = {"r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {},
                   "target_modules": [TEXT.removeprefix("text_encoder.")]}  # fmt: skip
    other = {r"c\.to_q": 3}
    unet_config = {"r": 4, "lora_alpha": 4, "rank_pattern": other, "alpha_pattern": other,
                   "target_modules": ["a.to_q", "b.to_q", "c.to_q"]}  # fmt: skip
    assert json.loads(header(file)["lora_adapter_metadata"]) == {
        f"{part}.{key}": value
        for part, config in (("unet", unet_config), ("text_encoder", text_config))
        for key, value in {**common, **config}.items()
    }


@pytest.mark.parametrize("two", [True, False])
def test_kohyas_file_has_one_alpha_and_the_same_update(two: bool, tmp_path: Path) -> None:
    second = "text_encoder_2.encoder.layers.0.self_attn.out_proj"
    first = TEXT.replace("q_proj", "out_proj")
    ranks = {UNET: 4, first: 2} | ({second: 3} if two else {})
    saved = adapter(ranks=ranks)
    save_for_kohya(saved, tmp_path / "lora.safetensors", two)
    tensors = load_file(tmp_path / "lora.safetensors")
    end = "text_model_encoder_layers_0_self_attn_out_proj"
    starts = [(UNET, "lora_unet_a_to_q"), (first, f"lora_te1_{end}" if two else f"lora_te_{end}")]
    if two:
        starts.append((second, f"lora_te2_{end}"))
    assert len(tensors) == 3 * len(starts)
    for name, start in starts:
        down, up, alpha = (
            tensors[f"{start}.{key}"] for key in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        assert float(alpha) == 4.0
        a, b = (saved.tensors[f"{name}.lora_{side}.weight"] for side in "AB")
        assert_close(float(alpha) / len(down) * up @ down, 6 / ranks[name] * b @ a, 1e-5)
    found = header(tmp_path / "lora.safetensors")
    assert found.pop("format") == "pt"
    assert found == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "4",
    }
    save_for_kohya(adapter(ranks={UNET: 4}), tmp_path / "one.safetensors", two)
    assert header(tmp_path / "one.safetensors")["ss_network_dim"] == "4"


def test_a_text_encoder_without_out_proj_gets_a_zero_update() -> None:
    def update(part: str, name: str) -> Update:
        return Update(part, name, torch.ones(2, 5), torch.ones(3, 2), None)

    attention = "encoder.layers.1.self_attn"
    query, unet = update("text_encoder", f"{attention}.q_proj"), update("unet", "a.self_attn.to_q")
    *given, added = _with_out_proj([unet, query])
    assert given == [unet, query]
    assert (added.part, added.name) == ("text_encoder", f"{attention}.out_proj")
    assert (added.a.shape, added.b.shape) == (query.a.shape, query.b.shape)
    assert not added.a.any()
    assert not added.b.any()
    with_it = [query, update("text_encoder", f"{attention}.out_proj")]
    assert _with_out_proj(with_it) == with_it
    others = [unet, update("text_encoder", "encoder.layers.1.mlp.fc1")]
    assert _with_out_proj(others) == others  # no attention is adapted
    second = update("text_encoder_2", f"{attention}.q_proj")
    added_parts = [one.part for one in _with_out_proj([*with_it, second])[3:]]
    assert added_parts == ["text_encoder_2"]  # each encoder has its own


@pytest.mark.parametrize("length", range(8))
def test_equal_adapters_give_equal_bytes_aligned_to_eight(length: int, tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(1)}
    metadata = {"z": "x" * length, "b": "1", "a": "2"}
    for name, given in (("one", metadata), ("two", dict(reversed(metadata.items())))):
        _save(tensors, tmp_path / name, given)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0  # so that tensors begin where a number may
    assert list(json.loads(content[8 : 8 + size])["__metadata__"]) == ["a", "b", "format", "z"]
    assert b": " not in content[8 : 8 + size]  # as safetensors itself writes it
    assert header(tmp_path / "one") == {"format": "pt", **metadata}
    for name, found in load_file(tmp_path / "one").items():
        assert torch.equal(found, tensors[name])


def test_a_folder_without_parts_gets_no_file_for_diffusers(tmp_path: Path) -> None:
    assert write_diffusers_file(tmp_path) == "there is no adapter of several parts"
    assert list(tmp_path.iterdir()) == []
