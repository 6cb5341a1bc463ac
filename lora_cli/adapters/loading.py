"""Load an adapter folder onto its base model, once everything about it is checked.

The tensors say which modules are adapted and with which rank, the configuration says alpha, and
what the configuration promises has to be there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import (
    add_layer,
    compute_in_own_dtype,
    even_norms,
    lora_layers,
)
from lora_cli.adapters.folder import AdapterFolder, within_groups
from lora_cli.adapters.lora import LoRAConv, LoRALayer, can_adapt
from lora_cli.adapters.targets import Target, first_match, groups_problem, inside, matches
from lora_cli.errors import IntegrityError, Problem
from lora_cli.fingerprint import Fingerprint, require_base
from lora_cli.recipe import Recipe

SHOWN = 8  # problems of a kind


def load_adapter(
    model: nn.Module,
    adapter: AdapterFolder,
    new: list[str],
    dropout: float = 0.0,
    trained: bool = False,
) -> None:
    """Attach an adapter to its base model and load its weights.

    Args:
        model: The base model, changed in place.
        adapter: What `read_adapter` returned.
        new: Names of modules that the base checkpoint does not hold, and the adapter must.
        dropout: Of the low-rank layers, where they are trained.
        trained: What the adapter holds is trained further; else nothing is.

    Raises:
        IntegrityError: With every tensor that does not fit the model or is missing; the model is
            untouched then.
    """
    pairs, plain, frozen, problems = _sort_tensors(adapter)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets: list[Target] = []
    for name, pair in pairs.items():
        faults, found = _check_pair(name, pair, modules.get(name), adapter)
        problems += faults
        targets += found
    problems += _check_plain(plain, frozen, parameters)
    missing = _missing(adapter, modules, parameters, plain, new)
    if problems or missing:
        shown = _first_of(problems) + _first_of(missing)
        last = shown[-1]
        shown[-1] = Problem(
            last.what, str(adapter.path), "is this the base model that the adapter was trained on?"
        )
        raise IntegrityError(shown)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for target in targets:
            use_rslora = bool(adapter.config.get("use_rslora"))
            layer = add_layer(model, target, dropout, use_rslora)
            _copy_pair(layer, pairs[target.name])
        for name, tensor in plain.items():
            parameter = parameters[name]
            parameter.data = tensor.to(parameter.device, torch.float32)
    even_norms(model)
    compute_in_own_dtype(model, new)
    held = {id(parameters[name]) for name in plain}
    held |= {id(m) for layer in lora_layers(model).values() for m in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(trained and id(parameter) in held)


def _first_of(problems: list[Problem]) -> list[Problem]:
    """Return so many problems as a person reads, and how many more there are."""
    more = len(problems) - SHOWN
    return problems[:SHOWN] + ([Problem(f"and {more} more like these")] if more > 0 else [])


def verify_base(
    adapter: AdapterFolder, base: Fingerprint | None, recipe: Recipe
) -> Fingerprint | None:
    """Refuse an adapter of another base, and return what to keep beside what is made of it.

    Args:
        adapter: What `read_adapter` returned.
        base: The fingerprint of the base that it shall be attached to.
        recipe: Names that base, and may allow another.
    """
    return require_base(adapter.base, base, recipe, f"the adapter {adapter.path}", adapter.tensors)


def _check_plain(
    plain: dict[str, Tensor], frozen: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> list[Problem]:
    """Return what is wrong with the tensors that stand for whole parameters of the model."""
    problems = []
    first: dict[int, str] = {}  # name of the first tensor for a parameter, which may be shared
    for name, tensor in [*plain.items(), *frozen.items()]:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(Problem(f"the model has no parameter `{name}`"))
        elif parameter.shape != tensor.shape:
            problems.append(
                Problem(
                    f"`{name}` is {tuple(tensor.shape)} in the adapter and "
                    f"{tuple(parameter.shape)} in the model"
                )
            )
        elif name in frozen and not _same(parameter, tensor):
            problems.append(Problem(f"`{name}` of the base is not the one it was trained on"))
        elif name in plain:
            other = first.setdefault(id(parameter), name)
            if not torch.equal(plain[other], tensor):
                problems.append(
                    Problem(
                        f"`{other}` and `{name}` differ in the adapter, and are one in the model"
                    )
                )
    return problems


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Compare in the coarser of the two dtypes: the base may have been loaded in another."""
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.detach().cpu().to(dtype), theirs.to(dtype))


