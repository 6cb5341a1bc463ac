"""Errors of adapters on single parameters: tensors of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny_experts
import torch
from cases import CASES, Case
from safetensors.torch import save_file
from torch import Tensor
from world import Printed, World

TASK = {"type": "causal_lm", "text_column": "text", "max_length": 32}


def _recipe(world: World, kind: str = "mixtral", **adapter: Any) -> str:
    tiny_experts.save(world.folder / "base", kind)
    parameters = {"target_modules": [], "target_parameters": tiny_experts.EXPERTS, "rank": 2}
    return world.recipe(model={"name": "./base"}, task=TASK, adapter={**parameters, **adapter})


def _validated(**adapter: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("validate", _recipe(world, **adapter))


for _name, _adapter in {
    "that the model does not have": {"target_parameters": ["experts.up"]},
    "of one dimension": {"target_parameters": ["norm.weight"]},
    "of an adapted module": {
        "target_modules": ["o_proj"], "target_parameters": ["o_proj.weight"]},
    "trained in full": {"train_modules": ["mlp.experts"]},
    "named twice": {"target_parameters": ["experts.down_proj", "experts.down_proj"]},
}.items():  # fmt: skip
    CASES.append(Case("Models", f"a parameter {_name}", _validated(**_adapter)))


def _saved(world: World, tensors: dict[str, Tensor], **config: Any) -> None:
    folder = world.folder / "saved"
    folder.mkdir()
    tensors = {f"base_model.model.model.layers.{n}.weight": t for n, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def _old(layer: str = "w2", experts: int = 4, ranks: tuple[int, ...] = (2,)) -> dict[str, Tensor]:
    """Return the tensors of an adapter with a layer for each expert, as of transformers 4."""
    tensors = {}
    for e in range(experts):
        rank = ranks[e % len(ranks)]
        name = f"0.mlp.experts.{e}.{layer}"
        tensors |= {f"{name}.lora_A": torch.ones(rank, 24), f"{name}.lora_B": torch.ones(16, rank)}
    return tensors


def _merged(
    tensors: dict[str, Tensor], kind: str = "mixtral", **config: Any
) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        recipe = _recipe(world, kind)
        _saved(world, tensors, **config)
        return world.lora("merge", "--recipe", recipe, "--adapter", "saved", "--to", "merged")

    return run


ROUTER = {"0.mlp.gate.lora_A": torch.ones(2, 16), "0.mlp.gate.lora_B": torch.ones(4, 2)}
NORM = {
    f"{i}.input_layernorm.lora_{side}": torch.ones(2, 2) for i in range(2) for side in "AB"
}  # fmt: skip
for _name, _case in {
    "half of what is one tensor by now": _merged(_old("w1")),
    "fewer experts than the model": _merged(_old(experts=3)),
    "experts of several ranks": _merged(_old(ranks=(2, 3))),
    "experts of several scales": _merged(_old(), alpha_pattern={"experts.1.w2": 9}),
    "experts that are stored otherwise": _merged(_old("down_proj"), "gpt_oss"),
    "a router of another rank": _merged(ROUTER, r=3),
    "a parameter of one dimension": _merged(NORM, target_parameters=["input_layernorm.weight"]),
}.items():
    CASES.append(Case("Adapters", f"of parameters: {_name}", _case))


def _experts(world: World) -> str:
    """Save an adapter on experts, and return a recipe."""
    recipe = _recipe(world)
    tensors = {}
    for i in range(2):
        tensors |= {f"{i}.mlp.experts.lora_A": torch.ones(8, 24) / 9}
        tensors |= {f"{i}.mlp.experts.lora_B": torch.ones(16, 8) / 9}
    _saved(world, tensors, target_parameters=["experts.down_proj"])
    return recipe


def _combine(world: World) -> Printed:
    _experts(world)
    return world.lora("combine", "saved", "saved", "--to", "both")


def _export(world: World) -> Printed:
    recipe = _experts(world)
    return world.lora(
        "export", "--adapter", "saved", "--recipe", recipe, "--for", "vllm", "--to", "to"
    )


def _dropout(world: World) -> Printed:
    _experts(world)
    recipe = world.recipe(
        model={"name": "./base"}, task=TASK, adapter={"from": "./saved", "dropout": 0.1}
    )
    return world.lora("validate", recipe)


for _name, _case in {"to combine": _combine, "for vLLM": _export, "with dropout": _dropout}.items():
    CASES.append(Case("Adapters", f"of parameters: {_name}", _case))


def _for_peft(world: World) -> Printed:
    adapter = {"target_modules": ["mlp.up_proj"], "target_parameters": []}
    recipe = _recipe(world, "deepseek_v3", **adapter)
    world.lora("train", recipe, "-o", "out")
    return world.lora("export", "--adapter", "out", "--for", "peft", "--to", "exported")


CASES.append(Case("Exporting", "layers that PEFT takes for experts", _for_peft))
