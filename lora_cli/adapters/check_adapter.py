"""Check whether an adapter fits a model: every tensor has a place in it, and none is missing.

The checks return `Problem`s instead of raising, so that all of them are reported at once, before
the model is changed.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import Shape
from lora_cli.adapters.match_names import first_match, inside, matches
from lora_cli.adapters.peft_format.adapter_folder import COUNTS, AdapterFolder
from lora_cli.adapters.peft_format.diffusion_file import SAVE_AGAIN
from lora_cli.adapters.peft_format.peft_experts import check_parameter
from lora_cli.adapters.peft_format.peft_rules import convolution_difference, parameter_layers
from lora_cli.adapters.peft_format.peft_tensors import MISMATCH_HINT
from lora_cli.adapters.peft_format.peft_tokens import LARGER, RESIZED, SavedRows
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.adapters.peft_format.tensor_names import adapted_modules
from lora_cli.adapters.targets import Target, is_never_called, shape_problem
from lora_cli.adapters.variants import Layers, layer_for, layers_of
from lora_cli.errors import IntegrityError, Problem
from lora_cli.models.bundle import is_frozen

SHOWN = 8  # problems of each kind in a message
PADDED = 8  # padded vocabularies have a multiple of this number of rows
SAME_ROWS = 100  # equal first rows show that an embedding is the base's with rows appended
SHORT = (torch.float16, torch.bfloat16)


# --------------------------------------------------------------------------- adapted layers


def check_layers(
    by_layer: dict[str, dict[str, Tensor]],
    model: nn.Module,
    adapter: AdapterFolder,
    layers: Layers,
) -> tuple[dict[str, tuple[Target, dict[str, Shape] | None]], list[Problem]]:
    """Return the targets with their shapes by PEFT's layer names, and problems of layers."""
    targets: dict[str, tuple[Target, dict[str, Shape] | None]] = {}
    problems: list[Problem] = []
    modules = dict(model.named_modules())
    sites = parameter_layers(model, adapter.config.get("target_parameters"))
    for name in sorted(by_layer, key=_inner_first):
        tensors, shapes = by_layer[name], None
        if name in sites:
            layer_problems, target = check_parameter(sites[name], tensors, model, adapter)
        else:
            layer_problems, target, shapes = _check_layer(name, tensors, modules, adapter, layers)
            if is_never_called(model, name) and all(bool(t.any()) for t in tensors.values()):
                what = f"the adapter is for `{name}`, whose weight the model reads without a call"
                hint = "in PEFT too, the update has no effect until it is merged: train without it"
                layer_problems.append(Problem(what, hint=hint))
        problems += layer_problems
        targets |= {name: (target, shapes)} if target else {}
    return targets, problems


def _inner_first(name: str) -> int:
    """Sort key: nested layers on parameters of one module, in the order of attaching."""
    return -name.count(".base_layer")


