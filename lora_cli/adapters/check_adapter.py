"""Check whether an adapter fits a model: each tensor has its place, and none is missing.

Each check returns a `Problem` for everything that does not fit, so that all are said at once and
the model is untouched until then.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import Shape
from lora_cli.adapters.match_names import first_match, inside, matches
from lora_cli.adapters.peft_format.adapter_folder import COUNTS, AdapterFolder
from lora_cli.adapters.peft_format.diffusion_file import ANEW
from lora_cli.adapters.peft_format.peft_experts import check_parameter
from lora_cli.adapters.peft_format.peft_rules import convolution_difference, parameter_layers
from lora_cli.adapters.peft_format.peft_tensors import TOGETHER
from lora_cli.adapters.peft_format.peft_tokens import LARGER, RESIZED, SavedRows
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.adapters.peft_format.tensor_names import adapted_modules
from lora_cli.adapters.targets import Target, shape_problem
from lora_cli.adapters.variants import Layers, layer_for, layers_of
from lora_cli.errors import IntegrityError, Problem
from lora_cli.models.bundle import is_frozen

SHOWN = 8  # problems of a kind
PADDED = 8  # vocabularies that are padded have a multiple of this number of rows
SAME_ROWS = 100  # first rows that show that an embedding is that of the base, with others behind
SHORT = (torch.float16, torch.bfloat16)


# --------------------------------------------------------------------------- adapted layers


def check_layers(
    of_layers: dict[str, dict[str, Tensor]],
    model: nn.Module,
    adapter: AdapterFolder,
    layers: Layers,
) -> tuple[dict[str, tuple[Target, dict[str, Shape] | None]], list[Problem]]:
    """Return what is adapted, by PEFT's names of layers, and a problem for what does not fit."""
    chosen: dict[str, tuple[Target, dict[str, Shape] | None]] = {}
    problems: list[Problem] = []
    modules = dict(model.named_modules())
    sites = parameter_layers(model, adapter.config.get("target_parameters"))
    for name in sorted(of_layers, key=_inner_first):
        of_layer, shapes = of_layers[name], None
        if name in sites:
            found, target = check_parameter(sites[name], of_layer, model, adapter)
        else:
            found, target, shapes = _check_layer(name, of_layer, modules, adapter, layers)
        problems += found
        chosen |= {name: (target, shapes)} if target else {}
    return chosen, problems


def _inner_first(name: str) -> int:
    """Return a key by which layers on parameters of one module come in the order of attaching."""
    return -name.count(".base_layer")


def _check_layer(
    name: str,
    tensors: dict[str, Tensor],
    modules: dict[str, nn.Module],
    adapter: AdapterFolder,
    layers: Layers,
) -> tuple[list[Problem], Target | None, dict[str, Shape] | None]:
    """Return what is wrong with the tensors of a layer, or the target that they make.

    With a target come the shapes of its parameters, where the configuration asks for others than
    those that such layers have.
    """
    module = modules.get(name)
    if module is None:
        what = f"the adapter is for `{name}`, which in the model is not there"
        return [Problem(what, hint=_hint_for_experts(name, modules))], None, None
    layer = layer_for(module, layers)
    if layer is None:
        kind = f"is a {type(module).__name__}, which no adapter fits"
        hint = None
        if isinstance(module, nn.Linear | nn.Embedding):  # PEFT has a layer for it
            hint = "this tool has no low-rank layer for it: merge the adapter in PEFT"
        return (
            [Problem(f"the adapter is for `{name}`, which in the model {kind}", hint=hint)],
            None,
            None,
        )
    # a folder of this tool has a manifest, and its updates are computed as the base is
    if not adapter.verified and (difference := convolution_difference(module, adapter.config)):
        what = f"the convolution `{name}` {difference}"
        hint = "no merged weight is equal to it: use the adapter in PEFT"
        return [Problem(what, hint=hint)], None, None
    config, shown = adapter.config, layer.rank_of(tensors)
    stated = int(first_match(config.get("rank_pattern") or {}, name, config.get("r", shown or 8)))
    rank = stated if shown is None else shown
    if stated != rank:
        hint = TOGETHER
        if config.get("ensure_weight_tying"):
            hint = "with `ensure_weight_tying`, PEFT gives a tied module the rank of the other"
        what = f"`{name}` has rank {rank}, its configuration says {stated}"
        return [Problem(what, hint=hint)], None, None
    target = Target(name, rank, alpha_of(config, name))
    if problems := shape_problem(module, target, layers):
        return problems, None, None
    shapes = layer.configured_shapes(module, rank, config)
    needed = layer.peft_shapes(module, rank) if shapes is None else shapes
    if needed.keys() != tensors.keys():
        what, hint = f"`{name}` has {', '.join(tensors)}, its configuration says", TOGETHER
        if adapter.path.is_file():  # of another tool, without a configuration
            what, hint = f"`{name}` has {', '.join(tensors)}, and such an update needs", ANEW
        return [Problem(f"{what} {', '.join(needed)}", hint=hint)], None, None
    problems = [
        Problem(f"{key} of `{name}` is {tuple(tensors[key].shape)}, the model needs {shape}")
        for key, shape in needed.items()
        if tuple(tensors[key].shape) != shape
    ]
    return problems, target, shapes


