"""Adapters on single parameters, such as tensors of experts, compared with PEFT and plain torch."""

from __future__ import annotations

import copy
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_experts
import torch
from closeness import assert_close, assert_different
from safetensors.torch import load_file, save_file
from tiny_experts import EXPERTS, ids, outputs
from torch import Tensor, nn

from lora_cli.adapters.attach import (
    attach,
    disabled,
    lora_layers,
    remove_layers,
    trainable_parameters,
)
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.lora_parameter import LoRAParameter, is_transposed, misfit
from lora_cli.adapters.make_trainable import completed_section
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.parameter_targets import frozen_experts_note
from lora_cli.adapters.peft_format.adapter_folder import (
    adapter_config,
    differences_in_peft,
    read_adapter,
    save_adapter,
)
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.errors import LoraError
from lora_cli.recipe import AdapterSpec, load_recipe

KINDS = list(tiny_experts.CONFIGS)
ADAPTER = {
    "rank": 3, "alpha": 5.0, "target_modules": ["o_proj"], "target_parameters": EXPERTS,
    "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 7.0},
}  # fmt: skip


def recipe(**adapter: Any) -> Any:
    return tiny.recipe_of("causal_lm", **{**ADAPTER, **adapter})


def adapted(base: nn.Module, **adapter: Any) -> nn.Module:
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    attach(model, recipe(**adapter))
    return model


def saved(model: nn.Module, folder: Path, **adapter: Any) -> Path:
    folder.mkdir()
    save_adapter(folder, model, recipe(**adapter), [])
    return folder


def in_peft(base: nn.Module, folder: Path, trainable: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(
            copy.deepcopy(base), str(folder), is_trainable=trainable
        )


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    model = copy.deepcopy(base)
    load_adapter(model, read_adapter(folder), [])
    return model.eval()


# ----------------------------------------------------------------------------------- as in PEFT


def proves(*what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what,
        variant="lora",
        layer=lambda kind, **_: "transposed experts" if kind == "gpt_oss" else "experts",
        against="PEFT",
    )


@proves("write", "merge")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_experts_is_the_one_of_peft(kind: str, tmp_path: Path) -> None:
    base = tiny_experts.model(kind)
    before = outputs(base)
    model = adapted(base)
    assert torch.equal(outputs(model), before)  # B is zero
    tiny.wake(model)
    found = outputs(model)
    assert_different(found, before)
    with disabled(model):
        assert torch.equal(outputs(model), before)

    folder = saved(model, tmp_path / "ours")
    assert not differences_in_peft(base, recipe(), [], folder)
    assert_close(outputs(in_peft(base, folder).eval()), found, 1e-5)
    assert torch.equal(outputs(loaded(base, folder)), found)

    merged = loaded(base, folder)
    expected = expected_weights(
        base, read_adapter(folder).tensors, adapter_config(model, recipe(), [])
    )
    assert not merge(merged)
    assert expected.disagreement(merged) is None
    assert_close(outputs(merged), found, 1e-5)
    assert set(merged.state_dict()) == set(base.state_dict())
    remove_layers(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.slow_after(4)
@proves("read")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [EXPERTS, ["down_proj", "mlp.gate.weight"]])
def test_what_peft_saved_is_read(kind: str, entries: list[str], tmp_path: Path) -> None:
    base = tiny_experts.model(kind)
    if kind == "gpt_oss":
        entries = [entry.replace("gate.weight", "router.weight") for entry in entries]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=entries,
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        theirs.save_pretrained(tmp_path)
    assert_different(outputs(theirs), outputs(base))
    assert_close(outputs(loaded(base, tmp_path)), outputs(theirs), 1e-5)


@proves("train")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.slow_after(1)
def test_gradients_and_twenty_steps_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = tiny_experts.model(kind)
    base.set_experts_implementation("eager")  # grouped products do not support float64
    ours = adapted(base)
    theirs = in_peft(base, saved(ours, tmp_path / "start"), trainable=True).double()
    ours.double()

    def losses(model: nn.Module) -> tuple[list[float], list[Tensor]]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.5)
        found, first = [], []
        for step in range(20):
            tokens = ids(2).roll(step, 0)
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if step == 1:  # B is no longer zero, so that A has a gradient too
                first = [p.grad.flatten() for p in parameters if p.grad is not None]
                assert len(first) == len(parameters)
            found.append(float(loss.detach()))
            optimizer.step()
        return found, first

    (mine, my_gradients), (peft_losses, peft_gradients) = losses(ours), losses(theirs)
    assert mine[-1] < 0.9 * mine[0]
    assert mine == pytest.approx(peft_losses, rel=1e-9)
    # the layout of A and B differs, but the values are the same
    norms = [sorted(float(g.norm()) for g in many) for many in (my_gradients, peft_gradients)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-8)


def test_the_layer_is_never_chosen_for_a_whole_module() -> None:
    modules = list(tiny_experts.model("mixtral").modules())
    assert not any(LoRAParameter.fits(module) for module in modules)


