"""Read the adapter of a diffusion model that is a single file, of diffusers, kohya or LyCORIS.

Its names are those of other tools, and what they mean only the base tells: a file is read first,
and translated once the base is there. Every tensor is used then, or named in an error.

An alpha stands in a tensor next to each module; or, of diffusers, in the header as a part of PEFT's
configuration; without one the scaling is 1.
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
    STARTS,
    TEXT_ENCODERS,
    ModuleNames,
    split_name,
)
from lora_cli.adapters.peft_format.original_layers import n_outputs, shares_of
from lora_cli.adapters.peft_format.part_folders import joined, most_common
from lora_cli.adapters.peft_format.peft_config import check_config
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.whole_update import weight_shape
from lora_cli.errors import IntegrityError, LoraError, Problem, counted, warn
from lora_cli.models.bundle import Bundle
from lora_cli.tensorfile import read_header, read_metadata

Config = dict[str, Any]
METADATA = "lora_adapter_metadata"  # diffusers' key of the header
SHOWN = 8
WEIGHTS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)  # which are stored and not computed with
DORA = ("lora_magnitude_vector",)
KINDS = {"lora": "LORA", "hada": "LOHA", "lokr": "LOKR"}
FIRST_CLIP = ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")
ANEW = "save it again in the tool that made it"
MERGE_THERE = "merge the file into its base with the tool that wrote it"
ADDED = (".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias")  # to a weight or a bias
OF_CONTROL = (".lora_B.bias", "_norm.scale")  # of the files `flux1-canny-dev-lora` and `-depth-`
FROM_OTHERS = "diffusers, kohya's scripts and LyCORIS write such files"


@dataclass
class DiffusionFile:
    """What a file holds, by its own names."""

    path: Path
    peft_type: str
    use_dora: bool
    tensors: dict[str, Tensor]
    metadata: Config = field(default_factory=dict)
    """Keys of PEFT's configuration, mostly with the name of the part before each."""

    @property
    def config(self) -> Config:
        """What can be said of PEFT's configuration before the base is known."""
        dora = {"use_dora": True} if self.use_dora else {}
        return {"peft_type": self.peft_type, **dora}


def read_diffusion_file(path: Path) -> DiffusionFile:
    """Read a file; nothing in it is run.

    Raises:
        IntegrityError: If it is damaged.
        LoraError: If it holds something else than an adapter, or one of a kind that is not read.
    """
    at, entries = str(path), read_header(path)
    split = {name: split_name(name) for name in entries}
    unknown = [name for name, found in split.items() if found is None]
    if len(unknown) == len(entries):
        what = "this file holds no adapter of a diffusion model"
        hint = "name the folder of an adapter, or a file of LoRA matrices: "
        raise LoraError(what, at, hint + FROM_OTHERS)
    tensors = _known(load_file(path), unknown, at)
    tensors = {n: t.float() if t.dtype in NARROW else t for n, t in tensors.items()}
    split = {name: split[name] for name in tensors}
    bad = [n for n in tensors if entries[n].dtype not in WEIGHTS]
    bad = [n for n in bad if not n.endswith(".alpha")]
    bad += [n for n, t in tensors.items() if n not in bad and not torch.isfinite(t.float()).all()]
    odd = [n for n, found in split.items() if found and not _can_be(found[1], entries[n].shape)]
    if odd and not bad:
        what = (
            f"`{odd[0]}` is of shape {tuple(entries[odd[0]].shape)}, which such a tensor never has"
        )
        raise IntegrityError(what, at, ANEW)
    if bad:
        what = f"`{bad[0]}` is no weight, or contains NaN or infinity"
        raise IntegrityError(what, at, ANEW)
    added = {found[1] for found in split.values() if found is not None} - {"alpha"}
    kinds = sorted({KINDS[n.partition("_")[0]] for n in added if n not in DORA}) or ["LORA"]
    if kinds[0] != "LORA" and added.intersection(DORA):
        what = f"the file has DoRA's lengths (`dora_scale`) of updates of the kind {kinds[0]}"
        raise LoraError(what, at, MERGE_THERE)
    if len(kinds) > 1:
        what = f"the file has updates of several kinds: {', '.join(kinds)}"
        raise LoraError(what, at, MERGE_THERE)
    has_dora = bool(added.intersection(DORA))
    return DiffusionFile(path, kinds[0], has_dora, tensors, _header_config(path))


def _known(tensors: Mapping[str, Tensor], unknown: Collection[str], at: str) -> dict[str, Tensor]:
    """Return the tensors of a file without those of kinds that are not read, if they are zero.

    Args:
        tensors: All of them.
        unknown: The names of those of kinds that are not read.
        at: The file.

    Raises:
        LoraError: With the names of those that would change something.
    """
    zeros = [n for n in unknown if n.endswith(ADDED) and not tensors[n].float().any()]
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
        more = f"which is not read, and adds zeros: `{zeros[0]}`"
        warn(f"{at}: {counted(len(zeros), 'tensor')} of a kind {more}")
    return {name: tensor for name, tensor in tensors.items() if name not in zeros}