def _hint_for_experts(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return a hint where a module is not there since the model holds its experts as one tensor."""
    before, is_expert, _ = name.rpartition(".experts.")
    experts = modules.get(f"{before}.experts") if is_expert else None
    if experts is None or not any(p.ndim == 3 for p in experts.parameters(recurse=False)):
        return None
    return "an adapter of single experts is read where it has all of them, as LoRA's A and B"


# ------------------------------------------------------ tensors that are whole parameters


def without_trained_rows(
    frozen: dict[str, Tensor], of_tokens: list[SavedRows], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return copies of the base without the rows that are trained, which need not be its."""
    found = dict(frozen)
    for saved in of_tokens:
        for name in (f"{module}.weight" for module in (saved.name, *saved.others)):
            if name in found and found[name].shape == parameters[name].shape:
                found[name] = found[name].clone()
                found[name][saved.token_ids] = parameters[name][saved.token_ids].to(found[name])
    return found


def check_parameters(
    plain: dict[str, Tensor],
    frozen: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    own: list[str],
    embeddings: list[str],
    adapted: Collection[str] = (),
) -> list[Problem]:
    """Return what is wrong with the tensors that stand for whole parameters of the model.

    Args:
        plain: Tensors that are trained, by the names of parameters.
        frozen: Tensors of the base that PEFT writes besides.
        parameters: Those of the model.
        own: Parameters that leave their tie.
        embeddings: Names of the modules that have a row for each token.
        adapted: Names of the modules that have a low-rank update.
    """
    problems = []
    of_tokens = {f"{name}.weight" for name in embeddings}
    first: dict[int, str] = {}  # name of the first tensor for a parameter, which may be shared
    for name, tensor in [*plain.items(), *frozen.items()]:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(Problem(f"the model has no parameter `{name}`"))
        elif parameter.shape != tensor.shape:
            larger = name in of_tokens and tensor.shape[0] > parameter.shape[0]
            problems.append(
                Problem(
                    f"`{name}` is {tuple(tensor.shape)} in the adapter and "
                    f"{tuple(parameter.shape)} in the model",
                    hint=_hint_for_larger(name, tensor, adapted) if larger else None,
                )
            )
        elif name in frozen and not parameter.is_meta and not _same(parameter, tensor):
            what = f"`{name}` of the base is not the one it was trained on"
            grown = name in of_tokens and _same(parameter[:SAME_ROWS], tensor[:SAME_ROWS])
            hint = RESIZED.format(len(tensor)) if grown else None
            problems.append(Problem(what, hint=hint))
        elif name in plain and name not in own:
            other = first.setdefault(id(parameter), name)
            if not torch.equal(plain[other], tensor):
                problems.append(
                    Problem(
                        f"`{other}` and `{name}` differ in the adapter, and are one in the model"
                    )
                )
    return problems


def check_buffers(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Problem]:
    """Return a problem for each buffer of the model that an adapter has with other values.

    Statistics of normalisation change where it is trained in training mode, as with PEFT.

    Args:
        tensors: Of the adapter, by names without PEFT's prefix.
        buffers: Those of the base; on the meta device nothing is compared.
    """
    return [
        Problem(
            f"the buffer `{name}` is not that of the base",
            hint="it was trained with statistics of its own, which this tool takes from the base: "
            "merge the adapter in PEFT",
        )
        for name, buffer in buffers.items()
        # how many batches were counted changes no output
        if name in tensors and not name.endswith(COUNTS) and not buffer.is_meta
        if tensors[name].shape != buffer.shape or not _same(buffer, tensors[name])
    ]


def _hint_for_larger(name: str, tensor: Tensor, adapted: Collection[str]) -> str:
    """Return what to do with a larger embedding, of which only the rows of tokens can be read."""
    is_padded = len(tensor) % PADDED == 0
    if is_padded or name.removesuffix(".weight") in adapted:
        return RESIZED.format(len(tensor))
    return LARGER


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Compare in the coarser of the two dtypes: the base may have been loaded in another.

    A base that is stored in 16 bits may stand in memory as float32 by now.
    """
    ours = ours.detach().cpu()
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.to(dtype), theirs.to(dtype)) or any(
        torch.equal(ours.float(), theirs.to(stored).float()) for stored in SHORT
    )


# ------------------------------------------------------------------------- what is missing


def missing_tensors(
    adapter: AdapterFolder,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    plain: dict[str, Tensor],
    new: list[str],
    drawn: Collection[str] | None,
) -> list[Problem]:
    """Return a problem for everything that the configuration promises and the file lacks."""
    config = adapter.config
    adapted = adapted_modules(adapter.tensors)
    in_full = config.get("modules_to_save") or []
    bias = "all" if config["peft_type"] == "BITFIT" else config.get("bias")
    sites = parameter_layers(model, config.get("target_parameters"))
    promised = {name: name for name in _promised(adapter, dict(model.named_modules()))}
    promised |= {layer: ".".join(place) for layer, place in sites.items()}
    problems = [
        Problem(f"`{name}` is missing: the configuration says that it is adapted")
        for layer, name in promised.items()
        if layer not in adapted
    ]
    for name in parameters:
        owner, _, last = name.rpartition(".")
        elsewhere = adapter.parts and name.partition(".")[0] not in adapter.parts
        if name in plain or elsewhere or is_frozen(model, name):  # in a part that is not trained
            continue
        named = any(inside(owner, top) for top in in_full)
        if (head := module_of(name, new)) and (drawn is None or name in drawn):
            what = f"`{name}` is missing: the base's checkpoint does not hold it, nor the adapter"
            save = f"train the head too, and save it: in PEFT with `modules_to_save=['{head}']`"
            problems.append(Problem(what, hint=None if named else save))
        elif named or (
            last == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))
        ):
            problems.append(
                Problem(f"`{name}` is missing: the configuration says that it is trained")
            )
    return problems


def _promised(adapter: AdapterFolder, modules: dict[str, nn.Module]) -> list[str]:
    """Return the modules for which a configuration promises an adapter, by PEFT's rule.

    Not with `layers_to_transform`, whose rule has changed between versions: there the tensors
    alone say it.
    """
    config = adapter.config
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if targets is None or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return []
    in_full = config.get("modules_to_save") or []
    return [
        name
        for name, module in modules.items()
        if layer_for(module, layers_of(adapter.type))
        and matches(targets, name)
        and not matches(excluded, name)
        and not any(inside(name, top) for top in in_full)
    ]


def module_of(name: str, modules: list[str]) -> str | None:
    """Return the module of a list that a parameter belongs to, if there is one."""
    return next((module for module in modules if name.startswith(f"{module}.")), None)


# ------------------------------------------------------------------------------- the error


def misfit_error(
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
