"""Adapters of several parts: one PEFT folder for each, written for and read from PEFT."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_different
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.find_adapter import find_adapter_folder
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format import part_folders
from lora_cli.adapters.peft_format.adapter_folder import (
    differences_in_peft,
    ranks_of,
    read_adapter,
    read_tensors,
    save_adapter,
)
from lora_cli.adapters.peft_format.part_folders import join_parts, most_common, split_by_part
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export.low_rank_pairs import parts_of
from lora_cli.files import READY, publish, verify_manifest, write_manifest
from lora_cli.models.bundle import Bundle
from lora_cli.recipe import Recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v, self.norm = nn.Linear(6, 8), nn.Linear(6, 8), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + torch.tanh(self.to_q(x) * self.to_v(x))[..., :6]


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(9, 6), Block(), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(2, 6, 3), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PARTS = {"unet": UNet, "text_encoder": TextEncoder}
OURS = ("HEAD_ONLY", "BITFIT")  # PEFT has no such types
INPUTS = {
    "unet": torch.linspace(-2, 2, 72).reshape(1, 2, 6, 6),
    "text_encoder": torch.arange(8).reshape(2, 4),
}


def bundle(frozen: tuple[str, ...] = ()) -> Bundle:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Bundle({name: kind() for name, kind in PARTS.items()}, frozen)


def outputs(model: Bundle) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: part.eval()(INPUTS[name]) for name, part in model.parts.items()}


def recipe_of(**adapter: Any) -> Recipe:
    values = {"model": {"name": "base"}, "task": {"type": "sequence_classification"}}
    own = {"rank": 3, "alpha": 5, **adapter}
    return Recipe.model_validate({**values, "data": {"path": "none.csv"}, "adapter": own})


def trained(recipe: Recipe, frozen: tuple[str, ...] = ()) -> tuple[Bundle, list[str]]:
    """Return a bundle with a random adapter, and its modules trained in full."""
    model = bundle(frozen)
    attach(model, recipe, [])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.4 * torch.randn(parameter.shape))
    return model, [*recipe.adapter.train_modules]


def loaded(folder: Path) -> Bundle:
    model = bundle()
    load_adapter(model, read_adapter(folder), [])
    return model


def in_peft(folder: Path) -> dict[str, Tensor]:
    """Return PEFT's outputs with the parts that have a folder."""
    found = {}
    for name, part in bundle().parts.items():
        file = folder / name / "adapter_config.json"
        if file.is_file() and json.loads(file.read_text())["peft_type"] not in OURS:
            adapted = PeftModel.from_pretrained(part, str(folder / name)).eval()
            with torch.no_grad():
                found[name] = adapted(INPUTS[name])
    return found


