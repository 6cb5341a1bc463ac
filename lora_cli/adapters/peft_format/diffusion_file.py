"""Read single-file adapters of diffusion models, as written by diffusers, kohya or LyCORIS.

These tools have their own names, which can only be resolved with the base model: a file is read
first, and translated once the base is loaded. Then every tensor is used, or reported in an error.

Alpha is in a tensor next to each module's matrices or, in diffusers' files, in the header as a part
of PEFT's configuration; without alpha the scaling is 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.adapters.lokr import factorised as lokr_factors
from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.peft_format.diffusion_names import (
    DENOISERS,
    PREFIXES,
    TEXT_ENCODERS,
    ModuleNames,
    split_name,
)
from lora_cli.adapters.peft_format.original_layers import n_outputs, split_tensor
from lora_cli.adapters.peft_format.part_folders import join_parts, most_common
from lora_cli.adapters.peft_format.peft_config import check_config
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.whole_update import weight_shape
from lora_cli.errors import IntegrityError, LoraError, Problem, counted, warn
from lora_cli.models.bundle import Bundle
from lora_cli.tensorfile import read_header, read_metadata

Config = dict[str, Any]
METADATA = "lora_adapter_metadata"  # diffusers' key of the header
SHOWN = 8
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
STORAGE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # dtypes only for storage
DORA = ("lora_magnitude_vector",)
KINDS = {"lora": "LORA", "hada": "LOHA", "lokr": "LOKR"}
FIRST_CLIP = ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")
SAVE_AGAIN = "save it again in the tool that made it"
MERGE_THERE = "merge the file into its base with the tool that wrote it"
DIFF_ENDS = (".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias")  # added to weight or bias
OF_CONTROL = (".lora_B.bias", "_norm.scale")  # in `flux1-canny-dev-lora` and `flux1-depth-dev-lora`
SUPPORTED_TOOLS = "diffusers, kohya's scripts and LyCORIS write such files"


@dataclass
class DiffusionFile:
    """The contents of a file, by the file's own names."""

    path: Path
    peft_type: str
    use_dora: bool
    tensors: dict[str, Tensor]
    metadata: Config = field(default_factory=dict)
    """PEFT's configuration from the header; keys usually begin with the name of a part."""

    @property
    def config(self) -> Config:
        """The keys of PEFT's configuration that are known without the base."""
        dora = {"use_dora": True} if self.use_dora else {}
        return {"peft_type": self.peft_type, **dora}


def read_diffusion_file(path: Path) -> DiffusionFile:
    """Read a file, without running code from it.

    Raises:
        IntegrityError: If it is damaged.
        LoraError: If it does not hold an adapter, or one of a kind that is not supported.
    """
    at, entries = str(path), read_header(path)
    split_names = {name: split_name(name) for name in entries}
    unknown = [name for name, split in split_names.items() if split is None]
    if len(unknown) == len(entries):
        what = "this file holds no adapter of a diffusion model"
        hint = "name the folder of an adapter, or a file of LoRA matrices: "
        raise LoraError(what, at, hint + SUPPORTED_TOOLS)
    tensors = _supported(load_file(path), unknown, at)
    tensors = {n: t.float() if t.dtype in STORAGE_DTYPES else t for n, t in tensors.items()}
    split_names = {name: split_names[name] for name in tensors}
    bad = [n for n in tensors if entries[n].dtype not in WEIGHT_DTYPES]
    bad = [n for n in bad if not n.endswith(".alpha")]
    bad += [n for n, t in tensors.items() if n not in bad and not torch.isfinite(t.float()).all()]
    odd = [
        n
        for n, split in split_names.items()
        if split and not _is_valid_shape(split[1], entries[n].shape)
    ]
    if odd and not bad:
        what = (
            f"`{odd[0]}` is of shape {tuple(entries[odd[0]].shape)}, which such a tensor never has"
        )
        raise IntegrityError(what, at, SAVE_AGAIN)
    if bad:
        what = f"`{bad[0]}` is no weight, or contains NaN or infinity"
        raise IntegrityError(what, at, SAVE_AGAIN)
    added = {split[1] for split in split_names.values() if split is not None} - {"alpha"}
    kinds = sorted({KINDS[n.partition("_")[0]] for n in added if n not in DORA}) or ["LORA"]
    if kinds[0] != "LORA" and added.intersection(DORA):
        what = f"the file has DoRA's lengths (`dora_scale`) of updates of the kind {kinds[0]}"
        raise LoraError(what, at, MERGE_THERE)
    if len(kinds) > 1:
        what = f"the file has updates of several kinds: {', '.join(kinds)}"
        raise LoraError(what, at, MERGE_THERE)
    has_dora = bool(added.intersection(DORA))
    return DiffusionFile(path, kinds[0], has_dora, tensors, _header_config(path))


