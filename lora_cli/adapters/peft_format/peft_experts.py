"""Read PEFT's updates of single parameters, and those of experts that used to be separate layers.

PEFT wraps a module once for each of its adapted parameters, in the module's order. The tensors of
the last parameter are stored under the module's name, those of earlier ones under `base_layer`:

    mlp.experts.lora_A.weight                `down_proj`, the second parameter
    mlp.experts.base_layer.lora_A.weight     `gate_up_proj`, the first parameter

Adapters of transformers 4 have tensors for each expert: `mlp.experts.7.up_proj.lora_A.weight`, or
`block_sparse_moe.experts.7.w3` in Mixtral. Two of an expert's three layers have since become one
parameter. Its update joins both: A has the rows of both, and B is block-diagonal, so rank and alpha
are doubled.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora_parameter import innermost, is_transposed, misfit, peft_shapes
from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.parameter_targets import Place
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.peft_rules import parameter_layers
from lora_cli.adapters.peft_format.tensor_names import adapted_modules
from lora_cli.adapters.targets import Target
from lora_cli.errors import LoraError, Problem
from lora_cli.models.stored_tensors import FUSED

OLD_NAME = re.compile(
    r"(?P<block>.+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<number>\d+)\.(?P<layer>\w+)"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
OLD_ROUTER = re.compile(r"(.+)\.block_sparse_moe\.gate\.(lora_[AB].*)")
MODERN_LAYERS = ("gate_proj", "up_proj", "down_proj")
RETRAIN = "merge it with the transformers 4 that it was trained with, or train it again"


def with_current_names(adapter: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """Return an adapter with its experts renamed and joined as the model has them.

    Args:
        adapter: The adapter, as `read_adapter` returns it.
        model: The base model, which may hold its experts as one tensor.

    Raises:
        LoraError: If one update of all experts cannot express the updates of single experts.
    """
    adapter = _with_routers(adapter, model)
    old: dict[str, dict[str, OldLayer]] = {}  # by the experts' module, and the layer
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        match = OLD_NAME.fullmatch(name)
        owner = f"{match['block']}.mlp.experts" if match else ""
        if not match or not _has_parameter(model, owner, FUSED.get(match["layer"], ("",))[0]):
            tensors[name] = tensor
            continue
        layer_of_all = old.setdefault(owner, {}).setdefault(match["layer"], OldLayer())
        expert = int(match["number"])
        layer_of_all.sides[match["side"]][expert] = tensor
        layer_of_all.modules[expert] = name.partition(".lora_")[0]
    if not old:
        return adapter
    config = dict(adapter.config)
    for key in ("target_parameters", "rank_pattern", "alpha_pattern"):
        config[key] = copy.copy(config.get(key)) or ([] if key == "target_parameters" else {})
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for owner, layers in old.items():
        for parameter in dict.fromkeys(FUSED[name][0] for name in layers):
            update = _joined_update(adapter, model, owner, parameter, layers)
            full = f"{owner}.{parameter}"
            joined[full] = update.a, update.b
            config["target_parameters"].append(full)
            config["rank_pattern"] = {re.escape(full): update.rank, **config["rank_pattern"]}
            config["alpha_pattern"] = {re.escape(full): update.alpha, **config["alpha_pattern"]}
    for layer, place in parameter_layers(model, config["target_parameters"]).items():
        if (pair := joined.get(".".join(place))) is not None:
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = pair
    return replace(adapter, tensors=tensors, config=config)


@dataclass
class OldLayer:
    """A layer that every expert had, with its tensors by the expert's number."""

    sides: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {"A": {}, "B": {}})
    modules: dict[int, str] = field(default_factory=dict)


@dataclass
class JoinedUpdate:
    """One update of all experts, as PEFT stores it."""

    a: Tensor
    b: Tensor
    rank: int
    alpha: float