def test_experts_are_transposed_only_if_their_module_says_so() -> None:
    plain, other = nn.Module(), nn.Module()
    other.is_transposed = True
    found = [is_transposed(owner, ndim) for owner in (plain, other) for ndim in (2, 3)]
    assert found == [False, False, False, True]


def test_only_the_update_is_trained_and_initialised_as_in_peft() -> None:
    model = adapted(tiny_experts.model("mixtral"), target_modules=[])
    assert {name.rpartition(".")[2] for name in trainable_parameters(model)} == {"lora_A", "lora_B"}
    layers = lora_layers(model)
    assert [layer.parameter for layer in layers.values()] == ["down_proj", "gate_up_proj"] * 2
    for layer in layers.values():
        bound = layer.lora_A.shape[-1] ** -0.5  # the bound of kaiming-uniform with a = sqrt(5)
        assert not layer.lora_B.any()
        assert bound / 2 < float(layer.lora_A.detach().abs().max()) <= bound


def test_experts_in_16_bits_are_close_to_those_in_32() -> None:
    base = tiny_experts.model("qwen3_moe").bfloat16()
    model = adapted(base, target_modules=[])
    tiny.wake(model)
    merge(merged := copy.deepcopy(model).float())
    experts = "model.layers.0.mlp.experts"  # alone: rounding may choose another expert
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 16, generator=generator).bfloat16()
    chosen, share = torch.tensor([[0, 2], [3, 1], [2, 2], [1, 0], [0, 3]]), torch.full((5, 2), 0.5)
    with torch.no_grad():
        found = model.get_submodule(experts)(x, chosen, share.bfloat16())
        wanted = merged.get_submodule(experts)(x.float(), chosen, share)
        plain = base.get_submodule(experts)(x, chosen, share.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), wanted, 3e-2)
    assert_different(found.float(), plain.float(), 0.1)


# ------------------------------------------------------------------------------- which parameters


def targets(base: nn.Module, **adapter: Any) -> list[str]:
    model = adapted(base, **{"rank_pattern": {}, "alpha_pattern": {}, **adapter})
    return [
        f"{name}.{layer.parameter}" if hasattr(layer, "parameter") else name
        for name, layer in lora_layers(model).items()
    ]


def test_layers_and_exclusions_limit_parameters_too(tmp_path: Path) -> None:
    base = tiny_experts.model("mixtral")
    found = targets(base, target_modules=[], layers=[1], target_parameters=["down_proj"])
    assert found == ["model.layers.1.mlp.experts.down_proj"]
    one = {"target_modules": [], "layers": [1]}
    model = adapted(base, **one)
    tiny.wake(model)
    folder = saved(model, tmp_path / "one", **one)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = [f"model.layers.1.mlp.experts.{key}" for key in ("down_proj", "gate_up_proj")]
    assert config["target_parameters"] == names  # the suffixes would match layer 0 too
    assert_close(outputs(in_peft(base, folder).eval()), outputs(model), 1e-5)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("mixtral", {"target_parameters": ["experts.up"]}, "`experts.up` matches no parameter"),
        ("llama", {"target_parameters": EXPERTS}, "the model has no experts"),
        ("mixtral", {"target_parameters": ["norm.weight"]}, "which has 1 dimension"),
        ("mixtral", {"target_parameters": ["o_proj.weight"]}, "`target_modules` adapts"),
        ("mixtral", {"train_modules": ["mlp.experts"]}, "is trained in full"),
        ("mixtral", {"target_parameters": [EXPERTS[0], EXPERTS[0]]}, "is written twice"),
        ("mixtral", {"rank_pattern": {"gate_upproj": 2}}, "matches no adapted module"),
    ],
)
def test_a_wrong_parameter_is_an_error(kind: str, adapter: dict[str, Any], message: str) -> None:
    base = tiny.llama() if kind == "llama" else tiny_experts.model(kind)
    with pytest.raises(LoraError) as caught:
        adapted(base, **adapter)
    assert message in " ".join(f"{p.what} {p.hint}" for p in caught.value.problems)


def test_dropout_and_dora_are_rejected_in_the_recipe() -> None:
    for other in ({"dropout": 0.1}, {"type": "dora"}):
        with pytest.raises(ValueError, match=r"target_parameters|dropout"):
            recipe(**other)


def test_experts_that_stay_frozen_are_named() -> None:
    base = tiny_experts.model("qwen3_moe")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    note = frozen_experts_note(base, tiny.recipe_of("causal_lm"))
    assert note is not None
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in note
    assert frozen_experts_note(base, tiny.recipe_of("causal_lm", target_modules=["q_proj"])) is None
    assert frozen_experts_note(base, recipe()) is None
    assert frozen_experts_note(tiny.llama(), tiny.recipe_of("causal_lm")) is None