def _supported(
    tensors: Mapping[str, Tensor], unknown: Collection[str], at: str
) -> dict[str, Tensor]:
    """Return the tensors of a file without those of unsupported kinds, which must be zero.

    Args:
        tensors: All tensors of the file.
        unknown: Names of the tensors of unsupported kinds.
        at: The file's path, for errors.

    Raises:
        LoraError: For the unsupported tensors that are not zero.
    """
    zeros = [n for n in unknown if n.endswith(DIFF_ENDS) and not tensors[n].float().any()]
    rest = [name for name in unknown if name not in zeros]
    if rest:
        hint = MERGE_THERE
        if any(name.endswith(OF_CONTROL) for name in rest):
            hint = (
                "it is a control adapter of Black Forest Labs, whose model reads a second picture: "
                "draw with diffusers' `FluxControlPipeline`"
            )
        what = f"{len(rest)} of {len(tensors)} tensors cannot be read"
        shown = [f"`{name}` is a tensor of a kind that is not read" for name in rest[: SHOWN - 1]]
        raise LoraError([*map(Problem, shown), Problem(what, at, hint)])
    if zeros:
        detail = f"which is not read, and adds zeros: `{zeros[0]}`"
        warn(f"{at}: {counted(len(zeros), 'tensor')} of a kind {detail}")
    return {name: tensor for name, tensor in tensors.items() if name not in zeros}


def _is_valid_shape(kind: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor of this kind can have this shape."""
    if kind == "alpha":
        return math.prod(shape) == 1
    return len(shape) >= (1 if kind == "lora_magnitude_vector" else 2) and 0 not in shape


def _header_config(path: Path) -> Config:
    """Return PEFT's configuration of all parts, which diffusers stores in the header.

    Raises:
        IntegrityError: If it is not a JSON object.
    """
    text = read_metadata(path).get(METADATA)
    try:
        config = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        what = f"`{METADATA}` in its header is no JSON object"
        raise IntegrityError(what, str(path), SAVE_AGAIN)
    return config


# --------------------------------------------------------------------------------------- translate


def translated(
    file: DiffusionFile, model: nn.Module
) -> tuple[Config, dict[str, Tensor], tuple[str, ...]]:
    """Translate a file to the names of a base; return its configuration, tensors and parts.

    Args:
        file: The file, which is not changed.
        model: The base model.

    Raises:
        LoraError: If the base is not a diffusion model, or splits a layer with LoKr into modules.
        IntegrityError: For all names that match nothing in the base.
    """
    at = str(file.path)
    if not isinstance(model, Bundle):
        what = "this file is the adapter of a diffusion model, and the base is another model"
        raise LoraError(what, at, "name the base that it was made for: `--base`")
    by_module = _by_module(file, model)
    parts: dict[str, tuple[Config, dict[str, Tensor]]] = {}
    for part in dict.fromkeys(part for part, _ in by_module):
        part_tensors = {name: t for (owner, name), t in by_module.items() if owner == part}
        header = _part_header(file, part)
        if header:
            check_config({"peft_type": file.peft_type, **header}, at)
        parts[part] = _part_in_peft_format(file, model.parts[part], part_tensors, header)
    config, tensors = join_parts(parts, at)
    return config, tensors, tuple(parts)


def _part_header(file: DiffusionFile, part: str) -> Config:
    """Return PEFT's configuration of a part, or the whole configuration if it names no parts."""
    parts = (*DENOISERS, *TEXT_ENCODERS)
    if not any(key.partition(".")[0] in parts for key in file.metadata):
        return file.metadata  # written by `save_lora_adapter` of a single model
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}