def _missing(
    adapter: AdapterFolder,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    plain: dict[str, Tensor],
    new: list[str],
) -> list[Problem]:
    """Return a problem for everything that the configuration promises and the file lacks."""
    config = adapter.config
    adapted = {name.partition(".lora_")[0] for name in adapter.tensors if ".lora_" in name}
    in_full = config.get("modules_to_save") or []
    bias = "all" if config["peft_type"] == "BITFIT" else config.get("bias")
    problems = [
        Problem(f"`{name}` is missing: the configuration says that it is adapted")
        for name in _promised(config, modules)
        if name not in adapted
    ]
    for name in parameters:
        owner, _, last = name.rpartition(".")
        if name in plain:
            continue
        if any(name.startswith(f"{head}.") for head in new):
            problems.append(Problem(f"`{name}` is missing: the base does not hold it either"))
        elif any(inside(owner, top) for top in in_full) or (
            last == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))
        ):
            problems.append(
                Problem(f"`{name}` is missing: the configuration says that it is trained")
            )
    return problems


def _promised(config: dict[str, Any], modules: dict[str, nn.Module]) -> list[str]:
    """Return the modules for which a configuration promises an adapter, by PEFT's rule.

    Not with `layers_to_transform`, whose rule has changed between versions: there the tensors
    alone say it.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if targets is None or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return []
    in_full = config.get("modules_to_save") or []
    return [
        name
        for name, module in modules.items()
        if can_adapt(module)
        and matches(targets, name)
        and not matches(excluded, name)
        and not any(inside(name, top) for top in in_full)
    ]


def _sort_tensors(
    adapter: AdapterFolder,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], list[Problem]]:
    """Return (A and B by module, trained parameters by name, weights of the base, problems)."""
    pairs: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    problems = []
    for name, tensor in adapter.tensors.items():
        low_rank = re.fullmatch(
            r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?", name
        )
        if low_rank:
            pairs.setdefault(low_rank[1], {})[low_rank[2]] = tensor
        elif ".lora_" in name:
            problems.append(Problem(f"`{name}` is of a kind that this tool does not know"))
        elif name.endswith(".base_layer.weight"):  # of an embedding: PEFT writes it besides
            frozen[f"{name.removesuffix('.base_layer.weight')}.weight"] = tensor
        elif ".original_module." not in name:  # the head before training: PEFT's `bias: all`
            name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
            plain[name.replace(".modules_to_save.", ".")] = tensor
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            problems.append(Problem(f"`{module}` has only lora_{next(iter(pair))}"))
    pairs = {module: pair for module, pair in pairs.items() if set(pair) == {"A", "B"}}
    return pairs, plain, frozen, problems


def _check_pair(
    name: str, pair: dict[str, Tensor], module: nn.Module | None, adapter: AdapterFolder
) -> tuple[list[Problem], list[Target]]:
    """Return what is wrong with a pair, or the target that it makes."""
    if module is None or not can_adapt(module):
        kind = f"is a {type(module).__name__}, which no adapter fits" if module else "is not there"
        return [Problem(f"the adapter is for `{name}`, which in the model {kind}")], []
    config = adapter.config
    rank = pair["A"].shape[0] if pair["A"].ndim else 0
    stated = int(first_match(config.get("rank_pattern") or {}, name, config.get("r", rank)))
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if stated != rank:
        return [Problem(f"`{name}` has rank {rank}, its configuration says {stated}")], []
    target = Target(name, rank, alpha)
    if problems := groups_problem(module, target):
        return problems, []
    a, b = _expected_shapes(module, rank)
    problems = [
        Problem(f"lora_{key} of `{name}` is {tuple(pair[key].shape)}, the model needs {shape}")
        for key, shape in (("A", a), ("B", b))
        if tuple(pair[key].shape) != shape
    ]
    return problems, [target]


def _expected_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(module.kernel_size)
        return (
            (rank, module.in_channels, *module.kernel_size),
            (module.out_channels, rank // module.groups, *ones),
        )
    if isinstance(module, nn.Embedding):
        return (rank, module.num_embeddings), (module.embedding_dim, rank)
    if isinstance(module, nn.Linear):
        return (rank, module.in_features), (module.out_features, rank)
    assert isinstance(module, Conv1D)
    n_in, n_out = module.weight.shape
    return (rank, n_in), (n_out, rank)


def _copy_pair(layer: LoRALayer, pair: dict[str, Tensor]) -> None:
    a = pair["A"]
    if isinstance(layer, LoRAConv) and layer.groups > 1:
        a = within_groups(a, layer.groups)
        if a.shape != layer.lora_A.shape:
            layer.lora_A = nn.Parameter(a.to(layer.lora_A.device, torch.float32))
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(pair["B"])