def _check_layer(
    name: str,
    tensors: dict[str, Tensor],
    modules: dict[str, nn.Module],
    adapter: AdapterFolder,
    layers: Layers,
) -> tuple[list[Problem], Target | None, dict[str, Shape] | None]:
    """Return the problems of a layer's tensors, or the target that they describe.

    The third value is the shapes of its parameters, if the configuration asks for shapes other
    than the default ones of the layer.
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
    # a folder with a manifest was trained with this tool, which computes updates like the base
    if not adapter.verified and (difference := convolution_difference(module, adapter.config)):
        what = f"the convolution `{name}` {difference}"
        hint = "no merged weight is equal to it: use the adapter in PEFT"
        return [Problem(what, hint=hint)], None, None
    config, rank_of_tensors = adapter.config, layer.rank_of(tensors)
    configured_rank = int(
        first_match(config.get("rank_pattern") or {}, name, config.get("r", rank_of_tensors or 8))
    )
    rank = configured_rank if rank_of_tensors is None else rank_of_tensors
    if configured_rank != rank:
        hint = MISMATCH_HINT
        if config.get("ensure_weight_tying"):
            hint = "with `ensure_weight_tying`, PEFT gives a tied module the rank of the other"
        what = f"`{name}` has rank {rank}, its configuration says {configured_rank}"
        return [Problem(what, hint=hint)], None, None
    target = Target(name, rank, alpha_of(config, name))
    if problems := shape_problem(module, target, layers):
        return problems, None, None
    shapes = layer.configured_shapes(module, rank, config)
    expected_shapes = layer.peft_shapes(module, rank) if shapes is None else shapes
    if expected_shapes.keys() != tensors.keys():
        what, hint = f"`{name}` has {', '.join(tensors)}, its configuration says", MISMATCH_HINT
        if adapter.path.is_file():  # another tool's file, without a configuration
            what, hint = f"`{name}` has {', '.join(tensors)}, and such an update needs", SAVE_AGAIN
        return [Problem(f"{what} {', '.join(expected_shapes)}", hint=hint)], None, None
    problems = [
        Problem(f"{key} of `{name}` is {tuple(tensors[key].shape)}, the model needs {shape}")
        for key, shape in expected_shapes.items()
        if tuple(tensors[key].shape) != shape
    ]
    return problems, target, shapes


def _hint_for_experts(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return a hint if a module is missing because the model stores its experts as one tensor."""
    before, is_expert, _ = name.rpartition(".experts.")
    experts = modules.get(f"{before}.experts") if is_expert else None
    if experts is None or not any(p.ndim == 3 for p in experts.parameters(recurse=False)):
        return None
    return "an adapter of single experts is read where it has all of them, as LoRA's A and B"


# -------------------------------------------------------------- tensors of full parameters