@pytest.mark.parametrize(
    "more", [{}, {"dropout": 0.05}, {"init": "pissa"}, {"init": "eva", "dropout": 0.1}]
)
def test_what_the_note_on_experts_says_to_set_is_accepted(
    more: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_experts.model("qwen3_moe").requires_grad_(False)
    path = tiny.recipe(tmp_path / "base", tmp_path, task={"type": "causal_lm"}, adapter=more)
    note = frozen_experts_note(base, load_recipe(path))
    assert note is not None
    overrides = shlex.split(note.split("`")[-2])[1::2]
    assert load_recipe(path, overrides).adapter.target_parameters == EXPERTS


# ---------------------------------------------------------------------------- of transformers 4


def old_adapter(kind: str, folder: Path, base: nn.Module, **changes: Any) -> dict[str, Tensor]:
    """Write an adapter with layers for each expert; return the resulting weights."""
    layers = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3,
        "target_modules": ["o_proj", "gate", *layers], "bias": "none", **changes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tensors, weights = {}, {n: p.detach().clone() for n, p in base.named_parameters()}

    def update(name: str, n_out: int, n_in: int) -> Tensor:
        a = torch.randn(2, n_in, generator=generator) / 3
        b = torch.randn(n_out, 2, generator=generator) / 3
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        return 1.5 * b @ a

    for i in range(2):
        top = f"model.layers.{i}"
        for name in (f"{top}.self_attn.o_proj", f"{top}.mlp.gate"):
            weight = weights[f"{name}.weight"]
            weight += update(name.replace("mlp.gate", f"{block}.gate"), *weight.shape)
        for e in range(4):
            for layer, (key, first) in zip(
                layers, [("gate_up_proj", 0), ("gate_up_proj", 24), ("down_proj", 0)], strict=True
            ):
                weight = weights[f"{top}.mlp.experts.{key}"][e]
                part = weight[first : first + 24] if key == "gate_up_proj" else weight
                part += update(f"{top}.{block}.experts.{e}.{layer}", *part.shape)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_transformers_4_are_read(kind: str, tmp_path: Path) -> None:
    base = tiny_experts.model(kind)
    weights = old_adapter(kind, tmp_path / "old", base)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(weights, strict=False)
    model = loaded(base, tmp_path / "old")
    assert_close(outputs(model), outputs(wanted), 1e-5)

    # trained further and saved, it has the current format
    start = with_current_names(read_adapter(tmp_path / "old"), base)
    bare = tiny.recipe_of("causal_lm").with_values({"adapter": AdapterSpec()})
    spec = completed_section(base, bare, [], start)
    assert spec.target_parameters
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in lora_layers(model).values():
        for own in (layer.lora_A, layer.lora_B):
            own.requires_grad_(True)
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(again, model, tiny.recipe_of("causal_lm").with_values({"adapter": spec}), [])
    assert_close(outputs(in_peft(base, again).eval()), outputs(wanted), 1e-5)
    merge(model)
    for name, parameter in model.named_parameters():
        assert_close(parameter, weights[name], 1e-5)


def drop(folder: Path, end: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if end not in n}, file)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("w3", "these are one tensor by now"),
        ("experts.2.w1", "has 4 experts, and the adapter is not for `w1` of each"),
    ],
)
def test_old_experts_with_missing_layers_are_rejected(
    end: str, message: str, tmp_path: Path
) -> None:
    base = tiny_experts.model("mixtral")
    old_adapter("mixtral", tmp_path / "old", base)
    drop(tmp_path / "old", end)
    with pytest.raises(LoraError, match=message):
        loaded(base, tmp_path / "old")


def test_old_experts_with_different_scales_are_rejected(tmp_path: Path) -> None:
    base = tiny_experts.model("mixtral")
    old_adapter("mixtral", tmp_path / "old", base, alpha_pattern={"experts.1.w1": 9})
    with pytest.raises(LoraError, match="several scales"):
        loaded(base, tmp_path / "old")


def test_missing_and_misshapen_tensors_are_reported(tmp_path: Path) -> None:
    base = tiny_experts.model("mixtral")
    model = adapted(base)
    folder = saved(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"]["gate_up_proj"] = 5
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match=r"lora_A of `.*gate_up_proj` is \(12, 16\)"):
        loaded(base, folder)
    folder = saved(model, tmp_path / "b")
    drop(folder, "layers.1.mlp.experts.base_layer")
    with pytest.raises(LoraError, match=r"`model.layers.1.mlp.experts.gate_up_proj` is missing"):
        loaded(base, folder)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 3), None),
        ((2, 4, 3), None),
        ((4,), "has 1 dimension, and only parameters of 2 or 3 can be adapted"),
        ((2, 2, 4, 3), "has 4 dimensions, and only parameters of 2 or 3 can be adapted"),
    ],
)
def test_a_parameter_that_is_adapted_is_a_matrix_or_one_of_each_expert(
    shape: tuple[int, ...], said: str | None
) -> None:
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.ones(shape))
    assert misfit(owner, "weight") == said
    if said is None:
        owner.weight = nn.Parameter(torch.ones(shape, dtype=torch.int8), requires_grad=False)
        assert misfit(owner, "weight") == "does not hold floating-point numbers"