def _can_be(kind: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor of a kind can have a shape: a matrix, one number, or lengths."""
    if kind == "alpha":
        return math.prod(shape) == 1
    return len(shape) >= (1 if kind == "lora_magnitude_vector" else 2) and 0 not in shape


def _header_config(path: Path) -> Config:
    """Return PEFT's configuration of each part, which diffusers keeps in the header.

    Raises:
        IntegrityError: If it is no JSON object.
    """
    text = read_metadata(path).get(METADATA)
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        what = f"`{METADATA}` in its header is no JSON object"
        raise IntegrityError(what, str(path), ANEW)
    return found


# --------------------------------------------------------------------------------------- translate


def translated(
    file: DiffusionFile, model: nn.Module
) -> tuple[Config, dict[str, Tensor], tuple[str, ...]]:
    """Return an adapter by the names of a base: its configuration, its tensors, and its parts.

    Args:
        file: What the file holds; its tensors are not changed.
        model: The base.

    Raises:
        LoraError: If the base is no diffusion model, or a layer of LoKr is several modules of it.
        IntegrityError: With every name of the file that means nothing in the base.
    """
    at = str(file.path)
    if not isinstance(model, Bundle):
        what = "this file is the adapter of a diffusion model, and the base is another model"
        raise LoraError(what, at, "name the base that it was made for: `--base`")
    by_module = _by_module(file, model)
    parts: dict[str, tuple[Config, dict[str, Tensor]]] = {}
    for part in dict.fromkeys(part for part, _ in by_module):
        of_part = {name: own for (of, name), own in by_module.items() if of == part}
        given = _given(file, part)
        if given:
            check_config({"peft_type": file.peft_type, **given}, at)
        parts[part] = _of_part(file, model.parts[part], of_part, given)
    config, tensors = joined(parts, at)
    return config, tensors, tuple(parts)


def _given(file: DiffusionFile, part: str) -> Config:
    """Return PEFT's configuration of a part: its own, or the only one, which names no part."""
    parts = (*DENOISERS, *TEXT_ENCODERS)
    if not any(key.partition(".")[0] in parts for key in file.metadata):
        return file.metadata  # of a model's `save_lora_adapter`
    start = f"{part}."
    return {k.removeprefix(start): v for k, v in file.metadata.items() if k.startswith(start)}


def _by_module(file: DiffusionFile, model: Bundle) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return the tensors by part and module, with PEFT's names of them.

    Raises:
        IntegrityError: With every name that means nothing, or what another name means too.
    """
    names, problems = ModuleNames(model.parts), []
    idle = _without_effect(file)
    left_out: list[str] = []
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        split = split_name(name)
        assert split is not None, "reading has rejected such names"
        meant = names.find(split[0])
        if meant is None and split[0] in idle:
            left_out.append(name)
            continue
        if meant is None:
            problems.append(Problem(f"`{name}` names no module of the base"))
            continue
        part, layer = meant
        if split[1].startswith("lokr") and not layer.is_module:
            what = f"`{name}` is a Kronecker factor of a layer that is several modules in diffusers"
            raise LoraError(what, str(file.path), MERGE_THERE)
        n_rows = [n_outputs(model.parts[part].get_submodule(module)) for module in layer.modules]
        try:
            shares = shares_of(layer, split[1], tensor, n_rows)
        except ValueError as error:
            problems.append(Problem(f"`{name}` {error}"))
            continue
        for module, share in zip(layer.modules, shares, strict=True):
            own = found.setdefault((part, module), {})
            if split[1] in own:
                problems.append(
                    Problem(f"`{name}` is the second `{split[1]}` of `{part}.{module}`")
                )
            own[split[1]] = share
    for place, own in found.items():
        if set(own) == {"alpha"}:
            problems.append(Problem(f"`{'.'.join(place)}` has an alpha and no matrices"))
    if problems:
        more = len(problems) - SHOWN
        shown = problems[:SHOWN] + ([Problem(f"and {more} more like these")] if more > 0 else [])
        lacking = sorted({
            meant[0] for name in file.tensors for start, meant in STARTS.items()
            if name.startswith(start) and not any(part in model.parts for part in meant)
        })  # fmt: skip
        hint = "is this the base that it was made for?"
        if lacking:
            hint += f" It has no `{'`, no `'.join(lacking)}`"
        shown[-1] = Problem(shown[-1].what, str(file.path), hint)
        raise IntegrityError(shown)
    if left_out:
        what = f"{counted(len(left_out), 'tensor')} would change nothing in this base"
        warn(f"{file.path}: {what}, and have been left out: `{left_out[0]}`")
    return found


def _without_effect(file: DiffusionFile) -> set[str]:
    """Return the names of layers whose updates change nothing where the base lacks the layer.

    An update is zero; or it is of the projection of CLIP, whose result is not read by models that
    use CLIP without it.
    """
    ends = {name: split_name(name) for name in file.tensors}
    return {
        found[0]
        for name, found in ends.items()
        if found is not None
        and (
            (found[1] == "lora_B" and not file.tensors[name].any())
            or (found[0].endswith("text_projection") and found[0].startswith(FIRST_CLIP))
        )
    }


def _of_part(
    file: DiffusionFile, part: nn.Module, by_module: Mapping[str, dict[str, Tensor]], given: Config
) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of one part, as PEFT has them."""
    has_alphas = any("alpha" in own for own in by_module.values())
    if has_alphas and given:
        what = f"alpha stands twice in the file: in its header (`{METADATA}`), and in tensors"
        raise LoraError(what, str(file.path), "take one of the two out of the file")
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, own in by_module.items():
        module = part.get_submodule(name)
        rank, is_whole = _rank(own)
        ranks[name] = rank
        if given:
            stated = _stated(given, "rank_pattern", name, given.get("r", 8))
            if stated != rank or (given.get("use_dora") and not file.use_dora):
                more = "" if stated != rank else " and DoRA's lengths"
                what = f"`{name}` has rank {rank}, and its header says {stated}{more}"
                raise IntegrityError(what, str(file.path), ANEW)
            alpha = given.get(PEFT_TYPES[file.peft_type].alpha, 8)
            alphas[name] = _stated(given, "alpha_pattern", name, alpha)
        elif "alpha" in own and not is_whole:
            alphas[name] = float(own["alpha"])
        else:
            alphas[name] = rank  # LyCORIS scales by 1 what is no product
        matrices = {key: tensor for key, tensor in own.items() if key != "alpha"}
        for key, tensor in _fitted(matrices, module).items():
            end = ".weight" if key in ("lora_A", "lora_B") else ""
            tensors[f"{name}.{key}{end}"] = tensor
    kind = PEFT_TYPES[file.peft_type]
    rslora = {"use_rslora": True} if given.get("use_rslora") else {}
    config = {**file.config, **rslora, "target_modules": sorted(by_module)}
    config["r"], config["rank_pattern"] = most_common(ranks)
    config[kind.alpha], config["alpha_pattern"] = most_common(alphas)
    if file.peft_type == "LOHA":
        config["use_effective_conv2d"] = any("hada_t1" in own for own in by_module.values())
    if file.peft_type == "LOKR":
        config |= _kronecker_config(part, by_module)
    return config, tensors


def _stated(given: Config, patterns: str, name: str, default: float) -> float:
    """Return a module's number by the header, where it may have the name with `text_model`."""
    of_patterns = given.get(patterns) or {}
    return first_match(of_patterns, name, first_match(of_patterns, f"text_model.{name}", default))


def _rank(own: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the rank of an update, and whether it is one of whole matrices, which has none."""
    for key in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if key in own and own[key].ndim:
            return int(own[key].shape[0]), False
    whole = own.get("lokr_w2")  # as PEFT: of a rank from half of its size on, it is no product
    return (max(whole.shape[:2]) if whole is not None and whole.ndim > 1 else 1), True


def _fitted(own: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module in the shapes that PEFT gives them."""
    result = dict(own)
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
        if is_point and tensor.ndim != weight.ndim:  # a linear layer that was a 1 x 1 convolution
            ones = (1,) * (weight.ndim - 2)
            result[key] = tensor.reshape(*tensor.shape[:2], *ones)
    scale = result.get("lora_magnitude_vector")
    if scale is not None and scale.ndim > 1 and scale.shape[0] == scale.numel():
        one_row = (1, -1, *(1,) * (weight.ndim - 2)) if weight.ndim > 2 else (-1,)
        result["lora_magnitude_vector"] = scale.reshape(one_row)
    return result


def _kronecker_config(part: nn.Module, by_module: Mapping[str, dict[str, Tensor]]) -> Config:
    """Return the keys of PEFT's LoKr by which the factors have the shapes that they have."""
    config: Config = {
        "decompose_both": any("lokr_w1_a" in own for own in by_module.values()),
        "use_effective_conv2d": any("lokr_t2" in own for own in by_module.values()),
    }
    wanted = {}
    for name, own in by_module.items():
        module = part.get_submodule(name)
        first = own.get("lokr_w1", own.get("lokr_w1_a"))
        last = own.get("lokr_w1", own.get("lokr_w1_b"))
        if first is not None and last is not None and isinstance(module, nn.Linear | nn.Conv2d):
            wanted[weight_shape(module)[:2]] = (first.shape[0], last.shape[-1])
    tried = [-1, *sorted({size for sizes in wanted.values() for size in sizes})]
    for factor in tried:
        if all(
            tuple(lokr_factors(size, factor)[0] for size in shape) == sizes
            for shape, sizes in wanted.items()
        ):
            return {**config, "decompose_factor": factor}
    return {**config, "decompose_factor": -1}