def ignore_trained_rows(
    frozen: dict[str, Tensor], row_sets: list[SavedRows], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return copies of base weights whose trained rows are set to the model's own, to match."""
    copies = dict(frozen)
    for saved in row_sets:
        for name in (f"{module}.weight" for module in (saved.name, *saved.others)):
            if name in copies and copies[name].shape == parameters[name].shape:
                copies[name] = copies[name].clone()
                copies[name][saved.token_ids] = parameters[name][saved.token_ids].to(copies[name])
    return copies


def check_parameters(
    full_parameters: dict[str, Tensor],
    base_copies: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    untied: list[str],
    embeddings: list[str],
    adapted: Collection[str] = (),
) -> list[Problem]:
    """Return the problems of tensors that replace or copy full parameters of the model.

    Args:
        full_parameters: Trained tensors by parameter name.
        base_copies: Copies of base weights that PEFT also saves, by parameter name.
        parameters: The model's parameters.
        untied: Names of parameters that will be untied.
        embeddings: Names of the modules that have a row for each token.
        adapted: Names of the modules that have a low-rank update.
    """
    problems = []
    token_weights = {f"{name}.weight" for name in embeddings}
    first_names: dict[int, str] = {}  # the first name of each parameter, which may be shared
    for name, tensor in [*full_parameters.items(), *base_copies.items()]:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(Problem(f"the model has no parameter `{name}`"))
        elif parameter.shape != tensor.shape:
            larger = name in token_weights and tensor.shape[0] > parameter.shape[0]
            problems.append(
                Problem(
                    f"`{name}` is {tuple(tensor.shape)} in the adapter and "
                    f"{tuple(parameter.shape)} in the model",
                    hint=_hint_for_larger(name, tensor, adapted) if larger else None,
                )
            )
        elif name in base_copies and not parameter.is_meta and not _same(parameter, tensor):
            what = f"`{name}` of the base is not the one it was trained on"
            grown = name in token_weights and _same(parameter[:SAME_ROWS], tensor[:SAME_ROWS])
            hint = RESIZED.format(len(tensor)) if grown else None
            problems.append(Problem(what, hint=hint))
        elif name in full_parameters and name not in untied:
            other = first_names.setdefault(id(parameter), name)
            if not torch.equal(full_parameters[other], tensor):
                problems.append(
                    Problem(
                        f"`{other}` and `{name}` differ in the adapter, and are one in the model"
                    )
                )
    return problems


def check_buffers(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Problem]:
    """Return a problem for each buffer of the model that has other values in the adapter.

    The statistics of normalisation layers change if they are in training mode, as with PEFT.

    Args:
        tensors: The adapter's tensors, by names without PEFT's prefix.
        buffers: The base's buffers; nothing is compared on the meta device.
    """
    return [
        Problem(
            f"the buffer `{name}` is not that of the base",
            hint="it was trained with statistics of its own, which this tool takes from the base: "
            "merge the adapter in PEFT",
        )
        for name, buffer in buffers.items()
        # the number of batches seen does not affect outputs
        if name in tensors and not name.endswith(COUNTS) and not buffer.is_meta
        if tensors[name].shape != buffer.shape or not _same(buffer, tensors[name])
    ]


def _hint_for_larger(name: str, tensor: Tensor, adapted: Collection[str]) -> str:
    """Return what to do with a larger embedding, of which only the tokens' rows can be loaded."""
    is_padded = len(tensor) % PADDED == 0
    if is_padded or name.removesuffix(".weight") in adapted:
        return RESIZED.format(len(tensor))
    return LARGER


def _same(of_model: Tensor, of_adapter: Tensor) -> bool:
    """Compare in the coarser of the two dtypes: the base may have been loaded in another dtype.

    Also compare in 16 bits, since a base that is stored in 16 bits may be float32 in memory.
    """
    of_model = of_model.detach().cpu()
    dtype = min(of_model.dtype, of_adapter.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(of_model.to(dtype), of_adapter.to(dtype)) or any(
        torch.equal(of_model.float(), of_adapter.to(stored).float()) for stored in SHORT
    )


# ------------------------------------------------------------------------- missing tensors


def missing_tensors(
    adapter: AdapterFolder,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    full_parameters: dict[str, Tensor],
    new: list[str],
    drawn: Collection[str] | None,
) -> list[Problem]:
    """Return a problem for everything that the configuration promises but the file lacks."""
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
        if (
            name in full_parameters or elsewhere or is_frozen(model, name)
        ):  # in a submodel that is not trained
            continue
        is_in_full = any(inside(owner, top) for top in in_full)
        if (head := module_of(name, new)) and (drawn is None or name in drawn):
            what = f"`{name}` is missing: the base's checkpoint does not hold it, nor the adapter"
            save = f"train the head too, and save it: in PEFT with `modules_to_save=['{head}']`"
            problems.append(Problem(what, hint=None if is_in_full else save))
        elif is_in_full or (
            last == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))
        ):
            problems.append(
                Problem(f"`{name}` is missing: the configuration says that it is trained")
            )
    return problems


def _promised(adapter: AdapterFolder, modules: dict[str, nn.Module]) -> list[str]:
    """Return the modules that the configuration's targets match, by PEFT's rule.

    Return none with `layers_to_transform`, whose rule has changed between versions of PEFT: then
    the tensors alone determine the modules.
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
    """Return the module of the list that contains a parameter, or None."""
    return next((module for module in modules if name.startswith(f"{module}.")), None)


# ------------------------------------------------------------------------------- the error


def misfit_error(
    problems: list[Problem], missing: list[Problem], adapter: AdapterFolder
) -> IntegrityError:
    """Return the error that lists the problems; the last one gets the path and a hint."""
    shown = _first_of(problems) + _first_of(missing)
    first_hint = next((problem.hint for problem in problems + missing if problem.hint), None)
    hint = first_hint or "is this the base model that the adapter was trained on?"
    shown = [Problem(problem.what) for problem in shown]
    shown[-1] = Problem(shown[-1].what, str(adapter.path), hint)
    return IntegrityError(shown)


def _first_of(problems: list[Problem]) -> list[Problem]:
    """Return the first few problems, and one that says how many more there are."""
    n_hidden = len(problems) - SHOWN
    return problems[:SHOWN] + ([Problem(f"and {n_hidden} more like these")] if n_hidden > 0 else [])