def _with_routers(adapter: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """Return an adapter in which routers that used to be linear layers are parameters."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        old = OLD_ROUTER.fullmatch(name)
        is_in_model = old is not None and _has_parameter(model, f"{old[1]}.mlp.gate", "weight")
        tensors[f"{old[1]}.mlp.gate.{old[2]}" if old is not None and is_in_model else name] = tensor
    modules = dict(model.named_modules())
    adapted = {name.partition(".lora_")[0] for name in tensors if ".lora_A" in name}
    known = set(parameter_layers(model, adapter.config.get("target_parameters")))
    routers = sorted(
        f"{name}.weight"
        for name in adapted - known
        if name.endswith(".mlp.gate")
        and not isinstance(modules.get(name), nn.Linear)
        and _has_parameter(model, name, "weight")
    )
    if not routers and tensors.keys() == adapter.tensors.keys():
        return adapter
    before = adapter.config.get("target_parameters") or []
    config = {**adapter.config, "target_parameters": [*before, *routers]}
    return replace(adapter, tensors=tensors, config=config)


def _has_parameter(model: nn.Module, name: str, parameter: str) -> bool:
    """Return whether the model has a module of this name that owns the parameter."""
    try:
        owner = innermost(model.get_submodule(name))
    except AttributeError:
        return False
    return isinstance(owner._parameters.get(parameter), nn.Parameter)


def _joined_update(
    adapter: AdapterFolder,
    model: nn.Module,
    owner: str,
    parameter: str,
    layers: dict[str, OldLayer],
) -> JoinedUpdate:
    """Join the updates of all experts' layers into the update of one parameter.

    Args:
        adapter: Provides the configuration, and the path for errors.
        model: The base model.
        owner: The module of the experts.
        parameter: The parameter that holds the layers one after the other.
        layers: The adapted layers by name.

    Raises:
        LoraError: If the update of an expert is missing, or they differ in rank or scale.
    """
    at, config, module = str(adapter.path), adapter.config, innermost(model.get_submodule(owner))
    count = module.get_parameter(parameter).shape[0]
    family = ("w1", "w3", "w2") if "w" in {n[0] for n in layers} else MODERN_LAYERS
    names = [name for name in family if FUSED[name][0] == parameter]
    if missing := [name for name in names if name not in layers]:
        present = " and ".join(f"`{name}`" for name in names if name in layers)
        what = f"the experts of `{owner}` have an adapter on {present} and none on `{missing[0]}`: "
        raise LoraError(f"{what}these are one tensor by now", at, RETRAIN)
    if is_transposed(module, 3):
        raise LoraError(f"`{owner}` stores its experts otherwise than the adapter", at, RETRAIN)
    all_a, all_b, scales = [], [], set()
    for name in names:
        sides = layers[name].sides
        if any(set(side) != set(range(count)) for side in sides.values()):
            what = f"`{owner}` has {count} experts, and the adapter is not for `{name}` of each"
            raise LoraError(what, at, RETRAIN)
        if len({tuple(t.shape) for t in sides["A"].values()}) > 1:
            what = f"the adapters of the experts of `{owner}` differ in rank"
            raise LoraError(what, at, RETRAIN)
        all_a.append(torch.stack([sides["A"][expert] for expert in range(count)]))
        all_b.append([sides["B"][expert] for expert in range(count)])
        scales |= {_scale(config, old, all_a[-1].shape[1]) for old in layers[name].modules.values()}
    if len(scales) > 1:
        what = f"the adapters of the experts of `{owner}` have several scales"
        raise LoraError(what, at, RETRAIN)
    a = torch.cat(all_a, 1)  # (experts, ranks, in)
    diagonal: Any = torch.block_diag  # it has no type annotations
    b = torch.stack([diagonal(*blocks) for blocks in zip(*all_b, strict=True)])
    rank = a.shape[1]
    alpha = scales.pop() * (math.sqrt(rank) if config.get("use_rslora") else rank)
    return JoinedUpdate(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), rank, alpha)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = first_match(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_parameter(
    place: Place, tensors: dict[str, Tensor], model: nn.Module, adapter: AdapterFolder
) -> tuple[list[Problem], Target | None]:
    """Return the problems of the tensors of one parameter's update, and its target.

    Args:
        place: The names of the module and its parameter.
        tensors: `lora_A` and `lora_B` as PEFT stores them.
        model: The base model.
        adapter: Provides the configuration.
    """
    owner, name, config = model.get_submodule(place[0]), ".".join(place), adapter.config
    if reason := misfit(owner, place[1]):
        return [Problem(f"the adapter is for `{name}`, which {reason}")], None
    rank = int(first_match(config.get("rank_pattern") or {}, name, config.get("r", 8)))
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    problems = [
        Problem(f"{key} of `{name}` is {tuple(tensors[key].shape)}, the model needs {shape}")
        for key, shape in peft_shapes(owner, place[1], rank).items()
        if tuple(tensors[key].shape) != shape
    ]
    return problems, Target(place[0], rank, alpha, place[1])


def target_names(adapter: AdapterFolder, model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the modules and of the single parameters that an adapter adapts."""
    places = parameter_layers(model, adapter.config.get("target_parameters"))
    adapted = sorted(adapted_modules(adapter.tensors))
    parameters = sorted(".".join(places[name]) for name in adapted if name in places)
    return [name for name in adapted if name not in places], parameters