def _by_module(file: DiffusionFile, model: Bundle) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return the tensors by part and module, and by their names in PEFT.

    Raises:
        IntegrityError: For all names that match nothing, or the same tensor as another name.
    """
    names, problems = ModuleNames(model.parts), []
    idle = _without_effect(file)
    left_out: list[str] = []
    by_module: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        split = split_name(name)
        assert split is not None, "reading has rejected such names"
        match = names.find(split[0])
        if match is None and split[0] in idle:
            left_out.append(name)
            continue
        if match is None:
            problems.append(Problem(f"`{name}` names no module of the base"))
            continue
        part, layer = match
        if split[1].startswith("lokr") and not layer.is_module:
            what = f"`{name}` is a Kronecker factor of a layer that is several modules in diffusers"
            raise LoraError(what, str(file.path), MERGE_THERE)
        n_rows = [n_outputs(model.parts[part].get_submodule(module)) for module in layer.modules]
        try:
            shares = split_tensor(layer, split[1], tensor, n_rows)
        except ValueError as error:
            problems.append(Problem(f"`{name}` {error}"))
            continue
        for module, share in zip(layer.modules, shares, strict=True):
            module_tensors = by_module.setdefault((part, module), {})
            if split[1] in module_tensors:
                problems.append(
                    Problem(f"`{name}` is the second `{split[1]}` of `{part}.{module}`")
                )
            module_tensors[split[1]] = share
    for place, module_tensors in by_module.items():
        if set(module_tensors) == {"alpha"}:
            problems.append(Problem(f"`{'.'.join(place)}` has an alpha and no matrices"))
    if problems:
        more = len(problems) - SHOWN
        shown = problems[:SHOWN] + ([Problem(f"and {more} more like these")] if more > 0 else [])
        missing_parts = sorted({
            match[0] for name in file.tensors for start, match in PREFIXES.items()
            if name.startswith(start) and not any(part in model.parts for part in match)
        })  # fmt: skip
        hint = "is this the base that it was made for?"
        if missing_parts:
            hint += f" It has no `{'`, no `'.join(missing_parts)}`"
        shown[-1] = Problem(shown[-1].what, str(file.path), hint)
        raise IntegrityError(shown)
    if left_out:
        what = f"{counted(len(left_out), 'tensor')} would change nothing in this base"
        warn(f"{file.path}: {what}, and have been left out: `{left_out[0]}`")
    return by_module


def _without_effect(file: DiffusionFile) -> set[str]:
    """Return the names of layers whose updates can be ignored if the base lacks the layer.

    These are zero updates, and those of CLIP's projection, whose output is not used by models that
    load CLIP without it.
    """
    split_names = {name: split_name(name) for name in file.tensors}
    return {
        split[0]
        for name, split in split_names.items()
        if split is not None
        and (
            (split[1] == "lora_B" and not file.tensors[name].any())
            or (split[0].endswith("text_projection") and split[0].startswith(FIRST_CLIP))
        )
    }


def _part_in_peft_format(
    file: DiffusionFile, part: nn.Module, by_module: Mapping[str, dict[str, Tensor]], header: Config
) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of one part in PEFT's format."""
    has_alphas = any("alpha" in own for own in by_module.values())
    if has_alphas and header:
        what = f"alpha stands twice in the file: in its header (`{METADATA}`), and in tensors"
        raise LoraError(what, str(file.path), "take one of the two out of the file")
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, own in by_module.items():
        module = part.get_submodule(name)
        rank, is_whole = _rank(own)
        ranks[name] = rank
        if header:
            header_rank = _header_value(header, "rank_pattern", name, header.get("r", 8))
            if header_rank != rank or (header.get("use_dora") and not file.use_dora):
                more = "" if header_rank != rank else " and DoRA's lengths"
                what = f"`{name}` has rank {rank}, and its header says {header_rank}{more}"
                raise IntegrityError(what, str(file.path), SAVE_AGAIN)
            alpha = header.get(PEFT_TYPES[file.peft_type].alpha, 8)
            alphas[name] = _header_value(header, "alpha_pattern", name, alpha)
        elif "alpha" in own and not is_whole:
            alphas[name] = float(own["alpha"])
        else:
            alphas[name] = rank  # LyCORIS does not scale full matrices
        matrices = {key: tensor for key, tensor in own.items() if key != "alpha"}
        for key, tensor in _in_peft_shapes(matrices, module).items():
            end = ".weight" if key in ("lora_A", "lora_B") else ""
            tensors[f"{name}.{key}{end}"] = tensor
    kind = PEFT_TYPES[file.peft_type]
    rslora = {"use_rslora": True} if header.get("use_rslora") else {}
    config = {**file.config, **rslora, "target_modules": sorted(by_module)}
    config["r"], config["rank_pattern"] = most_common(ranks)
    config[kind.alpha], config["alpha_pattern"] = most_common(alphas)
    if file.peft_type == "LOHA":
        config["use_effective_conv2d"] = any("hada_t1" in own for own in by_module.values())
    if file.peft_type == "LOKR":
        config |= _kronecker_config(part, by_module)
    return config, tensors