BOTH_PARTS = {
    "ends of names": {"target_modules": ["to_q", "to_v"]},
    "a name of one part": {"target_modules": ["to_q", "unet.blocks.1.to_v", "unet.conv"]},
    "an expression": {"target_modules": r"unet\.blocks.*|text_encoder\.embed"},
    "patterns": {
        "target_modules": ["to_q", "to_v"],
        "rank_pattern": {"unet.blocks.0.to_q": 2, "to_v": 4},
        "alpha_pattern": {r"text_encoder\..*": 7.0},
        "use_rslora": True,
    },
    "biases": {"target_modules": ["to_q"], "bias": "all"},
    "modules in full": {"target_modules": ["to_q"], "train_modules": ["unet.head", "embed"]},
    "one part in full": {"target_modules": ["unet.blocks.0.to_q"], "train_modules": ["embed"]},
    "dora": {"type": "dora", "target_modules": ["to_q", "embed", "conv"]},
    "loha": {"type": "loha", "target_modules": ["to_q", "conv"]},
    "lokr": {"type": "lokr", "target_modules": ["to_q", "to_v"], "rank_pattern": {"unet.*": 2}},
    "no layers": {"type": "bitfit"},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", BOTH_PARTS)
def test_each_part_is_an_adapter_of_peft(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(**BOTH_PARTS[name])
    model, in_full = trained(recipe)
    save_adapter(tmp_path, model, recipe, in_full)
    write_manifest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "text_encoder", "unet"]
    wanted, again = outputs(model), outputs(loaded(tmp_path))
    base = outputs(bundle())
    for part in PARTS:
        assert_different(wanted[part], base[part])
        assert torch.equal(again[part], wanted[part])
    for part, found in in_peft(tmp_path).items():
        assert_close(found, wanted[part], 1e-5)
    assert differences_in_peft(model, recipe, in_full, tmp_path) == []
    assert differences_in_peft(model, recipe, in_full) == []

    saved = read_adapter(tmp_path)
    assert saved.verified
    assert saved.parts == ("text_encoder", "unet")
    assert saved.tensors.keys() == read_tensors(tmp_path).keys()
    merged = loaded(tmp_path)
    expected = expected_weights(bundle(), saved.tensors, saved.config)
    merge(merged)
    assert expected.disagreement(merged) is None


def test_a_part_without_trained_parameters_has_no_folder(tmp_path: Path) -> None:
    recipe = recipe_of(target_modules=["to_q"])
    model, _ = trained(recipe, frozen=("text_encoder",))
    save_adapter(tmp_path, model, recipe, [])
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
    config = json.loads((tmp_path / "unet/adapter_config.json").read_text())
    assert config["target_modules"] == ["to_q"]  # though the frozen part has such modules too
    assert_close(in_peft(tmp_path)["unet"], outputs(model)["unet"], 1e-5)
    assert set(ranks_of(tmp_path)) == {"unet.blocks.0.to_q", "unet.blocks.1.to_q"}


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other ranks": ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3}),
    "one with rsLoRA": ({"r": 4, "use_rslora": True}, {"r": 3}),
    "patterns": ({"rank_pattern": {"0.to_q": 2}, "alpha_pattern": {"1.to_q": 3}}, {"r": 5}),
    "an expression": ({"target_modules": r".*\.1\.to_[qv]"}, {"bias": "lora_only"}),
    "some layers": ({"layers_to_transform": [1], "layers_pattern": "blocks"}, {"r": 2}),
    "modules in full": ({"modules_to_save": ["conv"]}, {"target_modules": ["embed"]}),
    "all linear layers": ({"target_modules": "all-linear"}, {"exclude_modules": ["head"]}),
    "rows of tokens": ({}, {"trainable_token_indices": {"embed": [1, 4]}}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", OTHERS)
def test_folders_that_peft_saved_are_read(name: str, tmp_path: Path) -> None:
    wanted = {}
    for (part, module), given in zip(bundle().parts.items(), OTHERS[name], strict=True):
        config = LoraConfig(**{"target_modules": ["to_q"], "init_lora_weights": False, **given})
        torch.manual_seed(2)
        model = get_peft_model(module, config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            wanted[part] = model(INPUTS[part])
        model.save_pretrained(tmp_path / part)
    assert find_adapter_folder(str(tmp_path), "--adapter") == tmp_path
    found = outputs(loaded(tmp_path))
    for part, output in wanted.items():
        assert_close(found[part], output, 1e-5)
    if "modules_to_save" not in OTHERS[name][0] and name not in ("an expression", "rows of tokens"):
        parts = parts_of(read_adapter(tmp_path))
        assert {n.partition(".")[0] for n in parts.pairs} == set(PARTS)

    # the folder of a single part is an adapter too
    shutil.rmtree(tmp_path / "text_encoder")
    assert find_adapter_folder(str(tmp_path), "--adapter") == tmp_path
    for folder in (tmp_path, tmp_path / "unet"):
        alone = outputs(loaded(folder))
        assert_close(alone["unet"], wanted["unet"], 1e-5)
        assert torch.equal(alone["text_encoder"], outputs(bundle())["text_encoder"])


def test_parts_of_different_kinds_are_rejected(tmp_path: Path) -> None:
    parts = bundle().parts
    for part, config in (("unet", LoHaConfig), ("text_encoder", LoraConfig)):
        get_peft_model(parts[part], config(target_modules=["to_q"])).save_pretrained(
            tmp_path / part
        )
    with pytest.raises(LoraError, match="`peft_type` is LORA in `text_encoder` and LOHA in `unet`"):
        read_adapter(tmp_path)


Part = tuple[dict[str, Any], dict[str, Tensor]]


def low_rank(*modules: str, **config: Any) -> Part:
    """Return a part's configuration, with LoRA tensors for some modules."""
    tensors = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for name in modules for side in "AB"}
    return {"peft_type": "LORA", "target_modules": ["to_q"], **config}, tensors


def test_the_folder_of_a_part_describes_only_its_own_parameters() -> None:
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8,
        "target_modules": ["to_q", "unet.conv"], "modules_to_save": ["unet.head"],
        "rank_pattern": {"unet.a.to_q": 2, "to_v": 3},  # nothing that is adapted is called `to_v`
        "trainable_token_indices": {"text_encoder.embed": [1, 4]},
    }  # fmt: skip
    names = ("unet.a.to_q.lora_A.weight", "unet.conv.lora_A.weight", "unet.head.weight",
             "text_encoder.b.to_q.lora_A.weight")  # fmt: skip
    found = split_by_part(
        config, dict.fromkeys(names, torch.ones(1)), ["unet", "text_encoder", "vae"]
    )
    assert {part: list(tensors) for part, (_, tensors) in found.items()} == {
        "unet": ["a.to_q.lora_A.weight", "conv.lora_A.weight", "head.weight"],
        "text_encoder": ["b.to_q.lora_A.weight"],
    }
    common = {"peft_type": "LORA", "task_type": None, "lora_alpha": 8}
    assert found["unet"][0] == {
        **common, "r": 2, "rank_pattern": {"conv": 4}, "target_modules": ["to_q", "conv"],
        "modules_to_save": ["head"], "trainable_token_indices": None,
    }  # fmt: skip
    assert found["text_encoder"][0] == {
        **common, "r": 4, "rank_pattern": {}, "target_modules": ["to_q"],
        "modules_to_save": None, "trainable_token_indices": {"embed": [1, 4]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("unet", "text", "use_rslora", "alphas"),
    [
        (False, False, None, (6, 6)),
        (None, None, None, (6, 6)),
        (True, True, True, (6, 6)),
        (True, False, False, (12, 6)),  # alpha / 2, the root of the rank, is 12 / 4
        (False, True, False, (6, 12)),
    ],
)
def test_each_part_keeps_its_scale_whether_or_not_it_has_rslora(
    unet: bool | None, text: bool | None, use_rslora: bool | None, alphas: tuple[float, float]
) -> None:
    parts = {
        name: low_rank("to_q", r=4, lora_alpha=6, use_rslora=own)
        for name, own in (("unet", unet), ("text_encoder", text))
    }
    config, _ = join_parts(parts, "folder")
    assert bool(config.get("use_rslora")) == bool(use_rslora)
    assert tuple(alpha_of(config, f"{name}.to_q") for name in parts) == alphas
    assert (config["r"], config["rank_pattern"]) == (4, {})


def test_layers_and_copies_of_a_part_get_full_names() -> None:
    own = {"layers_to_transform": [1], "layers_pattern": "blocks", "modules_to_save": ["out", "no"]}
    config, tensors = low_rank("to_q", **own)
    tensors["a.out.weight"] = torch.ones(1, 1)
    found, _ = join_parts({"unet": (config, tensors), "text_encoder": low_rank("to_q")}, "folder")
    assert not found.keys() & {"layers_to_transform", "layers_pattern"}  # the modules are named
    assert found["modules_to_save"] == ["unet.a.out", "unet.no"]  # the second is found missing


def test_exclusions_of_one_part_apply_only_to_it() -> None:
    without = join_parts({"unet": low_rank("to_q"), "text_encoder": low_rank("to_q")}, "folder")[0]
    assert without["exclude_modules"] is None
    parts = {"unet": low_rank("to_q"), "text_encoder": low_rank("to_q", exclude_modules=["head"])}
    expression = join_parts(parts, "folder")[0]["exclude_modules"]
    for name, is_left_out in (
        ("text_encoder.head", True), ("text_encoder.a.head", True), ("unet.head", False),
        ("text_encoder.overhead", False), ("text_encoder.head.a", False),
    ):  # fmt: skip
        assert bool(re.fullmatch(expression, name)) is is_left_out, name


def test_a_bias_setting_common_to_all_parts_is_kept() -> None:
    for unet, text, wanted in (
        ("all", "all", "all"), ("all", "none", "none"), (None, "none", "none"), (None, None, "none")
    ):  # fmt: skip
        parts = {"unet": low_rank("to_q", bias=unet), "text_encoder": low_rank("to_q", bias=text)}
        assert join_parts(parts, "folder")[0]["bias"] == wanted


@pytest.mark.parametrize("first", [True, False, None])
def test_dora_in_only_one_part_is_rejected(first: bool | None) -> None:
    def part(use_dora: bool | None) -> Part:  # older files have no such key
        return low_rank("to_q", **({} if use_dora is None else {"use_dora": use_dora}))

    with pytest.raises(LoraError, match=r"`use_dora` is .* in `unet` and .* in `text_encoder`"):
        join_parts({"unet": part(first), "text_encoder": part(not first)}, "folder")
    join_parts({"unet": part(first), "text_encoder": part(first or False)}, "folder")


def test_rows_of_tokens_and_single_parameters_get_full_names() -> None:
    unet, text = low_rank("to_q", target_parameters=["a.kernel"]), low_rank("to_q")
    text[0]["trainable_token_indices"] = [1, 4]
    text[1]["b.embed.token_adapter.trainable_tokens_delta"] = torch.ones(2, 1)
    found, tensors = join_parts({"unet": unet, "text_encoder": text}, "folder")
    assert found["trainable_token_indices"] == {"text_encoder.b.embed": [1, 4]}
    assert found["target_parameters"] == ["unet.a.kernel"]
    assert tensors.keys() == {f"unet.{n}" for n in unet[1]} | {f"text_encoder.{n}" for n in text[1]}
    text[0]["trainable_token_indices"] = {"embed": [3], "other": [2]}
    found, _ = join_parts({"unet": unet, "text_encoder": text}, "folder")
    assert found["trainable_token_indices"] == {
        "text_encoder.embed": [3], "text_encoder.other": [2],
    }  # fmt: skip
    found, _ = join_parts({"unet": low_rank("to_q"), "text_encoder": low_rank("to_q")}, "folder")
    assert found["target_parameters"] is None
    assert "trainable_token_indices" not in found


def test_a_configuration_without_a_rank_has_peft_s_default() -> None:
    parts = {"unet": low_rank("to_q", "to_v"), "text_encoder": low_rank("to_q", r=2, lora_alpha=3)}
    found, _ = join_parts(parts, "folder")
    assert (found["r"], found["rank_pattern"]) == (8, {r"text_encoder\.to_q": 2})
    assert (found["lora_alpha"], found["alpha_pattern"]) == (8, {r"text_encoder\.to_q": 3})


def test_a_part_of_a_configuration_without_a_rank_has_peft_s_default() -> None:
    config = {"peft_type": "LORA", "target_modules": ["to_q"],
              "rank_pattern": {"unet.a.to_q": 2}, "alpha_pattern": {"unet.a.to_q": 3}}  # fmt: skip
    names = [f"unet.{name}.to_q.lora_A.weight" for name in ("a", "b", "c")]
    ((found, _),) = split_by_part(config, dict.fromkeys(names, torch.ones(1)), ["unet"]).values()
    assert (found["r"], found["rank_pattern"]) == (8, {r"a\.to_q": 2})
    assert (found["lora_alpha"], found["alpha_pattern"]) == (8, {r"a\.to_q": 3})


@pytest.mark.parametrize("longest", [200, 30])
def test_modules_are_listed_if_an_expression_would_be_too_long(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_folders, "LONGEST", longest)
    parts = {"unet": low_rank("a.to_q", "b.to_q"), "text_encoder": low_rank("c.to_q")}
    targets = join_parts(parts, "folder")[0]["target_modules"]
    names = ["text_encoder.c.to_q", "unet.a.to_q", "unet.b.to_q"]
    if longest == 30:
        assert targets == names
    else:
        assert all(re.fullmatch(targets, name) for name in names)
    full = {part: low_rank("to_q") for part in parts}  # full names are no expression
    assert join_parts(full, "folder")[0]["target_modules"] == ["unet.to_q", "text_encoder.to_q"]


def test_the_outermost_matching_module_is_named() -> None:
    config, tensors = low_rank("to_q", modules_to_save=["ead", "head.proj", "deep"])
    for name in ("head.proj.weight", "head.bias", "a.b.deep.c.weight"):
        tensors[name] = torch.ones(1, 1)
    found, _ = join_parts({"unet": (config, tensors)}, "folder")
    assert found["modules_to_save"] == ["unet.a.b.deep", "unet.head"]


def test_the_most_common_rank_is_the_default_and_others_are_listed_longest_first() -> None:
    ranks = {"a": 4, "b": 2, "c.b": 8, "d": 4, "e": 4}  # an expression `b` would fit `c.b` too
    usual, others = most_common(ranks)
    assert usual == 4
    assert list(others.items()) == [(r"c\.b", 8), ("b", 2)]


def test_what_a_part_promises_must_be_there(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, module in bundle().parts.items():
        get_peft_model(module, LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / part)
    file = tmp_path / "unet/adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".1." not in n}, file)
    with pytest.raises(IntegrityError, match=r"`unet\.blocks\.1\.to_q` is missing"):
        loaded(tmp_path)


def test_folders_with_other_names_are_several_adapters(tmp_path: Path) -> None:
    model = get_peft_model(UNet(), LoraConfig(target_modules=["to_q"]))
    for name in ("first", "unet"):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(LoraError, match="holds 2 adapters: `first`, `unet`"):
        find_adapter_folder(str(tmp_path), "--adapter")


def test_damage_of_a_part_is_found(tmp_path: Path) -> None:
    recipe = recipe_of(target_modules=["to_q"])
    save_adapter(tmp_path, trained(recipe)[0], recipe, [])
    write_manifest(tmp_path)
    (tmp_path / "unet/adapter_config.json").rename(tmp_path / "kept")
    with pytest.raises(IntegrityError, match=r"`unet/adapter_config.json` is missing"):
        read_adapter(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "unet/adapter_config.json")
    file = tmp_path / "text_encoder/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("moved", range(4))
def test_all_parts_are_published_or_none(moved: int, tmp_path: Path) -> None:
    recipe, out = recipe_of(target_modules=["to_q"]), tmp_path / "out"
    out.mkdir()
    model, _ = trained(recipe)
    for staging in ("old", "new"):
        (tmp_path / staging).mkdir()
        save_adapter(tmp_path / staging, model, recipe, [])
        if staging == "old":
            publish(tmp_path / "old", out)
            with torch.no_grad():
                for parameter in trainable_parameters(model).values():
                    parameter.mul_(2)
    write_manifest(tmp_path / "new")
    # a process ended after it had moved some of them
    (tmp_path / "new").rename(out / READY)
    for name in ("text_encoder", "unet", "manifest.json")[:moved]:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / READY / name).replace(out / name)
    found = outputs(loaded(out))
    assert verify_manifest(out)
    for part, output in outputs(model).items():
        assert torch.equal(found[part], output)
