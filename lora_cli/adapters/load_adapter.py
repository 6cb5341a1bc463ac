"""Load an adapter folder onto its base model, once everything about it is checked.

The tensors say which modules are adapted and with which rank, the configuration says alpha, and
what the configuration promises has to be there.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import (
    add_layer,
    lora_layers,
)
from lora_cli.adapters.lora import LoRAConv, LoRALayer, can_adapt
from lora_cli.adapters.mixed_dtypes import let_dtypes_meet
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    within_groups,
)
from lora_cli.adapters.peft_format.peft_rules import copied_modules
from lora_cli.adapters.targets import Target, first_match, groups_problem, inside, matches
from lora_cli.adapters.tied_weights import give_own_parameters, tied_groups
from lora_cli.errors import IntegrityError, Problem
from lora_cli.models.fingerprint import Fingerprint, require_base
from lora_cli.recipe import Recipe

SHOWN = 8  # problems of a kind
TOGETHER = f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together: copy both again"


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs, plain, frozen, problems = _sort_tensors(adapter, parameters)
    modules = dict(model.named_modules())
    own = own_parameters(model, adapter.config, plain)
    targets: list[Target] = []
    for name, pair in pairs.items():
        errors, found = _check_pair(name, pair, modules, adapter)
        problems += errors
        targets += found
    problems += _check_plain(plain, frozen, parameters, own)
    missing = _missing(adapter, modules, parameters, plain, new)
    if problems or missing:
        raise _misfit(problems, missing, adapter)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    give_own_parameters(model, own)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for target in targets:
            use_rslora = bool(adapter.config.get("use_rslora"))
            layer = add_layer(model, target, dropout, use_rslora)
            _copy_pair(layer, pairs[target.name])
        for name in sorted(plain, key=own.__contains__):  # a copy, after what it was a copy of
            parameter = parameters[name]
            parameter.data = plain[name].to(parameter.device, torch.float32)
    let_dtypes_meet(model, new)
    loaded = {id(parameters[name]) for name in plain}
    loaded |= {id(m) for layer in lora_layers(model).values() for m in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(trained and id(parameter) in loaded)


def own_parameters(model: nn.Module, config: dict[str, Any], plain: dict[str, Tensor]) -> list[str]:
    """Return the names of parameters that leave their tie: those of PEFT's `modules_to_save`.

    Where all sides of a tie are named and are equal, it stays one.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    copied = copied_modules(names, config)
    own = []
    for group in tied_groups(model):
        named = [name for name in group if name in plain]
        same = all(torch.equal(plain[name], plain[named[0]]) for name in named)
        if len(named) < len(group) or not same:
            own += [n for n in named if any(n.startswith(f"{top}.") for top in copied)]
    return own