def _header_value(header: Config, patterns: str, name: str, default: float) -> float:
    """Return a module's value from the header, which may name it with CLIP's `text_model`."""
    values = header.get(patterns) or {}
    return first_match(values, name, first_match(values, f"text_model.{name}", default))


def _rank(tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the rank of an update, and whether it consists of full matrices without a rank."""
    for key in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if key in tensors and tensors[key].ndim:
            return int(tensors[key].shape[0]), False
    w2 = tensors.get("lokr_w2")  # a rank for which PEFT stores W2 as a full matrix
    return (max(w2.shape[:2]) if w2 is not None and w2.ndim > 1 else 1), True


def _in_peft_shapes(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module in PEFT's shapes."""
    result = dict(tensors)
    if "lora_mid" in result and {"lora_A", "lora_B"} <= result.keys():
        down, mid = result["lora_A"].float(), result.pop("lora_mid").float()
        result["lora_A"] = torch.einsum("rphw,pi->rihw", mid, down.flatten(1))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return result
    for key in ("lora_A", "lora_B"):
        tensor = result.get(key)
        if tensor is None or tensor.ndim < 2:
            continue
        is_point = tensor.numel() == tensor.shape[0] * tensor.shape[1]
        if is_point and tensor.ndim != weight.ndim:  # a linear layer was a 1 x 1 convolution
            ones = (1,) * (weight.ndim - 2)
            result[key] = tensor.reshape(*tensor.shape[:2], *ones)
    scale = result.get("lora_magnitude_vector")
    if scale is not None and scale.ndim > 1 and scale.shape[0] == scale.numel():
        one_row = (1, -1, *(1,) * (weight.ndim - 2)) if weight.ndim > 2 else (-1,)
        result["lora_magnitude_vector"] = scale.reshape(one_row)
    return result


def _kronecker_config(part: nn.Module, by_module: Mapping[str, dict[str, Tensor]]) -> Config:
    """Return PEFT's LoKr keys that lead to the shapes of the factors in the file."""
    config: Config = {
        "decompose_both": any("lokr_w1_a" in tensors for tensors in by_module.values()),
        "use_effective_conv2d": any("lokr_t2" in tensors for tensors in by_module.values()),
    }
    expected_factors = {}
    for name, tensors in by_module.items():
        module = part.get_submodule(name)
        first = tensors.get("lokr_w1", tensors.get("lokr_w1_a"))
        last = tensors.get("lokr_w1", tensors.get("lokr_w1_b"))
        if first is not None and last is not None and isinstance(module, nn.Linear | nn.Conv2d):
            expected_factors[weight_shape(module)[:2]] = (first.shape[0], last.shape[-1])
    candidates = [-1, *sorted({size for sizes in expected_factors.values() for size in sizes})]
    for factor in candidates:
        if all(
            tuple(lokr_factors(size, factor)[0] for size in shape) == sizes
            for shape, sizes in expected_factors.items()
        ):
            return {**config, "decompose_factor": factor}
    return {**config, "decompose_factor": -1}