def _misfit(
    problems: list[Problem], missing: list[Problem], adapter: AdapterFolder
) -> IntegrityError:
    """Return the error that names what does not fit; the last problem gets the place and a hint."""
    shown = _first_of(problems) + _first_of(missing)
    hinted = next((problem.hint for problem in problems + missing if problem.hint), None)
    hint = hinted or "is this the base model that the adapter was trained on?"
    shown = [Problem(problem.what) for problem in shown]
    shown[-1] = Problem(shown[-1].what, str(adapter.path), hint)
    return IntegrityError(shown)


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
        base: The fingerprint of the base that it is to be attached to.
        recipe: Names that base, and may allow another.
    """
    return require_base(adapter.base, base, recipe, f"the adapter {adapter.path}", adapter.tensors)


def _check_plain(
    plain: dict[str, Tensor],
    frozen: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    own: list[str],
) -> list[Problem]:
    """Return what is wrong with the tensors that stand for whole parameters of the model."""
    problems = []
    first: dict[int, str] = {}  # name of the first tensor for a parameter, which may be shared
    for name, tensor in [*plain.items(), *frozen.items()]:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(
                Problem(f"the model has no parameter `{name}`", hint=_unsupported(name))
            )
        elif parameter.shape != tensor.shape:
            problems.append(
                Problem(
                    f"`{name}` is {tuple(tensor.shape)} in the adapter and "
                    f"{tuple(parameter.shape)} in the model"
                )
            )
        elif name in frozen and not _same(parameter, tensor):
            problems.append(Problem(f"`{name}` of the base is not the one it was trained on"))
        elif name in plain and name not in own:
            other = first.setdefault(id(parameter), name)
            if not torch.equal(plain[other], tensor):
                problems.append(
                    Problem(
                        f"`{other}` and `{name}` differ in the adapter, and are one in the model"
                    )
                )
    return problems


def _unsupported(name: str) -> str | None:
    """Return a hint where the name of a tensor tells of what this tool does not read."""
    if ".token_adapter." in name:
        return "it holds single rows of an embedding (`trainable_token_indices`): merge it in PEFT"
    if name.rpartition(".")[2] in ("running_mean", "running_var"):
        return "it holds the statistics of a normalisation, which no adapter of this tool has"
    return None


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
        if head := next((head for head in new if name.startswith(f"{head}.")), None):
            what = f"`{name}` is missing: a head is read from the adapter, never from the base"
            save = f"train the head too, and save it: in PEFT with `modules_to_save=['{head}']`"
            named = any(inside(owner, top) for top in in_full)
            problems.append(Problem(what, hint=None if named else save))
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
    adapter: AdapterFolder, parameters: Collection[str]
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
        copied = ".original_module." in name or ".modules_to_save." in name
        if ".lora_" in name and copied:
            what = f"`{name}`: a module is both adapted and trained in full"
            problems.append(Problem(what, hint="train it again with only one of the two"))
        elif low_rank:
            pairs.setdefault(low_rank[1], {})[low_rank[2]] = tensor
        elif ".lora_" in name:
            what = f"`{name}` is of a kind that this tool does not support"
            problems.append(Problem(what, hint="it reads LoRA's A and B: merge the rest in PEFT"))
        elif name.endswith(".base_layer.weight"):  # of an embedding: PEFT writes it besides
            frozen[f"{name.removesuffix('.base_layer.weight')}.weight"] = tensor
        elif ".original_module." not in name:  # the head before training: PEFT's `bias: all`
            short = _parameter_name(name, parameters)
            if short in plain and not torch.equal(plain[short], tensor):
                problems.append(Problem(f"`{short}` has two values in it", hint=TOGETHER))
            plain[short] = tensor
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            problems.append(Problem(f"`{module}` has only lora_{next(iter(pair))}", hint=TOGETHER))
    pairs = {module: pair for module, pair in pairs.items() if set(pair) == {"A", "B"}}
    return pairs, plain, frozen, problems


def _parameter_name(name: str, parameters: Collection[str]) -> str:
    """Return the model's name of a parameter that PEFT trained as it is.

    PEFT's `bias: all` writes a copied module's biases under its own names besides:
    `classifier.modules_to_save.bias`, and `classifier.modules_to_save.default.dense.bias` with the
    adapter's name where the module has children.
    """
    name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
    module, is_copy, rest = name.partition(".modules_to_save.")
    if not is_copy:
        return name
    without = f"{module}.{rest.partition('.')[2]}"
    return without if without in parameters else f"{module}.{rest}"


def _check_pair(
    name: str, pair: dict[str, Tensor], modules: dict[str, nn.Module], adapter: AdapterFolder
) -> tuple[list[Problem], list[Target]]:
    """Return what is wrong with a pair, or the target that it makes."""
    module = modules.get(name)
    if module is None:
        what = f"the adapter is for `{name}`, which in the model is not there"
        return [Problem(what, hint=_joined(name, modules))], []
    if not can_adapt(module):
        kind = f"is a {type(module).__name__}, which no adapter fits"
        hint = None
        if isinstance(module, nn.Linear | nn.Embedding):  # PEFT has a layer for it
            hint = "this tool has no low-rank layer for it: merge the adapter in PEFT"
        return [Problem(f"the adapter is for `{name}`, which in the model {kind}", hint=hint)], []
    if getattr(module, "padding_mode", "zeros") != "zeros":
        what = f"`{name}` pads with `{module.padding_mode}`, and PEFT's update of it with zeros"
        return [Problem(what, hint="no merged weight is equal to it: use the adapter in PEFT")], []
    config = adapter.config
    rank = pair["A"].shape[0] if pair["A"].ndim else 0
    stated = int(first_match(config.get("rank_pattern") or {}, name, config.get("r", rank)))
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if stated != rank:
        hint = TOGETHER
        if config.get("ensure_weight_tying"):
            hint = "with `ensure_weight_tying`, PEFT gives a tied module the rank of the other"
        what = f"`{name}` has rank {rank}, its configuration says {stated}"
        return [Problem(what, hint=hint)], []
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


def _joined(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return a hint where a module is not there since the model holds its experts as one tensor."""
    before, is_expert, _ = name.rpartition(".experts.")
    experts = modules.get(f"{before}.experts") if is_expert else None
    if experts is None or not any(p.ndim == 3 for p in experts.parameters(recurse=False)):
        return None
    return "this tool adapts no single experts: merge the adapter in PEFT, or train without them"


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
